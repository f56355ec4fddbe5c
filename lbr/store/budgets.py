"""What runs may cost and have cost, and the pause of those whose cost nobody knows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import func, select, update

from lbr.core.budget import Budget
from lbr.core.types import JobState, RunId, RunState
from lbr.store.arrays import among
from lbr.store.counters import ANSWERED, COST_NANOS, REUSED, UNPRICED
from lbr.store.schema import counters, runs

if TYPE_CHECKING:
    from lbr.store.connection import Connection
    from lbr.store.database import Database

_BUDGETS = (
    select(runs.c.id, runs.c.budget_nanos)
    .where(among(runs.c.id, "ids"), runs.c.state == RunState.ACTIVE)
    .order_by(runs.c.id)
)
_BUDGETS_LOCKED = _BUDGETS.with_for_update()
_COUNTS = (
    select(counters.c.run_id, counters.c.name, func.sum(counters.c.value).label("value"))
    .where(among(counters.c.run_id, "ids"))
    .group_by(counters.c.run_id, counters.c.name)
)


async def budgets_of(
    connection: Connection, run_ids: list[RunId], *, lock: bool
) -> tuple[dict[RunId, Budget], set[RunId]]:
    """Return the budgets of these runs, and which of them are active still."""
    if not run_ids:
        return {}, set()
    query = _BUDGETS_LOCKED if lock else _BUDGETS
    allowed = {row.id: row.budget_nanos for row in (await connection.execute(query, {"ids": run_ids})).all()}
    counts: dict[int, Counter[str]] = {run_id: Counter() for run_id in allowed}
    for row in (await connection.execute(_COUNTS, {"ids": list(allowed)})).all() if allowed else ():
        counts[row.run_id][row.name] = int(row.value)
    budgets = {
        RunId(run_id): budget_of(limit, counts[run_id])
        for run_id, limit in allowed.items()
        if limit is not None
    }
    return budgets, {RunId(run_id) for run_id in allowed}


def budget_of(limit: int, counts: Counter[str]) -> Budget:
    """Return how a run with these counts stands that may cost so many billionths of a US dollar."""
    return Budget(
        limit=limit,
        spent=counts[COST_NANOS],
        calls=_priced_calls(counts),
        inflight=counts[JobState.INFLIGHT],
        pending=counts[JobState.PENDING],
    )


def _priced_calls(counts: Counter[str]) -> int:
    # At least those whose answers are there: a run of an earlier version has no such count.
    answered = max(counts[ANSWERED], counts[JobState.DONE] - counts[REUSED])
    return max(0, answered - counts[UNPRICED])


async def set_budget(database: Database, run_id: RunId, nanos: int | None) -> None:
    """Set what a run may cost from now on, all that it has cost included; None lifts it."""
    query = update(runs).where(runs.c.id == run_id).values(budget_nanos=nanos)
    await database.write(lambda connection: connection.execute(query))
