"""One worker process's loop: claim what slots are free for, call, settle, until there is no more to do.

A slot is taken from the claim until its settlement is committed, so a killed worker costs at most as many
calls as it has slots. The loop itself is never cancelled half way through a transaction: it is told to stop.
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
from lbr.core.errors import DatabaseError, NothingToServeError, RunNotFoundError, UsageError
from lbr.core.retry import RetryPolicy
from lbr.core.types import Until, WorkerId
from lbr.store import reads
from lbr.store.database import local_clock
from lbr.store.queue import MAX_SKEW_MS, Queue
from lbr.worker.calls import Calls, WorkReport
from lbr.worker.claiming import Claiming
from lbr.worker.completion import Ending
from lbr.worker.pacing import Pacing
from lbr.worker.runs import ServableRuns
from lbr.worker.spool import kept, reclaim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lbr.core.config import WorkOptions
    from lbr.core.types import Claim, Millis, Run, Settlement
    from lbr.models.build import Authority
    from lbr.store.database import Database
    from lbr.store.queue import DueWork
    from lbr.store.settle import Settled

POLL_SECONDS = 0.1
TICK_SECONDS = 5.0
CHECK_SECONDS = 1.0
STANDSTILL_SECONDS = 1.0
JITTER_SECONDS = 1.0
CLOCK_SECONDS = 2 * TICK_SECONDS
"""How long to wait for the next report of a worker that lives and whose latest one is far from our time."""


class Worker:
    """Serves runs until told to stop or until nothing is left, by `options.until`.

    `run_names` restricts it to those runs, None means all that it can serve. `notify` gets what a person
    should know, one line at a time.
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
        self._queue = Queue(database)
        self._options = options
        self._run_names = run_names
        self._notify = notify
        self._pacing = Pacing(database, options)
        self._servings = ServableRuns(
            authority,
            concurrency=options.concurrency,
            room=open_files.room(),
            limits_cost=options.max_cost is not None,
        )
        self._ending = Ending(
            database,
            self._outlook,
            self._servings,
            options.until,
            named=run_names is not None,
            notify=notify,
        )
        self.report = WorkReport()
        self._rng = rng or Random()  # noqa: S311 - jitter
        self._claiming = Claiming(database, self._queue, self._servings.served, lease=options.lease)
        self._calls = Calls(
            self.report,
            settle=self._settle,
            policy=policy or RetryPolicy(),
            timeout=options.timeout,
            rng=self._rng,
            changed=self._calls_changed,
            unreachable=self._refuse,
            outage_patience=options.outage_patience,
            notify=notify,
        )
        self._unserved: list[Claim] = []
        self._outages: set[str] = set()
        self._refusal: NothingToServeError | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._aborting = False
        self._next_look = 0.0
        self._next_due = 0.0
        self._next_check = 0.0
        self._id = WorkerId(0)
        # How far our clock was ahead of the machine's monotonic one, and reports that were far from it.
        self._lead = _lead_ms()
        self._far_off: Mapping[WorkerId, Millis] = {}
        self._comparing = asyncio.Lock()

    def drain(self) -> None:
        """Claim no more, finish what is held within the grace, then release the rest and return."""
        self.report.drained = True
        self._stop()

    def abort(self) -> None:
        """Release everything at once; nothing is charged."""
        self._aborting = True
        self.drain()

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _stop_asked(self) -> bool:
        return self._stopping

    def _calls_changed(self) -> None:
        if self._calls.error is not None:
            self._fail(self._calls.error)
        self._claiming.ended()
        if not self._stop_asked():
            self._start(self._claiming.brought())
        self._wake.set()

    def _refuse(self, model: str, reason: str) -> None:
        """Serve a model no longer that other workers reach; with none left, end."""
        error = UsageError(
            f"{model} does not answer this worker ({reason}), but it answers others: look at this machine's network, "
            f"proxy and key"
        )
        if self._servings.refuse(model, error):
            if self._servings.served:  # else it is what the worker ends with
                self._notify(str(error))
            self._claiming.serve(
                [run_id for run_id in self._claiming.order if run_id in self._servings.served]
            )
            if not self._servings.served:
                self._refusal = NothingToServeError(str(error))
                self._stop()

    def _start(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            served = self._servings.served.get(claim.run_id)
            if served is None:  # since the claim its model was found to answer others alone
                self._unserved.append(claim)
            else:
                self._calls.start(claim, served)

    def _fail(self, error: BaseException) -> None:
        """Come to an end. Where the database is the trouble, calls in flight may end: they are paid for."""
        self._calls.error = self._calls.error or error
        self._aborting |= not isinstance(error, DatabaseError)
        if isinstance(error, DatabaseError):
            self._database.give_up()
        self._stop()

    async def run(self) -> WorkReport:
        """Work. A cancelled caller gets its cancellation after everything held has been given back.

        Raises NothingToServeError where there are jobs but none that this process may answer, DatabaseError
        when the database stays away; the answers that it did not take are kept for the next worker.
        """
        work = asyncio.ensure_future(self._run())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.abort()
            while not work.done():
                # Whoever is impatient and cancels again must not stop the giving back half way.
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            if not work.cancelled():
                work.exception()
            raise

    async def _run(self) -> WorkReport:
        try:
            await self._check_clock(wait=True)
            await self._reclaim(starting=True)
            await self._learn()
            host, slots = socket.gethostname(), self._servings.slots
            self._id = await self._queue.register(host=host, pid=os.getpid(), concurrency=slots)
            self._claiming.worker = self._calls.worker = self._id
            self._calls.open()
            ticking = asyncio.create_task(self._tick())
            ticking.add_done_callback(self._tick_ended)
            try:
                try:
                    # Again, for one that began at the same moment was not there to see.
                    await self._check_clock(wait=True)
                    await self._loop()
                except DatabaseError as error:
                    self._fail(error)
                await self._finish_calls()
            finally:
                self._stop()  # whatever went wrong: a settlement must claim no more
                ticking.cancel()
                await self._wind_up()
                await asyncio.gather(ticking, return_exceptions=True)
        finally:
            self._queue.leave(self._id)
            await self._servings.aclose()
        if self._refusal is not None:
            raise self._refusal
        return self.report

    def _tick_ended(self, ticking: asyncio.Task[None]) -> None:
        if not ticking.cancelled() and (error := ticking.exception()) is not None:
            self._fail(error)

    async def _wind_up(self) -> None:
        """Give back what is held, write what has ended, and raise what went wrong on the way."""
        try:
            self.report.released += await self._queue.release(self._id, await self._calls.cancel())
        except DatabaseError as error:
            self._calls.error = self._calls.error or error
        await self._calls.close()
        await self._give_back(self._claiming.brought())
        if not isinstance(self._calls.error, DatabaseError):
            await self._queue.unregister(self._id)
        if self._calls.error is not None:
            raise kept(self._database, self._calls.error, self._calls.unwritten)

    async def _give_back(self, claims: Sequence[Claim]) -> None:
        """Release what was claimed and never called for."""
        unserved, self._unserved = self._unserved, []
        try:
            self.report.released += await self._queue.release(self._id, [*claims, *unserved], unused=True)
        except DatabaseError as error:
            self._fail(error)

    async def _loop(self) -> None:
        while not self._stop_asked():
            claims = await self._claim()
            if self._stop_asked():
                await self._give_back(claims)
                return
            self._start(claims)
            if self._unserved:
                await self._give_back([])
            if not claims and not self._claiming.more and await self._finished():
                return
            await self._wait()

    async def _wait(self) -> None:
        """Sleep until a slot is free, or, with nothing to claim, until it is time to look again."""
        free = self._free() > 0
        if self._claiming.more and free:
            return
        self._wake.clear()
        if self._stop_asked():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS if free else None):
                await self._wake.wait()

    async def _learn(self) -> None:
        """Take note of the runs that have work; UsageError for a named one that we cannot serve."""
        found = await self._wanted()
        notices = self._servings.learn(found)
        for run in found if self._run_names is not None else ():
            if run.id in self._servings.refused and run.id not in self._servings.withdrawn:
                raise self._servings.refused[run.id]
        for notice in notices:
            self._notify(notice)
        served = [run.id for run in found if run.id in self._servings.served]
        self._claiming.serve(served)
        await self._pacing.begin(self._servings.served.values(), found)

    async def _wanted(self) -> list[Run]:
        if self._run_names is None:
            return await reads.open_runs(self._database)
        found, gone = [], None
        for name in self._run_names:
            try:
                found.append(await reads.find_run(self._database, name))
            except RunNotFoundError as error:
                gone = error
        if gone is not None and (not found or not self._id):
            raise gone
        self._run_names = [run.name for run in found]  # the others were removed meanwhile
        return found

    def _free(self) -> int:
        """Return how many slots may be claimed for."""
        return 0 if self._calls.alone else self._servings.slots - len(self._calls)

    async def _claim(self) -> list[Claim]:
        if self._clock_jumped():
            await self._check_clock()
        async with self._claiming.alone():
            free = self._free()
            if free <= 0 or not (self._claiming.worth_it() or await self._look()):
                return []
            return await self._claiming.claim(free)

    async def _settle(self, batch: Sequence[Settlement]) -> Settled:
        rests = self._stop_asked() or self._calls.alone or self._clock_jumped()
        free = 0 if rests else self._free() + self._calls.freed_by(batch)
        return await self._claiming.settle(batch, free)

    async def _look(self) -> bool:
        """Look whether anything came up since the last claim found too little; True if a claim is worth it.

        A look is due when somebody committed, or when a wait that an earlier look saw is over.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + POLL_SECONDS
        if await self._database.changed():
            self._next_check = 0.0
            await self._learn()
        elif now < self._next_due:
            return False
        outlook = await self._outlook()
        self._note_outages(outlook.outages)
        if outlook.stranded:
            await self._queue.bring_forward(self._claiming.order)
        if outlook.expired:
            # Ours first: after a standstill they may have run out, but we are alive.
            await self._renew()
            await self._reclaim()
        if outlook.stranded or outlook.expired:
            outlook = await self._outlook()
        if outlook.suspects and not outlook.due and not self._calls:
            self._start(await self._claiming.claim_suspect())
        busy = outlook.due or outlook.suspects or outlook.expired
        wait = (outlook.next_ms or 1000 * TICK_SECONDS) / 1000
        # Not all workers come back at the same moment.
        self._next_due = now + (0 if busy else wait + self._rng.random() * min(wait / 10, JITTER_SECONDS))
        return outlook.due and not self._calls.alone

    async def _outlook(self) -> DueWork:
        return await self._queue.look(self._claiming.order, worker=self._id)

    def _note_outages(self, outages: Mapping[str, str]) -> None:
        """Log an outage that another worker recognised, and its end; of our own the settlement tells."""
        for model in outages.keys() - self._outages:
            if not self._calls.sees_outage(model):
                self._notify(f"{model}: waiting, as all workers do: {outages[model]}")
        for model in self._outages - outages.keys():
            served = (one.run for one in self._servings.served.values())
            if self._calls.sees_outage(model) and any(run.task.answerer == model for run in served):
                self._notify(f"{model}: waiting no longer")
        self._outages = set(outages)

    async def _reclaim(self, *, starting: bool = False) -> None:
        reclaimed, failed = await reclaim(self._database, self._queue, self._notify, starting=starting)
        self.report.reclaimed += reclaimed
        self.report.failed += failed

    async def _finished(self) -> bool:
        now = time.monotonic()
        if self._calls or self._options.until is Until.FOREVER or now < self._next_check:
            return False
        self._next_check = now + CHECK_SECONDS
        if not await self._ending.is_done(await self._wanted()):
            return False
        self.report.paused, self.report.interrupted = self._ending.paused, self._ending.interrupted
        return True

    async def _tick(self) -> None:
        """Renew the leases, say that we live, and take back what the dead have left."""
        interval = min(self._options.lease / 3, TICK_SECONDS)
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
            # While there is more to claim, nobody looks at the runs themselves.
            self._servings.reprice(await reads.prices(self._database, self._servings.served))
            if self._claiming.more and not self._stop_asked():
                await self._reclaim()

    def _clock_jumped(self) -> bool:
        return abs(_lead_ms() - self._lead) > MAX_SKEW_MS

    async def _check_clock(self, *, wait: bool = False) -> None:
        """Raise DatabaseError if another worker of the file goes by a clock that is far from ours.

        A report alone says little: its worker may stand still, or the clock of the whole machine was set. One that comes
        while we look does, so at the start, and after our own clock has jumped, that is waited for.
        """
        if not self._database.one_writer:  # a server, whose clock all go by
            self._lead = _lead_ms()
            return
        async with self._comparing:
            clocks = await self._queue.clocks(self._id)
            known = self._far_off
            if self._clock_jumped():
                wait, known, self._far_off, self._lead = True, {}, {}, _lead_ms()
            wait = wait and self._database.presence.tells and bool(clocks.reports.keys() - known.keys())
            if wait:
                others = ", ".join(map(str, clocks.reports))
                self._notify(
                    f"comparing clocks with worker {others}, which may take {CLOCK_SECONDS:.0f} s: it has not reported lately"
                )
            deadline = time.monotonic() + CLOCK_SECONDS * wait
            while True:
                for worker, seen_at in clocks.reports.items():
                    if self._far_off.get(worker, seen_at) != seen_at:
                        raise DatabaseError(_clock_words(clocks.now, worker, seen_at, self._database.name))
                self._far_off = clocks.reports
                if not clocks.reports or time.monotonic() >= deadline or self._stop_asked():
                    return
                await asyncio.sleep(POLL_SECONDS)
                clocks = await self._queue.clocks(self._id)

    async def _renew(self) -> None:
        await self._check_clock()
        claims = self._calls.claims
        settled, rate = self.report.done + self.report.failed, self._calls.rate()
        lost = await self._queue.renew(
            self._id, claims, lease=self._options.lease, settled=settled, rate=rate
        )
        for claim in claims:
            if claim.job_id in lost:
                self._calls.lose(claim)

    async def _finish_calls(self) -> None:
        """Let the calls in flight end, for as long as the grace lasts."""
        deadline = time.monotonic() + self._options.grace
        while self._calls.unfinished and not self._aborting:
            self._wake.clear()
            await self._give_back(self._claiming.brought())
            left = deadline - time.monotonic()
            if left <= 0:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()


def _lead_ms() -> float:
    return local_clock() - time.monotonic() * 1000


def _clock_words(now: Millis, worker: WorkerId, seen_at: Millis, database: str) -> str:
    ours, theirs = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at / 1000)) for at in (now, seen_at))
    return (
        f"the clock of this process says {ours} UTC, but worker {worker}, which works on {database} too, has just written "
        f"{theirs} UTC: leases need one clock. Set the wrong one right, then start this worker again"
    )
