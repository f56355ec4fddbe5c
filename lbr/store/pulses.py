"""The table of pulses: written in the transaction that renews a worker's leases, folded into hours when they are old.

A worker writes its counts as they stand, so that to write them again changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson
from sqlalchemy import bindparam, delete, func, literal_column, select

from lbr.core.pulses import BINS, COUNTS, MINUTE_MS, Pulse
from lbr.core.types import JobState, Millis, RunId, RunState, WorkerId
from lbr.store import counters
from lbr.store.schema import NOT_PARKED, PENDING, SILENT_MS, jobs, pulses, runs, workers
from lbr.store.sql import BulkStatement, Rows, any_of, take_turns, types_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Connection

    from lbr.store.reads import RunCounts
    from lbr.store.schema import AnyRow

Rate: TypeAlias = float
"""Jobs done or failed per second."""
FOLDED = WorkerId(0)
"""The `worker_id` of what all workers did in an hour."""
HOUR = 60
KEPT_MINUTES = 48 * HOUR
RATE_MINUTES, SLOW_RATE_MINUTES, ENOUGH = 2, 10, 20
"""A rate is that of the latest minutes, of more of them if fewer jobs than enough were answered."""
MAX_RETRYING = 10_000
"""No more are counted."""

_KEY = ("run_id", "minute", "worker_id")
_VALUES = ("since", "until", *COUNTS, "histogram", "slowest_ms", "slowest_job", "slots")


def _replacing(rows: Rows) -> Any:
    adding = rows.insert(pulses)
    return adding.on_conflict_do_update(index_elements=_KEY, set_={name: adding.excluded[name] for name in _VALUES})


_WRITE = BulkStatement(types_of(pulses, *_KEY, *_VALUES), _replacing)
_OLD = (
    select(pulses.c.run_id, pulses.c.minute)
    .where(literal_column("pulses.worker_id > 0"), pulses.c.minute < bindparam("before"))
    .order_by(pulses.c.minute)
    .limit(1)
)
_ANSWERED = (
    select(pulses.c.run_id, func.sum(pulses.c.done + pulses.c.failed), func.min(pulses.c.since), workers.c.seen_at)
    .join_from(pulses, workers, pulses.c.worker_id == workers.c.id)
    .where(
        any_of(pulses.c.run_id, "runs"), pulses.c.minute >= bindparam("first"), workers.c.seen_at > bindparam("seen")
    )
    .group_by(pulses.c.run_id, workers.c.id)
)
_other = pulses.alias()
_LATEST = select(func.max(_other.c.minute)).where(_other.c.run_id == runs.c.id).correlate(runs).scalar_subquery()
_STRETCHES = (
    select(pulses.c.run_id, func.min(pulses.c.since), func.max(pulses.c.until))
    .add_columns(func.coalesce(func.max(workers.c.seen_at), 0))
    .join_from(runs, pulses, pulses.c.run_id == runs.c.id)
    .outerjoin(workers, workers.c.id == pulses.c.worker_id)
    .where(any_of(runs.c.id, "runs"), pulses.c.minute > _LATEST - RATE_MINUTES)
    .group_by(pulses.c.run_id)
)
_TRIED = select(jobs.c.id).where(
    PENDING,
    NOT_PARKED,
    jobs.c.run_id == bindparam("run"),
    jobs.c.available_at > bindparam("after"),
    jobs.c.claim_seq > jobs.c.retry_seq,
)
_RETRYING = select(func.count()).select_from(_TRIED.limit(MAX_RETRYING).subquery())


@dataclass(frozen=True, slots=True)
class Pace:
    """How a run goes. `rate` is None unless a living worker has answered jobs lately.

    `began` and `ended` are the latest time in which workers worked on it without a long pause, up to now if they live;
    None if none ever did. `retrying` is how many pending jobs were tried before.
    """

    rate: Rate | None = None
    began: Millis | None = None
    ended: Millis | None = None
    retrying: int = 0


NO_PACE = Pace()


def write(connection: Connection, _now: Millis, worker: WorkerId, taken: Iterable[Pulse]) -> None:
    """Write pulses of a worker, in place of what it wrote before of the same minutes."""
    _WRITE.run_plain(connection, [_row(worker, one) for one in taken])


def _row(worker: WorkerId, pulse: Pulse) -> tuple[Any, ...]:
    values = {name: getattr(pulse, name) for name in _VALUES}
    values["histogram"] = orjson.dumps(pulse.histogram).decode()
    return (pulse.run_id, pulse.minute, worker, *values.values())


def _pulse(row: AnyRow) -> Pulse:
    values = {name: getattr(row, name) for name in (*_KEY[:2], *_VALUES)}
    return Pulse(**values | {"histogram": _bins(row.histogram)}, minutes=HOUR if row.worker_id == FOLDED else 1)


def _bins(text: str) -> list[int]:
    """Read the counts of latencies; another program's are no reason to stop."""
    try:
        counts = orjson.loads(text)
    except orjson.JSONDecodeError:
        counts = None
    fits = isinstance(counts, list) and len(counts) == BINS and all(type(count) is int for count in counts)
    return counts if fits else [0] * BINS


def rates(
    connection: Connection, now: Millis, run_ids: Iterable[RunId], minutes: int = RATE_MINUTES
) -> dict[RunId, Rate]:
    """Return the jobs that living workers have answered per second in the latest minutes, of runs that have any."""
    ids, first = list(run_ids), now // MINUTE_MS - minutes + 1
    answered: Counter[RunId] = Counter()
    found: defaultdict[RunId, Rate] = defaultdict(float)
    bound = {"runs": ids, "first": first, "seen": now - SILENT_MS}
    for run_id, count, since, seen_at in connection.execute(_ANSWERED, bound).all():
        answered[run_id] += int(count)
        found[run_id] += 1000 * int(count) / max(1000, seen_at - max(since, first * MINUTE_MS))
    slow = [run_id for run_id in ids if answered[run_id] < ENOUGH]
    if slow and minutes < SLOW_RATE_MINUTES:
        found |= rates(connection, now, slow, SLOW_RATE_MINUTES)
    return {run_id: rate for run_id, rate in found.items() if rate}


def paces(connection: Connection, now: Millis, found: Sequence[RunCounts]) -> dict[RunId, Pace]:
    """Return how these runs go."""
    per_second = rates(connection, now, [one.run.id for one in found if one.open])
    seen = connection.execute(_STRETCHES, {"runs": [one.run.id for one in found]}).all()
    stretches = {run_id: stretch for run_id, *stretch in seen}
    paces = {}
    for one in found:
        began, ended, seen_at = stretches.get(one.run.id, (None, None, 0))
        if one.open and one.run.state is RunState.ACTIVE and seen_at > now - SILENT_MS:
            ended = now
        paces[one.run.id] = Pace(per_second.get(one.run.id), began, ended, _retrying(connection, one))
    return paces


def _retrying(connection: Connection, one: RunCounts) -> int:
    tried = one.counts[counters.CRASHED] or any(name.startswith(counters.TRY) for name in one.counts)
    if not one.of(JobState.PENDING) or not tried:
        return 0
    # A job is due from when it was enqueued, and later when it was tried: an index shows which.
    bound = {"run": one.run.id, "after": one.run.enqueued_at}
    return connection.scalar(_RETRYING, bound) or 0


def series(connection: Connection, _now: Millis, run_id: RunId, since: Millis) -> list[Pulse]:
    """Return what all workers did for a run from the hour of `since` on, by minute, and by hour if it is old."""
    first = since // MINUTE_MS // HOUR * HOUR
    query = select(pulses).where(pulses.c.run_id == run_id, pulses.c.minute >= first).order_by(pulses.c.minute)
    return _of_all_workers(connection.execute(query).all())


def _of_all_workers(rows: Iterable[AnyRow]) -> list[Pulse]:
    found: dict[tuple[int, int], Pulse] = {}
    for pulse in map(_pulse, rows):
        whole = found.setdefault((pulse.minute, pulse.minutes), pulse)
        if whole is not pulse:
            whole.add(pulse)
    return list(found.values())


def fold(connection: Connection, now: Millis) -> bool:
    """Fold an hour of a run that is older than two days into one row; return whether there was one. Safe to repeat."""
    before = (now // MINUTE_MS - KEPT_MINUTES) // HOUR * HOUR
    old = connection.execute(_OLD, {"before": before}).first()
    if old is None:
        return False
    take_turns(connection, counters.FIXING)
    first = old.minute // HOUR * HOUR
    hour = (pulses.c.run_id == old.run_id, pulses.c.minute >= first, pulses.c.minute < first + HOUR)
    parts = _of_all_workers(connection.execute(delete(pulses).where(*hour).returning(*pulses.c)).all())
    # A worker may have written a pulse after its run was removed.
    if parts and connection.scalar(select(runs.c.id).where(runs.c.id == old.run_id)) is not None:
        whole = Pulse(old.run_id, first, parts[0].since, parts[0].until)
        for part in parts:
            whole.add(part)
        write(connection, now, FOLDED, [whole])
    return True
