"""Leases: workers register, renew, release and reclaim jobs, and find out which workers have died.

Every method of `Queue` is one short transaction and safe to repeat. A write to a held job names the claim_seq of its
claim: a job that another worker has claimed since is not touched.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, delete, func, insert, literal_column, select, update

from lbr.core import ownership
from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.types import Claim, JobId, JobState, Millis, RunId, RunState, WorkerId
from lbr.store import claim as claiming
from lbr.store import counters, files
from lbr.store.claim import DUE, DUE_SUSPECT, ClaimRequest
from lbr.store.limits import forget_estimates, give_back, likely_costs, load_capacity
from lbr.store.runs import hold_states, resting_state
from lbr.store.schema import INFLIGHT, PENDING, attempts, jobs, runs, workers
from lbr.store.sql import Inserting, any_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from sqlalchemy import ColumnElement

    from lbr.core.limits import CallBound
    from lbr.store.database import Connection, Database
    from lbr.store.schema import AnyRow

MAX_CRASHES = 3
RECLAIM_PAGE = 500
MAX_SKEW_MS = 30_000
"""How far the clocks of two workers of a file may be apart: half of the default lease."""
WORKER_MEMORY_MS = 24 * 3600 * 1000
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
_RELEASE = (
    update(jobs)
    .where(INFLIGHT, any_of(jobs.c.id, "ids"))
    .values(state=bindparam("to"), worker_id=None, lease_until=None)
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
_RUN_CANCELLED = jobs.c.run_id.in_(select(runs.c.id).where(runs.c.state == RunState.CANCELLED))
_FAILS = jobs.c.crashes + 1 >= MAX_CRASHES


def _reclaim_where(lost: ColumnElement[bool]) -> Any:
    state: ColumnElement[str] = case(
        (_FAILS, literal_column("'failed'")),
        (_RUN_CANCELLED, literal_column("'cancelled'")),
        else_=literal_column("'pending'"),
    )
    now = bindparam("now", type_=jobs.c.finished_at.type)
    return (
        update(jobs)
        .where(any_of(jobs.c.id, "ids"), INFLIGHT, lost)
        .values(
            state=state,
            crashes=jobs.c.crashes + 1,
            available_at=bindparam("now"),
            finished_at=case((_FAILS, now)),
            lease_until=None,
        )
        .returning(jobs.c.id, jobs.c.run_id, jobs.c.claim_seq, jobs.c.crashes, jobs.c.state, jobs.c.worker_id)
    )


RECLAIM = _reclaim_where(jobs.c.lease_until < bindparam("now"))
RECLAIM_OF_DEAD = _reclaim_where(any_of(jobs.c.worker_id, "workers"))
ADD_CRASHES = Inserting(attempts, "job_id", "claim_seq", "what", "error", "message", "at", "cost_nanos")


@dataclass(frozen=True, slots=True)
class DueWork:
    """What a look without a lock saw: due jobs, suspects, jobs to reclaim, and when to look again.

    `stranded` means that jobs wait for a time that only a wrong clock can have set. `next_ms` is how long from now
    until more may be due, None if nothing is waiting. `outages` are the models that all workers wait for, with the
    cause.
    """

    due: bool
    suspects: bool
    expired: bool
    stranded: bool
    next_ms: int | None
    outages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clocks:
    """This process's time, and the latest reports of live workers whose clocks are far from it."""

    now: Millis
    reports: dict[WorkerId, Millis]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """A job taken from a worker whose lease ran out, or that `died` for certain."""

    job_id: JobId
    run_id: RunId
    worker_id: WorkerId
    state: JobState
    died: bool = False


class Queue:
    """The statements that workers share, over one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, *, host: str, pid: int, concurrency: int) -> WorkerId:
        """Add a worker and return its id; forget workers that have been silent for a day."""

        async def work(connection: Connection) -> WorkerId:
            now = await self._database.now(connection)
            await connection.execute(delete(workers).where(workers.c.seen_at < now - WORKER_MEMORY_MS))
            values = {"host": host, "pid": pid, "concurrency": concurrency, "started_at": now, "seen_at": now}
            query = insert(workers).values(**values, settled=0, rate_milli=0).returning(workers.c.id)
            return WorkerId((await connection.execute(query)).scalar_one())

        worker = await self._database.write(work)
        self._database.presence.appear(worker)
        return worker

    async def clocks(self, worker: WorkerId) -> Clocks:
        """Compare this process's clock with the latest reports of other workers."""
        presence = self._database.presence

        async def work(connection: Connection) -> Clocks:
            now = await self._database.now(connection)
            far = ~workers.c.seen_at.between(now - MAX_SKEW_MS, now + MAX_SKEW_MS)
            query = select(workers.c.id, workers.c.seen_at).where(far, workers.c.id != worker)
            rows = (await connection.execute(query)).all()
            seen = {WorkerId(row.id): Millis(row.seen_at) for row in rows}
            return Clocks(now, {one: seen[one] for one in presence.alive(seen)} if presence.knows else seen)

        return await self._database.read(work)

    async def unregister(self, worker: WorkerId) -> None:
        """Remove a worker that ends. One that still holds jobs stays, so that others see it dead and take them."""

        async def work(connection: Connection) -> bool:
            if (await connection.execute(OF_DEAD, {"workers": [worker]})).first() is not None:
                return False
            await _remove(connection, [worker])
            return True

        if await self._database.write(work):
            self._database.presence.forget([worker])

    def leave(self, worker: WorkerId) -> None:
        """End a worker, in whatever state: others may take what it still holds."""
        self._database.presence.leave(worker)

    async def claim(
        self,
        worker: WorkerId,
        run_ids: Sequence[RunId],
        most: int,
        *,
        lease: float,
        suspects: bool = False,
        extra: Mapping[RunId, int] | None = None,
        bounds: Mapping[RunId, CallBound] | None = None,
    ) -> list[Claim]:
        """Claim due jobs; see `lbr.store.claim`."""
        request = ClaimRequest(worker, run_ids, most, lease, suspects, extra or {}, bounds or {})
        return await claiming.claim(self._database, request)

    async def check_due(self, run_ids: Sequence[RunId], *, worker: WorkerId = NO_WORKER) -> DueWork:
        """Look, without a lock, whether a claim or a reclaim would find anything."""

        async def work(connection: Connection) -> DueWork:
            now = await self._database.now(connection)
            capacity = await load_capacity(connection, run_ids, now, worker, lock=False)
            due = suspects = stranded = False
            times: list[int | None] = list(capacity.waits)
            for run_id in capacity.answerers:
                bound = {"run": run_id, "now": now, "most": 1}
                if wait := capacity.wait_ms(run_id):
                    times.append(now + wait)
                    continue
                due |= (await connection.scalar(DUE, bound)) is not None
                suspects |= (await connection.scalar(DUE_SUSPECT, bound)) is not None
                later = select(func.min(jobs.c.available_at)).where(PENDING, jobs.c.run_id == run_id)
                first: int | None = await connection.scalar(later.where(jobs.c.available_at > now))
                stranded |= first is not None and first > now + MAX_AHEAD_MS
                times.append(first)
            lease_end: int | None = await connection.scalar(select(func.min(jobs.c.lease_until)).where(INFLIGHT))
            times.append(lease_end)
            expired = (lease_end is not None and lease_end < now) or bool(await self._dead(connection))
            waits = [time - now for time in times if time is not None and time > now]
            return DueWork(due, suspects, expired, stranded, min(waits, default=None), capacity.outages)

        return await self._database.read(work)

    async def bring_forward(self, run_ids: Sequence[RunId]) -> None:
        """Make jobs due now that wait for a time that only a wrong clock can have set."""

        async def work(connection: Connection) -> None:
            now = await self._database.now(connection)
            stranded = (PENDING, any_of(jobs.c.run_id, "runs"), jobs.c.available_at > now + MAX_AHEAD_MS)
            query = update(jobs).where(*stranded).values(available_at=now)
            await connection.execute(query, {"runs": list(run_ids)})

        await self._database.write(work)

    async def renew(
        self, worker: WorkerId, claims: Iterable[Claim], *, lease: float, settled: int, rate: float
    ) -> set[JobId]:
        """Extend the leases of a worker's claims and report that it lives; return the jobs that it lost.

        A lease that ran out, but whose job no worker has claimed since, is taken up again as if it had held.
        `settled` is how many jobs the worker has settled, `rate` how many a second lately.
        """
        held = {claim.job_id: claim.claim_seq for claim in claims}

        async def work(connection: Connection) -> set[JobId]:
            now = await self._database.now(connection)
            values = {"seen_at": now, "settled": settled, "rate_milli": round(rate * 1000)}
            await connection.execute(update(workers).where(workers.c.id == worker).values(**values))
            if not held:
                return set()
            bound = {"ids": list(held), "worker": worker, "until": now + round(lease * 1000)}
            rows = (await connection.execute(RENEW, bound)).all()
            lost = set(held) - {JobId(row.id) for row in rows if held[JobId(row.id)] == row.claim_seq}
            return lost - await _retake(connection, held, bound | {"ids": list(lost)}) if lost else lost

        return await self._database.write(work)

    async def release(self, worker: WorkerId, claims: Iterable[Claim], *, unused: bool = False) -> int:
        """Give claims back: pending again, nothing charged, claim_seq kept. Return how many were still held.

        With `unused`, no call was made for them, so that limits get back what they were debited.
        """
        by_id = {claim.job_id: claim for claim in claims}
        if not by_id:
            return 0

        async def work(connection: Connection) -> int:
            query = _HELD.where(INFLIGHT)
            rows = (await connection.execute(query, {"ids": list(by_id), "worker": worker})).all()
            ours = [row for row in rows if by_id[row.id].claim_seq == row.claim_seq]
            states = await hold_states(connection, {row.run_id for row in ours})
            moves = [(row.run_id, JobState.INFLIGHT, resting_state(states[row.run_id])) for row in ours]
            for state in {state for *_, state in moves}:
                ids = [row.id for row, (*_, to) in zip(ours, moves, strict=True) if to is state]
                await connection.execute(_RELEASE, {"ids": ids, "to": state})
            if unused:
                now = await self._database.now(connection)
                await give_back(connection, [by_id[row.id] for row in ours], now)
            await counters.add(connection, counters.moved(moves))
            return len(ours)

        return await self._database.write(work)

    async def dead_workers(self) -> dict[WorkerId, int]:
        """Return the registered workers that have ended for certain, with the ids of their processes."""
        return await self._database.read(self._dead)

    async def reclaim(self, dead_workers: Collection[WorkerId] = ()) -> list[Reclaimed]:
        """Take back jobs of these dead workers, and those whose lease ran out; any worker may do it at any time.

        At most a page of each, so that a full page means that there may be more. Each is charged a crash; at the third
        it fails. A late answer of a live worker is still taken, as long as no worker has claimed the job again.
        """

        async def work(connection: Connection) -> tuple[list[Reclaimed], list[WorkerId]]:
            now = await self._database.now(connection)
            # Within the transaction: a worker that is dead now cannot have claimed anything since.
            ended = self._database.presence.dead_workers(dead_workers)
            bound = {"now": now, "workers": ended}
            taken = await _reclaim(connection, OF_DEAD, RECLAIM_OF_DEAD, bound) if ended else []
            if len(taken) < RECLAIM_PAGE:
                await _remove(connection, ended)
            else:
                ended = []
            return taken + await _reclaim(connection, EXPIRED, RECLAIM, {"now": now}), ended

        taken, removed = await self._database.write(work)
        self._database.presence.forget(removed)
        return taken

    async def _dead(self, connection: Connection) -> dict[WorkerId, int]:
        presence = self._database.presence
        if not presence.knows:
            return {}
        found = (await connection.execute(select(workers.c.id, workers.c.pid))).all()
        pids = {WorkerId(row.id): row.pid for row in found}
        return {worker: pids[worker] for worker in presence.dead_workers(pids)}


async def _remove(connection: Connection, ended: list[WorkerId]) -> None:
    if ended:
        await connection.execute(delete(workers).where(any_of(workers.c.id, "ids")), {"ids": ended})


async def _reclaim(connection: Connection, finding: Any, reclaiming: Any, bound: dict[str, Any]) -> list[Reclaimed]:
    found = (await connection.execute(finding, bound)).all()
    if not found:
        return []
    await hold_states(connection, {row.run_id for row in found})
    rows = (await connection.execute(reclaiming, bound | {"ids": [row.id for row in found]})).all()
    died = "workers" in bound
    likely = await likely_costs(connection, {row.run_id for row in rows})
    records = [_crash_record(row, bound["now"], likely.get(row.run_id), died=died) for row in rows]
    await ADD_CRASHES.run(connection, records)
    deltas = counters.moved((row.run_id, JobState.INFLIGHT, row.state) for row in rows)
    for row in rows:
        deltas[row.run_id, counters.CRASHED] += 1
        deltas.update(counters.estimated(row.run_id, likely.get(row.run_id, 0)))
    await counters.add(connection, deltas)
    return [Reclaimed(row.id, row.run_id, row.worker_id, JobState(row.state), died) for row in rows]


def _crash_record(row: AnyRow, now: Millis, likely: int | None, *, died: bool) -> dict[str, Any]:
    message = "its worker died" if died else "its worker's lease ran out"
    if row.state == JobState.FAILED:
        message = f"its worker died {row.crashes} times"
    return {
        "job_id": row.id,
        "claim_seq": row.claim_seq,
        "what": "crashed",
        "error": "WorkerDied",
        "message": message,
        "at": now,
        "cost_nanos": likely,
    }


async def _retake(connection: Connection, held: dict[JobId, int], bound: dict[str, Any]) -> set[JobId]:
    """Take up again what was reclaimed from us, but not claimed since: we live, so no crash happened."""
    lapsed = (await connection.execute(_HELD.where(PENDING), bound)).all()
    ours = [row for row in lapsed if held[JobId(row.id)] == row.claim_seq]
    if ours:
        await connection.execute(RETAKE, bound | {"ids": [row.id for row in ours]})
        deltas = counters.moved((row.run_id, JobState.PENDING, JobState.INFLIGHT) for row in ours)
        deltas.update(await forget_estimates(connection, {(row.id, row.claim_seq): row.run_id for row in ours}))
        await counters.add(connection, deltas)
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
        self.knows = database is not None and files.HAS_LOCKS
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
        """Return the workers that live for certain."""
        there = [one for one in workers if self.knows and self._path(one).exists()]
        ended = self.dead_workers(there)
        return [one for one in there if one not in ended]

    def forget(self, workers: Iterable[WorkerId]) -> None:
        """Free and remove the locks of workers."""
        for worker in workers if self.knows else ():
            with suppress(OSError):
                self._path(worker).unlink(missing_ok=True)
            self.leave(worker)
