"""Rows that are written as their jobs finish: in order, whole, each once, whatever ended the command before."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

import lbr
from lbr.core.errors import OutputError, UsageError
from lbr.core.types import WorkerId
from lbr.io import writers
from lbr.store.database import opened
from lbr.store.settle import settle
from tests.support import Cli, Queue, answered, put

if TYPE_CHECKING:
    from pathlib import Path

    from lbr.core.types import Claim, Run
    from lbr.store.database import Database


def places(path: Path) -> list[int]:
    """Return the places of the whole rows in a file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["idx"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


async def until(path: Path, expected: list[int]) -> None:
    """Wait until a file has these rows."""
    async with asyncio.timeout(20):
        while places(path) != expected:  # noqa: ASYNC110 - of a file
            await asyncio.sleep(0.02)


async def claimed(database: Database, run: Run, count: int) -> dict[str, Claim]:
    """Claim jobs, by their prompts."""
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=count)
    return {str(one.prompt.text): one for one in await queue.claim(WorkerId(worker), [run.id], count, lease=600)}


async def test_rows_come_as_jobs_finish_and_once(db_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In input order up to the gap; killed and torn, it goes on; another order goes on behind that; then it ends."""
    monkeypatch.setattr("lbr.api.follow.LOOK_SECONDS", 0.02)
    out = tmp_path / "o.jsonl"
    async with opened(db_url, create=True) as database:
        run = await put(database, ["a", "b", "a", "c", "d"])
        jobs = await claimed(database, run, 4)

        async def follow(order: str = "input") -> lbr.Collected:
            return await lbr.collect("r", out=out, follow=True, order=order, include="usage", db_url=db_url)

        following = asyncio.create_task(follow())
        await database.write(settle, [answered(jobs["a"]), answered(jobs["d"])])
        await until(out, [0])
        with pytest.raises(OutputError, match="another process"):
            await follow()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        with out.open("ab") as file:
            file.write(b'{"idx":4,"key":"')
        following = asyncio.create_task(follow("finished"))
        await until(out, [0, 2, 4])
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        following = asyncio.create_task(follow())
        await database.write(settle, [answered(jobs["c"])])
        await asyncio.sleep(0.2)
        assert places(out) == [0, 2, 4]
        await database.write(settle, [answered(jobs["b"])])
        collected = await asyncio.wait_for(following, 20)
        assert places(out) == [0, 2, 4, 1, 3]
        assert (collected.by_status, collected.failed, collected.sealed) == ({"done": 5}, 0, True)
        assert all("latency_ms" in json.loads(line) for line in out.read_text().splitlines())
        before = out.read_bytes()
        assert (await follow("finished")).total == 5
        assert out.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("order", ["input", "finished"])
async def test_a_large_run_is_written_whole(db_url: str, tmp_path: Path, order: str) -> None:
    """More rows than one look and one page read, some of them in the file already."""
    await lbr.enqueue([f"p{i % 5_500}" for i in range(6_000)], run="r", model="offline:echo", db_url=db_url)
    await lbr.cancel("r", db_url=db_url)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    await lbr.collect("r", out=whole, db_url=db_url)
    lines = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[10:5_200]))
    collected = await lbr.collect("r", out=out, follow=True, order=order, db_url=db_url)
    assert (collected.total, collected.failed) == (6_000, 6_000)
    assert out.read_bytes().splitlines(keepends=True) == [*lines[10:5_200], *lines[:10], *lines[5_200:]]


async def test_it_ends_with_a_paused_run(db_url: str, tmp_path: Path) -> None:
    """What is not finished is counted, so that the command exits with 3."""
    await lbr.enqueue(["a", "b"], run="r", model="offline:echo", db_url=db_url)
    await lbr.pause("r", db_url=db_url)
    collected = await lbr.collect("r", out=tmp_path / "o.jsonl", follow=True, db_url=db_url)
    assert (collected.unfinished, places(tmp_path / "o.jsonl")) == (2, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"notes", "line 1 is no finished row"),
        (b'{"idx":0,"key":"0","status":"pending"}\n', "line 1 is no finished row"),
        (b'{"idx":0,"key":"0","status":"done"}\n[1]\n', "line 2 is no finished row"),
        (b'{"idx":0,"key":"0","status":"done"}\n', "rows of another run than 'r'"),
        (b'{"idx":7,"key":"0","status":"done"}\n', "rows of another run than 'r'"),
    ],
)
async def test_a_file_with_something_else_is_refused_and_kept(
    db_url: str, tmp_path: Path, content: bytes, says: str
) -> None:
    """Nothing of it is cut off or appended."""
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=db_url)
    await lbr.cancel("r", db_url=db_url)
    out = tmp_path / "o.jsonl"
    out.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        await lbr.collect("r", out=out, follow=True, db_url=db_url)
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "flags",
    [
        {"out": "o.csv", "follow": True},
        {"follow": True},
        {"out": "-", "follow": True, "format": "openai"},
        {"out": "-", "follow": True, "failed": True},
        {"out": "-", "follow": True, "shape": "unique"},
        {"out": "-", "order": "finished"},
        {"out": "-", "follow": True, "order": "random"},
    ],
)
async def test_flags_that_do_not_fit_are_refused(tmp_path: Path, flags: dict[str, str]) -> None:
    """Before the database is opened."""
    if (out := flags.get("out", "-")) != "-":
        flags = flags | {"out": str(tmp_path / out)}
    with pytest.raises(UsageError, match="follow|order"):
        await lbr.collect("r", **flags, db_url=tmp_path / "none.db")  # type: ignore[arg-type]


def test_a_torn_row_is_cut_off(tmp_path: Path) -> None:
    """At whatever byte the writer was killed."""
    row = b'{"idx":%d,"key":"k","status":"done"}\n'
    out = tmp_path / "o.jsonl"
    for kept in range(len(row % 1)):
        out.write_bytes(row % 0 + (row % 1)[:kept])
        with writers.open_appender(str(out)) as (_, written, last):
            assert (bytes(written), last) == (b"\1", (0, "k"))
        assert out.read_bytes() == row % 0


@pytest.mark.slow
def test_ctrl_c_leaves_whole_lines_and_a_closed_pipe_ends_it_quietly(cli: Cli) -> None:
    """The commands exit as others that are interrupted, and print no traceback; afterwards the file goes on."""
    (cli.folder / "p.txt").write_text("".join(f"{i}\n" for i in range(40)))
    cli("enqueue", "p.txt", "--model", "offline:echo", "--set", "latency=0.2")
    piped = cli.start("collect", "p", "--follow")
    assert piped.stdout is not None
    to_file = cli.start("collect", "p", "--follow", "-o", "o.jsonl")
    working = cli.start("worker", "--concurrency", "2")
    assert json.loads(piped.stdout.readline())["idx"] == 0
    piped.stdout.close()
    while not places(cli.folder / "o.jsonl"):
        time.sleep(0.02)
    to_file.send_signal(signal.SIGINT)
    assert to_file.wait(30) == 130
    assert piped.wait(60) == 1
    assert piped.stderr is None or "Traceback" not in piped.stderr.read()
    text = (cli.folder / "o.jsonl").read_text()
    assert text.endswith("\n")
    assert cli("collect", "p", "--follow", "-o", "o.jsonl").returncode == 0
    assert places(cli.folder / "o.jsonl") == list(range(40))
    assert working.wait(60) == 0
