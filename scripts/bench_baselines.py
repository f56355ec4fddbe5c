"""lbr on this machine, beside baselines that hardly anything could beat.

It fills, drains and collects a queue, runs jobs of 5 ms, and calls a chat server of its own on this machine. The
baselines are plain sqlite3 on the same tables, the ceiling of the slots, and a bare gather of the calls. The ratios
count more than the rates. Every answer is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_chat as chat
import bench_plain
from bench_chat_server import SECONDS as CHAT_SECONDS
from bench_functions import NAP_SECONDS

import lbr
from lbr.cli.app import collect_garbage_rarely

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PARTS = ("queue", "naps", "chat")
PACKAGES = ("lbr", "sqlalchemy", "aiosqlite", "aiohttp")
RUN = "bench"
ECHO = "bench_functions:echo"
NAP = "bench_functions:nap"
SHARE_OF_DUPLICATES = 0.1
SLOTS = 500
NAP_SLOTS = 100
CHAT_SLOTS = 200


class BenchError(Exception):
    """A measurement with wrong answers: its time means nothing."""


@dataclass(frozen=True, slots=True)
class Took:
    """What a measurement took: seconds on the clock, and CPU seconds of this process."""

    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: the number of jobs, what they took lbr, and what they took the baseline.

    `least` is the baseline, and `by` its name. `target` is the ratio of the two that lbr aims for, None if there is none.
    """

    name: str
    jobs: int
    lbr: Took
    least: Took
    by: str
    target: float | None

    @property
    def ratio(self) -> float:
        """The speed of lbr as a share of the baseline's: 1 is as fast."""
        return self.least.seconds / self.lbr.seconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to measure: inputs of the queue, jobs of 5 ms, calls of a chat server."""

    inputs: int = 200_000
    naps: int = 10_000
    calls: int = 3_000


def timed(work: Callable[[], Any]) -> Took:
    """Do some work and return what it took."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - started, time.process_time() - cpu)


def expect(what: str, wanted: object, got: object) -> None:
    """Raise BenchError if a value is not the expected one."""
    if wanted != got:
        raise BenchError(f"expected {what} to be {wanted!r}, got: {got!r}; the measurement means nothing")


def nap_prompts(count: int) -> list[str]:
    """Return the prompts of jobs that only wait."""
    return [f"Job {n}" for n in range(count)]


def chat_prompts(count: int) -> list[str]:
    """Return prompts of about 150 characters, all distinct."""
    return [f"{n:06d} " + "What do you make of this?" * 6 for n in range(count)]


class Bench:
    """Measurements in one folder, each on new files of its own."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder = folder
        self._sizes = sizes

    def _fresh(self, name: str) -> Path:
        path = self._folder / name
        for end in ("", "-wal", "-shm"):
            path.with_name(name + end).unlink(missing_ok=True)
        return path

    def _queue_of(self, name: str, prompts: Sequence[str], function: str) -> Path:
        path = self._fresh(name)
        _enqueue(path, prompts, function=function)
        return path

    def _emptied(self, name: str) -> Path:
        """Return a queue's file with an empty run."""
        path = self._queue_of(name, ["to be removed"], ECHO)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for table in ("items", "jobs", "prompts", "counters", "sqlite_sequence"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - our own tables
        return path

    def queue(self) -> list[Measured]:
        """Measure enqueue, claim and settle, and collect, in turn on the same inputs."""
        count = self._sizes.inputs
        distinct = max(1, round(count * (1 - SHARE_OF_DUPLICATES)))
        prompts = [f"Tell me about number {n % distinct}" for n in range(count)]
        plain, ours = self._emptied("plain.db"), self._fresh("lbr.db")
        rows = [
            Measured(
                "enqueue",
                count,
                least=timed(lambda: bench_plain.enqueue(plain, 1, prompts)),
                lbr=timed(lambda: _enqueue(ours, prompts, function=ECHO)),
                by="plain sqlite3",
                target=0.5,
            ),
            Measured(
                "claim and settle",
                distinct,
                least=timed(lambda: expect("the answers of plain sqlite3", distinct, bench_plain.drain(plain, 1))),
                lbr=timed(lambda: expect("the answers", distinct, _work(ours, ECHO, SLOTS))),
                by="plain sqlite3",
                target=0.4,
            ),
            Measured(
                "collect",
                count,
                least=timed(lambda: bench_plain.collect(plain, 1, self._folder / "plain.jsonl")),
                lbr=timed(lambda: _collect(ours, self._folder / "lbr.jsonl")),
                by="plain sqlite3",
                target=0.4,
            ),
        ]
        for name in ("plain.jsonl", "lbr.jsonl"):
            check_lines(self._folder / name, prompts)
        return rows

    def naps(self) -> list[Measured]:
        """Measure jobs that take a fixed time, against the ceiling of their slots."""
        prompts = nap_prompts(self._sizes.naps)
        path = self._queue_of("naps.db", prompts, NAP)
        took = timed(lambda: expect("the answers", len(prompts), _work(path, NAP, NAP_SLOTS)))
        _collect(path, self._folder / "naps.jsonl")
        check_lines(self._folder / "naps.jsonl", prompts)
        least = Took(len(prompts) * NAP_SECONDS / NAP_SLOTS, 0.0)
        return [Measured("jobs of 5 ms", len(prompts), took, least, "the ceiling of its slots", 0.25)]

    def chat(self) -> list[Measured]:
        """Measure a batch from prompts to collected answers, against a gather of the same calls that stores nothing."""
        prompts = chat_prompts(self._sizes.calls)
        path, out = self._fresh("chat.db"), self._folder / "chat.jsonl"

        with chat.chat_server(CHAT_SECONDS) as url, chat.on_one_core():
            least = timed(
                lambda: expect("the gather's answers", prompts, asyncio.run(chat.gather(url, prompts, CHAT_SLOTS)))
            )
            with chat.environment(OPENAI_BASE_URL=url, OPENAI_API_KEY=chat.KEY):
                took = timed(lambda: end_to_end(path, out, prompts, CHAT_SLOTS))
        check_lines(out, prompts)
        return [Measured("chat calls of 50 ms", len(prompts), took, least, "a bare aiohttp gather", 0.5)]


def _enqueue(path: Path, prompts: Sequence[str], *, function: str | None = None, model: str | None = None) -> None:
    asyncio.run(lbr.enqueue(prompts, run=RUN, function=function, model=model, db_url=str(path)))


def _work(path: Path, function: str | None, slots: int) -> int:
    functions = [] if function is None else [function]
    return asyncio.run(lbr.work(functions=functions, concurrency=slots, db_url=str(path))).done


def _collect(path: Path, out: Path) -> None:
    asyncio.run(lbr.collect(RUN, out=out, db_url=str(path)))


def end_to_end(path: Path, out: Path, prompts: Sequence[str], slots: int) -> None:
    """Enqueue prompts into a fresh queue, have the chat server of the environment answer them, and collect."""
    _enqueue(path, prompts, model=f"openai-chat:{chat.MODEL}")
    expect("the answers", len(prompts), _work(path, None, slots))
    _collect(path, out)


def check_lines(path: Path, prompts: Sequence[str]) -> None:
    """Compare every collected line with its prompt, which is also its answer."""
    with path.open() as lines:
        found = [json.loads(line) for line in lines]
    expect("the number of rows", len(prompts), len(found))
    for n, (prompt, row) in enumerate(zip(prompts, found, strict=True)):
        got = (row["idx"], row["prompt"], row["status"], row["result"])
        expect(f"row {n}", (n, prompt, "done", prompt), got)


def measure(
    folder: Path, sizes: Sizes, parts: Sequence[str] = PARTS, *, repeat: int = 1, log: Callable[[str], None]
) -> list[Measured]:
    """Measure the named parts, `repeat` times in turn, and return the rows with their medians.

    Raises BenchError if an answer is missing or wrong.
    """
    bench = Bench(folder, sizes)
    turns: list[list[Measured]] = []
    for turn in range(repeat):
        turns.append([])
        for part in parts:
            log(f"measuring {part}, {turn + 1} of {repeat}")
            turns[-1] += getattr(bench, part)()
    return [_middle(rows) for rows in zip(*turns, strict=True)]


def _middle(rows: Sequence[Measured]) -> Measured:
    first = rows[0]

    def took(of: Callable[[Measured], Took]) -> Took:
        return Took(statistics.median(of(row).seconds for row in rows), statistics.median(of(row).cpu for row in rows))

    return Measured(first.name, first.jobs, took(lambda r: r.lbr), took(lambda r: r.least), first.by, first.target)


def conditions() -> dict[str, str]:
    """Return what the figures depend on: the machine and the versions."""
    about = {"cores": str(os.cpu_count()), "machine": platform.machine(), "system": platform.system()}
    about |= {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    return about | {name: version(name) for name in PACKAGES}


def table(found: list[Measured]) -> str:
    """Return the rows as aligned text."""
    header = ["what", "jobs", "lbr/s", "CPU ms", "baseline/s", "CPU ms", "ratio", "target", "baseline"]
    cells = [header] + [
        [
            row.name,
            str(row.jobs),
            f"{row.jobs / row.lbr.seconds:.0f}",
            f"{1000 * row.lbr.cpu / row.jobs:.3f}",
            f"{row.jobs / row.least.seconds:.0f}",
            f"{1000 * row.least.cpu / row.jobs:.3f}",
            f"{row.ratio:.2f}",
            "-" if row.target is None else f"{row.target:.2f}",
            row.by,
        ]
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = {0, len(header) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in text else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench baselines", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; repeatable")
    parser.add_argument("--jobs", type=int, help="inputs of the queue, at least 10; 200,000 if unset")
    parser.add_argument("--repeat", type=int, default=1, help="measure N times, and take medians")
    parser.add_argument("--folder", type=Path, default=Path(), help="put the measured files on this disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.repeat < 1 or (given.jobs is not None and given.jobs < 10):
        parser.error("expected --repeat to be at least 1, and --jobs at least 10")
    return given


def main() -> None:
    """Run the benchmark."""
    given = read_options()
    # `with` blocks, which remove the folder, end on SystemExit, not on a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    collect_garbage_rarely()  # as the command `lbr` does
    jobs = given.jobs
    sizes = Sizes() if jobs is None else Sizes(jobs, max(10, jobs // 20), max(10, jobs * 3 // 200))
    parts = [part for part in PARTS if not given.only or part in given.only]
    with tempfile.TemporaryDirectory(prefix="lbr-bench-", dir=given.folder) as name:
        try:
            found = measure(Path(name), sizes, parts, repeat=given.repeat, log=log)
        except (BenchError, lbr.LbrError) as error:
            sys.exit(str(error))
    about = conditions()
    if given.json:
        rows = [asdict(row) | {"ratio": round(row.ratio, 3)} for row in found]
        print(json.dumps({"about": about, "measured": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(table(found))


def log(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
