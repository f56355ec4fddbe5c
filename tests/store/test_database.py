"""What a database offers: transactions, and seeing those of others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from lbr.store.database import open_database
from tests.support import Queue, assert_counted, put, states

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


async def test_cancelled_caller_does_not_break_a_transaction(database: Database) -> None:
    """A write whose caller is cancelled ends whole, and the next one works."""
    run = await put(database, [f"p{n}" for n in range(50)])
    queue, worker, _ = await two_workers(database)
    for _ in range(20):
        claiming = asyncio.create_task(queue.claim(worker, [run.id], 1, lease=60))
        await asyncio.sleep(0)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
    await assert_counted(database, run)
    assert (await states(database, run)).get("inflight", 0) + len(
        await queue.claim(worker, [run.id], 50, lease=60)
    ) == 50


async def test_changed_sees_other_connections(database: Database, db_url: str) -> None:
    """A poll tells a commit of another process from silence."""
    await database.changed()
    assert not await database.changed()
    other = await open_database(db_url)
    await put(other, ["a"])
    await other.close()
    assert await database.changed()
    assert not await database.changed()
