"""One worker process's loop: claim jobs for free slots, call, settle, until nothing is left to do.

A slot is taken from the claim until its settlement is committed, so a killed worker costs at most one call for each of
its slots. The loop is never cancelled in the middle of a transaction; it is asked to stop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

from lbr.core import open_files
from lbr.core.errors import (
    DatabaseError,
    NothingToServeError,
    RunNotFoundError,
    UsageError,
)
from lbr.core.retry import RetryPolicy
from lbr.core.types import Until, WorkerId
from lbr.store import leases, reads
from lbr.store.database import local_clock
from lbr.store.leases import MAX_SKEW_MS
from lbr.worker.calls import Calls, WorkReport
from lbr.worker.kept_answers import keep_unwritten, reclaim
from lbr.worker.runs import Completion, ServableRuns, StartLimits
from lbr.worker.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lbr.core.config import WorkOptions
    from lbr.core.types import Claim, Millis, Run, Settlement
    from lbr.models.build import Authority
    from lbr.store.database import Database
    from lbr.store.leases import DueWork

POLL_SECONDS = 0.1
TICK_SECONDS = 5.0
CHECK_SECONDS = 1.0
STANDSTILL_SECONDS = 1.0
JITTER_SECONDS = 1.0
CLOCK_SECONDS = 2 * TICK_SECONDS
"""How long to wait for the next report of a living worker whose latest one is far from our time."""


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
        self._completion = Completion(self._runs, named=run_names is not None, notify=notify)
        self.report = WorkReport()
        self._wake = asyncio.Event()
        self._turns = Turns(database, self._runs.served, lease=options.lease)
        policy = policy or RetryPolicy()
        self._calls = Calls(self.report, options, policy=policy, rng=self._rng, changed=self._wake.set, notify=notify)
        self._unserved: list[Claim] = []
        self._outages: set[str] = set()
        self._refusal: NothingToServeError | None = None
        self._stopping = False
        self._aborting = False
        self._freed = False
        self._next_poll = 0.0
        self._next_due = 0.0
        self._next_check = 0.0
        self._id = WorkerId(0)
        # How far our clock was ahead of the machine's monotonic one, and reports that were far from it.
        self._lead = _lead_ms()
        self._far_off: Mapping[WorkerId, Millis] = {}
        self._comparing = asyncio.Lock()

    def drain(self) -> None:
        """Claim no more, finish the calls in flight within the grace, then release the rest and return."""
        self.report.drained = True
        self._stop()

    def abort(self) -> None:
        """Release everything at once; nothing is charged."""
        self._aborting = True
        self.drain()

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _is_stopping(self) -> bool:
        if self._calls.error is not None and not self._stopping:
            self._fail(self._calls.error)
        return self._stopping

    def _withdraw(self, model: str, reason: str) -> None:
        """Stop serving a model that only other workers can reach; end if none is left."""
        error = UsageError(
            f"{model} does not answer this worker ({reason}), but it answers others: check this machine's network, "
            f"proxy and key"
        )
        if not self._runs.withdraw(model, error):
            return
        self._turns.serve([run_id for run_id in self._turns.order if run_id in self._runs.served])
        if self._runs.served:
            self._notify(str(error))
        else:
            self._refusal = NothingToServeError(str(error))
            self._stop()

    def _start(self) -> None:
        """Call what was claimed."""
        for claim in self._turns.take_claims():
            served = self._runs.served.get(claim.run_id)
            if served is None:  # its model was withdrawn after the claim
                self._unserved.append(claim)
            else:
                self._calls.start(claim, served)

    def _fail(self, error: BaseException) -> None:
        """End the worker. If the database has failed, calls in flight may end, because they are paid for."""
        self._calls.error = self._calls.error or error
        self._aborting |= not isinstance(error, DatabaseError)
        if isinstance(error, DatabaseError):
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
            await self._check_clock(starting=True)
            await self._reclaim(starting=True)
            await self._update_runs()
            host, slots = socket.gethostname(), self._runs.slots
            self._id = await leases.register(self._database, host=host, pid=os.getpid(), concurrency=slots)
            self._turns.worker = self._calls.worker = self._id
            self._calls.owner = asyncio.current_task()
            ticking = asyncio.create_task(self._tick())
            try:
                await self._work()
            finally:
                self._stop()
                ticking.cancel()
                await self._wind_up()
                await asyncio.gather(ticking, return_exceptions=True)
        finally:
            self._database.presence.leave(self._id)
            await self._runs.aclose()
        if self._refusal is not None:
            raise self._refusal
        return self.report

    async def _work(self) -> None:
        try:
            await self._check_clock(starting=True)  # again, to see a worker that started at the same moment
            while not self._is_stopping():
                await self._take_turn()
                if not self._turns.more and await self._is_finished():
                    break
                await self._wait(POLL_SECONDS if self._free() > 0 else None)
        except DatabaseError as error:
            self._fail(error)
        except asyncio.CancelledError:  # by an event loop that ends, with all its tasks
            self._fail(DatabaseError("the event loop ended before all answers were written"))
            raise
        await self._finish_calls()

    async def _take_turn(self) -> None:
        """Settle what has ended, claim for the free slots, and call."""
        batch = self._calls.ended[: self._calls.enough]
        free, freed = await self._slots_to_fill(batch)
        if batch:
            settled = await self._turns.settle(batch, free, freed)
            self._calls.forget(batch, settled)
            for model, reason in settled.unreachable.items():
                self._withdraw(model, reason)
        elif free:
            await self._turns.claim(free)
        self._freed = bool(batch)
        if not self._is_stopping():
            self._start()
        await self._give_back()

    async def _slots_to_fill(self, batch: Sequence[Settlement]) -> tuple[int, int]:
        """Return how many slots are free, and how many this batch frees; nothing if a claim would find nothing."""
        free, freed = self._free(), self._calls.freed_by(batch)
        if self._is_stopping() or self._calls.alone or free + freed <= 0:
            return 0, 0
        if self._clock_jumped():
            if batch:
                return 0, 0  # answers do not wait for the comparison
            await self._check_clock()
        is_likely = self._turns.more or (self._turns.throttled and (freed > 0 or self._freed))
        return (free, freed) if is_likely or await self._is_due() else (0, 0)

    async def _wind_up(self) -> None:
        """Release what is held, write what has ended, and raise what went wrong on the way."""
        try:
            if released := await self._calls.cancel():
                self.report.released += await self._database.write(leases.release, self._id, released)
            while self._calls.ended and not isinstance(self._calls.error, DatabaseError):
                await self._take_turn()
            await self._give_back()
            if not isinstance(self._calls.error, DatabaseError):
                await leases.unregister(self._database, self._id)
        except Exception as error:  # noqa: BLE001 - whatever it is, finished answers must be kept
            self._calls.error = self._calls.error or error
        if self._calls.error is not None:
            raise keep_unwritten(self._database, self._calls.error, self._calls.ended)

    async def _give_back(self) -> None:
        """Release claims that were never called for."""
        claims, self._unserved = [*self._turns.take_claims(), *self._unserved], []
        if claims:
            try:
                self.report.released += await self._database.write(leases.release, self._id, claims, unused=True)
            except DatabaseError as error:
                self._fail(error)

    async def _wait(self, seconds: float | None) -> None:
        """Sleep until enough calls have ended, slots may be filled, or the worker must end; at most so long."""
        ended, lingering = self._calls.ended, False
        while not self._is_stopping():
            if ended and not lingering:
                self._calls.enough, linger = self._turns.pace(ended, len(self._calls))
                seconds, lingering = (linger if seconds is None else min(seconds, linger)), True
            if len(ended) >= self._calls.enough or (ended and not self._calls.calling):
                return
            if self._turns.more and self._free() > 0:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _update_runs(self) -> None:
        """Find the runs that have work. Raises UsageError for a named one that this worker cannot serve."""
        found = await self._find_runs()
        notices = self._runs.update(found)
        for run in found if self._run_names is not None else ():
            if run.id in self._runs.refused and run.id not in self._runs.withdrawn:
                raise self._runs.refused[run.id]
        for notice in notices:
            self._notify(notice)
        self._turns.serve(run.id for run in found if run.id in self._runs.served)
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
        self._report_outages(work.outages)
        if work.stranded:
            await self._database.write(leases.bring_forward, self._turns.order)
        if work.expired:
            await self._renew()  # before others': our own may have run out in a standstill
            await self._reclaim()
        if work.stranded or work.expired:
            work = await self._due_work()
        if work.suspects and not work.due and not self._calls:
            await self._turns.claim(1, suspects=True)
            self._start()
        busy = work.due or work.suspects or work.expired
        wait = (work.next_ms or 1000 * TICK_SECONDS) / 1000
        # With jitter, so that not all workers ask at the same moment.
        self._next_due = now + (0 if busy else wait + self._rng.random() * min(wait / 10, JITTER_SECONDS))
        return work.due

    async def _due_work(self) -> DueWork:
        return await self._database.quick_read(leases.check_due, self._database.presence, self._turns.order, self._id)

    def _report_outages(self, outages: Mapping[str, str]) -> None:
        """Report outages that other workers recognised, and the end of each; settlements report our own."""
        for model in outages.keys() - self._outages:
            if not self._calls.sees_outage(model):
                self._notify(f"{model}: waiting, like all workers: {outages[model]}")
        for model in self._outages - outages.keys():
            is_served = any(one.run.task.answerer == model for one in self._runs.served.values())
            if is_served and self._calls.sees_outage(model):
                self._notify(f"{model}: waiting no longer")
        self._outages = set(outages)

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
                # The loop does neither while there is more to claim.
                self._runs.reprice(await self._database.quick_read(reads.prices, self._runs.served))
                if self._turns.more and not self._is_stopping():
                    await self._reclaim()
        except Exception as error:  # noqa: BLE001 - without renewals the worker must end
            self._fail(error)

    def _clock_jumped(self) -> bool:
        return abs(_lead_ms() - self._lead) > MAX_SKEW_MS

    async def _check_clock(self, *, starting: bool = False) -> None:
        """Raise DatabaseError if another worker of the file uses a clock that is far from ours.

        An old report does not count: its worker may stand still, or the machine's clock was set. A new one does, so at
        the start and after our clock has jumped this waits for one.
        """
        if not self._database.one_writer:  # a server has one clock for all
            self._lead = _lead_ms()
            return
        async with self._comparing:
            clocks = await self._database.quick_read(leases.clocks, self._database.presence, self._id)
            if self._clock_jumped():
                starting, self._far_off, self._lead = True, {}, _lead_ms()
            deadline = 0.0
            if starting and self._database.presence.knows and clocks.reports.keys() - self._far_off.keys():
                deadline = time.monotonic() + CLOCK_SECONDS
                others = ", ".join(map(str, clocks.reports))
                wait = f"this may take {CLOCK_SECONDS:.0f} s"
                self._notify(f"comparing clocks with worker {others}, which has not reported lately; {wait}")
            while True:
                for worker, seen_at in clocks.reports.items():
                    if self._far_off.get(worker, seen_at) != seen_at:
                        raise _clock_error(clocks.now, worker, seen_at, self._database.name)
                self._far_off = clocks.reports
                if not clocks.reports or time.monotonic() >= deadline or self._is_stopping():
                    return
                await asyncio.sleep(POLL_SECONDS)
                clocks = await self._database.quick_read(leases.clocks, self._database.presence, self._id)

    async def _renew(self) -> None:
        await self._check_clock()
        # Those that are not called yet, too: they may have to wait for a settlement.
        claims, seen = [*self._calls.claims, *self._turns.claims], self._turns.claiming_since or time.monotonic()
        settled, rate, lease = self.report.done + self.report.failed, self._calls.rate(), self._options.lease
        lost = await self._database.write(
            leases.renew, self._id, claims, lease=lease, settled=settled, rate=rate, seen=seen
        )
        for claim in claims:
            if claim.job_id in lost:
                self._turns.lose(claim)
                self._calls.lose(claim)

    async def _finish_calls(self) -> None:
        """Wait for the calls in flight, within the grace, and settle them."""
        deadline = time.monotonic() + self._options.grace
        while self._calls.unfinished and not self._aborting and (left := deadline - time.monotonic()) > 0:
            if self._calls.ended and not isinstance(self._calls.error, DatabaseError):
                try:
                    await self._take_turn()
                except DatabaseError as error:
                    self._fail(error)
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()


def _lead_ms() -> float:
    return local_clock() - time.monotonic() * 1000


def _clock_error(now: Millis, worker: WorkerId, seen_at: Millis, database: str) -> DatabaseError:
    ours, theirs = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at / 1000)) for at in (now, seen_at))
    return DatabaseError(
        f"the clock of this process says {ours} UTC, but worker {worker}, which works on {database} too, has just written "
        f"{theirs} UTC: leases need one clock. Set the wrong one right, then start this worker again"
    )
