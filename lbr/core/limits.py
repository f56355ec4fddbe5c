"""How much of an answerer's limits is left, as plain arithmetic over one row that all workers share.

Requests and tokens a minute are token buckets: each is filled at its rate, holds what a second fills in, and may be
overdrawn by the last call that is let through, so that a call larger than the bucket is paced like the others.
Only the refill is bounded by what a bucket holds. Tokens that a call did not use come back in full, above it too.
The number of calls at a time is learned as TCP learns its window: it doubles while nothing goes wrong, is cut when the
provider refuses too large a share of a round of calls, and then grows by one for each round (slow start and additive
increase with multiplicative decrease; Jacobson, "Congestion Avoidance and Control", 1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MINUTE_MS = 60_000
BURST_SECONDS = 1.0
LOOK_SECONDS = 0.2
FIRST_SLOTS = 100.0
"""Calls at a time with which a provider of which nothing is known is begun.

As many connections as aiohttp and httpx open where nobody says how many, so nearly all providers take so many calls;
what is refused for being too many costs nothing, and a start from fewer costs a round of calls, which may be minutes,
for each doubling.
"""
MAX_CUT = 0.5
TOLERATED_SHARE = 0.2
"""Up to this share of refused calls, only the refused jobs wait: many providers refuse a few calls at random."""
MIN_ROUND = 10
"""The share is taken over the calls in flight, but over at least this many: three refusals in a row always count."""
EPSILON = 1e-6
RETRY_MS = 100
"""How long to wait for a slot: nobody knows when one will be free."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What is set and known of one answerer. Times are milliseconds; None is what nobody has set or seen.

    `rpm` and `tpm` are requests and tokens a minute, `requests` and `tokens` what was left of them at
    `balanced_at`. `concurrency` fixes the calls at a time of all workers together; else it is `slots`, learned,
    which doubles up to `threshold` and was last cut at `cut_at`. `refused` is the share of calls refused of late,
    and `answered` how many calls had been answered, in all runs, when it was last updated.
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
        """How many calls may be in flight, in all workers together; None for as many as they have slots."""
        if self.concurrency is not None:
            return self.concurrency
        return None if self.slots is None else max(1, math.floor(self.slots))

    def binds(self, ceiling: int) -> bool:
        """Tell whether it holds anything back, where the workers have `ceiling` slots together."""
        throttled = self.at_a_time is not None and self.at_a_time < ceiling
        return self.rpm is not None or self.tpm is not None or throttled


def capacity(per_minute: int) -> float:
    """Return what a bucket holds: as much as a second fills in, or one call and what comes in between two looks."""
    return max(per_minute * BURST_SECONDS / 60, 1 + per_minute * LOOK_SECONDS / 60)


def refilled(limit: Limit, now: int) -> Limit:
    """Return the limit with what has come in since it was last balanced; a new bucket is full."""
    # Who waited for a lock comes with an older time, which takes nothing away. A time that is far ahead is that of
    # a clock which has been set right since: nothing would come in until then.
    before = limit.balanced_at if limit.balanced_at is not None else now
    before = now if before > now + MINUTE_MS else before
    passed = max(0, now - before)
    # What nobody says when it was left would never be refilled, for a claim that takes nothing writes nothing down.
    left = (None, None) if limit.balanced_at is None else (limit.requests, limit.tokens)
    return replace(
        limit,
        requests=_filled(left[0], limit.rpm, passed),
        tokens=_filled(left[1], limit.tpm, passed),
        balanced_at=max(now, before),
    )


def _filled(balance: float | None, per_minute: int | None, passed: int) -> float | None:
    if per_minute is None:
        return None
    full = capacity(per_minute)
    if balance is None:
        return full
    # What was given back may be more than the bucket holds; only what comes in is bounded by it.
    return max(balance, min(full, balance + per_minute * passed / MINUTE_MS))


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
    """Return how many calls of these tokens, in this order, a refilled limit lets through."""
    left = limit.tokens
    if left is None:
        return len(sizes)
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
    """Return the limit after so many calls of so many tokens; negative ones give back."""
    return replace(
        limit,
        requests=None if limit.requests is None else limit.requests - calls,
        tokens=None if limit.tokens is None else limit.tokens - tokens,
    )


def grown(limit: Limit, successes: int, ceiling: int) -> Limit:
    """Return the limit after so many calls went well: grown no further than to the slots that the workers have.

    Fewer workers than before take nothing away: with the next ones it holds again. It does not grow before the share
    of refused calls is well below what is tolerated.
    """
    if limit.slots is None or 2 * (limit.refused or 0.0) > TOLERATED_SHARE:
        return limit
    doubling = limit.threshold is None or limit.slots < limit.threshold
    more = successes if doubling else successes / limit.slots
    return replace(limit, slots=max(1.0, limit.slots, min(float(ceiling), limit.slots + more)))


def observed(limit: Limit, *, refusals: int, answered: int, inflight: int) -> Limit:
    """Return the limit after this many more refusals, with the share of refused calls brought up to date.

    The share is a moving average over about as many calls as are in flight. `answered` counts all answered calls so
    far; those since the last update are taken to have ended before the refusals.
    """
    before = answered if limit.answered is None else limit.answered
    share = limit.refused or 0.0
    keep = 1 - 1 / max(MIN_ROUND, inflight)
    share *= keep ** max(0, answered - before)
    share = 1 - (1 - share) * keep**refusals
    return replace(limit, refused=share, answered=answered)


def cut(limit: Limit, *, began: int, now: int, inflight: int, ceiling: int) -> Limit:
    """Return the limit after a call that `began` then was one too many; once for each round of calls.

    It is cut by the share of calls refused, by half at most, and not at all while that share is tolerated.
    `inflight` are the calls in flight with this one, `ceiling` the slots of all workers. What a person fixed stays.
    """
    if not limit.refuses_much or (limit.cut_at is not None and began < limit.cut_at <= now):
        return limit
    before = min(limit.slots if limit.slots is not None else math.inf, max(1, inflight), max(1, ceiling))
    slots = max(1.0, before * (1 - min(MAX_CUT, limit.refused or 0.0)))
    return replace(limit, slots=slots, threshold=slots, cut_at=now)
