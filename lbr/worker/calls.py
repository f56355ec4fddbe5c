"""The claims that one worker holds: each from its claim, through its call, until its settlement is committed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from lbr.core.errors import CUT_OFF, CallError, DatabaseError
from lbr.core.open_files import exhausted_message
from lbr.core.outages import Suspicion
from lbr.core.pricing import output_limit, table_problem
from lbr.core.retry import RetryPolicy, decide, failure_of
from lbr.core.types import Claim, JobId, JobState, Outcome, RunId, Settlement, WorkerId
from lbr.models.base import Request
from lbr.store.schema import SUSPECT_CRASHES
from lbr.worker.attempt import OutOfFilesError, attempt, priced
from lbr.worker.deadlines import Deadlines
from lbr.worker.settler import Settler

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
KEPT_FAILED = 1_000
"""How many failed jobs a worker remembers: those of a wrong set-up, which are given back, are its first."""
OUT_OF_FILES_SECONDS = 0.5
"""How long a call that found no file handle waits at least."""


@dataclass(slots=True)
class WorkReport:
    """What one worker did: jobs answered, failed and put back for a retry, and what it left behind.

    `stale` counts answers that came too late, `released` jobs given back unfinished, `reclaimed` those taken
    from dead workers. `cut_off` counts the answers that reached a token limit, by run, and `limited` names the runs
    whose settings set that limit. `stuck` counts calls that would not be cancelled. `paused` maps runs to what stopped them; `interrupted` names runs whose
    enqueue did not come to its end; `drained` tells that the worker was asked to stop.
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


@dataclass(slots=True, eq=False)
class _Held:
    """A claim in a slot; `task` is None once its call has ended and its settlement waits to be committed."""

    claim: Claim
    policy: RetryPolicy
    model: str
    task: asyncio.Task[None] | None = None
    settled: bool = False


def _stop(held: _Held) -> asyncio.Task[None] | None:
    """Cancel a call; with its task forgotten, its end is known to be our doing."""
    task, held.task = held.task, None
    if task is not None:
        task.cancel()
    return task


class Calls:
    """Runs calls, and has `settle` write how they ended.

    `changed` is called whenever a slot may have become free, or all is lost. `unreachable` is called with a model that
    only this worker cannot reach, and the reason. `outage_patience` is in seconds.
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
        self._policies: dict[int, RetryPolicy] = {}
        self._deadlines = Deadlines(timeout)
        self._rng = rng
        self._changed = changed
        self._unreachable = unreachable
        self._outage_patience = outage_patience
        self._suspicions: dict[str, Suspicion] = {}
        self._failed: set[JobId] = set()
        self.worker = WorkerId(0)
        self._notify = notify
        self._settler = Settler(settle, self._written)
        self._settling: asyncio.Task[None] | None = None
        self._held: dict[JobId, _Held] = {}
        self._served: dict[RunId, ServedRun] = {}
        self._suspects: set[JobId] = set()
        self._calling = 0
        self._told: set[str] = set()
        self._long_waits: dict[str, float] = {}
        self._told_no_table = False
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()
        self.error: BaseException | None = None

    def __len__(self) -> int:
        """Return how many slots are taken."""
        return len(self._held)

    @property
    def unfinished(self) -> int:
        """How many slots will still become free: those whose calls go on, and as long as all is well the others."""
        return self._calling if self.error is not None else len(self._held)

    @property
    def unwritten(self) -> list[Settlement]:
        """Outcomes that the database did not take, after `close`."""
        return self._settler.unwritten

    @property
    def claims(self) -> list[Claim]:
        """What is held now, called or waiting to be settled."""
        return [held.claim for held in self._held.values()]

    @property
    def alone(self) -> bool:
        """Whether a job runs that nothing else should run beside."""
        if self._suspects:
            self._suspects &= self._held.keys()
        return bool(self._suspects)

    def sees_outage(self, model: str) -> bool:
        """Whether this worker's own calls say that a model cannot be reached."""
        return model in self._suspicions and self._suspicions[model].is_evidence

    def open(self) -> None:
        """Begin to settle; `close` ends it."""
        self._settling = asyncio.create_task(self._settler.run())
        self._settling.add_done_callback(self._note_error)

    def start(self, claim: Claim, served: ServedRun) -> None:
        """Make the call of a claim."""
        before = self._held.get(claim.job_id)
        if before is not None and before.task is not None:
            # Our own lease had run out, and we were the ones to claim the job again.
            _stop(before)
        held = _Held(claim, self._policy_of(served.run.max_attempts), served.run.task.answerer)
        self._served[claim.run_id] = served
        self._held[claim.job_id] = held
        if claim.crashes >= SUSPECT_CRASHES:
            self._suspects.add(claim.job_id)
        else:
            self._suspects.discard(claim.job_id)
        self._calling += 1
        held.task = asyncio.create_task(self._call(held, served))
        held.task.add_done_callback(partial(self._call_ended, held))

    def _policy_of(self, max_attempts: int) -> RetryPolicy:
        if max_attempts not in self._policies:
            self._policies[max_attempts] = replace(self._policy, max_attempts=max_attempts)
        return self._policies[max_attempts]

    async def _call(self, held: _Held, served: ServedRun) -> None:
        claim = held.claim
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
                    served.model, served.validator, request, self._deadlines, served.lateness
                )
                break
            except OutOfFilesError:
                self._warn_out_of_files()
                # Nothing was called, so nothing is settled: keep the claim, and call when other calls have ended.
                await asyncio.sleep(OUT_OF_FILES_SECONDS * (1 + self._rng.random()))
        self._tell_long_wait(served.run.task.answerer, outcome)
        price = served.price
        self._settle(held, outcome if price is None else priced(outcome, price))

    def _tell_long_wait(self, answerer: str, outcome: Outcome) -> None:
        """Report a long wait at once, and once: the worker does not hang."""
        asked = None if outcome.failure is None else outcome.failure.retry_after
        if asked is None or asked < LONG_WAIT_SECONDS:
            return
        asked = min(asked, MAX_WAIT_SECONDS)
        until = time.time() + asked
        if until < self._long_waits.get(answerer, 0.0) + LONG_WAIT_SECONDS:
            return
        self._long_waits[answerer] = until
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(until))
        again = timedelta(seconds=round(min(asked, self._policy.retry_after_most)))
        self._notify(
            f"{answerer} asks to wait for {timedelta(seconds=round(asked))} (h:mm:ss), until {when}; "
            f"refused jobs are tried again after {again}"
        )

    def _warn_out_of_files(self) -> None:
        if OutOfFilesError.__name__ not in self._told:
            self._told.add(OutOfFilesError.__name__)
            self._notify(f"{exhausted_message()}; calls wait until one is free")

    def _settle(self, held: _Held, outcome: Outcome) -> None:
        held.task = None
        held.settled = True
        evidence = self._evidence(held, outcome)
        self._settler.put(decide(held.claim, outcome, held.policy, self._rng, evidence))

    def _evidence(self, held: _Held, outcome: Outcome) -> Evidence | None:
        """Return what this worker has seen of a model, where its refusals are more than an accident."""
        now = time.monotonic()
        suspicion = self._suspicions.setdefault(held.model, Suspicion(self._started))
        if not suspicion.note(held.claim.job_id, outcome, now):
            return None
        return suspicion.evidence(self.worker, now, patience=self._outage_patience)

    def _call_ended(self, held: _Held, task: asyncio.Task[None]) -> None:
        self._calling -= 1
        if task.cancelled() and held.task is task:
            # Not we cancelled it: the function cancelled the task that it runs in.
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
        ended = 0
        for settlement in batch:
            claim = settlement.claim
            if self._is_held(claim):
                del self._held[claim.job_id]
            if claim.job_id in settled.taken:
                given_back = claim.job_id in settled.given_back
                state = JobState.PENDING if given_back else settlement.state
                self._count(settlement, state)
                ended += state is not JobState.PENDING
                if state is JobState.FAILED and len(self._failed) < KEPT_FAILED:
                    self._failed.add(claim.job_id)
                self._tell_first(settlement, given_back=given_back)
        earlier = self._failed & settled.given_back
        self._failed -= earlier
        self._report.failed -= len(earlier)
        self._report.retried += len(earlier)
        self._tell_no_table(batch)
        self._report.stale += len(settled.stale)
        for words in settled.notices:
            self._notify(words)
        for name, pause in settled.paused.items():
            self._notify(f"run {name} is paused now: {pause.message}")
        for model in settled.reached:
            self._suspicions[model].clear()
        for model, reason in settled.unreachable.items():
            self._unreachable(model, reason)
        self._recent.append((time.monotonic(), ended))
        self._changed()

    def _tell_no_table(self, batch: Sequence[Settlement]) -> None:
        """Say once that costs are not known for want of the price table."""
        problem = table_problem()
        if problem is None or self._told_no_table or not any(s.outcome.is_unpriced for s in batch):
            return
        self._told_no_table = True
        self._notify(
            f"expected the price table, the package genai-prices, got: {problem}; it is tried again, and until then "
            f"answers are kept without their cost: mend it, or give --price in=…,out=… at the enqueue"
        )

    def _tell_first(self, settlement: Settlement, *, given_back: bool) -> None:
        """Say each kind of failure once: a typo in a function should not be found out eight tries later."""
        failure = settlement.outcome.failure
        if failure is None or failure.error in self._told:
            return
        self._told.add(failure.error)
        fails = settlement.state is JobState.FAILED and not given_back
        after = "failed" if fails else "to be tried again"
        self._notify(f"first {failure.error}, job {settlement.claim.job_id} {after}: {failure.message[:200]}")

    def _count(self, settlement: Settlement, state: JobState) -> None:
        if settlement.outcome.finish_reason == CUT_OFF and state is not JobState.PENDING:
            run = self._served[settlement.claim.run_id].run
            self._report.cut_off[run.name] += 1
            if output_limit({**run.task.settings, **(settlement.claim.settings or {})}) is not None:
                self._report.limited.add(run.name)
        match state:
            case JobState.DONE:
                self._report.done += 1
            case JobState.FAILED:
                self._report.failed += 1
            case _:
                self._report.retried += 1

    def rate(self) -> float:
        """Return how many jobs a second were done or failed over the latest half minute."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_SECONDS:
            self._recent.popleft()
        window = max(1.0, min(RATE_WINDOW_SECONDS, now - self._started))
        return sum(count for _, count in self._recent) / window

    def lose(self, claim: Claim) -> None:
        """Stop a call whose job is not ours any more; one that has ended meanwhile is left to the fence."""
        held = self._held.get(claim.job_id)
        if held is None or held.task is None or held.claim.claim_seq != claim.claim_seq:
            return
        _stop(held)
        del self._held[claim.job_id]
        self._changed()
        self._notify(f"lost job {claim.job_id}: its lease ran out and it was taken back")

    async def cancel(self) -> list[Claim]:
        """Stop the calls that have not ended and return their claims, which are to be released."""
        calling = [held for held in self._held.values() if held.task is not None]
        tasks = {task for held in calling if (task := _stop(held)) is not None}
        if tasks:
            # A function that will not be cancelled must not keep us; its lease is given back all the same.
            _, stuck = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
            self._report.stuck = len(stuck)
        left = [held.claim for held in calling if not held.settled]
        for claim in left:
            self._held.pop(claim.job_id, None)
        return left

    async def close(self) -> None:
        """Write what has ended; afterwards `error` tells whether that failed."""
        self._settler.close()
        if self._settling is None:
            return
        await asyncio.wait([self._settling])
        if self._settling.cancelled() and self.unwritten:
            # By an event loop that ends, which cancels every task in it.
            self.error = self.error or DatabaseError("the event loop ended before all answers were written")
