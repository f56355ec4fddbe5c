"""A run's counts, changed in the same transaction as the rows they count."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import func, select, text

from lbr.store.schema import counters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.jobs import RunId

INPUT_TOKENS = "input_tokens"
OUTPUT_TOKENS = "output_tokens"
COST_NANOS = "cost_nanos"
REUSED = "reused"
STALE = "stale"
CRASHED = "crashed"
TRY = "try:"
"""Prefix of a family's count of tries that were no plain success, `try:transient` for one."""

Deltas = Counter[tuple["RunId", str]]

_ADD = text(
    "INSERT INTO counters (run_id, name, shard, value) VALUES (:run_id, :name, 0, :value) "
    "ON CONFLICT (run_id, name, shard) DO UPDATE SET value = counters.value + excluded.value"
)


async def add(connection: AsyncConnection, deltas: Deltas) -> None:
    """Add to the counts; the rows that they count must change in the same transaction."""
    rows = [
        {"run_id": run_id, "name": str(name), "value": value}
        for (run_id, name), value in sorted(deltas.items())
        if value
    ]
    if rows:
        await connection.execute(_ADD, rows)


async def of_runs(connection: AsyncConnection, run_ids: Iterable[RunId]) -> dict[RunId, Counter[str]]:
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
