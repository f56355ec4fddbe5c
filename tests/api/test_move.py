"""Moving a run between databases: everything comes along, nothing is called for twice, and whatever stops it, it goes on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update
from sqlalchemy.util import await_only

import lbr
from lbr import LbrError, Permanent
from lbr.api.move import Moved
from lbr.api.status import describe, unfinished_words
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import Item, KeyMaker, PauseCause, Paused, Prompt, Shape
from lbr.store import enqueue, reads, runs, sql, transfer
from lbr.store.database import open_database, opened, shown
from lbr.store.schema import results
from lbr.store.settle import settle
from lbr.worker.kept_answers import keep
from tests.models.test_chat import completion
from tests.proofs.test_outages import FUNCTION, calls, check, enqueue_lines, far_driver
from tests.support import (
    ECHO,
    Cli,
    Queue,
    answered,
    assert_counted,
    is_postgresql,
    locked_by_another,
    meanwhile,
    postgres,
    put,
    states,
)
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lbr.core.types import Run
    from lbr.store.database import Database

DIRECTIONS = ("sqlite to postgresql", "postgresql to sqlite", "sqlite to sqlite")


class StoppedError(Exception):
    """What ends a move half way."""


@dataclass
class Calls:
    """What a function was called for; its values are not part of the function's identity."""

    made: list[str] = field(default_factory=list, compare=False)
    fixed: bool = field(default=False, compare=False)


@pytest.fixture(params=DIRECTIONS)
def urls(request: pytest.FixtureRequest, tmp_path: Path, new_queue: Callable[[], str]) -> tuple[str, str]:
    """Return the URLs of two queues: empty ones on PostgreSQL, files that do not exist yet with SQLite."""

    def url(kind: str, name: str) -> str:
        return new_queue() if kind == "postgresql" else f"sqlite:///{tmp_path / name}"

    source, target = request.param.split(" to ")
    return url(source, "source.db"), url(target, "target.db")


async def rows_of(url: str, run: str = "r") -> list[dict[str, Any]]:
    """Return a run's collected rows."""
    rows = (await lbr.collect(run, db_url=url)).rows
    assert rows is not None
    return rows


async def pause_and_move(source: str, target: str, run: str = "r", **options: Any) -> Moved:
    """Move a run as the messages say."""
    await lbr.pause(run, db_url=source)
    return await lbr.move(run, db_url=source, to_url=target, **options)


async def test_everything_comes_along_and_the_rest_is_done_there(urls: tuple[str, str]) -> None:
    """Answers, failures, attempts, order and metadata are the same there; only what is missing is called for, once."""
    source, target = urls
    calls = Calls()

    async def picky(prompt: str) -> str:
        calls.made.append(prompt)
        if prompt == "bad" and not calls.fixed:
            raise Permanent("not today")
        return prompt.upper()

    await lbr.enqueue(["reused"], run="other", function=picky, db_url=source)
    await lbr.work(functions=[picky], db_url=source)
    inputs: list[Any] = [{"prompt": f"p{n % 40}", "id": f"i{n}", "n": n} for n in range(60)]
    await lbr.enqueue([*inputs, "bad", "reused"], run="r", function=picky, db_url=source)
    await lbr.work(run="r", functions=[picky], db_url=source)
    await lbr.enqueue(["new 1", "new 2", "p1"], run="r", function=picky, append=True, db_url=source)
    before = await rows_of(source)
    called = list(calls.made)
    moved = await pause_and_move(source, target)
    assert (moved.inputs, moved.jobs, moved.answers, moved.known) == (65, 44, 41, False)
    assert await rows_of(target) == before
    assert (await lbr.show("r", 60, db_url=target)).tries == (await lbr.show("r", 60, db_url=source)).tries
    assert (await lbr.show("r", 61, db_url=target)).reused
    here, there = [(await lbr.status("r", db_url=url)).runs[0] for url in urls]
    assert (here.state, here.pause_cause, there.state, there.pause_cause) == (
        "paused",
        "moved_to",
        "paused",
        "user",
    )
    assert here.pause_message == f"moved to {shown(target)}"
    for name in ("done", "failed", "pending", "reused", "errors", "input_tokens", "sealed"):
        assert getattr(here, name) == getattr(there, name)
    async with opened(target) as database:
        await assert_counted(database, await database.read(reads.find_run, "r"))
    assert (await lbr.work(functions=[picky], db_url=source)).done == 0
    calls.fixed = True
    await lbr.retry("r", db_url=target)
    await lbr.resume("r", db_url=target)
    assert (await lbr.work(functions=[picky], db_url=target)).done == 3
    assert sorted(calls.made[len(called) :]) == ["bad", "new 1", "new 2"]
    assert {row["status"] for row in await rows_of(target)} == {"done"}
    again = await lbr.move("r", db_url=source, to_url=target)
    assert (again.known, again.hash, again.answers) == (True, moved.hash, 41)


async def test_what_a_run_may_cost_comes_along(urls: tuple[str, str]) -> None:
    """Price and budget are the same there, with what was spent, so that a move lets nobody spend more."""
    source, target = urls
    price = "in=3,out=15"
    await lbr.enqueue([f"p{n}" for n in range(5)], run="r", model="offline:echo", price=price, db_url=source)
    await lbr.work(run="r", max_cost=1.5, db_url=source)
    await lbr.move("r", db_url=source, to_url=target)
    here, there = [(await lbr.status("r", db_url=url)).runs[0] for url in urls]
    assert (there.price, there.max_cost_usd) == ({"in": 3.0, "out": 15.0}, 1.5)
    assert there.cost_usd == here.cost_usd == pytest.approx(5 * 18e-6)


async def test_columns_and_ids_come_along(urls: tuple[str, str], tmp_path: Path) -> None:
    """The output is the same there, byte by byte: columns in the input's order, ids as numbers."""
    source, target = urls
    record = {"z": 1, "prompt": "p", "id": 2**64 - 1, "a": 0.1}
    await lbr.enqueue([record, {"prompt": "q", "id": "2"}], run="r", model="offline:echo", db_url=source)
    await lbr.work(run="r", db_url=source)
    await lbr.move("r", db_url=source, to_url=target)
    for name in ("out.csv", "out.jsonl"):
        files = [tmp_path / f"{number}-{name}" for number in range(2)]
        for file, url in zip(files, urls, strict=True):
            await lbr.collect("r", out=file, db_url=url)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "1-out.csv").read_text().startswith("z,prompt,id,a,result,status,error\n")
    assert [row["id"] for row in await rows_of(target)] == [2**64 - 1, "2"]


async def test_what_a_run_keeps_comes_along(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasoning and raw answers are the same there, and counted in the hash; later runs there reuse them."""
    source, target = urls
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    how: dict[str, Any] = {"model": "openai-chat:gpt-4o-mini", "keep": "reasoning,raw"}
    body = json.dumps(completion(message={"reasoning_content": "hm"}))
    with Scripted(body=body) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        await lbr.enqueue(["a", "b", "a"], run="r", db_url=source, **how)
        await lbr.work(run="r", db_url=source)
    await lbr.move("r", db_url=source, to_url=target)
    before, after = [await lbr.collect("r", include=["reasoning", "raw"], db_url=url) for url in urls]
    assert after.rows == before.rows
    assert [(row["reasoning"], row["raw"]) for row in after.rows or []] == [("hm", body)] * 3
    assert (await lbr.enqueue(["b"], run="s", db_url=target, **how)).counts.reused == 1


STEPS = ("open_copy", "add_page", "digest", "depart", "arrive")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_move_that_dies_at_any_step_goes_on(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Wherever it stopped, the run is claimable in one database at most, and the same call completes the move."""
    monkeypatch.setattr(sql, "FIRST_PAGE", 2)
    source, target = urls
    await lbr.enqueue([f"p{n % 7}" for n in range(10)], run="r", model="offline:echo", db_url=source)
    await lbr.pause("r", db_url=source)
    real = getattr(transfer, step)

    async def dies(*_: Any) -> None:
        raise StoppedError

    async def digests_and_dies(*arguments: Any) -> None:
        await real(*arguments)
        raise StoppedError

    with monkeypatch.context() as patch:
        if step == "digest":
            patch.setattr(transfer, step, digests_and_dies if after else dies)
        else:
            meanwhile(patch, real, **{"after" if after else "before": dies})
        with pytest.raises(StoppedError):
            await lbr.move("r", db_url=source, to_url=target)
    has_arrived = step == "arrive" and after
    has_left = step == "arrive" or (step == "depart" and after)
    assert await may_go_on(source) is not has_left
    assert await may_go_on(target) is has_arrived
    assert (await lbr.move("r", db_url=source, to_url=target)).known is has_arrived
    assert (await may_go_on(source), await may_go_on(target)) == (False, True)
    async with opened(target) as database:
        await assert_counted(database, await database.read(reads.find_run, "r"))
    await lbr.resume("r", db_url=target)
    assert [(await lbr.work(db_url=url)).done for url in urls] == [0, 7]
    assert [row["result"] for row in await rows_of(target)] == [f"p{n % 7}" for n in range(10)]


async def may_go_on(url: str) -> bool:
    """Return whether `lbr resume` lets workers claim a run's jobs there, without warning that it is elsewhere."""
    try:
        async with opened(url) as database:
            run = await database.read(reads.find_run, "r")
            runs.check_not_moving(run)
    except LbrError:
        return False
    return True


@pytest.mark.slow
async def test_two_moves_at_once(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them completes the copy, and the other one does no harm."""
    monkeypatch.setattr(sql, "FIRST_PAGE", 2)
    source, target = urls
    await lbr.enqueue([f"p{n % 70}" for n in range(100)], run="r", model="offline:echo", db_url=source)
    await lbr.pause("r", db_url=source)
    both = await asyncio.gather(
        *(lbr.move("r", db_url=source, to_url=target) for _ in range(2)), return_exceptions=True
    )
    assert any(isinstance(one, Moved) for one in both), both
    assert all(isinstance(one, Moved | LbrError) for one in both), both
    assert (await lbr.move("r", db_url=source, to_url=target)).known
    assert [row["prompt"] for row in await rows_of(target)] == [f"p{n % 70}" for n in range(100)]
    async with opened(target) as database:
        copy = await database.read(reads.find_run, "r")
        assert await states(database, copy) == {"pending": 70}
        await assert_counted(database, copy)


@pytest.mark.slow
async def test_a_run_that_goes_on_while_it_is_copied_stays(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim or more inputs in the last moment keep the run where it is; later the copy is made again."""
    source, target = urls
    await lbr.enqueue(["a", "b"], run="r", model="offline:echo", db_url=source)
    await lbr.pause("r", db_url=source)

    async def goes_on() -> None:
        await lbr.resume("r", db_url=source)
        await lbr.work(db_url=source)
        await lbr.pause("r", db_url=source)

    async def grows() -> None:
        await lbr.enqueue(["a"], run="r", model="offline:echo", append=True, db_url=source)

    for change in (goes_on, grows):
        with monkeypatch.context() as patch:
            meanwhile(patch, transfer.depart, change)
            with pytest.raises(DatabaseError, match="changed while it was copied, and stays there"):
                await lbr.move("r", db_url=source, to_url=target, restart=True)
        assert (await may_go_on(source), await may_go_on(target)) == (True, False)
    assert (await lbr.move("r", db_url=source, to_url=target)).answers == 2
    assert [row["result"] for row in await rows_of(target)] == ["a", "b", "a"]


async def test_a_held_job_keeps_a_run(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not leave while a worker holds a job, not even one that was claimed in the last moment."""
    source, target = urls
    database = await open_database(source, create=True)
    run = await put(database, ["a"])
    worker = await Queue(database).register(host="h", pid=1, concurrency=1)
    await database.write(runs.pause, run, "by hand")

    async def claimed() -> None:
        await database.write(runs.resume, run)
        claims = await Queue(database).claim(worker, [run.id], 1, lease=60)
        await database.write(runs.pause, run, "by hand")
        assert len(claims) == 1

    meanwhile(monkeypatch, transfer.depart, claimed)
    with pytest.raises(DatabaseError, match="changed while it was copied"):
        await lbr.move("r", db_url=source, to_url=target)
    with pytest.raises(UsageError, match=r"is paused, with 0 jobs to do and 1 held by workers; wait until no"):
        await lbr.move("r", db_url=source, to_url=target)
    await database.close()


async def test_active_runs_are_refused(urls: tuple[str, str], tmp_path: Path) -> None:
    """A run with jobs to do is paused first; one that is finished may go as it is."""
    source, target = urls
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=source)
    with pytest.raises(UsageError, match=r"'r' is active, with 1 job to do and 0 held by workers; `lbr pause r`, wait"):
        await lbr.move("r", db_url=source, to_url=target)
    assert not (tmp_path / "target.db").exists()
    await lbr.work(db_url=source)
    assert (await lbr.move("r", db_url=source, to_url=target)).answers == 1
    assert (await lbr.status("r", db_url=target)).runs[0].state == "active"


async def test_kept_answers_come_along(urls: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that wait in a file are taken up before the run leaves, and not called for again where it goes on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source, target = urls
    database = await open_database(source, create=True)
    run = await put(database, ["a", "b", "c"])
    queue = Queue(database)
    worker = await queue.register(host="gone", pid=1, concurrency=2)
    path = keep(database, [answered(c, "paid") for c in await queue.claim(worker, [run.id], 2, lease=2)])
    told: list[str] = []
    moved = await pause_and_move(source, target, notify=told.append)
    assert moved.answers == 2
    assert [line for line in told if "wrote 2 answers" in line], told
    assert not path.exists()
    await lbr.resume("r", db_url=target)
    assert (await lbr.work(db_url=target)).done == 1
    assert [row["result"] for row in await rows_of(target)] == ["paid", "paid", "c"]
    await database.close()


async def test_kept_answers_that_cannot_be_taken_up_hold_a_run(
    urls: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of answers that cannot be read keeps the runs of a database where they are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source, target = urls
    database = await open_database(source, create=True)
    run = await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="gone", pid=1, concurrency=1)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    path = keep(database, [answered(claim)])
    await queue.release(worker, [claim])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UsageError, match=r"finished answers are still kept in .*cannot be written to"):
        await pause_and_move(source, target)
    path.write_bytes(whole)
    assert (await lbr.move("r", db_url=source, to_url=target)).answers == 1
    await database.close()


@pytest.mark.parametrize("urls", DIRECTIONS[:1], indirect=True)
async def test_a_dead_workers_lease_is_not_waited_for(urls: tuple[str, str]) -> None:
    """Where a lock tells that a worker has ended, its jobs come along at once."""
    source, target = urls
    database = await open_database(source, create=True)
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="here", pid=1, concurrency=2)
    await queue.claim(worker, [run.id], 2, lease=3600)
    queue.leave(worker)
    await pause_and_move(source, target)
    status = (await lbr.status("r", db_url=target)).runs[0]
    assert (status.pending, status.inflight, status.crashed) == (2, 0, 2)
    await database.close()


@pytest.mark.slow
@pytest.mark.parametrize("urls", DIRECTIONS[:2], indirect=True)
async def test_a_move_after_an_outage_pays_for_no_answer_twice(urls: tuple[str, str], tmp_path: Path) -> None:
    """What a worker could not write is written by the move, whose copy calls only for what is left."""
    here, there = [far_driver(tmp_path, url, LATENCY="1", STALL="3") for url in urls]
    try:
        lines = await asyncio.to_thread(enqueue_lines, here, 20)
        worker = here.start("worker", *FUNCTION, "--concurrency", "4", "--patience", "1", "--lease", "5")
        await asyncio.to_thread(here.wait_for, "in", "inflight", 4)
        async with locked_by_another(urls[0]):
            _, told = await asyncio.to_thread(worker.communicate, timeout=120)
        assert "4 finished answers are kept in" in told
        await asyncio.to_thread(here, "pause", "in")
        moved = await asyncio.to_thread(here, "move", *urls, "in")
        assert "wrote 4 answers" in moved.stderr
        assert ", 4 answers moved to" in moved.stdout
        await asyncio.to_thread(there, "resume", "in")
        await asyncio.to_thread(there, "worker", *FUNCTION)
        assert calls(tmp_path) == Counter(dict.fromkeys(lines, 1))
        await asyncio.to_thread(check, there, lines)
    finally:
        await asyncio.to_thread(here.stop_all)
        await asyncio.to_thread(there.stop_all)


async def test_states_come_along(urls: tuple[str, str]) -> None:
    """A run that is paused or cancelled is so there."""
    source, target = urls
    await lbr.enqueue(["a"], run="paused", model="offline:echo", db_url=source)
    await lbr.enqueue(["b"], run="cancelled", model="offline:echo", db_url=source)
    await lbr.pause("paused", reason="no credit", db_url=source)
    await lbr.cancel("cancelled", db_url=source)
    for name in ("paused", "cancelled"):
        await lbr.move(name, db_url=source, to_url=target)
    found = {run.run: (run.state, run.pause_cause, run.pause_message) for run in (await lbr.status(db_url=target)).runs}
    assert found == {"paused": ("paused", "user", "no credit"), "cancelled": ("cancelled", None, None)}


async def test_workers_pass_over_a_copy_that_rests(urls: tuple[str, str]) -> None:
    """A moved run is not reported, so that a cron line beside it does not fail for ever, unless it is named."""
    source, target = urls
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=source)
    await lbr.pause("r", reason="no credit", db_url=source)
    await lbr.move("r", db_url=source, to_url=target)
    told: list[str] = []
    assert (await lbr.work(db_url=source, notify=told.append)).paused == {}
    assert told == []
    assert (await lbr.work(run="r", db_url=source, notify=told.append)).paused == {}
    (line,) = told
    assert line.startswith("run r was moved to ")
    assert line.endswith(" and goes on there; name that database with --db")
    assert "no credit" not in line
    assert (await lbr.work(run="r", db_url=target)).paused == {"r": Paused(PauseCause.USER, "no credit")}


async def test_a_copy_that_rests_keeps_its_mark(urls: tuple[str, str]) -> None:
    """A run that has left is not paused, cancelled or retried, takes no inputs and moves no second time."""
    source, target = urls
    await lbr.enqueue(["a", "b"], run="r", model="offline:echo", db_url=source)
    await pause_and_move(source, target)
    for change in (lbr.pause, lbr.cancel, lbr.retry):
        with pytest.raises(UsageError, match="run 'r' was moved to .* and goes on there"):
            await change("r", db_url=source)
    with pytest.raises(UsageError, match="goes on there"):
        await lbr.enqueue(["c"], run="r", model="offline:echo", append=True, db_url=source)
    assert (await lbr.status("r", db_url=source)).runs[0].pause_cause == "moved_to"
    assert (await lbr.move("r", db_url=source, to_url=target)).known


async def test_a_half_done_copy_takes_no_changes(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-done copy is not paused, resumed or cancelled; the run may go on where it is."""
    source, target = urls
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=source)

    def stops(*_: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(transfer, "add_page", stops)
    with pytest.raises(StoppedError):
        await pause_and_move(source, target)
    for change in (lbr.pause, lbr.cancel, lbr.resume):
        with pytest.raises(UsageError, match="run 'r' is still moving from"):
            await change("r", db_url=target)
    found = await lbr.status("r", db_url=target)
    (words,) = [line for line in describe(found).splitlines() if "paused:" in line]
    assert words.endswith("; finish that with the same `lbr move`")
    assert unfinished_words("r", found.runs[0].pause) == words.strip()
    await lbr.resume("r", db_url=source)
    assert (await lbr.work(db_url=source)).done == 1


async def test_a_copy_that_differs_is_found(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is different there is found by the hash; the copy stays paused."""
    source, target = urls
    await lbr.enqueue([f"p{n}" for n in range(5)], run="r", model="offline:echo", db_url=source)
    await lbr.work(db_url=source)
    real = transfer.digest

    async def forges(database: Database, run: Run) -> tuple[int, str]:
        forging = update(results).where(results.c.text == "p3").values(text="forged")
        if run.is_paused_by(PauseCause.MOVING_FROM):
            await database.write(lambda connection, _: connection.execute(forging))
        return await real(database, run)

    monkeypatch.setattr(transfer, "digest", forges)
    differs = r"differs: 5 inputs with hash \w+ in .*, 5 with hash \w+ in .*; the copy there stays paused.*restart=True"
    with pytest.raises(DatabaseError, match=differs):
        await lbr.move("r", db_url=source, to_url=target)
    there = (await lbr.status("r", db_url=target)).runs[0]
    assert (there.state, there.sealed) == ("paused", False)
    monkeypatch.setattr(transfer, "digest", real)
    with pytest.raises(DatabaseError, match="differs: 5 inputs"):
        await lbr.move("r", db_url=source, to_url=target)
    assert (await lbr.move("r", db_url=source, to_url=target, restart=True)).answers == 5
    assert [row["result"] for row in await rows_of(target)] == [f"p{n}" for n in range(5)]


async def test_what_cannot_be_moved_is_refused(urls: tuple[str, str]) -> None:
    """A name that is taken, a run that is not there, and one database under two names are refused."""
    source, target = urls
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=source)
    with pytest.raises(UsageError, match="name a different database"):
        await lbr.move("r", db_url=source, to_url=source)
    with pytest.raises(UsageError, match="no run named 'x'"):
        await lbr.move("x", db_url=source, to_url=target)
    await lbr.work(db_url=source)
    await lbr.enqueue(["b"], run="r", model="offline:echo", db_url=target)
    with pytest.raises(UsageError, match="already has a different run named 'r'"):
        await lbr.move("r", db_url=source, to_url=target)
    await lbr.enqueue(["a"], run="s", model="offline:echo", db_url=source)
    await lbr.enqueue(["a"], run="s", model="offline:echo", settings={"seed": 1}, db_url=target)
    with pytest.raises(UsageError, match="already has a different run named 's'"):
        await pause_and_move(source, target, "s")
    assert (await lbr.status("r", db_url=source)).runs[0].state == "active"


async def test_a_call_that_comes_during_a_move_wakes_no_copy(tmp_path: Path) -> None:
    """`prompt_map` resumes a paused run, but not one that was moved after it looked: both databases would call."""
    here, there = (f"sqlite:///{tmp_path / name}.db" for name in ("here", "there"))
    await lbr.enqueue(["a", "b"], run="r", model="offline:echo", db_url=here)
    async with opened(here) as database:
        run = await database.write(runs.pause, await database.read(reads.find_run, "r"), "by hand")
        await lbr.move("r", db_url=here, to_url=there)
        with pytest.raises(UsageError, match="was moved to"):
            await database.write(runs.resume, run, moved=False)
        assert (await database.read(reads.find_run, "r")).state == "paused"


@pytest.mark.slow
def test_killed_move_goes_on(tmp_path: Path, new_database: Callable[[], str]) -> None:
    """A move that is killed while it copies goes on with the same command, and shows no password."""
    target = new_database()
    (tmp_path / "in.txt").write_text("".join(f"prompt {n % 9_000}\n" for n in range(10_000)))
    cli = Cli(tmp_path)
    cli("enqueue", "in.txt", "--model", "offline:echo")
    cli("worker", "--concurrency", "500")
    there = Cli(tmp_path, db_url=target)
    first = cli.start("move", "runs.db", target, "in")
    there.wait_for("in", "inputs", 2_000)
    first.kill()
    first.communicate()
    held = int(there.query("SELECT count(*) FROM items")[0][0])
    assert 2_000 <= held < 10_000
    assert is_postgresql(target)
    done = json.loads(cli("move", "runs.db", target, "in", "--json").stdout)
    assert (done["inputs"], done["jobs"], done["answers"]) == (10_000, 9_000, 9_000)
    assert "was moved before to" in cli("move", "runs.db", target, "in").stdout
    assert "and goes on there: calls that workers make for it here are paid for again" in cli("resume", "in").stderr
    assert cli("resume", "in").stderr == ""
    assert there.collect("in") == cli.collect("in")
    with postgres.connect(target) as connection:
        assert connection.execute("SELECT count(*) FROM lbr.results").fetchone() == (9_000,)
    cli.stop_all()
    there.stop_all()


async def test_a_run_that_is_still_enqueued_is_refused(urls: tuple[str, str]) -> None:
    """A run whose inputs may still be arriving stays where it is, active as it was."""
    source, target = urls
    database = await open_database(source, create=True)
    run = await put(database, ["a"])
    item = Item(Prompt(text="b"))
    await database.write(enqueue.add_chunk, run, 1, [item], [KeyMaker(ECHO).key(item.prompt)], reuse=True)
    with pytest.raises(UsageError, match="its enqueue has not finished"):
        await lbr.move("r", db_url=source, to_url=target)
    assert (await database.read(reads.find_run, "r")).state == "active"
    await database.close()


async def test_a_reused_answer_stays_until_it_is_copied(
    new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is cleared while another run reuses its answers leaves these to that run, or it calls again."""
    url = new_database()
    database = await open_database(url, create=True)
    first = await put(database, ["a"], name="first")
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=1)
    await database.write(settle, [answered(c, "A") for c in await queue.claim(worker, [first.id], 1, lease=60)])
    copy = await database.write(runs.pause, first, "moving from elsewhere", cause=PauseCause.MOVING_FROM)
    other = await open_database(url)
    real, clearing = enqueue._find_answers, []

    async def clear() -> None:
        clearing.append(asyncio.create_task(transfer.clear(other, copy)))
        while not clearing[0].done() and not postgres.waiting(url):
            await asyncio.wait(clearing, timeout=0.01)

    def find_and_wait(connection: Any, new: Any, keep: Any) -> Any:
        found = real(connection, new, keep)
        await_only(clear())
        return found

    monkeypatch.setattr(enqueue, "_find_answers", find_and_wait)
    second = await put(database, ["a"], name="second")
    await clearing[0]
    rows = [row async for page in reads.rows(database, second, Shape.ORIGINAL) for row in page]
    assert [(row.status, row.result) for row in rows] == [("done", "A")]
    assert await states(database, first) == {}
    await assert_counted(database, second)
    await other.close()
    await database.close()
