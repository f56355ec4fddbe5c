"""A run's counts, changed in the same transaction as the rows they count."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from lbr.store.arrays import SHARD, Bulk, Given, option
from lbr.store.schema import counters

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from lbr.core.types import RunId
    from lbr.store.connection import Connection

INPUT_TOKENS = "input_tokens"
OUTPUT_TOKENS = "output_tokens"
COST_NANOS = "cost_nanos"
WASTED_NANOS = "wasted_nanos"
"""The part of the cost that went to tries that were no answers, or to answers that came too late."""
ESTIMATED_NANOS = "estimated_nanos"
"""The part of the cost that is estimated, of calls that died with their worker: they were probably paid for."""
ANSWERED = "answered"
"""Calls that were answered, well or not, at whatever time: what was spent is divided by them."""
UNPRICED = "unpriced"
"""Those of them of which nobody knows what they cost; a function's are not counted."""
REUSED = "reused"
STALE = "stale"
CRASHED = "crashed"
TRY = "try:"
"""Prefix of a family's count of tries that were no plain success, `try:transient` for one."""

Deltas = Counter[tuple["RunId", str]]


def moved(moves: Iterable[tuple[RunId, str, str]]) -> Deltas:
    """Return what jobs change in the counts by going, in a run each, from one state to another."""
    deltas: Deltas = Counter()
    for (run_id, source, target), count in Counter(moves).items():
        deltas[run_id, source] -= count
        deltas[run_id, target] += count
    return deltas


def estimated(run_id: RunId, nanos: int) -> Deltas:
    """Return what a call that died with its worker changes in the counts of its run, if it cost so much."""
    return Counter({(run_id, name): nanos for name in (COST_NANOS, WASTED_NANOS, ESTIMATED_NANOS)})


def _adding(given: Given) -> Any:
    row = {"run_id": given["run"], "name": given["counter"], "shard": given["in_shard"], "value": given["by"]}
    adding = given.insert_into(counters, row)
    return adding.on_conflict_do_update(
        index_elements=["run_id", "name", "shard"], set_={"value": counters.c.value + adding.excluded.value}
    )


_ADD = Bulk(
    {
        "run": counters.c.run_id.type,
        "counter": counters.c.name.type,
        "in_shard": counters.c.shard.type,
        "by": counters.c.value.type,
    },
    _adding,
)


async def add(connection: Connection, deltas: Deltas) -> None:
    """Add to the counts; the rows that they count must change in the same transaction."""
    shard = option(connection, SHARD) or 0
    rows = [
        {"run": run_id, "counter": str(name), "in_shard": shard, "by": value}
        for (run_id, name), value in sorted(
            deltas.items()
        )  # in one order, so that two never wait for each other
        if value
    ]
    await _ADD.run(connection, rows)


async def of_runs(connection: Connection, run_ids: Iterable[RunId]) -> dict[RunId, Counter[str]]:
    """Return every count of the named runs; what was never counted is 0."""
    ids = list(run_ids)
    query = (
        select(counters.c.run_id, counters.c.name, func.sum(counters.c.value))
        .where(counters.c.run_id.in_(ids))
        .group_by(counters.c.run_id, counters.c.name)
    )
    counts: dict[RunId, Counter[str]] = {run_id: Counter() for run_id in ids}
    for run_id, name, value in (await connection.execute(query)).all():
        counts[run_id][name] = int(value)
    return counts
