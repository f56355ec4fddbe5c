"""The main job for real: a public table, three workers, one of them killed half way, every answer checked.

The table is the airports of vega_datasets; the template makes duplicates of its rows, for many airports share
a city. The offline model answers with the prompt itself, so each answer can be compared with its row.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path("build/demo")
DATABASE = FOLDER / "runs.db"
ANSWERS = FOLDER / "answers.csv"
TEMPLATE = "Which region of the United States is {{ city }}, {{ state }} in?"
LEASE_SECONDS = 3
DEADLINE_SECONDS = 60


def lbr(*arguments: str) -> list[str]:
    """Return the command line of one lbr command on the demo's database."""
    return [sys.executable, "-m", "lbr", "--db", str(DATABASE), *arguments]


def show(*arguments: str) -> None:
    """Run a command in sight of the reader."""
    print(f"\n$ lbr {' '.join(a if ' ' not in a else repr(a) for a in arguments)}", flush=True)
    subprocess.run(lbr(*arguments), check=True)


def status() -> dict[str, Any]:
    """Return the run's numbers."""
    done = subprocess.run(lbr("status", "airports", "--json"), check=True, capture_output=True)
    run: dict[str, Any] = json.loads(done.stdout)["runs"][0]
    return run


def wait_for(done: int, deadline: float) -> dict[str, Any]:
    """Wait until so many jobs are done; end the demo if that takes too long."""
    while (now := status())["done"] < done:
        if time.monotonic() > deadline:
            sys.exit(f"expected {done} jobs done by now, got: {now}")
        time.sleep(0.2)
    return now


def check(table: Path) -> None:
    """Compare every collected row with the table: present, in order, answered for what was asked."""
    with table.open(encoding="utf-8", newline="") as handle:
        asked = list(csv.DictReader(handle))
    with ANSWERS.open(encoding="utf-8", newline="") as handle:
        answered = list(csv.DictReader(handle))
    expected = [f"Which region of the United States is {row['city']}, {row['state']} in?" for row in asked]
    problems = [
        f"row {n}: expected {want!r} of {row['iata']}, got: {got}"
        for n, (row, want, got) in enumerate(zip(asked, expected, answered, strict=False))
        if got["result"] != want or got["iata"] != row["iata"] or got["status"] != "done"
    ]
    if len(answered) != len(asked):
        problems.append(f"expected {len(asked)} rows, got: {len(answered)}")
    if problems:
        sys.exit("\n".join(problems[:10]))
    distinct = len(set(expected))
    print(f"checked: {len(answered)} rows, {distinct} distinct prompts: every row present, in order, none lost")


def main() -> None:
    """Run the demo."""
    table, started = Path(sys.argv[1]), time.monotonic()
    deadline = started + DEADLINE_SECONDS
    for old in [*FOLDER.glob("runs.db*"), ANSWERS]:
        old.unlink(missing_ok=True)
    show("enqueue", str(table), "--template", TEMPLATE, "--model", "offline:echo", "--set", "latency=0.15")
    worker = lbr("worker", "--concurrency", "16", "--lease", str(LEASE_SECONDS))
    print(
        f"\n$ lbr worker --concurrency 16 --lease {LEASE_SECONDS}   # three times, in three processes",
        flush=True,
    )
    workers = [subprocess.Popen(worker, stderr=subprocess.STDOUT) for _ in range(3)]
    half = status()["jobs"] // 2
    now = wait_for(half, deadline)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait()
    print(f"\n{now['done']} of {now['jobs']} jobs done: killed worker {workers[0].pid} with SIGKILL", flush=True)
    for one in workers[1:]:
        if one.wait(timeout=max(1.0, deadline - time.monotonic())) != 0:
            sys.exit(f"expected worker {one.pid} to end with 0, got: {one.returncode}")
    crashed = status()["crashed"]
    print(f"\nthe others reclaimed {crashed} jobs of the killed one", flush=True)
    if not crashed:
        sys.exit("expected the killed worker's jobs to be reclaimed, got: none")
    show("status", "airports")
    show("collect", "airports", "-o", str(ANSWERS))
    check(table)
    print(f"{ANSWERS.resolve()}, after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
