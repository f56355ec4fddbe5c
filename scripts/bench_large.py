"""A large queue, a large table and several processes: memory, claims, resuming, and what a command costs to start.

Every figure is of real commands in processes of their own, on files in a folder of this disk. What is compared is
measured in turn in the same run, and answers are checked before a figure is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import bench_lbr

from lbr.core.types import RunId
from lbr.store import leases
from lbr.store.claim import ClaimRequest, claim
from lbr.store.database import open_database

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ECHO, NOTE = "bench_functions:echo", "bench_functions:note_start"
NOOP, BURN = "bench_job:noop", "bench_job:burn"
FEW = 10_000
CLAIMED = 128
TIMES = 25
BURNT_JOBS = 2_000
ROOM = 200 * 10**6
TABLE_ROOM = 300 * 10**6
MAKE_TABLE = """
import sys, polars as pl
n = pl.int_range(int(sys.argv[2]), dtype=pl.Int64)
day = pl.date(2024, 1, 1) + pl.duration(days=n % 366)
pl.LazyFrame().select(
    sku=n, product=pl.format("product {}", n % 1000), price=n / 7, in_stock=n % 3 == 0, day=day,
    prompt=pl.format("Is this review of product {} good or bad? It came on time and does what it should.", n),
).sink_parquet(sys.argv[1], row_group_size=int(sys.argv[3]))
"""
CHECK_TABLE = """
import sys, polars as pl
given, got = (pl.scan_parquet(path) for path in sys.argv[1:])
assert got.collect_schema().names() == [*given.collect_schema().names(), "result", "status", "error"]
wrong = (pl.col("result") != pl.col("prompt")) | (pl.col("status") != "done") | pl.col("error").is_not_null()
assert got.select(wrong.sum()).collect().item() == 0
given = given.with_columns(pl.col("day").cast(pl.String))
assert given.collect().equals(got.drop("result", "status", "error").collect())
"""
HERE = Path(__file__).parent
"""The folder that commands run in, because they import the functions from it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One figure, with what it must stay under or, where `at_least`, reach."""

    what: str
    figure: float
    bound: float
    unit: str
    at_least: bool = False

    def __str__(self) -> str:
        met = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        side = "at least" if self.at_least else "at most"
        words = "yes" if met else "NO"
        return f"{self.what}: {self.figure:.2f}{self.unit}, {side} {self.bound:g}{self.unit}: {words}"


def command(folder: Path, *arguments: str) -> list[str]:
    """Return the command line of `lbr` on the folder's queue."""
    return [sys.executable, "-m", "lbr", "--db", str(folder / "runs.db"), *arguments]


def run(folder: Path, *arguments: str) -> tuple[float, int]:
    """Run `lbr` to its end; return its seconds and its largest resident size in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command(folder, *arguments), cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode() if process.stderr is not None else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"expected lbr {arguments[0]} to end well, got: {process.returncode}\n{said}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def write_prompts(path: Path, count: int) -> None:
    """Write a file of short distinct prompts."""
    with path.open("w") as file:
        file.writelines(f"Tell me about number {n}\n" for n in range(count))


def check(path: Path, count: int) -> None:
    """Compare every collected line with its prompt, which is its answer."""
    n = -1
    with path.open() as file:
        for n, line in enumerate(file):
            row = json.loads(line)
            if (row["idx"], row["result"]) != (n, f"Tell me about number {n}"):
                sys.exit(f"expected row {n} to be answered with its prompt, got: {line}")
    if n != count - 1:
        sys.exit(f"expected {count} rows, got: {n + 1}")


def memory(folder: Path, count: int) -> list[Target]:
    """Take prompts through all commands and look at what each held at its peak."""
    write_prompts(folder / "in.txt", count)
    found = []
    for name, arguments in (
        ("enqueue", ("enqueue", str(folder / "in.txt"), "--function", ECHO)),
        ("worker", ("worker", "--function", ECHO, "--concurrency", "500")),
        ("collect", ("collect", "in", "-o", str(folder / "out.jsonl"))),
    ):
        seconds, peak = run(folder, *arguments)
        print(f"{count} prompts, {name}: {seconds:.1f} s, {count / seconds:,.0f}/s, {peak / 10**6:.0f} MB at its peak")
        found.append(Target(f"peak memory of {name}", peak / 10**6, ROOM / 10**6, " MB"))
    check(folder / "out.jsonl", count)
    return found


def table(folder: Path, count: int) -> list[Target]:
    """Take a Parquet table through one `lbr run`, and compare what comes back cell by cell.

    The tables are made and read by other processes: a child counts the memory of its parent as its own.
    """
    given, got = folder / "table.parquet", folder / "out.parquet"
    subprocess.run([sys.executable, "-c", MAKE_TABLE, str(given), str(count), str(count // 8)], check=True)
    whole = ("run", str(given), "-o", str(got), "--model", "offline:echo")
    found = []
    for name, arguments in (
        ("run", whole),
        ("the same run again", whole),
        ("collect", ("collect", "table", "-o", str(got))),
    ):
        seconds, peak = run(folder, *arguments)
        print(f"a table of {count} rows, {name}: {seconds:.1f} s, {peak / 10**6:.0f} MB at its peak")
        found.append(Target(f"peak memory of {name} with a table", peak / 10**6, TABLE_ROOM / 10**6, " MB"))
        subprocess.run([sys.executable, "-c", CHECK_TABLE, str(given), str(got)], check=True)
    return found


def _alter(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "runs.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute("COMMIT")


def _recounted() -> tuple[str, str]:
    return (
        "DELETE FROM counters",
        "INSERT INTO counters SELECT run_id, state, 0, count(*) FROM jobs GROUP BY run_id, state",
    )


async def _claim_seconds(folder: Path) -> float:
    """Return the median seconds of a claim of a full batch; what is claimed stays so."""
    database = await open_database(str(folder / "runs.db"))
    worker = await leases.register(database, host="bench", pid=os.getpid(), concurrency=CLAIMED)
    took = []
    for _ in range(TIMES):
        started = time.perf_counter()
        claims = await database.write(claim, ClaimRequest(worker, [RunId(1)], CLAIMED, lease=600))
        took.append(time.perf_counter() - started)
        if len(claims) != CLAIMED:
            sys.exit(f"expected {CLAIMED} claims, got: {len(claims)}")
    await leases.unregister(database, worker)
    await database.close()
    return statistics.median(took)


def claims(many: Path, few: Path) -> list[Target]:
    """Compare a claim among many pending jobs with one among few."""
    pending = ("UPDATE jobs SET state = 'pending', lease_until = NULL, worker_id = NULL, finished_at = NULL",)
    both: dict[Path, list[float]] = {many: [], few: []}
    for folder in (many, few):
        _alter(folder, *pending, "DELETE FROM results", *_recounted())
    for _ in range(3):
        for folder, took in both.items():
            took.append(asyncio.run(_claim_seconds(folder)))
    slow, fast = min(both[many]), min(both[few])
    print(f"a claim of {CLAIMED}: {1000 * slow:.2f} ms among many, {1000 * fast:.2f} ms among {FEW}")
    return [Target("claim among many pending, times one among few", slow / fast, 1.3, "")]


def _first_call_seconds(folder: Path) -> float:
    """Start a worker and return the seconds until its first call; the worker is killed."""
    note = folder / "first-call"
    note.unlink(missing_ok=True)
    environment = os.environ | {"LBR_TEST_NOTE": str(note)}
    started = time.time()
    process = subprocess.Popen(
        command(folder, "worker", "--function", NOTE, "--concurrency", "1"),
        cwd=HERE,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (note.exists() and note.read_text()):
            if process.poll() is not None or time.time() > started + 120:
                sys.exit("expected a worker to make a call, got: none")
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return float(note.read_text()) - started


def resuming(many: Path, few: Path) -> list[Target]:
    """Compare the first call of a worker where nearly all is done with one where nothing was."""
    task = json.dumps({"function": NOTE})
    served = f"UPDATE runs SET task = '{task}', answerer = 'function:{NOTE}'"  # noqa: S608 - our own words
    done = "UPDATE jobs SET state = 'done', finished_at = 1, lease_until = NULL, worker_id = NULL WHERE id % 100 != 0"
    _alter(many, served, done, *_recounted())
    _alter(few, served, "UPDATE jobs SET state = 'pending', lease_until = NULL, worker_id = NULL", *_recounted())
    slow, fast = [], []
    for _ in range(5):
        slow.append(_first_call_seconds(many))
        fast.append(_first_call_seconds(few))
    late, soon = statistics.median(slow), statistics.median(fast)
    print(f"first call of a worker: after {late:.2f} s where nearly all is done, {soon:.2f} s where nothing is")
    return [Target("first call where 99 of 100 are done, later by", late - soon, 0.5, " s")]


def _rate(folder: Path, function: str, jobs: int, workers: int, concurrency: int) -> float:
    """Return the jobs a second of workers that were started and warmed up before."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        prompts = [f"Prompt {n}" for n in range(jobs)]
        found = asyncio.run(bench_lbr.measure_sqlite(Path(name), prompts, workers, concurrency, function))
    return found.jobs / found.drain


def processes(folder: Path, count: int) -> list[Target]:
    """Compare several workers with one."""
    rates = {n: _rate(folder, NOOP, count, n, 500) for n in (1, 2, 4, 8)}
    print("jobs/s of 1, 2, 4, 8 workers: " + ", ".join(f"{rate:,.0f}" for rate in rates.values()))
    burnt = {n: _rate(folder, BURN, BURNT_JOBS, n, 32) for n in (1, 2)}
    print("jobs/s of 1, 2 workers, function of 2 ms of CPU: " + ", ".join(f"{r:,.0f}" for r in burnt.values()))
    slowest = min(rates[n] for n in (2, 4, 8)) / rates[1]
    return [
        Target("the slowest of 2, 4 and 8 workers, times one", slowest, 1.0, "", at_least=True),
        Target("2 workers of a function that computes, times one", burnt[2] / burnt[1], 1.7, "", at_least=True),
    ]


def _cpu_seconds(arguments: Sequence[str]) -> float:
    before = os.times()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def starting(folder: Path) -> list[Target]:
    """Compare what two commands take to start with the least that they import."""
    base = [sys.executable, "-c", "import click, sqlalchemy.ext.asyncio"]
    kinds: dict[str, list[str]] = {"--help": command(folder, "--help"), "status": command(folder, "status")}
    took: dict[str, list[float]] = {name: [] for name in ("base", *kinds)}
    for _ in range(7):
        took["base"].append(_cpu_seconds(base))
        for name, arguments in kinds.items():
            took[name].append(_cpu_seconds(arguments))
    least = statistics.median(took["base"])
    print(f"importing click and sqlalchemy.ext.asyncio: {1000 * least:.0f} ms of CPU")
    return [
        Target(f"lbr {name}, times these imports", statistics.median(took[name]) / least, 1.5, "") for name in kinds
    ]


def main() -> None:
    """Measure, and print a line for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=60_000, help="of the measurements with several workers")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lbr-bench-", dir=options.folder.absolute()) as name:
        many, few = Path(name) / "many", Path(name) / "few"
        many.mkdir()
        few.mkdir()
        found = memory(many, options.prompts)
        with tempfile.TemporaryDirectory(dir=name) as tables:
            found += table(Path(tables), options.prompts)
        write_prompts(few / "in.txt", FEW)
        run(few, "enqueue", str(few / "in.txt"), "--function", ECHO)
        steps: list[Callable[[], list[Target]]] = [
            lambda: claims(many, few),
            lambda: resuming(many, few),
            lambda: starting(few),
            lambda: processes(few, options.jobs),
        ]
        for step in steps:
            found += step()
    print(*found, sep="\n")


if __name__ == "__main__":
    main()
