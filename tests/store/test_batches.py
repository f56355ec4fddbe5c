"""Batches in the store: parked jobs stay where they are, their answers are taken once, and only an end unparks them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, update

from lbr.api import doctor
from lbr.core.batches import LOOK_AGAIN_MS, PARKED, TOKEN_LIMIT, BatchState, Found
from lbr.core.errors import DatabaseError, Family, Usage, UsageError
from lbr.core.limits import CallBound
from lbr.core.pricing import Price
from lbr.core.types import Failure, Outcome, PauseCause, Reply, RunState, Settlement, WorkerId
from lbr.store import batches, counters, limits, reads, redo, runs, settle, taken, transfer
from lbr.store.batches import LostBatchError, PlanRequest
from lbr.store.schema import batches as table
from lbr.store.schema import jobs, results
from lbr.store.schema import runs as runs_table
from tests.support import Queue, answered, assert_counted, failed, put, states

if TYPE_CHECKING:
    from sqlalchemy import Connection, Update

    from lbr.core.batches import BatchRow
    from lbr.core.types import Claim, Millis, Run
    from lbr.store.database import Database
    from tests.support import Clock

US, OTHERS = WorkerId(7), WorkerId(8)
MANY = 130
LEASE = 60.0
DAY = 86_400
CENT = 10_000_000
BOUND = CallBound(Price(0.0, 10_000.0), 0, 1)
"""A call costs a cent."""
UPLOADED = {"file_id": "file-1", "bytes": 1, "provider": "p", "credential": "c"}
SENT, ENDED = Found("batch-1"), Found("batch-1", ended=True, files=("out",))


async def enqueued(database: Database, count: int = MANY, name: str = "r", lane: str = "batch") -> Run:
    """Return a sealed run of this lane with so many jobs."""
    return await put(database, [f"{name} {n}" for n in range(count)], name=name, lane=lane)


async def plan(database: Database, run: Run, most: int = 10_000, bound: CallBound | None = None, out: int = 4) -> Any:
    """Plan a batch of the run."""
    request = PlanRequest(US, LEASE, run.id, most, out, bound)
    able = await database.read(batches.can_plan, request)
    row = await database.write(batches.plan, request)
    assert able == (row is not None) or (await found(database, run)).state is RunState.PAUSED
    return row


async def found(database: Database, run: Run) -> Run:
    """Return the run as it is now."""
    return await database.read(reads.find_run, run.name)


async def take(database: Database, run: Run, worker: WorkerId = US) -> BatchRow | None:
    """Take the batch of which a step is due."""
    due = await database.read(batches.is_due, [run.id])
    row = await database.write(batches.take, worker, [run.id], LEASE)
    assert due == (row is not None)
    return row


async def taken_as(database: Database, run: Run, state: BatchState) -> BatchRow:
    """Take the batch, which is in this state."""
    row = await take(database, run)
    assert row is not None
    assert row.state is state
    return row


async def intended(database: Database, run: Run, **planned: Any) -> BatchRow:
    """Return a planned batch that is about to be created."""
    row = await plan(database, run, **planned)
    return await database.write(batches.intend, await database.write(batches.uploaded, row, **UPLOADED), LEASE)


async def ended(database: Database, run: Run, **planned: Any) -> tuple[BatchRow, list[Claim]]:
    """Return a batch that has ended, taken to be settled, and its claims."""
    row = await intended(database, run, **planned)
    claims = await claims_of(database, row)
    await database.write(batches.sent, row, ENDED, 0)
    return await taken_as(database, run, BatchState.ENDED), claims


async def claims_of(database: Database, row: BatchRow) -> list[Claim]:
    """Return all claims of a batch."""
    claims: list[Claim] = []
    while page := await database.read(batches.claims_of, row, claims[-1].job_id if claims else 0):
        claims += page
    return claims


async def kept(database: Database, run: Run, name: str) -> int:
    """Return a count of the run."""
    return (await database.read(lambda connection, _: counters.of_runs(connection, [run.id])))[run.id][name]


async def parked(database: Database) -> int:
    """Return how many jobs are parked, and check that they are as they were parked."""
    query = select(jobs).where(jobs.c.available_at == PARKED)
    rows = (await database.read(lambda connection, _: connection.execute(query))).all()
    assert all((row.state, row.worker_id, row.lease_until) == ("pending", None, None) for row in rows)
    return len(rows)


def priced(claim: Claim, nanos: int, text: str = "answer") -> Settlement:
    """Return the settlement of an answer with its cost."""
    return replace(answered(claim), outcome=Outcome(Reply(text, Usage(1, 1, nanos)), None, 0))


async def test_nothing_brings_a_parked_job_forward(database: Database, clock: Clock) -> None:
    """Whatever makes jobs due passes over those at the provider, also when a laptop was away for three days."""
    run, queue = await enqueued(database), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=8)
    row = await plan(database, run)
    assert (row.state, row.count, await parked(database)) == ("planned", MANY, MANY)
    for _ in range(2):
        assert await queue.claim(worker, [run.id], 10, lease=LEASE) == []
        assert await queue.claim(worker, [run.id], 10, lease=LEASE, suspects=True) == []
        work = await queue.check_due([run.id])
        assert (work.due, work.suspects, work.expired) == (False, False, False)
        await queue.bring_forward([run.id])
        assert await queue.reclaim([worker, WorkerId(0)]) == []
        assert await queue.release(worker, await claims_of(database, row)) == 0
        assert await queue.renew(worker, await claims_of(database, row), lease=LEASE, settled=0, rate=0)
        assert await redo.retry(database, run) == 0
        await database.write(runs.pause, run, "by the user")
        await database.write(runs.resume, run)
        assert await plan(database, run) is None
        view = await database.read(reads.overview, run.name)
        assert view.paces[run.id].retrying == 0
        assert await parked(database) == MANY
        clock.forward(3 * DAY)
    keys = await database.read(settle.jobs_of_keys, [one.key for one in await claims_of(database, row)])
    assert {job.state for [job] in keys.values()} == {"inflight"}
    assert not (await database.read(reads.counts, [run.id]))[0].finished
    await assert_counted(database, run)


async def test_the_batch_answer_is_taken_once(database: Database) -> None:
    """A repeated page, a repeated line, a line of another batch and one of another claim change nothing."""
    run = await enqueued(database)
    row, claims = await ended(database, run)
    other = await enqueued(database, name="other")
    _, foreign = await ended(database, other)
    stale = replace(claims[5], claim_seq=9)
    page = [priced(claims[0], 7), priced(claims[0], 7, "again"), priced(foreign[0], 7), priced(stale, 7)]
    page.append(
        replace(
            failed(claims[1], Failure(Family.BAD_ANSWER, "E", "no")),
            outcome=Outcome(None, Failure(Family.BAD_ANSWER, "E", "no", text="x", usage=Usage(1, 1, 5)), 0),
        )
    )

    moved, settled = await database.write(batches.settle_page, row, page, 40)
    with pytest.raises(LostBatchError):
        await database.write(batches.settle_page, row, page, 40)
    after, _ = await database.write(batches.settle_page, moved, page, 80)

    assert settled.taken == {claims[0].job_id, claims[1].job_id}
    assert await states(database, run) == {"done": 1, "pending": MANY - 1}
    assert await states(database, other) == {"pending": MANY}
    assert await kept(database, run, counters.COST_NANOS) == 12
    assert await kept(database, run, counters.PARKED) == MANY - 2
    rows = (await database.read(lambda c, _: c.execute(select(results)))).all()
    assert [(one.text, one.lane) for one in rows] == [("answer", "batch")]
    assert [one[0] for one in await database.read(taken.by_latency, run)] == [-1]
    assert await database.write(batches.finish, after) == MANY - 2
    await assert_counted(database, run)


async def test_an_end_unparks_and_what_was_tried_goes_online(database: Database) -> None:
    """Missing lines and bad answers go online, uncharged and at once; only fresh jobs wait for a batch."""
    run, queue = await enqueued(database, 2 * MANY), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=999)
    row, claims = await ended(database, run, most=MANY, out=1)
    bad = failed(claims[0], Failure(Family.BAD_ANSWER, "E", "no", text="x"))
    row, _ = await database.write(batches.settle_page, row, [bad, *map(answered, claims[3:])], 1)
    assert await database.write(batches.finish, row) == 2

    online = await queue.claim(worker, [run.id], 999, lease=LEASE)
    assert [(one.job_id, one.attempts, one.history.bad_answers) for one in sorted(online, key=lambda c: c.job_id)] == [
        (claims[0].job_id, 1, 1),
        (claims[1].job_id, 0, 0),
        (claims[2].job_id, 0, 0),
    ]
    assert not (await queue.check_due([run.id])).due
    second = await plan(database, run, most=MANY, out=1)
    assert not {one.job_id for one in await claims_of(database, second)} & {one.job_id for one in claims}
    assert await plan(database, run, out=1) is None
    await assert_counted(database, run)


@pytest.mark.slow
async def test_the_last_hundred_jobs_go_online(database: Database, clock: Clock) -> None:
    """A batch needs more jobs than that, 1,000 with the lane auto, and all inputs or as many as it may have."""
    tail, auto = await enqueued(database, 100), await enqueued(database, 999, "auto", "auto")
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=999)
    assert await plan(database, tail) is None
    assert await plan(database, auto) is None
    assert (await queue.check_due([tail.id])).due
    assert len(await queue.claim(worker, [tail.id, auto.id], 5_000, lease=LEASE)) == 1_099
    many = await enqueued(database, 1_000, "many", "auto")
    assert not (await queue.check_due([many.id])).due
    assert (await plan(database, many)).count == 1_000

    growing = await enqueued(database, MANY, "growing")
    opened = update(runs_table).where(runs_table.c.id == growing.id).values(sealed_at=None, enqueued_at=clock.now)
    await database.write(lambda connection, _: connection.execute(opened))
    assert await plan(database, growing, most=MANY + 1) is None
    assert (await plan(database, growing, most=120)).count == 120
    clock.forward(31)
    assert await plan(database, growing) is None


async def test_a_batch_that_was_never_there_costs_nothing(database: Database, clock: Clock) -> None:
    """Two looks ten minutes apart prove it; meanwhile its jobs stay parked, and it is sent again by the same nonce."""
    run = await enqueued(database)
    row = await intended(database, run)
    assert await take(database, run, OTHERS) is None
    clock.forward(LEASE + 1)
    unsure = await taken_as(database, run, BatchState.UNSURE)
    with pytest.raises(LostBatchError):
        await database.write(batches.sent, row, SENT, 0)
    assert await database.write(batches.not_found, unsure) is False
    assert await take(database, run) is None
    clock.forward(LOOK_AGAIN_MS / 1000 - 1)
    assert await take(database, run) is None
    clock.forward(1)
    unsure = await taken_as(database, run, BatchState.UNSURE)
    assert await database.write(batches.not_found, unsure) is True
    again = await taken_as(database, run, BatchState.UPLOADED)
    assert (again.nonce, again.file_id, await parked(database)) == (row.nonce, "file-1", MANY)
    await database.write(batches.release, again, "refused", None)
    assert await parked(database) == 0
    assert (await plan(database, run)).count == MANY
    await assert_counted(database, run)


async def test_looks_are_apart_when_the_clock_was_set_back(database: Database, clock: Clock) -> None:
    """A first look in the future is no look, and a batch whose next step is days ahead is due."""
    run = await enqueued(database)
    await intended(database, run)
    clock.forward(3 * DAY)
    assert await database.write(batches.not_found, await taken_as(database, run, BatchState.UNSURE)) is False
    clock.forward(-3 * DAY)
    assert await database.write(batches.not_found, await taken_as(database, run, BatchState.UNSURE)) is False
    assert await take(database, run) is None


async def test_of_two_workers_one_takes_a_step(database: Database, clock: Clock) -> None:
    """Whoever comes back after its lease has lost the batch, whatever it wants to record."""
    run = await enqueued(database)
    ours = await plan(database, run)
    assert await take(database, run, OTHERS) is None
    clock.forward(LEASE + 1)
    theirs = await take(database, run, OTHERS)
    assert theirs is not None
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (batches.uploaded, (ours,), UPLOADED),
        (batches.intend, (ours, LEASE), {}),
        (batches.release, (ours, "no"), {}),
        (batches.put_back, (ours, 0), {}),
        (batches.leave_out, (ours, [1]), {"fresh": True}),
        (batches.finish, (ours,), {}),
        (batches.settle_page, (ours, [], 1), {}),
    ]
    for step, arguments, more in steps:
        with pytest.raises(LostBatchError):
            await database.write(step, *arguments, **more)
    await database.write(batches.renew, ours, LEASE)
    assert (await database.write(batches.uploaded, theirs, **UPLOADED)).state == "uploaded"
    assert await parked(database) == MANY


@pytest.mark.slow
async def test_cancel_keeps_what_the_provider_has(database: Database) -> None:
    """Jobs of an unsent batch are cancelled at once, those of a sent one when it has ended, without their answers."""
    run = await enqueued(database, 3 * MANY)
    row, claims = await ended(database, run, most=MANY)
    await plan(database, run, most=MANY)
    assert await runs.cancel(database, run) == MANY
    assert await database.write(batches.cancel, run) == MANY
    assert await states(database, run) == {"cancelled": 2 * MANY, "pending": MANY}
    with pytest.raises(UsageError, match=r"run 'r' has 1 batch of 130 requests at its provider.*--forget"):
        await database.read(batches.check_none_out, run)
    with pytest.raises(UsageError, match="1 batch of 130 requests"):
        await database.write(transfer.prepare, run.name, "elsewhere")
    [row] = [one for one in await database.read(batches.all_batches, run.id) if one.state is BatchState.ENDED]
    row, _ = await database.write(batches.settle_page, row, [answered(claims[0])], 1)
    await database.write(batches.finish, row)
    assert await states(database, run) == {"cancelled": 3 * MANY - 1, "done": 1}
    await database.read(batches.check_none_out, run)
    assert [one.state for one in await database.read(batches.all_batches)] == ["settled", "released"]
    await assert_counted(database, run)
    assert await runs.remove(database, run) == 3 * MANY
    assert await database.read(batches.all_batches) == []


async def test_a_paused_run_sends_nothing_more(database: Database) -> None:
    """What was sent goes on; what was not waits, also when the pause comes between upload and intent."""
    run = await enqueued(database, 2 * MANY)
    sent = await intended(database, run, most=MANY)
    await database.write(batches.sent, sent, SENT, 0)
    planned = await plan(database, run, most=MANY)
    ready = await database.write(batches.uploaded, planned, **UPLOADED)
    await database.write(runs.pause, run, "by the user")
    with pytest.raises(LostBatchError):
        await database.write(batches.intend, ready, LEASE)
    await database.write(batches.put_back, ready, 0)
    assert (await taken_as(database, run, BatchState.SENT)).nonce == sent.nonce
    assert await take(database, run) is None
    await database.write(runs.resume, run)
    assert (await taken_as(database, run, BatchState.UPLOADED)).nonce == planned.nonce


@pytest.mark.slow
async def test_a_budget_holds_what_batches_may_cost(database: Database) -> None:
    """A batch has as many requests as fit; with it out, the run is not paused, and afterwards pays for what it got."""
    run, queue = await enqueued(database, 3 * MANY), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=8)
    await database.write(limits.set_budget, run.id, 140 * CENT + CENT // 2)
    row, claims = await ended(database, run, bound=BOUND)
    assert (row.count, row.reserved_nanos) == (140, 140 * CENT)
    assert await plan(database, run, bound=BOUND) is None
    assert await queue.claim(worker, [run.id], 8, lease=LEASE, bounds={run.id: BOUND}) == []
    assert (await found(database, run)).state is RunState.ACTIVE
    row, _ = await database.write(batches.settle_page, row, [priced(one, CENT // 2) for one in claims], 1)
    await database.write(batches.finish, row)
    assert (await plan(database, run, bound=BOUND)).count == 70
    await assert_counted(database, run)


@pytest.mark.slow
async def test_a_spent_budget_pauses_the_run(database: Database) -> None:
    """Not while a batch is out, although nothing is in flight and nothing fits; then at once."""
    run = await enqueued(database, 3 * MANY)
    row, claims = await ended(database, run, most=120)
    await database.write(limits.set_budget, run.id, CENT)
    row, _ = await database.write(batches.settle_page, row, [priced(claims[0], CENT)], 1)
    assert await plan(database, run, bound=BOUND) is None
    assert (await found(database, run)).state is RunState.ACTIVE
    await database.write(batches.finish, row)
    assert await plan(database, run, bound=BOUND) is None
    pause = (await found(database, run)).pause
    assert pause is not None
    assert pause.cause is PauseCause.BUDGET


@pytest.mark.slow
async def test_the_first_calls_show_the_cost_if_nothing_bounds_it(database: Database) -> None:
    """A run with a budget begins online, one call at first, as it does without batches."""
    run, queue = await enqueued(database, 3 * MANY), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=8)
    await database.write(limits.set_budget, run.id, 100 * CENT)
    assert await plan(database, run) is None
    assert (await queue.check_due([run.id])).due
    for _ in range(8):
        claims = await queue.claim(worker, [run.id], 20, lease=LEASE)
        await database.write(settle.settle, [priced(one, CENT // 10) for one in claims])
    assert not (await queue.check_due([run.id])).due
    row = await plan(database, run)
    assert row.reserved_nanos == row.count * CENT // 10


@pytest.mark.slow
async def test_too_many_tokens_halve_the_next_batch(database: Database, clock: Clock) -> None:
    """It waits ten minutes, and for every other batch of the account."""
    run, other = await enqueued(database, 3 * MANY), await enqueued(database, name="other")
    row, _ = await ended(database, run, most=260)
    out = await intended(database, other)
    await database.write(batches.sent, out, SENT, 0)
    await database.write(batches.release, row, TOKEN_LIMIT)
    clock.forward(LOOK_AGAIN_MS / 1000)
    assert await plan(database, run) is None
    await database.write(batches.release, await taken_as(database, other, BatchState.SENT), "gone")
    assert (await plan(database, run)).count == 130
    await assert_counted(database, run)


async def test_a_user_forgets_a_batch(database: Database) -> None:
    """Its jobs are due again, for another batch; whatever still comes of it is not taken."""
    run = await enqueued(database)
    row, claims = await ended(database, run)
    assert await database.write(batches.forget, row.nonce) == MANY
    with pytest.raises(LostBatchError):
        await database.write(batches.settle_page, row, [answered(claims[0])], 1)
    for nonce in (row.nonce, "nosuch", "\x00'"):
        with pytest.raises(UsageError, match="`lbr batches` shows"):
            await database.write(batches.forget, nonce)
    assert (await plan(database, run)).count == MANY
    await assert_counted(database, run)


@pytest.mark.slow
async def test_jobs_that_do_not_fit_into_the_file_are_left_out(database: Database) -> None:
    """For another batch, or online if the batch cannot ask for them."""
    run, queue = await enqueued(database, 300), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=8)
    row = await plan(database, run)
    claims = await claims_of(database, row)
    row = await database.write(batches.leave_out, row, [claims[0].job_id], fresh=False)
    row = await database.write(batches.leave_out, row, [one.job_id for one in claims[-120:]], fresh=True)
    assert row.count == 179
    assert [one.job_id for one in await claims_of(database, row)] == [one.job_id for one in claims[1:-120]]
    assert [one.job_id for one in await queue.claim(worker, [run.id], 8, lease=LEASE)] == [claims[0].job_id]
    assert (await plan(database, run)).count == 120
    await assert_counted(database, run)


async def test_doctor_sees_what_is_overdue(database: Database, clock: Clock) -> None:
    """A batch should have ended within a day, by the provider's promise."""
    run = await enqueued(database)
    await database.write(batches.sent, await intended(database, run), SENT, 0)
    assert await database.read(batches.overdue) == []
    clock.forward(DAY + 3601)
    [(row, name)] = await database.read(batches.overdue)
    assert (row.found, name) == (SENT, "r")
    assert await database.read(batches.runs_of_open) == {run.id}
    [finding] = doctor._batches([(row, name)])
    assert f"run r: batch {row.nonce} of 130 requests is sent" in finding.found
    assert f"`lbr batches --forget {row.nonce}`" in (finding.do or "")


async def test_a_hostile_queue_names_no_address(database: Database) -> None:
    """The ids of a provider are no paths, whoever has written them."""
    run = await enqueued(database)
    await database.write(batches.sent, await intended(database, run), SENT, 0)
    ids = ({"file_id": "../models"}, {"found": '{"provider_id": "a/../../files/b"}'})
    for values in (*ids, {"found": '{"provider_id": "b", "files": ["../x"]}'}, {"found": "[]"}):
        await database.write(change, update(table).values(values))
        with pytest.raises(DatabaseError, match="cannot read batch"):
            await take(database, run)
        await database.write(change, update(table).values(file_id="f", found=None))


def change(connection: Connection, _now: Millis, statement: Update) -> None:
    """Write past the store."""
    connection.execute(statement)
