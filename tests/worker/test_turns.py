"""Group commit: gathering, order, bounds and failure."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, event

from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import Claim, JobId, Prompt, RunId
from lbr.store import claim, limits, runs
from lbr.store.database import open_database
from lbr.worker import worker as worker_module
from lbr.worker.calls import pace
from lbr.worker.worker import Worker
from tests.support import answered, assert_counted, eventually, put, states
from tests.worker.test_worker import asks, worker_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from lbr.core.types import Settlement
    from lbr.store.database import Database


def settlement(number: int, latency_ms: int = 0) -> Settlement:
    """Return the settlement of some job, answered by a call that took so long."""
    done = answered(Claim(JobId(number), RunId(1), 1, 0, 0, Prompt(text="p"), b"k"))
    return replace(done, outcome=replace(done.outcome, latency_ms=latency_ms))


@pytest.mark.parametrize(
    ("turn", "call", "held", "rows", "linger"),
    [
        (0.0, 60.0, 120, 30, 0.05),  # calls do not go on in step
        (0.004, 1.0, 64, 16, 0.02),
        (0.004, 0.1, 64, 16, 0.012),
        (0.02, 0.02, 64, 32, 0.05),  # a slow disk: as many as end during a turn
        (0.002, 0.0, 64, 64, 0.006),  # calls that take no time are written together
        (0.0, 0.0, 64, 64, 0.0),
        (0.01, 10.0, 4_000, 500, 0.05),
        (0.002, 1.0, 2, 1, 0.02),  # few slots wait for no other
    ],
)
def test_pace(turn: float, call: float, held: int, rows: int, linger: float) -> None:
    """A quarter of the slots is worth a turn, more if turns are slow; the wait for so many is short."""
    most, seconds = pace([turn], [settlement(1, round(call * 1000))], held)
    assert most == rows
    assert seconds == pytest.approx(linger)


def test_one_slow_turn_or_call_changes_no_pace() -> None:
    """One of several turns may have been slow by chance, and one call may only have waited for the processor."""
    ended = [settlement(number, 60_000 if number else 100) for number in range(20)]
    assert pace([0.004, 0.004, 0.5, 0.004], ended, 64) == (16, 0.012)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the jobs of each batch that a worker settles, as it goes on."""
    found: list[list[int]] = []

    def noting(write: Any) -> Any:
        def note(connection: Any, now: Any, batch: Sequence[Settlement], *request: Any) -> Any:
            result = write(connection, now, batch, *request)
            found.append([one.claim.job_id for one in batch])
            return result

        return note

    for name in ("settle", "settle_and_claim"):
        monkeypatch.setattr(worker_module, name, noting(getattr(worker_module, name)))
    return found


async def test_everything_is_written_once(live: Database, batches: list[list[int]]) -> None:
    """Calls that end at the same moment are written in batches of at most 500, each of them once."""
    start = asyncio.Event()

    async def all_at_once(prompt: str) -> str:
        if prompt == "1099":
            start.set()
        await start.wait()
        return prompt

    await put(live, [str(n) for n in range(1_100)], task=asks(all_at_once))
    report = await worker_for(live, all_at_once, concurrency=1_100).run()
    assert report.done == 1_100
    assert max(map(len, batches)) <= 500
    assert sorted(job for batch in batches for job in batch) == list(range(1, 1_101))


async def test_calls_that_end_one_by_one_are_committed_together(live: Database, batches: list[list[int]]) -> None:
    """If calls are long, one that ends waits a moment for others."""

    async def one_by_one(prompt: str) -> str:
        await asyncio.sleep(1 + int(prompt) / 500)
        return prompt

    await put(live, [str(n) for n in range(50)], task=asks(one_by_one))
    report = await worker_for(live, one_by_one, concurrency=50).run()
    assert report.done == 50
    assert len(batches) <= 15


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

    whole = claim.settle_and_claim
    loop, told_to_stop = asyncio.get_running_loop(), asyncio.Event()

    def turn(*given: Any) -> Any:
        settled, claims = whole(*given)
        assert claims
        loop.call_soon_threadsafe(worker.drain)
        loop.call_soon_threadsafe(told_to_stop.set)
        return settled, claims

    monkeypatch.setattr(worker_module, "settle_and_claim", turn)
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
    await live.write(limits.slow_start, [asks(slow).answerer])
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


async def test_what_was_claimed_beside_a_failure_is_known(new_queue: Callable[[], str], tmp_path: Path) -> None:
    """On a server a claim goes on while its settlement fails: its worker gives the jobs back, or keeps their answers."""
    server = await open_database(new_queue(), create=True)
    server.spool_places = [tmp_path / "kept"]
    let_go = asyncio.Event()

    async def echo(prompt: str) -> str:
        if prompt == "gone":
            await server.write(lambda connection, _: connection.exec_driver_sql("DELETE FROM lbr.jobs WHERE id = 1"))
        else:
            await let_go.wait()
        return prompt

    run = await put(server, ["gone", "1", "2", "3"], task=asks(echo))
    worker = worker_for(server, echo, concurrency=3, grace=0.1)
    with pytest.raises(DatabaseError, match="are gone: the database was replaced"):
        await worker.run()
    assert await states(server, run) == {"pending": 3}
    await server.close()


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
