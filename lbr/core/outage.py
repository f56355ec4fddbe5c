"""When refused calls mean an outage or a wrong key, and not the failure of one job: plain decisions over values.

A refusal is judged by the other calls. Each worker counts its own; what all workers know of a model is one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from lbr.core.errors import Family, Symptom
from lbr.core.text import duration
from lbr.core.types import JobState, PauseCause, Paused

if TYPE_CHECKING:
    from lbr.core.types import Failure, JobId, Outcome, Settlement, WorkerId

REFUSALS = 5
"""So many refusals without a success between them are no accident."""
JOBS = 3
"""They must be of this many jobs, so that one prompt that a firewall refuses is not taken for an outage."""
FIRST_WAIT_MS = 1_000
MAX_WAIT_MS = 60_000
RETRY_MS = 200
TURN_MS = 2_000
"""How much longer the worker waits whose call failed last, so that one with a better network can probe before it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one worker saw of a model: refusals, none of its own calls having succeeded since the first.

    `jobs` is how many jobs they were of, at most JOBS; the first was `first_ms` ago. `unsuccessful_ms` is how long this
    worker has had no success, and `succeeded` whether it ever had one. `patience_ms` is how long its user waits for an
    outage to end.
    """

    worker: WorkerId
    refusals: int
    jobs: int
    first_ms: int
    unsuccessful_ms: int
    succeeded: bool
    patience_ms: int


@dataclass(slots=True)
class Suspicion:
    """The refusals of one model that a worker has seen since its last success. Times are seconds of one clock."""

    started: float
    first: float = 0.0
    refusals: int = 0
    jobs: set[JobId] = field(default_factory=set)
    last_success: float | None = None

    @property
    def is_evidence(self) -> bool:
        """Whether the refusals seen so far are more than an accident."""
        return self.refusals >= REFUSALS

    def clear(self) -> None:
        """Forget the refusals: the model was reached since."""
        self.refusals, self.jobs = 0, set()

    def note(self, job_id: JobId, outcome: Outcome, now: float) -> bool:
        """Count a call that ended now; return whether it was refused."""
        if outcome.is_paid:
            self.last_success = now
            if self.refusals and now - outcome.latency_ms / 1000 >= self.first:
                self.clear()
            return False
        if outcome.failure is None or not is_refused(outcome.failure):
            return False
        self.first = self.first if self.refusals else now
        self.refusals += 1
        if len(self.jobs) < JOBS:
            self.jobs.add(job_id)
        return True

    def evidence(self, worker: WorkerId, now: float, *, patience: float) -> Evidence:
        """Return what has been seen; `patience` is in seconds."""
        since = self.started if self.last_success is None else self.last_success
        return Evidence(
            worker,
            self.refusals,
            len(self.jobs),
            round((now - self.first) * 1000),
            round((now - since) * 1000),
            self.last_success is not None,
            round(patience * 1000),
        )


@dataclass(frozen=True, slots=True)
class ModelState:
    """What all workers know of a model that refused calls. Times are milliseconds.

    `since` is when the outage was recognised, None while there is none; `worker` recognised it, or made the last
    probe. No call may begin before `probe_at`, then one probe at a time. `wait_ms` is the latest wait between probes
    and `waited_ms` the sum of all, up to `patience_ms`; `done` is how many jobs were done at the latest refusal.
    `recovered_by` is the worker whose probe succeeded last, at `recovered_at`; `recognised_by` the worker that saw the
    last outage.
    """

    since: int | None = None
    reason: str = ""
    worker: int | None = None
    recognised_by: int | None = None
    probe_at: int = 0
    wait_ms: int = 0
    waited_ms: int = 0
    patience_ms: int = 0
    done: int = 0
    recovered_by: int | None = None
    recovered_at: int | None = None


class Verdict(StrEnum):
    """What a refused call means."""

    JOB = "job"  # it is about this job, or nothing is known yet: charge it
    WAIT = "wait"  # the model is away: every worker waits, no job is charged
    WORKER = "worker"  # others reach the model: this worker is wrong, no job is charged
    ACCOUNT = "account"  # no worker gets in: pause the model's runs, no job is charged
    UNKNOWN = "unknown"  # too early to say, and it may not be the job: try again, no job is charged


@dataclass(frozen=True, slots=True)
class Backlog:
    """What the active runs of a model hold: `open` jobs neither answered nor given up, and those that are `done`.

    `others` is how many calls other workers than the prober have in flight.
    """

    open: int
    done: int
    others: int = 0


def is_refused(failure: Failure) -> bool:
    """Whether a call failed in a way that an outage or a wrong key would explain."""
    return failure.symptom in {Symptom.UNREACHABLE, Symptom.SERVER_ERROR} or is_denied(failure)


def is_denied(failure: Failure) -> bool:
    """Whether a call was not let in: for its key, or by a firewall for its prompt."""
    return failure.symptom in {Symptom.DENIED, Symptom.FORBIDDEN}


def judge(settlement: Settlement, state: ModelState, backlog: Backlog, now: int) -> Verdict:
    """Return what a failed call means, given what all workers know of its model."""
    failure, evidence, probe = settlement.outcome.failure, settlement.evidence, settlement.claim.probe
    if failure is None:
        return Verdict.JOB
    if not is_refused(failure):
        # A probe that found a server, but no answer: slow, or cut off.
        return Verdict.WAIT if probe and failure.family is Family.TRANSIENT else Verdict.JOB
    if _is_of_the_job(failure, evidence, backlog):
        return Verdict.JOB
    if state.since is not None:
        # A worker with a better key may be busy with calls that take long: its turn to probe comes.
        others = backlog.others > 0 or backlog.done > state.done
        denied = probe and is_denied(failure) and not others
        return Verdict.ACCOUNT if denied else Verdict.WAIT
    if evidence is None or is_stale(evidence, state, now) or not _is_enough(failure, evidence, backlog):
        return Verdict.UNKNOWN if _is_uncharged(settlement, backlog) else Verdict.JOB
    return Verdict.WORKER if _others_succeed(state, evidence, now) else Verdict.WAIT


def _is_of_the_job(failure: Failure, evidence: Evidence | None, backlog: Backlog) -> bool:
    """Whether one of the last jobs of a model that has answered fails by itself: no three can be refused."""
    succeeded = evidence is not None and evidence.succeeded
    if failure.symptom is Symptom.DENIED:
        return backlog.open < JOBS and succeeded  # with this worker's key
    answered = succeeded or backlog.done > 0
    return backlog.open < JOBS and answered and failure.symptom is not Symptom.UNREACHABLE


def is_stale(evidence: Evidence, state: ModelState, now: int) -> bool:
    """Whether evidence is older than the end of the last outage, so that it says nothing about now."""
    return state.recovered_at is not None and now - evidence.first_ms <= state.recovered_at


def _is_enough(failure: Failure, evidence: Evidence, backlog: Backlog) -> bool:
    # No prompt has its connection refused, so that these need not be of different jobs.
    jobs = 1 if failure.symptom is Symptom.UNREACHABLE else min(JOBS, backlog.open)
    return evidence.refusals >= REFUSALS and evidence.jobs >= jobs


def _is_uncharged(settlement: Settlement, backlog: Backlog) -> bool:
    """Whether a refusal that may yet prove to be an outage or a wrong key must cost its job nothing."""
    failure, evidence = settlement.outcome.failure, settlement.evidence
    if failure is not None and is_denied(failure):
        return evidence is None or not evidence.succeeded
    last = settlement.state is JobState.FAILED or backlog.open < JOBS
    return last and failure is not None and failure.symptom is Symptom.UNREACHABLE


def _others_succeed(state: ModelState, evidence: Evidence, now: int) -> bool:
    """Whether another worker's probe succeeded after this worker saw an outage, while all its own calls still fail."""
    return (
        state.recovered_at is not None
        and state.recognised_by == evidence.worker
        and state.recovered_by != evidence.worker
        and state.recovered_at > now - evidence.unsuccessful_ms
    )


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from one ended call: its settlement, the model's state, and what to do and to log.

    `pause` is why to pause all runs of the model, None for not; `notice` a line for the log, None for none.
    """

    verdict: Verdict
    settlement: Settlement
    state: ModelState
    pause: Paused | None = None
    notice: str | None = None


def consider(settlement: Settlement, model: str, state: ModelState, backlog: Backlog, now: int) -> Judgement:
    """Judge one ended call of a model, and move the model's state."""
    verdict = judge(settlement, state, backlog, now)
    failure, evidence = settlement.outcome.failure, settlement.evidence
    if verdict is Verdict.JOB or failure is None:
        return _charged(settlement, model, state, now)
    kept = without_charge(settlement, verdict)
    reason = failure.message
    if verdict is Verdict.ACCOUNT:
        pause = Paused(PauseCause.ACCOUNT, f"{failure.error}: {reason}")
        return Judgement(verdict, kept, replace(state, since=None), pause=pause)
    if verdict is not Verdict.WAIT or (state.since is not None and not settlement.claim.probe):
        return Judgement(verdict, kept, state)
    if state.since is None:
        if evidence is None:
            return Judgement(verdict, kept, state)
        words = f"{model}: {reason}; no call gets through, so all workers wait, and one probes in {duration(FIRST_WAIT_MS / 1000)}"
        return Judgement(verdict, kept, _recognised(evidence, reason, state, backlog, now), notice=words)
    after = replace(_probed_in_vain(state, reason, now), done=backlog.done)
    if after.waited_ms >= after.patience_ms:
        # Waits count, not the clock, because laptops sleep.
        words = f"{model} could not be reached in {duration(state.waited_ms / 1000)} of waits: {reason}"
        return Judgement(verdict, kept, replace(after, since=None), pause=Paused(PauseCause.OUTAGE, words))
    words = f"{model}: {reason}; the next probe is in {duration(after.wait_ms / 1000)}"
    return Judgement(verdict, kept, after, notice=words)


def _charged(settlement: Settlement, model: str, state: ModelState, now: int) -> Judgement:
    failure = settlement.outcome.failure
    if not settlement.claim.probe or state.since is None:
        return Judgement(Verdict.JOB, settlement, state)
    if failure is not None and is_refused(failure):
        # It is of the last jobs, which from now on are tried as any other.
        return Judgement(Verdict.JOB, settlement, replace(state, since=None))
    after = replace(state, since=None, recovered_by=state.worker, recovered_at=now)
    words = f"{model} answers again, after {duration((now - state.since) / 1000)}"
    return Judgement(Verdict.JOB, settlement, after, notice=words)


def _recognised(
    evidence: Evidence, reason: str, before: ModelState, backlog: Backlog, now: int
) -> ModelState:
    return replace(
        before,
        since=now,
        reason=reason,
        worker=evidence.worker,
        recognised_by=evidence.worker,
        probe_at=now + FIRST_WAIT_MS,
        wait_ms=FIRST_WAIT_MS,
        waited_ms=FIRST_WAIT_MS,
        patience_ms=evidence.patience_ms,
        done=backlog.done,
    )


def _probed_in_vain(state: ModelState, reason: str, now: int) -> ModelState:
    """Let the next probe come after twice the wait, at most a minute."""
    wait = min(MAX_WAIT_MS, 2 * state.wait_ms)
    return replace(state, reason=reason, probe_at=now + wait, wait_ms=wait, waited_ms=state.waited_ms + wait)


def without_charge(settlement: Settlement, verdict: Verdict) -> Settlement:
    """Return a settlement that gives its job back as if the call had not been made, behind all that are due."""
    outcome, wait_ms = settlement.outcome, RETRY_MS if verdict is Verdict.UNKNOWN else 0
    if outcome.failure is not None:
        family = outcome.failure.family if verdict is Verdict.UNKNOWN else Family.OUTAGE
        family = Family.ACCOUNT if is_denied(outcome.failure) else family
        outcome = replace(outcome, failure=replace(outcome.failure, family=family))
    return replace(
        settlement, outcome=outcome, state=JobState.PENDING, charge=0, wait_ms=wait_ms, cool_down=False
    )
