"""Kept answers: finished answers that the database did not take, in files until the next worker settles them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select, update

from lbr.core.extras import Extra, Extras
from lbr.core.types import Outcome, Reply
from lbr.store import files, reads
from lbr.store.database import open_database
from lbr.store.schema import jobs
from lbr.store.settle import settle
from lbr.worker.kept_answers import keep, reclaim, settle_kept
from tests.store.test_settle import TRANSIENT
from tests.support import Queue, answered, assert_counted, failed, is_postgresql, put, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from lbr.core.types import Claim, Run
    from lbr.store.database import Database


async def opened(db_url: str, tmp_path: Path) -> Database:
    """Return an open queue that keeps answers in a folder of the test."""
    database = await open_database(db_url, create=True)
    database.spool_places = [tmp_path / "kept" / "queue"]
    return database


@pytest.fixture
async def queue(db_url: str, tmp_path: Path) -> AsyncIterator[Database]:
    """Return an empty queue."""
    database = await opened(db_url, tmp_path)
    yield database
    await database.close()


async def claimed(database: Database, prompts: list[str], *, keep: tuple[Extra, ...] = ()) -> tuple[Run, list[Claim]]:
    """Return a run of these prompts, with a claim of each."""
    run = await put(database, prompts, keep=keep)
    worker = await Queue(database).register(host="h", pid=1, concurrency=len(prompts))
    return run, await Queue(database).claim(worker, [run.id], len(prompts), lease=60)


@pytest.mark.slow
async def test_workers_that_start_together_settle_each_answer_once(
    queue: Database, db_url: str, tmp_path: Path
) -> None:
    """Two workers may settle the same file at once: answers are counted, and failures charged, once."""
    run, (one, *others) = await claimed(queue, [f"p{n}" for n in range(250)])
    path = keep(queue, [failed(one, TRANSIENT), *map(answered, others)])
    second = await opened(db_url, tmp_path)
    lines: list[str] = []
    await asyncio.gather(*(settle_kept(database, lines.append) for database in (queue, second)))
    assert not [line for line in lines if "are not written" in line]
    assert not path.exists()
    assert await states(queue, run) == {"done": 249, "pending": 1}
    charged = await queue.read(lambda connection, _: connection.execute(select(func.sum(jobs.c.attempts))))
    assert charged.scalar_one() == 250
    await assert_counted(queue, run)
    await second.close()


async def test_answers_of_another_database_are_left_alone(queue: Database) -> None:
    """A kept answer whose job is a different one here, or a file that lbr did not write, is reported and stays."""
    run, (one, two) = await claimed(queue, ["a", "b"])
    path = keep(queue, [answered(one, "ours\x85"), answered(replace(two, key=b"x"))])
    rubbish = path.with_name("queue.1-2.spool.jsonl")
    rubbish.write_text('{"job": 1}\n')
    lines: list[str] = []
    await settle_kept(queue, lines.append)
    assert any("1 of 2 kept answers belong to another database" in line for line in lines)
    assert any("something else" in line for line in lines)
    assert not path.exists()
    (left,) = path.parent.glob("*.left.jsonl")
    assert left.read_text().count("\n") == 2
    assert rubbish.exists()
    lines.clear()
    await settle_kept(queue, lines.append)
    assert lines == []  # reported once
    assert await states(queue, run) == {"done": 1, "inflight": 1}
    assert (await queue.read(reads.story, run, 0)).row.result == "ours\x85"


async def test_what_the_run_keeps_is_kept_with_its_answer(queue: Database) -> None:
    """Reasoning comes back from the file with the answer; the run that asked for it has it."""
    run, (one,) = await claimed(queue, ["a"], keep=(Extra.REASONING,))
    reply = Reply("fine", extras=Extras(reasoning="hm\u2028"))
    keep(queue, [replace(answered(one), outcome=Outcome(reply, None, 5))])
    await settle_kept(queue, lambda _: None)
    row = (await queue.read(reads.story, run, 0)).row
    assert (row.result, row.kept) == ("fine", {"reasoning": "hm\u2028"})


@pytest.mark.parametrize("state", ["failed", "pending"])
async def test_a_kept_answer_ends_its_job(queue: Database, state: str) -> None:
    """A line with an answer and another state was changed by the user, and is not settled."""
    run, (one,) = await claimed(queue, ["a"])
    path = keep(queue, [answered(one)])
    path.write_text(path.read_text().replace('"state":"done"', f'"state":"{state}"'))
    lines: list[str] = []
    await settle_kept(queue, lines.append)
    assert [f"no such call ends {state}" in line for line in lines] == [True]
    assert await states(queue, run) == {"inflight": 1}


@pytest.mark.parametrize("before", [[], ["x", "y"]], ids=["same-ids", "other-ids"])
async def test_a_database_that_was_created_again_takes_kept_answers(
    queue: Database, db_url: str, tmp_path: Path, new_database: Callable[[], str], before: list[str]
) -> None:
    """The same prompts, enqueued again, get their answers; a failure is none, and a call in flight goes on."""
    prompts = ["a", "b", "c"]
    run, first = await put(queue, prompts), Queue(queue)
    worker = await first.register(host="h", pid=1, concurrency=3)
    await first.release(worker, await first.claim(worker, [run.id], 3, lease=60))
    one, two, three = await first.claim(worker, [run.id], 3, lease=60)
    keep(queue, [answered(one, "paid for"), answered(two, "late"), failed(three, TRANSIENT)])

    again = new_database() if is_postgresql(db_url) else f"sqlite+aiosqlite:///{tmp_path / 'again.db'}"
    database = await opened(again, tmp_path)
    other = await put(database, before)
    run = await put(database, prompts, name="again")
    worker = await Queue(database).register(host="h", pid=2, concurrency=1)
    held = await Queue(database).claim(worker, [run.id], 1, lease=60)
    assert [claim.prompt.text for claim in held] == ["a"]
    lines: list[str] = []
    await settle_kept(database, lines.append)
    assert (await database.read(reads.story, run, 1)).row.result == "late"
    assert await states(database, run) == {"inflight": 1, "done": 1, "pending": 1}
    await database.write(settle, [answered(held[0], "mine")])
    assert (await database.read(reads.story, run, 0)).row.result == "mine"
    await assert_counted(database, run)
    await assert_counted(database, other)
    await database.close()


async def test_half_written_files_are_removed(queue: Database) -> None:
    """A file that a killed process was writing is removed; one that is being written stays."""
    run, (one, two) = await claimed(queue, ["a", "b"])
    path = keep(queue, [answered(one), answered(replace(two, key=b"x"))])
    left = path.name.replace(".spool.", ".left.")
    path.with_name(".queue.1-2.spool.jsonl.0123abcd.part").write_text("half of an ans")
    living, new = path.with_name(".queue.3-4.spool.jsonl.part"), path.with_name(".queue.5-6.spool.jsonl.part")
    new.touch()
    with living.open("w") as file:
        files.lock_open(file.fileno())
        file.write("half of an ans")
        file.flush()
        await settle_kept(queue, lambda _: None)
    assert {part.name for part in path.parent.iterdir()} == {left, living.name, new.name}
    assert await states(queue, run) == {"done": 1, "inflight": 1}


async def expire(database: Database) -> None:
    """Let the leases of all claims end now."""
    await database.write(lambda connection, _: connection.execute(update(jobs).values(lease_until=1)))


async def test_a_running_worker_settles_kept_answers_before_it_reclaims(
    queue: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no lock shows that a worker died, its leases end before another worker starts: its answers are written."""
    monkeypatch.setattr(queue.presence, "knows", False)  # as on PostgreSQL and on network file systems
    run, claims = await claimed(queue, ["a", "b"])
    keep(queue, [answered(one, "paid for") for one in claims])
    await expire(queue)
    assert await reclaim(queue, lambda _: None) == (0, 0)
    assert await states(queue, run) == {"done": 2}
    await assert_counted(queue, run)


async def test_an_error_that_may_pass_is_reported_once_and_asks_for_time(queue: Database) -> None:
    """Jobs of a dead worker are not taken back while its answers cannot be read; a file of nonsense delays nothing."""
    _, (one,) = await claimed(queue, ["a"])
    path = keep(queue, [answered(one)])
    unread = path.with_name("queue.1-3.spool.jsonl")
    unread.symlink_to(unread.name)
    lines: list[str] = []
    assert [await settle_kept(queue, lines.append) for _ in range(2)] == [False, False]
    assert len([line for line in lines if str(unread) in line]) == 1
    unread.unlink()
    unread.write_text("nonsense")
    assert await settle_kept(queue, lines.append)


async def test_two_claims_of_a_job_may_be_kept_together(queue: Database) -> None:
    """The claim that the fence takes is written, though the file begins with one that ended before."""
    run, (one,) = await claimed(queue, ["a"])
    await expire(queue)
    await Queue(queue).reclaim()
    worker = await Queue(queue).register(host="h", pid=2, concurrency=1)
    (two,) = await Queue(queue).claim(worker, [run.id], 1, lease=60)
    path = keep(queue, [answered(one, "first"), answered(two, "second")])
    await settle_kept(queue, lambda _: None)
    assert (await queue.read(reads.story, run, 0)).row.result in {"first", "second"}
    assert not list(path.parent.iterdir())
    await assert_counted(queue, run)
