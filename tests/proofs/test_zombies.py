"""Workers that are stopped past their leases and come back, and jobs that kill their workers, with real processes."""

from __future__ import annotations

import json
import signal
import textwrap
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.worker.test_processes import check, recount, write

if TYPE_CHECKING:
    import subprocess

    from tests.support import Cli

pytestmark = pytest.mark.processes

LEASE = "1.5"
LONG_LEASE = "4.5"
"""Renewed every third of it: so late that a call of 0.8 seconds ends first when its worker wakes."""


def functions(cli: Cli) -> None:
    """Write functions that log each call, and answer late or not at all."""
    (cli.folder / "answers.py").write_text(
        textwrap.dedent(
            """
            import asyncio, os, pathlib, signal, time

            def log(prompt):
                with open("calls.log", "ab", buffering=0) as file:
                    file.write(f"{os.environ.get('WHO')} {prompt}\\n".encode())

            async def slow(prompt):
                log(prompt)
                await asyncio.sleep(0.8 if os.environ["WHO"] == "zombie" else 0)
                return os.environ["WHO"]

            async def deadly(prompt):
                log(prompt)
                if prompt == "deadly":
                    os.kill(os.getpid(), signal.SIGKILL)
                await asyncio.sleep(0.1)
                return prompt

            def fork():
                while True:
                    try:
                        return os.fork()
                    except RuntimeError:  # filelock lets nobody fork while it opens or closes a lock
                        time.sleep(0.001)

            async def forking(prompt):
                log(prompt)
                if fork() == 0:
                    return "the child's"
                await asyncio.sleep(0.2)
                return prompt

            def forking_in_a_thread(prompt):
                log(prompt)
                if fork() == 0:
                    raise SystemExit
                return prompt

            async def steady(prompt):
                log(prompt)
                await asyncio.sleep(0.2)
                return prompt
            """
        )
    )


def calls(cli: Cli) -> list[str]:
    """Return who was called for what, in order."""
    return (cli.folder / "calls.log").read_text().splitlines()


def stop_in_its_call(cli: Cli) -> subprocess.Popen[str]:
    """Start a worker, and stop it with SIGSTOP while it calls, for longer than its lease."""
    cli.environment["WHO"] = "zombie"
    zombie = cli.start("worker", "--function", "answers:slow", "--run", "in", "--lease", LONG_LEASE)
    cli.wait_for_file("calls.log")
    zombie.send_signal(signal.SIGSTOP)
    lease_ends = time.monotonic() + float(LONG_LEASE)
    while time.monotonic() < lease_ends:
        time.sleep(0.1)
    cli.environment["WHO"] = "successor"
    return zombie


def show(cli: Cli) -> dict[str, Any]:
    """Return everything about the first input."""
    found: dict[str, Any] = json.loads(cli("show", "in", "0", "--json").stdout)
    return found


def test_zombie_comes_too_late(cli: Cli) -> None:
    """The answer of a worker that slept past its lease is refused and recorded where another one has answered."""
    functions(cli)
    write(cli.folder, ["hello"])
    cli("enqueue", "in.txt", "--function", "answers:slow")
    zombie = stop_in_its_call(cli)
    cli("worker", "--function", "answers:slow")
    assert cli.collect("in")[0]["result"] == "successor"
    zombie.send_signal(signal.SIGCONT)
    _, told = zombie.communicate(timeout=60)
    assert zombie.returncode == 0, told
    assert cli.collect("in")[0]["result"] == "successor"
    assert calls(cli) == ["zombie hello", "successor hello"]
    story = show(cli)
    assert (story["claim_seq"], story["attempts"], story["crashes"]) == (2, 1, 1)
    assert [(one["what"], one["claim_seq"]) for one in story["tries"]] == [("crashed", 1), ("stale", 1)]
    assert story["tries"][-1]["text"] == "zombie"
    assert cli.status("in")["stale"] == 1
    recount(cli)


def test_zombie_is_late_and_nobody_else_has_asked(cli: Cli) -> None:
    """An answer that comes after its lease is kept where its job was taken back, but not claimed again: it is paid for."""
    functions(cli)
    write(cli.folder, ["hello"])
    write(cli.folder, ["other"], "other.txt")
    cli("enqueue", "in.txt", "--function", "answers:slow")
    cli("enqueue", "other.txt", "--model", "offline:echo")
    zombie = stop_in_its_call(cli)
    told = cli("worker", "--run", "other").stderr
    assert "reclaimed 1 job" in told
    assert (cli.status("in")["pending"], cli.status("in")["crashed"]) == (1, 1)
    zombie.send_signal(signal.SIGCONT)
    _, told = zombie.communicate(timeout=60)
    assert zombie.returncode == 0, told
    assert cli.collect("in")[0]["result"] == "zombie"
    assert calls(cli) == ["zombie hello"]
    assert (show(cli)["claim_seq"], cli.status("in")["stale"]) == (1, 0)
    recount(cli)


def test_deadly_job_fails_and_its_neighbours_finish(cli: Cli) -> None:
    """A job that kills its worker fails after three crashes; the fifty beside it are all answered, and charged nothing."""
    functions(cli)
    innocent = [f"prompt {n}" for n in range(50)]
    lines = [*innocent[:20], "deadly", *innocent[20:]]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", "answers:deadly")
    died = 0
    # The last one is alive, and reports the job that its third crash has failed.
    while (code := cli("worker", "--function", "answers:deadly", "--lease", LEASE, check=False).returncode) != 4:
        assert code == -signal.SIGKILL
        died += 1
        assert died <= 3
    assert died == 3
    rows = cli.collect("in", code=4)
    assert [row["result"] for row in rows] == [None if line == "deadly" else line for line in lines]
    assert rows[20]["status"] == "failed"
    assert "its worker died 3 times" in rows[20]["error"]
    assert cli.query("SELECT max(attempts) FROM jobs WHERE state = 'done'") == [(1,)]
    assert Counter(calls(cli))["None deadly"] == 3
    recount(cli)


def test_a_kill_of_all_workers_charges_no_attempt(cli: Cli) -> None:
    """When the machine goes down with all its workers, nothing fails and no attempt is charged."""
    functions(cli)
    lines = [f"prompt {n}" for n in range(120)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", "answers:steady", "--max-attempts", "1")
    command = ("worker", "--function", "answers:steady", "--concurrency", "8", "--lease", LEASE)
    for done in (20, 50):
        workers = [cli.start(*command) for _ in range(2)]
        cli.wait_for("in", "done", done)
        cli.wait_for("in", "inflight", 8)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()
    cli(*command)
    check(cli.collect("in"), lines)
    assert cli.status("in")["crashed"] >= 8
    assert cli.query("SELECT max(attempts) FROM jobs") == [(1,)]
    recount(cli)


@pytest.mark.parametrize("function", ["forking", "forking_in_a_thread"])
def test_a_function_that_forks_makes_no_second_worker(cli: Cli, function: str) -> None:
    """A child that comes back out of the function ends there: it holds no claim, and settles none."""
    functions(cli)
    lines = [f"prompt {n}" for n in range(8)]
    write(cli.folder, lines)
    cli("enqueue", "in.txt", "--function", f"answers:{function}")
    told = cli("worker", "--function", f"answers:{function}", "--concurrency", "4").stderr
    assert "8 done, 0 failed" in told
    check(cli.collect("in"), lines)
    assert Counter(calls(cli)) == {f"None {line}": 1 for line in lines}
    assert cli.status("in")["stale"] == 0
    recount(cli)
