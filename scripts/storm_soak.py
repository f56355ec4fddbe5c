"""A soak: workers that run for minutes under mixed load, and are watched: memory, log of the file, jobs a minute."""

from __future__ import annotations

import asyncio
import itertools
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
from storm_witness import repeats, witness

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from storm_queue import Queue

LATENCY = 0.05
CONCURRENCY = 32
BATCH = 1_000
"""Inputs of one enqueue; every tenth is one of an old batch, whose answers are there."""
BACKLOG = 3_000
"""Below so many open jobs more are enqueued."""
OLD = 10
"""So many batches are never open at once."""
MIB = 1024 * 1024
MAX_GROWTH = 0.10
MAX_WAL = 128 * MIB
MIN_PACE = 0.5
"""The slowest minute, as a share of the median."""
OPEN = "SELECT COALESCE(SUM(value), 0) FROM counters WHERE name IN ('pending', 'inflight')"
DONE = "SELECT COALESCE(SUM(value), 0) FROM counters WHERE name = 'done'"


@dataclass
class Watched:
    """What was seen, once a second: each worker's memory, the log's size, jobs done."""

    memory: dict[int, list[int]] = field(default_factory=dict)
    wal: list[int] = field(default_factory=list)
    done: list[tuple[float, int]] = field(default_factory=list)
    commands: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One soak over one queue."""

    def __init__(self, queue: Queue, folder: Path, *, workers: int) -> None:
        self.queue = queue
        self.watched = Watched()
        self.inputs: dict[str, list[str]] = {}
        self._folder = folder
        self._workers = workers

    async def run(self, seconds: float) -> None:
        """Let the workers run under load for so long, end them with SIGTERM, and finish what is left."""
        await self._feed_once(0)
        flags = ("--function", "storm_calls:ask", "--concurrency", str(CONCURRENCY))
        workers = [await self.queue.start("worker", *flags, "--until", "forever") for _ in range(self._workers)]
        tasks = [asyncio.create_task(one) for one in (self._feed(), self._use(), self._watch(workers))]
        ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for task in ended:
            task.result()
        for worker in workers:
            if worker.returncode is not None:
                self.watched.problems.append(f"a worker ended with {worker.returncode} by itself")
            else:
                worker.send_signal(signal.SIGTERM)
        await asyncio.gather(*(worker.communicate() for worker in workers))
        await self._command("resume", next(iter(self.inputs)))
        last = await self.queue.start("worker", *flags)
        await last.communicate()
        for run, prompts in self.inputs.items():
            self.watched.problems += await self.queue.differences(run, prompts)
        self.watched.problems += await asyncio.to_thread(self.queue.problems)

    async def _feed(self) -> None:
        for number in itertools.count(1):
            await asyncio.to_thread(self._wait_for_room)
            await self._feed_once(number)

    def _wait_for_room(self) -> None:
        while self.queue.query(OPEN)[0][0] > BACKLOG:
            time.sleep(0.2)

    async def _feed_once(self, number: int) -> None:
        old = self.inputs.get(f"s{number - OLD}", [])
        prompts = [f"s{number} prompt {n}" for n in range(BATCH)]
        prompts = [old[n] if old and n % 10 == 9 else prompt for n, prompt in enumerate(prompts)]
        file = self._folder / f"s{number}.txt"
        await asyncio.to_thread(file.write_text, "".join(f"{prompt}\n" for prompt in prompts))
        await self._command("enqueue", str(file), "--function", "storm_calls:ask")
        self.inputs[f"s{number}"] = prompts

    async def _use(self) -> None:
        """Do what people do meanwhile: look, collect, pause and go on, retry."""
        for number in itertools.count():
            runs = list(self.inputs)
            await self._command("status")
            await self._command("collect", runs[-1], "-o", str(self._folder / "out.csv"))
            if number % 5 == 4:
                await self._command("pause", runs[0])
                await self._command("resume", runs[0])
                await self._command("retry", runs[-1])
            await asyncio.sleep(1)

    async def _command(self, *arguments: str) -> None:
        process = await self.queue.start(*arguments)
        _, said = await process.communicate()
        self.watched.commands[arguments[0]] += 1
        # A collect tells by 3 that not all is answered yet.
        if process.returncode not in {0, 3}:
            words = said.decode()[-500:]
            self.watched.problems.append(f"{arguments[0]} ended with {process.returncode}: {words}")

    async def _watch(self, workers: list[asyncio.subprocess.Process]) -> None:
        while True:
            for worker in workers:
                if worker.returncode is None:
                    rss = psutil.Process(worker.pid).memory_info().rss
                    self.watched.memory.setdefault(worker.pid, []).append(rss)
            self.watched.wal.append(await asyncio.to_thread(self.queue.bytes_of_wal))
            done = int((await asyncio.to_thread(self.queue.query, DONE))[0][0])
            self.watched.done.append((time.monotonic(), done))
            await asyncio.sleep(1)

    def judge(self, repeated: int) -> list[str]:
        """Note what is out of bounds, and return the report."""
        watched = self.watched
        if repeated:
            watched.problems.append(f"{repeated} calls were repeated though nobody was killed")
        lines = [f"{len(self.inputs)} enqueues of {BATCH:,} inputs; commands meanwhile: {dict(watched.commands)}"]
        for pid, sizes in watched.memory.items():
            tenth = max(1, len(sizes) // 10)
            # The first minute fills caches; a soak of a minute or two looks at its first tenth instead.
            begin = min(60, tenth)
            first = statistics.median(sizes[begin : begin + tenth])
            last = statistics.median(sizes[-tenth:])
            growth = last / first - 1
            lines.append(f"memory {first / MIB:.0f} MiB, in the end {last / MIB:.0f} MiB, {growth:+.1%}")
            if growth > MAX_GROWTH:
                watched.problems.append(f"the memory of process {pid} grew by {growth:.1%}")
        lines.append(f"WAL at most {max(watched.wal) / MIB:.1f} MiB")
        if max(watched.wal) > MAX_WAL:
            watched.problems.append(f"the WAL grew to {max(watched.wal) / MIB:.0f} MiB")
        paces = self._paces()
        lines.append(f"jobs a minute: {', '.join(f'{pace:,.0f}' for pace in paces)}")
        if len(paces) > 1 and min(paces) < MIN_PACE * statistics.median(paces):
            watched.problems.append("some minute was slower than half of the median")
        return lines

    def _paces(self) -> list[float]:
        """Return the jobs done in each whole minute, after the seconds in which the workers start."""
        samples = self.watched.done[5:]
        minutes: list[float] = []
        while len(samples) > 1:
            (begin, before), rest = samples[0], samples[1:]
            later = [place for place, (at, _) in enumerate(rest) if at - begin >= 60]
            if not later:
                break
            at, after = rest[later[0]]
            minutes.append((after - before) * 60 / (at - begin))
            samples = rest[later[0] :]
        return minutes


async def soak(queue: Queue, options: argparse.Namespace, folder: Path) -> bool:
    """Soak for `options.soak` minutes and tell how it went."""
    async with witness(folder, LATENCY) as calls:
        one = Soak(queue, folder, workers=options.workers)
        await one.run(options.soak * 60)
    made = calls()
    for line in one.judge(sum(repeats(made).values())):
        print(line)
    for problem in one.watched.problems:
        print(f"PROBLEM: {problem}")
    verdict = "something is wrong" if one.watched.problems else "memory flat, pace steady, every input answered once"
    print(f"{queue.kind}: {len(made):,} calls in {options.soak:g} minutes: {verdict}")
    return not one.watched.problems
