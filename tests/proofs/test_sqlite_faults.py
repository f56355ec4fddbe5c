"""What may happen to a file and its machine: a full disk, a torn log, a clock that is set. Nothing committed is lost."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from lbr.core.text import pluralize
from tests.support import PATIENCE_SECONDS, Cli
from tests.worker.test_processes import check, recount, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import Popen

pytestmark = pytest.mark.processes

KIB_OF_ROOM = 1_500
PAGE = 4_096
DAMAGE = b"\xff" * PAGE
ANSWERS = """
import asyncio, os, shutil

async def long(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    await asyncio.sleep(0.01)
    return prompt + " " + "x" * 3000

async def echo(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    if os.path.exists("copying"):
        shutil.copyfile("runs.db", "copy.db")
    await asyncio.sleep(0.1)
    while os.path.exists("hold"):
        open("held " + prompt, "w").close()
        await asyncio.sleep(0.01)
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
        local.start("worker", "--function", "answers:echo", "--concurrency", "4", "--lease", "3") for _ in range(2)
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


def work_until(cli: Cli, done: int, *, prompt: str = "prompt", lease: str = "2") -> tuple[list[str], Popen[str]]:
    """Enqueue that many prompts, and return them with a worker that has answered some of them."""
    lines = [f"{prompt} {n}" for n in range(400)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", "answers:echo")
    worker = cli.start("worker", "--function", "answers:echo", "--concurrency", "8", "--lease", lease)
    cli.wait_for("in", "done", done)
    return lines, worker


def ends_with(worker: Popen[str], words: str) -> int:
    """Wait until a worker has given up with these words, and return how many answers it kept in a file, 0 for none."""
    _, told = worker.communicate(timeout=60)
    assert worker.returncode == 1, told
    assert "Traceback" not in told
    assert words in told
    kept = re.search(r"(\d+) finished answers are kept in", told)
    return int(kept[1]) if kept else 0


def test_a_file_that_is_put_back_has_lost_nothing(local: Cli) -> None:
    """A worker whose file is moved away ends with words; back in its place it is finished, and no call is repeated."""
    lines, worker = work_until(local, 60)
    # All its calls go on while the file goes away.
    (local.folder / "hold").touch()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(local.folder.glob("held *"))) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    away = local.folder / "away"
    away.mkdir()
    names = ("runs.db", "runs.db-wal", "runs.db-shm")
    for name in names:
        (local.folder / name).rename(away / name)
    (local.folder / "hold").unlink()
    kept = ends_with(worker, "was removed while in use")
    assert kept == 8
    # Nothing is made anew where it was: that would be another queue.
    assert [name for name in names if (local.folder / name).exists()] == []
    assert "no such file" in local("status", check=False).stderr
    for file in away.iterdir():
        file.rename(local.folder / file.name)
    done = local.status("in")["done"]
    again = local("worker", "--function", "answers:echo").stderr
    assert f"wrote {pluralize(kept, 'answer')}" in again
    check(local.collect("in"), lines)
    assert done >= 60
    assert calls(local) == Counter(dict.fromkeys(lines, 1))
    recount(local)


def test_a_function_that_copies_the_file_costs_no_answer(local: Cli) -> None:
    """Closing the copied file gives SQLite's locks up, so that the next process to end takes the log away."""
    lines = [f"prompt {n}" for n in range(400)]
    write(local.folder, lines)
    local("enqueue", "in.txt", "--function", "answers:echo")
    (local.folder / "copying").touch()
    worker = local.start("worker", "--function", "answers:echo", "--concurrency", "8")
    while worker.poll() is None:
        local("status")
    # Removed, or already made anew by the next process.
    ends_with(worker, "while in use, so that no other process sees what is written")
    (local.folder / "copying").unlink()
    local("worker", "--function", "answers:echo")
    check(local.collect("in"), lines)
    assert sum(calls(local).values()) <= len(lines) + 8
    recount(local)


def test_a_file_that_is_replaced_is_not_written_to(local: Cli) -> None:
    """A worker whose file is replaced by an older copy ends with words; the copy is as it was, and can be worked on."""
    write(local.folder, ["other"], "other.txt")
    local("enqueue", "other.txt", "--model", "offline:echo")
    path, copy, log = (local.folder / name for name in ("runs.db", "copy.db", "runs.db-wal"))
    shutil.copyfile(path, copy)
    before = copy.read_bytes()
    lines, worker = work_until(local, 60)
    copy.replace(path)
    ends_with(
        worker,
        f"was replaced while in use; what was written to it is gone with it: put it back, or enqueue again. Unless it came with the new file, remove {log} first",
    )
    assert path.read_bytes() == before
    log.unlink()
    local("worker")
    assert [row["result"] for row in local.collect("other")] == ["other"]
    local("enqueue", "in.txt", "--function", "answers:echo")
    local("worker", "--function", "answers:echo")
    check(local.collect("in"), lines)
    recount(local)


def test_a_file_that_is_damaged_under_a_worker_is_told_of(local: Cli) -> None:
    """A worker that meets damaged pages ends with words, as others do who come then; mended, the file is finished."""
    lines, worker = work_until(local, 60, prompt="x" * 2_000)
    path = local.folder / "runs.db"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(DAMAGE * (len(whole) // PAGE - 1))
    kept = ends_with(worker, "the file is damaged; restore a copy")
    other = local("worker", "--function", "answers:echo", check=False)
    assert other.returncode == 1
    assert "the file is damaged; restore a copy" in other.stderr
    with path.open("r+b") as file:
        for start in range(PAGE, len(whole), PAGE):
            file.seek(start)
            if file.read(PAGE) == DAMAGE:
                file.seek(start)
                file.write(whole[start : start + PAGE])
    again = local("worker", "--function", "answers:echo", "--lease", "2").stderr
    assert re.findall(r"wrote (\d+) answers?", again) == [str(kept)] * bool(kept), again
    check(local.collect("in"), lines)
    assert calls(local) == Counter(dict.fromkeys(lines, 1))
    recount(local)


def test_a_file_that_turns_read_only_stops_those_who_come(local: Cli) -> None:
    """A worker that has the file open works on; who comes when it may not be written ends with words, and may read."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() == 0 and setpriv is None:
        pytest.skip("root may write everything, and there is no setpriv to take that away")
    under = (setpriv, "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    mortal = Cli(local.folder, prefix=[str(one) for one in under], XDG_STATE_HOME=str(local.folder / "state"))
    try:
        lines, worker = work_until(mortal, 60)
        (local.folder / "runs.db").chmod(0o400)
        other = mortal("worker", "--function", "answers:echo", check=False)
        assert other.returncode == 1
        assert "read-only; make the file and its folder writable" in other.stderr
        assert mortal.status("in")["done"] >= 60
        _, told = worker.communicate(timeout=60)
        assert worker.returncode == 0, told
        check(mortal.collect("in"), lines)
        assert calls(mortal) == Counter(dict.fromkeys(lines, 1))
        (local.folder / "runs.db").chmod(0o600)
        recount(mortal)
    finally:
        mortal.stop_all()


def test_a_foreign_lock_of_ten_seconds_is_ridden_out(local: Cli) -> None:
    """Nobody hears of a lock that another program holds for 10 s: workers and an enqueue wait, readers do not."""
    lines, worker = work_until(local, 60, lease="60")
    other = local.start("worker", "--function", "answers:echo", "--concurrency", "8")
    local.wait_for("in", "done", 120)
    with closing(sqlite3.connect(local.folder / "runs.db", isolation_level=None, timeout=30)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        until = time.monotonic() + 10
        write(local.folder, ["one more"], "more.txt")
        adding = local.start("enqueue", "more.txt", "--function", "answers:echo")
        stands = local.status("in")["done"]
        assert 120 <= stands < len(lines)
        local.collect("in", code=3)
        while time.monotonic() < until:
            assert [process.poll() for process in (worker, other, adding)] == [None] * 3
            time.sleep(0.1)
        assert local.status("in")["done"] == stands
        foreign.execute("ROLLBACK")
    told = [process.communicate(timeout=60) for process in (worker, other, adding)]
    assert [process.returncode for process in (worker, other, adding)] == [0, 0, 0], told
    assert "locked" not in str(told)
    local("worker", "--function", "answers:echo")
    check(local.collect("in"), lines)
    assert calls(local) == Counter(dict.fromkeys([*lines, "one more"], 1))
    recount(local)


@pytest.mark.timeout(600)
def test_the_log_stays_small_under_readers(local: Cli) -> None:
    """After 80,000 jobs with collects and reads all the time, the WAL has stayed under 128 MB."""
    count = 80_000
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
