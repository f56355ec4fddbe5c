"""Group commit: gathering, order, bounds and failure."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event

from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import Claim, JobId, Prompt, RunId
from lbr.store import claim, limits, runs
from lbr.store.database import open_database
from lbr.store.settle import Settled
from lbr.worker import turns as worker_turns
from lbr.worker.turns import Commit, Settler, batch_size, linger_seconds, usual_commit
from lbr.worker.worker import Worker
from tests.support import Queue, answered, assert_counted, eventually, meanwhile, put, states
from tests.worker.test_worker import asks, worker_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from lbr.core.types import Settlement
    from lbr.store.database import Database


def settlement(number: int, latency_ms: int = 0) -> Settlement:
    """Return the settlement of some job, answered by a call that took so long."""
    done = answered(Claim(JobId(number), RunId(1), 1, 0, 0, Prompt(text="p"), b"k"))
    return replace(done, outcome=replace(done.outcome, latency_ms=latency_ms))


class Disk:
    """Stands where the store is: takes batches, and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.told: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def write(self, batch: Sequence[Settlement]) -> Settled:
        """Take a batch."""
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.batches.append([s.claim.job_id for s in batch])
        return Settled(frozenset(s.claim.job_id for s in batch), frozenset(), {})

    def written(self, batch: Sequence[Settlement], settled: Settled) -> None:
        """Hear what became durable."""
        self.told += [s.claim.job_id for s in batch if s.claim.job_id in settled.taken]


def begun() -> tuple[Disk, Settler, asyncio.Task[None]]:
    """Return a settler that runs, with where it writes."""
    disk = Disk()
    settler = Settler(disk.write, disk.written)
    return disk, settler, asyncio.create_task(settler.run())


async def test_everything_is_written_once_in_order() -> None:
    """Closing writes all that was put, in batches of at most 500, each row once."""
    disk, settler, running = begun()
    for number in range(1_100):
        settler.put(settlement(number))
    settler.close()
    await running
    assert [len(batch) for batch in disk.batches] == [500, 500, 100]
    assert disk.told == list(range(1_100))


async def test_what_comes_during_a_commit_goes_into_the_next() -> None:
    """While one commit is under way the next batch gathers."""
    disk = Disk()
    disk.open.clear()
    settler = Settler(disk.write, disk.written)
    running = asyncio.create_task(settler.run())
    settler.put(settlement(0))
    settler.hurry()
    await asyncio.sleep(0.01)
    for number in range(1, 40):
        settler.put(settlement(number))
    disk.open.set()
    settler.close()
    await running
    assert disk.batches == [[0], list(range(1, 40))]


async def test_failed_commit_is_raised_and_nothing_is_called_written() -> None:
    """A settlement that could not be written is never reported as durable."""
    disk = Disk()
    disk.error = DatabaseError("disk full")
    settler = Settler(disk.write, disk.written)
    settler.put(settlement(1))
    with pytest.raises(DatabaseError, match="disk full"):
        await settler.run()
    assert disk.told == []


async def test_calls_do_not_go_on_in_step() -> None:
    """Where calls take longer than a commit, those that end together are written in parts; else all at once."""
    sizes = {}
    for latency in (0, 60_000):
        disk, settler, running = begun()
        for number in range(120):
            settler.put(settlement(number, latency))
        settler.close()
        await running
        sizes[latency] = [len(batch) for batch in disk.batches]
        assert disk.told == list(range(120))
    assert sizes == {0: [120], 60_000: [25, 25, 25, 25, 20]}


async def test_one_call_that_was_slow_makes_no_parts() -> None:
    """A call that only waited for the processor does not tell how long calls take."""
    disk, settler, running = begun()
    for number in range(120):
        settler.put(settlement(number, 0 if number else 60_000))
    settler.close()
    await running
    assert [len(batch) for batch in disk.batches] == [120]


async def turns(count: int) -> None:
    """Let the event loop go round so often, which takes no time."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_calls_that_end_one_by_one_are_committed_together() -> None:
    """Where calls are long, a row waits for others, until there are as many as are worth a commit."""
    disk, settler, running = begun()
    for number in range(30):
        settler.put(settlement(number, 60_000))
        await turns(3)
    settler.close()
    await running
    assert disk.batches == [list(range(25)), list(range(25, 30))]


async def test_who_hurries_waits_for_no_part() -> None:
    """When no call goes on, all that waits is written, however many parts it makes."""
    disk, settler, running = begun()
    for number in range(60):
        settler.put(settlement(number, 60_000))
    settler.hurry()
    await turns(30)
    assert [len(batch) for batch in disk.batches] == [25, 25, 10]
    # And the next is waited for again.
    settler.put(settlement(60, 60_000))
    await turns(30)
    assert disk.told == list(range(60))
    settler.close()
    await running
    assert disk.told == list(range(61))


@pytest.mark.parametrize(
    ("seconds", "usual"),
    [
        ([0.002], 0.002),
        ([0.002, 0.002, 0.06, 0.002], 0.002),
        ([0.06, 0.005, 0.04, 0.002], 0.04),
        ([0.06, 0.002], 0.06),
    ],
)
def test_every_other_commit_tells_and_a_single_one_does_not(seconds: list[float], usual: float) -> None:
    """One commit that was hindered is no reason to gather; half of them are."""
    assert usual_commit([Commit(one, 1) for one in seconds]) == Commit(usual, 1)


@pytest.mark.parametrize(
    ("commit", "call", "linger"),
    [
        (Commit(0.0, 0), 0.0, 0.0),
        (Commit(0.003, 0), 0.0, 0.0),
        (Commit(0.0155, 500), 0.0, 0.0),
        (Commit(0.013, 0), 0.0, 0.03),
        (Commit(3.0, 1), 0.0, 0.05),
        (Commit(0.003, 0), 0.09, 0.0),
        (Commit(0.003, 0), 1.0, 0.02),
        (Commit(0.013, 0), 1.0, 0.03),
        (Commit(0.003, 0), 60.0, 0.05),
    ],
)
def test_linger_follows_what_hinders_commits_and_how_long_calls_are(commit: Commit, call: float, linger: float) -> None:
    """Gathering lasts three times as long as a commit was hindered or a fiftieth of a call; rows are no hindrance."""
    assert linger_seconds(commit, call) == pytest.approx(linger)


@pytest.mark.parametrize(
    ("commit", "call", "rows"),
    [
        (Commit(0.002, 10), 0.001, 500),
        (Commit(0.002, 10), 0.05, 25),
        (Commit(0.008, 0), 0.05, 225),
        (Commit(0.5, 0), 10.0, 500),
    ],
)
def test_batches_are_small_where_calls_take_longer(commit: Commit, call: float, rows: int) -> None:
    """A slow commit is worth more rows, and calls that take no time have all of them."""
    assert batch_size(commit, call) == rows


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Database]:
    """Return a queue in a file: on a server a worker settles beside its claims."""
    opened = await open_database(str(tmp_path / "queue.db"), create=True)
    yield opened
    await opened.close()


async def test_no_more_is_held_than_there_are_slots(live: Database, tmp_path: Path) -> None:
    """A kill costs at most as many calls as there are slots: at no moment does the file say that more are in flight."""
    held: list[int] = []

    async def look(prompt: str) -> str:
        await asyncio.sleep(0.001 * (int(prompt) % 7))
        with closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
            held.append(connection.execute("SELECT count(*) FROM jobs WHERE state = 'inflight'").fetchone()[0])
        return prompt

    run = await put(live, [str(n) for n in range(300)], task=asks(look))
    report = await worker_for(live, look, concurrency=7).run()
    assert report.done == 300
    assert max(held) == 7
    await assert_counted(live, run)


async def test_what_a_settlement_brings_to_a_worker_that_stops_is_given_back(
    live: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given back at once, uncharged, not when the last call ends, which may take the whole grace."""
    going, let_go = asyncio.Event(), asyncio.Event()

    async def one_is_slow(prompt: str) -> str:
        if prompt == "slow":
            going.set()
            await let_go.wait()
        else:
            await going.wait()
        return prompt

    told_to_stop = asyncio.Event()

    async def stop(found: Any) -> None:
        _, claims = found
        assert claims
        worker.drain()
        told_to_stop.set()

    meanwhile(monkeypatch, claim.settle_and_claim, after=stop)
    run = await put(live, ["slow", *map(str, range(9))], task=asks(one_is_slow))
    worker = worker_for(live, one_is_slow, concurrency=3, grace=60)
    working = asyncio.create_task(worker.run())
    await told_to_stop.wait()
    for _ in range(1_000):
        if (await states(live, run)).get("inflight") == 1:
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("what the settlement brought was not given back")
    assert not working.done()
    let_go.set()
    report = await working
    found = await states(live, run)
    assert found["done"] == report.done
    assert found["pending"] == 10 - report.done
    assert report.released > 0
    rows = await live.read(
        lambda connection, _: connection.exec_driver_sql(
            "SELECT sum(attempts), sum(crashes) FROM jobs WHERE state = 'pending'"
        )
    )
    assert tuple(rows.one()) == (0, 0)
    await assert_counted(live, run)


async def test_a_job_that_cannot_be_claimed_keeps_no_answer_out(live: Database, tmp_path: Path) -> None:
    """What was answered before is settled in the file, though the claim in the same transaction fails."""

    async def echo(prompt: str) -> str:
        return prompt

    run = await put(live, ["a", "b", "c", "d"], task=asks(echo))
    with closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute("UPDATE prompts SET settings = 'no object' WHERE job_id = 3")
    with pytest.raises(DatabaseError) as failed:
        await worker_for(live, echo, concurrency=2).run()
    assert "kept in" not in str(failed.value)
    assert (await states(live, run))["done"] == 2
    await assert_counted(live, run)


async def test_a_settlement_never_queues_for_its_turn(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the worker's loop waits to claim, a settlement claims nothing: the slots that it counted may be gone."""
    turns_made = 0
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def turn() -> None:
        nonlocal turns_made
        turns_made += 1
        begun.set()
        await go_on.wait()

    meanwhile(monkeypatch, claim.settle_and_claim, turn)
    run = await put(live, [str(n) for n in range(8)])
    queue = Queue(live)
    served: Any = {run.id: SimpleNamespace(extra_tokens=0, bound=None)}
    claims = worker_turns.Claimer(live, served, lease=60)
    claims.worker = await queue.register(host="a", pid=1, concurrency=2)
    claims.serve([run.id])
    first, second = await claims.claim(2)

    async def settle_twice() -> None:
        await claims.settle([answered(first)], 1)
        await claims.settle([answered(second)], 1)

    async def claim_in_the_loop() -> list[Claim]:
        async with claims.alone():
            return await claims.claim(1)

    settling = asyncio.create_task(settle_twice())
    await begun.wait()
    looping = asyncio.create_task(claim_in_the_loop())
    await asyncio.sleep(0)
    go_on.set()
    await settling
    assert len(claims.take_claimed()) == turns_made == 1
    assert len(await looping) == 1
    assert await states(live, run) == {"done": 2, "inflight": 2, "pending": 4}


async def test_a_worker_that_fails_claims_no_more(live: Database) -> None:
    """Whatever ends the loop, here a run that cannot be served, nothing is claimed and called while it winds up."""
    finished: list[str] = []

    async def slow(prompt: str) -> str:
        await asyncio.sleep(0.004 + 0.0005 * (int(prompt) % 16))
        finished.append(prompt)
        return prompt

    async def other(prompt: str) -> str:
        return prompt

    run = await put(live, [str(n) for n in range(4_000)], name="mine", task=asks(slow))
    theirs = await put(live, ["x"], name="theirs", task=asks(other))
    await live.write(runs.pause, theirs, "for now")
    # Fewer calls at a time than slots, so that the loop looks around while settlements bring new claims.
    await limits.slow_start(live, [asks(slow).answerer])
    await live.write(lambda c, _: c.exec_driver_sql("UPDATE limits SET slots = 16, threshold = 1"))
    worker = Worker(live, authorize([slow]), WorkOptions(concurrency=64), run_names=["mine", "theirs"])
    working = asyncio.create_task(worker.run())
    await eventually(lambda: len(finished) > 200)
    await live.write(runs.resume, theirs)
    with pytest.raises(UsageError, match="only the program that defines it"):
        await working
    assert "inflight" not in await states(live, run)
    assert (await states(live, run))["done"] == len(finished)
    await assert_counted(live, run)


async def test_what_was_claimed_beside_a_failure_is_given_back(
    live: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settlement that fails ends the worker; what its loop had just claimed was never called, and costs nothing."""
    calling = asyncio.Event()

    async def waits(prompt: str) -> str:
        calling.set()
        await asyncio.sleep(0.3)
        return prompt

    async def wait_for_the_error(found: list[Claim]) -> None:
        if found and calling.is_set():
            await eventually(lambda: worker._calls.error is not None)

    meanwhile(monkeypatch, claim.claim, after=wait_for_the_error)
    await put(live, ["gone"], task=asks(waits))
    worker = worker_for(live, waits, concurrency=4, grace=1)
    working = asyncio.create_task(worker.run())
    await calling.wait()
    later = await put(live, ["1", "2", "3"], name="later", task=asks(waits))
    with closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute("DELETE FROM jobs WHERE id = 1")
    with pytest.raises(DatabaseError, match="are gone: the database was replaced"):
        await working
    assert await states(live, later) == {"pending": 3}


async def test_a_worker_writes_once_for_each_batch(live: Database) -> None:
    """While there is more to do, no batch takes a transaction for its claims alone."""
    commits = 0

    def count(_: Any) -> None:
        nonlocal commits
        commits += 1

    async def echo(prompt: str) -> str:
        return prompt

    run = await put(live, [f"prompt {n}" for n in range(1_000)], task=asks(echo))
    event.listen(Engine, "commit", count)
    try:
        report = await worker_for(live, echo, concurrency=50).run()
    finally:
        event.remove(Engine, "commit", count)
    assert report.done == 1_000
    # Twenty batches of fifty, and a few to begin and to end.
    assert commits <= 35
    await assert_counted(live, run)
