"""A run's counts as its rows have them, beside the counters that are kept of them, and the counters mended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from lbr.core.types import JobState, PauseCause, RunId, RunState
from lbr.store import counters
from lbr.store.redo import own_usage
from lbr.store.schema import attempts, jobs, results, runs
from lbr.store.schema import counters as counters_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

MENDING = RunId(0)
"""No run has this id: whoever mends takes its turn, so that two do not both make up for the same."""

_NOT_IN_ROWS = frozenset({counters.ANSWERED, counters.UNPRICED})
"""Which tries brought an answer that was paid for is known when they are settled, and not told by their rows."""

_STATES = frozenset(str(state) for state in JobState)
_RUNS = select(runs.c.id, runs.c.name, runs.c.state, runs.c.pause_cause).order_by(runs.c.id)
_KEPT = select(counters_table.c.run_id, counters_table.c.name, func.sum(counters_table.c.value)).group_by(
    counters_table.c.run_id, counters_table.c.name
)
_JOBS = select(jobs.c.run_id, jobs.c.state, func.count()).group_by(jobs.c.run_id, jobs.c.state)
_RESULTS = (
    select(
        jobs.c.run_id,
        func.count(results.c.reused_from).label("reused"),
        func.sum(own_usage(results.c.input_tokens)).label("input_tokens"),
        func.sum(own_usage(results.c.output_tokens)).label("output_tokens"),
        func.sum(own_usage(results.c.cost_nanos)).label("cost_nanos"),
    )
    .join_from(results, jobs, results.c.job_id == jobs.c.id)
    .group_by(jobs.c.run_id)
)
_TRIES = (
    select(
        jobs.c.run_id,
        attempts.c.what,
        attempts.c.family,
        func.count().label("tries"),
        func.sum(attempts.c.input_tokens).label("input_tokens"),
        func.sum(attempts.c.output_tokens).label("output_tokens"),
        func.sum(attempts.c.cost_nanos).label("cost_nanos"),
    )
    .join_from(attempts, jobs, attempts.c.job_id == jobs.c.id)
    .group_by(jobs.c.run_id, attempts.c.what, attempts.c.family)
)


@dataclass(frozen=True, slots=True)
class Drift:
    """A counter of a run that is not what its rows say."""

    run_id: RunId
    run: str
    counter: str
    kept: int
    counted: int

    @property
    def of_jobs(self) -> bool:
        """Whether it counts the jobs of a state, by which workers and collectors decide."""
        return self.counter in _STATES


async def drifts(database: Database) -> list[Drift]:
    """Return the counters that are off, by run and name. It reads every job, result and try, in one moment's sight."""
    return await database.read(_drifts)


async def mend(database: Database) -> list[Drift]:
    """Make the counters what a recount says, in one transaction, while workers go on; return those that were off.

    What is added is the difference: it stays the same whatever is counted meanwhile, for every other transaction
    changes rows and counters together.
    """

    async def work(connection: Connection) -> list[Drift]:
        await database.take_turns(connection, MENDING)
        found = await database.at_one_moment(connection, _drifts)
        missing: counters.Deltas = Counter()
        for one in found:
            missing[one.run_id, one.counter] += one.counted - one.kept
        await counters.add(connection, missing)
        return found

    return await database.write(work)


async def _drifts(connection: Connection) -> list[Drift]:
    found = (await connection.execute(_RUNS)).all()
    counted = await _recount(connection)
    kept: counters.Deltas = Counter()
    for run_id, name, value in (await connection.execute(_KEPT)).all():
        kept[run_id, name] = int(value)
    names = sorted({name for _, name in [*counted, *kept]} - _NOT_IN_ROWS)
    return [
        Drift(RunId(run.id), run.name, name, kept[run.id, name], counted[run.id, name])
        for run in found
        for name in names
        if kept[run.id, name] != counted[run.id, name] and (name in _STATES or not _is_half_done(run))
    ]


def _is_half_done(run: AnyRow) -> bool:
    """Tell whether a run is being copied here: its other counts come last, all at once."""
    return bool(run.state == RunState.PAUSED and run.pause_cause == PauseCause.MOVING_FROM)


async def _recount(connection: Connection) -> counters.Deltas:
    counted: counters.Deltas = Counter()
    for run_id, state, count in (await connection.execute(_JOBS)).all():
        counted[run_id, state] = count
    for row in (await connection.execute(_RESULTS)).all():
        counted[row.run_id, counters.REUSED] += row.reused
        counted.update(_usage(row))
    for row in (await connection.execute(_TRIES)).all():
        counted.update(_usage(row))
        counted.update(_tries(row))
    return counted


def _usage(row: AnyRow) -> Counter[tuple[RunId, str]]:
    names: Iterable[str] = (counters.INPUT_TOKENS, counters.OUTPUT_TOKENS, counters.COST_NANOS)
    return Counter({(RunId(row.run_id), name): int(getattr(row, name) or 0) for name in names})


def _tries(row: AnyRow) -> Counter[tuple[RunId, str]]:
    run_id = RunId(row.run_id)
    names = {"stale": counters.STALE, "crashed": counters.CRASHED}
    found = Counter({(run_id, names[row.what]): row.tries} if row.what in names else {})
    if row.family is not None:
        found[run_id, counters.TRY + row.family] += row.tries
    if row.what == "crashed":
        found[run_id, counters.ESTIMATED_NANOS] += int(row.cost_nanos or 0)
    # An answer that was redone by hand is among the tries too, but was none that failed.
    if row.family is not None or row.what in names:
        found[run_id, counters.WASTED_NANOS] += int(row.cost_nanos or 0)
    return found
