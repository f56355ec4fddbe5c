"""The batch lane of a worker against a server that fails as the test chooses: what is sent, found again and settled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from lbr.api.task import authorize
from lbr.core.batches import BatchState
from lbr.core.config import WorkOptions
from lbr.core.types import Task, Until
from lbr.store import batches, counters, reads
from lbr.store.database import open_database
from lbr.worker.worker import Worker
from tests.support import Clock, assert_counted, put, states
from tests.support.batch_server import KEY, BatchServer, Plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lbr.core.batches import BatchRow
    from lbr.core.types import Run
    from lbr.store.database import Database
    from lbr.worker.calls import WorkReport

MODEL = "openai-chat:gpt-4o-mini"
MANY = 120
MINUTE, DAY = 60, 86_400
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    """Return a provider."""
    with BatchServer() as found:
        monkeypatch.setenv("OPENAI_BASE_URL", found.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield found


class Laptop:
    """A queue on a machine with a clock that the test moves; `work` is a cron job's worker."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self.clock = database, clock
        self.heard: list[str] = []

    async def put(self, count: int = MANY, **options: Any) -> Run:
        """Enqueue so many prompts for the batch lane."""
        task = options.pop("task", Task(model=MODEL))
        return await put(self.database, [f"p{n}" for n in range(count)], task=task, lane="batch", **options)

    async def work(self, seconds: float = 0, **options: Any) -> WorkReport:
        """Work until nothing is due, after so much time."""
        self.clock.forward(seconds)
        given = WorkOptions(until=Until.EMPTY, **options)
        return await Worker(self.database, authorize(), given, notify=self.heard.append).run()

    async def rows(self) -> list[BatchRow]:
        """Return all batches."""
        return await self.database.read(batches.all_batches)

    async def state(self) -> BatchState:
        """Return the state of the newest batch."""
        return (await self.rows())[-1].state


@pytest.fixture
async def laptop(db_url: str, server: BatchServer) -> AsyncIterator[Laptop]:
    """Return a queue that the server answers."""
    clock = Clock()
    clock.now = round(time.time() * 1000)
    database = await open_database(db_url, create=True, clock=clock)
    yield Laptop(database, clock)
    await database.close()


def check_paid_once(server: BatchServer, online: int = 0) -> None:
    """Check that no batch was sent twice, no prompt answered twice, and so many online."""
    assert len(set(server.accepted)) == len(server.accepted)
    assert sum(server.online.values()) == online
    answered = server.batched + server.online
    assert set(answered.values()) <= {1}


async def test_a_batch_is_sent_polled_and_settled(laptop: Laptop, server: BatchServer) -> None:
    """Each run of a cron job does what is due; missing and wrong answers go online, and a failed line is a failed job."""
    server.plan = Plan(seconds=1e9, missing=2, errors=3, twice=5, is_reversed=True)
    server.answer = lambda body: '{"n": "x"}' if 'p9"' in str(body).replace("'", '"') else '{"n": 7}'
    task = Task(model=MODEL, schema=SCHEMA)
    run = await laptop.put(task=task)
    assert (await laptop.work()).done == 0
    assert (await laptop.state(), len(server.accepted), server.asked["poll"]) == (BatchState.SENT, 1, 0)
    [counted] = await laptop.database.read(reads.counts, [run.id])
    assert (counted.counts[counters.PARKED], counted.open, counted.finished) == (MANY, MANY, False)
    await laptop.work(MINUTE)
    assert server.asked["poll"] == 1
    assert (await laptop.work()).done == 0
    assert server.asked["poll"] == 1
    server.end_all()
    server.answer = lambda body: '{"n": 8}'
    report = await laptop.work(MINUTE)
    assert (report.done, report.failed, await laptop.state()) == (MANY - 3, 3, BatchState.SETTLED)
    assert await states(laptop.database, run) == {"done": MANY - 3, "failed": 3}
    check_paid_once(server, online=2)
    assert (len(server.deleted), server.asked["upload"], server.asked["create"]) == (1, 1, 1)
    await assert_counted(laptop.database, run)
