"""The arithmetic of limits: what a minute lets through, how tokens are overdrawn, how calls at a time are learned."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from lbr.core.limits import (
    Budget,
    CallBound,
    Limit,
    capacity,
    cut,
    debited,
    fitting,
    grown,
    observed,
    refilled,
    room,
    wait_ms,
)
from lbr.core.pricing import Price


def drained(limit: Limit, seconds: int, *, step_ms: int, tokens: int = 0) -> int:
    """Count the calls of a worker that takes all that it may, every so often."""
    calls = 0
    for now in range(0, seconds * 1000, step_ms):
        limit = refilled(limit, now)
        count = min(room(limit, 0) or 0, 2_000)
        count = fitting(limit, [tokens] * count)
        limit = debited(limit, count, count * tokens)
        calls += count
    return calls


@pytest.mark.parametrize("rpm", [1, 7, 60, 600, 6_000, 90_000])
@pytest.mark.parametrize("step_ms", [10, 37, 100])
def test_requests_a_minute(rpm: int, step_ms: int) -> None:
    """Two minutes let through twice as many as one, and at most a second's worth more at once."""
    calls = drained(Limit(rpm=rpm), 120, step_ms=step_ms)
    lost = step_ms / 1000 * rpm / 60 + 1  # at the end
    assert 2 * rpm - lost <= calls <= 2 * rpm + capacity(rpm)


@pytest.mark.parametrize("tokens", [1, 40, 700, 30_000])
def test_tokens_a_minute(tokens: int) -> None:
    """Calls of any size, larger than the bucket too, take what a minute lets through, and one call more at most."""
    tpm = 60_000
    used = tokens * drained(Limit(tpm=tpm, concurrency=1_000), 120, step_ms=20, tokens=tokens)
    assert 2 * tpm - tokens - capacity(tpm) <= used <= 2 * tpm + capacity(tpm) + tokens


def test_bucket_is_never_fuller_than_a_second() -> None:
    """Hours without calls save nothing up, and a clock that is set back takes nothing away."""
    limit = debited(refilled(Limit(rpm=600, tpm=6_000), 0), 10, 100)
    assert (limit.requests, limit.tokens) == (0, 0)
    later = refilled(limit, 10 * 3_600_000)
    assert (later.requests, later.tokens) == (10, 100)
    back = refilled(debited(later, 4, 40), 10 * 3_600_000 - 30_000)
    assert (back.requests, back.tokens, back.balanced_at) == (6, 60, later.balanced_at)


def test_a_balance_without_its_time_is_a_full_bucket() -> None:
    """What nobody says when it was left would never be refilled: it holds nobody back."""
    limit = refilled(Limit(rpm=600, tpm=6_000, requests=0.5, tokens=-1e9), 1_000)
    assert (limit.requests, limit.tokens) == (10, 100)


def test_bucket_fills_again_after_a_clock_was_far_ahead() -> None:
    """A clock that was set right holds nobody back until the time that it showed before."""
    ahead = debited(refilled(Limit(rpm=600, tpm=6_000), 24 * 3_600_000), 10, 100)
    right = refilled(ahead, 1_000)
    assert (right.requests, right.tokens, right.balanced_at) == (10, 100, 1_000)


@pytest.mark.parametrize("limit", [Limit(rpm=7), Limit(tpm=500), Limit(rpm=90, tpm=100)])
def test_wait_is_just_long_enough(limit: Limit) -> None:
    """After the wait that is told, and not a hundredth sooner, a call is let through."""
    now, rng = 0, Random(1)
    for _ in range(200):
        limit = refilled(limit, now)
        wait = wait_ms(limit, 0)
        if wait:
            early = refilled(limit, now + math.floor(wait * 0.98) - 1)
            assert room(early, 0) == 0
            now += wait
            limit = refilled(limit, now)
        assert wait_ms(limit, 0) == 0
        assert room(limit, 0) != 0
        limit = debited(limit, 1, rng.randrange(1, 100))


def test_unset_limits_hold_nothing_back() -> None:
    """Without any limit there is room for all; a fixed number counts what is in flight."""
    assert room(refilled(Limit(), 5), 1_000) is None
    assert not Limit().binds(8)
    assert not Limit(slots=8.0).binds(8)
    assert Limit(slots=7.9).binds(8)
    assert [room(Limit(concurrency=3), inflight) for inflight in (0, 2, 3, 9)] == [3, 1, 0, 0]
    assert Limit(concurrency=3, slots=1.0).at_a_time == 3
    assert Limit(slots=0.2).at_a_time == 1


def test_slots_double_then_grow_by_one() -> None:
    """Each round of calls that go well doubles them up to the threshold, then adds one, up to what workers have."""
    limit = Limit(slots=8.0)
    for expected in (16, 32, 64, 100, 100):
        limit = grown(limit, round(limit.slots or 0), 100)
        assert limit.slots == expected
    assert grown(limit, 5, 8) == limit  # most workers have ended; the next ones need not learn anew
    after = cut(replace(limit, refused=0.9), began=1_000, now=2_000, inflight=100, ceiling=100)
    assert (after.slots, after.threshold, after.cut_at) == (50, 50, 2_000)
    rounds = replace(after, refused=0.0)
    for _ in range(10):
        for _ in range(round(rounds.slots or 0)):
            rounds = grown(rounds, 1, 100)
    assert 59 <= (rounds.slots or 0) <= 61


def test_one_cut_for_each_round() -> None:
    """Calls that began before the cut say nothing new; what is cut is what was in flight, and one call always stays."""
    limit = cut(Limit(refused=1.0), began=0, now=1_000, inflight=40, ceiling=64)
    assert limit.slots == 20
    assert cut(limit, began=900, now=1_100, inflight=40, ceiling=64) == limit
    again = cut(limit, began=1_050, now=1_200, inflight=30, ceiling=64)
    assert again.slots == 10
    for now in range(2_000, 10_000, 1_000):
        again = cut(again, began=now, now=now, inflight=1, ceiling=64)
    assert again.slots == 1
    assert grown(Limit(rpm=5), 10, 64) == Limit(rpm=5)


def test_the_share_refused_follows_the_calls_in_flight() -> None:
    """It is an average over about one round of calls, and counts the answers of all workers between two refusals."""
    limit = observed(Limit(), refusals=1, answered=500, inflight=50)
    assert limit.answered == 500
    assert limit.refused == pytest.approx(0.02)
    assert observed(limit, refusals=0, answered=550, inflight=50).refused == pytest.approx(0.02 / math.e, rel=0.05)
    assert observed(limit, refusals=1, answered=5_000, inflight=50).refused == pytest.approx(0.02)
    assert observed(limit, refusals=0, answered=20, inflight=50).refused == limit.refused  # a run was removed
    assert not observed(Limit(), refusals=2, answered=0, inflight=1).refuses_much
    assert observed(Limit(), refusals=3, answered=0, inflight=1).refuses_much
    assert observed(Limit(), refusals=30, answered=0, inflight=32).refused > 0.6  # type: ignore[operator]


def test_concurrency_is_cut_by_the_share_refused() -> None:
    """A tolerated share cuts nothing; above it the cut is the share, but half at most."""
    limit = Limit(slots=64.0)
    for share, expected in ((0.03, 64), (0.2, 64), (0.25, 48), (0.4, 38.4), (0.6, 32), (1.0, 32)):
        after = cut(replace(limit, refused=share), began=0, now=1, inflight=64, ceiling=64)
        assert after.slots == pytest.approx(expected)
    assert grown(replace(limit, refused=0.15), 64, 128).slots == 64
    assert grown(replace(limit, refused=0.03, threshold=64.0), 64, 128).slots == 65


@pytest.mark.parametrize(("share", "slots"), [(0.01, 32), (0.03, 32), (0.02, 64), (0.05, 64)])
def test_random_refusals_barely_cut(share: float, slots: int) -> None:
    """10,000 calls of which a few are refused at random keep nearly all their slots, and cool down almost never."""
    chance, limit, answers, cooled, total = Random(1), Limit(slots=float(slots)), 0, 0, 0.0
    for now in range(10_000):
        refused = chance.random() < share
        answers += not refused
        if refused:
            limit = observed(limit, refusals=1, answered=answers, inflight=slots)
            limit = cut(limit, began=now, now=now, inflight=slots, ceiling=slots)
            cooled += limit.refuses_much
        else:
            limit = grown(limit, 1, slots)
        total += limit.slots or 0
    assert total / 10_000 > 0.95 * slots
    assert cooled <= 3


def test_a_quota_cuts_quickly() -> None:
    """Where nearly every call is refused, six rounds bring 128 calls at a time down to 2."""
    limit = Limit(slots=128.0)
    for now in range(6):
        calls = limit.at_a_time or 0
        limit = observed(limit, refusals=max(1, calls - 1), answered=now, inflight=calls)
        assert limit.refuses_much
        limit = cut(limit, began=now, now=now, inflight=calls, ceiling=128)
    assert limit.at_a_time == 2


def test_refunds_are_never_cut() -> None:
    """Tokens that a call did not use come back in full, above what the bucket holds; only the refill stops there."""
    limit = debited(refilled(Limit(tpm=6_000), 0), 1, 1_000)
    assert limit.tokens == -900
    limit = refilled(limit, 20_000)
    assert limit.tokens == 100
    limit = refilled(debited(limit, 0, -950), 30_000)
    assert limit.tokens == 1_050
    limit = refilled(debited(limit, 1, 1_000), 31_000)
    assert limit.tokens == 100


def spent(limit: int, costs: list[int], slots: int, *, bounds: list[int] | None = None) -> int:
    """Return what calls of these costs spend under a limit if slots are filled as they become free, one ends at a time."""
    budget = Budget(limit, 0, 0, 0, bounded=bounds is not None)
    flying: list[int] = []
    chance, todo = Random(1), list(range(len(costs)))
    while True:
        room = budget.room
        free = slots - len(flying) if room is None else min(room, slots - len(flying))
        taken = todo[:free]
        if bounds is not None:
            taken = taken[: budget.fitting([bounds[n] for n in taken])]
        highest = max([budget.highest, *(bounds[n] for n in taken)] if bounds is not None else [budget.highest])
        del todo[: len(taken)]
        flying += taken
        if not flying:
            return budget.spent
        cost = costs[flying.pop(chance.randrange(len(flying)))]
        budget = Budget(
            limit,
            budget.spent + cost,
            budget.calls + 1,
            len(flying),
            highest=max(highest, cost),
            bounded=bounds is not None,
        )


@pytest.mark.parametrize("dear", [2, 50, 1_000])
@pytest.mark.parametrize("slots", [1, 16, 64])
def test_dear_calls_after_cheap_ones_pass_the_limit_by_one_call_at_most(dear: int, slots: int) -> None:
    """With a bound for each call, also one that grows from call to call, no more than one call is too many."""
    costs = [1] * 200 + [dear] * 400
    for bounds in ([dear] * len(costs), costs):
        total = spent(10_000, costs, slots, bounds=bounds)
        assert total <= 10_000 + dear
        assert total > min(sum(costs), 10_000) - 2 * dear


def test_without_bounds_the_highest_cost_is_reserved() -> None:
    """One dear call seen is enough: after it no more dear calls are in flight than the rest pays for."""
    budget = Budget(limit=1_000, spent=200, calls=100, inflight=0, highest=101)
    assert (budget.room, budget.mean, budget.reserved) == (7, 2, 101)
    assert spent(10_000, [1] * 200 + [100] * 400, 64) <= 10_000 + 64 * 100


def test_one_goes_alone_where_the_reserve_does_not_fit() -> None:
    """Near the end calls go one by one while one usually fits, and then the run has no room."""
    near = Budget(limit=1_000, spent=960, calls=100, inflight=0, highest=500, bounded=True)
    assert (near.room, near.fitting([500, 500])) == (1, 1)
    busy = Budget(limit=1_000, spent=960, calls=100, inflight=1, highest=500, bounded=True)
    assert (busy.room, busy.is_spent) == (0, False)
    assert Budget(limit=1_000, spent=995, calls=100, inflight=0, highest=500, bounded=True).is_spent


def test_first_calls() -> None:
    """Without a bound the first one goes alone; with one as many go as the limit pays for."""
    assert Budget(1_000, 0, 0, 0).room == 1
    bounded = Budget(1_000, 0, 0, 0, bounded=True)
    assert bounded.room is None
    assert bounded.fitting([90] * 64) == 11
    assert bounded.fitting([2_000, 1]) == 1
    assert bounded.fitting([10, 10, 400, 10]) == 2


def test_what_a_call_costs_at_most() -> None:
    """Prompt, instructions and the longest answer at the price; a job's own max_tokens goes over the run's."""
    bound = CallBound(Price(1, 10), input_tokens=20, output_tokens=100)
    assert bound.nanos(30) == 50 * 1_000 + 100 * 10_000
    assert bound.nanos(30, 7) == 50 * 1_000 + 7 * 10_000


def test_estimates_do_not_change_the_mean() -> None:
    """What died with its worker counts as spent, but says nothing about what calls cost."""
    budget = Budget(limit=1_000, spent=300, calls=20, inflight=0, estimated=100, highest=90)
    assert (budget.mean, budget.likely) == (10, 10)
    assert Budget(1_000, 0, 0, 0, highest=90).likely == 90
    assert Budget(1_000, 0, 0, 0).likely is None
