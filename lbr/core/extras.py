"""What a run keeps of each reply besides the answer, if it was asked for."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

import orjson

from lbr.core import value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lbr.core.types import Json


class Extra(StrEnum):
    """What a run may keep besides its answers."""

    REASONING = "reasoning"
    LOGPROBS = "logprobs"
    RAW = "raw"


@value(frozen=True, slots=True)
class Extras:
    """What came with an answer, by `Extra`: None if it is not kept, "" if none came. `logprobs` is JSON."""

    reasoning: str | None = None
    logprobs: str | None = None
    raw: str | None = None

    def to_dict(self, kinds: Iterable[Extra]) -> dict[str, Json]:
        """Return these kinds as they are collected, None for what did not come or is not kept."""
        found: dict[str, Json] = {str(kind): getattr(self, kind) or None for kind in kinds}
        if found.get(Extra.LOGPROBS):
            with suppress(ValueError):  # another program wrote it
                found[Extra.LOGPROBS] = orjson.loads(found[Extra.LOGPROBS])
        return found
