"""A file system that is really full, or that turns read-only, under running commands, and what there is afterwards."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.proofs.small_disk import SmallDisk
from tests.proofs.test_sqlite_faults import calls
from tests.support import Cli
from tests.worker.test_processes import write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.processes

ANSWERS = """
import asyncio, os

async def long(prompt):
    with open("calls.log", "ab", buffering=0) as log:
        log.write(prompt.encode() + b"\\n")
    await asyncio.sleep(0.01)
    return prompt + " " + "x" * int(os.environ["LENGTH"])
"""
LONG = ("--function", "answers:long")
FULL = "the disk is full; make room and run the same command again"
NO_SPACE = "No space left on device; make room"


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Callable[..., tuple[Cli, SmallDisk]]]:
    """Return what makes a disk of some size, and a driver of `lbr` with its queue there and all else elsewhere."""
    made: list[tuple[Cli, SmallDisk]] = []

    def make(size: str, **environment: str) -> tuple[Cli, SmallDisk]:
        (tmp_path / "answers.py").write_text(ANSWERS)
        disk = SmallDisk(tmp_path / "disk", size)
        environment = {"XDG_STATE_HOME": str(tmp_path / "state")} | environment
        url = f"sqlite:///{disk.folder / 'runs.db'}"
        made.append((Cli(tmp_path, db_url=url, prefix=disk.prefix, **environment), disk))
        return made[-1]

    yield make
    for cli, disk in made:
        cli.stop_all()
        disk.close()


def done(rows: list[dict[str, Any]]) -> dict[int, str]:
    """Return the answers that are there."""
    return {row["idx"]: row["result"] for row in rows if row["status"] == "done"}


def work_on(cli: Cli, lines: list[str], before: dict[int, str]) -> None:
    """Finish the run: what was not committed was kept, no call is made again, answers of before stay as they were."""
    kept = sum(calls(cli).values()) - len(before)
    told = cli("worker", *LONG, "--run", "in").stderr
    assert re.findall(r"wrote (\d+) answers?", told) == [str(kept)] * bool(kept), told
    rows = cli.collect("in")
    assert [row["result"].split(" x")[0] for row in rows] == lines
    assert before.items() <= done(rows).items()
    assert calls(cli) == Counter(dict.fromkeys(lines, 1))
    assert cli.status("in")["stale"] == 0
    checks = cli("doctor", "--json", check=False).stdout.splitlines()
    found = {one["check"]: one["gravity"] for one in map(json.loads, checks)}
    assert (found["integrity"], found["counters"], found["leases"]) == ("ok", "ok", "ok"), checks


def test_a_full_disk_stops_commands_with_words_and_loses_nothing(
    on_disk: Callable[..., tuple[Cli, SmallDisk]],
) -> None:
    """Every command that needs room ends with words, and with room again the run is finished, no call repeated."""
    cli, disk = on_disk("3m", LENGTH="3000")
    lines = [f"prompt {n}" for n in range(900)]
    write(cli.folder, lines)
    write(cli.folder, [f"more {n} " + "y" * 5_000 for n in range(1_000)], "more.txt")
    cli("enqueue", "in.txt", *LONG)
    worker = cli("worker", *LONG, check=False)
    assert worker.returncode == 1, worker.stderr
    assert FULL in worker.stderr
    assert f"finished answers are kept in {cli.folder / 'state'}" in worker.stderr

    for command, words in (
        ("enqueue more.txt --model offline:echo", FULL),
        ("collect in -o disk/out.jsonl", NO_SPACE),
        ("collect in -o disk/out.db", FULL),
    ):
        ended = cli(*command.split(), check=False)
        assert (ended.returncode, words in ended.stderr) == (1, True), (command, ended)
    assert "out" not in disk.run("ls", "-A", str(disk.folder))
    # What only reads needs no room.
    before = done(cli.collect("in", code=3))
    assert 0 < len(before) == cli.status("in")["done"] < len(lines)

    disk.remount("size=100m")
    work_on(cli, lines, before)
    cli("enqueue", "more.txt", "--model", "offline:echo")
    assert cli.status("more")["inputs"] == 1_000


def test_a_log_that_has_no_room_to_be_moved_costs_nothing(
    on_disk: Callable[..., tuple[Cli, SmallDisk]],
) -> None:
    """Where the disk is full just when the log is to go into the file, what is in the log is committed all the same."""
    cli, disk = on_disk("22m", LENGTH="30000")
    lines = [f"prompt {n}" for n in range(800)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", *LONG)
    worker = cli("worker", *LONG, check=False)
    assert worker.returncode == 1, worker.stderr
    assert FULL in worker.stderr
    log = int(disk.run("stat", "-c", "%s", str(disk.folder / "runs.db-wal")))
    assert log > 16 * 2**20
    before = done(cli.collect("in", code=3))
    disk.remount("size=200m")
    work_on(cli, lines, before)


def test_a_disk_with_no_place_for_answers_says_that_they_are_lost(
    on_disk: Callable[..., tuple[Cli, SmallDisk]],
) -> None:
    """Where no place takes what was not committed, the worker says how many answers are lost; no other is called for again."""
    cli, disk = on_disk("4m", LENGTH="3000")
    cli.environment["XDG_STATE_HOME"] = str(disk.folder / "state")
    lines = [f"prompt {n}" for n in range(900)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", *LONG)
    worker = cli("worker", *LONG, "--concurrency", "200", "--lease", "2", check=False)
    assert worker.returncode == 1, worker.stderr
    assert FULL in worker.stderr
    lost = re.search(r"; (\d+) finished answers are lost: .*No space left", worker.stderr)
    assert lost is not None, worker.stderr
    before = done(cli.collect("in", code=3))
    disk.remount("size=100m")
    cli("worker", *LONG)
    assert before.items() <= done(cli.collect("in")).items()
    assert sum(calls(cli).values()) == len(lines) + int(lost[1])
