"""The arithmetic of budgets: what is reserved for a call, how many fit, and how far a limit may be passed."""

from __future__ import annotations

from random import Random

import pytest

from lbr.core.budget import Budget, CallBound
from lbr.core.pricing import Price


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
        highest = max(
            [budget.highest, *(bounds[n] for n in taken)] if bounds is not None else [budget.highest]
        )
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
