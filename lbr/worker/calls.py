"""The claims that one worker holds: each from its claim, through its call, until its settlement is committed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from lbr.core.config import CALL_TIMEOUT
from lbr.core.errors import CUT_OFF, CallError, NothingToServeError, Permanent, UsageError
from lbr.core.open_files import exhausted_message
from lbr.core.outages import Suspicion
from lbr.core.pricing import output_limit, processing_of, table_problem
from lbr.core.pulses import Pulses
from lbr.core.retry import RetryPolicy, decide, failure_of
from lbr.core.tiers import FLEX_TIMEOUT, sent_settings
from lbr.core.types import Claim, JobId, JobState, Outcome, Settlement, WorkerId
from lbr.models.base import Request
from lbr.store.schema import SUSPECT_CRASHES
from lbr.worker.attempt import Deadlines, OutOfFilesError, attempt, priced, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from random import Random
    from typing import TypeAlias

    from lbr.core.config import WorkOptions
    from lbr.core.types import Paused
    from lbr.store.settle import Settled
    from lbr.worker.runs import ServedRun

    _Slot: TypeAlias = tuple[JobId, int]

MAX_ROWS = 500
MAX_SERVER_ROWS = 1_000
"""How many calls a turn settles. On a server a turn is a dozen round trips, and no other writer waits for its end."""
MAX_LINGER_SECONDS = 0.05
CANCEL_SECONDS = 5.0
LONG_WAIT_SECONDS = 120.0
MAX_WAIT_SECONDS = 366 * 86_400.0
"""A wait from the first on is reported; one beyond the second is reported as the second."""
MAX_FAILED = 1_000
"""How many failed jobs a worker remembers: a wrong set-up, whose jobs are given back, fails its first ones."""
OUT_OF_FILES_SECONDS = 0.5
"""How long a call that found no file handle waits at least."""


@dataclass(slots=True)
class WorkReport:
    """What one worker did: jobs done, failed and put back for a retry, and what it left.

    `stale` counts answers that came too late, `released` jobs given back unfinished, `reclaimed` those taken from dead
    workers, `stuck` calls that could not be cancelled. `by_run` counts the jobs done and failed, and `cut_off` the
    answers that reached a token limit, by run; `limited` names the runs whose settings set that limit. `paused` maps runs to their pauses; `interrupted` names runs
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
    by_run: Counter[str] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)
    limited: set[str] = field(default_factory=set)
    paused: dict[str, Paused] = field(default_factory=dict)
    interrupted: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Held:
    """A claim in a slot; `task` is None once its call has ended, `settled` if its settlement waits to be committed."""

    claim: Claim
    served: ServedRun
    task: asyncio.Task[None] | None = None
    settled: bool = False

    def stop(self) -> None:
        """Cancel the call. Without its task, its end is known to be our doing."""
        task, self.task = self.task, None
        if task is not None:
            task.cancel()


class Calls:
    """Runs calls; `ended` holds how they ended, until `forget` gets what the database made of it; `pulses` count them.

    `changed` is called when calls have ended, or a call was lost; `failed` with what must end the worker.
    """

    def __init__(
        self,
        report: WorkReport,
        options: WorkOptions,
        *,
        policy: RetryPolicy,
        rng: Random,
        changed: Callable[[], None],
        failed: Callable[[BaseException], None],
        notify: Callable[[str], None],
    ) -> None:
        self._report = report
        self._policy = policy
        self._deadlines = Deadlines(options.timeout or CALL_TIMEOUT)
        self._flex_deadlines = Deadlines(options.timeout or FLEX_TIMEOUT)
        self._rng = rng
        self._changed = changed
        self._fail = failed
        self._outage_patience = options.outage_patience
        self._notify = notify
        self._verbose = options.verbose
        self._held: dict[_Slot, _Held] = {}
        self._suspicions: dict[str, Suspicion] = {}
        self._outages: set[str] = set()
        self._suspects: set[_Slot] = set()
        self._failed: set[JobId] = set()
        self.ended: list[Settlement] = []
        self.pulses = Pulses()
        self.calling = 0
        self._warned: set[str] = set()
        self._long_waits: dict[str, float] = {}
        self._started = time.monotonic()
        self.worker = WorkerId(0)
        self.owner: asyncio.Task[object] | None = None
        self.enough = MAX_ROWS
        """How many ended calls are worth a turn; see `pace`."""

    def __len__(self) -> int:
        """Return how many slots are taken."""
        return len(self._held)

    @property
    def claims(self) -> list[Claim]:
        """The claims held now, called or waiting to be settled."""
        return [held.claim for held in self._held.values()]

    @property
    def alone(self) -> bool:
        """Whether a job runs that nothing else should run beside."""
        self._suspects &= self._held.keys()
        return bool(self._suspects)

    def report_outages(self, outages: Mapping[str, str]) -> None:
        """Report outages that other workers recognised, and the end of each; settlements report our own."""
        ours = {model for model, suspicion in self._suspicions.items() if suspicion.is_evidence}
        for model in outages.keys() - self._outages - ours:
            self._notify(f"{model}: waiting, like all workers: {outages[model]}")
        for model in (self._outages & ours) - outages.keys():
            self._notify(f"{model}: waiting no longer")
        self._outages = set(outages)

    def start(self, claim: Claim, served: ServedRun) -> None:
        """Make the call of a claim."""
        slot = _slot(claim)
        held = self._held[slot] = _Held(claim, served)
        if claim.crashes >= SUSPECT_CRASHES:
            self._suspects.add(slot)
        self.calling += 1
        held.task = asyncio.create_task(self._call(held))
        held.task.add_done_callback(self._call_ended)

    async def _call(self, held: _Held) -> None:
        try:
            outcome = await self._outcome(held.claim, held.served)
        except asyncio.CancelledError:
            # The end of the event loop cancels the worker, too.
            if held.task is None or (self.owner is not None and self.owner.cancelling()):
                raise
            # By the function, which runs in this task.
            failure = failure_of(CallError("the call cancelled itself", kind="CancelledError"))
            outcome = Outcome(None, failure, latency_ms=0)
        self._settle(held, outcome)

    async def _outcome(self, claim: Claim, served: ServedRun) -> Outcome:
        settings = claim.settings
        if settings is not None and claim.model is not None:
            try:
                served = served.runs.by_other_model(served, claim.model)
            except (UsageError, OSError) as error:
                wrong = Permanent(str(error), kind="UsageError") if isinstance(error, UsageError) else error
                return Outcome(None, failure_of(wrong), latency_ms=0)
            settings = {name: value for name, value in settings.items() if name != "model"} or None
        if claim.sample:
            settings = seeded(settings, served.run.task, claim.sample)
        is_flex = processing_of({**sent_settings(served.run.task), **(settings or {})}) == "flex"
        deadlines = self._flex_deadlines if is_flex else self._deadlines
        request = Request(
            prompt=claim.prompt,
            task=served.run.task,
            job_id=claim.job_id,
            seq=claim.claim_seq,
            last_bad=claim.history.last_bad,
            settings=settings,
            timeout=deadlines.seconds,
            keep=served.run.keep,
        )
        while True:
            try:
                outcome = await attempt(served.model, served.validator, request, deadlines, served.late_calls)
                break
            except OutOfFilesError:
                self._warn_once("out of files", f"{exhausted_message()}; calls wait until one is free")
                # No call was made, so nothing is settled: keep the claim, and call when other calls have ended.
                await asyncio.sleep(OUT_OF_FILES_SECONDS * (1 + self._rng.random()))
        self._report_long_wait(served.run.task.answerer, outcome)
        return outcome if served.price is None else priced(outcome, served.price)

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
        run, claim, now, evidence = held.served.run, held.claim, time.monotonic(), None
        suspicion = self._suspicions.setdefault(run.task.answerer, Suspicion(self._started))
        if claim.settings and claim.model is not None:  # it shows nothing about the run's model
            claim, outcome = replace(claim, probe=False), _of_the_job(outcome)
        elif suspicion.note(claim.job_id, outcome, now):
            evidence = suspicion.evidence(self.worker, now, patience=self._outage_patience)
        # It decides nothing about an answer.
        policy = replace(self._policy, max_attempts=run.max_attempts) if outcome.failure else self._policy
        self.ended.append(decide(claim, outcome, policy, self._rng, evidence))
        if len(self.ended) in {1, self.enough}:
            self._changed()

    def _call_ended(self, task: asyncio.Task[None]) -> None:
        self.calling -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
        if self.calling == 0:
            self._changed()

    def freed_by(self, batch: Sequence[Settlement]) -> int:
        """Return how many slots become free when these are settled."""
        return sum(_slot(settlement.claim) in self._held for settlement in batch)

    def forget(self, batch: Sequence[Settlement], settled: Settled) -> None:
        """Free the slots of the first calls that have ended, which are settled now, and report them."""
        del self.ended[: len(batch)]
        self.pulses.begin(time.monotonic())
        for settlement in batch:
            claim = settlement.claim
            held = self._held.pop(_slot(claim), None)
            if claim.job_id in settled.taken:
                given_back = claim.job_id in settled.given_back
                state = JobState.PENDING if given_back else settlement.state
                self._count(settlement, state, held)
                self.pulses.note(settlement, state)
                self._report_failure(settlement, given_back=given_back)
        earlier = self._failed & settled.given_back
        self._failed -= earlier
        self._report.failed -= len(earlier)
        self._report.retried += len(earlier)
        self._report.stale += len(settled.stale)
        for notice in settled.notices:
            self._notify(notice)
        for name, pause in settled.paused.items():
            self._notify(f"run {name} is paused now: {pause.message}")
        for model, reason in settled.unreachable.items():
            self._fail(
                NothingToServeError(
                    f"{model} does not answer this worker ({reason}), but it answers others: check this machine's "
                    f"network, proxy and key"
                )
            )

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
        if held is None or state is JobState.PENDING:
            return
        run = held.served.run
        self._report.by_run[run.name] += 1
        if settlement.outcome.finish_reason == CUT_OFF:
            self._report.cut_off[run.name] += 1
            if output_limit({**run.task.settings, **(settlement.claim.settings or {})}) is not None:
                self._report.limited.add(run.name)

    def _report_failure(self, settlement: Settlement, *, given_back: bool) -> None:
        """Report each kind of failure once and early, or every failure if verbose, so that a typo in a function is found before eight tries."""
        failure = settlement.outcome.failure
        if failure is not None:
            fails = settlement.state is JobState.FAILED and not given_back
            after = "failed" if fails else "to be tried again"
            job = settlement.claim.job_id
            words = f"{failure.error}, job {job} {after}: {failure.message[:200]}"
            self._notify(words) if self._verbose else self._warn_once(failure.error, f"first {words}")
        if (problem := table_problem()) is not None and settlement.outcome.is_unpriced:
            self._warn_once(
                "price table",
                f"cannot load the price table (package genai-prices): {problem}; it is tried again, and until then answers "
                f"are kept without their cost. Reinstall it, or give --price in=…,out=… at the enqueue",
            )

    def lose(self, claim: Claim) -> None:
        """Stop a call whose job is not ours any more. If it has ended meanwhile, the store refuses its settlement."""
        held = self._held.get(_slot(claim))
        if held is not None and held.task is not None:
            held.stop()
            del self._held[_slot(claim)]
            self._changed()
            self._notify(f"lost job {claim.job_id}: its lease ran out and it was reclaimed")

    async def cancel(self) -> list[Claim]:
        """Stop the calls that have not ended and return their claims, for release."""
        calling = {held.task: held for held in self._held.values() if held.task is not None}
        for held in calling.values():
            held.stop()
        if calling:
            # A function that cannot be cancelled must not keep the worker; its job is released all the same.
            _, stuck = await asyncio.wait(calling, timeout=CANCEL_SECONDS)
            self._report.stuck = len(stuck)
        left = [held.claim for held in self._held.values() if not held.settled]
        for claim in left:
            del self._held[_slot(claim)]
        return left


def _slot(claim: Claim) -> _Slot:
    # A job may be held twice: if its lease ran out in a standstill, and this worker claimed it again.
    return claim.job_id, claim.claim_seq


def _of_the_job(outcome: Outcome) -> Outcome:
    """Return an outcome that is judged by itself, not by other calls."""
    if outcome.failure is None:
        return outcome
    return replace(outcome, failure=replace(outcome.failure, symptom=None))


def pace(turns: Collection[float], ended: Sequence[Settlement], held: int, most: int = MAX_ROWS) -> tuple[int, float]:
    """Return how many ended calls are worth a turn, and for how many seconds to wait for so many.

    `turns` are how long the latest turns took, `ended` calls that have ended, and `held` the slots in use. A quarter of
    them: calls that begin together end together, and would stay in step, so that either all call or all are written.
    More if turns are slow, as many as end meanwhile, up to `most`. The wait leaves other writers three quarters of the
    time, or is a fiftieth of a call, so that calls that end one by one share a commit.
    """
    # One slow turn may be due to our own calls in the interpreter. If calls compute in threads, every other one is.
    turn = sorted(turns)[len(turns) // 2]
    # The quickest call counts: others may have waited for the processor.
    call = min([settlement.outcome.latency_ms for settlement in ended]) / 1000
    ending = turn / (turn + call) if call else 1.0
    rows = round(held * max(1 / 4, ending))
    return min(most, max(1, rows)), min(MAX_LINGER_SECONDS, max(3 * turn, call / 50))
