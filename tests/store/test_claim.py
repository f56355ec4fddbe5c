"""Claims, on every database."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lbr.store.database import open_database
from tests.support import Queue, assert_counted, put

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
