"""What the answers of a run took: tokens, cost and time, each distinct input once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from lbr.store.schema import LATENCY, items, results

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from lbr.core.types import Millis, Run


def by_latency(connection: Connection, _now: Millis, run: Run) -> list[tuple[int, ...]]:
    """Return a row for each latency of a run's answers, the lowest first; this reads all of them.

    A row has the latency in milliseconds, -1 for answers of batches, the number of answers, and of their input tokens, output tokens and nanos the
    sum and the number of answers for which it is known.
    """
    counts = (results.c.input_tokens, results.c.output_tokens, results.c.cost_nanos)
    sums = [of(count) for count in counts for of in (func.sum, func.count)]
    latency = func.coalesce(LATENCY, -1)
    query = select(latency, func.count(), *sums).group_by(latency)
    query = query.join_from(items, results, items.c.job_id == results.c.job_id).order_by(latency)
    found = connection.execute(query.where(items.c.run_id == run.id, items.c.first == 1)).all()
    return [tuple(int(one or 0) for one in row) for row in found]
