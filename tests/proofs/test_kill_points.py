"""A process may die on any line: each operation of the store, killed before every statement and every commit of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from lbr.core.types import Shape
from lbr.store import limits, reads, redo
from lbr.store.database import open_database
from lbr.store.schema import results
from lbr.store.settle import settle
from tests.proofs.kill_points import LATER, OPERATIONS, PROMPTS, die, enqueue
from tests.support import ECHO, Queue, answered, assert_counted, real_clock, states

if TYPE_CHECKING:
    from lbr.core.types import Run
    from lbr.store.database import Database

pytestmark = pytest.mark.processes

SETTLED = {"done": 3, "failed": 1, "pending": 2}
BEFORE_AND_AFTER: dict[str, list[dict[str, int]]] = {
    "enqueue": [{}, {"pending": 6}],
    "claim": [{"pending": 6}, {"inflight": 6}],
    "settle": [{"inflight": 6}, SETTLED],
    "turn": [{"inflight": 3, "pending": 3}, {"done": 3, "inflight": 3}],
    "renew": [{"inflight": 6}],
    "release": [{"inflight": 6}, {"pending": 6}],
    "reclaim": [{"inflight": 6}, {"pending": 6}],
    "cancel": [{"pending": 6}, {"cancelled": 6}],
    "redo": [SETTLED, {"failed": 1, "pending": 5}],
}
"""What may be there of an operation: nothing or all of it."""

FEWEST = 4
"""So many places to die has the shortest of them, a renewal: begin, the worker's row, the leases, commit."""


async def named(database: Database, name: str) -> Run | None:
    """Return the run of that name, None where there is none yet."""
    return next((run for run in await database.read(reads.all_runs) if run.name == name), None)


async def set_limits(database: Database) -> None:
    """Set limits that hold nothing back, so that what keeps them is done as well."""
    await database.write(limits.set_limits, ECHO.answerer, {"rpm": 2_000_000, "tpm": 200_000_000, "concurrency": 1_000})


async def finish(later: Database, name: str) -> Run:
    """Do what those do who come later: enqueue again, take back what is held, answer everything."""
    if run := await named(later, name):
        await redo.retry(later, run)
    await enqueue(later, name)
    run = await later.read(reads.find_run, name)
    queue = Queue(later)
    worker = await queue.register(host="h", pid=2, concurrency=100)
    while await states(later, run) != {"done": len(PROMPTS)}:
        await queue.reclaim()
        claims = await queue.claim(worker, [run.id], 100, lease=60)
        await later.write(settle, [answered(claim, claim.prompt.text or "") for claim in claims])
        await redo.retry(later, run)
    return run


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_death_at_any_statement_leaves_all_or_nothing(db_url: str, operation: str) -> None:
    """Whatever statement a process dies before, the operation is there or is not, and the run can be finished."""
    database = await open_database(db_url, create=True, clock=real_clock())
    later = await open_database(db_url, clock=real_clock(2 * LATER))
    await set_limits(database)
    length, seen = 0, set()
    while True:
        name = f"{operation} {length}"
        if operation != "enqueue":
            await enqueue(database, name)
        died = die(db_url, name, operation, length)

        found = await named(database, name)
        there = {} if found is None else await states(database, found)
        assert there in BEFORE_AND_AFTER[operation], (length, there)
        seen.add(str(there))
        run = await finish(later, name)
        await assert_counted(database, run)
        rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
        assert [(row.idx, row.result) for row in rows] == list(enumerate(PROMPTS))
        if not died:
            break
        length += 1
    assert length >= FEWEST
    assert len(seen) == len(BEFORE_AND_AFTER[operation])
    count = await database.read(lambda connection, _: connection.scalar(select(func.count()).select_from(results)))
    assert count == len(PROMPTS) * (length + 1)
    await later.close()
    await database.close()
