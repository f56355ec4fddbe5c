"""When refused calls mean an outage or a wrong key instead of one job's failure: decisions over values.

Each worker counts its own refusals; what all workers know of a model is one row.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lbr.core.errors import Family, Symptom
from lbr.core.text import duration
from lbr.core.types import JobState, PauseCause, Paused, WorkerId

if TYPE_CHECKING:
    from lbr.core.types import Failure, JobId, Outcome, RunId, Settlement

REFUSALS = 5
"""This many refusals without a success between them are no accident."""
JOBS = 3
"""They must be of this many jobs, so that one prompt that a firewall refuses is not taken for an outage."""
FIRST_WAIT_MS = 1_000
MAX_WAIT_MS = 60_000
RETRY_MS = 200
TURN_MS = 2_000
"""How much longer the worker whose call failed last waits, so that one with a better network probes before it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one worker saw of a model: its latest refusals, at most REFUSALS, with no success of its own since the first.

    They were of `jobs` different jobs; the first was `first_ms` ago. `unsuccessful_ms` is how long this worker has had
    no success, and `succeeded` whether it ever had one. `patience_ms` is how long its user waits for an outage to end.
    """

    worker: WorkerId
    refusals: int
    jobs: int
    first_ms: int
    unsuccessful_ms: int
    succeeded: bool
    patience_ms: int


_NO_EVIDENCE = Evidence(WorkerId(0), 0, 0, 0, 0, succeeded=False, patience_ms=0)


@dataclass(slots=True)
class Suspicion:
    """When a model refused calls of which jobs: the latest, since the last success. Times are seconds of one clock."""

    started: float
    last_success: float | None = None
    refusals: deque[tuple[float, JobId]] = field(default_factory=lambda: deque(maxlen=REFUSALS))

    @property
    def is_evidence(self) -> bool:
        """Whether the refusals seen so far are more than an accident."""
        return len(self.refusals) == REFUSALS

    def note(self, job_id: JobId, outcome: Outcome, now: float) -> bool:
        """Count a call that ended now; return whether it was refused."""
        if outcome.is_paid:
            self.last_success = now
            # Only a call that began later shows that the model is there.
            if self.refusals and now - outcome.latency_ms / 1000 >= self.refusals[0][0]:
                self.refusals.clear()
            return False
        if outcome.failure is None or not is_refused(outcome.failure):
            return False
        self.refusals.append((now, job_id))
        return True

    def evidence(self, worker: WorkerId, now: float, *, patience: float) -> Evidence:
        """Return what has been seen after a refusal; `patience` is in seconds."""
        since = self.started if self.last_success is None else self.last_success
        return Evidence(
            worker,
            len(self.refusals),
            len({job_id for _, job_id in self.refusals}),
            round((now - self.refusals[0][0]) * 1000),
            round((now - since) * 1000),
            self.last_success is not None,
            round(patience * 1000),
        )


@dataclass(frozen=True, slots=True)
class ModelState:
    """What all workers know of a model that refused calls. Times are milliseconds.

    `since` is when the outage was recognised, None if there is none; `worker` recognised it, or made the last probe.
    No call may begin before `probe_at`, then one probe at a time. `wait_ms` is the latest wait between probes and
    `waited_ms` the sum of all, up to `patience_ms`; `done` is how many jobs were done at the latest refusal.
    `recovered_by` is the worker whose probe succeeded last, at `recovered_at`; `recognised_by` saw the last outage.
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


@dataclass(frozen=True, slots=True)
class Backlog:
    """The jobs of a model's active runs: `open`, neither answered nor given up, in these `runs`, and `done`.

    `others` is how many calls workers other than the prober have in flight.
    """

    open: int = 0
    done: int = 0
    others: int = 0
    runs: frozenset[RunId] = frozenset()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from one ended call: its settlement, uncharged if the job is not to blame, and the model's state.

    `pause` is why to pause all runs of the model, `notice` a line for the log. With `alone`, other workers reach the
    model and this one does not.
    """

    settlement: Settlement
    state: ModelState
    pause: Paused | None = None
    notice: str | None = None
    alone: bool = False


def is_refused(failure: Failure) -> bool:
    """Return whether an outage or a wrong key would explain a failure."""
    return failure.symptom in {Symptom.UNREACHABLE, Symptom.SERVER_ERROR} or _is_denied(failure)


def _is_denied(failure: Failure) -> bool:
    return failure.symptom in {Symptom.DENIED, Symptom.FORBIDDEN}


def judge(settlement: Settlement, model: str, state: ModelState, backlog: Backlog, now: int) -> Judgement:
    """Judge one ended call by what all workers know of its model, and update that."""
    failure, evidence = settlement.outcome.failure, settlement.evidence or _NO_EVIDENCE
    probes = settlement.claim.probe and state.since is not None
    if failure is None or not is_refused(failure):
        # A probe that was cut off or timed out found no working server either.
        if probes and failure is not None and failure.family is Family.TRANSIENT:
            return _still_away(settlement, failure, model, state, backlog, now)
        return _reached(settlement, model, state, now) if probes else Judgement(settlement, state)
    if _is_of_the_job(failure, evidence, backlog):
        # One of the last jobs; from now on they are tried as any other.
        return Judgement(settlement, replace(state, since=None) if settlement.claim.probe else state)
    if state.since is not None:
        if probes:
            return _still_away(settlement, failure, model, state, backlog, now)
        return Judgement(_uncharged(settlement, failure), state)
    if not _is_enough(failure, evidence, state, backlog, now):
        if _may_be_outage(settlement, failure, evidence, backlog):
            settlement = _uncharged(settlement, failure, wait_ms=RETRY_MS)
        return Judgement(settlement, state)
    settlement = _uncharged(settlement, failure)
    if _others_succeed(state, evidence, now):
        return Judgement(settlement, state, alone=True)
    worker, patience_ms = evidence.worker, evidence.patience_ms
    away = replace(state, since=now, worker=worker, recognised_by=worker, waited_ms=0, patience_ms=patience_ms)
    notice = (
        f"{model}: {failure.message}; no call gets through, so all workers wait, and one probes in "
        f"{duration(FIRST_WAIT_MS / 1000)}"
    )
    return Judgement(settlement, _waiting(away, failure, FIRST_WAIT_MS, backlog, now), notice=notice)


def _reached(settlement: Settlement, model: str, state: ModelState, now: int) -> Judgement:
    after = replace(state, since=None, recovered_by=state.worker, recovered_at=now)
    notice = f"{model} answers again, after {duration((now - (state.since or now)) / 1000)}"
    return Judgement(settlement, after, notice=notice)


def _still_away(
    settlement: Settlement, failure: Failure, model: str, state: ModelState, backlog: Backlog, now: int
) -> Judgement:
    """Judge a probe that failed."""
    kept = _uncharged(settlement, failure)
    wait = min(MAX_WAIT_MS, 2 * state.wait_ms)
    if _is_denied(failure) and not backlog.others and backlog.done <= state.done:
        # Otherwise a worker with a better key may be busy with long calls: its turn to probe comes.
        pause = Paused(PauseCause.ACCOUNT, f"{failure.error}: {failure.message}")
    elif state.waited_ms + wait >= state.patience_ms:  # waits, not the clock, because laptops sleep
        waited = duration(state.waited_ms / 1000)
        pause = Paused(PauseCause.OUTAGE, f"{model} could not be reached in {waited} of waits: {failure.message}")
    else:
        notice = f"{model}: {failure.message}; the next probe is in {duration(wait / 1000)}"
        return Judgement(kept, _waiting(state, failure, wait, backlog, now), notice=notice)
    return Judgement(kept, replace(state, since=None), pause)


def _waiting(state: ModelState, failure: Failure, wait_ms: int, backlog: Backlog, now: int) -> ModelState:
    waited_ms, reason = state.waited_ms + wait_ms, failure.message
    return replace(
        state, reason=reason, probe_at=now + wait_ms, wait_ms=wait_ms, waited_ms=waited_ms, done=backlog.done
    )


def _is_of_the_job(failure: Failure, evidence: Evidence, backlog: Backlog) -> bool:
    """Return whether one of the last jobs of a model that has answered fails by itself: no three can be refused."""
    if backlog.open >= JOBS or failure.symptom is Symptom.UNREACHABLE:
        return False
    # A 401 is about this worker's key.
    return evidence.succeeded or (backlog.done > 0 and failure.symptom is not Symptom.DENIED)


def _is_enough(failure: Failure, evidence: Evidence, state: ModelState, backlog: Backlog, now: int) -> bool:
    if state.recovered_at is not None and now - evidence.first_ms <= state.recovered_at:
        return False  # it is from before the end of the last outage
    # No prompt has its connection refused, so these refusals need not be of different jobs.
    jobs = 1 if failure.symptom is Symptom.UNREACHABLE else min(JOBS, backlog.open)
    return evidence.refusals >= REFUSALS and evidence.jobs >= jobs


def _may_be_outage(settlement: Settlement, failure: Failure, evidence: Evidence, backlog: Backlog) -> bool:
    """Return whether a refusal that may yet prove to be an outage or a wrong key must not cost its job anything."""
    if _is_denied(failure):
        return not evidence.succeeded
    last = settlement.state is JobState.FAILED or backlog.open < JOBS
    return last and failure.symptom is Symptom.UNREACHABLE


def _others_succeed(state: ModelState, evidence: Evidence, now: int) -> bool:
    """Return whether another worker's probe succeeded after this worker saw an outage, while all its calls still fail."""
    return (
        state.recovered_at is not None
        and state.recognised_by == evidence.worker
        and state.recovered_by != evidence.worker
        and state.recovered_at > now - evidence.unsuccessful_ms
    )


def _uncharged(settlement: Settlement, failure: Failure, wait_ms: int = 0) -> Settlement:
    """Return a settlement that gives its job back as if it had not been called, behind all that are due."""
    family = Family.ACCOUNT if _is_denied(failure) else Family.OUTAGE
    outcome = replace(settlement.outcome, failure=replace(failure, family=family))
    return replace(settlement, outcome=outcome, state=JobState.PENDING, charge=0, wait_ms=wait_ms, cool_down=False)
