"""How many calls a run can still afford, as plain arithmetic over its counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.core.pricing import dollars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.core.pricing import Price

KNOWN_CALLS = 50
"""After so many calls what they cost is trusted; before, no more are in flight than twice those that have ended."""


@dataclass(frozen=True, slots=True)
class CallBound:
    """What one call may cost at most, apart from its prompt: the price, and the tokens that it adds."""

    price: Price
    input_tokens: int
    output_tokens: int

    def nanos(self, prompt_tokens: int, max_tokens: int | None = None) -> int:
        """Return the bound of a call; `max_tokens` is the job's own, None if it has none."""
        output = self.output_tokens if max_tokens is None else max_tokens
        return self.price.cost_nanos(self.input_tokens + prompt_tokens, output)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may cost and has cost, in billionths of a US dollar.

    `calls` are those that were answered, well or not, and of which it is known what they cost, `inflight` those that
    have not ended, and `pending` the jobs that wait for one. `highest` is the highest cost of a call seen so far, or
    that a claimed call may reach; `estimated` is the part of `spent` for calls that died with their worker.
    With `bounded`, it is known what each call may cost at most, so that even the first ones need not go alone.
    """

    limit: int
    spent: int
    calls: int
    inflight: int
    pending: int = 0
    highest: int = 0
    estimated: int = 0
    bounded: bool = False

    @property
    def mean(self) -> int:
        """What a call has cost so far, rounded up; 0 while that is not known."""
        return -(-(self.spent - self.estimated) // self.calls) if self.calls else 0

    @property
    def reserved(self) -> int:
        """What is reserved for each call in flight: no call seen so far was more expensive."""
        return max(self.highest, self.mean)

    @property
    def likely(self) -> int | None:
        """What a call of which nothing was heard probably cost; None if there is nothing to go by."""
        return (self.mean if self.calls else self.highest) or None

    @property
    def room(self) -> int | None:
        """How many more calls fit beside those in flight; None for any number.

        If what is reserved for one does not fit any more, but what it usually costs does, one goes alone. The first
        call, too, goes alone unless the calls are bounded.
        """
        left = self.limit - self.spent
        if left <= 0 or self.mean > left:
            return 0
        if self.calls >= KNOWN_CALLS and not self.reserved:
            return None
        known = self.bounded or self.calls >= KNOWN_CALLS
        rooms = [] if known else [max(1, 2 * self.calls) - self.inflight]
        if self.reserved:
            rooms.append(max(left // self.reserved, 1) - self.inflight)
        return max(0, min(rooms)) if rooms else None

    def fitting(self, bounds: Sequence[int]) -> int:
        """Return how many calls, in this order, fit with what each may cost at most; one that is alone always does."""
        reserved = self.reserved
        for count, bound in enumerate(bounds):
            reserved, flights = max(reserved, bound), self.inflight + count + 1
            if flights > 1 and flights * reserved > self.limit - self.spent:
                return count
        return len(bounds)

    @property
    def is_spent(self) -> bool:
        """Whether not even one more call fits, and none is in flight that might leave room."""
        return self.inflight == 0 and self.room == 0

    def words(self) -> str:
        """Say that it is spent."""
        return (
            f"it may cost {dollars(self.limit)}, with {dollars(self.spent)} spent there is no room for a call"
        )


def unknown_words(answerer: str, *, counted: bool) -> str:
    """Say that a call took nobody knows how much money; `counted` tells that its tokens are known."""
    if counted:
        return (
            f"its calls tell no cost: expected a price for {answerer}, got: none; give it with --price in=…,out=… at the "
            f"enqueue, which may be repeated"
        )
    return (
        f"its calls tell no cost: expected {answerer} to count their tokens, got: none; where they are free, give "
        f"--price in=0,out=0 at the enqueue, which may be repeated"
    )


UNBOUNDED = (
    "nothing bounds what a call may cost, so it may cost more than its limit by the calls in flight; "
    "set max_tokens with --set max_tokens=N at the enqueue"
)
"""What to hear of a run whose cost is limited, but not the length of its answers."""
