"""Values and decisions: no database, no network, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:

    def value(*, frozen: bool, slots: bool) -> Any:
        """Make a class of values that compare and hash by their fields.

        The type checker, not the interpreter, keeps them from changing: a frozen dataclass takes six times as long to
        make as a plain one, and every call makes half a dozen.
        """
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["value"]
