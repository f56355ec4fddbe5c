"""The ends of runs, each of which one worker reports: a run has finished, or is paused.

A run that gets jobs to do again, or is resumed, has another end before it, which the counter `opened` numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import case, func, select, update

from lbr.core.types import JobState, PauseCause, RunState
from lbr.store import reads
from lbr.store.counters import OPENED
from lbr.store.runs import hold_states
from lbr.store.schema import counters, runs
from lbr.store.sql import any_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import ColumnElement, Connection

    from lbr.core.types import Millis, RunId
    from lbr.store.reads import RunCounts


def _count(*names: str) -> ColumnElement[int]:
    chosen = (counters.c.run_id == runs.c.id, counters.c.name.in_(names))
    return func.coalesce(select(func.sum(counters.c.value)).where(*chosen).scalar_subquery(), 0)


_FINISHED = runs.c.sealed_at.is_not(None) & (_count(JobState.PENDING, JobState.INFLIGHT) == 0)
# A paused run whose last calls finish it has two ends.
_END = 2 * _count(OPENED) + case((_FINISHED, 1), else_=0)
_ELSEWHERE = [PauseCause.MOVED_TO, PauseCause.MOVING_FROM, PauseCause.REMOVING]
_UNREPORTED = (
    any_of(runs.c.id, "ids"),
    _FINISHED | (runs.c.state == RunState.PAUSED),
    func.coalesce(runs.c.pause_cause, "").not_in(_ELSEWHERE),
    func.coalesce(runs.c.reported, -1) != _END,
)


def unreported(connection: Connection, _now: Millis, run_ids: Iterable[RunId]) -> list[RunId]:
    """Return those of the runs that have ended, and whose end no worker has reported."""
    return list(connection.execute(select(runs.c.id).where(*_UNREPORTED), {"ids": list(run_ids)}).scalars())


def take(connection: Connection, now: Millis, run_ids: Iterable[RunId]) -> tuple[Millis, list[RunCounts]]:
    """Return the time, and the same runs with their counts; record their ends as reported: no other worker gets them."""
    ids = {"ids": list(run_ids)}
    hold_states(connection, ids["ids"], to_change=True)  # in one order, so that two never wait for each other
    query = update(runs).where(*_UNREPORTED).values(reported=_END).returning(runs.c.id)
    return now, reads.counts(connection, now, connection.execute(query, ids).scalars().all())
