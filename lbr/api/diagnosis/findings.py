"""What a doctor says: one finding, how grave it is, and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbr.core.types import Json


class Gravity(StrEnum):
    """How grave a finding is, from nothing at all on."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `check` names it, `found` is what is there, `do` what to do, None for nothing."""

    check: str
    gravity: Gravity
    found: str
    do: str | None = None

    @property
    def is_grave(self) -> bool:
        """Whether somebody should do something."""
        return self.gravity in {Gravity.WARNING, Gravity.ERROR}

    def to_dict(self) -> dict[str, Json]:
        """Return the finding as JSON."""
        return asdict(self)


def split(words: str) -> tuple[str, str | None]:
    """Part a message of lbr into what was found and what to do."""
    found, _, do = words.partition("; ")
    return found, do or None
