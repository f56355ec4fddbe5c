"""A storm: workers killed with SIGKILL at random, again and again, and every input answered exactly once.

Two enqueues of the same file race, and are killed as well; collects read all the time; what the workers call is a
process of its own that writes each call down. In the end every input has its answer, in order, calls were repeated
only where a killed worker held them, the counters are those of a recount, and the file is whole.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench_server import postgres
from storm_queue import Queue
from storm_soak import soak
from storm_witness import repeats, witness

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS = 3
SHARE_OF_DUPLICATES = 0.1
JOBS_PER_KILL = 100
"""Enough for the kills to end before the work does: a job that was twice in a crash runs alone, last of all."""
CONCURRENCY = 16
LATENCY = 0.2
LEASE = 6.0
VICTIM_SECONDS = 60.0
PAUSE = 0.4
"""Seconds from kill to kill, in the mean."""
COLLECT_SECONDS = 2.0
PATIENCE_SECONDS = 900.0
PATIENCE_PER_KILL = 10.0


@dataclass
class Tally:
    """What happened. `held` counts the claims of each killed process."""

    kills: Counter[str] = field(default_factory=Counter)
    held: dict[int, int] = field(default_factory=dict)
    collects: int = 0
    problems: list[str] = field(default_factory=list)


class Storm:
    """One storm over one queue."""

    def __init__(self, queue: Queue, folder: Path, *, jobs: int, workers: int, kills: int, seed: int) -> None:
        self.queue = queue
        self.tally = Tally()
        self._folder = folder
        self._workers = workers
        self._kills = kills
        self._rng = random.Random(seed)  # noqa: S311 - not for secrets
        self._alive: dict[int, tuple[str, asyncio.subprocess.Process]] = {}
        self._stormy = True
        self._begun = [asyncio.Event() for _ in range(RUNS)]
        self.inputs = [self._write(run, jobs // RUNS) for run in range(RUNS)]
        self._seen: dict[str, dict[int, str]] = {f"r{run}": {} for run in range(RUNS)}

    def _write(self, run: int, distinct: int) -> list[str]:
        prompts = [f"r{run} prompt {n}" for n in range(distinct)]
        prompts += self._rng.choices(prompts, k=round(distinct * SHARE_OF_DUPLICATES))
        self._rng.shuffle(prompts)
        (self._folder / f"r{run}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        return prompts

    async def run(self) -> None:
        """Let it rage, and then let the workers finish."""
        self._begun[0].set()
        patience = PATIENCE_SECONDS + PATIENCE_PER_KILL * self._kills
        async with asyncio.timeout(patience), asyncio.TaskGroup() as group:
            enqueues = [
                group.create_task(self._keep(f"enqueue {run}", self._begun[run], self._enqueue(run)))
                for run in range(RUNS)
                for _ in range(2)
            ]
            collecting = group.create_task(self._collect())
            await asyncio.to_thread(self._wait_for_jobs)
            working = [
                group.create_task(self._keep("worker", self._begun[0], self._worker())) for _ in range(self._workers)
            ]
            await self._strike()
            await asyncio.gather(*enqueues)
            self._stormy = False
            await asyncio.gather(*working)
            collecting.cancel()
        await self._finish()

    def _enqueue(self, run: int) -> list[str]:
        return ["enqueue", str(self._folder / f"r{run}.txt"), "--function", "storm_calls:ask"]

    def _worker(self) -> list[str]:
        flags = ["--concurrency", str(CONCURRENCY), "--lease", str(LEASE)]
        return ["worker", "--function", "storm_calls:ask", *flags]

    def _wait_for_jobs(self) -> None:
        while not self.queue.has_jobs():
            time.sleep(0.05)

    async def _keep(self, kind: str, begun: asyncio.Event, arguments: list[str]) -> None:
        """Run a command, again whenever it was killed, until it comes to its own end; a worker as long as it storms."""
        await begun.wait()
        while True:
            process = await self.queue.start(*arguments)
            self._alive[process.pid] = (kind, process)
            _, said = await process.communicate()
            self._alive.pop(process.pid, None)
            if process.returncode not in {0, -signal.SIGKILL}:
                self.tally.problems.append(f"{kind} ended with {process.returncode}: {said.decode()[-500:]}")
                return
            if process.returncode == 0 and not (kind == "worker" and self._stormy):
                return

    async def _strike(self) -> None:
        """Kill this or that process until there were enough, and begin the next run now and then."""
        for number in range(self._kills):
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE))
            self._begun[number * RUNS // self._kills].set()
            kind, process = await self._victim(anyone=number % 4 == 0)
            process.kill()
            self.tally.kills[kind.partition(" ")[0]] += 1
            if kind == "worker":
                # At once, long before its leases run out.
                self.tally.held[process.pid] = (await asyncio.to_thread(self.queue.held)).get(process.pid, 0)
            if number % 25 == 24:
                print(f"{number + 1} kills, {sum(self.tally.held.values())} calls were held", flush=True)

    async def _victim(self, *, anyone: bool) -> tuple[str, asyncio.subprocess.Process]:
        """Choose whom to kill: anyone, in whatever it does, or a worker that holds claims, but no job's third death.

        Where an enqueue takes its time and nothing else is to do, jobs that were in two crashes run before it ends.
        """
        deadline = time.monotonic() + VICTIM_SECONDS
        while time.monotonic() < deadline:
            kept = await asyncio.to_thread(self.queue.on_last_tries)
            held = set() if anyone else set(await asyncio.to_thread(self.queue.held))
            # Looked at last: one may have come to its own end meanwhile.
            alive = set(self._alive) - kept
            if chosen := sorted(alive if anyone else alive & held):
                return self._alive.pop(self._rng.choice(chosen))
            await asyncio.sleep(0.01)
        raise TimeoutError(
            f"expected somebody to kill within {VICTIM_SECONDS:g} s, got: nobody; if all is done, raise --jobs"
        )

    async def _collect(self) -> None:
        """Read all the time: what was answered once stays as it is."""
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            for run in self._seen:
                rows = [row for row in await self.queue.rows(run) if row["status"] == "done"]
                self.tally.collects += 1
                seen = self._seen[run]
                for row in rows:
                    if seen.setdefault(row["idx"], row["result"]) != row["result"]:
                        self.tally.problems.append(f"{run}: the answer to input {row['idx']} has changed")

    async def _finish(self) -> None:
        for run, prompts in enumerate(self.inputs):
            self.tally.problems += await self.queue.differences(f"r{run}", prompts)
        self.tally.problems += await asyncio.to_thread(self.queue.problems)

    def judge(self, calls: list[tuple[int, str]]) -> str:
        """Compare the witness's log with what was asked and killed, and return the report."""
        asked = Counter(prompt for _, prompt in calls)
        distinct = {prompt for prompts in self.inputs for prompt in prompts}
        if set(asked) != distinct:
            self.tally.problems.append(f"{len(set(asked) ^ distinct)} prompts were never asked, or not ours")
        repeated = repeats(calls)
        for pid, count in repeated.items():
            if count > self.tally.held.get(pid, 0):
                self.tally.problems.append(
                    f"{count} calls of process {pid} were repeated, and it held {self.tally.held.get(pid, 0)}"
                )
        tally = self.tally
        return (
            f"{sum(tally.kills.values())} kills ({tally.kills['worker']} of workers, {tally.kills['enqueue']} of "
            f"enqueues), {tally.collects} collects meanwhile\n"
            f"{sum(map(len, self.inputs)):,} inputs, {len(distinct):,} jobs, {len(calls):,} calls: "
            f"{sum(repeated.values())} repeated, of {sum(tally.held.values())} that killed workers held"
        )


async def rage(queue: Queue, options: argparse.Namespace, folder: Path) -> bool:
    """Let one storm rage and tell how it ended."""
    jobs = options.jobs or options.kills * JOBS_PER_KILL
    started = time.monotonic()
    async with witness(folder, LATENCY) as calls:
        storm = Storm(queue, folder, jobs=jobs, workers=options.workers, kills=options.kills, seed=options.seed)
        await storm.run()
    print(storm.judge(calls()))
    for problem in storm.tally.problems:
        print(f"PROBLEM: {problem}")
    verdict = "something is wrong" if storm.tally.problems else "every input answered once, in order, counters right"
    print(f"{queue.kind}: {verdict}, {time.monotonic() - started:.0f} s")
    return not storm.tally.problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Rage on SQLite, on a PostgreSQL of its own, or on the database that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, help=f"{JOBS_PER_KILL} for each kill if unset")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="kill nobody; watch memory, WAL and pace")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL of its own, else on SQLite")
    parser.add_argument("--db", metavar="URL", help="on this empty PostgreSQL database")
    parser.add_argument("--folder", type=Path, default=Path("build/storm"), help="removed first")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        url = options.db or str(folder / "runs.db")
        if options.postgres:
            url = stack.enter_context(stack.enter_context(postgres()).database())
        act = rage if options.soak is None else soak
        good = asyncio.run(act(Queue(url), options, folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
