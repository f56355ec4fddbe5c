"""What the store asks of a database, whichever it is: short transactions that are run again when they must be.

A `Database` offers two verbs. `write` runs one short transaction, and runs it again where the database was busy
or away for a while; `read` runs one short transaction that cannot write and sees one moment. Neither is ever
open across a model call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

import stamina
from stamina.instrumentation import get_on_retry_hooks

from lbr.core.types import Millis

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lbr.core.types import RunId
    from lbr.store.connection import Connection
    from lbr.store.presence import Presence

T = TypeVar("T")

# A retry is not news. Without a handler Python would print it for a program that set up no logging.
logging.getLogger("stamina").addHandler(logging.NullHandler())


def local_clock() -> Millis:
    """Return this machine's time in milliseconds since 1970."""
    return Millis(time.time_ns() // 1_000_000)


async def to_its_end(work: Awaitable[T]) -> T:
    """Await `work` to its end even if the caller is cancelled, once or again; only then is the cancellation raised."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()
        raise


class Database(ABC):
    """An open queue. `name` is how messages call it, never with a password; `patience` is in seconds.

    `spool_places` are beginnings of paths, the best first, for files with answers that it does not take. `presence`
    knows which workers have ended. `one_writer` tells whether all who write take turns, so that what can be done in
    one transaction should be.
    """

    one_writer = False

    def __init__(
        self, name: str, *, patience: float, spool_places: Sequence[Path], presence: Presence
    ) -> None:
        # What a retry loads, it loads now: it may be for want of the descriptor that an import takes.
        get_on_retry_hooks()
        self.name = name
        self.presence = presence
        self.patience = patience
        self.spool_places = spool_places
        self._given_up = False

    def give_up(self) -> None:
        """Try nothing again from now on: it has been tried for long enough."""
        self._given_up = True

    @abstractmethod
    async def write(self, work: Callable[[Connection], Awaitable[T]], *, beside: bool = False) -> T:
        """Run one transaction; whole again after a failure that passes, so `work` must not change anything else.

        Transactions of one process take turns. One that is to run `beside` takes turns with others of its kind
        only, where the database can write two at once: it must not wait for rows that the others may hold.

        A cancelled caller is told so only when the transaction has ended, one way or the other; it is not run again
        then. Raises DatabaseError when the database stays busy or away for longer than `patience`.
        """

    async def read(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run one short read-only transaction, again after a failure that passes. Raises as `write` does."""
        return await self._retried(lambda: self._read(work))

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> T:
        with self._errors():
            # Most succeed at once, and are spared what it costs to set up the trying again.
            try:
                return await once()
            except Exception as error:
                if self._given_up or not self._passes(error):
                    raise
                first = error
            async for attempt in stamina.retry_context(
                on=lambda error: not self._given_up and self._passes(error),
                attempts=None,
                timeout=self.patience,
                wait_initial=0.02,
                wait_max=1,
                wait_jitter=0.2,
            ):
                with attempt:
                    if attempt.num == 1:
                        raise first
                    result = await once()
        return result

    @abstractmethod
    async def _read(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` once in a read-only transaction."""

    @abstractmethod
    def _passes(self, error: Exception) -> bool:
        """Tell whether the same transaction may well succeed when it is run again."""

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into `DatabaseError`, with the way out."""

    @abstractmethod
    async def at_one_moment(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run what only reads while this writing transaction is open, so that all its statements see one moment."""

    @abstractmethod
    async def now(self, connection: Connection) -> Millis:
        """Return the time that leases are compared with: one clock for all workers of the queue."""

    @abstractmethod
    async def changed(self) -> bool:
        """Tell whether it is worth looking for work that others left since the last call; it costs next to nothing."""

    @abstractmethod
    async def wake(self, connection: Connection) -> None:
        """Have this transaction's commit wake idle workers, where that takes saying."""

    @abstractmethod
    async def take_turns(self, connection: Connection, run_id: RunId) -> None:
        """Let enqueues of one run follow each other until this transaction ends; workers do not wait for it."""

    @abstractmethod
    async def reserve_job_ids(self, connection: Connection, count: int) -> Sequence[int]:
        """Return `count` ascending ids that no job has, had, or will have otherwise."""

    @abstractmethod
    async def filled(self) -> None:
        """Hear that an enqueue has come to its end: many rows may be new."""

    @abstractmethod
    async def prepare(self, *, create: bool) -> None:
        """Make sure the tables are there and current: older ones are upgraded, missing ones created only with `create`."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection."""
