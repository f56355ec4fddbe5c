"""Claims, on every database."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lbr.core.errors import Family
from lbr.core.types import Failure
from lbr.store.database import open_database
from lbr.store.settle import settle
from tests.support import Queue, answered, assert_counted, failed, put

if TYPE_CHECKING:
    from lbr.core.types import (
        WorkerId,
    )
    from lbr.store.database import Database


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_no_job_is_claimed_twice(database: Database, db_url: str) -> None:
    """Concurrent claims from two connections divide the jobs between them."""
    run = await put(database, [f"p{n}" for n in range(200)])
    other = await open_database(db_url)
    queue, one, two = await two_workers(database)

    async def take(store: Database, worker: WorkerId) -> list[int]:
        taken: list[int] = []
        while claims := await Queue(store).claim(worker, [run.id], 7, lease=60):
            taken += [claim.job_id for claim in claims]
        return taken

    taken = await asyncio.gather(take(database, one), take(other, two))
    await other.close()
    assert len(taken[0]) + len(taken[1]) == 200
    assert len(set(taken[0]) | set(taken[1])) == 200
    assert await queue.claim(one, [run.id], 1, lease=60) == []
    await assert_counted(database, run)


async def test_claim_takes_no_more_than_asked(database: Database) -> None:
    """A claim fills free slots and no more, the longest due first, across runs in the order given."""
    first, second = await put(database, ["a", "b"], name="1"), await put(database, ["c", "d"], name="2")
    queue, worker, _ = await two_workers(database)
    claims = await queue.claim(worker, [second.id, first.id], 3, lease=60)
    assert sorted(claim.prompt.text or "" for claim in claims) == ["a", "c", "d"]
    assert {claim.claim_seq for claim in claims} == {1}


PASSING = Failure(Family.TRANSIENT, "E", "words")


async def test_a_first_call_goes_alone(database: Database, db_url: str) -> None:
    """With a run's `warm_cache`, two workers claim one job together, and all when it is answered."""
    run = await put(database, [f"p{n}" for n in range(9)], warm_cache=True)
    other = await put(database, ["q", "r"], name="other")
    second = await open_database(db_url)
    queue, one, two = await two_workers(database)
    asked = [Queue(store).claim(worker, [run.id], 4, lease=60) for store, worker in ((database, one), (second, two))]
    [claim] = [claim for claims in await asyncio.gather(*asked) for claim in claims]
    await second.close()
    assert len(await queue.claim(two, [run.id, other.id], 4, lease=60)) == 2, "other runs go on"
    assert await queue.claim(one, [run.id], 4, lease=60) == []
    due = await queue.check_due([run.id])
    assert not due.due
    assert due.next_ms is not None
    assert due.next_ms <= 1_000
    await database.write(settle, [answered(claim)])
    assert len(await queue.claim(one, [run.id], 4, lease=60)) == 4
    assert len(await queue.claim(two, [run.id], 4, lease=60)) == 4
    await assert_counted(database, run)


async def test_first_calls_that_fail_do_not_hold_a_run_up(database: Database) -> None:
    """Each is followed by another one, alone, but after three all go; a call that was given back does not count."""
    run = await put(database, [f"p{n}" for n in range(9)], warm_cache=True)
    queue, worker, _ = await two_workers(database)
    await queue.release(worker, await queue.claim(worker, [run.id], 4, lease=60))
    for _ in range(3):
        [claim] = await queue.claim(worker, [run.id], 4, lease=60)
        await database.write(settle, [failed(claim, PASSING)])
    assert len(await queue.claim(worker, [run.id], 4, lease=60)) == 4
    await assert_counted(database, run)


async def test_a_run_that_was_answered_before_has_no_first_call(database: Database) -> None:
    """Whoever asks for it later changes nothing."""
    await put(database, ["a", "b", "c"])
    queue, worker, _ = await two_workers(database)
    run = await put(database, ["a", "b", "c"], warm_cache=True)
    [claim] = await queue.claim(worker, [run.id], 4, lease=60)
    await database.write(settle, [answered(claim)])
    assert len(await queue.claim(worker, [run.id], 1, lease=60)) == 1
    await put(database, ["a", "b", "c"], warm_cache=True)
    assert len(await queue.claim(worker, [run.id], 4, lease=60)) == 1
