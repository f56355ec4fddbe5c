"""Outages, wrong keys and wrong set-ups in the queue, on both databases: who waits, who probes, what is charged."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from lbr.core.errors import Family, Symptom
from lbr.core.outages import FIRST_WAIT_MS, TURN_MS, Evidence
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import Failure, JobState, Outcome, PauseCause, Paused, RunState, Task
from lbr.store import reads, runs
from lbr.store.settle import settle
from tests.support import Queue, answered, assert_counted, job_row, put, states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.core.types import Claim, Settlement, WorkerId
    from lbr.store.database import Database
    from tests.support import Clock

MODEL = Task(model="openai-chat:m")


def refused(
    claim: Claim,
    symptom: Symptom | None = Symptom.UNREACHABLE,
    *,
    family: Family = Family.TRANSIENT,
    evidence: Evidence | None = None,
    message: str = "Connection refused",
) -> Settlement:
    """Return the settlement of a call that was refused."""
    failure = Failure(family, "SomeError", message, symptom=symptom)
    return decide(claim, Outcome(None, failure, 5), RetryPolicy(), Random(1), evidence)


def seen_by(worker: WorkerId, *, patience_ms: int = 3_600_000) -> Evidence:
    """Return what a worker saw that has had no success yet."""
    return Evidence(
        worker,
        refusals=5,
        jobs=3,
        first_ms=500,
        unsuccessful_ms=10_000,
        succeeded=False,
        patience_ms=patience_ms,
    )


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue with two workers that report."""
    queue = Queue(database)
    first, second = [await queue.register(host="h", pid=1, concurrency=4) for _ in range(2)]
    return queue, first, second


async def recognise(database: Database, queue: Queue, worker: WorkerId, run_id: int) -> Sequence[Claim]:
    """Let a worker see an outage on four claims; return them."""
    claims = await queue.claim(worker, [run_id], 4, lease=60)  # type: ignore[list-item]
    await database.write(settle, [refused(claim, evidence=seen_by(worker)) for claim in claims])
    return claims


async def test_all_wait_and_one_probes(database: Database, clock: Clock) -> None:
    """While a model is away no worker claims its jobs, then one at a time; no job is charged."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, other = await two_workers(database)
    claims = await recognise(database, queue, one, run.id)
    for claim in claims:
        row = await job_row(database, claim.job_id)
        assert (row.state, row.attempts) == ("pending", 0)
    assert await queue.claim(other, [run.id], 4, lease=60) == []
    assert not (await queue.check_due([run.id], worker=other)).due
    clock.forward(FIRST_WAIT_MS / 1000 + 0.001)
    assert (await queue.check_due([run.id], worker=other)).due
    (probe,) = await queue.claim(other, [run.id], 4, lease=60)
    assert probe.probe
    assert await queue.claim(one, [run.id], 4, lease=60) == []
    clock.forward(30)
    assert await queue.claim(one, [run.id], 4, lease=60) == []
    settled = await database.write(settle, [answered(probe)])
    assert settled.notices == ["openai-chat:m answers again, after 31.0 s"]
    assert len(await queue.claim(one, [run.id], 4, lease=60)) == 4
    await assert_counted(database, run)


async def test_the_worker_that_failed_last_probes_last(database: Database, clock: Clock) -> None:
    """A worker with a better network gets the first turn; with no other worker there, it is no wait."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, _ = await two_workers(database)
    await recognise(database, queue, one, run.id)
    clock.forward(FIRST_WAIT_MS / 1000 + 0.001)
    assert await queue.claim(one, [run.id], 4, lease=60) == []
    clock.forward(TURN_MS / 1000)
    assert len(await queue.claim(one, [run.id], 4, lease=60)) == 1


async def test_a_probe_whose_worker_died_is_made_again(database: Database, clock: Clock) -> None:
    """When the probe's job is taken back, the next probe may begin."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, other = await two_workers(database)
    await recognise(database, queue, one, run.id)
    clock.forward(2)
    (probe,) = await queue.claim(other, [run.id], 4, lease=1)
    clock.forward(8)
    assert await queue.claim(one, [run.id], 4, lease=60) == []
    assert [back.job_id for back in await queue.reclaim()] == [probe.job_id]
    (again,) = await queue.claim(one, [run.id], 4, lease=60)
    assert again.probe


async def test_patience_pauses_all_runs_of_the_model_and_resume_forgets(database: Database, clock: Clock) -> None:
    """After so much waiting each run of the model is paused with the reason; resume begins from nothing."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    second = await put(database, ["q"], name="second", task=MODEL)
    await put(database, [], name="finished", task=MODEL)
    queue, one, other = await two_workers(database)
    claims = await queue.claim(one, [run.id], 4, lease=60)
    await database.write(settle, [refused(c, evidence=seen_by(one, patience_ms=2_000)) for c in claims])
    clock.forward(2)
    (probe,) = await queue.claim(other, [run.id], 4, lease=60)
    settled = await database.write(settle, [refused(probe)])
    reason = "openai-chat:m could not be reached in 1.0 s of waits: Connection refused"
    assert settled.paused == dict.fromkeys(["r", "second"], Paused(PauseCause.OUTAGE, reason))
    assert await states(database, run) == {"pending": 10}
    for name in (run, second):
        assert (await database.write(runs.resume, name)).state is RunState.ACTIVE
    assert len(await queue.claim(one, [run.id], 4, lease=60)) == 4


async def test_a_worker_that_alone_fails_is_told(database: Database, clock: Clock) -> None:
    """After another worker's probe succeeded, further evidence of the first is about that worker alone."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, other = await two_workers(database)
    await recognise(database, queue, one, run.id)
    clock.forward(2)
    (probe,) = await queue.claim(other, [run.id], 4, lease=60)
    await database.write(settle, [answered(probe)])
    clock.forward(1)
    claims = await queue.claim(one, [run.id], 2, lease=60)
    settled = await database.write(settle, [refused(c, evidence=seen_by(one)) for c in claims])
    assert settled.unreachable == {"openai-chat:m": "Connection refused"}
    assert len(await queue.claim(other, [run.id], 4, lease=60)) == 4
    assert [(await job_row(database, claim.job_id)).attempts for claim in claims] == [0, 0]


async def test_a_denied_probe_pauses_the_run(database: Database, clock: Clock) -> None:
    """A key that lets no call in pauses the run with the provider's words, and charges no job."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, other = await two_workers(database)
    denied = {"symptom": Symptom.DENIED, "family": Family.PERMANENT, "message": "Incorrect API key"}
    claims = await queue.claim(one, [run.id], 4, lease=60)
    await database.write(settle, [refused(c, evidence=seen_by(one), **denied) for c in claims])  # type: ignore[arg-type]
    clock.forward(2)
    (probe,) = await queue.claim(other, [run.id], 4, lease=60)
    settled = await database.write(settle, [refused(probe, **denied)])  # type: ignore[arg-type]
    assert settled.paused == {"r": Paused(PauseCause.ACCOUNT, "SomeError: Incorrect API key")}
    assert await states(database, run) == {"pending": 10}
    assert not (await job_row(database, probe.job_id)).attempts


async def test_a_stray_401_is_tried_once_more_then_the_job_fails(database: Database, clock: Clock) -> None:
    """Among calls that succeed, a denied call is charged to its job, and its second denial is final."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=4)
    first, second = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(settle, [answered(first)])
    seen = Evidence(worker, 1, 1, 5, 5, succeeded=True, patience_ms=1_000)
    await database.write(settle, [refused(second, Symptom.DENIED, family=Family.PERMANENT, evidence=seen)])
    assert (await job_row(database, second.job_id)).state == "pending"
    clock.forward(5)
    again = [c for c in await queue.claim(worker, [run.id], 10, lease=60) if c.job_id == second.job_id]
    await database.write(settle, [refused(again[0], Symptom.DENIED, family=Family.PERMANENT, evidence=seen)])
    row = await job_row(database, second.job_id)
    assert (row.state, row.attempts) == ("failed", 2)


@pytest.mark.parametrize("jobs", [3, 40])
async def test_a_run_whose_first_calls_all_fail_alike_is_paused(database: Database, jobs: int) -> None:
    """A wrong model name pauses the run after 20 calls, or all if there are fewer; the jobs are as before."""
    run = await put(database, [f"p{n}" for n in range(jobs)], task=MODEL)
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=64)
    claims = await queue.claim(worker, [run.id], min(jobs, 30), lease=60)
    failures = [
        refused(c, Symptom.SET_UP, family=Family.PERMANENT, message=f"no such model, request {n}")
        for n, c in enumerate(claims)
    ]
    paused: dict[str, Paused] = {}
    for start in range(0, len(failures), 10):
        paused |= (await database.write(settle, failures[start : start + 10])).paused
    assert paused["r"].cause is PauseCause.SET_UP
    assert "no such model" in paused["r"].message
    assert await states(database, run) == {"pending": jobs}
    assert {(await job_row(database, claim.job_id)).attempts for claim in claims} == {0}
    await assert_counted(database, run)


async def test_other_failures_do_not_pause_a_run(database: Database) -> None:
    """Prompts that are too long, unlike failures, or failures beside answers fail the jobs that they are of."""
    run = await put(database, [f"p{n}" for n in range(60)], task=MODEL)
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=64)
    claims = await queue.claim(worker, [run.id], 60, lease=60)
    alike = [refused(c, Symptom.SET_UP, family=Family.PERMANENT, message="no") for c in claims]
    too_long = [refused(c, None, family=Family.PERMANENT, message="no") for c in claims[:25]]
    unlike = [
        refused(c, Symptom.SET_UP, family=Family.PERMANENT, message="ab"[n % 2] * (n + 1))
        for n, c in enumerate(claims[25:35])
    ]
    assert (await database.write(settle, [*too_long, *unlike])).paused == {}
    await database.write(settle, [answered(claims[35])])
    assert (await database.write(settle, alike[36:])).paused == {}
    assert await states(database, run) == {"done": 1, "failed": 59}


async def test_status_tells_of_an_outage(database: Database, clock: Clock) -> None:
    """The overview has the model, since when, why, and when the next probe may begin."""
    run = await put(database, [f"p{n}" for n in range(10)], task=MODEL)
    queue, one, _ = await two_workers(database)
    await recognise(database, queue, one, run.id)
    (seen,) = (await database.read(reads.overview)).outages
    assert seen == reads.OutageSeen("openai-chat:m", "Connection refused", 0.0, FIRST_WAIT_MS / 1000)
    assert JobState.PENDING in await states(database, run)
