"""The claims that one worker holds: each from its claim, through its call, until its settlement is committed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lbr.core.errors import CUT_OFF, CallError, DatabaseError
from lbr.core.open_files import exhausted_message
from lbr.core.outages import Suspicion
from lbr.core.pricing import output_limit, table_problem
from lbr.core.retry import RetryPolicy, decide, failure_of
from lbr.core.types import Claim, JobId, JobState, Outcome, Settlement, WorkerId
from lbr.models.base import Request
from lbr.store.schema import SUSPECT_CRASHES
from lbr.worker.attempt import Deadlines, OutOfFilesError, attempt, priced

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from random import Random

    from lbr.core.outages import Evidence
    from lbr.core.types import Paused
    from lbr.store.settle import Settled
    from lbr.worker.runs import ServedRun

RATE_WINDOW_SECONDS = 30.0
CANCEL_SECONDS = 5.0
LONG_WAIT_SECONDS = 120.0
MAX_WAIT_SECONDS = 366 * 86_400.0
"""A wait from the first on is reported; one beyond the second is reported as the second."""
MAX_FAILED = 1_000
"""How many failed jobs a worker remembers: a wrong set-up, whose jobs are given back, fails its first ones."""
OUT_OF_FILES_SECONDS = 0.5
"""How long a call that found no file handle waits at least."""
MAX_ROWS = 500
MIN_ROWS = 25
LATEST_COMMITS = 4
MAX_LINGER_SECONDS = 0.05
MIN_LINGER_SECONDS = 0.002
"""The event loop rounds waits up to a millisecond."""
COMMIT_SECONDS = 0.003
ROW_SECONDS = 0.000025
"""The most that an undisturbed commit takes, and each of its rows, on a common machine."""


@dataclass(slots=True)
class WorkReport:
    """What one worker did: jobs done, failed and put back for a retry, and what it left.

    `stale` counts answers that came too late, `released` jobs given back unfinished, `reclaimed` those taken from dead
    workers, `stuck` calls that could not be cancelled. `cut_off` counts the answers that reached a token limit, by run;
    `limited` names the runs whose settings set that limit. `paused` maps runs to their pauses; `interrupted` names runs
    whose enqueue did not finish. `drained` is True if the worker was asked to stop.
    """

    done: int = 0
    failed: int = 0
    retried: int = 0
    stale: int = 0
    released: int = 0
    reclaimed: int = 0
    stuck: int = 0
    drained: bool = False
    cut_off: Counter[str] = field(default_factory=Counter)
    limited: set[str] = field(default_factory=set)
    paused: dict[str, Paused] = field(default_factory=dict)
    interrupted: list[str] = field(default_factory=list)


class Commit(NamedTuple):
    """How long a commit took, and how many rows it had."""

    seconds: float
    rows: int

    @property
    def hindered_seconds(self) -> float:
        """How much longer it took than its rows: on a slow disk, or because others write."""
        return max(0.0, self.seconds - COMMIT_SECONDS - self.rows * ROW_SECONDS)


def usual_commit(latest: Sequence[Commit]) -> Commit:
    """Return the commit to expect next: the median by how much they were hindered.

    One slow commit may be due to our own calls in the interpreter. But if calls compute in threads, every other commit
    waits for them with the database locked, and then many rows at once are better.
    """
    return sorted(latest, key=lambda commit: commit.hindered_seconds)[len(latest) // 2]


def linger_seconds(usual: Commit, call_seconds: float) -> float:
    """Return how long to gather rows, given the usual commit and how long a call takes: at most 50 ms.

    Three times as long as commits are hindered, so that other writers get their turns; else a fiftieth of a call, so
    that calls that end one by one share a commit; nothing for calls that are too quick for the event loop's clock.
    """
    part = call_seconds / 50
    return min(
        MAX_LINGER_SECONDS, max(3 * usual.hindered_seconds, part if part >= MIN_LINGER_SECONDS else 0.0)
    )


def batch_size(usual: Commit, call_seconds: float) -> int:
    """Return how many rows to write at once, given the usual commit and how long a call takes.

    Calls that begin together end together, and would stay in step: either all call or all are written. Small batches
    prevent that if a call takes longer than a commit. The more a commit is hindered, the more rows it is worth.
    """
    if call_seconds <= usual.seconds:
        return MAX_ROWS
    return min(MAX_ROWS, MIN_ROWS + round(usual.hindered_seconds / ROW_SECONDS))


class Settler:
    """Group commit: takes settlements one by one and writes them in batches, in order, from one task."""

    def __init__(
        self,
        write: Callable[[Sequence[Settlement]], Awaitable[Settled]],
        written: Callable[[Sequence[Settlement], Settled], None],
    ) -> None:
        self._write = write
        self._written = written
        self._waiting: list[Settlement] = []
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._most = MAX_ROWS
        self._hurried = False
        self._closing = False
        self._commits = deque([Commit(0.0, 0)], maxlen=LATEST_COMMITS)

    @property
    def unwritten(self) -> list[Settlement]:
        """What was put and is not durable, once `run` has ended."""
        return self._waiting

    def put(self, settlement: Settlement) -> None:
        """Take one settlement; it is durable only when `written` gets it."""
        self._waiting.append(settlement)
        self._some.set()
        if len(self._waiting) >= self._most:
            self._enough.set()

    def hurry(self) -> None:
        """Write all that was put, now, because no more will come for a while."""
        self._hurried = bool(self._waiting)
        self._enough.set()

    def close(self) -> None:
        """Make `run` return once everything is written."""
        self._closing = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Write batches until closed. Raises DatabaseError, with nothing of the batch written."""
        while True:
            await self._some.wait()
            if not self._waiting:
                return
            await self._gather(usual_commit(self._commits))
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not self._waiting:
                self._hurried = False
                if not self._closing:
                    self._some.clear()
            started = time.perf_counter()
            try:
                settled = await self._write(batch)
            except BaseException:
                self._waiting = [*batch, *self._waiting]
                raise
            self._commits.append(Commit(time.perf_counter() - started, len(batch)))
            self._written(batch, settled)

    async def _gather(self, usual: Commit) -> None:
        """Wait for as many rows as are worth a commit, at least for those of the same turn of the event loop."""
        call_seconds = self._call_seconds()
        self._most = batch_size(usual, call_seconds)
        if self._closing or self._hurried or len(self._waiting) >= self._most:
            return
        if linger := linger_seconds(usual, call_seconds):
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    await self._enough.wait()
        else:
            await asyncio.sleep(0)
        self._most = batch_size(usual, self._call_seconds())

    def _call_seconds(self) -> float:
        # The quickest call: others may have waited for the processor.
        return min(settlement.outcome.latency_ms for settlement in self._waiting) / 1000


@dataclass(slots=True, eq=False)
class _Held:
    """A claim in a slot; `task` is None once its call has ended and its settlement waits to be committed."""

    claim: Claim
    served: ServedRun
    task: asyncio.Task[None] | None = None
    settled: bool = False

    def stop(self) -> asyncio.Task[None] | None:
        """Cancel the call. Without its task, its end is known to be our doing."""
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
        return task


class Calls:
    """Runs calls, and has `settle` write how they ended.

    `changed` is called when a slot may have become free or the worker must end; `unreachable` with a model that only
    this worker cannot reach, and the reason. `outage_patience` is in seconds.
    """

    def __init__(
        self,
        report: WorkReport,
        *,
        settle: Callable[[Sequence[Settlement]], Awaitable[Settled]],
        policy: RetryPolicy,
        timeout: float,
        rng: Random,
        changed: Callable[[], None],
        unreachable: Callable[[str, str], None],
        outage_patience: float,
        notify: Callable[[str], None],
    ) -> None:
        self._report = report
        self._policy = policy
        self._deadlines = Deadlines(timeout)
        self._rng = rng
        self._changed = changed
        self._unreachable = unreachable
        self._outage_patience = outage_patience
        self._notify = notify
        self._settler = Settler(settle, self._written)
        self._settling: asyncio.Task[None] | None = None
        self._held: dict[JobId, _Held] = {}
        self._suspicions: dict[str, Suspicion] = {}
        self._suspects: set[JobId] = set()
        self._failed: set[JobId] = set()
        self._calling = 0
        self._warned: set[str] = set()
        self._long_waits: dict[str, float] = {}
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()
        self.worker = WorkerId(0)
        self.error: BaseException | None = None

    def __len__(self) -> int:
        """Return how many slots are taken."""
        return len(self._held)

    @property
    def unfinished(self) -> int:
        """How many slots will still become free: after an error, only those whose calls go on."""
        return self._calling if self.error is not None else len(self._held)

    @property
    def unwritten(self) -> list[Settlement]:
        """Outcomes that the database did not take, after `close`."""
        return self._settler.unwritten

    @property
    def claims(self) -> list[Claim]:
        """The claims held now, called or waiting to be settled."""
        return [held.claim for held in self._held.values()]

    @property
    def alone(self) -> bool:
        """Whether a job runs that nothing else should run beside."""
        self._suspects &= self._held.keys()
        return bool(self._suspects)

    def sees_outage(self, model: str) -> bool:
        """Return whether this worker's own calls show that a model cannot be reached."""
        return model in self._suspicions and self._suspicions[model].is_evidence

    def open(self) -> None:
        """Begin to settle; `close` ends it."""
        self._settling = asyncio.create_task(self._settler.run())
        self._settling.add_done_callback(self._note_error)

    def start(self, claim: Claim, served: ServedRun) -> None:
        """Make the call of a claim."""
        if (before := self._held.get(claim.job_id)) is not None:
            before.stop()  # our lease had run out, and we claimed the job again
        held = self._held[claim.job_id] = _Held(claim, served)
        if claim.crashes >= SUSPECT_CRASHES:
            self._suspects.add(claim.job_id)
        else:
            self._suspects.discard(claim.job_id)
        self._calling += 1
        held.task = asyncio.create_task(self._call(held))
        held.task.add_done_callback(partial(self._call_ended, held))

    async def _call(self, held: _Held) -> None:
        claim, served = held.claim, held.served
        request = Request(
            prompt=claim.prompt,
            task=served.run.task,
            job_id=claim.job_id,
            seq=claim.claim_seq,
            last_bad=claim.history.last_bad,
            settings=claim.settings,
            timeout=self._deadlines.seconds,
        )
        while True:
            try:
                outcome = await attempt(
                    served.model, served.validator, request, self._deadlines, served.late_calls
                )
                break
            except OutOfFilesError:
                self._warn_once("out of files", f"{exhausted_message()}; calls wait until one is free")
                # No call was made, so nothing is settled: keep the claim, and call when other calls have ended.
                await asyncio.sleep(OUT_OF_FILES_SECONDS * (1 + self._rng.random()))
        self._report_long_wait(served.run.task.answerer, outcome)
        self._settle(held, outcome if served.price is None else priced(outcome, served.price))

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._notify(message)

    def _report_long_wait(self, model: str, outcome: Outcome) -> None:
        """Report a long wait at once, and once, so that the worker does not seem to hang."""
        wait = 0.0 if outcome.failure is None else outcome.failure.retry_after or 0.0
        wait = min(wait, MAX_WAIT_SECONDS)
        until = time.time() + wait
        if wait < LONG_WAIT_SECONDS or until < self._long_waits.get(model, 0.0) + LONG_WAIT_SECONDS:
            return
        self._long_waits[model] = until
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(until))
        retry = timedelta(seconds=round(min(wait, self._policy.retry_after_most)))
        self._notify(
            f"{model} asks to wait for {timedelta(seconds=round(wait))} (h:mm:ss), until {when}; refused jobs are tried "
            f"again after {retry}"
        )

    def _settle(self, held: _Held, outcome: Outcome) -> None:
        held.task = None
        held.settled = True
        policy = replace(self._policy, max_attempts=held.served.run.max_attempts)
        self._settler.put(decide(held.claim, outcome, policy, self._rng, self._evidence(held, outcome)))

    def _evidence(self, held: _Held, outcome: Outcome) -> Evidence | None:
        """Return what this worker has seen of a model, None unless its failures are more than an accident."""
        now, model = time.monotonic(), held.served.run.task.answerer
        suspicion = self._suspicions.setdefault(model, Suspicion(self._started))
        if not suspicion.note(held.claim.job_id, outcome, now):
            return None
        return suspicion.evidence(self.worker, now, patience=self._outage_patience)

    def _call_ended(self, held: _Held, task: asyncio.Task[None]) -> None:
        self._calling -= 1
        if task.cancelled() and held.task is task:  # by the function, which runs in this task
            self._settle(held, Outcome(None, failure_of(CallError("the call cancelled itself")), 0))
        if self._calling == 0:
            self._settler.hurry()
        self._note_error(task)

    def _note_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = self.error or error
            self._changed()

    def freed_by(self, batch: Sequence[Settlement]) -> int:
        """Return how many slots become free when these are settled."""
        return sum(self._is_held(settlement.claim) for settlement in batch)

    def _is_held(self, claim: Claim) -> bool:
        held = self._held.get(claim.job_id)
        return held is not None and held.claim.claim_seq == claim.claim_seq

    def _written(self, batch: Sequence[Settlement], settled: Settled) -> None:
        before = self._report.done + self._report.failed
        for settlement in batch:
            claim = settlement.claim
            held = self._held.pop(claim.job_id) if self._is_held(claim) else None
            if claim.job_id in settled.taken:
                given_back = claim.job_id in settled.given_back
                self._count(settlement, JobState.PENDING if given_back else settlement.state, held)
                self._report_failure(settlement, given_back=given_back)
        self._recent.append((time.monotonic(), self._report.done + self._report.failed - before))
        earlier = self._failed & settled.given_back
        self._failed -= earlier
        self._report.failed -= len(earlier)
        self._report.retried += len(earlier)
        self._report.stale += len(settled.stale)
        for notice in settled.notices:
            self._notify(notice)
        for name, pause in settled.paused.items():
            self._notify(f"run {name} is paused now: {pause.message}")
        for model in settled.reached:
            self._suspicions[model].clear()
        for model, reason in settled.unreachable.items():
            self._unreachable(model, reason)
        self._changed()

    def _count(self, settlement: Settlement, state: JobState, held: _Held | None) -> None:
        match state:
            case JobState.DONE:
                self._report.done += 1
            case JobState.FAILED:
                self._report.failed += 1
                if len(self._failed) < MAX_FAILED:
                    self._failed.add(settlement.claim.job_id)
            case _:
                self._report.retried += 1
        if settlement.outcome.finish_reason == CUT_OFF and state is not JobState.PENDING and held is not None:
            run = held.served.run
            self._report.cut_off[run.name] += 1
            if output_limit({**run.task.settings, **(settlement.claim.settings or {})}) is not None:
                self._report.limited.add(run.name)

    def _report_failure(self, settlement: Settlement, *, given_back: bool) -> None:
        """Report each kind of failure once and early, so that a typo in a function is found before eight tries."""
        failure = settlement.outcome.failure
        if failure is not None:
            fails = settlement.state is JobState.FAILED and not given_back
            after = "failed" if fails else "to be tried again"
            job = settlement.claim.job_id
            self._warn_once(
                f"first {failure.error}", f"first {failure.error}, job {job} {after}: {failure.message[:200]}"
            )
        if (problem := table_problem()) is not None and settlement.outcome.is_unpriced:
            self._warn_once(
                "price table",
                f"cannot load the price table (package genai-prices): {problem}; it is tried again, and until then answers "
                f"are kept without their cost. Reinstall it, or give --price in=…,out=… at the enqueue",
            )

    def rate(self) -> float:
        """Return how many jobs a second were done or failed in the latest half minute."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_SECONDS:
            self._recent.popleft()
        window = max(1.0, min(RATE_WINDOW_SECONDS, now - self._started))
        return sum(count for _, count in self._recent) / window

    def lose(self, claim: Claim) -> None:
        """Stop a call whose job is not ours any more. If it has ended meanwhile, the store refuses its settlement."""
        held = self._held.get(claim.job_id)
        if held is None or held.task is None or held.claim.claim_seq != claim.claim_seq:
            return
        held.stop()
        del self._held[claim.job_id]
        self._changed()
        self._notify(f"lost job {claim.job_id}: its lease ran out and it was reclaimed")

    async def cancel(self) -> list[Claim]:
        """Stop the calls that have not ended and return their claims, for release."""
        calling = [held for held in self._held.values() if held.task is not None]
        tasks = {task for held in calling if (task := held.stop()) is not None}
        if tasks:
            # A function that cannot be cancelled must not keep the worker; its job is released all the same.
            _, stuck = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
            self._report.stuck = len(stuck)
        left = [held.claim for held in calling if not held.settled]
        for claim in left:
            self._held.pop(claim.job_id, None)
        return left

    async def close(self) -> None:
        """Write what has ended; afterwards `error` is set if that failed."""
        self._settler.close()
        if self._settling is None:
            return
        await asyncio.wait([self._settling])
        if self._settling.cancelled() and self.unwritten:  # by an event loop that ends, with all its tasks
            self.error = self.error or DatabaseError("the event loop ended before all answers were written")
