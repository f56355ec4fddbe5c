"""procrastinate under measurement. Run as a script it is one of its worker processes.

It takes jobs one by one, each in a transaction of its own, so it gets fewer of them than the others. Every worker
runs many at a time over a pool of connections, and neither listens nor waits: the jobs are there before it
starts, and the notifications, one for each of them, would only slow it down.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import bench_job
import psycopg
from bench_crew import WARM_UP_JOBS, Crew, Measured, expect, timed_drain
from bench_server import value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench_server import Postgres

TASK = "noop"
CONCURRENCY = 100
POOL = 10
"""Connections of a worker: its default of 4 was slower, 20 no faster."""
CONNECTIONS = 80
"""Of all workers together: a server has 100 unless told otherwise."""
CHUNK = 1_000


def _app(url: str, pool: int) -> Any:
    """Return an application over so many connections, with the one task."""
    procrastinate = importlib.import_module("procrastinate")
    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=pool, max_size=pool)
    app = procrastinate.App(connector=connector)
    app.task(name=TASK)(bench_job.noop)
    return app


async def _put(app: Any, prompts: Sequence[str]) -> None:
    """Enqueue in statements of many jobs each."""
    for start in range(0, len(prompts), CHUNK):
        chunk = [{"prompt": prompt} for prompt in prompts[start : start + CHUNK]]
        await app.tasks[TASK].batch_defer_async(*chunk)


async def measure(folder: Path, server: Postgres, prompts: Sequence[str], workers: int) -> Measured:
    """Measure procrastinate on a fresh database of the server."""
    with server.database() as url:
        app = _app(url, 1)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            return await _measure(folder, url, app, prompts, workers)


async def _measure(folder: Path, url: str, app: Any, prompts: Sequence[str], workers: int) -> Measured:
    """Let the workers drain a warm-up, fill the queue while they stand still, then let them go."""
    jobs, warm_up = len(prompts), WARM_UP_JOBS * workers
    await _put(app, [f"Warm-up {n}" for n in range(warm_up)])
    with psycopg.connect(url, autocommit=True) as look:
        pool = max(1, min(POOL, CONNECTIONS // workers))
        with Crew(folder, workers, ["bench_procrastinate.py", url, str(pool)]) as crew:
            await crew.until(lambda: crew.tally.ready == workers, "workers to drain the warm-up")
            expect("the number of jobs of the warm-up", warm_up, _succeeded(look))
            started = time.perf_counter()
            await _put(app, prompts)
            enqueue = time.perf_counter() - started
            look.execute("ANALYZE procrastinate_jobs")

            async def release() -> None:
                crew.go()

            drain, cpu = await timed_drain(
                crew, warm_up, jobs, release=release, finished=lambda: _succeeded(look) == warm_up + jobs
            )
        expect(
            "the number of jobs in all",
            warm_up + jobs,
            value(look, "SELECT count(*) FROM procrastinate_jobs"),
        )
    return Measured("procrastinate", "postgresql", workers, jobs, enqueue, drain, cpu)


def _succeeded(look: psycopg.Connection) -> object:
    return value(look, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'")


async def _work(url: str, pool: int) -> None:
    """Drain the warm-up, drain what comes with the go, then stand still until killed."""
    app = _app(url, pool)
    async with app.open_async():
        for measured in (False, True):
            if measured:
                bench_job.get_ready()
                bench_job.wait_for_go()
                bench_job.leave_with_parent()
            await app.run_worker_async(
                concurrency=CONCURRENCY, wait=False, listen_notify=False, install_signal_handlers=False
            )
        await asyncio.Event().wait()


if __name__ == "__main__":
    logging.disable(logging.INFO)  # it logs two lines for each job
    asyncio.run(_work(sys.argv[1], int(sys.argv[2])))
