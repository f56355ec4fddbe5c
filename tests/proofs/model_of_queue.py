"""The queue as plain Python over dictionaries: what `docs/explanation/states.md` says, and no more.

The property test carries out each step here and on the real store, and compares. Nothing here is safe, fast or
durable; it is small enough to be read against that page.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from lbr.core.errors import Family
from lbr.core.types import JobState, RunState, Settlement
from lbr.store.leases import LOST_MS, MAX_CRASHES
from lbr.store.limits import is_ahead
from lbr.store.schema import SUSPECT_CRASHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Key(NamedTuple):
    """A job by its run's name and its prompt: what ids are called here."""

    run: str
    text: str


class Try(NamedTuple):
    """What is on record of a try that was no plain success."""

    claim_seq: int
    what: str
    family: str | None
    text: str | None
    at: int


@dataclass(frozen=True, slots=True)
class Job:
    """A job with its answer, None without one, and the job of another run that it came from."""

    available_at: int
    state: JobState = JobState.PENDING
    claim_seq: int = 0
    retry_seq: int = 0
    attempts: int = 0
    crashes: int = 0
    worker: int | None = None
    lease_until: int | None = None
    answer: str | None = None
    source: Key | None = None
    own: str | None = None
    tries: tuple[Try, ...] = ()

    def last_failure(self) -> Try | None:
        """Return the latest try that was this job's own, not a late one."""
        return next((one for one in reversed(self.tries) if one.what != "stale"), None)

    def is_told(self, claim_seq: int) -> bool:
        """Tell whether the end of that claim's call is on record."""
        return any(one.claim_seq == claim_seq and one.what != "crashed" for one in self.tries)

    def is_late(self, claim_seq: int) -> bool:
        """Tell whether that claim's call is on record as one that ended too late."""
        return any(one.claim_seq == claim_seq and one.what == "stale" for one in self.tries)


@dataclass(slots=True)
class ModelRun:
    """A run: its answerer, its state, and its inputs in order."""

    answerer: str
    state: RunState = RunState.ACTIVE
    items: list[str] = field(default_factory=list)


class RefusedError(Exception):
    """What the store is to refuse, changing nothing."""


class Expected(NamedTuple):
    """What a claim is to say of its job: fence, charges, and the bad answers and refusals since a retry by hand."""

    claim_seq: int
    attempts: int
    crashes: int
    bad_answers: int
    limited_tries: int


class Model:
    """The queue. Times are milliseconds, workers numbers; each method is one call of the store."""

    def __init__(self, answerers: dict[str, str]) -> None:
        self.runs = {name: ModelRun(answerer) for name, answerer in answerers.items()}
        self.jobs: dict[Key, Job] = {}
        """In the order of their ids."""
        self.cooldowns: dict[str, int] = {}

    def enqueue(self, now: int, name: str, place: int | None, texts: Sequence[str], *, reuse: bool) -> None:
        """Add inputs at a place; those that are there already must be the same."""
        run = self.runs[name]
        start = len(run.items) if place is None else place
        there = run.items[start : start + len(texts)]
        if there != list(texts[: len(there)]):
            raise RefusedError
        fresh = texts[len(there) :]
        if not fresh:
            return
        if run.state is RunState.CANCELLED:
            raise RefusedError
        added: dict[Key, Job] = {}
        for text in fresh:
            if (key := Key(name, text)) not in self.jobs:
                added[key] = self._new_job(now, key, reuse=reuse)
        self.jobs |= added
        run.items += fresh

    def _new_job(self, now: int, key: Key, *, reuse: bool) -> Job:
        answerer = self.runs[key.run].answerer
        for other, job in self.jobs.items() if reuse else ():
            same = other.text == key.text and self.runs[other.run].answerer == answerer
            if same and job.state is JobState.DONE and job.own is None:
                return Job(now, JobState.DONE, answer=job.answer, source=other)
        return Job(now)

    def claim(
        self, now: int, worker: int, names: Sequence[str], most: int, *, suspects: bool, lease_ms: int
    ) -> dict[Key, Expected]:
        """Take the jobs that are due, run by run, the longest due first."""
        taken: list[Key] = []
        for name in names:
            run = self.runs[name]
            if run.state is RunState.ACTIVE and not is_ahead(self.cooldowns.get(run.answerer, 0), now):
                due = [
                    key
                    for key, job in self.jobs.items()
                    if key.run == name
                    and job.state is JobState.PENDING
                    and job.available_at <= now
                    and (job.crashes >= SUSPECT_CRASHES) == suspects
                ]
                due.sort(key=lambda key: self.jobs[key].available_at)
                taken += due[: most - len(taken)]
        for key in taken:
            seq = self.jobs[key].claim_seq + 1
            self._set(key, state=JobState.INFLIGHT, claim_seq=seq, worker=worker, lease_until=now + lease_ms)
        return {key: _expected(self.jobs[key]) for key in taken}

    def settle(self, now: int, batch: Sequence[tuple[Key, Settlement]]) -> tuple[set[Key], set[Key]]:
        """Write down how calls ended; return the jobs whose outcome was taken, and those for which it came too late.

        What was settled before is again what it was then.
        """
        new = [(key, s) for key, s in batch if not self._is_repeated(key, s)]
        settled = [(key, s) for key, s in batch if self._is_repeated(key, s)]
        late = {key for key, s in settled if self.jobs[key].is_late(s.claim.claim_seq)}
        mine = [(key, s) for key, s in new if self._is_mine(key, s)]
        stale = [pair for pair in new if pair not in mine]
        for key, s in mine:
            self._take(now, key, s)
        for key, s in stale:
            self._record(now, key, s, "stale")
        for key, s in mine:
            run = self.runs[key.run]
            if s.pause is not None and run.state is RunState.ACTIVE:
                run.state = RunState.PAUSED
            if s.cool_down:
                before = self.cooldowns.get(run.answerer, 0)
                self.cooldowns[run.answerer] = max(before, now + s.wait_ms)
        taken = {key for key, s in settled if not self.jobs[key].is_late(s.claim.claim_seq)}
        return {key for key, _ in mine} | taken, {key for key, _ in stale} | late

    def _is_mine(self, key: Key, s: Settlement) -> bool:
        job = self.jobs[key]
        if job.claim_seq != s.claim.claim_seq:
            return False
        if job.state is JobState.PENDING and job.retry_seq == job.claim_seq:  # put back by hand
            return s.outcome.failure is None
        return job.state in {JobState.INFLIGHT, JobState.PENDING}

    def _is_repeated(self, key: Key, s: Settlement) -> bool:
        job = self.jobs[key]
        done = job.state is JobState.DONE and job.claim_seq == s.claim.claim_seq
        return job.is_told(s.claim.claim_seq) or (done and s.outcome.failure is None)

    def _take(self, now: int, key: Key, s: Settlement) -> None:
        if s.outcome.failure is not None:
            self._record(now, key, s, "retried" if s.state is JobState.PENDING else "failed")
        self._set(
            key,
            state=self._resting(key) if s.state is JobState.PENDING else s.state,
            available_at=now + s.wait_ms,
            attempts=self.jobs[key].attempts + s.charge,
            worker=None,
            lease_until=None,
            answer=s.outcome.reply.text if s.outcome.reply else None,
        )

    def _record(self, now: int, key: Key, s: Settlement, what: str) -> None:
        failure, reply = s.outcome.failure, s.outcome.reply
        text = failure.text if failure else reply.text if reply else None
        self._add_try(key, Try(s.claim.claim_seq, what, failure.family if failure else None, text, now))

    def renew(self, now: int, worker: int, held: dict[Key, int], *, lease_ms: int) -> set[Key]:
        """Extend leases, and take lapsed ones up again; return the jobs that are lost.

        What the worker does not hold any more, although it has claimed it some time ago, goes back.
        """
        lost = set()
        before = now + lease_ms - min(LOST_MS, lease_ms // 2)
        for key, job in self.jobs.items():
            ours = job.state is JobState.INFLIGHT and job.worker == worker and key not in held
            if ours and (job.lease_until or 0) < before:
                self._set(key, state=self._resting(key), worker=None, lease_until=None)
        for key, seq in held.items():
            job = self.jobs[key]
            if job.worker == worker and job.state is JobState.INFLIGHT:
                # Also where the worker has claimed the job anew itself: it lives.
                self._set(key, lease_until=now + lease_ms)
            elif job.worker == worker and job.state is JobState.PENDING and job.claim_seq == seq:
                until = now + lease_ms
                self._set(key, state=JobState.INFLIGHT, crashes=job.crashes - 1, lease_until=until)
            if self.jobs[key].state is not JobState.INFLIGHT or job.worker != worker or job.claim_seq != seq:
                lost.add(key)
        return lost

    def release(self, worker: int, held: dict[Key, int]) -> int:
        """Give claims back; return how many were still held."""
        back = [
            key
            for key, seq in held.items()
            if (self.jobs[key].state, self.jobs[key].worker, self.jobs[key].claim_seq)
            == (JobState.INFLIGHT, worker, seq)
        ]
        for key in back:
            self._set(key, state=self._resting(key), worker=None, lease_until=None)
        return len(back)

    def reclaim(self, now: int) -> dict[Key, JobState]:
        """Take back what leases ran out for; return where each job went."""
        back = {}
        for key, job in self.jobs.items():
            if job.state is JobState.INFLIGHT and job.lease_until is not None and job.lease_until < now:
                deadly = job.crashes + 1 >= MAX_CRASHES
                back[key] = JobState.FAILED if deadly else self._resting(key)
        for key, state in back.items():
            self._add_try(key, Try(self.jobs[key].claim_seq, "crashed", None, None, now))
            crashes = self.jobs[key].crashes + 1
            self._set(key, state=state, crashes=crashes, available_at=now, lease_until=None)
        return back

    def cancel(self, name: str) -> int:
        """Cancel a run and its pending jobs; return how many."""
        self.runs[name].state = RunState.CANCELLED
        pending = [key for key, job in self.jobs.items() if key.run == name and job.state is JobState.PENDING]
        for key in pending:
            self._set(key, state=JobState.CANCELLED)
        return len(pending)

    def retry(self, now: int, name: str, condition: str | None, own: str | None) -> int:
        """Put jobs back by hand with all their tries; return how many."""
        run = self.runs[name]
        if run.state is RunState.CANCELLED:
            run.state = RunState.ACTIVE
        back = self.chosen(name, condition)
        for key in back:
            job = self.jobs[key]
            if job.answer is not None:
                self._add_try(key, Try(job.claim_seq, "retried", None, job.answer, now))
            again = {"state": JobState.PENDING, "available_at": now, "attempts": 0, "crashes": 0}
            self._set(key, **again, retry_seq=job.claim_seq, worker=None, answer=None, source=None)
            if own is not None:
                self._set(key, own=own)
        return len(back)

    def chosen(self, name: str, condition: str | None) -> list[Key]:
        """Return the jobs of a run that a retry by hand would put back."""
        return [key for key, job in self.jobs.items() if key.run == name and _is_chosen(job, condition)]

    def reparse(self, name: str, fits: Callable[[str], bool]) -> tuple[int, int]:
        """Take kept bad answers that fit now; return how many did, and how many did not."""
        taken = left = 0
        for key, job in list(self.jobs.items()):
            last = job.last_failure()
            bad = last is not None and last.family == Family.BAD_ANSWER
            if key.run == name and job.state is JobState.FAILED and last and bad and last.text is not None:
                if fits(last.text):
                    self._set(key, state=JobState.DONE, answer=last.text)
                    taken += 1
                else:
                    left += 1
        return taken, left

    def set_state(self, name: str, state: RunState) -> None:
        """Pause or resume a run."""
        if self.runs[name].state is RunState.CANCELLED:
            raise RefusedError
        self.runs[name].state = state

    def _resting(self, key: Key) -> JobState:
        cancelled = self.runs[key.run].state is RunState.CANCELLED
        return JobState.CANCELLED if cancelled else JobState.PENDING

    def _add_try(self, key: Key, one: Try) -> None:
        self._set(key, tries=(*self.jobs[key].tries, one))

    def _set(self, key: Key, **values: object) -> None:
        self.jobs[key] = replace(self.jobs[key], **values)  # type: ignore[arg-type]


def _is_chosen(job: Job, condition: str | None) -> bool:
    if condition is None:
        return job.state in {JobState.FAILED, JobState.CANCELLED}
    name, _, value = condition.partition("=")
    if name == "status":
        return job.state == value
    last = job.last_failure()
    return job.state is JobState.FAILED and last is not None and last.family == value


def _expected(job: Job) -> Expected:
    # What came too late changes nothing, so it is not counted here either.
    own = (one for one in job.tries if one.claim_seq > job.retry_seq and one.what != "stale")
    since = [one.family for one in own]
    bad, limited = since.count(Family.BAD_ANSWER), since.count(Family.RATE_LIMITED)
    return Expected(job.claim_seq, job.attempts, job.crashes, bad, limited)


def broken_promises(before: dict[Key, Job], after: dict[Key, Job], *, by_hand: bool) -> Iterable[str]:
    """Yield what one step broke of what holds whatever the model says; `by_hand` is a person's retry."""
    for key, job in before.items():
        now = after.get(key)
        if now is None:
            yield f"{key} is lost"
            continue
        if now.claim_seq < job.claim_seq:
            yield f"{key}: claim_seq went back from {job.claim_seq} to {now.claim_seq}"
        if job.answer is not None and not by_hand and (now.answer, now.source) != (job.answer, job.source):
            yield f"{key}: its answer {job.answer!r} became {now.answer!r}"
    for key, job in after.items():
        if (job.state is JobState.DONE) != (job.answer is not None):
            yield f"{key} is {job.state}, with the answer {job.answer!r}"
        if (job.state is JobState.INFLIGHT) != (job.lease_until is not None):
            yield f"{key} is {job.state}, with a lease until {job.lease_until}"
