"""What runs may cost and have cost, and the pause of those whose cost nobody knows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import func, literal_column, select, update

from lbr.core.limits import Budget
from lbr.core.types import JobState, RunId, RunState
from lbr.store.counters import ANSWERED, COST_NANOS, ESTIMATED_NANOS, REUSED, UNPRICED, estimated, of_runs
from lbr.store.schema import attempts, counters, runs
from lbr.store.sql import any_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lbr.store.counters import Deltas
    from lbr.store.database import Connection, Database

_BUDGETS = (
    select(runs.c.id, runs.c.budget_nanos, runs.c.highest_nanos)
    .where(any_of(runs.c.id, "ids"), runs.c.state == RunState.ACTIVE)
    .order_by(runs.c.id)
)
_BUDGETS_LOCKED = _BUDGETS.with_for_update()
_COUNTS = (
    select(counters.c.run_id, counters.c.name, func.sum(counters.c.value).label("value"))
    .where(any_of(counters.c.run_id, "ids"))
    .group_by(counters.c.run_id, counters.c.name)
)

_ESTIMATES = select(attempts.c.id, attempts.c.job_id, attempts.c.claim_seq, attempts.c.cost_nanos).where(
    any_of(attempts.c.job_id, "ids"),
    literal_column("attempts.what = 'crashed'"),
    attempts.c.cost_nanos.is_not(None),
)


async def budgets_of(
    connection: Connection, run_ids: list[RunId], *, lock: bool
) -> tuple[dict[RunId, Budget], set[RunId]]:
    """Return the budgets of these runs, and which of them are active still."""
    if not run_ids:
        return {}, set()
    query = _BUDGETS_LOCKED if lock else _BUDGETS
    allowed = {row.id: row for row in (await connection.execute(query, {"ids": run_ids})).all()}
    counts: dict[int, Counter[str]] = {run_id: Counter() for run_id in allowed}
    for row in (await connection.execute(_COUNTS, {"ids": list(allowed)})).all() if allowed else ():
        counts[row.run_id][row.name] = int(row.value)
    budgets = {
        RunId(run_id): budget_of(row.budget_nanos, counts[run_id], row.highest_nanos)
        for run_id, row in allowed.items()
        if row.budget_nanos is not None
    }
    return budgets, {RunId(run_id) for run_id in allowed}


def budget_of(limit: int, counts: Counter[str], highest: int | None = None) -> Budget:
    """Return how a run with these counts stands that may cost so many billionths of a US dollar.

    `highest` is the highest cost of a call, None if that is not known.
    """
    return Budget(
        limit=limit,
        spent=counts[COST_NANOS],
        calls=_priced_calls(counts),
        inflight=counts[JobState.INFLIGHT],
        pending=counts[JobState.PENDING],
        highest=highest or 0,
        estimated=counts[ESTIMATED_NANOS],
    )


def _priced_calls(counts: Counter[str]) -> int:
    # At least those whose answers are there: a run of an earlier version has no such count.
    answered = max(counts[ANSWERED], counts[JobState.DONE] - counts[REUSED])
    return max(0, answered - counts[UNPRICED])


async def likely_costs(connection: Connection, run_ids: Iterable[RunId]) -> dict[RunId, int]:
    """Return what a call of each run probably cost of which nothing was heard; runs of which nothing is known are left out."""
    query = select(runs.c.id, runs.c.highest_nanos).where(any_of(runs.c.id, "ids"))
    highest = {
        RunId(row.id): row.highest_nanos
        for row in (await connection.execute(query, {"ids": list(run_ids)})).all()
    }
    counts = await of_runs(connection, highest)
    found = {run_id: budget_of(0, counts[run_id], highest[run_id]).likely for run_id in highest}
    return {run_id: nanos for run_id, nanos in found.items() if nanos is not None}


async def forget_estimates(connection: Connection, claims: Mapping[int, tuple[RunId, int]]) -> Deltas:
    """Forget what calls were estimated to cost that were thought dead and are not, and return what that changes.

    `claims` maps their jobs to the run and the claim_seq.
    """
    deltas: Deltas = Counter()
    found = (await connection.execute(_ESTIMATES, {"ids": list(claims)})).all() if claims else []
    for row in found:
        run_id, claim_seq = claims[row.job_id]
        if row.claim_seq == claim_seq:
            deltas.update(estimated(run_id, -row.cost_nanos))
            await connection.execute(update(attempts).where(attempts.c.id == row.id).values(cost_nanos=None))
    return deltas


async def raise_highest(connection: Connection, costs: Mapping[RunId, int]) -> None:
    """Note that a call of these runs costs, or may cost, so much."""
    for run_id, nanos in sorted(costs.items()):  # in one order, so that two never wait for each other
        lower = runs.c.highest_nanos.is_(None) | (runs.c.highest_nanos < nanos)
        await connection.execute(update(runs).where(runs.c.id == run_id, lower).values(highest_nanos=nanos))


async def set_budget(database: Database, run_id: RunId, nanos: int | None) -> None:
    """Set what a run may cost from now on, all that it has cost included; None lifts it."""
    query = update(runs).where(runs.c.id == run_id).values(budget_nanos=nanos)
    await database.write(lambda connection: connection.execute(query))
