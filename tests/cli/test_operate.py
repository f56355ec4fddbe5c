"""Commands that look after runs, from the outside: `rm`, and what failed jobs do to exit codes and reports."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

import lbr

if TYPE_CHECKING:
    from tests.support import Cli

TABLES = ("items", "jobs", "prompts", "results", "attempts", "counters")


def rows_of(cli: Cli) -> dict[str, int]:
    """Count the rows of every table that holds something of a run."""
    return {table: cli.query(f"SELECT count(*) FROM {table}")[0][0] for table in (*TABLES, "runs")}


def enqueue(cli: Cli, name: str, prompts: list[str], *flags: str) -> None:
    """Enqueue prompts into a run."""
    (cli.folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    cli("enqueue", f"{name}.txt", "--model", "offline:echo", *flags)


class TestList:
    """`lbr list`."""

    def test_it_prints_a_line_for_each_run(self, cli: Cli) -> None:
        """Columns are aligned, equal inputs count once among the answers, and JSON has the numbers of `status`."""
        enqueue(cli, "first", ["a", "b", "b"], "--price", "in=1,out=1")
        cli("worker")
        enqueue(cli, "a longer name", ["a", "c"], "--run", "a longer name")
        cli("cancel", "a longer name")
        enqueue(cli, "third", ["d"])
        header, *lines = cli("list").stdout.splitlines()
        assert header.split("  ")[:2] == ["run", ""]
        places = [header.index(word) for word in ("model", "state", "age", "cost")]
        told = [[line[start:].split()[0] for start in places] for line in lines]
        assert [[one[0], one[1]] for one in told] == [
            ["offline:echo", "finished"],
            ["offline:echo", "cancelled"],
            ["offline:echo", "active"],
        ]
        assert [one[3][0] for one in told] == ["$", "-", "-"]
        counts = [line[header.index("inputs") : header.index("state")].split() for line in lines]
        assert counts == [["3", "2", "0"], ["2", "1", "0"], ["1", "0", "0"]]
        shown = [json.loads(line) for line in cli("list", "--json").stdout.splitlines()]
        assert [one["run"] for one in shown] == ["first", "a longer name", "third"]
        ages = [one["age_seconds"] for one in shown]
        assert ages == sorted(ages, reverse=True)
        assert 0 <= ages[-1] <= ages[0] < 600

    def test_without_runs_it_says_how_to_begin(self, cli: Cli) -> None:
        """An empty queue is no error."""
        enqueue(cli, "only", ["a"])
        cli("rm", "only")
        assert cli("list").stdout == "no runs yet; `lbr enqueue` creates one\n"


class TestPrune:
    """`lbr prune`."""

    def test_it_removes_old_runs_that_are_over(self, cli: Cli) -> None:
        """Open runs and young ones stay; it asks, and a dry run removes nothing."""
        enqueue(cli, "done", ["a", "b"])
        enqueue(cli, "stopped", ["c"], "--run", "stopped")
        cli("worker", "--run", "done")
        cli("cancel", "stopped")
        enqueue(cli, "open", ["d"])
        young = cli("prune", "--older", "1d", "--yes")
        assert (young.stdout, young.stderr) == ("", "lbr: no finished or cancelled run is older than 1d\n")
        dry = cli("prune", "--older", "0s", "--dry-run")
        assert [line.split()[0] for line in dry.stdout.splitlines()] == ["run", "done", "stopped"]
        assert dry.stderr == "lbr: dry run: nothing was removed\n"
        refused = cli("prune", "--older", "0s", check=False, stdin="n\n")
        assert refused.returncode == 2
        assert "Remove 2 runs with 2 answers?" in refused.stderr
        assert rows_of(cli)["runs"] == 3
        assert cli("prune", "--older", "0s", "--yes").stdout.endswith("\n2 runs removed\n")
        assert rows_of(cli) | {"counters": 0} == dict.fromkeys(rows_of(cli), 0) | {
            "items": 1,
            "jobs": 1,
            "prompts": 1,
            "runs": 1,
        }
        for wrong in ("30", "d", "1y", "-1d"):
            assert cli("prune", f"--older={wrong}", check=False).returncode == 2


class TestBackup:
    """`lbr backup`."""

    @pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
    @pytest.mark.processes
    def test_workers_go_on_and_the_copy_is_whole(self, cli: Cli) -> None:
        """The copy of one moment is sound, private and can be worked on; nothing is left beside it."""
        enqueue(cli, "slow", [f"p{n}" for n in range(400)], "--set", "latency=0.05")
        # What it holds in the copy comes back when its leases end.
        worker = cli.start("worker", "--concurrency", "8", "--until", "forever", "--lease", "3")
        cli.wait_for("slow", "done", 20)
        assert cli("backup", "copy.db").stdout.endswith(": copied to copy.db\n")
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=60)
        assert sorted(one.name for one in cli.folder.iterdir() if "copy" in one.name) == ["copy.db"]
        assert (cli.folder / "copy.db").stat().st_mode & 0o777 == 0o600
        with closing(sqlite3.connect(cli.folder / "copy.db")) as copy:
            assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert copy.execute("PRAGMA auto_vacuum").fetchall() == [(2,)]
            (done,) = copy.execute("SELECT count(*) FROM jobs WHERE state = 'done'").fetchone()
            assert copy.execute("SELECT count(*) FROM results").fetchone() == (done,)
            assert done >= 20
        cli("worker", "--db", "copy.db", "--concurrency", "100")
        assert [row["result"] for row in cli.collect("slow", "--db", "copy.db")] == [f"p{n}" for n in range(400)]

    @pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
    def test_no_file_is_replaced(self, cli: Cli) -> None:
        """A file, a log that would be taken for the copy's, no folder, and no queue are named; nothing is written."""
        refused = cli("backup", "copy.db", check=False)
        assert (refused.returncode, (cli.folder / "copy.db").exists()) == (2, False)
        enqueue(cli, "r", ["a"])
        (cli.folder / "old.db").write_text("mine")
        (cli.folder / "log.db-wal").write_text("mine")
        before = set(cli.folder.iterdir())
        for file, words in (("old.db", "exists already"), ("log.db", "exists already"), ("no/copy.db", "no folder")):
            refused = cli("backup", file, check=False)
            assert refused.returncode == 2
            assert words in refused.stderr
        assert set(cli.folder.iterdir()) == before
        assert (cli.folder / "old.db").read_text() == "mine"

    @pytest.mark.parametrize("db_url", ["postgresql"], indirect=True)
    def test_a_server_has_its_own_way(self, cli: Cli) -> None:
        """The message names it."""
        refused = cli("backup", "copy.db", check=False)
        assert refused.returncode == 2
        assert "pg_dump --schema=lbr" in refused.stderr


class TestRemove:
    """`lbr rm`."""

    def test_it_removes_one_run_whole_and_leaves_the_others(self, cli: Cli) -> None:
        """Nothing of the run is left, and answers that another run reused from it stay there."""
        enqueue(cli, "first", ["a", "b", "b", "c"])
        cli("worker")
        enqueue(cli, "second", ["a", "d"])
        cli("worker")
        done = cli("rm", "first", "--yes")
        assert done.stdout == "run first: removed, with 3 jobs\n"
        assert [row["result"] for row in cli.collect("second")] == ["a", "d"]
        assert rows_of(cli) | {"counters": 0} == {
            "items": 2,
            "jobs": 2,
            "prompts": 2,
            "results": 2,
            "attempts": 0,
            "counters": 0,
            "runs": 1,
        }
        assert cli("status", "first", check=False).returncode == 2
        enqueue(cli, "first", ["a", "x"])

    def test_it_asks_before_it_removes_answers(self, cli: Cli) -> None:
        """Without --yes and without a yes the run stays; a run without answers needs none."""
        enqueue(cli, "paid", ["a"])
        cli("worker")
        refused = cli("rm", "paid", check=False, stdin="n\n")
        assert refused.returncode == 2
        assert "Remove run paid with 1 answer?" in refused.stderr
        assert cli.collect("paid")[0]["result"] == "a"
        enqueue(cli, "empty", ["b"])
        assert cli("rm", "empty").stdout == "run empty: removed, with 1 job\n"

    @pytest.mark.processes
    def test_calls_in_flight_end_first(self, cli: Cli) -> None:
        """A worker that is in the middle of a call keeps its job until then; no more jobs are claimed."""
        enqueue(cli, "slow", [f"p{n}" for n in range(40)], "--set", "latency=1.5")
        worker = cli.start("worker", "--concurrency", "4", "--until", "forever")
        cli.wait_for("slow", "inflight", 4)
        done = cli("rm", "slow", "--yes")
        assert "waiting for 4 calls in flight" in done.stderr
        assert rows_of(cli)["jobs"] == 0
        worker.send_signal(signal.SIGTERM)
        _, stderr = worker.communicate(timeout=60)
        assert worker.returncode == 0, stderr
        assert "4 done" in stderr

    @pytest.mark.processes
    def test_a_dead_workers_jobs_do_not_hold_it_up(self, cli: Cli) -> None:
        """Jobs that a killed worker held are taken back, though no other worker is there."""
        enqueue(cli, "held", ["a", "b"], "--set", "latency=600")
        worker = cli.start("worker", "--lease", "1")
        cli.wait_for("held", "inflight", 2)
        worker.kill()
        worker.wait()
        cli("rm", "held")
        assert rows_of(cli) == dict.fromkeys((*TABLES, "runs"), 0)


@pytest.mark.processes
def test_a_worker_whose_jobs_failed_ends_with_4_unless_it_runs_for_ever(cli: Cli) -> None:
    """Cron sees that jobs failed; a service that restarts on failure does not restart for each."""
    enqueue(cli, "bad", ["a"], "--set", "failure_rate=1", "--max-attempts", "1")
    assert cli("worker", check=False).returncode == 4
    enqueue(cli, "worse", ["b"], "--set", "failure_rate=1", "--max-attempts", "1")
    worker = cli.start("worker", "--until", "forever")
    cli.wait_for("worse", "failed", 1)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert worker.returncode == 0


def test_run_says_how_many_failed_why_and_how_to_retry(cli: Cli) -> None:
    """The same command on a run with failed jobs makes no call, and says what to do about them."""
    (cli.folder / "in.txt").write_text("a\nb\n")
    flags = ("--model", "offline:echo", "--set", "failure_rate=1", "--max-attempts", "1")
    for _ in range(2):
        done = cli("run", "in.txt", "-o", "out.jsonl", *flags, check=False)
        assert done.returncode == 4
        assert "lbr: 2 failed (transient): failed, by the setting failure_rate; `lbr failures in` shows" in done.stderr
        assert "`lbr retry in` puts them back" in done.stderr


async def test_a_run_is_removed_from_python(cli: Cli) -> None:
    """`lbr.remove` returns how many jobs there were."""
    enqueue(cli, "first", ["a", "b", "b"])
    assert await lbr.remove("first", db_url=cli.outside_url) == 2


@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
def test_a_reason_is_only_words(cli: Cli) -> None:
    """Whatever a user gives as the reason of a pause, the advice is that of a user's pause."""
    enqueue(cli, "r", ["a"])
    for reason in ("it may cost too much", "moving to a new laptop", "its calls report no cost"):
        cli("pause", "r", "--reason", reason)
        (now,) = json.loads(cli("status", "r", "--json").stdout)["runs"]
        assert (now["state"], now["pause_cause"], now["pause_message"]) == ("paused", "user", reason)
        assert f"  paused: {reason}; `lbr resume r` lets it go on\n" in cli("status", "r").stdout
        assert "--max-cost" not in cli("worker", "--run", "r", check=False).stderr
        cli("resume", "r")
    cli("pause", "r")
    cli("cancel", "r")
    cli("retry", "r")
    assert cli("worker", "--run", "r").returncode == 0


STEERING = "\x1b[2J \x07 \x9b31m \x7f \u202e \u2066 \u200f \u061c \r end"


def shown_on_a_terminal(cli: Cli, *arguments: str) -> str:
    """Return what a command writes to a stdout that is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lbr", *arguments]
    with subprocess.Popen(command, cwd=cli.folder, env=cli.environment, stdout=theirs) as running:
        os.close(theirs)
        told = b""
        with suppress(OSError):  # how a terminal ends that no process holds any more
            while chunk := os.read(ours, 65_536):
                told += chunk
        os.close(ours)
    assert running.returncode == 0, told
    return told.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_answers_do_not_steer_a_terminal(cli: Cli) -> None:
    """Escape and bidi characters of an answer are spelled out on a terminal, and stay as they are in a pipe or a file."""
    (cli.folder / "in.jsonl").write_text(json.dumps({"prompt": f"tab\t{STEERING}"}) + "\n")
    cli("run", "in.jsonl", "-o", "out.csv", "--run", "r", "--model", "offline:echo")
    commands = [
        ("show", "r", "0"),
        ("show", "r", "0", "--json"),
        ("collect", "r"),
        ("collect", "r", "--format", "csv"),
    ]
    for command in commands:
        told = shown_on_a_terminal(cli, *command)
        assert not set("\x1b\x07\x9b\x7f\u202e\u2066\u200f\u061c\r") & set(told), told
        assert "\\u001b[2J" in told
    (row,) = cli.collect("r")
    assert json.loads(shown_on_a_terminal(cli, "collect", "r")) == row
    assert (
        json.loads(shown_on_a_terminal(cli, "show", "r", "0", "--json"))["result"]
        == row["result"]
        == f"tab\t{STEERING}"
    )
    assert "\u202e" in cli("collect", "r").stdout
    assert STEERING.encode() in (cli.folder / "out.csv").read_bytes()
