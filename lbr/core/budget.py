"""How many calls a run can still afford, as plain arithmetic over its counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbr.core.pricing import dollars

KNOWN_CALLS = 50
"""After so many calls their mean is trusted; before, no more are in flight than twice those that have ended."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may cost and has cost, in billionths of a US dollar.

    `calls` are those that were answered, well or not, and of which it is known what they cost, `inflight` those that
    have not ended, and `pending` the jobs that wait for one.
    """

    limit: int
    spent: int
    calls: int
    inflight: int
    pending: int = 0

    @property
    def room(self) -> int | None:
        """How many more calls fit beside those in flight, each at the mean so far; None for any number.

        The first call goes alone, for nothing is known of what they cost.
        """
        if self.spent >= self.limit:
            return 0
        if self.calls and not self.spent and self.calls >= KNOWN_CALLS:
            return None
        rooms = [] if self.calls >= KNOWN_CALLS else [max(1, 2 * self.calls) - self.inflight]
        if self.spent:
            each = self.spent / max(1, self.calls)
            rooms.append(math.floor((self.limit - self.spent) / each) - self.inflight)
        return max(0, min(rooms))

    @property
    def is_spent(self) -> bool:
        """Whether not even one more call fits, and none is in flight that might leave room."""
        return self.inflight == 0 and self.room == 0

    def words(self) -> str:
        """Say that it is spent."""
        return f"{BUDGET_SPENT}{dollars(self.limit)}, with {dollars(self.spent)} spent there is no room for a call"


BUDGET_SPENT = "it may cost "
"""How the reason begins of a run that was paused for its budget."""

COST_UNKNOWN = "its calls tell no cost"
"""How the reason begins of a run that was paused because nobody could keep to its budget."""


def unknown_words(answerer: str, *, counted: bool) -> str:
    """Say that a call took nobody knows how much money; `counted` tells that its tokens are known."""
    if counted:
        return (
            f"{COST_UNKNOWN}: expected a price for {answerer}, got: none; give it with --price in=…,out=… at the "
            f"enqueue, which may be repeated"
        )
    return (
        f"{COST_UNKNOWN}: expected {answerer} to count their tokens, got: none; where they are free, give "
        f"--price in=0,out=0 at the enqueue, which may be repeated"
    )
