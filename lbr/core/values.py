"""Values that nobody changes: the type checker sees to it, so that making one need not.

A frozen dataclass sets its fields through `object.__setattr__`, which takes six times as long as setting them, and
every call makes half a dozen values. So `@value(frozen=True, slots=True)` is a frozen dataclass to whoever reads or
checks the code, and a plain one that compares and hashes by its fields when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:

    def value(*, frozen: bool, slots: bool) -> Any:
        """Make a class of values."""
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["value"]
