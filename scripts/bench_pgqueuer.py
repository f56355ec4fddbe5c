"""pgqueuer under measurement. Run as a script it is one of its worker processes.

The settings are the fastest that its documentation names and that still keep everything: asyncpg, one
connection per worker, uvloop (as its own command line has), logged tables, autovacuum tuned by its own command.
Its own benchmark fetches 10 jobs at a time; for jobs as short as these the documentation says to raise that, so it is
measured with several sizes of a batch, and the best counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import bench_job
import psycopg
from bench_crew import START_SECONDS, WARM_UP_JOBS, Crew, Measured, expect, timed_drain
from bench_server import value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench_server import Postgres

ENTRYPOINT = "noop"
BATCH_SIZES = (100, 250, 500, 1_000)
PROBE_SECONDS = 0.5


async def _queries(url: str) -> tuple[Any, Any]:
    """Return pgqueuer's queries on a connection of their own, and that connection."""
    connection = await importlib.import_module("asyncpg").connect(url)
    driver = importlib.import_module("pgqueuer.db").AsyncpgDriver(connection)
    return importlib.import_module("pgqueuer.queries").Queries(driver), connection


async def _put(queries: Any, prompts: Sequence[str]) -> None:
    """Enqueue in one call, which is one statement: nothing that it offers is faster."""
    count = len(prompts)
    await queries.enqueue([ENTRYPOINT] * count, [prompt.encode() for prompt in prompts], [0] * count)


async def measure(folder: Path, server: Postgres, prompts: Sequence[str], workers: int, batch: int) -> Measured:
    """Measure pgqueuer on a fresh database of the server."""
    with server.database() as url:
        queries, connection = await _queries(url)
        try:
            await queries.install()
            await queries.optimize_autovacuum()
            return await _measure(folder, url, queries, connection, prompts, workers, batch)
        finally:
            await connection.close()


async def _measure(
    folder: Path, url: str, queries: Any, connection: Any, prompts: Sequence[str], workers: int, batch: int
) -> Measured:
    """Fill the queue in a transaction while the workers listen, and release the jobs with its commit.

    So no worker has anything left to do but to work when the clock starts.
    """
    jobs, warm_up = len(prompts), WARM_UP_JOBS * workers
    with psycopg.connect(url, autocommit=True) as look:
        with Crew(folder, workers, ["bench_pgqueuer.py", url, str(batch)]) as crew:
            await crew.until(lambda: crew.tally.ready == workers, "workers to listen")
            await _put(queries, [f"Warm-up {n}" for n in range(warm_up)])
            await crew.until(lambda: _succeeded(look) == warm_up, "the warm-up to be done")
            filling = connection.transaction()
            await filling.start()
            started = time.perf_counter()
            await _put(queries, prompts)
            enqueue = time.perf_counter() - started
            await connection.execute("ANALYZE pgqueuer")
            drain, cpu = await timed_drain(
                crew, warm_up, jobs, release=filling.commit, finished=lambda: _left(look) == 0
            )
        expect("the number of jobs logged as successful", warm_up + jobs, _succeeded(look))
    return Measured("pgqueuer", "postgresql", workers, jobs, enqueue, drain, cpu, batch)


def _left(look: psycopg.Connection) -> object:
    return value(look, "SELECT count(*) FROM pgqueuer")


def _succeeded(look: psycopg.Connection) -> object:
    return value(look, "SELECT count(DISTINCT job_id) FROM pgqueuer_log WHERE status = 'successful'")


async def _work(url: str, batch: int) -> None:
    """Be a worker process until killed."""
    pgqueuer = importlib.import_module("pgqueuer")
    queries, _ = await _queries(url)
    worker = pgqueuer.PgQueuer(queries.driver, queries=queries)

    async def noop(job: Any) -> None:
        await bench_job.noop(job.payload.decode())

    worker.entrypoint(ENTRYPOINT)(noop)
    working = asyncio.create_task(worker.run(batch_size=batch))
    telling = asyncio.create_task(_tell_when_listening(worker.qm))
    await asyncio.gather(working, telling)


async def _tell_when_listening(manager: Any) -> None:
    """Say that this process is ready once a notification that it sent has come back to it."""
    failing = importlib.import_module("pgqueuer.errors").FailingListenerError
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(failing):
            await manager.listener_healthy(timeout=timedelta(seconds=PROBE_SECONDS))
            bench_job.get_ready()
            return


if __name__ == "__main__":
    bench_job.leave_with_parent()
    importlib.import_module("uvloop").run(_work(sys.argv[1], int(sys.argv[2])))
