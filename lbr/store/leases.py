"""Leases: workers register, renew, release and reclaim jobs, and find out which workers have died.

Everything here is safe to repeat. A write to a held job names the claim_seq of its claim: a job that another worker has
claimed since is not touched.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, delete, func, insert, literal_column, select, update

from lbr.core import ownership
from lbr.core.batches import PARKED
from lbr.core.errors import DatabaseError
from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.types import JobId, JobState, Millis, RunId, RunState, WorkerId
from lbr.store import counters, files
from lbr.store import pulses as pulses_store
from lbr.store.claim import DUE, DUE_SUSPECT, DUE_TRIED
from lbr.store.limits import forget_estimates, give_back, likely_costs, load_capacity
from lbr.store.runs import hold_states
from lbr.store.schema import INFLIGHT, NOT_PARKED, PENDING, attempts, jobs, runs, workers
from lbr.store.sql import Inserting, any_of

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection

    from lbr.core.pulses import Pulse
    from lbr.core.types import Claim
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

MAX_CRASHES = 3
RECLAIM_PAGE = 500
MAX_SKEW_MS = 30_000
"""How far the clocks of two workers of a file may be apart: half of the default lease."""
WORKER_MEMORY_MS = 24 * 3600 * 1000
LOST_MS = 30_000
"""A claim whose reply has not come after this long is lost: no transaction takes longer."""
NO_WORKER = WorkerId(0)

_OURS = any_of(jobs.c.id, "ids") & (jobs.c.worker_id == bindparam("worker"))
RENEW = (
    update(jobs).where(INFLIGHT, _OURS).values(lease_until=bindparam("until")).returning(jobs.c.id, jobs.c.claim_seq)
)
_HELD = select(jobs.c.id, jobs.c.claim_seq, jobs.c.run_id).where(_OURS).order_by(jobs.c.id).with_for_update()
RETAKE = (
    update(jobs)
    .where(PENDING, _OURS)
    .values(state=literal_column("'inflight'"), crashes=jobs.c.crashes - 1, lease_until=bindparam("until"))
)
CLAIMED_BY = (
    select(jobs.c.id, jobs.c.claim_seq, jobs.c.run_id)
    .where(INFLIGHT, jobs.c.worker_id == bindparam("worker"), jobs.c.lease_until < bindparam("before"))
    .order_by(jobs.c.lease_until)
    .with_for_update(skip_locked=True)
)
_RUN_CANCELLED = jobs.c.run_id.in_(select(runs.c.id).where(runs.c.state == RunState.CANCELLED))
_RESTING: ColumnElement[str] = case((_RUN_CANCELLED, literal_column("'cancelled'")), else_=literal_column("'pending'"))
_SET_FREE = (
    update(jobs)
    .where(INFLIGHT, any_of(jobs.c.id, "ids"))
    .values(state=_RESTING, worker_id=None, lease_until=None)
    .returning(jobs.c.run_id, jobs.c.state)
)
EXPIRED = (
    select(jobs.c.id, jobs.c.run_id)
    .where(INFLIGHT, jobs.c.lease_until < bindparam("now"))
    .order_by(jobs.c.lease_until)
    .limit(RECLAIM_PAGE)
    .with_for_update(skip_locked=True)
)
OF_DEAD = (
    select(jobs.c.id, jobs.c.run_id)
    .where(INFLIGHT, any_of(jobs.c.worker_id, "workers"))
    .order_by(jobs.c.id)
    .limit(RECLAIM_PAGE)
)
_FAILS = jobs.c.crashes + 1 >= MAX_CRASHES
RECLAIM = (
    update(jobs)
    .where(INFLIGHT, any_of(jobs.c.id, "ids"))
    .values(
        state=case((_FAILS, literal_column("'failed'")), else_=_RESTING),
        crashes=jobs.c.crashes + 1,
        available_at=bindparam("now"),
        finished_at=case((_FAILS, bindparam("now", type_=jobs.c.finished_at.type))),
        lease_until=None,
    )
    .returning(jobs.c.id, jobs.c.run_id, jobs.c.claim_seq, jobs.c.crashes, jobs.c.state, jobs.c.worker_id)
)
ADD_CRASHES = Inserting(attempts, "job_id", "claim_seq", "what", "error", "message", "at", "cost_nanos")


@dataclass(frozen=True, slots=True)
class DueWork:
    """What a look without a lock saw: due jobs, suspects, and when to look again.

    `expired` means that there are jobs to reclaim, or to bring forward. `next_ms` is how long from now until more may be
    due, None if nothing is waiting. `outages` are the models that all workers wait for, with the cause.
    """

    due: bool
    suspects: bool
    expired: bool
    next_ms: int | None
    outages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """A job taken from a worker whose lease ran out, or that `died` for certain."""

    job_id: JobId
    worker_id: WorkerId
    state: JobState
    died: bool = False


async def register(database: Database, *, host: str, pid: int, concurrency: int) -> WorkerId:
    """Add a worker and return its id; forget workers that have been silent for a day, and fold a few old pulses."""
    worker = await database.write(_add_worker, host=host, pid=pid, concurrency=concurrency)
    database.presence.appear(worker)
    return worker


def _add_worker(connection: Connection, now: Millis, /, **values: str | int) -> WorkerId:
    connection.execute(delete(workers).where(workers.c.seen_at < now - WORKER_MEMORY_MS))
    pulses_store.fold(connection, now)
    row = {"started_at": now, "seen_at": now, "settled": 0, "rate_milli": 0}
    query = insert(workers).values(**values, **row).returning(workers.c.id)
    return WorkerId(connection.execute(query).scalar_one())


async def unregister(database: Database, worker: WorkerId, pulses: Sequence[Pulse] = ()) -> None:
    """Remove a worker that ends and has released what it knows to hold; `pulses` are its last ones."""
    await database.write(_remove_ended, worker, pulses)
    database.presence.forget([worker])


def _remove_ended(connection: Connection, now: Millis, worker: WorkerId, pulses: Sequence[Pulse]) -> None:
    pulses_store.write(connection, now, worker, pulses)
    _release_unknown(connection, now, worker, {})
    _remove(connection, [worker])


def far_reports(
    connection: Connection, now: Millis, presence: Presence, worker: WorkerId
) -> tuple[Millis, dict[WorkerId, Millis]]:
    """Return the time, and the latest reports of other living workers whose clocks are far from it."""
    far = ~workers.c.seen_at.between(now - MAX_SKEW_MS, now + MAX_SKEW_MS)
    query = select(workers.c.id, workers.c.seen_at).where(far, workers.c.id != worker)
    seen = {WorkerId(row.id): Millis(row.seen_at) for row in connection.execute(query).all()}
    return now, {one: seen[one] for one in presence.alive(seen)}


def check_due(
    connection: Connection,
    now: Millis,
    presence: Presence,
    run_ids: Sequence[RunId],
    worker: WorkerId = NO_WORKER,
    bounded: Container[RunId] = (),
) -> DueWork:
    """Look, without a lock, whether a claim or a reclaim would find anything."""
    capacity = load_capacity(connection, run_ids, now, worker, lock=False, bounded=bounded)
    due = suspects = expired = False
    times: list[int | None] = list(capacity.waits)
    for run_id in capacity.answerers:
        bound = {"run": run_id, "now": now, "most": 1}
        if wait := capacity.wait_ms(run_id):
            times.append(now + wait)
            continue
        due |= connection.scalar(DUE_TRIED if run_id in capacity.batching else DUE, bound) is not None
        suspects |= connection.scalar(DUE_SUSPECT, bound) is not None
        later = select(func.min(jobs.c.available_at)).where(PENDING, jobs.c.run_id == run_id)
        first: int | None = connection.scalar(later.where(NOT_PARKED, jobs.c.available_at > now))
        if first is None:  # perhaps another program wrote what is no time
            first = connection.scalar(later.where(jobs.c.available_at > PARKED))
        expired |= first is not None and first > now + MAX_AHEAD_MS
        times.append(first)
    lease_end: int | None = connection.scalar(select(func.min(jobs.c.lease_until)).where(INFLIGHT))
    times.append(lease_end)
    expired |= (lease_end is not None and lease_end < now) or bool(dead_workers(connection, now, presence))
    waits = [time - now for time in times if time is not None and time > now]
    return DueWork(due, suspects, expired, min(waits, default=None), capacity.outages)


def bring_forward(connection: Connection, now: Millis, run_ids: Sequence[RunId]) -> None:
    """Make jobs due now that wait for a time that only a wrong clock can have set."""
    stranded = (PENDING, NOT_PARKED, any_of(jobs.c.run_id, "runs"), jobs.c.available_at > now + MAX_AHEAD_MS)
    connection.execute(update(jobs).where(*stranded).values(available_at=now), {"runs": list(run_ids)})


def renew(
    connection: Connection,
    now: Millis,
    worker: WorkerId,
    claims: Sequence[Claim],
    *,
    lease: float,
    settled: int,
    rate: float,
    seen: float,
    pulses: Sequence[Pulse] = (),
) -> tuple[Millis, set[JobId]]:
    """Extend the leases of a worker's claims and report that it lives, with its pulses.

    Return the time of the database's clock, and the jobs that the worker has lost.

    A lease that ran out, but whose job no worker has claimed since, is taken up again as if it had held. Jobs that
    are the worker's without its knowing, because the reply to their claim was lost, are released; `seen` is since when
    the worker has known that it holds no others, in seconds of `time.monotonic`. `settled` is how many jobs it has
    settled, `rate` how many a second lately.
    """
    values = {"seen_at": now, "settled": settled, "rate_milli": round(rate * 1000)}
    connection.execute(update(workers).where(workers.c.id == worker).values(**values))
    held = {claim.job_id: claim.claim_seq for claim in claims}
    until = now + round(lease * 1000)
    bound = {"ids": list(held), "worker": worker, "until": until}
    rows = connection.execute(RENEW, bound).all() if held else []
    lost = set(held) - {JobId(row.id) for row in rows if held[JobId(row.id)] == row.claim_seq}
    if lost:
        lost -= _retake(connection, held, bound | {"ids": list(lost)})
    # A renewal that is repeated must not take later claims for lost ones.
    age = min(LOST_MS, round(lease * 500)) + round((time.monotonic() - seen) * 1000)
    _release_unknown(connection, now, worker, held, until - age)
    pulses_store.write(connection, now, worker, pulses)
    return now, lost


def _release_unknown(
    connection: Connection, now: Millis, worker: WorkerId, held: Mapping[JobId, int], before: int = 2**62
) -> None:
    """Release jobs that were claimed in the worker's name, with a lease until `before`, and that it does not hold."""
    rows = connection.execute(CLAIMED_BY, {"worker": worker, "before": before}).all()
    if unknown := [row for row in rows if row.id not in held]:
        _release(connection, unknown)
        # How many tokens they took is not known.
        give_back(connection, [(row.run_id, 0) for row in unknown], now)


def release(
    connection: Connection, now: Millis, worker: WorkerId, claims: Sequence[Claim], *, unused: bool = False
) -> int:
    """Give claims back: pending again, nothing charged, claim_seq kept. Return how many were still held.

    With `unused`, no call was made for them, so that limits get back what they were debited.
    """
    by_id = {claim.job_id: claim for claim in claims}
    rows = connection.execute(_HELD.where(INFLIGHT), {"ids": list(by_id), "worker": worker}).all()
    if ours := [row for row in rows if by_id[row.id].claim_seq == row.claim_seq]:
        _release(connection, ours)
        if unused:
            give_back(connection, [(row.run_id, by_id[row.id].tokens) for row in ours], now)
    return len(ours)


def _release(connection: Connection, rows: Sequence[AnyRow]) -> None:
    hold_states(connection, {row.run_id for row in rows})
    freed = connection.execute(_SET_FREE, {"ids": [row.id for row in rows]}).all()
    counters.add(connection, counters.moved((row.run_id, JobState.INFLIGHT, row.state) for row in freed))


def dead_workers(connection: Connection, _now: Millis, presence: Presence) -> list[WorkerId]:
    """Return the registered workers that have ended for certain."""
    return presence.dead_workers(connection.scalars(select(workers.c.id)).all()) if presence.knows else []


def clock_error(now: Millis, worker: WorkerId, seen_at: Millis, database: str) -> DatabaseError:
    """Return the error of a worker whose clock is far from that of another one."""
    ours, theirs = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at / 1000)) for at in (now, seen_at))
    return DatabaseError(
        f"the clock of this process says {ours} UTC, but worker {worker}, which works on {database} too, has just written "
        f"{theirs} UTC: leases need one clock. Set the wrong one right, then start this worker again"
    )


async def reclaim(database: Database, dead: Collection[WorkerId] = ()) -> list[Reclaimed]:
    """Take back jobs of these dead workers, and those whose lease ran out; any worker may do it at any time.

    At most a page of each, so that a full page means that there may be more. Each is charged a crash; at the third
    it fails. A late answer of a live worker is still taken, as long as no worker has claimed the job again.
    """
    taken, removed = await database.write(_reclaim_lost, database.presence, dead)
    database.presence.forget(removed)
    return taken


def _reclaim_lost(
    connection: Connection, now: Millis, presence: Presence, dead: Collection[WorkerId]
) -> tuple[list[Reclaimed], list[WorkerId]]:
    # Within the transaction: a worker that is dead now cannot have claimed anything since.
    ended = presence.dead_workers(dead)
    of_dead = connection.execute(OF_DEAD, {"workers": ended}).all() if ended else []
    expired = connection.execute(EXPIRED, {"now": now}).all()
    removed = ended if len(of_dead) < RECLAIM_PAGE else []
    _remove(connection, removed)
    rows = [*of_dead, *expired]
    return _reclaim(connection, now, rows, ended) if rows else [], removed


def _remove(connection: Connection, ended: list[WorkerId]) -> None:
    connection.execute(delete(workers).where(any_of(workers.c.id, "ids")), {"ids": ended})


def _reclaim(connection: Connection, now: Millis, found: Sequence[AnyRow], ended: list[WorkerId]) -> list[Reclaimed]:
    hold_states(connection, {row.run_id for row in found})
    rows = connection.execute(RECLAIM, {"now": now, "ids": [row.id for row in found]}).all()
    likely = likely_costs(connection, {row.run_id for row in rows})
    deltas = counters.moved((row.run_id, JobState.INFLIGHT, row.state) for row in rows)
    records, reclaimed = [], []
    for row in rows:
        died, cost = row.worker_id in ended, likely.get(row.run_id)
        message = "its worker died" if died else "its worker's lease ran out"
        if row.state == JobState.FAILED:
            message = f"its worker died {row.crashes} times"
        records.append((row.id, row.claim_seq, "crashed", "WorkerDied", message, now, cost))
        deltas[row.run_id, counters.CRASHED] += 1
        deltas.update(counters.estimated(row.run_id, cost or 0))
        reclaimed.append(Reclaimed(row.id, row.worker_id, JobState(row.state), died))
    ADD_CRASHES.run_plain(connection, records)
    counters.add(connection, deltas)
    return reclaimed


def _retake(connection: Connection, held: dict[JobId, int], bound: dict[str, Any]) -> set[JobId]:
    """Take up again what was reclaimed from us, but not claimed since: we live, so no crash happened."""
    lapsed = connection.execute(_HELD.where(PENDING), bound).all()
    ours = [row for row in lapsed if held[JobId(row.id)] == row.claim_seq]
    if ours:
        connection.execute(RETAKE, bound | {"ids": [row.id for row in ours]})
        deltas = counters.moved((row.run_id, JobState.PENDING, JobState.INFLIGHT) for row in ours)
        deltas.update(forget_estimates(connection, {(row.id, row.claim_seq): row.run_id for row in ours}))
        counters.add(connection, deltas)
    return {JobId(row.id) for row in ours}


_locks: set[int] = set()


def _close_in_copy() -> None:
    """Close what a forked child inherited: it is not the worker, and must not outlive it as such."""
    for descriptor in _locks:
        with suppress(OSError):
            os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_copy)


class Presence:
    """Which workers of a database file live; with None for the file, nothing is known and the leases decide.

    A worker holds a kernel lock on a small file of its own, `runs.db.worker-17.lock`. The kernel frees it when the
    process ends, however it ends; a process id could be reused, and containers count their own. The lock is taken
    before the first claim and looked at within the transaction that reclaims, so a worker that has claims and a free
    lock has ended.
    """

    def __init__(self, database: Path | None = None) -> None:
        self.knows = database is not None
        """Whether anything can be known of workers."""
        self._database = database or Path()
        self._mine: dict[WorkerId, int] = {}

    def _path(self, worker: WorkerId) -> Path:
        return files.lock_path(self._database, f"worker-{worker}")

    def appear(self, worker: WorkerId) -> None:
        """Hold the worker's lock. If the file system offers none or is full, the leases have to do."""
        if not self.knows:
            return
        try:
            # There may be one already, of a database of which this one is an older copy.
            descriptor = ownership.open_ours(self._path(worker), os.O_CREAT | os.O_RDWR, self._database)
        except OSError:
            return
        self._mine[worker] = descriptor
        _locks.add(descriptor)
        try:
            files.lock_open(descriptor)
            # An empty file means nothing: its worker may be about to lock it.
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError:
            self.forget([worker])

    def leave(self, worker: WorkerId) -> None:
        """Free the worker's lock; its file stays, and shows that the worker has ended."""
        descriptor = self._mine.pop(worker, None)
        if descriptor in _locks:
            _locks.discard(descriptor)
            os.close(descriptor)

    def dead_workers(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return the workers that have ended for certain."""
        return [one for one in workers if self.knows and files.is_free(self._path(one), self._database)]

    def alive(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return the workers that live for certain, or all of them if nothing is known."""
        there = [one for one in workers if not self.knows or self._path(one).exists()]
        ended = self.dead_workers(there)
        return [one for one in there if one not in ended]

    def forget(self, workers: Iterable[WorkerId]) -> None:
        """Free and remove the locks of workers."""
        for worker in workers if self.knows else ():
            with suppress(OSError):
                self._path(worker).unlink(missing_ok=True)
            self.leave(worker)
