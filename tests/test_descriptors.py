"""A worker and the descriptors that its process may have: enough for its calls, or fewer calls."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from lbr.asking import authorize
from lbr.bench.chat import chat_server
from lbr.errors import DatabaseError
from lbr.jobs import Task
from lbr.serving import Servings
from lbr.store import reads
from lbr.store.engines import open_database
from lbr.store.file_connections import READER_PRAGMAS, FileConnections
from lbr.store.file_errors import database_errors
from tests.support import ECHO, Cli, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "openai-chat:gpt-4o-mini"


def limited(folder: Path, limit: str, **environment: str) -> Cli:
    """Return a driver of commands that run under a limit of descriptors, in the words of `ulimit`."""
    return Cli(folder, prefix=["bash", "-c", f'ulimit {limit}; exec "$@"', "-"], **environment)


def served(folder: Path, limit: str, slots: int) -> tuple[str, dict[str, Any], int]:
    """Have as many prompts as slots answered by a server, under the limit; return words, counts and calls."""
    (folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(slots)))
    with chat_server(1.0) as url:
        cli = limited(folder, limit, OPENAI_BASE_URL=url, OPENAI_API_KEY="sk-of-this-test")
        cli("enqueue", "in.txt", "--model", MODEL)
        cli("limit", MODEL, "--concurrency", str(slots))
        said = cli("worker", "--concurrency", str(slots)).stderr
        with urllib.request.urlopen(url, timeout=10) as told:  # noqa: S310
            calls = json.load(told)["calls"]
    assert cli.query("SELECT count(*) FROM attempts") == [(0,)]
    return said, json.loads(cli("status", "in", "--json").stdout)["runs"][0], calls


@pytest.mark.processes
def test_a_worker_raises_its_soft_limit_for_its_slots(tmp_path: Path) -> None:
    """Under the usual kind of limit as many calls run as were asked for, and nothing fails."""
    said, found, calls = served(tmp_path, "-Sn 100", 200)
    assert "descriptors" not in said
    assert (found["done"], calls) == (200, 200)


@pytest.mark.processes
def test_a_worker_that_may_not_makes_fewer_calls_at_a_time(tmp_path: Path) -> None:
    """Where the hard limit is too low, it says so and works with what there is; no job is charged."""
    said, found, calls = served(tmp_path, "-n 120", 200)
    assert "expected descriptors for 200 calls at a time, got: enough for" in said
    assert "raise `ulimit -n`, or start more workers" in said
    assert (found["done"], calls) == (200, 200)


@pytest.mark.processes
def test_functions_have_all_their_slots(tmp_path: Path) -> None:
    """What makes no connections is not held back: these calls end only when all of them run."""
    (tmp_path / "fn.py").write_text(
        "import asyncio\n"
        "meet = asyncio.Barrier(200)\n"
        "async def f(prompt):\n"
        "    await meet.wait()\n"
        "    return prompt\n"
    )
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(200)))
    cli = limited(tmp_path, "-n 120")
    cli("enqueue", "in.txt", "--function", "fn:f")
    said = cli("worker", "--function", "fn:f", "--concurrency", "200", "--timeout", "60").stderr
    assert said == "lbr: worker: 200 done, 0 failed\n"


async def test_slots_are_held_back_while_a_provider_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is that of the runs that are served, and it is told once."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", create=True)
    await put(database, ["a"], name="1", task=ECHO)
    servings = Servings(authorize(), concurrency=50, room=7, limits_cost=False)
    assert servings.learn(await reads.all_runs(database)) == []
    assert servings.slots == 50
    for name in ("2", "3"):
        await put(database, ["a"], name=name, task=Task(model=MODEL), reuse=False)
        told = servings.learn(await reads.all_runs(database))
        assert [("enough for 7" in one) for one in told] == ([True] if name == "2" else [])
        assert servings.slots == 7
    await servings.aclose()
    await database.close()


@contextmanager
def none_left() -> Iterator[None]:
    """Let this process have no descriptor left for the length of the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 20, before[1]))
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    try:
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_file_for_which_no_descriptor_is_left_is_told_as_that(
    tmp_path: Path,
) -> None:
    """SQLite has one code for what it may not open and for what it cannot; the message tells which it was."""
    connections = FileConnections(tmp_path / "queue.db", begin="BEGIN", most=1, pragmas=READER_PRAGMAS)
    with (
        none_left(),
        pytest.raises(DatabaseError, match="expected a descriptor to open it with, got: none left of the"),
        database_errors(tmp_path / "queue.db"),
    ):
        await connections.transact(lambda it: it.execute(text("SELECT count(*) FROM sqlite_master")))
    await connections.close()


async def test_a_look_for_changes_waits_for_a_descriptor(tmp_path: Path) -> None:
    """An idle worker looks with a connection of its own, which it may have to open when all are in use."""
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", create=True)
    with none_left():
        looking = asyncio.create_task(database.changed())
        await asyncio.sleep(0.3)
        assert not looking.done()
    assert await looking
    await database.close()
