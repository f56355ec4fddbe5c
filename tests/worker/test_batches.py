"""The batch lane of a worker against a server that fails as the test chooses: what is sent, found again and settled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from lbr.api import operate
from lbr.api.task import authorize
from lbr.core.batches import BatchState, Lane
from lbr.core.config import WorkOptions
from lbr.core.errors import UsageError
from lbr.core.types import PauseCause, RunState, Task, Until
from lbr.store import batches, counters, reads, runs
from lbr.store.database import open_database
from lbr.store.schema import jobs
from lbr.worker.worker import Worker
from tests.support import Clock, assert_counted, eventually, put, states
from tests.support.batch_server import KEY, BatchServer, Fault, Plan

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

    def __init__(self, database: Database, clock: Clock, url: str) -> None:
        self.database, self.clock, self.url = database, clock, url
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
    yield Laptop(database, clock, db_url)
    await database.close()


def check_paid_once(server: BatchServer, online: int = 0) -> None:
    """Check that no batch was sent twice, no prompt answered twice, and so many online."""
    assert len(set(server.accepted)) == len(server.accepted)
    assert sum(server.online.values()) == online
    answered = server.batched + server.online
    assert set(answered.values()) <= {1}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.DROP, Fault.LATE_500])
async def test_a_batch_whose_reply_was_lost_is_adopted(laptop: Laptop, server: BatchServer, fault: Fault) -> None:
    """It is found by its marker, also on a later page and when the list shows it late."""
    run = await laptop.put()
    server.plan = Plan(seconds=1e9)
    server.fail("create", fault)
    server.listing_lags = 1e9
    await laptop.work()
    assert await laptop.state() is BatchState.UNSURE
    await laptop.work(MINUTE)
    assert await laptop.state() is BatchState.UNSURE
    for batch in server.batches.values():
        batch.listed_from = 0.0
    await laptop.work(10 * MINUTE)
    assert await laptop.state() is BatchState.SENT
    server.end_all()
    assert (await laptop.work(3 * DAY)).done == MANY
    assert await states(laptop.database, run) == {"done": MANY}
    check_paid_once(server)
    assert server.asked["create"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.DROP_BEFORE, Fault.LIMITED, Fault.BUSY])
async def test_a_batch_that_was_not_accepted_is_sent_again(laptop: Laptop, server: BatchServer, fault: Fault) -> None:
    """After two looks ten minutes apart, with the same upload and nonce; a 429 pauses nothing."""
    run = await laptop.put()
    server.plan = Plan(seconds=1e9)
    server.fail("create", fault)
    await laptop.work()
    await laptop.work(MINUTE)
    await laptop.work(9 * MINUTE)
    assert (await laptop.state(), server.asked["create"], server.accepted) == (BatchState.UNSURE, 1, [])
    await laptop.work(MINUTE)
    [row] = await laptop.rows()
    assert (row.state, server.accepted, server.asked["upload"]) == (BatchState.SENT, [row.nonce], 1)
    server.end_all()
    assert (await laptop.work(MINUTE)).done == MANY
    assert (await laptop.database.read(reads.find_run, run.name)).state is RunState.ACTIVE
    check_paid_once(server)


@pytest.mark.slow
async def test_a_refused_batch_pauses_the_run(laptop: Laptop, server: BatchServer) -> None:
    """Its jobs are back, uncharged, and after a resume they are in another batch."""
    run = await laptop.put()
    server.fail("create", Fault.REFUSED)
    await laptop.work()
    pause = (await laptop.database.read(reads.find_run, run.name)).pause
    assert pause is not None
    assert (pause.cause, "its batch was refused: " in pause.message) == (PauseCause.SET_UP, True)
    assert await laptop.state() is BatchState.RELEASED
    await laptop.database.write(runs.resume, run)
    assert (await laptop.work()).done == MANY
    check_paid_once(server)


@pytest.mark.slow
async def test_a_wrong_set_up_pauses_the_run(laptop: Laptop, server: BatchServer) -> None:
    """If all lines of a batch fail alike, no job is charged, and none goes online at the full price."""
    run = await laptop.put(6 * MANY)
    server.plan = Plan(errors=6 * MANY)
    await laptop.work()
    found = await laptop.database.read(reads.find_run, run.name)
    assert found.is_paused_by(PauseCause.SET_UP)
    assert await states(laptop.database, run) == {"pending": 6 * MANY}
    server.plan = Plan()
    await laptop.database.write(runs.resume, run)
    await laptop.work()
    assert await states(laptop.database, run) == {"done": 6 * MANY}
    check_paid_once(server)
    await assert_counted(laptop.database, run)


@pytest.mark.slow
async def test_too_many_tokens_are_sent_in_halves(laptop: Laptop, server: BatchServer) -> None:
    """The provider says so after it has accepted the batch; no job is charged and no call made online."""
    run = await laptop.put(4 * MANY)
    server.plan = Plan(ends="failed")
    await laptop.work()
    server.plan = Plan()
    assert (await laptop.state(), len(server.accepted)) == (BatchState.RELEASED, 1)
    await laptop.work(9 * MINUTE)
    assert len(server.accepted) == 1
    await laptop.work(MINUTE)
    assert [row.count for row in await laptop.rows()] == [4 * MANY, 2 * MANY, 2 * MANY]
    await laptop.work(MINUTE)
    assert await states(laptop.database, run) == {"done": 4 * MANY}
    assert {row.attempts for row in await job_rows(laptop.database)} == {1}
    check_paid_once(server)


async def job_rows(database: Database) -> Any:
    """Return all jobs."""
    return (await database.read(lambda connection, _: connection.execute(select(jobs)))).all()


@pytest.mark.slow
async def test_an_expired_batch_keeps_what_was_paid(laptop: Laptop, server: BatchServer) -> None:
    """What it did not answer goes online, uncharged."""
    run = await laptop.put()
    server.plan = Plan(ends="expired", answered=70)
    await laptop.work()
    await laptop.work(MINUTE)
    assert await states(laptop.database, run) == {"done": MANY}
    check_paid_once(server, online=MANY - 70)
    assert {row.attempts for row in await job_rows(laptop.database)} == {1}


@pytest.mark.slow
async def test_another_key_does_not_see_the_batch(
    laptop: Laptop, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, whether the batch is sent or unsure, fails no job and sends nothing; the first key goes on."""
    run = await laptop.put()
    other = await laptop.put(name="unsure", reuse=False, task=Task(model=MODEL, instructions="be brief"))
    server.plan = Plan(seconds=1e9)
    server.fail("create", Fault.DROP_BEFORE)
    await laptop.work()
    monkeypatch.setenv("OPENAI_API_KEY", "another-key-0123456789")
    for _ in range(4):
        await laptop.work(11 * MINUTE)
    told = {line for line in laptop.heard if "was made with another key" in line and "--forget" in line}
    assert len(told) == 2
    assert await states(laptop.database, run) == await states(laptop.database, other) == {"pending": MANY}
    assert server.asked["create"] == 2
    server.plan = Plan()
    server.end_all()
    assert KEY not in str(laptop.heard)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for _ in range(4):
        await laptop.work(11 * MINUTE)
    assert await states(laptop.database, run) == await states(laptop.database, other) == {"done": MANY}
    check_batches = [row.credential for row in await laptop.rows()]
    assert (len(set(check_batches)), KEY in str(check_batches)) == (1, False)
    assert len(set(server.accepted)) == len(server.accepted) == 2


async def test_a_cancelled_run_keeps_what_was_answered(laptop: Laptop, server: BatchServer) -> None:
    """The provider is asked once the run is cancelled; answers are kept, and the other jobs end cancelled."""
    run = await laptop.put()
    server.plan = Plan(seconds=1e9, answered=50)
    await laptop.work()
    await operate.cancel(run.name, db_url=laptop.url)
    with pytest.raises(UsageError, match="1 batch of 120 requests at its provider"):
        await operate.remove(run.name, db_url=laptop.url)
    for _ in range(2):
        await laptop.work(MINUTE)
    assert await states(laptop.database, run) == {"done": 50, "cancelled": MANY - 50}
    assert (server.asked["cancel"], server.asked["chat"]) == (1, 0)
    await assert_counted(laptop.database, run)
    assert await operate.remove(run.name, db_url=laptop.url) == MANY


@pytest.mark.slow
async def test_a_laptop_that_was_away_pays_for_nothing_twice(laptop: Laptop, server: BatchServer) -> None:
    """Three days later, whatever the batch was about to do, and with the clock set back afterwards."""
    run = await laptop.put(4 * MANY)
    server.plan = Plan(seconds=1e9)
    server.fail("create", Fault.DROP, Fault.HANG)
    await laptop.work()
    for days in (3, -3, 3):
        await laptop.work(days * DAY)
        await laptop.work(11 * MINUTE)
    assert await states(laptop.database, run) == {"pending": 4 * MANY}
    server.end_all()
    await laptop.work(11 * MINUTE)
    assert await states(laptop.database, run) == {"done": 4 * MANY}
    check_paid_once(server)


@pytest.mark.slow
async def test_two_workers_race_for_one_unsure_batch(laptop: Laptop, server: BatchServer) -> None:
    """One of them looks for it; it is adopted once and settled once."""
    run = await laptop.put()
    server.fail("create", Fault.DROP)
    await laptop.work()
    laptop.clock.forward(MINUTE)
    others = [await open_database(laptop.url, clock=laptop.clock) for _ in range(3)]
    workers = [Worker(one, authorize(), WorkOptions(until=Until.EMPTY)) for one in others]
    reports = await asyncio.gather(*(worker.run() for worker in workers))
    assert sum(report.done for report in reports) == MANY
    assert (server.asked["create"], server.asked["list"], server.asked["content"]) == (1, 1, 1)
    assert await states(laptop.database, run) == {"done": MANY}
    await assert_counted(laptop.database, run)
    for one in others:
        await one.close()


async def test_lanes_of_workers(laptop: Laptop, server: BatchServer) -> None:
    """A worker of one lane leaves the other's work to others, and does not wait for it."""
    server.plan = Plan(missing=4)
    run = await laptop.put()
    await laptop.work(lane=Lane.ONLINE)
    assert (await laptop.rows(), server.asked["chat"]) == ([], 0)
    await laptop.work(lane=Lane.BATCH)
    await laptop.work(MINUTE, lane=Lane.BATCH)
    assert (await states(laptop.database, run), server.asked["chat"]) == ({"done": MANY - 4, "pending": 4}, 0)
    await laptop.work(lane=Lane.ONLINE)
    assert await states(laptop.database, run) == {"done": MANY}
    check_paid_once(server, online=4)


@pytest.mark.slow
async def test_a_batch_holds_what_its_file_takes(
    laptop: Laptop, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is in the next batch; a prompt that no batch takes goes online."""
    monkeypatch.setattr("lbr.models.batches.ChatBatches.max_bytes", 20_000)
    task = Task(model=MODEL)
    run = await put(laptop.database, ["x" * 30_000, *(f"p{n}" for n in range(299))], task=task, lane="batch")
    await laptop.work()
    await laptop.work(MINUTE)
    assert await states(laptop.database, run) == {"done": 300}
    assert all((row.bytes or 0) <= 20_000 for row in await laptop.rows())
    assert len(server.accepted) > 1
    assert server.online["x" * 30_000] == 1
    assert set((server.batched + server.online).values()) == {1}


@pytest.mark.slow
async def test_until_done_waits_and_says_so(laptop: Laptop, server: BatchServer) -> None:
    """A worker that waits for a batch says how long that may take; asked to stop, it leaves the batch to the next."""
    server.plan = Plan(seconds=1e9)
    run = await laptop.put()
    worker = Worker(laptop.database, authorize(), WorkOptions(), notify=laptop.heard.append)
    task = asyncio.create_task(worker.run())
    await eventually(lambda: any("waiting for 120 jobs" in line for line in laptop.heard))
    worker.drain()
    await task
    assert await laptop.state() is BatchState.SENT
    server.end_all()
    assert (await laptop.work(MINUTE)).done == MANY
    assert (await laptop.database.read(reads.counts, [run.id]))[0].finished
