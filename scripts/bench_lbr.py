"""lbr under measurement, on either database. Run as a script it is `lbr` that ends with its parent."""

from __future__ import annotations

import runpy
import sqlite3
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

import bench_job
import psycopg
from bench_crew import WARM_UP_JOBS, Crew, Measured, expect, timed_drain
from bench_server import value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench_server import Postgres

RUN = "bench"
WARM_UP = "warm-up"
FUNCTION = "bench_job:noop"


class Look(Protocol):
    """Asks the queue's tables directly, over one open connection, which costs the workers least."""

    def __call__(self, query: str) -> object:
        """Return the one value of a query."""


@contextmanager
def _look_into_file(path: Path) -> Iterator[Look]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:

        def look(query: str) -> object:
            row = connection.execute(query).fetchone()
            return row[0] if row else None

        yield look


@contextmanager
def _look_into_server(url: str) -> Iterator[Look]:
    with psycopg.connect(url, autocommit=True, options="-c search_path=lbr") as connection:
        # Every queue is measured with statistics, which the server gathers by itself a minute later.
        connection.execute("ANALYZE")
        yield lambda query: value(connection, query)


def _done(run: str) -> str:
    return (
        "SELECT coalesce(sum(value), 0) FROM counters WHERE name = 'done' "  # noqa: S608 - both runs are ours
        f"AND run_id = (SELECT id FROM runs WHERE name = '{run}')"
    )


async def measure_sqlite(
    folder: Path, prompts: Sequence[str], workers: int, concurrency: int, function: str = FUNCTION
) -> Measured:
    """Measure lbr on a SQLite file with its default settings, which are the durable ones."""
    path = folder / "runs.db"
    enqueue = await _enqueue(folder, str(path), prompts, workers, function)
    with _look_into_file(path) as look:
        drain, cpu = await _drain(folder, str(path), look, len(prompts), workers, concurrency, function)
    await _check(str(path), prompts)
    return Measured("lbr", "sqlite", workers, len(prompts), enqueue, drain, cpu)


async def measure_postgres(
    folder: Path, server: Postgres, prompts: Sequence[str], workers: int, concurrency: int
) -> Measured:
    """Measure lbr on a fresh database of the server."""
    with server.database() as url:
        enqueue = await _enqueue(folder, url, prompts, workers)
        with _look_into_server(url) as look:
            drain, cpu = await _drain(folder, url, look, len(prompts), workers, concurrency)
        await _check(url, prompts)
    return Measured("lbr", "postgresql", workers, len(prompts), enqueue, drain, cpu)


async def _enqueue(folder: Path, db_url: str, prompts: Sequence[str], workers: int, function: str = FUNCTION) -> float:
    """Put both runs in, the large one paused, and return the seconds that the large one took.

    In this process, for the other queues are filled from it too: the start of an interpreter is not measured.
    """
    import lbr  # noqa: PLC0415 - the child process must not pay for it twice

    file = folder / f"{RUN}.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    warm_up = [f"Warm-up {n}" for n in range(WARM_UP_JOBS * workers)]
    await lbr.enqueue(warm_up, run=WARM_UP, function=function, db_url=db_url)
    started = time.perf_counter()
    report = await lbr.enqueue(file, function=function, db_url=db_url)
    took = time.perf_counter() - started
    expect("the name of the run", RUN, report.run)
    await lbr.pause(RUN, db_url=db_url)
    return took


async def _drain(
    folder: Path,
    db_url: str,
    look: Look,
    jobs: int,
    workers: int,
    concurrency: int,
    function: str = FUNCTION,
) -> tuple[float, float]:
    """Start the workers on the warm-up run, then resume the large one and time it."""
    import lbr  # noqa: PLC0415

    warm_up = WARM_UP_JOBS * workers
    command = ["--db", db_url, "worker", "--function", function, "--until", "forever"]
    with Crew(folder, workers, ["bench_lbr.py", *command, "--concurrency", str(concurrency)]) as crew:
        await crew.until(lambda: look("SELECT count(*) FROM workers") == workers, "workers to register")
        await crew.until(lambda: look(_done(WARM_UP)) == warm_up, "the warm-up to be done")
        return await timed_drain(
            crew,
            warm_up,
            jobs,
            release=lambda: lbr.resume(RUN, db_url=db_url),
            finished=lambda: look(_done(RUN)) == jobs,
        )


async def _check(db_url: str, prompts: Sequence[str]) -> None:
    """Collect the run and compare every row with what was asked."""
    import lbr  # noqa: PLC0415

    collected = await lbr.collect(RUN, db_url=db_url)
    found = [(row["idx"], row["prompt"], row["status"], row["result"]) for row in collected.rows or ()]
    expect("the number of rows", len(prompts), len(found))
    for n, (prompt, row) in enumerate(zip(prompts, found, strict=True)):
        expect(f"row {n}", (n, prompt, "done", prompt), row)


if __name__ == "__main__":
    bench_job.leave_with_parent()
    sys.argv[0] = "lbr"
    runpy.run_module("lbr", run_name="__main__")
