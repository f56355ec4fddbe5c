"""The main job with real processes and real signals: each test ends by comparing all that went in with all that came out."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import signal
import sqlite3
import subprocess
import sys
import termios
import textwrap
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from lbr.store.enqueue import CHUNK
from lbr.worker.processes import SIGNALS, handled_signals
from tests.support import PATIENCE_SECONDS, Cli, eventually, is_postgresql

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.processes

SLOW = ("--model", "offline:echo", "--set", "latency=0.05")


def prompts(count: int, distinct: int) -> list[str]:
    """Return prompts with duplicates in a fixed disorder."""
    rng = random.Random(7)
    return [f"prompt {rng.randrange(distinct)}" for _ in range(count)]


def write(folder: Path, lines: list[str], name: str = "in.txt") -> None:
    """Write a text file of prompts."""
    (folder / name).write_text("".join(line + "\n" for line in lines))


def check(rows: list[dict[str, Any]], lines: list[str]) -> None:
    """Compare every collected row with the input: present, in order, answered by what was asked."""
    assert [(row["idx"], row["prompt"], row["status"], row["result"]) for row in rows] == [
        (idx, line, "done", line) for idx, line in enumerate(lines)
    ]


def recount(cli: Cli) -> None:
    """Check the counters against the rows, and a file's integrity, as an outsider."""
    if not is_postgresql(cli.outside_url):
        assert cli.query("PRAGMA integrity_check") == [("ok",)]
    states = "('pending', 'inflight', 'done', 'failed', 'cancelled')"
    kept = cli.query(
        f"SELECT run_id, name, sum(value) FROM counters WHERE name IN {states} GROUP BY 1, 2 HAVING sum(value) <> 0"
    )
    assert sorted(kept) == sorted(cli.query("SELECT run_id, state, count(*) FROM jobs GROUP BY 1, 2"))


def pid_that_holds_jobs(cli: Cli) -> int:
    """Return the process of the worker that has claimed last of those that hold jobs now."""
    query = (
        "SELECT w.pid FROM jobs j JOIN workers w ON w.id = j.worker_id WHERE j.state = 'inflight' "
        "ORDER BY j.lease_until DESC LIMIT 1"
    )
    return int(cli.query(query)[0][0])


@pytest.mark.slow
def test_three_workers_one_killed(cli: Cli) -> None:
    """Three workers on one file, one killed with SIGKILL while it holds jobs: nothing lost, nothing done twice."""
    lines = prompts(500, 420)
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.3")
    workers = [cli.start("worker", "--concurrency", "8", "--lease", "1.5") for _ in range(3)]
    cli.wait_for("in", "done", 100)
    # Between a settlement and the next claim a worker holds nothing: not that moment.
    cli.wait_for("in", "inflight", 24)
    holder = next(worker for worker in workers if worker.pid == pid_that_holds_jobs(cli))
    holder.kill()
    output = [worker.communicate(timeout=90) for worker in workers]
    assert sorted(worker.returncode for worker in workers) == [-9, 0, 0]
    told = "".join(err for _, err in output)
    assert sum(map(int, re.findall(r"reclaimed (\d+) jobs?", told))) == cli.status("in")["crashed"]
    assert 1 <= cli.status("in")["crashed"] <= 8
    check(cli.collect("in"), lines)
    recount(cli)


@pytest.mark.slow
def test_resume_after_every_process_was_killed(cli: Cli) -> None:
    """All workers killed at once: the same command again finishes, and repeats no more than was in flight."""
    log = cli.folder / "calls.log"
    (cli.folder / "answers.py").write_text(
        textwrap.dedent(
            """
            import asyncio, os

            async def echo(prompt):
                with open("calls.log", "ab", buffering=0) as log:
                    log.write(prompt.encode() + b"\\n")
                await asyncio.sleep(0.2)
                return prompt
            """
        )
    )
    lines = prompts(250, 220)
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", "answers:echo")
    command = ("worker", "--function", "answers:echo", "--concurrency", "6", "--lease", "1.5")
    workers = [cli.start(*command) for _ in range(2)]
    cli.wait_for("in", "done", 80)
    # Both at work, and at least one of them with calls that have just begun.
    cli.wait_for("in", "inflight", 12)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.communicate()
    inflight = cli.status("in")["inflight"]
    assert 0 < inflight <= 12
    cli(*command)
    check(cli.collect("in"), lines)
    calls = Counter(log.read_text().splitlines())
    assert set(calls) == set(lines)
    assert sum(calls.values()) - len(calls) <= inflight
    assert max(calls.values()) <= 2
    recount(cli)


@pytest.mark.slow
def test_two_runs_at_once(cli: Cli) -> None:
    """Two `lbr run` of different files share one queue and each writes its own whole answers."""
    first, second = prompts(200, 150), [f"other {n}" for n in range(200)]
    write(cli.folder, first, "one.txt")
    write(cli.folder, second, "two.txt")
    runs = [cli.start("run", f"{name}.txt", "-o", f"{name}.jsonl", *SLOW) for name in ("one", "two")]
    assert [(run.communicate(timeout=90)[1][-400:], run.returncode)[1] for run in runs] == [0, 0]
    for name, lines in (("one", first), ("two", second)):
        check([json.loads(line) for line in (cli.folder / f"{name}.jsonl").read_text().splitlines()], lines)
    recount(cli)


@pytest.mark.slow
def test_the_same_run_twice_at_once(cli: Cli) -> None:
    """The same `lbr run` in two terminals divides the work; both end well with the same file."""
    lines = prompts(200, 150)
    write(cli.folder, lines)
    runs = [cli.start("run", "in.txt", "-o", "out.jsonl", *SLOW) for _ in range(2)]
    assert [(run.communicate(timeout=90), run.returncode)[1] for run in runs] == [0, 0]
    check([json.loads(line) for line in (cli.folder / "out.jsonl").read_text().splitlines()], lines)
    assert cli.status("in")["stale"] == 0
    recount(cli)


@pytest.mark.slow
def test_two_enqueues_of_the_same_file_at_once(cli: Cli) -> None:
    """Two enqueues that race add every input once."""
    lines = prompts(20_000, 12_000)
    write(cli.folder, lines)
    racers = [cli.start("enqueue", "in.txt", "--model", "offline:echo", "--json") for _ in range(2)]
    counts = [json.loads(racer.communicate(timeout=90)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum(count["new"] for count in counts) == len(set(lines))
    assert sum(count["known"] for count in counts) == 20_000
    cli("worker", "--concurrency", "200")
    check(cli.collect("in"), lines)
    recount(cli)


@pytest.mark.slow
def test_enqueue_killed_in_the_middle_is_completed(cli: Cli) -> None:
    """After kill -9 the same enqueue adds what is missing, and collect says until then that it is unfinished."""
    lines = prompts(50_000, 40_000)
    write(cli.folder, lines)
    enqueue = ("enqueue", "in.txt", "--model", "offline:echo")
    first = cli.start(*enqueue)
    cli.wait_for("in", "inputs", CHUNK)
    first.kill()
    first.communicate()
    held = cli.status("in")["inputs"]
    assert held % CHUNK == 0
    assert 0 < held < len(lines)
    done = cli("collect", "in", "-o", "early.jsonl", check=False)
    assert done.returncode == 3
    assert "enqueue of run in has not finished" in done.stderr
    report = json.loads(cli(*enqueue, "--json").stdout)
    assert (report["inputs"], report["known"]) == (len(lines), held)
    rows = cli.collect("in", code=3)
    assert [row["prompt"] for row in rows] == lines
    recount(cli)


# What a signal does is the same for both databases: each signal once, and each database.
@pytest.mark.parametrize(
    ("db_url", "number"),
    [*(("sqlite", number) for number in SIGNALS), ("postgresql", signal.SIGTERM)],
    indirect=["db_url"],
)
def test_drain_on_signal(cli: Cli, number: signal.Signals) -> None:
    """Told to stop, a worker finishes what is in flight, leaves the rest pending and charges nothing."""
    write(cli.folder, [f"p{n}" for n in range(300)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.3")
    worker = cli.start("worker", "--concurrency", "10")
    cli.wait_for("in", "done", 10)
    worker.send_signal(number)
    _, told = worker.communicate(timeout=30)
    assert worker.returncode == 0, told
    assert "stopping: finishing the calls in flight" in told
    now = cli.status("in")
    assert (now["inflight"], now["crashed"], now["done"] + now["pending"]) == (0, 0, 300)
    assert now["done"] < 300
    assert f"{now['done']} done, 0 failed" in told
    recount(cli)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("db_url", "first"),
    [("sqlite", signal.SIGTERM), ("sqlite", signal.SIGHUP), ("postgresql", signal.SIGTERM)],
    indirect=["db_url"],
)
def test_second_signal_releases_at_once(cli: Cli, first: signal.Signals) -> None:
    """A second signal gives the calls in flight back without waiting for them."""
    write(cli.folder, ["a", "b", "c"])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=600")
    worker = cli.start("worker", "--timeout", "1000")
    cli.wait_for("in", "inflight", 3)
    worker.send_signal(first)
    assert worker.stderr is not None
    assert "stopping" in worker.stderr.readline()
    worker.send_signal(signal.SIGTERM)
    _, told = worker.communicate(timeout=20)
    assert (worker.returncode, "3 released" in told) == (0, True)
    now = cli.status("in")
    assert (now["pending"], now["crashed"]) == (3, 0)
    recount(cli)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["worker", "worker --processes 2", "run in.txt -o out.jsonl"])
def test_a_closed_terminal_drains(cli: Cli, command: str) -> None:
    """A worker whose terminal is closed finishes what is in flight, though its stderr is gone and SIGHUP comes twice."""
    (cli.folder / "answers.py").write_text(
        "import time\n\ndef echo(prompt):\n    with open('calls.log', 'a') as log:\n        log.write('.')\n"
        "    time.sleep(0.3)\n    print(prompt)\n    return prompt\n"
    )
    write(cli.folder, [f"p{n}" for n in range(300)])
    cli("enqueue", "in.txt", "--function", "answers:echo")
    ours, theirs = pty.openpty()
    flags = ("--function", "answers:echo", "--concurrency", "4")
    with subprocess.Popen(
        [sys.executable, "-m", "lbr", *command.split(), *flags],
        cwd=cli.folder,
        env=cli.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no thread runs
    ) as working:
        os.close(theirs)
        cli.wait_for("in", "done", 8)
        os.close(ours)
        # As an interactive shell does for its jobs, beside the kernel.
        working.send_signal(signal.SIGHUP)
        code = working.wait(timeout=PATIENCE_SECONDS)
    now = cli.status("in")
    assert (code, now["inflight"], now["crashed"]) == (3 if "run" in command else 0, 0, 0)
    assert (now["done"] < 300, now["done"] + now["pending"]) == (True, 300)
    assert len((cli.folder / "calls.log").read_text()) == now["done"]
    recount(cli)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_is_nothing(cli: Cli) -> None:
    """A worker that was started with SIGHUP ignored goes on, and SIGTERM still drains it."""
    write(cli.folder, [f"p{n}" for n in range(300)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.3")
    ignoring = Cli(cli.folder, db_url=cli.environment.get("LBR_DB"), prefix=["nohup"])
    worker = ignoring.start("worker", "--concurrency", "10")
    try:
        cli.wait_for("in", "done", 10)
        worker.send_signal(signal.SIGHUP)
        cli.wait_for("in", "done", 60)
        worker.send_signal(signal.SIGTERM)
        _, told = worker.communicate(timeout=30)
    finally:
        ignoring.stop_all()
    assert (worker.returncode, told.count("stopping")) == (0, 1), told
    assert cli.status("in")["done"] < 300


@pytest.mark.slow
@pytest.mark.parametrize("command", ["worker", "run"])
def test_function_that_will_not_stop_does_not_keep_the_worker(cli: Cli, command: str) -> None:
    """A function that swallows its cancellation cannot keep a stopped worker alive; its job is released."""
    (cli.folder / "stubborn.py").write_text(
        textwrap.dedent(
            """
            import asyncio
            from lbr.worker import calls

            calls.CANCEL_SECONDS = 0.5

            async def stay(prompt):
                with open("calls.log", "w") as file:
                    file.write(prompt)
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        pass
            """
        )
    )
    write(cli.folder, ["a"])
    cli("enqueue", "in.txt", "--function", "stubborn:stay")
    inputs = ("in.txt", "-o", "out.jsonl") if command == "run" else ()
    worker = cli.start(command, *inputs, "--function", "stubborn:stay", "--grace", "0", "--timeout", "1000")
    # What is in flight may not have been called yet, and is then simply given back.
    cli.wait_for_file("calls.log")
    worker.send_signal(signal.SIGTERM)
    _, told = worker.communicate(timeout=30)
    assert worker.returncode == (3 if command == "run" else 0)
    assert "left 1 call behind" in told
    assert cli.status("in")["pending"] == 1


@pytest.mark.slow
def test_collect_while_workers_run(cli: Cli) -> None:
    """Collects during the work are whole and in order; `--wait` ends with everything."""
    lines = prompts(3_000, 2_500)
    write(cli.folder, lines)
    cli("enqueue", "in.txt", *SLOW)
    worker = cli.start("worker", "--concurrency", "20", "--processes", "2")
    waiting = cli.start("collect", "in", "--wait", "-o", "all.jsonl")
    cli.wait_for("in", "done", 50)
    for _ in range(3):
        rows = [json.loads(line) for line in cli("collect", "in", check=False).stdout.splitlines()]
        assert [row["prompt"] for row in rows] == lines
        assert all(row["result"] == (row["prompt"] if row["status"] == "done" else None) for row in rows)
    assert waiting.wait(timeout=120) == 0
    assert worker.wait(timeout=60) == 0
    check([json.loads(line) for line in (cli.folder / "all.jsonl").read_text().splitlines()], lines)


def worker_pids(cli: Cli) -> list[int]:
    """Return the processes of all registered workers."""
    return [pid for (pid,) in cli.query("SELECT pid FROM workers")]


@pytest.mark.slow
def test_processes_flag_and_a_killed_child(cli: Cli) -> None:
    """`--processes` starts children that share the work; when one is killed the others finish."""
    lines = [f"p{n}" for n in range(250)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
    parent = cli.start("worker", "--processes", "3", "--concurrency", "4", "--lease", "1.5")
    cli.wait_for("in", "done", 50)
    deadline = time.monotonic() + 30
    while len(pids := worker_pids(cli)) < 3:
        assert time.monotonic() < deadline
    subprocess.run(["kill", "-9", str(pids[0])], check=True)
    _, told = parent.communicate(timeout=90)
    assert parent.returncode == 0, told
    assert f"worker process {pids[0]} was killed by SIGKILL" in told
    check(cli.collect("in"), lines)
    recount(cli)


def test_what_no_process_could_do_is_told_once(cli: Cli) -> None:
    """A database or a run that is not there is looked for before any process is started."""
    none = cli("--db", "none.db", "worker", "--processes", "3", check=False)
    write(cli.folder, ["one"])
    cli("enqueue", "in.txt", "--model", "offline:echo")
    wrong = cli("worker", "--processes", "3", "--run", "none", check=False)
    assert [(done.returncode, len(done.stderr.splitlines())) for done in (none, wrong)] == [(2, 1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["environment", "file"])
@pytest.mark.parametrize("command", ["worker", "run"])
def test_what_is_set_for_the_parent_is_not_for_its_children(cli: Cli, command: str, way: str) -> None:
    """Flags of the environment and the config file are read once: no child starts children, or waits for a lock."""
    if way == "file":
        words = "processes = 2\nexclusive = true\nrpm = 1\n"
        (cli.folder / "lbr.toml").write_text(f"[worker]\n{words}\n[run]\nprocesses = 2\n")
    else:
        twins = {"PROCESSES": "2", "EXCLUSIVE": "1", "RPM": "1"}
        cli.environment |= {f"LBR_WORKER_{name}": value for name, value in twins.items()}
        cli.environment["LBR_RUN_PROCESSES"] = "2"
    lines = [f"p{n}" for n in range(40)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
    if command == "run":
        inputs = ("in.txt", "-o", "out.jsonl", "--model", "offline:echo", "--set", "latency=0.2")
        parent = cli.start("run", *inputs, "--concurrency", "2")
    else:
        parent = cli.start("worker", "--concurrency", "2", "--rpm", "60000")
    most = 0
    while parent.poll() is None:
        with suppress(psutil.Error):
            most = max(most, len(psutil.Process(parent.pid).children(recursive=True)))
        assert most <= 2, "a child has started more"
        time.sleep(0.05)
    _, told = parent.communicate()
    assert (parent.returncode, most) == (0, 2), told
    check(cli.collect("in"), lines)


@pytest.mark.slow
def test_children_end_with_their_parent(cli: Cli) -> None:
    """Of a killed parent no child works on for nobody: each finishes what is in flight and claims no more."""
    write(cli.folder, [f"p{n}" for n in range(2000)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
    parent = cli.start("worker", "--processes", "2", "--concurrency", "4", "--exclusive")
    cli.wait_for("in", "done", 8)
    parent.kill()
    _, told = parent.communicate(timeout=60)  # to the end of what the children have to say
    assert told.count("the process that started this one is gone") == 2
    now = cli.status("in")
    assert (now["inflight"], now["crashed"], now["done"] + now["pending"]) == (0, 0, 2000)
    assert now["pending"]
    recount(cli)


@pytest.mark.slow
def test_children_end_with_their_parent_also_where_nobody_listens(cli: Cli) -> None:
    """The terminal was closed, or the reader of their words was killed as well: they end all the same."""
    write(cli.folder, [f"p{n}" for n in range(2000)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
    parent = cli.start("worker", "--processes", "2", "--concurrency", "4", "--exclusive")
    cli.wait_for("in", "done", 8)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert parent.stderr is not None
    parent.stderr.close()
    parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    now = cli.status("in")
    assert (now["inflight"], now["crashed"], now["done"] + now["pending"]) == (0, 0, 2000)
    assert now["pending"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_drains_also_where_nobody_listens(cli: Cli, number: signal.Signals) -> None:
    """What reads its words may have ended by the same Ctrl-C."""
    write(cli.folder, [f"p{n}" for n in range(2000)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
    worker = cli.start("worker", "--concurrency", "4")
    cli.wait_for("in", "done", 8)
    assert worker.stderr is not None
    worker.stderr.close()
    worker.send_signal(number)
    assert worker.wait(timeout=60) == 0
    now = cli.status("in")
    assert (now["inflight"], now["crashed"], now["done"] + now["pending"]) == (0, 0, 2000)
    assert now["pending"]


@pytest.mark.slow
def test_a_run_goes_on_where_its_terminal_was_closed(cli: Cli) -> None:
    """The bar that nobody sees any more is no reason to end: the output is written."""
    write(cli.folder, [f"p{n}" for n in range(30)])
    command = ("run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo", "--set", "latency=0.5")
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "lbr", *command, "--concurrency", "4"],
        cwd=cli.folder,
        env=cli.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        text=True,
        start_new_session=True,  # no SIGHUP: as under nohup
    )
    cli.started.append(running)
    os.close(theirs)
    cli.wait_for("in", "done", 4)
    os.close(ours)
    assert running.wait(timeout=60) == 0
    assert len((cli.folder / "out.jsonl").read_text().splitlines()) == 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_are_stopped_before_they_listen_end_well(cli: Cli, number: signal.Signals) -> None:
    """Children that have only just been started end by the signal itself; nothing was in their hands."""
    write(cli.folder, [f"p{n}" for n in range(50)])
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=1")
    parent = cli.start("worker", "--processes", "2", "--concurrency", "4")
    process = psutil.Process(parent.pid)
    while len(process.children()) < 2:
        assert parent.poll() is None
    parent.send_signal(number)
    _, told = parent.communicate(timeout=60)
    assert (parent.returncode, "Traceback" in told, "was killed" in told) == (0, False, False)
    recount(cli)
    assert cli.status("in")["inflight"] == 0


def test_a_run_keeps_the_attempts_that_it_was_made_with(cli: Cli) -> None:
    """Another number, or a shorter input, changes nothing, and is told."""
    write(cli.folder, ["a", "b"])
    first = ("enqueue", "in.txt", "--model", "offline:echo", "--max-attempts", "3")
    assert cli(*first).stderr == ""
    write(cli.folder, ["a"])
    told = cli(*first[:-1], "2").stderr.splitlines()
    assert told == [
        "lbr: run in was created with 3 attempts per job, and keeps them",
        "lbr: run in holds 2 inputs, this input has 1; the others stay in it",
    ]


async def test_signals_do_afterwards_what_they_did_before() -> None:
    """Who listens for a while leaves no other handler behind: `lbr run` has a file to write, and to remove, after."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(-number))
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with handled_signals(heard.append):
            signal.raise_signal(signal.SIGTERM)
            await eventually(lambda: heard)
        assert heard == [signal.SIGTERM]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
            before[signal.SIGINT],
            ours,
        )
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM, -signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_a_bar_shows_a_name_as_it_is(tmp_path: Path) -> None:
    """On a terminal a run's name is text, whatever the one who draws the bar would make of its brackets."""
    write(tmp_path, ["a"])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lbr", "run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo"]
    with subprocess.Popen([*command, "--run", "[/x][red]q"], cwd=tmp_path, stderr=theirs) as running:
        os.close(theirs)
        told = b""
        with suppress(OSError):  # how a terminal that nobody holds any more comes to its end
            while chunk := os.read(ours, 65_536):
                told += chunk
        os.close(ours)
    assert running.returncode == 0, told
    assert "[/x][red]q" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode()), told


@pytest.mark.slow
def test_exclusive_worker_for_cron(cli: Cli) -> None:
    """A second exclusive worker exits with 0 at once and says so; a killed one frees the lock."""
    write(cli.folder, ["a"])
    cli("enqueue", "in.txt", "--model", "offline:echo")
    first = cli.start("worker", "--exclusive", "--until", "forever")
    cli.wait_for("in", "done", 1)
    second = cli("worker", "--exclusive")
    assert "an exclusive worker" in second.stderr
    assert "nothing to do" in second.stderr
    first.kill()
    first.communicate()
    assert "0 done" in cli("worker", "--exclusive").stderr


@pytest.mark.processes
def test_a_pause_is_told_by_those_whom_it_concerns(cli: Cli) -> None:
    """A worker that comes after a pause ends with 0, one that is given the run with 3, and `lbr run` says how to go on."""
    write(cli.folder, ["a", "b"])
    cli("enqueue", "in.txt", "--model", "offline:echo")
    cli("pause", "in", "--reason", "no credit")
    assert "paused" not in cli("worker").stderr
    for command in (
        ("worker", "--run", "in"),
        ("run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo"),
    ):
        done = cli(*command, check=False)
        assert (done.returncode, "no credit; `lbr resume in` lets it go on" in done.stderr) == (3, True), done.stderr


def test_failures_and_retry(cli: Cli) -> None:
    """Failed rows carry their error and exit code 4; retry puts them back, and only them are called again."""
    (cli.folder / "shaky.py").write_text(
        textwrap.dedent(
            """
            import pathlib
            import lbr

            def answer(prompt):
                with open("calls.log", "a") as log:
                    log.write(prompt + "\\n")
                if prompt == "bad" and not pathlib.Path("mended").exists():
                    raise lbr.Permanent("not today")
                return prompt
            """
        )
    )
    write(cli.folder, ["good", "bad", "good"])
    done = cli("run", "in.txt", "-o", "out.csv", "--function", "shaky:answer", check=False)
    assert done.returncode == 4, done.stderr
    assert "1 failed (permanent): not today; `lbr failures in` shows why, `lbr retry in` puts" in done.stderr
    assert re.search(r"^bad,,failed,not today$", (cli.folder / "out.csv").read_text(), re.MULTILINE)
    (cli.folder / "mended").touch()
    assert cli("retry", "in").stdout == "run in: 1 job back to pending\n"
    cli("run", "in.txt", "-o", "out.jsonl", "--function", "shaky:answer")
    check(
        [json.loads(line) for line in (cli.folder / "out.jsonl").read_text().splitlines()],
        ["good", "bad", "good"],
    )
    assert Counter((cli.folder / "calls.log").read_text().split()) == Counter({"good": 1, "bad": 2})


@pytest.mark.slow
def test_run_resumes(cli: Cli) -> None:
    """An interrupted `lbr run` writes nothing; the same command again resumes and writes everything."""
    lines = [f"p{n}" for n in range(200)]
    write(cli.folder, lines)
    command = ("run", "in.txt", "-o", "out.jsonl", *SLOW, "--concurrency", "4")
    first = cli.start(*command)
    cli.wait_for("in", "done", 20)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 3, told
    assert "run the same command again to resume" in told
    assert not (cli.folder / "out.jsonl").exists()
    cli(*command)
    check([json.loads(line) for line in (cli.folder / "out.jsonl").read_text().splitlines()], lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), f"with the first {CHUNK} inputs in the run; run the same command again with the same input"),
        (("--append",), "`lbr status` shows how many inputs the run has now"),
    ],
)
def test_an_interrupted_enqueue_says_what_is_kept(cli: Cli, more: tuple[str, ...], told: str) -> None:
    """Ctrl-C tells how much is in the run and what to do, and the same command goes on where it was."""
    lines = [f"p{n}" for n in range(CHUNK + 10)]
    write(cli.folder, lines)
    os.mkfifo(cli.folder / "pipe")
    command = ("enqueue", "pipe", "--run", "in", "--model", "offline:echo", *more)
    first = cli.start(*command)
    with (cli.folder / "pipe").open("w") as pipe:
        pipe.writelines(f"{line}\n" for line in lines[:CHUNK])
        pipe.flush()
        cli.wait_for("in", "inputs", CHUNK)
        pipe.writelines(f"{line}\n" for line in lines[CHUNK:])
        pipe.flush()
        while fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) != bytes(4):  # until it waits for more
            assert first.poll() is None
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=60)
    assert (first.returncode, error.count("\n")) == (130, 1), error
    assert error.startswith("lbr: interrupted")
    assert told in error
    assert cli.status("in")["inputs"] == CHUNK
    if not more:
        again = cli("enqueue", "in.txt", "--model", "offline:echo")
        assert f"{CHUNK + 10} inputs, 10 new, 0 duplicate, 0 reused, {CHUNK} known" in again.stdout


@pytest.mark.slow
def test_workers_under_faults_finish_everything(cli: Cli) -> None:
    """With failures and rate limits of every kind mixed in, every job ends done, and none is answered twice."""
    lines = [f"p{n}" for n in range(150)]
    write(cli.folder, lines)
    settings = ["failure_rate=0.05", "rate_limit_rate=0.02", "seed=3", "retry_after=0.05"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    cli("enqueue", "in.txt", "--model", "offline:echo", *flags)
    workers = [cli.start("worker", "--concurrency", "8") for _ in range(2)]
    assert [(worker.communicate(timeout=120), worker.returncode)[1] for worker in workers] == [0, 0]
    check(cli.collect("in"), lines)
    recount(cli)
    now = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
    assert set(now["errors"]) == {"transient", "rate_limited"}


def test_results_database_and_csv(cli: Cli) -> None:
    """Metadata, ids and order survive into every output format."""
    rows = [{"prompt": f"p{n % 7}", "id": f"r{n}", "city": f"c{n}", "n": n} for n in range(20)]
    (cli.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli("run", "in.jsonl", "-o", "out.jsonl", "--model", "offline:echo")
    collected = [json.loads(line) for line in (cli.folder / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["metadata"], row["result"]) for row in collected] == [
        (row["id"], {"city": row["city"], "n": row["n"]}, row["prompt"]) for row in rows
    ]
    cli("collect", "in", "-o", "out.csv")
    header, first, *_ = (cli.folder / "out.csv").read_text().splitlines()
    assert header == "prompt,id,city,n,result,status,error"
    assert first.startswith("p0,r0,c0,0,")
    assert first.endswith(",p0,done,")
    cli("collect", "in", "-o", "out.db", "--shape", "unique")
    connection = sqlite3.connect(cli.folder / "out.db")
    found = connection.execute("SELECT idx, id, prompt, result FROM results ORDER BY idx").fetchall()
    connection.close()
    assert found == [(n, f"r{n}", f"p{n}", f"p{n}") for n in range(7)]


def test_results_database_keeps_other_runs(cli: Cli) -> None:
    """Two runs collected into one results database stand side by side; collecting one again replaces its rows only."""
    for name in ("one", "two"):
        write(cli.folder, [f"{name} a", f"{name} b"], f"{name}.txt")
        cli("run", f"{name}.txt", "-o", "out.db", "--model", "offline:echo")
    cli("collect", "one", "-o", "out.db")
    connection = sqlite3.connect(cli.folder / "out.db")
    found = connection.execute("SELECT run, idx, result FROM results ORDER BY run, idx").fetchall()
    connection.close()
    assert found == [(name, n, f"{name} {'ab'[n]}") for name in ("one", "two") for n in range(2)]


def test_stdin_is_streamed_into_a_run(cli: Cli) -> None:
    """Prompts from a pipe become a named run."""
    cli("enqueue", "-", "--run", "piped", "--model", "offline:echo", stdin="a\nb\na\n")
    cli("worker")
    check(cli.collect("piped"), ["a", "b", "a"])


ECHO_WITH_LOG = """
import os, time

def echo(prompt):
    with open("calls.log", "a") as log:
        log.write(prompt + "\\n")
    time.sleep(0.01 if os.path.exists("ended") else 0.2)
    return prompt
"""


def by_another_clock(cli: Cli, seconds: int, when: str = "True") -> subprocess.Popen[str]:
    """Start a worker whose clock is off by that much, from the moment on when a condition holds."""
    code = (
        "import os, time; real = time.time_ns; "
        f"time.time_ns = lambda: real() + {seconds} * 10**9 * ({when}); from lbr.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "worker", "--function", "answers:echo", "--concurrency", "4"]
    process = subprocess.Popen(
        command,
        cwd=cli.folder,
        env=cli.environment | {"PYTHONPATH": str(cli.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    cli.started.append(process)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("hours", [3, -3])
@pytest.mark.parametrize("when", ["True", "os.path.exists('jump')"])
def test_a_clock_that_is_hours_off_stops_its_worker(cli: Cli, hours: int, when: str) -> None:
    """On a file a worker whose clock is, or comes to be, far from the others' ends with both times; no call is repeated.

    On a server nothing depends on it.
    """
    (cli.folder / "answers.py").write_text(ECHO_WITH_LOG)
    # More than is answered before the clocks have been compared, however slow the machine; the rest goes fast.
    lines = [f"p{n}" for n in range(600)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", "answers:echo")
    good = cli.start("worker", "--function", "answers:echo", "--concurrency", "4")
    cli.wait_for("in", "done", 8)
    wrong = by_another_clock(cli, hours * 3600, when)
    if when != "True":
        cli.wait_for("in", "inflight", 8)
        (cli.folder / "jump").touch()
    if is_postgresql(cli.outside_url):
        (cli.folder / "ended").touch()
    _, told = wrong.communicate(timeout=90)
    (cli.folder / "ended").touch()
    _, others = good.communicate(timeout=90)
    now = cli.status("in")
    assert (good.returncode, now["done"], now["failed"]) == (0, 600, 0), others
    if is_postgresql(cli.outside_url):
        assert wrong.returncode == 0, told
    else:
        assert (wrong.returncode, now["crashed"]) == (1, 0), told
        assert re.search(r"clock of this process says .* UTC, but worker \d+, .* written .* UTC", told), told
    calls = Counter((cli.folder / "calls.log").read_text().splitlines())
    assert calls == dict.fromkeys(lines, 1)
    recount(cli)
