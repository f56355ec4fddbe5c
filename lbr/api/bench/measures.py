"""What is measured: lbr's work beside the same work by hand, or beside what the machine's clock allows."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbr.api.bench import PARTS, by_hand, chat
from lbr.api.bench.chat_server import SECONDS as CHAT_SECONDS
from lbr.api.bench.jobs import NAP_SECONDS
from lbr.api.collect import collect
from lbr.api.enqueue import enqueue
from lbr.api.work import work
from lbr.core.errors import LbrError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

RUN = "bench"
ECHO = "lbr.api.bench.jobs:echo"
NAP = "lbr.api.bench.jobs:nap"
SHARE_OF_DUPLICATES = 0.1
SLOTS = 500
NAP_SLOTS = 100
CHAT_SLOTS = 200


class BenchError(LbrError):
    """A measurement whose answers are wrong: its time means nothing."""


@dataclass(frozen=True, slots=True)
class Took:
    """What one measured stretch took: seconds on the clock, and seconds of the processor in this process."""

    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: how many jobs, what they took lbr, and what they take at the least.

    `least` is by hand or, where `by` says so, a ceiling that the clock sets. `target` is the ratio of the two that
    lbr means to reach, None where there is none.
    """

    name: str
    jobs: int
    lbr: Took
    least: Took
    by: str
    target: float | None

    @property
    def ratio(self) -> float:
        """How near lbr comes to it: 1 is as fast."""
        return self.least.seconds / self.lbr.seconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: inputs of the queue, jobs that nap, calls of a chat server."""

    inputs: int = 200_000
    naps: int = 10_000
    calls: int = 3_000


def timed(work: Callable[[], Any]) -> Took:
    """Do some work and return what it took."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - started, time.process_time() - cpu)


def expect(what: str, wanted: object, got: object) -> None:
    """Raise BenchError where something is not as it must be."""
    if wanted != got:
        raise BenchError(f"expected {what} to be {wanted!r}, got: {got!r}; the measurement means nothing")


def nap_prompts(count: int) -> list[str]:
    """Return the prompts of jobs that only wait."""
    return [f"Job {n}" for n in range(count)]


def chat_prompts(count: int) -> list[str]:
    """Return prompts of about 150 characters, all distinct."""
    return [f"{n:06d} " + "What do you make of this?" * 6 for n in range(count)]


class Bench:
    """Measurements in one folder, each on files of its own, which are removed before."""

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
        """Return a queue's file with a run and nothing in it."""
        path = self._queue_of(name, ["to be removed"], ECHO)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for table in ("items", "jobs", "prompts", "counters", "sqlite_sequence"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - our own tables
        return path

    def queue(self) -> list[Measured]:
        """Measure enqueue, claim and settle, and collect, one after the other on the same inputs."""
        count = self._sizes.inputs
        distinct = max(1, round(count * (1 - SHARE_OF_DUPLICATES)))
        prompts = [f"Tell me about number {n % distinct}" for n in range(count)]
        hand, ours = self._emptied("hand.db"), self._fresh("lbr.db")
        rows = [
            Measured(
                "enqueue",
                count,
                least=timed(lambda: by_hand.enqueue(hand, 1, prompts)),
                lbr=timed(lambda: _enqueue(ours, prompts, function=ECHO)),
                by="sqlite3 by hand",
                target=0.5,
            ),
            Measured(
                "claim and settle",
                distinct,
                least=timed(lambda: expect("the answers by hand", distinct, by_hand.drain(hand, 1))),
                lbr=timed(lambda: expect("the answers", distinct, _work(ours, ECHO, SLOTS))),
                by="sqlite3 by hand",
                target=0.4,
            ),
            Measured(
                "collect",
                count,
                least=timed(lambda: by_hand.collect(hand, 1, self._folder / "hand.jsonl")),
                lbr=timed(lambda: _collect(ours, self._folder / "lbr.jsonl")),
                by="sqlite3 by hand",
                target=0.4,
            ),
        ]
        for name in ("hand.jsonl", "lbr.jsonl"):
            check_lines(self._folder / name, prompts)
        return rows

    def naps(self) -> list[Measured]:
        """Measure jobs that take a fixed time, beside the ceiling of their slots."""
        prompts = nap_prompts(self._sizes.naps)
        path = self._queue_of("naps.db", prompts, NAP)
        took = timed(lambda: expect("the answers", len(prompts), _work(path, NAP, NAP_SLOTS)))
        _collect(path, self._folder / "naps.jsonl")
        check_lines(self._folder / "naps.jsonl", prompts)
        least = Took(len(prompts) * NAP_SECONDS / NAP_SLOTS, 0.0)
        return [Measured("jobs of 5 ms", len(prompts), took, least, "the ceiling of its slots", 0.25)]

    def chat(self) -> list[Measured]:
        """Measure a batch from prompts to collected answers, beside a gather of the same calls that keeps nothing."""
        prompts = chat_prompts(self._sizes.calls)
        path, out = self._fresh("chat.db"), self._folder / "chat.jsonl"

        with chat.chat_server(CHAT_SECONDS) as url, chat.on_one_core():
            least = timed(
                lambda: expect(
                    "the gather's answers", prompts, asyncio.run(chat.gather(url, prompts, CHAT_SLOTS))
                )
            )
            with chat.environment(OPENAI_BASE_URL=url, OPENAI_API_KEY=chat.KEY):
                took = timed(lambda: end_to_end(path, out, prompts, CHAT_SLOTS))
        check_lines(out, prompts)
        return [Measured("chat calls of 50 ms", len(prompts), took, least, "a bare aiohttp gather", 0.5)]


def _enqueue(
    path: Path, prompts: Sequence[str], *, function: str | None = None, model: str | None = None
) -> None:
    asyncio.run(enqueue(prompts, run=RUN, function=function, model=model, db_url=str(path)))


def _work(path: Path, function: str | None, slots: int) -> int:
    functions = [] if function is None else [function]
    return asyncio.run(work(functions=functions, concurrency=slots, db_url=str(path))).done


def _collect(path: Path, out: Path) -> None:
    asyncio.run(collect(RUN, out=out, db_url=str(path)))


def end_to_end(path: Path, out: Path, prompts: Sequence[str], slots: int) -> None:
    """Enqueue prompts into a fresh queue, have the chat server of the environment answer them, and collect."""
    _enqueue(path, prompts, model=f"openai-chat:{chat.MODEL}")
    expect("the answers", len(prompts), _work(path, None, slots))
    _collect(path, out)


def check_lines(path: Path, prompts: Sequence[str]) -> None:
    """Compare every collected line with what was asked; whoever answers here answers with the prompt."""
    with path.open() as lines:
        found = [json.loads(line) for line in lines]
    expect("the number of rows", len(prompts), len(found))
    for n, (prompt, row) in enumerate(zip(prompts, found, strict=True)):
        got = (row["idx"], row["prompt"], row["status"], row["result"])
        expect(f"row {n}", (n, prompt, "done", prompt), got)


def measure(
    folder: Path, sizes: Sizes, parts: Sequence[str] = PARTS, *, repeat: int = 1, tell: Callable[[str], None]
) -> list[Measured]:
    """Measure the named parts, `repeat` times in turn, and return a row for each, with the medians.

    Raises BenchError where an answer is missing or wrong.
    """
    bench = Bench(folder, sizes)
    turns: list[list[Measured]] = []
    for turn in range(repeat):
        turns.append([])
        for part in parts:
            tell(f"measuring {part}, {turn + 1} of {repeat}")
            turns[-1] += getattr(bench, part)()
    return [_middle(rows) for rows in zip(*turns, strict=True)]


def _middle(rows: Sequence[Measured]) -> Measured:
    first = rows[0]

    def took(of: Callable[[Measured], Took]) -> Took:
        return Took(
            statistics.median(of(row).seconds for row in rows), statistics.median(of(row).cpu for row in rows)
        )

    return Measured(
        first.name, first.jobs, took(lambda r: r.lbr), took(lambda r: r.least), first.by, first.target
    )
