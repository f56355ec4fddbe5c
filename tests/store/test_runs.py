"""Runs: states, pauses and their reasons."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import lbr
from lbr.core.errors import (
    Family,
    UsageError,
)
from lbr.core.types import (
    Failure,
    RunState,
    WorkerId,
)
from lbr.store import reads, redo, runs
from lbr.store.database import open_database
from lbr.store.settle import settle
from tests.support import Clock, Queue, answered, assert_counted, failed, put, states

if TYPE_CHECKING:
    from lbr.store.database import Database

TRANSIENT = Failure(Family.TRANSIENT, "ServerError", "503")


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


@pytest.mark.parametrize("reason", ["", " ", "a\x00b", "a\ud800b", "a\nb", "x" * 1_001])
async def test_a_reason_that_cannot_be_kept_is_refused(database: Database, db_url: str, reason: str) -> None:
    """What one database would not take, and what would pass for a move, is refused by both in the same words."""
    run = await put(database, ["a"])
    with pytest.raises(UsageError, match="expected a reason"):
        await lbr.pause("r", reason=reason, db_url=db_url)
    assert (await database.read(reads.find_run, run.name)).state == "active"


async def test_cancel_keeps_answers_on_their_way(database: Database, clock: Clock) -> None:
    """Cancelling stops what is pending; what is in flight may still be answered, but is not taken up again."""
    run = await put(database, ["a", "b", "c", "d"])
    queue, worker, _ = await two_workers(database)
    one, two, three = await queue.claim(worker, [run.id], 3, lease=60)
    assert await runs.cancel(database, run) == 1
    await database.write(settle, [answered(one), failed(two, TRANSIENT)])
    assert await states(database, run) == {"done": 1, "cancelled": 2, "inflight": 1}
    assert await queue.release(worker, [three]) == 1
    assert await states(database, run) == {"done": 1, "cancelled": 3}
    await assert_counted(database, run)
    with pytest.raises(UsageError, match="lbr retry r"):
        await database.write(runs.resume, run)
    assert await redo.retry(database, run) == 3
    (claim, *_rest) = await queue.claim(worker, [run.id], 3, lease=60)
    clock.forward(61)
    await runs.cancel(database, run)
    await queue.reclaim()
    assert await states(database, run) == {"done": 1, "cancelled": 3}
    assert (await database.write(settle, [answered(claim)])).stale == {claim.job_id}
    await assert_counted(database, run)


async def test_cancel_is_not_undone_by_a_pause(database: Database, db_url: str) -> None:
    """Whatever comes at the same moment, a cancelled run stays cancelled, and its jobs with it."""
    other = await open_database(db_url)
    for n in range(15):
        run = await put(database, [f"p{m}" for m in range(5)], name=f"r{n}", reuse=False)
        await asyncio.gather(
            other.write(runs.pause, run, "x"),
            runs.cancel(database, run),
            other.write(runs.resume, run),
            return_exceptions=True,
        )
        assert (await database.read(reads.find_run, f"r{n}")).state is RunState.CANCELLED
        assert await states(database, run) == {"cancelled": 5}
    await other.close()


async def test_a_run_that_changed_meanwhile_is_not_pruned(database: Database, clock: Clock) -> None:
    """An answer or an input that came after the look keeps it; so do an unfinished enqueue and its youth."""
    run = await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=1)
    assert await database.read(reads.idle_runs, 0) == []
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(settle, [answered(claim)])
    clock.forward(60)
    assert await database.read(reads.idle_runs, 61_000) == []
    (seen,) = await database.read(reads.idle_runs, 60_000)
    assert await redo.retry(database, run, redo.read_conditions(["status=done"])) == 1
    assert not await database.write(runs.cancel_unchanged, seen.run, seen.counts)
    assert (await database.read(reads.find_run, "r")).state == "active"
    assert await database.read(reads.idle_runs, 0) == []
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(settle, [answered(claim)])
    assert not await database.write(runs.cancel_unchanged, seen.run, seen.counts)
    (seen,) = await database.read(reads.idle_runs, 0)
    assert await database.write(runs.cancel_unchanged, seen.run, seen.counts)
    assert await database.write(runs.cancel_unchanged, seen.run, seen.counts)
    assert await runs.remove(database, run) == 1
