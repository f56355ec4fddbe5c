"""A run's counts, changed in the same transaction as the rows they count, and the recount of those rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import case, func, literal_column, null, select, union_all

from lbr.core.types import JobState, PauseCause, RunId
from lbr.store.schema import IS_PARKED, attempts, batches, counters, jobs, results, runs
from lbr.store.sql import BulkStatement, Rows, shard, take_turns, types_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import ColumnElement, Connection

    from lbr.core.types import Millis
    from lbr.store.schema import AnyRow

INPUT_TOKENS = "input_tokens"
OUTPUT_TOKENS = "output_tokens"
CACHED_TOKENS = "cached_tokens"
"""Those of the input tokens that the provider had in its cache; of calls that an earlier version made, none."""
COST_NANOS = "cost_nanos"
WASTED_NANOS = "wasted_nanos"
"""The part of the cost of failed tries, and of answers that came too late."""
ESTIMATED_NANOS = "estimated_nanos"
"""The part of the cost that is estimated, for calls that died with their worker and were probably paid for."""
ANSWERED = "answered"
"""Calls that were answered, well or not: the divisor of what was spent."""
UNPRICED = "unpriced"
"""Those of them whose cost is unknown; of a function's calls, only those that report tokens are counted."""
REUSED = "reused"
STALE = "stale"
CRASHED = "crashed"
OPENED = "opened"
"""How many times the run got jobs to do, or was resumed; see `lbr.store.endings`."""
PARKED = "at_provider"
"""Those of the pending jobs that are in a batch."""
RESERVED = "reserved_nanos"
"""What the run's batches may still cost."""
TRY = "try:"
"""Prefix of a family's count of tries that were no plain success, for example `try:transient`."""

Deltas = Counter[tuple[RunId, str]]


def moved(moves: Iterable[tuple[RunId, str, str]]) -> Deltas:
    """Return the changes to the counts when jobs of these runs go from one state to another."""
    deltas: Deltas = Counter()
    for (run_id, source, target), count in Counter(moves).items():
        deltas[run_id, source] -= count
        deltas[run_id, target] += count
    return deltas


def estimated(run_id: RunId, nanos: int) -> Deltas:
    """Return the changes to a run's counts for a call that died with its worker, at this estimated cost."""
    return Counter({(run_id, name): nanos for name in (COST_NANOS, WASTED_NANOS, ESTIMATED_NANOS)})


def _adding(rows: Rows) -> Any:
    adding = rows.insert(counters)
    value = counters.c.value + adding.excluded.value
    return adding.on_conflict_do_update(index_elements=["run_id", "name", "shard"], set_={"value": value})


_ADD = BulkStatement(types_of(counters, "run_id", "name", "shard", "value"), _adding)


def add(connection: Connection, deltas: Deltas) -> None:
    """Add to the counts; the rows that they count must change in the same transaction."""
    # Sorted, so that two transactions never wait for each other.
    in_shard = shard(connection)
    rows = [(run_id, str(name), in_shard, value) for (run_id, name), value in sorted(deltas.items()) if value]
    _ADD.run_plain(connection, rows)


def of_runs(connection: Connection, run_ids: Iterable[RunId]) -> dict[RunId, Counter[str]]:
    """Return every count of these runs; what was never counted is 0."""
    ids = list(run_ids)
    query = (
        select(counters.c.run_id, counters.c.name, func.sum(counters.c.value))
        .where(counters.c.run_id.in_(ids))
        .group_by(counters.c.run_id, counters.c.name)
    )
    counts: dict[RunId, Counter[str]] = {run_id: Counter() for run_id in ids}
    for run_id, name, value in connection.execute(query).all():
        counts[run_id][name] = int(value)
    return counts


_before = attempts.alias("before")
_IS_ON_RECORD = (
    select(_before.c.id)
    .where(_before.c.job_id == jobs.c.id, _before.c.claim_seq == jobs.c.claim_seq, _before.c.what == "failed")
    .exists()
)


def own_usage(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Select a column of a result's usage, null if it is counted elsewhere: in another run, or with an attempt."""
    return case((results.c.reused_from.is_(None) & ~_IS_ON_RECORD, column))


FIXING = RunId(0)
"""No run has this id: fixes take turns by it, so that two do not both add the same difference."""

_USAGE = (INPUT_TOKENS, OUTPUT_TOKENS, COST_NANOS)
_NOT_IN_ROWS = frozenset({ANSWERED, UNPRICED, OPENED, CACHED_TOKENS})
"""Which attempts were paid for is known when they are settled; the rows do not show it, nor how often jobs came."""
_NO_USAGE: list[ColumnElement[int]] = [literal_column("0") for _ in _USAGE]
_COUNTED = union_all(
    select(
        jobs.c.run_id, literal_column("'attempts'").label("source"), attempts.c.what.label("name"), attempts.c.family
    )
    .add_columns(func.count().label("total"), *(func.sum(attempts.c[name]).label(name) for name in _USAGE))
    .join_from(attempts, jobs, attempts.c.job_id == jobs.c.id)
    .group_by(jobs.c.run_id, attempts.c.what, attempts.c.family),
    select(jobs.c.run_id, literal_column("'results'"), null(), null(), func.count(results.c.reused_from))
    .add_columns(*(func.sum(own_usage(results.c[name])) for name in _USAGE))
    .join_from(results, jobs, results.c.job_id == jobs.c.id)
    .group_by(jobs.c.run_id),
    select(jobs.c.run_id, literal_column("'jobs'"), jobs.c.state, null(), func.count(), *_NO_USAGE).group_by(
        jobs.c.run_id, jobs.c.state
    ),
    select(jobs.c.run_id, literal_column("'jobs'"), literal_column(f"'{PARKED}'"), null(), func.count(), *_NO_USAGE)
    .where(IS_PARKED)
    .group_by(jobs.c.run_id),
    select(batches.c.run_id, literal_column("'jobs'"), literal_column(f"'{RESERVED}'"), null())
    .add_columns(func.sum(batches.c.reserved_nanos), *_NO_USAGE)
    .group_by(batches.c.run_id),
    select(counters.c.run_id, literal_column("'counters'"), counters.c.name, null(), func.sum(counters.c.value))
    .add_columns(*_NO_USAGE)
    .group_by(counters.c.run_id, counters.c.name),
)
"""The rows, counted, and the counters: in one statement, which sees one moment in a writing transaction too."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A counter of a run that differs from the rows it counts."""

    run_id: RunId
    run: str
    counter: str
    kept: int
    counted: int


def recount(connection: Connection, _now: Millis) -> list[Drift]:
    """Return the counters that differ from their rows, by run and name. It reads every job, result and attempt."""
    kept: defaultdict[RunId, Counter[str]] = defaultdict(Counter)
    counted: defaultdict[RunId, Counter[str]] = defaultdict(Counter)
    for row in connection.execute(_COUNTED).all():
        if row.source == "counters":
            kept[RunId(row.run_id)][row.name] = int(row.total)
        else:
            counted[RunId(row.run_id)].update(_counts_of(row))
    return [
        Drift(RunId(run.id), run.name, name, kept[run.id][name], counted[run.id][name])
        for run in connection.execute(select(runs.c.id, runs.c.name, runs.c.pause_cause).order_by(runs.c.id)).all()
        for name in sorted({*kept[run.id], *counted[run.id]} - _NOT_IN_ROWS)
        if kept[run.id][name] != counted[run.id][name]
        # A run that is being copied here gets its other counts at the end.
        and (name in set(JobState) or run.pause_cause != PauseCause.MOVING_FROM)
    ]


def fix(connection: Connection, now: Millis) -> list[Drift]:
    """Set the counters to the recount, and return those that differed.

    It adds the difference, which stays the same while workers go on: they change rows and counters together.
    """
    take_turns(connection, FIXING)
    found = recount(connection, now)
    add(connection, Counter({(one.run_id, one.counter): one.counted - one.kept for one in found}))
    return found


def _counts_of(row: AnyRow) -> Counter[str]:
    """Return what one row of `_COUNTED` adds to its run's counts."""
    found = Counter({name: int(getattr(row, name) or 0) for name in _USAGE})
    if row.source != "attempts":
        found[row.name or REUSED] = int(row.total)
        return found
    if row.family is not None:
        found[TRY + row.family] = row.total
    if row.name in {STALE, CRASHED}:
        found[row.name] = row.total
    if row.name == CRASHED:
        found[ESTIMATED_NANOS] = found[COST_NANOS]
    # An answer that was redone on request is among the attempts too, but did not fail.
    if row.family is not None or row.name in {STALE, CRASHED}:
        found[WASTED_NANOS] = found[COST_NANOS]
    return found
