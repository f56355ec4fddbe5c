"""Servers that stop, connections that break and networks that fall silent: ridden out, nothing lost, nothing done twice."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from lbr.api.enqueue import put as put_items
from lbr.core.types import Item, Prompt
from lbr.store import enqueue, reads, runs
from lbr.store.database import open_database
from lbr.store.schema import jobs
from lbr.store.schema import workers as workers_table
from lbr.store.settle import settle
from tests.store.test_settle import TRANSIENT
from tests.support import (
    ECHO,
    Cli,
    Queue,
    answered,
    assert_counted,
    failed,
    locked_by_another,
    postgres,
    put,
    states,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from lbr.store.database import Database
    from tests.support.proxy import Proxy

ANSWERS = """
import asyncio, os, time
from lbr.store import sqlite, postgres

if "STALL" in os.environ:
    sqlite.BUSY_TIMEOUT_MS = 500
    postgres.STALL_SECONDS = float(os.environ["STALL"])

async def echo(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    await asyncio.sleep(float(os.environ.get("LATENCY", "0.1")))
    return prompt
"""
SKEW = """
import os, time
_shift = float(os.environ.get("CLOCK_SHIFT", "0"))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _shift
time.time_ns = lambda: _time_ns() + int(_shift * 1e9)
"""
FUNCTION = ("--function", "answers:echo")


@pytest.fixture
async def far(proxy: Proxy) -> AsyncIterator[Database]:
    """Return an empty queue on the other side of that network."""
    opened = await open_database(proxy.url, create=True)
    yield opened
    await opened.close()


def far_driver(folder: Path, url: str, **environment: str) -> Cli:
    """Return a driver whose processes find the function that logs its calls.

    STALL in their environment is after how many seconds they give up a statement that is not answered, and sooner one
    that waits for a file: what stays locked is so for a minute otherwise before their patience ends.
    """
    (folder / "answers.py").write_text(textwrap.dedent(ANSWERS))
    return Cli(folder, db_url=url, XDG_STATE_HOME=str(folder / "state"), **environment)


def calls(folder: Path) -> Counter[str]:
    """Return how often each prompt was called for."""
    return Counter((folder / "calls.log").read_text().splitlines())


def check(cli: Cli, lines: list[str]) -> None:
    """Compare every collected row with the input, and the counters with the rows."""
    rows = cli.collect("in")
    assert [(row["idx"], row["prompt"], row["status"], row["result"]) for row in rows] == [
        (idx, line, "done", line) for idx, line in enumerate(lines)
    ]
    counted = cli.query(
        "SELECT name, sum(value) FROM counters WHERE name IN ('done', 'pending', 'inflight') GROUP BY 1"
    )
    assert {name: int(value) for name, value in counted if value} == {"done": len(set(lines))}
    assert cli.query("SELECT count(*) FROM results") == [(len(set(lines)),)]


def enqueue_lines(cli: Cli, count: int) -> list[str]:
    """Enqueue so many prompts, some of them twice, for the function that logs its calls."""
    lines = [f"prompt {n % (count - count // 10)}" for n in range(count)]
    (cli.folder / "in.txt").write_text("".join(line + "\n" for line in lines))
    cli("enqueue", "in.txt", *FUNCTION)
    return lines


@pytest.mark.parametrize("lost", ["answer", "commit"])
async def test_broken_commit_of_a_claim_costs_nothing(far: Database, proxy: Proxy, lost: str) -> None:
    """Jobs that were claimed without the worker's knowing are pending again, uncharged, at one of its next renewals."""
    run = await put(far, [f"p{n}" for n in range(20)])
    queue = Queue(far)
    worker = await queue.register(host="h", pid=1, concurrency=20)
    setattr(proxy, f"eat_{lost}s", 1)
    claims = await queue.claim(worker, [run.id], 5, lease=4)
    assert (proxy.eat_answers, proxy.eat_commits) == (0, 0)
    assert len({claim.job_id for claim in claims}) == 5
    assert {claim.claim_seq for claim in claims} == {1}
    unknown = 5 if lost == "answer" else 0
    assert await states(far, run) == {"inflight": 5 + unknown, "pending": 15 - unknown}
    await asyncio.sleep(2.1)
    assert await queue.renew(worker, claims, lease=4, settled=0, rate=0.0) == set()
    assert await states(far, run) == {"inflight": 5, "pending": 15}
    charged = await far.read(lambda c, _: c.execute(select(func.sum(jobs.c.attempts), func.sum(jobs.c.crashes))).one())
    assert tuple(charged) == (0, 0)
    await assert_counted(far, run)


@pytest.mark.parametrize("lost", ["answer", "commit"])
async def test_broken_commit_of_a_settlement_charges_once(far: Database, proxy: Proxy, lost: str) -> None:
    """An answer is written once and a failure charged once, although their commit was run again."""
    run = await put(far, ["a", "b"])
    queue = Queue(far)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    good, bad = await queue.claim(worker, [run.id], 2, lease=60)
    setattr(proxy, f"eat_{lost}s", 1)
    settled = await far.write(settle, [answered(good), failed(bad, TRANSIENT)])
    assert settled.taken == {good.job_id, bad.job_id}
    assert settled.stale == frozenset()
    assert await states(far, run) == {"done": 1, "pending": 1}
    story = await far.read(reads.story, run, 1)
    assert (story.attempts, [t.what for t in story.tries]) == (1, ["retried"])
    await assert_counted(far, run)


@pytest.mark.parametrize("lost", ["answer", "commit"])
async def test_broken_commit_of_an_append_appends_once(far: Database, proxy: Proxy, lost: str) -> None:
    """Inputs that go behind what a run holds are there once, although nothing else would tell them from new ones."""
    run = await put(far, ["first"])
    items = [Item(Prompt(text=f"more {n}")) for n in range(3)]
    setattr(proxy, f"eat_{lost}s", 2)
    report = await put_items(far, runs.RunSpec("r", ECHO, 8), items, append=True)
    assert report.counts.inputs == 3
    assert await far.read(enqueue.next_idx, run) == 4
    await assert_counted(far, run)


async def test_broken_commit_is_waited_out_by_all(far: Database, proxy: Proxy) -> None:
    """Transactions that are under way when a reply is lost are all done in the end, each for its own caller."""
    queue = Queue(far)
    proxy.eat_answers = 1
    ids = await asyncio.gather(*(queue.register(host="h", pid=n, concurrency=1) for n in range(5)))
    assert len(set(ids)) == 5
    seen = await far.read(lambda c, _: c.execute(select(workers_table).where(workers_table.c.id.in_(ids))).all())
    assert sorted(row.pid for row in seen) == [0, 1, 2, 3, 4]


async def test_settling_a_failure_twice_charges_once(database: Database) -> None:
    """A failure that was kept in a file although its commit had been written is recognised."""
    run = await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=1)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    for _ in range(2):
        assert (await database.write(settle, [failed(claim, TRANSIENT)])).stale == set()
    story = await database.read(reads.story, run, 0)
    assert (story.attempts, len(story.tries)) == (1, 1)
    await assert_counted(database, run)


@pytest.mark.processes
def test_restarts_under_load(own_server: postgres.Server, tmp_path: Path) -> None:
    """A server that is restarted again and again, gently or not, costs no answer and repeats no call."""
    cli = far_driver(tmp_path, own_server.url(), LATENCY="0.2")
    try:
        lines = enqueue_lines(cli, 1_200)
        workers = [cli.start("worker", *FUNCTION, "--concurrency", "16") for _ in range(2)]
        for n, mode in enumerate(("fast", "immediate", "fast", "immediate")):
            cli.wait_for("in", "done", 100 + 200 * n)
            own_server.restart(mode)  # type: ignore[arg-type]
        told = [worker.communicate(timeout=120) for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], told
        check(cli, lines)
        assert calls(tmp_path) == Counter(dict.fromkeys(lines, 1))
        assert cli.status("in")["crashed"] == cli.status("in")["stale"] == 0
    finally:
        cli.stop_all()


@pytest.mark.processes
def test_terminated_connections_under_load(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Sessions that the server ends at any moment, hundreds of them, cost no answer and repeat no call."""
    url = new_database()
    cli = far_driver(tmp_path, url, LATENCY="0.02")
    terminate = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'lbr'"
    )
    try:
        lines = enqueue_lines(cli, 2_000)
        workers = [cli.start("worker", *FUNCTION, "--concurrency", "16") for _ in range(2)]
        cli.wait_for("in", "done", 50)
        ended = 0
        with postgres.connect(url, autocommit=True) as connection:
            while ended < 200 and any(worker.poll() is None for worker in workers):
                ended += len(connection.execute(terminate).fetchall())
                time.sleep(0.1)
        told = [worker.communicate(timeout=60) for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], told
        assert ended > 20
        check(cli, lines)
        assert calls(tmp_path) == Counter(dict.fromkeys(lines, 1))
    finally:
        cli.stop_all()


@pytest.mark.processes
@pytest.mark.parametrize("ending", ["heals", "breaks"])
def test_network_cut_for_longer_than_a_lease(proxy: Proxy, tmp_path: Path, ending: str) -> None:
    """A worker that hears nothing for longer than its lease loses its jobs to another, overwrites nothing, and goes on."""
    direct = proxy._target.render_as_string(hide_password=False)
    near = far_driver(tmp_path, direct, LATENCY="1")
    away = far_driver(tmp_path, proxy.url, LATENCY="1")
    try:
        lines = enqueue_lines(near, 80)
        cut_off = away.start("worker", *FUNCTION, "--concurrency", "8", "--lease", "1.5")
        near.wait_for("in", "inflight", 8)
        proxy.silence(True)
        other = near.start("worker", *FUNCTION, "--concurrency", "8", "--lease", "1.5")
        near.wait_for("in", "crashed", 8)
        near.wait_for("in", "done", 16)
        if ending == "breaks":
            proxy.cut()
        proxy.silence(False)
        told = [worker.communicate(timeout=120) for worker in (cut_off, other)]
        assert [worker.returncode for worker in (cut_off, other)] == [0, 0], told
        check(near, lines)
        # Only what the cut-off worker held was called for again, and once.
        assert sum(calls(tmp_path).values()) - len(set(lines)) <= 8
    finally:
        near.stop_all()
        away.stop_all()


@pytest.mark.processes
def test_answers_survive_a_server_that_stays_away(own_server: postgres.Server, tmp_path: Path) -> None:
    """When patience ends, finished answers go into a private file, and the next worker writes them: no call is lost."""
    cli = far_driver(tmp_path, own_server.url(), LATENCY="1.5")
    try:
        lines = enqueue_lines(cli, 60)
        worker = cli.start("worker", *FUNCTION, "--concurrency", "10", "--patience", "2")
        cli.wait_for("in", "inflight", 10)
        done = int(cli.query("SELECT sum(value) FROM counters WHERE name = 'done'")[0][0] or 0)
        own_server.stop()
        _, told = worker.communicate(timeout=90)
        assert worker.returncode == 1, told
        assert "tried for 2 s; check that the server runs" in told
        kept = re.search(r"10 finished answers are kept in (\S+):", told)
        assert kept is not None, told
        (spooled,) = (tmp_path / "state" / "lbr").glob("*.spool.jsonl")
        assert str(spooled) == kept[1]
        assert spooled.stat().st_mode & 0o777 == 0o600
        assert "prompt" not in {name for line in spooled.read_text().splitlines() for name in json.loads(line)}
        own_server.start()
        again = cli("worker", *FUNCTION, "--concurrency", "50")
        assert "wrote 10 answers that were kept in" in again.stderr
        assert list((tmp_path / "state" / "lbr").iterdir()) == []
        check(cli, lines)
        assert calls(tmp_path) == Counter(dict.fromkeys(lines, 1))
        assert done < len(set(lines))
    finally:
        cli.stop_all()


@pytest.mark.processes
async def test_answers_survive_a_database_that_stays_locked(db_url: str, tmp_path: Path) -> None:
    """Whatever keeps a database from taking answers, they are kept, and settled by the next worker."""
    cli = far_driver(tmp_path, db_url, LATENCY="1", STALL="3")
    try:
        lines = await asyncio.to_thread(enqueue_lines, cli, 20)
        worker = cli.start("worker", *FUNCTION, "--concurrency", "4", "--patience", "1")
        await asyncio.to_thread(cli.wait_for, "in", "inflight", 4)
        async with locked_by_another(db_url):
            _, told = await asyncio.to_thread(worker.communicate, timeout=120)
        assert worker.returncode == 1, told
        assert "4 finished answers are kept in" in told
        again = await asyncio.to_thread(cli, "worker", *FUNCTION)
        assert "wrote 4 answers" in again.stderr
        assert calls(tmp_path) == Counter(dict.fromkeys(lines, 1))
        await asyncio.to_thread(check, cli, lines)
    finally:
        await asyncio.to_thread(cli.stop_all)


@pytest.mark.processes
def test_clocks_hours_apart(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Leases, fences, pauses and cancels hold between machines whose clocks differ by hours."""
    (tmp_path / "sitecustomize.py").write_text(SKEW)
    url = new_database()
    drivers = [
        far_driver(tmp_path, url, LATENCY="0.3", PYTHONPATH=str(tmp_path), CLOCK_SHIFT=str(hours * 3600))
        for hours in (0, -5, 7)
    ]
    now = drivers[0]
    try:
        lines = enqueue_lines(now, 400)
        flags = (*FUNCTION, "--concurrency", "6", "--lease", "2")
        workers = [driver.start("worker", *flags) for driver in drivers]
        now.wait_for("in", "done", 40)
        drivers[1]("pause", "in")
        now.wait_for("in", "done", 40)
        deadline = time.monotonic() + 30
        while now.status("in")["inflight"]:
            assert time.monotonic() < deadline
        stood = now.status("in")["done"]
        held = now.query("SELECT count(*) FROM jobs WHERE state = 'inflight'")
        assert (held, now.status("in")["done"]) == ([(0,)], stood)
        workers = [worker for worker in workers if worker.poll() is None] or workers
        drivers[2]("resume", "in")
        workers += [driver.start("worker", *flags) for driver in drivers]
        # A tenth of the lines are duplicates; a slow machine may be through with most jobs by now.
        now.wait_for("in", "done", min(stood + 20, len(set(lines))))
        workers[-1].send_signal(signal.SIGKILL)
        told = [worker.communicate(timeout=120) for worker in workers]
        assert {worker.returncode for worker in workers[:-1]} <= {0, 3}, told
        check(now, lines)
        assert sum(calls(tmp_path).values()) - len(set(lines)) <= 6
        assert now.status("in")["crashed"] <= 6
    finally:
        for driver in drivers:
            driver.stop_all()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_user_without_a_home_needs_none(
    kind: str, tmp_path: Path, new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no home, answers are kept beside the database or in the working directory, and all else works."""

    def nobody(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    url = new_database() if kind == "postgresql" else "sqlite:///queue.db"
    monkeypatch.setattr("lbr.store.sqlite.sqlite_path", lambda _: tmp_path / "queue.db")
    monkeypatch.setattr("pathlib.Path.expanduser", nobody)
    database = await open_database(url, create=True)
    assert [place.parent for place in database.spool_places] == [tmp_path]
    run = await put(database, ["a"])
    assert await states(database, run) == {"pending": 1}
    await database.close()


@pytest.mark.processes
def test_answers_outlive_an_event_loop_that_ends(tmp_path: Path) -> None:
    """It cancels every task in it, and finished answers of a file that is locked are kept for the next call."""
    program = """
        import asyncio, sqlite3, lbr
        from lbr.store import sqlite

        sqlite.BUSY_TIMEOUT_MS = 200
        prompts, answered, locked = [f"p{n}" for n in range(64)], [], asyncio.Event()

        async def ask(prompt):
            if len(answered) >= 16:
                await locked.wait()
            answered.append(prompt)
            return prompt.upper()

        def call():
            return lbr.prompt_map(prompts, ask, db_url="q.db", concurrency=16, return_dtype="list[str]")

        async def main():
            calling = asyncio.create_task(call())
            while len(answered) < 16 or file.execute("SELECT count(*) FROM results").fetchone() != (16,):
                await asyncio.sleep(0.01)
            file.execute("BEGIN IMMEDIATE")
            locked.set()
            while len(answered) < 32:
                await asyncio.sleep(0.01)

        file = sqlite3.connect("q.db", isolation_level=None, timeout=10)
        asyncio.run(main())
        file.rollback()
        assert len(answered) == 32
        assert asyncio.run(call()) == [prompt.upper() for prompt in prompts]
        print(len(answered))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "64\n", done.stderr
    assert "wrote 16 answers that were kept" in done.stderr
