"""Rate limits, calls at a time and budgets: arithmetic over one row that all workers share.

Requests and tokens a minute are token buckets. Calls at a time are learned as TCP learns its window: slow start, then
additive increase with multiplicative decrease (Jacobson, "Congestion Avoidance and Control", 1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lbr.core.pricing import dollars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.core.pricing import Price

MINUTE_MS = 60_000
FIRST_SLOTS = 100.0
"""Calls at a time for a new provider: as many connections as aiohttp and httpx open by default."""
MAX_CUT = 0.5
TOLERATED_SHARE = 0.2
"""Up to this share of refused calls, only the refused jobs wait: many providers refuse a few calls at random."""
MIN_ROUND = 10
"""The share is taken over the calls in flight, or this many if they are fewer."""
EPSILON = 1e-6
RETRY_MS = 100
"""How long to wait for a slot, because nothing says when one will be free."""
KNOWN_CALLS = 50
"""After this many calls their cost is trusted; before, at most twice as many as have ended are in flight."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What is set for and learned of one model. Times are milliseconds; None is what was never set or seen.

    `rpm` and `tpm` are requests and tokens a minute, `requests` and `tokens` what was left of them at `balanced_at`.
    `concurrency` fixes the calls at a time of all workers; otherwise `slots` is learned: it doubles up to `threshold`
    and was last cut at `cut_at`. `refused` is the share of recent calls that were refused, and `answered` how many
    calls had been answered, in all runs, at its last update.
    """

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    slots: float | None = None
    threshold: float | None = None
    cut_at: int | None = None
    requests: float | None = None
    tokens: float | None = None
    balanced_at: int | None = None
    refused: float | None = None
    answered: int | None = None

    @property
    def refuses_much(self) -> bool:
        """Whether so many calls are refused that fewer should be made, and all workers wait."""
        return (self.refused or 0.0) > TOLERATED_SHARE

    @property
    def at_a_time(self) -> int | None:
        """How many calls may be in flight, over all workers; None for any number."""
        if self.concurrency is not None:
            return self.concurrency
        return None if self.slots is None else max(1, math.floor(self.slots))

    def binds(self, ceiling: int) -> bool:
        """Return whether it holds anything back if all workers together have `ceiling` slots."""
        throttled = self.at_a_time is not None and self.at_a_time < ceiling
        return self.rpm is not None or self.tpm is not None or throttled


def capacity(per_minute: int) -> float:
    """Return what a bucket holds: what a second fills in, or one call and what comes in between two polls."""
    return max(per_minute / 60, 1 + per_minute / 300)


def refilled(limit: Limit, now: int) -> Limit:
    """Return the limit with what has come in since it was last balanced; a new bucket is full."""
    before = limit.balanced_at
    # After a time of a wrong clock, far ahead, nothing would come in until then.
    if before is None or before > now + MINUTE_MS:
        limit, before = replace(limit, requests=None, tokens=None), now
    passed = max(0, now - before)  # a transaction that waited for a lock has an older time

    def filled(balance: float | None, per_minute: int | None) -> float | None:
        if per_minute is None or balance is None:
            return None if per_minute is None else capacity(per_minute)
        # Unused tokens that were given back may exceed the bucket; only the refill is bounded by it.
        return max(balance, min(capacity(per_minute), balance + per_minute * passed / MINUTE_MS))

    requests, tokens = filled(limit.requests, limit.rpm), filled(limit.tokens, limit.tpm)
    return replace(limit, requests=requests, tokens=tokens, balanced_at=max(now, before))


def room(limit: Limit, inflight: int) -> int | None:
    """Return how many calls a refilled limit lets through now; None for any number."""
    bounds = []
    if limit.at_a_time is not None:
        bounds.append(limit.at_a_time - inflight)
    if limit.requests is not None:
        bounds.append(math.floor(limit.requests + EPSILON))
    if limit.tokens is not None and limit.tokens <= 0:
        bounds.append(0)
    return max(0, min(bounds)) if bounds else None


def fitting(limit: Limit, sizes: Sequence[int]) -> int:
    """Return how many calls of these tokens, in this order, a refilled limit lets through.

    The last one may overdraw the bucket, so that a call larger than the bucket is paced like the others.
    """
    left = math.inf if limit.tokens is None else limit.tokens
    for count, size in enumerate(sizes):
        if left <= 0:
            return count
        left -= size
    return len(sizes)


def wait_ms(limit: Limit, inflight: int) -> int:
    """Return after how long a refilled limit may let a call through, 0 for now."""
    waits = [0]
    if limit.rpm is not None and limit.requests is not None and limit.requests < 1 - EPSILON:
        waits.append(math.ceil((1 - limit.requests) * MINUTE_MS / limit.rpm - EPSILON))
    if limit.tpm is not None and limit.tokens is not None and limit.tokens <= 0:
        waits.append(math.floor(-limit.tokens * MINUTE_MS / limit.tpm + EPSILON) + 1)
    if limit.at_a_time is not None and inflight >= limit.at_a_time:
        waits.append(RETRY_MS)
    return max(waits)


def debited(limit: Limit, calls: int, tokens: int) -> Limit:
    """Return the limit after this many calls and tokens; negative numbers give back."""
    return replace(
        limit,
        requests=None if limit.requests is None else limit.requests - calls,
        tokens=None if limit.tokens is None else limit.tokens - tokens,
    )


def grown(limit: Limit, successes: int, ceiling: int) -> Limit:
    """Return the limit after this many successful calls, grown at most to the slots of all workers (`ceiling`).

    It never shrinks here, and does not grow until the share of refused calls is well below what is tolerated.
    """
    if limit.slots is None or 2 * (limit.refused or 0.0) > TOLERATED_SHARE:
        return limit
    doubling = limit.threshold is None or limit.slots < limit.threshold
    more = successes if doubling else successes / limit.slots
    return replace(limit, slots=max(1.0, limit.slots, min(float(ceiling), limit.slots + more)))


def observed(limit: Limit, *, refusals: int, answered: int, inflight: int) -> Limit:
    """Return the limit after this many more refusals, with the share of refused calls updated.

    The share is a moving average over about as many calls as are in flight. `answered` counts all answered calls so
    far; those since the last update are taken to have ended before the refusals.
    """
    before = answered if limit.answered is None else limit.answered
    keep = 1 - 1 / max(MIN_ROUND, inflight)
    share = (limit.refused or 0.0) * keep ** max(0, answered - before)
    return replace(limit, refused=1 - (1 - share) * keep**refusals, answered=answered)


def cut(limit: Limit, *, began: int, now: int, inflight: int, ceiling: int) -> Limit:
    """Return the limit after a call that `began` then was one too many; cut once for each round of calls.

    It is cut by the share of refused calls, by half at most, and not while that share is tolerated. `inflight` counts
    this call too, `ceiling` is the slots of all workers.
    """
    if not limit.refuses_much or (limit.cut_at is not None and began < limit.cut_at <= now):
        return limit
    before = min(limit.slots if limit.slots is not None else math.inf, max(1, inflight), max(1, ceiling))
    slots = max(1.0, before * (1 - min(MAX_CUT, limit.refused or 0.0)))
    return replace(limit, slots=slots, threshold=slots, cut_at=now)


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

    `calls` are answered calls whose cost is known, `inflight` those that have not ended, and `pending` the jobs that
    wait for one. `highest` is the highest cost of a call so far, or the highest bound of a claimed one; `estimated` is
    the part of `spent` for calls that died with their worker. With `bounded`, the maximum cost of each call is known,
    so that the first ones need not go alone. `parked` are the jobs in batches, which may cost `held` together.
    """

    limit: int
    spent: int
    calls: int
    inflight: int
    pending: int = 0
    highest: int = 0
    estimated: int = 0
    bounded: bool = False
    parked: int = 0
    held: int = 0

    @property
    def mean(self) -> int:
        """What a call has cost so far, rounded up; 0 while that is not known."""
        return -(-(self.spent - self.estimated) // self.calls) if self.calls else 0

    @property
    def reserved(self) -> int:
        """What is reserved for each call in flight: no call so far was more expensive."""
        return max(self.highest, self.mean)

    @property
    def likely(self) -> int | None:
        """What a call that died with its worker probably cost; None if nothing is known."""
        return (self.mean if self.calls else self.highest) or None

    @property
    def room(self) -> int | None:
        """How many more calls fit beside those in flight; None for any number.

        If only the average cost of a call still fits, one goes alone, like the first call of an unbounded run.
        """
        left = self.limit - self.spent - self.held
        if left <= 0 or self.mean > left:
            return 0
        rooms = []
        if not self.bounded and self.calls < KNOWN_CALLS:
            rooms.append(max(1, 2 * self.calls) - self.inflight)
        if self.reserved:
            rooms.append(max(left // self.reserved, 1) - self.inflight)
        return max(0, min(rooms)) if rooms else None

    def fitting(self, bounds: Sequence[int]) -> int:
        """Return how many calls, in this order, fit with what each may cost at most; a call that is alone always does."""
        reserved = self.reserved
        for count, bound in enumerate(bounds):
            reserved, flights = max(reserved, bound), self.inflight + count + 1
            alone = flights == 1 and not self.held
            if not alone and flights * reserved > self.limit - self.spent - self.held:
                return count
        return len(bounds)

    def reserve(self, bounds: Sequence[int]) -> tuple[int, int]:
        """Return how many calls of a batch, in this order, fit with what each may cost, and their cost together."""
        total, left = 0, self.limit - self.spent - self.held - self.inflight * self.reserved
        if self.room == 0:
            return 0, 0
        for count, bound in enumerate(bounds):
            if total + bound > left and (count or self.inflight or self.held):
                return count, total
            total += bound
        return len(bounds), total

    @property
    def is_spent(self) -> bool:
        """Whether not even one more call fits, and none is in flight or in a batch that might leave room."""
        return self.inflight == 0 and self.parked == 0 and self.room == 0

    @property
    def spent_message(self) -> str:
        """Why a run with a spent budget is paused."""
        return f"it may cost {dollars(self.limit)}, with {dollars(self.spent)} spent there is no room for a call"


UNBOUNDED = "nothing bounds what a call may cost, so the run may exceed its limit by the calls in flight"
BOUND_ADVICE = "set max_tokens with --set max_tokens=N at the enqueue"
"""The warning for a run whose cost is limited but not the length of its answers, and what to do if a model answers."""
