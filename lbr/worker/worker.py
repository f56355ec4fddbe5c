"""One worker process's loop: claim jobs for free slots, call, settle, until nothing is left to do.

A slot is taken from the claim until its settlement is committed, so a killed worker costs at most one call for each of
its slots. The loop is never cancelled in the middle of a transaction; it is asked to stop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from contextlib import contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING

from lbr.core import open_files
from lbr.core.batches import Lane
from lbr.core.errors import DatabaseBusyError, DatabaseError, LbrError, RunNotFoundError
from lbr.core.retry import RetryPolicy
from lbr.core.types import RunId, Until, WorkerId
from lbr.store import leases, pulses, reads
from lbr.store.claim import ClaimRequest, claim, settle_and_claim
from lbr.store.settle import settle
from lbr.worker.batches import Batches
from lbr.worker.calls import MAX_ROWS, MAX_SERVER_ROWS, Calls, WorkReport, pace
from lbr.worker.clock import ClockCheck
from lbr.worker.kept_answers import keep_unwritten, reclaim
from lbr.worker.runs import Completion, ServableRuns, StartLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lbr.core.config import WorkOptions
    from lbr.core.types import Claim, Run, Settlement
    from lbr.models.build import Authority
    from lbr.store.database import Database
    from lbr.store.leases import DueWork
    from lbr.store.settle import Settled

POLL_SECONDS = 0.1
TICK_SECONDS = 5.0
CHECK_SECONDS = 1.0
FOLD_SECONDS = 3_600.0
STANDSTILL_SECONDS = 1.0
JITTER_SECONDS = 1.0
LATEST_TURNS = 4
LATEST_TICKS = 7


class Worker:
    """Serves runs until asked to stop or until nothing is left, by `options.until`.

    `run_names` restricts it to those runs, None means all that it can serve. `notify` gets one line at a time for the
    user.
    """

    def __init__(
        self,
        database: Database,
        authority: Authority,
        options: WorkOptions,
        *,
        run_names: Sequence[str] | None = None,
        policy: RetryPolicy | None = None,
        notify: Callable[[str], None] = lambda _: None,
        rng: Random | None = None,
    ) -> None:
        self._database = database
        self._options = options
        self._run_names = run_names
        self._notify = notify
        self._rng = rng or Random()  # noqa: S311 - jitter
        self._start_limits = StartLimits(database, options)
        limits_cost, room = options.max_cost is not None, open_files.room()
        self._runs = ServableRuns(authority, concurrency=options.concurrency, room=room, limits_cost=limits_cost)
        self.served = self._runs.served  # by their ids; public, because others follow them
        self._completion = Completion(self._runs, named=run_names is not None, notify=notify)
        self.report = WorkReport()
        self._wake = asyncio.Event()
        policy = policy or RetryPolicy()
        self._calls = Calls(
            self.report, options, policy=policy, rng=self._rng, changed=self._wake.set, failed=self._fail, notify=notify
        )
        self._batches = Batches(
            database,
            self._runs,
            policy=policy,
            rng=self._rng,
            report=self.report,
            notify=notify,
            changed=self._batch_changed,
        )
        self._id = WorkerId(0)
        self._run_ids: list[RunId] = []
        self._found: list[Run] = []
        self._claims = 0
        self._claiming_since: float | None = None
        self._unused: list[Claim] = []
        # Whether the last claim filled all its slots, so that another will probably find jobs; whether a model is
        # limited to fewer calls than there are slots, so that each call that ends makes room for another; and whether
        # the last turn made such room.
        self._more, self._throttled, self._freed = True, False, False
        self._turn_seconds = deque([0.0], maxlen=LATEST_TURNS)
        self._settled = deque([(time.monotonic(), 0)], maxlen=LATEST_TICKS)
        self._error: BaseException | None = None
        self._stopping = self._aborting = self._database_failed = False
        self._deadline = self._next_poll = self._next_due = self._next_check = self._next_fold = 0.0
        self._clock = ClockCheck(database, notify, lambda: self._stopping)

    def drain(self) -> None:
        """Claim no more, finish the calls in flight within the grace, then release the rest and return."""
        self.report.drained = True
        self._stop()

    def abort(self) -> None:
        """Release everything at once; nothing is charged."""
        self._aborting = True
        self.drain()

    def _batch_changed(self) -> None:
        self._next_poll = self._next_due = self._next_check = 0.0
        self._wake.set()

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping, self._deadline = True, time.monotonic() + self._options.grace
        self._wake.set()

    def _fail(self, error: BaseException) -> None:
        """End the worker. Calls in flight may still end, because they are paid for, unless lbr itself is at fault."""
        self._error = self._error or error
        self._aborting |= not isinstance(error, LbrError)
        if isinstance(error, DatabaseError):
            self._database_failed = True
            self._database.give_up()
        self._stop()

    async def run(self) -> WorkReport:
        """Work. If the caller is cancelled, everything held is released first.

        Raises NothingToServeError if there are jobs, but none that this process may answer; DatabaseError if the
        database stays away, after keeping the unwritten answers for the next worker.
        """
        work = asyncio.ensure_future(self._run())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.abort()
            while not work.done():  # another cancellation must not interrupt the release
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            if not work.cancelled():
                work.exception()
            raise

    async def _run(self) -> WorkReport:
        try:
            await self._clock.check(self._id, starting=True)
            await self._reclaim(starting=True)
            await self._update_runs()
            host, slots = socket.gethostname(), self._runs.slots
            self._calls.pulses.sync(await self._database.quick_read(reads.time), time.monotonic())
            self._id = await leases.register(self._database, host=host, pid=os.getpid(), concurrency=slots)
            self._calls.worker = self._id
            self._calls.owner = asyncio.current_task()
            ticking, batching = asyncio.create_task(self._tick()), asyncio.create_task(self._batch())
            try:
                await self._work()
            finally:
                self._stop()
                ticking.cancel()
                await self._end_batching(batching)
                await self._wind_up()
                await asyncio.gather(ticking, return_exceptions=True)
        finally:
            self._database.presence.leave(self._id)
            await self._runs.aclose()
        return self.report

    async def _batch(self) -> None:
        """Serve the batch lane."""
        try:
            if self._options.lane is not Lane.ONLINE:
                await self._batches.run(self._id, lambda: self._found, named=self._run_names is not None)
        except Exception as error:  # noqa: BLE001 - as for the other lane
            self._fail(error)

    async def _end_batching(self, batching: asyncio.Task[None]) -> None:
        """Let a step come to its end within the grace."""
        self._batches.stop()
        left = 0.0 if self._aborting else max(0.0, self._deadline - time.monotonic())
        await asyncio.wait([batching], timeout=left)
        batching.cancel()
        await asyncio.gather(batching, return_exceptions=True)

    async def _work(self) -> None:
        """Take turns until nothing is left to do; after a stop, until the calls have ended or the grace is over."""
        compared = False
        while not self._is_over():
            try:
                if self._database_failed:
                    await self._sleep(POLL_SECONDS)
                    continue
                if not compared:  # again, to see a worker that started at the same moment
                    await self._clock.check(self._id, starting=True)
                    compared = True
                await self._take_turn()
                if not self._more and not self._stopping and await self._is_finished():
                    return
                await self._wait()
            except DatabaseError as error:
                self._fail(error)
            except asyncio.CancelledError:  # by an event loop that ends, with all its tasks
                self._fail(DatabaseError("the event loop ended before all answers were written"))
                raise

    def _is_over(self) -> bool:
        if self._aborting or not self._stopping:
            return self._aborting
        unfinished = self._calls.calling if self._database_failed else len(self._calls)
        return not unfinished or time.monotonic() >= self._deadline

    async def _take_turn(self) -> None:
        """Settle what has ended, claim for the free slots, and call."""
        batch = self._calls.ended[: self._calls.enough]
        free, freed = await self._slots_to_fill(batch)
        self._freed = bool(batch)
        if batch:
            settled = await self._settle(batch, free, freed)
            self._calls.forget(batch, settled)
        else:
            await self._claim(free)
        await self._release_unused()

    async def _slots_to_fill(self, batch: Sequence[Settlement]) -> tuple[int, int]:
        """Return how many slots are free, and how many this batch frees; nothing if a claim would find nothing."""
        free, freed = self._free(), self._calls.freed_by(batch)
        if self._stopping or self._calls.alone or free + freed <= 0:
            return 0, 0
        if self._clock.has_jumped:
            if batch:
                return 0, 0  # answers do not wait for the comparison
            await self._clock.check(self._id)
        is_likely = self._more or (self._throttled and (freed > 0 or self._freed))
        return (free, freed) if is_likely or await self._is_due() else (0, 0)

    async def _settle(self, batch: Sequence[Settlement], free: int, freed: int) -> Settled:
        """Settle a batch and claim for the `free` slots; on a file, for those `freed` by it too.

        Raises DatabaseError, with nothing of the batch written.
        """
        started = time.perf_counter()
        if self._database.one_writer and free + freed > 0:
            settled = await self._settle_and_claim(batch, free + freed)
        else:
            # One transaction could wait for another in a circle: a claim locks limits, then jobs; a settlement the
            # other way round. Together they take no longer than one.
            claiming = asyncio.create_task(self._claim(free))
            try:
                settled = await self._database.write(settle, batch)
            finally:
                # The next claim reports what is wrong.
                await asyncio.gather(claiming, return_exceptions=True)
        self._turn_seconds.append(time.perf_counter() - started)
        return settled

    async def _settle_and_claim(self, batch: Sequence[Settlement], most: int) -> Settled:
        with self._claiming():
            try:
                settled, claims = await self._database.write(settle_and_claim, batch, self._request(most))
            except DatabaseBusyError:
                raise
            except DatabaseError:
                # A row that cannot be claimed must not keep paid answers out; the next claim reports it.
                return await self._database.write(settle, batch)
        self._start(claims, most)
        return settled

    async def _claim(self, most: int, *, suspects: bool = False) -> None:
        """Claim up to `most` jobs and call; with `suspects`, jobs that crashed their workers and must run alone."""
        if most > 0:
            with self._claiming():
                claims = await self._database.write(claim, self._request(most, suspects=suspects))
            self._start(claims, most)

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        """Note that a claim is under way: jobs that it takes are not known to this worker yet, but not lost either."""
        self._claiming_since = time.monotonic()
        try:
            yield
        finally:
            self._claiming_since = None

    def _request(self, most: int, *, suspects: bool = False) -> ClaimRequest:
        self._claims += 1
        first = self._claims % max(1, len(self._run_ids))
        run_ids = self._run_ids[first:] + self._run_ids[:first]  # each run comes first in its turn
        served = {run_id: self._runs.served[run_id] for run_id in run_ids}
        extra = {run_id: one.extra_tokens for run_id, one in served.items()}
        bounds = {run_id: bound for run_id, one in served.items() if (bound := one.bound) is not None}
        return ClaimRequest(self._id, run_ids, most, self._options.lease, suspects, extra, bounds)

    def _start(self, claims: list[Claim], most: int) -> None:
        """Call what was claimed; a worker that stops gives it back."""
        if self._stopping:
            self._unused += claims
        else:
            for one in claims:
                self._calls.start(one, self._runs.served[one.run_id])
        self._more = len(claims) == most and not self._calls.alone
        self._throttled = any(one.throttled for one in claims) or (self._throttled and not claims)

    async def _release_unused(self) -> None:
        claims, self._unused = self._unused, []
        if claims:
            self.report.released += await self._database.write(leases.release, self._id, claims, unused=True)

    async def _wind_up(self) -> None:
        """Release what is held, write what has ended, and raise what went wrong on the way."""
        try:
            if released := await self._calls.cancel():
                self.report.released += await self._database.write(leases.release, self._id, released)
            await self._release_unused()
            while self._calls.ended and not self._database_failed:
                await self._take_turn()
            if not self._database_failed:
                await leases.unregister(self._database, self._id, self._calls.pulses.take((), time.monotonic()))
        except Exception as error:  # noqa: BLE001 - whatever it is, finished answers must be kept
            self._error = self._error or error
        if self._error is not None:
            raise keep_unwritten(self._database, self._error, self._calls.ended)

    async def _wait(self) -> None:
        """Sleep until enough calls have ended or slots may be filled, or until the worker is over."""
        ended, linger = self._calls.ended, None
        while not self._is_over():
            if ended and linger is None:
                most = MAX_ROWS if self._database.one_writer else MAX_SERVER_ROWS
                self._calls.enough, linger = pace(self._turn_seconds, ended, len(self._calls), most)
            if len(ended) >= self._calls.enough or (ended and not self._calls.calling):
                return
            if self._more and self._free() > 0 and not self._stopping:
                return
            poll = POLL_SECONDS if self._free() > 0 or self._stopping else None
            if not await self._sleep(poll if linger is None else linger):
                return

    async def _sleep(self, seconds: float | None) -> bool:
        """Sleep until something has changed; return False if nothing has in time."""
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._wake.wait()
        return False

    async def _update_runs(self) -> None:
        """Find the runs that have work. Raises UsageError for a named one that this worker cannot serve."""
        found = await self._find_runs()
        notices = self._runs.update(found)
        for run in found if self._run_names is not None else ():
            if run.id in self._runs.refused:
                raise self._runs.refused[run.id]
        for notice in notices:
            self._notify(notice)
        self._found = found
        calls = self._options.lane is not Lane.BATCH
        self._run_ids = [run.id for run in found if calls and run.id in self._runs.served]
        await self._start_limits.apply(self._runs.served.values(), found)

    async def _find_runs(self) -> list[Run]:
        if self._run_names is None:
            return await self._database.quick_read(reads.open_runs)
        found, gone = [], None
        for name in self._run_names:
            try:
                found.append(await self._database.quick_read(reads.find_run, name))
            except RunNotFoundError as error:
                gone = error
        if gone is not None and (not found or not self._id):
            raise gone
        self._run_names = [run.name for run in found]  # the others were removed meanwhile
        return found

    def _free(self) -> int:
        return self._runs.slots - len(self._calls)

    async def _is_due(self) -> bool:
        """Return whether a claim is worth it, after a claim that found too little.

        The database is asked after a commit of another process, or when a wait that it reported before is over.
        """
        now = time.monotonic()
        if now < self._next_poll:
            return False
        self._next_poll = now + POLL_SECONDS
        if await self._database.changed():
            self._next_check = 0.0
            await self._update_runs()
        elif now < self._next_due:
            return False
        work = await self._due_work()
        if work.expired:
            await self._database.write(leases.bring_forward, self._run_ids)
            await self._renew()  # before others': our own may have run out in a standstill
            await self._reclaim()
            work = await self._due_work()
        self._calls.report_outages(work.outages)
        if work.suspects and not work.due and not self._calls:
            await self._claim(1, suspects=True)
        busy = work.due or work.suspects or work.expired
        wait = (work.next_ms or 1000 * TICK_SECONDS) / 1000
        # With jitter, so that not all workers ask at the same moment.
        self._next_due = now + (0 if busy else wait + self._rng.random() * min(wait / 10, JITTER_SECONDS))
        return work.due

    async def _due_work(self) -> DueWork:
        bounded = {run_id for run_id in self._run_ids if self._runs.served[run_id].bound is not None}
        presence = self._database.presence
        return await self._database.quick_read(leases.check_due, presence, self._run_ids, self._id, bounded)

    async def _reclaim(self, *, starting: bool = False) -> None:
        reclaimed, failed = await reclaim(self._database, self._notify, starting=starting)
        self.report.reclaimed += reclaimed
        self.report.failed += failed

    async def _is_finished(self) -> bool:
        """Return whether nothing is left to do; at most once a second, because that reads every run."""
        now, until = time.monotonic(), self._options.until
        if self._calls or until is Until.FOREVER or now < self._next_check:
            return False
        self._next_check = now + CHECK_SECONDS
        wanted = await self._find_runs()
        if self._options.lane is not Lane.ONLINE and not self._batches.idle:
            return False
        if until is Until.EMPTY:
            work = await self._due_work()
            if work.due or work.suspects or work.expired:
                return False
        found = await self._database.quick_read(reads.counts, [run.id for run in wanted])
        if until is Until.DONE and not self._completion.all_done(found, await self._database.quick_read(reads.time)):
            return False
        self._completion.check_served(found)
        self.report.paused = self._completion.pauses(found)
        self.report.interrupted = self._completion.interrupted
        return True

    async def _tick(self) -> None:
        """Renew the leases and report that this worker lives, until cancelled."""
        interval = min(self._options.lease / 3, TICK_SECONDS)
        try:
            while True:
                before = time.monotonic()
                await asyncio.sleep(interval)
                late = time.monotonic() - before - interval
                if late > max(interval, STANDSTILL_SECONDS):
                    self._notify(
                        f"everything stood still for {late:.1f} s, so leases may run out: does an async function block? "
                        f"Make it a plain function, which runs in a thread, or raise --lease"
                    )
                await self._renew()
                if not self._stopping:
                    await self._update_runs()  # the loop does not while there is more to claim, or no slot is free
                if self._more and not self._stopping:
                    await self._reclaim()  # nor this
                if time.monotonic() >= self._next_fold and not await self._database.write(pulses.fold):
                    self._next_fold = time.monotonic() + FOLD_SECONDS
        except Exception as error:  # noqa: BLE001 - without renewals the worker must end
            self._fail(error)

    async def _renew(self) -> None:
        await self._clock.check(self._id)
        now = time.monotonic()
        self._settled.append((now, self.report.done + self.report.failed))
        (then, before), (_, settled) = self._settled[0], self._settled[-1]
        claims = self._calls.claims
        database_now, lost = await self._database.write(
            leases.renew,
            self._id,
            claims,
            lease=self._options.lease,
            settled=settled,
            rate=max(0, settled - before) / max(1.0, now - then),
            seen=self._claiming_since or now,
            pulses=self._calls.pulses.take(claims, now),
        )
        self._calls.pulses.sync(database_now, time.monotonic())
        for one in claims:
            if one.job_id in lost:
                self._calls.lose(one)
