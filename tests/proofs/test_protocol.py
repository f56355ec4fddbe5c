"""The model of the protocol: every promise in every state of it, and its rules against the statements of the store."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, select, update

from lbr.core.types import Claim, JobId, JobState, Prompt, RunState, WorkerId
from lbr.store import schema
from lbr.store.leases import MAX_CRASHES
from lbr.store.schema import SUSPECT_CRASHES
from lbr.store.settle import SETTLE, is_mine
from tests.proofs import protocol
from tests.proofs import protocol_rules as rules
from tests.proofs.protocol import search
from tests.proofs.protocol_rules import Budget, Job
from tests.support import Clock, Queue, put

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection

    from lbr.core.types import Millis, Run
    from lbr.store.database import Database

STATES = tuple(JobState)
OURS, OTHER = 0, 1
TWO_RESULTS = (
    "worker 0 claims job 0, claim 1",
    "the call of job 0, claim 1 ends: answer",
    "worker 0 is stopped",
    "the lease of job 0 runs out",
    "worker 0 wakes up",
    "worker 0 reclaims job 0",
    "worker 0 claims job 0, claim 2",
    "the call of job 0, claim 2 ends: answer",
    "worker 0 settles job 0, claim 2: answer",
    "worker 0 settles job 0, claim 1: answer",
)


@pytest.mark.parametrize(("title", "jobs", "budget"), protocol.SHORT, ids=[one[0] for one in protocol.SHORT])
def test_every_promise_holds_in_every_state(title: str, jobs: int, budget: Budget) -> None:
    """No interleaving breaks a promise, and from each state somebody's work brings every job to its end."""
    found = search(budget, jobs=jobs)
    print(f"{title}: {found.states} states")
    assert (found.problem, found.trace) == (None, ())
    assert found.states > 1_000


def test_without_the_fence_there_are_two_results() -> None:
    """Without the fence the search finds the shortest way to a second result, by way of a zombie."""
    found = search(Budget(deaths=1, sleeps=1), fence=protocol.no_fence, promise=protocol.TWO_RESULTS)
    assert found.problem == "job 0 has two results"
    assert found.trace == TWO_RESULTS


def test_without_the_claims_number_a_zombie_settles_anothers_claim() -> None:
    """A fence that does not compare claim_seq lets a late answer in where another claim holds the job."""
    found = search(Budget(deaths=1, sleeps=1), fence=protocol.without_number)
    assert found.problem == "claim 1 settled job 0, which claim 2 has"
    assert found.trace[-1] == "worker 0 settles job 0, claim 1: answer"


def every_job(*, crashes: Iterable[int] = (0,)) -> list[Job]:
    """Return rows in every state, of our claim 1 or of claim 2, put back by hand or not, in time or lapsed."""
    return [
        Job(state, seq, retry, 0, crash, worker, lapsed)
        for state, seq, retry, crash, worker, lapsed in product(
            STATES, (1, 2), (0, 1, 2), crashes, (OURS, OTHER, None), (False, True)
        )
        if retry <= seq
        and (state is JobState.INFLIGHT) >= lapsed
        and (state is JobState.INFLIGHT) <= (worker is not None)
    ]


async def stored(database: Database, clock: Clock, rows: list[Job]) -> tuple[Run, list[int], list[WorkerId]]:
    """Write such rows into a run; return the run, their ids and those of the two workers."""
    run = await put(database, [f"p{n}" for n in range(len(rows))])
    queue = Queue(database)
    workers = [await queue.register(host="h", pid=n, concurrency=1) for n in (OURS, OTHER)]

    def work(connection: Connection, _now: Millis) -> list[int]:
        ids = list(connection.execute(select(schema.jobs.c.id).order_by(schema.jobs.c.id)).scalars())
        for job_id, row in zip(ids, rows, strict=True):
            values: dict[str, Any] = {
                "state": row.state,
                "claim_seq": row.claim_seq,
                "retry_seq": row.retry_seq,
                "crashes": row.crashes,
                "worker_id": None if row.worker is None else workers[row.worker],
                "lease_until": clock.now + (-1 if row.lapsed else 1) if row.state == "inflight" else None,
            }
            connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(**values))
        _recount(connection, run, rows)
        return ids

    return run, await database.write(work), workers


def _recount(connection: Connection, run: Run, rows: list[Job]) -> None:
    connection.execute(schema.counters.delete())
    for state in STATES:
        count = sum(row.state is state for row in rows)
        values = {"run_id": run.id, "name": state, "shard": 0, "value": count}
        connection.execute(insert(schema.counters).values(**values))


async def read_back(database: Database, clock: Clock, ids: list[int], workers: list[WorkerId]) -> list[Job]:
    """Return the rows as they are now."""
    query = select(schema.jobs).where(schema.jobs.c.id.in_(ids)).order_by(schema.jobs.c.id)
    found = (await database.read(lambda connection, _: connection.execute(query))).all()
    return [
        Job(
            JobState(row.state),
            row.claim_seq,
            row.retry_seq,
            row.attempts,
            row.crashes,
            None if row.worker_id is None else workers.index(row.worker_id),
            row.lease_until is not None and row.lease_until < clock.now,
        )
        for row in found
    ]


def claim_1(job_id: int, run: Run) -> Claim:
    """Return our claim of a job: its first."""
    return Claim(JobId(job_id), run.id, 1, 0, 0, Prompt(text=""), b"")


async def test_the_statement_that_settles_goes_by_the_fence(database: Database, clock: Clock) -> None:
    """The SQL lets through what `is_mine` does; beyond it only failures of the past, which `is_mine` keeps back."""
    rows = every_job()
    _, ids, _ = await stored(database, clock, rows)

    def is_taken(connection: Connection, job_id: int) -> bool:
        given = {"job": job_id, "seq": 1, "to": "done", "available": 0, "charge": 1, "finished": clock.now}
        return SETTLE.run(connection, [given]) == 1

    def work(connection: Connection, _now: Millis) -> list[bool]:
        return [is_taken(connection, job_id) for job_id in ids]

    taken = await database.write(work)
    answer, failure = (rules.settlement_of(0, 1, 0, end) for end in ("answer", "fail"))
    assert taken == [is_mine(answer, row) for row in rows]  # type: ignore[arg-type]
    past = [job.state is JobState.PENDING and job.retry_seq == job.claim_seq for job in rows]
    late = [is_mine(failure, row) for row in rows]  # type: ignore[arg-type]
    assert late == [one and not put_back for one, put_back in zip(taken, past, strict=True)]


@pytest.mark.parametrize("run_state", RunState)
async def test_reclaim_goes_by_the_rule(database: Database, clock: Clock, run_state: RunState) -> None:
    """The store takes back what the model takes back, and puts it where the model does."""
    rows = every_job(crashes=range(MAX_CRASHES))
    _, ids, workers = await stored(database, clock, rows)
    setting = update(schema.runs).values(state=run_state)
    await database.write(lambda connection, _: connection.execute(setting))
    while await Queue(database).reclaim():
        pass
    expected = [rules.reclaimed(row, run_state) if row.lapsed else row for row in rows]
    assert await read_back(database, clock, ids, workers) == expected


async def test_renew_goes_by_the_rule(database: Database, clock: Clock) -> None:
    """The store extends and takes up again what the model does, and tells our worker of what it has lost."""
    rows = every_job(crashes=(1,))
    run, ids, workers = await stored(database, clock, rows)
    claims = [claim_1(job_id, run) for job_id in ids]
    lost = await Queue(database).renew(workers[OURS], claims, lease=60, settled=0, rate=0.0)
    expected = [rules.renewed(row, OURS, 1) for row in rows]
    assert await read_back(database, clock, ids, workers) == expected
    held = {job_id for job_id, job in zip(ids, expected, strict=True) if rules.is_held(job, OURS, 1)}
    assert lost == set(ids) - held


async def test_release_goes_by_the_rule(database: Database, clock: Clock) -> None:
    """The store gives back what the model gives back: what our claim still holds."""
    rows = every_job()
    run, ids, workers = await stored(database, clock, rows)
    count = await Queue(database).release(workers[OURS], [claim_1(job_id, run) for job_id in ids])
    expected = [rules.released(row, OURS, 1, RunState.ACTIVE) for row in rows]
    assert await read_back(database, clock, ids, workers) == expected
    assert count == sum(rules.is_held(row, OURS, 1) for row in rows)


@pytest.mark.parametrize("suspects", [False, True])
async def test_claim_goes_by_the_rule(database: Database, clock: Clock, suspects: bool) -> None:
    """The store claims what the model claims: pending jobs, those that killed their workers apart from the others."""
    rows = every_job(crashes=range(MAX_CRASHES))
    run, ids, workers = await stored(database, clock, rows)
    await Queue(database).claim(workers[OURS], [run.id], len(rows), lease=60, suspects=suspects)
    expected = [
        rules.claimed(row, OURS)._replace(calls=0)
        if row.state is JobState.PENDING and (row.crashes >= SUSPECT_CRASHES) == suspects
        else row
        for row in rows
    ]
    assert await read_back(database, clock, ids, workers) == expected
