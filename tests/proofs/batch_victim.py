"""A worker of the batch lane in a process that kills itself at a chosen place of a batch's steps, as SIGKILL would."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import time
from typing import TYPE_CHECKING, Any

from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.types import Until
from lbr.models import batches as models
from lbr.store import batches
from lbr.store.database import Database, open_database
from lbr.worker import batches as lane
from lbr.worker.worker import Worker
from tests.support import is_postgresql, real_clock
from tests.support.batch_server import KEY
from tests.support.hearing import Hearing

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import SimpleQueue

NEVER = 10**9
LOADED = models.__name__
"""Loaded once, before all victims."""


class Places:
    """Kills the process at a place: before a transaction's beginning or commit, on a file before each statement too."""

    def __init__(self, length: int, *, statements: bool) -> None:
        self.left = length
        self._hearing = Hearing(self._burn if statements else lambda *_: None, self._burn)

    def _burn(self, *_: Any) -> None:
        self.left -= 1
        if self.left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Count in the transactions of a batch's steps, not in those of the worker beside them."""
        write = Database.write

        async def watched(database: Database, work: Any, *args: Any, **options: Any) -> Any:
            if work.__module__ != batches.__name__ or work is batches.renew:
                return await write(database, work, *args, **options)

            def counted(connection: Any, now: Any) -> Any:
                self._burn()
                self._hearing.begin()
                return work(connection, now, *args, **options)

            try:
                return await write(database, counted)
            finally:
                self._hearing.end()

        Database.write = watched  # type: ignore[method-assign, assignment]


async def _work(url: str, ahead: float = 0) -> None:
    database = await open_database(url, clock=real_clock(ahead))
    await Worker(database, authorize(), WorkOptions(until=Until.EMPTY)).run()
    await database.close()


def _be_victim(url: str, server: str, length: int, ahead: float) -> None:
    os.environ |= {"OPENAI_BASE_URL": server, "OPENAI_API_KEY": KEY}
    Places(length, statements=not is_postgresql(url)).watch()
    asyncio.run(_work(url, ahead))
    os._exit(0)


def start(url: str, server: str, now: int, length: int = NEVER) -> BaseProcess:
    """Start a worker that dies at this place; its clock begins now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_be_victim, args=(url, server, length, now / 1000 - time.time()))
    process.start()
    return process


def has_died(process: BaseProcess) -> bool:
    """Wait for a worker's end; return whether it was killed."""
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL}, process.exitcode
    return process.exitcode != 0


def _measure(url: str, server: str, found: SimpleQueue[int]) -> None:
    os.environ |= {"OPENAI_BASE_URL": server, "OPENAI_API_KEY": KEY}
    lane.MAX_REQUESTS = 50_000  # type: ignore[attr-defined]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asyncio.run(_work(url))
    found.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def kilobytes_of_a_worker(url: str, server: str) -> int:
    """Return how many kilobytes a worker takes more than before its work, with batches of 50,000 requests."""
    context = multiprocessing.get_context("spawn")  # of a fork, the peak is that of its parent
    found: SimpleQueue[int] = context.SimpleQueue()
    process = context.Process(target=_measure, args=(url, server, found))
    process.start()
    process.join()
    return found.get()
