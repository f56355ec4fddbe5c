"""What may happen to a file and its machine: a full disk, a torn log, a clock that is set. Nothing committed is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support import Cli
from tests.test_processes import check, recount, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.processes

KIB_OF_ROOM = 1_500
ANSWERS = """
import asyncio, os

async def long(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    await asyncio.sleep(0.01)
    return prompt + " " + "x" * 3000

async def echo(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    await asyncio.sleep(0.1)
    return prompt
"""
SKEW = """
import time
_time, _time_ns = time.time, time.time_ns
def _shift():
    with open("shift") as file:
        return float(file.read() or 0)
time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + int(_shift() * 1e9)
"""


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Cli]:
    """Return a driver of `lbr` on a file, with functions that log their calls."""
    (tmp_path / "answers.py").write_text(textwrap.dedent(ANSWERS))
    driver = Cli(tmp_path, XDG_STATE_HOME=str(tmp_path / "state"))
    yield driver
    driver.stop_all()


def calls(cli: Cli) -> Counter[str]:
    """Return how often each prompt was called for."""
    return Counter((cli.folder / "calls.log").read_text().splitlines())


def test_a_full_disk_is_told_of_and_answers_are_kept(local: Cli) -> None:
    """A worker whose disk is full ends with words; what it had is written when there is room, and no call is repeated."""
    lines = [f"prompt {n}" for n in range(1_500)]
    write(local.folder, lines)
    local("enqueue", "in.txt", "--function", "answers:long")
    worker = [sys.executable, "-m", "lbr", "worker", "--function", "answers:long", "--patience", "1"]
    # No file of this process may grow beyond that, its log least of all: to SQLite it is a disk that is full.
    limited = ["bash", "-c", f'ulimit -f {KIB_OF_ROOM}; exec "$@"', "-", *worker]
    full = subprocess.run(
        limited,
        cwd=local.folder,
        env=local.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "the disk reported an error" in full.stderr
    assert "are kept in" in full.stderr
    done = local.status("in")["done"]
    assert 0 < done < len(lines)
    local("worker", "--function", "answers:long")
    rows = local.collect("in")
    assert [row["result"].split(" x")[0] for row in rows] == lines
    assert calls(local) == dict.fromkeys(lines, 1)
    recount(local)


def test_a_torn_log_costs_its_end_alone(local: Cli) -> None:
    """Where a crash of the machine tore the WAL in two, what its whole part holds is there, and the rest is done again."""
    lines = [f"prompt {n}" for n in range(400)]
    write(local.folder, lines)
    local("enqueue", "in.txt", "--function", "answers:echo")
    worker = local.start("worker", "--function", "answers:echo", "--lease", "1")
    local.wait_for("in", "done", 150)
    worker.kill()
    worker.communicate()
    wal = local.folder / "runs.db-wal"
    size = wal.stat().st_size
    assert size > 100_000
    os.truncate(wal, size * 2 // 3 + 17)
    (local.folder / "runs.db-shm").unlink()
    left = local.status("in")
    assert left["done"] + left["pending"] + left["inflight"] == len(lines)
    assert left["done"] > 0
    local("worker", "--function", "answers:echo", "--lease", "1")
    check(local.collect("in"), lines)
    recount(local)


def test_a_clock_that_is_set_holds_nothing_up(local: Cli) -> None:
    """Hours forth and back again while two workers work: leases end and are taken up again, and every job is done."""
    skew = local.folder / "skew"
    skew.mkdir()
    (skew / "sitecustomize.py").write_text(SKEW)
    shift = local.folder / "shift"
    shift.write_text("0")
    local.environment["PYTHONPATH"] = str(skew)
    lines = [f"prompt {n}" for n in range(400)]
    write(local.folder, lines)
    local("enqueue", "in.txt", "--function", "answers:echo")
    workers = [
        local.start("worker", "--function", "answers:echo", "--concurrency", "4", "--lease", "3")
        for _ in range(2)
    ]

    def set_clock(seconds: int) -> None:
        new = local.folder / "new shift"
        new.write_text(str(seconds))
        new.rename(shift)

    for done, seconds in ((60, 7_200), (160, 0), (260, -7_200)):
        local.wait_for("in", "done", done)
        set_clock(seconds)
    told = [worker.communicate(timeout=90) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    check(local.collect("in"), lines)
    assert local.query("SELECT max(attempts) FROM jobs") == [(1,)]
    # A call is made again only where its lease seemed to have ended, at most once for each time the clock was set.
    assert sum(calls(local).values()) - len(lines) <= 3 * 8
    recount(local)


@pytest.mark.timeout(600)
def test_the_log_stays_small_under_readers(local: Cli) -> None:
    """After 200,000 jobs with collects and looks all the time, the WAL has stayed under 128 MB."""
    count = 200_000
    with (local.folder / "in.txt").open("w") as file:
        file.writelines(f"prompt number {n}\n" for n in range(count))
    largest = 0
    writers = [local.start("enqueue", "in.txt", "--model", "offline:echo")]
    local.wait_for("in", "pending", 10_000)
    writers += [local.start("worker", "--concurrency", "200") for _ in range(2)]
    reader = local.start("collect", "in", "-o", "out.jsonl")
    while any(writer.poll() is None for writer in writers):
        local.query("SELECT state, count(*) FROM jobs GROUP BY state")
        with suppress(FileNotFoundError):
            largest = max(largest, (local.folder / "runs.db-wal").stat().st_size)
        if reader.poll() is not None:
            reader.communicate()
            reader = local.start("collect", "in", "-o", "out.jsonl")
    told = [process.communicate()[1] for process in (*writers, reader)]
    assert [writer.returncode for writer in writers] == [0, 0, 0], told
    assert local.status("in")["done"] == count
    assert 1_000_000 < largest < 128 * 1024 * 1024
    sys.stderr.write(f"largest WAL: {largest / 2**20:.1f} MiB\n")
    recount(local)
