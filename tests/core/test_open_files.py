"""A worker and its limit of open files: enough for its calls, or fewer calls."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from bench_chat import chat_server
from stamina.instrumentation import set_on_retry_hooks

from lbr.api.task import authorize
from lbr.core import open_files
from lbr.core.errors import CallError, DatabaseError, Usage, UsageError
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.http import Connections
from lbr.models.pydantic_ai import PydanticAIModel
from lbr.store import reads
from lbr.store.database import open_database
from lbr.store.sqlite import SQLiteDatabase
from lbr.worker import runs as serving
from lbr.worker.attempt import Deadlines, LateCalls, OutOfFilesError, attempt
from lbr.worker.runs import ServableRuns
from tests.support import ECHO, Cli, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from lbr.store.database import Database

pytestmark = pytest.mark.slow

MODEL = "openai-chat:gpt-4o-mini"


def limited(cli: Cli, limit: str) -> Cli:
    """Return another driver, of commands that run under a limit of open files, in the words of `ulimit`."""
    made = Cli(cli.folder, prefix=["bash", "-c", f'ulimit {limit}; exec "$@"', "-"])
    made.environment = cli.environment
    return made


def served(folder: Path, limit: str, slots: int) -> tuple[str, dict[str, Any], int]:
    """Have as many prompts as slots answered by a server, under the limit; return words, counts and calls."""
    (folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(slots)))
    with chat_server(1.0) as url:
        cli = Cli(folder, OPENAI_BASE_URL=url, OPENAI_API_KEY="sk-of-this-test")
        cli("enqueue", "in.txt", "--model", MODEL)
        cli("limit", MODEL, "--concurrency", str(slots))
        said = limited(cli, limit)("worker", "--concurrency", str(slots)).stderr
        with urllib.request.urlopen(url, timeout=10) as told:  # noqa: S310
            calls = json.load(told)["calls"]
    assert cli.query("SELECT count(*) FROM attempts") == [(0,)]
    return said, json.loads(cli("status", "in", "--json").stdout)["runs"][0], calls


@pytest.mark.processes
def test_a_worker_raises_its_soft_limit_for_its_slots(tmp_path: Path) -> None:
    """Under the usual kind of limit as many calls run as were asked for, and nothing fails."""
    said, found, calls = served(tmp_path, "-Sn 100", 200)
    assert "open files" not in said
    assert (found["done"], calls) == (200, 200)


@pytest.mark.processes
def test_a_worker_that_may_not_makes_fewer_calls_at_a_time(tmp_path: Path) -> None:
    """Where the hard limit is too low, it says so and works with what there is; no job is charged."""
    said, found, calls = served(tmp_path, "-n 120", 200)
    assert re.search(
        r"the limit of open files \(120\) allows \d+ calls at a time, not 200; raise it with `ulimit", said
    )
    assert (found["done"], calls) == (200, 200)


@pytest.mark.processes
def test_runs_that_ask_for_other_things_share_their_connections(tmp_path: Path) -> None:
    """What the calls of one run leave idle is used by those of the next, or gives way."""
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(200)))
    with chat_server(0.3) as url:
        cli = Cli(tmp_path, OPENAI_BASE_URL=url, OPENAI_API_KEY="sk-of-this-test")
        for name in ("a", "b", "c", "d"):
            cli("enqueue", "in.txt", "--run", name, "--model", MODEL, "--instructions", f"Be {name}.")
        cli("limit", MODEL, "--concurrency", "80")
        said = limited(cli, "-n 160")("worker", "--concurrency", "80").stderr
    first, *runs = said.splitlines()
    assert first == "lbr: worker: 800 done, 0 failed"
    assert [line.partition(";")[0] for line in runs] == [f"lbr: run {name}: 200 of 200 jobs done" for name in "abcd"]
    assert cli.query("SELECT count(*) FROM attempts") == [(0,)]


@pytest.mark.processes
def test_a_call_that_finds_no_handle_waits_for_one(tmp_path: Path) -> None:
    """A function takes nearly all for a while: no job is charged, and a line says so once."""
    (tmp_path / "fn.py").write_text(
        "import asyncio, os, pathlib\n"
        "async def f(prompt):\n"
        "    taken = []\n"
        "    try:\n"
        "        while True:\n"
        "            taken.append(os.dup(0))\n"
        "    except OSError:\n"
        "        for _ in range(12):\n"
        "            os.close(taken.pop())\n"
        "    pathlib.Path('taken').write_text('nearly all')\n"
        "    await asyncio.sleep(2)\n"
        "    for one in taken:\n"
        "        os.close(one)\n"
        "    return 'given back'\n"
    )
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(60)))
    with chat_server(0.2) as url:
        cli = Cli(tmp_path, OPENAI_BASE_URL=url, OPENAI_API_KEY="sk-of-this-test")
        cli("enqueue", "one.txt", "--function", "fn:f")
        cli("limit", MODEL, "--concurrency", "40")
        worker = limited(cli, "-n 200").start("worker", "--function", "fn:f", "--concurrency", "40")
        cli.wait_for_file("taken")
        cli("enqueue", "in.txt", "--model", MODEL)
        _, said = worker.communicate(timeout=60)
    told, *_, last, _one, _in = said.splitlines()
    assert told.startswith("lbr: out of file handles (limit 200); raise it with `ulimit -n`")
    assert last == "lbr: worker: 61 done, 0 failed"
    assert cli.query("SELECT count(*) FROM attempts") == [(0,)]
    assert cli.query("SELECT sum(attempts) FROM jobs") == [(61,)]
    assert cli.query("SELECT count(*) FROM limits WHERE cooldown_until > 0") == [(0,)]


@pytest.mark.processes
@pytest.mark.parametrize("hard", [5_000, 200, 100])
def test_the_soft_limit_becomes_the_hard_limit(hard: int) -> None:
    """A process may raise it that far by itself."""
    code = "from lbr.core import open_files; open_files.raise_limit(); print(open_files.limit())"
    shell = f'ulimit -n {hard}; ulimit -Sn 100; exec "$0" -c "$1"'
    told = subprocess.run(["bash", "-c", shell, sys.executable, code], check=True, stdout=subprocess.PIPE)
    assert int(told.stdout) == hard


@pytest.mark.processes
def test_functions_have_all_their_slots(tmp_path: Path) -> None:
    """What makes no connections is not held back: these calls end only when all of them run."""
    (tmp_path / "fn.py").write_text(
        "import asyncio\nmeet = asyncio.Barrier(200)\nasync def f(prompt):\n    await meet.wait()\n    return prompt\n"
    )
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(200)))
    cli = Cli(tmp_path)
    cli("enqueue", "in.txt", "--function", "fn:f")
    said = limited(cli, "-n 120")("worker", "--function", "fn:f", "--concurrency", "200", "--timeout", "60").stderr
    assert said.startswith("lbr: worker: 200 done, 0 failed\nlbr: run in: 200 of 200 jobs done in ")


async def test_slots_are_held_back_while_a_provider_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is that of the runs that are served, and it is told once."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    database = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", create=True)
    await put(database, ["a"], name="1", task=ECHO)
    servable = ServableRuns(authorize(), concurrency=50, room=7, limits_cost=False)
    assert servable.update(await database.read(reads.all_runs)) == []
    assert servable.slots == 50
    for name in ("2", "3"):
        await put(database, ["a"], name=name, task=Task(model=MODEL), reuse=False)
        told = servable.update(await database.read(reads.all_runs))
        assert [("allows 7 calls" in one) for one in told] == ([True] if name == "2" else [])
        assert servable.slots == 7
    await servable.aclose()
    await database.close()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """Return an empty queue."""
    opened = await open_database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", create=True)
    yield opened
    await opened.close()


@pytest.fixture
async def servable(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ServableRuns]:
    """Return those of a process with a key and more open files than slots."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    made = ServableRuns(authorize(), concurrency=50, room=1_000, limits_cost=False)
    yield made
    await made.aclose()


@contextmanager
def none_left() -> Iterator[None]:
    """Let this process have no file handle left for the length of the block."""
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


async def test_a_database_that_finds_no_handle_says_so(tmp_path: Path) -> None:
    """SQLite has one code for what it may not open and for what it cannot; the message tells which it was."""
    path = tmp_path / "queue.db"
    await (await open_database(str(path), create=True)).close()
    database = SQLiteDatabase(path, patience=0.1)
    for ask in (database.read, database.quick_read, database.write):
        with none_left(), pytest.raises(DatabaseError, match="out of file handles"):
            await ask(reads.all_runs)
    await database.close()


async def test_a_look_for_changes_waits_for_a_handle(tmp_path: Path) -> None:
    """A connection that was lost may have to be opened again when all handles are in use."""
    set_on_retry_hooks(None)  # as in a process that has tried nothing again yet
    await (await open_database(f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}", create=True)).close()
    database = SQLiteDatabase(tmp_path / "queue.db")
    importlib.invalidate_caches()
    with none_left():
        looking = asyncio.create_task(database.changed())
        await asyncio.sleep(0.3)
        assert not looking.done()
    assert await looking
    await database.close()


async def test_a_run_that_finds_no_handle_is_tried_again(
    database: Database, servable: ServableRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused with one line for now, and served when the worker next learns of it."""
    run = await put(database, ["a"], name="mine", task=Task(model=MODEL))
    found = await database.read(reads.all_runs)

    def fails(*args: Any, **options: Any) -> Any:
        raise UsageError("expected pydantic-ai") from NONE_LEFT

    with monkeypatch.context() as patch:
        patch.setattr(serving, "build_model", fails)
        (notice,) = servable.update(found)
        assert servable.update(found) == []
    assert notice.startswith("run mine: not served: out of file handles (limit ")
    assert list(servable.refused) == [run.id]
    assert servable.update(found) == []
    assert (list(servable.served), servable.refused) == ([run.id], {})


async def test_models_of_pydantic_ai_share_connections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a client of its own, over the same connections."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    request = Request(Prompt(text="p"), Task(model=MODEL), JobId(1), 1)
    with chat_server(0) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        connections = Connections()
        models = [PydanticAIModel(MODEL, task_settings={}, connections=connections) for _ in range(3)]
        assert (await models[0].answer(request)).text == "p"
        before = open_files.left()
        for model in models[1:]:
            assert (await model.answer(request)).text == "p"
        assert open_files.left() == before
        for model in models:
            await model.aclose()
        await connections.aclose()


class _Failing:
    """A model whose every call raises an error, that came of another."""

    def __init__(self, error: Exception, cause: BaseException | None) -> None:
        self._error, self._cause = error, cause

    async def answer(self, request: Request) -> Any:
        raise self._error from self._cause

    async def aclose(self) -> None:
        pass


NONE_LEFT = OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("error", "cause", "task", "made"),
    [
        (CallError("Connection error."), NONE_LEFT, Task(model=MODEL), False),
        (NONE_LEFT, None, Task(model=MODEL), False),
        (CallError("x"), OSError(errno.ENFILE, "x"), Task(model=MODEL), False),
        (CallError("x"), OSError(errno.ECONNREFUSED, "x"), Task(model=MODEL), True),
        (CallError("x"), socket.gaierror(socket.EAI_AGAIN, "x"), Task(model=MODEL), True),
        (CallError("unread", text="an answer"), NONE_LEFT, Task(model=MODEL), True),
        (CallError("paid", usage=Usage(1, 1)), NONE_LEFT, Task(model=MODEL), True),
        (NONE_LEFT, None, Task(function="m:f"), True),
    ],
)
async def test_which_calls_were_not_made_without_a_handle(
    error: Exception, cause: Exception | None, task: Task, made: bool
) -> None:
    """Not those that are paid for, nor those of functions, nor what failed for another reason."""
    request = Request(Prompt(text="p"), task, JobId(1), 1)
    trying = attempt(_Failing(error, cause), None, request, Deadlines(5), LateCalls())
    if made:
        assert (await trying).failure is not None
    else:
        with pytest.raises(OutOfFilesError):
            await trying


def test_a_name_that_is_not_found_without_a_handle() -> None:
    """The look-up has codes of its own."""
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert not open_files.are_exhausted(error)
    with none_left():
        assert open_files.are_exhausted(error)
