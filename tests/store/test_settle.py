"""Settlements, on every database: the fence, what a failure does to its job, and the counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert

from lbr.core.errors import (
    DatabaseError,
    Family,
    Usage,
)
from lbr.core.types import (
    Failure,
    PauseCause,
    Paused,
    RunState,
    WorkerId,
)
from lbr.store import reads, redo, runs, schema
from lbr.store.settle import settle
from tests.support import Clock, Queue, answered, assert_counted, failed, job_row, put, states

if TYPE_CHECKING:
    from lbr.store.database import Database

TRANSIENT = Failure(Family.TRANSIENT, "ServerError", "503")

PERMANENT = Failure(Family.PERMANENT, "BadRequest", "400: no")

BROKE = Failure(Family.ACCOUNT, "Quota", "no credit")

BAD = Failure(Family.BAD_ANSWER, "BadAnswer", "no field x", text="{}")


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_zombie_cannot_overwrite(database: Database, clock: Clock) -> None:
    """An answer whose job was claimed again since is refused and recorded as stale, with its text."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    assert [one.job_id for one in await queue.reclaim()] == [old.job_id]
    (new,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (new.claim_seq, new.crashes) == (2, 1)
    late = await database.write(settle, [answered(old, "late")])
    assert late.taken == set()
    assert late.stale == {old.job_id}
    await database.write(settle, [answered(new, "good")])
    again = await database.write(settle, [answered(old, "late")])
    assert (again.taken, again.stale) == (set(), late.stale)
    story = await database.read(reads.story, run, 0)
    assert (story.row.result, [t.what for t in story.tries]) == ("good", ["crashed", "stale"])
    assert [t.text for t in story.tries] == [None, "late"]
    await assert_counted(database, run)


async def test_late_answer_is_kept_until_claimed_again(database: Database, clock: Clock) -> None:
    """An answer that comes after its lease, but before anyone took the job again, is paid for and kept."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    assert (await database.write(settle, [answered(claim)])).taken == {claim.job_id}
    assert await states(database, run) == {"done": 1}
    assert await queue.claim(worker, [run.id], 1, lease=60) == []
    await assert_counted(database, run)


async def test_settling_an_answer_twice_changes_nothing(database: Database) -> None:
    """A settlement that is repeated, because the reply to its commit was lost, is taken, but written once."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    first = await database.write(settle, [answered(claim)])
    again = await database.write(settle, [answered(claim, "other")])
    assert (again.taken, again.stale) == (first.taken, set())
    story = await database.read(reads.story, run, 0)
    assert (story.row.result, story.attempts, story.tries) == ("answer", 1, [])
    await assert_counted(database, run)


async def test_a_batch_that_is_settled_twice_is_reported_as_before(database: Database, clock: Clock) -> None:
    """An answer, failures and a late answer are each once in the database, and in both reports."""
    run = await put(database, ["a", "b", "c", "d"])
    queue, worker, other = await two_workers(database)
    (late,) = await queue.claim(worker, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    await queue.claim(other, [run.id], 1, lease=600)
    one, two, three = await queue.claim(worker, [run.id], 3, lease=60)
    batch = [answered(one), failed(two, TRANSIENT), failed(three, PERMANENT), answered(late, "late")]
    first = await database.write(settle, batch)
    assert first.taken == {one.job_id, two.job_id, three.job_id}
    assert first.stale == {late.job_id}
    counted = await states(database, run)
    second = await database.write(settle, batch)
    assert (second.taken, second.stale, second.given_back) == (first.taken, first.stale, set())
    assert await states(database, run) == counted == {"done": 1, "failed": 1, "pending": 1, "inflight": 1}
    stories = [await database.read(reads.story, run, idx) for idx in range(4)]
    assert sorted(len(story.tries) for story in stories) == [0, 1, 1, 2]
    await assert_counted(database, run)


async def test_transient_failure_waits_in_the_database(database: Database, clock: Clock) -> None:
    """A retry is a pending job with a later time; nobody claims it before, and the look knows when."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    settlement = failed(claim, TRANSIENT)
    await database.write(settle, [settlement])
    assert await queue.claim(worker, [run.id], 1, lease=60) == []
    outlook = await queue.check_due([run.id])
    assert (outlook.due, outlook.next_ms) == (False, settlement.wait_ms)
    clock.forward(settlement.wait_ms / 1000)
    assert (await queue.check_due([run.id])).due
    (again,) = await queue.claim(worker, [run.id], 1, lease=60)
    assert (again.attempts, again.claim_seq) == (1, 2)
    await assert_counted(database, run)


async def test_account_failure_pauses_the_run(database: Database) -> None:
    """No credit: the run is paused with the reason, the job is kept uncharged, and resume goes on."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    broke = Paused(PauseCause.ACCOUNT, "Quota: no credit")
    assert (await database.write(settle, [failed(claim, BROKE)])).paused == {"r": broke}
    assert await queue.claim(worker, [run.id], 9, lease=60) == []
    found = await database.read(reads.find_run, "r")
    assert (found.state, found.pause) == (RunState.PAUSED, broke)
    await database.write(runs.resume, found)
    assert [c.attempts for c in await queue.claim(worker, [run.id], 9, lease=60)] == [0, 0]
    await assert_counted(database, run)


async def test_bad_answer_comes_back_with_its_words(database: Database) -> None:
    """The next claim of a job whose answer did not validate carries that answer and the validator's words."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(settle, [failed(claim, BAD)])
    (second,) = await queue.claim(worker, [run.id], 1, lease=60)
    assert second.history.bad_answers == 1
    assert second.history.last_bad is not None
    assert (second.history.last_bad.text, second.history.last_bad.message) == ("{}", "no field x")
    await database.write(settle, [failed(second, BAD)])
    (third,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(settle, [failed(third, BAD)])
    assert await states(database, run) == {"failed": 1}


async def test_an_envelope_without_an_answer_is_not_shown_to_the_model(database: Database) -> None:
    """It uses up the budget of bad answers, but there is nothing in it that a model could correct."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    for count, error in enumerate(("EmptyAnswer", "UnreadAnswer"), start=1):
        (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
        await database.write(settle, [failed(claim, replace(BAD, error=error, finish_reason="stop"))])
        (again,) = await queue.claim(worker, [run.id], 1, lease=60)
        assert (again.history.bad_answers, again.history.last_bad) == (count, None)
        await queue.release(worker, [again])
    assert [t.finish_reason for t in (await database.read(reads.story, run, 0)).tries] == ["stop", "stop"]


async def test_a_late_bad_answer_uses_up_no_budget(database: Database, clock: Clock) -> None:
    """What a zombie's call came to is recorded as stale, and is no part of what its successors go by."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    (new,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (await database.write(settle, [failed(old, BAD)])).stale == {old.job_id}
    await database.write(settle, [failed(new, TRANSIENT)])
    clock.forward(3600)
    (last,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (last.attempts, last.history.bad_answers, last.history.last_bad) == (1, 0, None)


async def test_tokens_and_cost_are_counted_for_failed_tries_too(database: Database) -> None:
    """A try that failed after it was paid for counts in the run's tokens and cost."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    paid = Failure(Family.BAD_ANSWER, "BadAnswer", "no", text="{}", usage=Usage(7, 3, 1_000))
    await database.write(settle, [failed(claim, paid)])
    view = await database.read(reads.overview, "r")
    counts = view.runs[0].counts
    assert (counts["input_tokens"], counts["output_tokens"], counts["cost_nanos"]) == (7, 3, 1_000)
    assert counts["try:bad_answer"] == 1


async def test_settle_is_all_or_nothing(database: Database) -> None:
    """A batch that fails half way leaves no trace of its first half."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    one, two = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(
        lambda c, _: c.execute(insert(schema.results).values(job_id=two.job_id, text="planted", latency_ms=0))
    )
    with pytest.raises(DatabaseError):
        await database.write(settle, [answered(one), answered(two)])
    assert await states(database, run) == {"inflight": 2}
    await assert_counted(database, run)


async def test_late_failure_does_not_undo_a_retry(database: Database, clock: Clock) -> None:
    """A failure from before somebody put the job back by hand is of the past; an answer is still welcome."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await runs.cancel(database, run)
    clock.forward(61)
    await queue.reclaim()
    assert await redo.retry(database, run) == 1
    assert (await database.write(settle, [failed(claim, PERMANENT)])).stale == {claim.job_id}
    assert await states(database, run) == {"pending": 1}
    assert await queue.renew(worker, [claim], lease=60, settled=0, rate=0.0) == {claim.job_id}
    assert (await job_row(database, claim.job_id)).crashes == 0
    await assert_counted(database, run)


async def test_stale_answer_is_counted_once(database: Database, clock: Clock) -> None:
    """However often a late answer is brought, its cost and its record are written once."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    await queue.claim(heir, [run.id], 1, lease=60)
    for _ in range(3):
        await database.write(settle, [answered(old, "late")])
    counts = (await database.read(reads.overview, "r")).runs[0].counts
    assert counts["stale"] == 1
    assert [t.what for t in (await database.read(reads.story, run, 0)).tries] == ["crashed", "stale"]
