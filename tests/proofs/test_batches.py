"""A worker of the batch lane may die anywhere: no batch is sent twice, each input is answered once, and paid once."""

from __future__ import annotations

import os
import signal
import time
from itertools import count
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from lbr.api.task import authorize
from lbr.core.batches import TAIL
from lbr.core.config import WorkOptions
from lbr.core.types import Task, Until
from lbr.store import counters, reads
from lbr.store.database import open_database
from lbr.store.schema import batch_jobs, jobs, results
from lbr.worker import batches as lane
from lbr.worker.worker import Worker
from tests.proofs.batch_victim import has_died, kilobytes_of_a_worker, start
from tests.support import Clock, assert_counted, put, states
from tests.support.batch_server import KEY, BatchServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from lbr.core.types import Run
    from lbr.store.database import Database

pytestmark = pytest.mark.processes

TASK = Task(model="openai-chat:gpt-4o-mini")
MANY = TAIL + 1
CALLS = ("upload", "create", "poll", "content", "delete")
LATER = 660
PARTS = 4
"""The places to die are shared among so many tests, each of which must end in time on a slow machine."""
FEWEST = 14
"""Seven transactions, each with a beginning and a commit."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    """Return a provider whose batches end at once."""
    with BatchServer() as found:
        monkeypatch.setenv("OPENAI_BASE_URL", found.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(lane, "POLL_SECONDS", 0.02)
        yield found


@pytest.fixture
def clock() -> Clock:
    """Return the clock of those who come later."""
    clock = Clock()
    clock.now = round(time.time() * 1000)
    return clock


@pytest.fixture
async def later(db_url: str, clock: Clock) -> AsyncIterator[Database]:
    """Return the queue of those who come later."""
    database = await open_database(db_url, create=True, clock=clock)
    yield database
    await database.close()


async def enqueue(database: Database, name: str) -> Run:
    """Put prompts of its own into a run of the batch lane."""
    return await put(database, [f"{name} {n}" for n in range(MANY)], name=name, task=TASK, lane="batch")


async def finish(database: Database, clock: Clock, run: Run) -> None:
    """Do what a cron job does, every eleven minutes, until all is answered."""
    for _ in range(5):
        clock.now = max(clock.now, round(time.time() * 1000)) + LATER * 1000
        await Worker(database, authorize(), WorkOptions(until=Until.EMPTY)).run()
        if await states(database, run) == {"done": MANY}:
            break
    assert await states(database, run) == {"done": MANY}


async def check(database: Database, server: BatchServer, run: Run) -> None:
    """Check at the server and in the queue that everything happened once."""
    assert len(set(server.accepted)) == len(server.accepted)
    assert set(server.batched.values()) <= {1}
    assert sum(name.startswith(f"{run.name} ") for name in server.batched) == MANY
    assert not server.online
    await assert_counted(database, run)
    of_run = select(func.count(), func.sum(results.c.cost_nanos)).join_from(
        results, jobs, jobs.c.id == results.c.job_id
    )
    answers, nanos = (
        await database.read(lambda connection, _: connection.execute(of_run.where(jobs.c.run_id == run.id)))
    ).one()
    [counted] = await database.read(reads.counts, [run.id])
    kept = counted.counts
    assert (answers, kept[counters.COST_NANOS], kept[counters.ANSWERED]) == (MANY, nanos, MANY)
    assert (kept[counters.PARKED], kept[counters.RESERVED], kept[counters.STALE]) == (0, 0, 0)
    left = select(func.count()).select_from(batch_jobs)
    assert await database.read(lambda connection, _: connection.scalar(left)) == 0


@pytest.mark.parametrize("first", range(PARTS))
async def test_a_death_at_any_statement_costs_time_not_money(
    later: Database, db_url: str, clock: Clock, server: BatchServer, first: int
) -> None:
    """Before each beginning and commit of each step, and on a file before each of its statements."""
    for length in count(first, PARTS):
        run = await enqueue(later, f"statement {length}")
        died = has_died(start(db_url, server.url, clock.now, length))
        if not died:
            assert await states(later, run) == {"done": MANY}
        await finish(later, clock, run)
        await check(later, server, run)
        if not died:
            break
    assert length > FEWEST


@pytest.mark.parametrize("call", [*CALLS, *(f"{name} done" for name in CALLS)])
async def test_a_death_at_any_call_costs_time_not_money(
    later: Database, db_url: str, clock: Clock, server: BatchServer, call: str
) -> None:
    """The server carries the request out after its sender has died, or has done so."""
    run = await enqueue(later, call)
    victims: list[BaseProcess] = []

    def kill(name: str) -> None:
        if name == call:
            os.kill(victims[0].pid or 0, signal.SIGKILL)

    server.watch = kill
    victims.append(start(db_url, server.url, clock.now))
    assert has_died(victims[0])
    server.watch = lambda _: None
    await finish(later, clock, run)
    await check(later, server, run)


async def test_fifty_thousand_lines_take_little_memory(tmp_path: Path, server: BatchServer) -> None:
    """The upload is built, and the results are read, line by line."""
    db_url = f"sqlite:///{tmp_path / 'queue.db'}"
    database = await open_database(db_url, create=True)
    await put(database, [f"prompt {n} " + "x" * 1_000 for n in range(50_000)], task=TASK, lane="batch")
    taken = kilobytes_of_a_worker(db_url, server.url)
    run = await database.read(reads.find_run, "r")
    assert await states(database, run) == {"done": 50_000}
    assert len(server.accepted) == 1
    assert taken < 100_000
    await database.close()
