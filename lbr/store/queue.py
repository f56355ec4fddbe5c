"""The life of a job between pending and its end: claim, renew, release and reclaim.

Every method is one short transaction and safe to repeat. Whatever writes to a held job names the
claim_seq of its claim: a job that somebody else has claimed since is not touched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, delete, func, insert, literal_column, select, update

from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.types import Claim, JobId, JobState, Millis, RunId, RunState, WorkerId
from lbr.store import counters
from lbr.store.budgets import forget_estimates, likely_costs
from lbr.store.claims import DUE, DUE_SUSPECT, ClaimRequest, take
from lbr.store.limiting import give_back, load_capacity
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
"""How far the clocks of two workers of a file may be apart: half of the usual lease."""
WORKER_MEMORY_MS = 24 * 3600 * 1000

RENEW = (
    update(jobs)
    .where(INFLIGHT, any_of(jobs.c.id, "ids"), jobs.c.worker_id == bindparam("worker"))
    .values(lease_until=bindparam("until"))
    .returning(jobs.c.id, jobs.c.claim_seq)
)
# Taken back from us, but by nobody claimed since: we live, so the job is still ours and no crash happened.
_LAPSED = (
    select(jobs.c.id, jobs.c.claim_seq, jobs.c.run_id)
    .where(PENDING, any_of(jobs.c.id, "ids"), jobs.c.worker_id == bindparam("worker"))
    .order_by(jobs.c.id)
    .with_for_update()
)
RETAKE = (
    update(jobs)
    .where(PENDING, any_of(jobs.c.id, "ids"), jobs.c.worker_id == bindparam("worker"))
    .values(state=literal_column("'inflight'"), crashes=jobs.c.crashes - 1, lease_until=bindparam("until"))
)
_HELD = (
    select(jobs.c.id, jobs.c.claim_seq, jobs.c.run_id)
    .where(INFLIGHT, any_of(jobs.c.id, "ids"), jobs.c.worker_id == bindparam("worker"))
    .order_by(jobs.c.id)
    .with_for_update()
)
_GIVE_BACK = (
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
_RUN_CANCELLED = jobs.c.run_id.in_(select(runs.c.id).where(runs.c.state == RunState.CANCELLED))
_RECLAIMED_STATE: ColumnElement[str] = case(
    (jobs.c.crashes + 1 >= MAX_CRASHES, literal_column("'failed'")),
    (_RUN_CANCELLED, literal_column("'cancelled'")),
    else_=literal_column("'pending'"),
)


def _reclaiming(lost: ColumnElement[bool]) -> Any:
    return (
        update(jobs)
        .where(any_of(jobs.c.id, "ids"), INFLIGHT, lost)
        .values(
            state=_RECLAIMED_STATE,
            crashes=jobs.c.crashes + 1,
            available_at=bindparam("now"),
            finished_at=case(
                (jobs.c.crashes + 1 >= MAX_CRASHES, bindparam("now", type_=jobs.c.finished_at.type))
            ),
            lease_until=None,
        )
        .returning(jobs.c.id, jobs.c.run_id, jobs.c.claim_seq, jobs.c.crashes, jobs.c.state, jobs.c.worker_id)
    )


NO_WORKER = WorkerId(0)

RECLAIM = _reclaiming(jobs.c.lease_until < bindparam("now"))
OF_DEAD = (
    select(jobs.c.id, jobs.c.run_id)
    .where(INFLIGHT, any_of(jobs.c.worker_id, "workers"))
    .order_by(jobs.c.id)
    .limit(RECLAIM_PAGE)
)
RECLAIM_OF_DEAD = _reclaiming(any_of(jobs.c.worker_id, "workers"))

ADD_CRASHES = Inserting(attempts, "job_id", "claim_seq", "what", "error", "message", "at", "cost_nanos")


@dataclass(frozen=True, slots=True)
class DueWork:
    """What a look without a lock saw: is anything due, are suspects, is anything to reclaim, when to look again.

    `stranded` tells that jobs wait for a time that only a clock that was ahead can have set. `next_ms` is how long from now until more may be due, None where nothing is waiting.
    `outages` are the models that all workers wait for, with the cause.
    """

    due: bool
    suspects: bool
    expired: bool
    stranded: bool
    next_ms: int | None
    outages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What time it is for this process, and when others last reported by their clocks, if far from that.

    They are workers that live, if the database knows that.
    """

    now: Millis
    reports: dict[WorkerId, Millis]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """A job taken back from a worker whose lease ran out, or where `died`, that has ended for certain."""

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
            return Clocks(now, {one: seen[one] for one in presence.alive(seen)} if presence.tells else seen)

        return await self._database.read(work)

    async def unregister(self, worker: WorkerId) -> None:
        """Remove a worker that ends. One that holds jobs all the same stays, so that others see it dead and take them."""

        async def work(connection: Connection) -> bool:
            if (await connection.execute(OF_DEAD, {"workers": [worker]})).first() is not None:
                return False
            await _remove(connection, [worker])
            return True

        if await self._database.write(work):
            self._database.presence.forget([worker])

    def leave(self, worker: WorkerId) -> None:
        """End a worker, in whatever order: what it still holds, others may take back."""
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
        """Take up to `most` due jobs of the named runs, in the order given, for `lease` seconds.

        Runs that are not active and answerers that cool down are passed over, and the limits of the others are
        kept. For `suspects`, `extra` and `bounds` see `ClaimRequest`.
        """
        wish = ClaimRequest(worker, run_ids, most, suspects, extra or {}, bounds or {})
        # It skips what is locked, so it need not wait for what is being settled.
        return await self._database.write(
            lambda connection: self.claim_within(connection, wish, lease=lease), beside=True
        )

    async def claim_within(self, connection: Connection, wish: ClaimRequest, *, lease: float) -> list[Claim]:
        """Take what a worker wishes for, in the caller's transaction; see `claim`."""
        now = await self._database.now(connection)
        gate = await load_capacity(connection, wish.run_ids, now, wish.worker, lock=True)
        claims = await take(connection, gate, wish, until=now + round(lease * 1000))
        await gate.save(connection)
        if claims:
            await counters.add(connection, _moved(claims, JobState.PENDING, JobState.INFLIGHT))
        return claims

    async def look(self, run_ids: Sequence[RunId], *, worker: WorkerId = NO_WORKER) -> DueWork:
        """See without a lock whether a claim or a reclaim would find anything."""

        async def work(connection: Connection) -> DueWork:
            now = await self._database.now(connection)
            gate = await load_capacity(connection, run_ids, now, worker, lock=False)
            due = suspects = stranded = False
            times: list[int | None] = list(gate.waits)
            for run_id in gate.answerers:
                bound = {"run": run_id, "now": now, "most": 1}
                if wait := gate.wait_ms(run_id):
                    times.append(now + wait)
                    continue
                due |= (await connection.scalar(DUE, bound)) is not None
                suspects |= (await connection.scalar(DUE_SUSPECT, bound)) is not None
                later = select(func.min(jobs.c.available_at)).where(PENDING, jobs.c.run_id == run_id)
                first: int | None = await connection.scalar(later.where(jobs.c.available_at > now))
                stranded |= first is not None and first > now + MAX_AHEAD_MS
                times.append(first)
            lease_end: int | None = await connection.scalar(
                select(func.min(jobs.c.lease_until)).where(INFLIGHT)
            )
            times.append(lease_end)
            expired = (lease_end is not None and lease_end < now) or bool(await self._dead(connection))
            waits = [time - now for time in times if time is not None and time > now]
            return DueWork(due, suspects, expired, stranded, min(waits, default=None), gate.outages)

        return await self._database.read(work)

    async def bring_forward(self, run_ids: Sequence[RunId]) -> None:
        """Let jobs be claimed now that a clock which was ahead told to wait for longer than anybody waits."""

        async def work(connection: Connection) -> None:
            now = await self._database.now(connection)
            stranded = (PENDING, any_of(jobs.c.run_id, "runs"), jobs.c.available_at > now + MAX_AHEAD_MS)
            query = update(jobs).where(*stranded).values(available_at=now)
            await connection.execute(query, {"runs": list(run_ids)})

        await self._database.write(work)

    async def renew(
        self, worker: WorkerId, claims: Iterable[Claim], *, lease: float, settled: int, rate: float
    ) -> set[JobId]:
        """Extend the leases of a worker's claims and note that it lives; return the jobs that it lost.

        A lease that ran out, but whose job nobody has claimed since, is taken up again as if it had held.

        `settled` is how many jobs the worker has settled, `rate` how many a second of late.
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
            kept = {JobId(row.id) for row in rows if held[JobId(row.id)] == row.claim_seq}
            return set(held) - kept - await _retake(connection, held, bound | {"ids": list(set(held) - kept)})

        return await self._database.write(work)

    async def release(self, worker: WorkerId, claims: Iterable[Claim], *, unused: bool = False) -> int:
        """Give claims back: pending again, nothing charged, claim_seq kept. Return how many were still held.

        With `unused`, no call was made for them, so that limits get back what they were debited.
        """
        claims = list(claims)
        held = {claim.job_id: claim.claim_seq for claim in claims}
        if not held:
            return 0

        async def work(connection: Connection) -> int:
            rows = (await connection.execute(_HELD, {"ids": list(held), "worker": worker})).all()
            ours = [row for row in rows if held[row.id] == row.claim_seq]
            standing = await hold_states(connection, {row.run_id for row in ours})
            deltas: counters.Deltas = Counter()
            for state in (JobState.PENDING, JobState.CANCELLED):
                back = [row for row in ours if resting_state(standing[row.run_id]) is state]
                if back:
                    await connection.execute(_GIVE_BACK, {"ids": [row.id for row in back], "to": state})
                deltas.update(_moved(back, JobState.INFLIGHT, state))
            if unused:
                await give_back(
                    connection, claims, {row.id for row in ours}, await self._database.now(connection)
                )
            await counters.add(connection, deltas)
            return len(ours)

        return await self._database.write(work)

    async def dead_workers(self) -> dict[WorkerId, int]:
        """Return the workers that have ended for certain, and have not been buried yet, with the ids of their processes."""
        return await self._database.read(self._dead)

    async def reclaim(self, dead_workers: Collection[WorkerId] = ()) -> list[Reclaimed]:
        """Take back jobs of these dead workers, and those whose lease ran out; any worker may do it at any time.

        At most a page of each: none of a full page means that there may be more. Each is charged a crash; at the
        third it fails. A late answer of a worker that lives is still taken, as long as nobody has claimed the job
        again.
        """

        async def work(connection: Connection) -> tuple[list[Reclaimed], list[WorkerId]]:
            now = await self._database.now(connection)
            # Within the transaction: a worker that is dead now cannot have claimed anything since.
            ended = self._database.presence.dead_workers(dead_workers)
            bound = {"now": now, "workers": ended}
            taken = await _take_back(connection, OF_DEAD, RECLAIM_OF_DEAD, bound) if ended else []
            if len(taken) < RECLAIM_PAGE:
                await _remove(connection, ended)
            else:
                ended = []
            return taken + await _take_back(connection, EXPIRED, RECLAIM, {"now": now}), ended

        taken, buried = await self._database.write(work)
        self._database.presence.forget(buried)
        return taken

    async def _dead(self, connection: Connection) -> dict[WorkerId, int]:
        presence = self._database.presence
        if not presence.tells:
            return {}
        found = (await connection.execute(select(workers.c.id, workers.c.pid))).all()
        pids = {WorkerId(row.id): row.pid for row in found}
        return {worker: pids[worker] for worker in presence.dead_workers(pids)}


async def _remove(connection: Connection, ended: list[WorkerId]) -> None:
    if ended:
        await connection.execute(delete(workers).where(any_of(workers.c.id, "ids")), {"ids": ended})


async def _take_back(
    connection: Connection, finding: Any, reclaiming: Any, bound: dict[str, Any]
) -> list[Reclaimed]:
    found = (await connection.execute(finding, bound)).all()
    if not found:
        return []
    await hold_states(connection, {row.run_id for row in found})
    rows = (await connection.execute(reclaiming, bound | {"ids": [row.id for row in found]})).all()
    now, died = bound["now"], "workers" in bound
    likely = await likely_costs(connection, {row.run_id for row in rows})
    records = [_crash_record(row, now, likely.get(row.run_id), died=died) for row in rows]
    await ADD_CRASHES.run(connection, records)
    deltas = counters.moved((row.run_id, JobState.INFLIGHT, row.state) for row in rows)
    for row in rows:
        deltas[row.run_id, counters.CRASHED] += 1
        deltas.update(counters.estimated(row.run_id, likely.get(row.run_id, 0)))
    await counters.add(connection, deltas)
    return [Reclaimed(row.id, row.run_id, row.worker_id, JobState(row.state), died) for row in rows]


async def _retake(connection: Connection, held: dict[JobId, int], bound: dict[str, Any]) -> set[JobId]:
    if not bound["ids"]:
        return set()
    lapsed = (await connection.execute(_LAPSED, {"ids": bound["ids"], "worker": bound["worker"]})).all()
    ours = [row for row in lapsed if held[JobId(row.id)] == row.claim_seq]
    if ours:
        await connection.execute(RETAKE, bound | {"ids": [row.id for row in ours]})
        deltas = _moved(ours, JobState.PENDING, JobState.INFLIGHT)
        deltas.update(
            await forget_estimates(connection, {row.id: (row.run_id, row.claim_seq) for row in ours})
        )
        await counters.add(connection, deltas)
    return {JobId(row.id) for row in ours}


def _moved(rows: Iterable[AnyRow | Claim], source: JobState, target: JobState) -> counters.Deltas:
    return counters.moved((row.run_id, source, target) for row in rows)


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
