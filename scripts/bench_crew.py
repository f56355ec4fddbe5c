"""Worker processes of one measurement: started together, watched, and killed at its end whatever happens."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import bench_job
import psutil

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

HERE = Path(__file__).parent
START_SECONDS = 90.0
POLL_SECONDS = 0.002
WARM_UP_JOBS = 50
"""Per process, before the clock starts: imports, connections and prepared statements are paid for by then."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one measurement found. Times are in seconds, `cpu` is what all worker processes together used.

    `batch` is how many jobs a worker fetched at a time, 0 for a system that decides that itself.
    """

    system: str
    database: str
    workers: int
    jobs: int
    enqueue: float
    drain: float
    cpu: float
    batch: int = 0


def drain_patience(jobs: int) -> float:
    """Return after how many seconds a drain is given up, far beyond what the slowest queue takes."""
    return 60.0 + jobs / 20


class Crew:
    """Python processes that run one script of this folder, with a mapped tally, a pipe to each, and one log."""

    def __init__(self, folder: Path, size: int, arguments: Sequence[str]) -> None:
        self.size = size
        self._folder = folder
        self._log = folder / "workers.log"
        self._arguments = [str(HERE / arguments[0]), *arguments[1:]]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.tally = bench_job.create_tally(folder / "tally", size)

    def __enter__(self) -> Self:
        try:
            with self._log.open("ab") as log:
                for place in range(self.size):
                    self._processes.append(self._start(place, log))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, place: int, log: Any) -> subprocess.Popen[bytes]:
        # A folder of their own and nobody's settings: what this machine has configured must not be measured.
        settings = ("LBR_", "PGQUEUER_", "PROCRASTINATE_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        own = {bench_job.TALLY: str(self._folder / "tally"), bench_job.PLACE: str(place)}
        return subprocess.Popen(
            [sys.executable, *self._arguments],
            cwd=self._folder,
            env=clean | own,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def go(self) -> None:
        """Let the processes go on that wait in `bench_job.wait_for_go`."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # it died; whoever waits for it says so
                    process.stdin.write(b"g")
                    process.stdin.flush()

    def cpu(self) -> float:
        """Return the seconds of CPU that the processes have used so far, in user and system mode."""
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Wait for a condition; end the benchmark where a process dies first, or time runs out."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.returncode for process in self._processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                problem = f"workers ended with {ended}" if ended else f"not within {seconds:.0f} s"
                sys.exit(f"expected {what}, got: {problem}, {self.tally.calls} jobs run\n{self.last_words()}")
            await asyncio.sleep(POLL_SECONDS)

    def last_words(self) -> str:
        """Return the end of what the processes wrote."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


async def timed_drain(
    crew: Crew,
    warm_up: int,
    jobs: int,
    release: Callable[[], Awaitable[object]],
    finished: Callable[[], bool],
) -> tuple[float, float]:
    """Release the jobs and wait for the last; return the seconds that took, of the clock and of the workers' CPU.

    The database is asked whether it is `finished` only when all jobs ran, for what is left then are the last
    commits. Every job of the warm-up must have run before, and every job in all must run once.
    """
    expect("the number of calls before the clock starts", warm_up, crew.tally.calls)
    patience = drain_patience(jobs)
    cpu, started = crew.cpu(), time.perf_counter()
    await release()
    await crew.until(lambda: crew.tally.calls >= warm_up + jobs, f"{jobs} jobs to run", patience)
    await crew.until(finished, f"{jobs} jobs to be recorded as done", patience)
    drain, used = time.perf_counter() - started, crew.cpu() - cpu
    expect("the number of calls", warm_up + jobs, crew.tally.calls)
    return drain, used


def expect(what: str, expected: object, found: object) -> None:
    """End the benchmark where a check of its results fails: a fast queue that loses jobs is not fast."""
    if expected != found:
        sys.exit(f"expected {what} to be {expected!r}, got: {found!r}")
