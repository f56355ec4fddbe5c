"""The protocol of claims and leases, small enough to go through every interleaving of it.

Workers claim jobs, call, settle, renew and release; they die, are started anew, or stop and wake up late; leases
run out and are reclaimed; a person cancels and retries. Each step is one transaction of the store, or something that
happens between two. What the store decides in plain functions is decided by these here too: `settle.is_mine`, the
fence, `settle.is_repeated`, `retry.decide` and `runs.resting_state`. What it decides in SQL is said here once more,
and `tests/proofs/test_protocol.py` compares each step of a worker with the statements, row by row.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from lbr.core.errors import Family
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import (
    Claim,
    Failure,
    JobId,
    JobState,
    Outcome,
    Prompt,
    Reply,
    RunId,
    RunState,
    Settlement,
)
from lbr.store.leases import MAX_CRASHES
from lbr.store.runs import resting_state
from lbr.store.schema import SUSPECT_CRASHES
from lbr.store.settle import is_repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Fence = Callable[[Settlement, Any], bool]

PENDING, INFLIGHT, DONE = JobState.PENDING, JobState.INFLIGHT, JobState.DONE
AT_END = frozenset({DONE, JobState.FAILED, JobState.CANCELLED})
GONE = -1
POLICY = RetryPolicy(max_attempts=3)
FAILURE = Failure(Family.TRANSIENT, "ServerError", "503")


class Job(NamedTuple):
    """A row of jobs, with `results`: the claims whose answers were written, which must never be two.

    `lapsed` says that its lease ran out, `told` the claims whose call's end is on record, `calls` how many began.
    """

    state: JobState = PENDING
    claim_seq: int = 0
    retry_seq: int = 0
    attempts: int = 0
    crashes: int = 0
    worker: int | None = None
    lapsed: bool = False
    results: tuple[int, ...] = ()
    told: frozenset[int] = frozenset()
    calls: int = 0


class Call(NamedTuple):
    """A claim that a worker holds; `end` is how its call ended, empty as long as it has not."""

    job: int
    claim_seq: int
    attempts: int
    end: str = ""


class Worker(NamedTuple):
    """A process: awake, asleep (stopped, it will wake up late) or dead."""

    id: int
    mode: str = "awake"
    calls: tuple[Call, ...] = ()


class Budget(NamedTuple):
    """How often what goes wrong, or is done by hand, may still happen: this is what makes the states finite."""

    deaths: int = 0
    sleeps: int = 0
    failures: int = 0
    repeats: int = 0
    releases: int = 0
    cancels: int = 0
    retries: int = 0

    def spent(self, full: Budget) -> int:
        """Return how many calls more than one a job may have cost by now."""
        charged = ("deaths", "sleeps", "failures", "releases", "retries")
        return sum(getattr(full, name) - getattr(self, name) for name in charged)


class World(NamedTuple):
    """Everything: jobs of one run, workers, the run's state, and what may still go wrong."""

    jobs: tuple[Job, ...]
    workers: tuple[Worker, ...]
    budget: Budget
    run: RunState = RunState.ACTIVE


class Step(NamedTuple):
    """One step in words, with the job that it is about, None for none, and where it leads."""

    kind: str
    words: str
    world: World
    job: int | None = None


# What goes on as long as somebody keeps working; nobody has to wake up, to be started or to step in for it.
WORKING = frozenset({"claim", "answer", "fail", "settle", "renew", "lapse", "reclaim"})


def steps(world: World, fence: Fence) -> Iterator[Step]:
    """Yield every step that may come next."""
    for n, worker in enumerate(world.workers):
        name = f"worker {worker.id}"
        if worker.mode == "awake":
            yield from _work(world, n, name, fence)
            if world.budget.deaths:
                yield Step("die", f"{name} dies", _spend(_without(world, n), "deaths"))
            if world.budget.sleeps:
                asleep = worker._replace(mode="asleep")
                yield Step("sleep", f"{name} is stopped", _spend(_put(world, n, asleep), "sleeps"))
        elif worker.mode == "asleep":
            yield Step("wake", f"{name} wakes up", _put(world, n, worker._replace(mode="awake")))
        else:
            yield Step("start", f"{name} is started anew", _put(world, n, Worker(worker.id)))
    yield from _time(world)
    yield from _person(world)


def _without(world: World, n: int) -> World:
    """Return what a worker's death leaves: whoever is started in its place has another id."""
    gone = world.workers[n].id
    jobs = tuple(job._replace(worker=GONE) if job.worker == gone else job for job in world.jobs)
    return _put(world._replace(jobs=jobs), n, Worker(gone, "dead"))


def _work(world: World, n: int, name: str, fence: Fence) -> Iterator[Step]:
    """Yield what a worker that is awake may do."""
    worker = world.workers[n]
    for j, job in enumerate(world.jobs):
        if may_claim(world, worker, job):
            call = Call(j, job.claim_seq + 1, job.attempts)
            there = _put(_set(world, j, claimed(job, worker.id)), n, _holding(worker, call))
            yield Step("claim", f"{name} claims job {j}, claim {call.claim_seq}", there, j)
        if job.state is INFLIGHT and job.lapsed:
            yield Step("reclaim", f"{name} reclaims job {j}", _set(world, j, reclaimed(job, world.run)), j)
    for call in worker.calls:
        what = f"job {call.job}, claim {call.claim_seq}"
        if call.end:
            yield from _settling(world, n, call, f"{name} settles {what}: {call.end}", fence)
        else:
            yield from _calling(world, n, call, what)
    if worker.calls:
        yield Step("renew", f"{name} renews", _renew(world, n))


def _settling(world: World, n: int, call: Call, words: str, fence: Fence) -> Iterator[Step]:
    """Yield how an ended call is settled, perhaps without hearing that it was, so that it comes again."""
    settled, worker = _settle(world, call, fence), world.workers[n]
    yield Step("settle", words, _put(settled, n, _dropping(worker, call)), call.job)
    if world.budget.repeats:
        yield Step("settle", f"{words}, and does not hear so", _spend(settled, "repeats"), call.job)


def _calling(world: World, n: int, call: Call, what: str) -> Iterator[Step]:
    """Yield how a call may end."""
    worker = world.workers[n]
    less = _dropping(worker, call)
    answered = _put(world, n, _holding(less, call._replace(end="answer")))
    yield Step("answer", f"the call of {what} ends: answer", answered, call.job)
    if world.budget.failures:
        failed = _put(world, n, _holding(less, call._replace(end="fail")))
        yield Step("fail", f"the call of {what} ends: fail", _spend(failed, "failures"), call.job)
    if world.budget.releases:
        back = released(world.jobs[call.job], worker.id, call.claim_seq, world.run)
        there = _put(_set(world, call.job, back), n, less)
        yield Step("release", f"worker {worker.id} releases {what}", _spend(there, "releases"), call.job)


def _holding(worker: Worker, call: Call) -> Worker:
    return worker._replace(calls=tuple(sorted((*worker.calls, call))))


def _dropping(worker: Worker, call: Call) -> Worker:
    return worker._replace(calls=tuple(one for one in worker.calls if one != call))


def claimed(job: Job, worker: int) -> Job:
    """Return a pending job with a worker's claim of it, whose call begins."""
    return job._replace(state=INFLIGHT, claim_seq=job.claim_seq + 1, worker=worker, calls=job.calls + 1)


def may_claim(world: World, worker: Worker, job: Job) -> bool:
    """Tell whether a worker may claim a job: one that killed its workers is run alone, when nothing else is due."""
    if world.run is not RunState.ACTIVE or job.state is not PENDING:
        return False
    others = any(one.state is PENDING and one.crashes < SUSPECT_CRASHES for one in world.jobs)
    return job.crashes < SUSPECT_CRASHES or not (worker.calls or others)


def reclaimed(job: Job, run: RunState) -> Job:
    """Return an inflight job whose lease ran out, taken back: at the last crash it fails."""
    crashes = job.crashes + 1
    state = JobState.FAILED if crashes >= MAX_CRASHES else resting_state(run)
    return job._replace(state=state, crashes=crashes, lapsed=False)


def renewed(job: Job, worker: int, claim_seq: int) -> Job:
    """Return a job after its worker renewed this claim: a lapsed one that nobody has claimed since is held again."""
    if job.worker != worker or job.state not in {INFLIGHT, PENDING}:
        return job
    if job.state is INFLIGHT:
        return job._replace(lapsed=False)
    return job._replace(state=INFLIGHT, crashes=job.crashes - 1) if job.claim_seq == claim_seq else job


def _renew(world: World, n: int) -> World:
    """Renew what a worker holds; a call whose claim is lost is cancelled, unless it has ended."""
    worker = world.workers[n]
    kept = []
    for call in worker.calls:
        job = renewed(world.jobs[call.job], worker.id, call.claim_seq)
        world = _set(world, call.job, job)
        if is_held(job, worker.id, call.claim_seq) or call.end:
            kept.append(call)
    return _put(world, n, worker._replace(calls=tuple(kept)))


def is_held(job: Job, worker: int, claim_seq: int) -> bool:
    """Tell whether a worker holds a job by this claim."""
    return (job.state, job.worker, job.claim_seq) == (INFLIGHT, worker, claim_seq)


def released(job: Job, worker: int, claim_seq: int, run: RunState) -> Job:
    """Return a job after its worker gave this claim back."""
    if not is_held(job, worker, claim_seq):
        return job
    return job._replace(state=resting_state(run), worker=None, lapsed=False)


@cache
def settlement_of(job: int, claim_seq: int, attempts: int, end: str) -> Settlement:
    """Return what is to be written about a call, as the worker decides it."""
    claim = Claim(JobId(job), RunId(1), claim_seq, attempts, 0, Prompt(text=""), key=b"")
    reply = Reply(f"claim {claim_seq}") if end == "answer" else None
    return decide(claim, Outcome(reply, None if reply else FAILURE, 1), POLICY, Random(1))


def _settle(world: World, call: Call, fence: Fence) -> World:
    job, settlement = world.jobs[call.job], settlement_of(*call)
    row: Any = job
    if is_repeated(settlement, row, {(call.job, seq) for seq in job.told}):
        return world
    if not fence(settlement, row):
        return _set(world, call.job, job._replace(told=job.told | {call.claim_seq}))
    state = settlement.state if settlement.state is not PENDING else resting_state(world.run)
    answered = settlement.outcome.reply is not None
    after = job._replace(
        state=state,
        attempts=job.attempts + settlement.charge,
        worker=None,
        lapsed=False,
        results=(*job.results, call.claim_seq) if answered else job.results,
        told=job.told if answered else job.told | {call.claim_seq},
    )
    return _set(world, call.job, after)


def _time(world: World) -> Iterator[Step]:
    """Yield the ends of leases that nobody renews: their worker is dead or stopped."""
    renewing = {one.id for one in world.workers if one.mode == "awake"}
    for j, job in enumerate(world.jobs):
        if job.state is INFLIGHT and not job.lapsed and job.worker not in renewing:
            yield Step("lapse", f"the lease of job {j} runs out", _set(world, j, job._replace(lapsed=True)), j)


def _person(world: World) -> Iterator[Step]:
    """Yield what is done by hand to the run, and to the jobs that have come to their end."""
    if world.budget.cancels and world.run is RunState.ACTIVE:
        jobs = tuple(job._replace(state=JobState.CANCELLED) if job.state is PENDING else job for job in world.jobs)
        there = world._replace(jobs=jobs, run=RunState.CANCELLED)
        yield Step("cancel", "the run is cancelled", _spend(there, "cancels"))
    for j, job in enumerate(world.jobs):
        if world.budget.retries and job.state in AT_END:
            # An answer that is redone goes to the history: its claim is on record from then on.
            told = job.told | {job.claim_seq} if job.results else job.told
            again = job._replace(
                state=PENDING,
                retry_seq=job.claim_seq,
                attempts=0,
                crashes=0,
                worker=None,
                results=(),
                told=told,
            )
            there = _set(world, j, again)._replace(run=RunState.ACTIVE)
            yield Step("retry", f"job {j} is put back by hand", _spend(there, "retries"), j)


def _set(world: World, j: int, job: Job) -> World:
    return world._replace(jobs=(*world.jobs[:j], job, *world.jobs[j + 1 :]))


def _put(world: World, n: int, worker: Worker) -> World:
    return world._replace(workers=(*world.workers[:n], worker, *world.workers[n + 1 :]))


def _spend(world: World, what: str) -> World:
    budget = world.budget
    return world._replace(budget=budget._replace(**{what: getattr(budget, what) - 1}))
