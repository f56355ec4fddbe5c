"""An open queue in either kind of database: how to open it, and its short transactions, which are retried.

`write` runs one short transaction, and runs it again if the database was busy or away; `read` runs one that cannot write
and sees one moment. Both take a plain function of SQLAlchemy's connection and the time. Neither is ever open across a
model call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeAlias, TypeVar

import stamina
from stamina.instrumentation import get_on_retry_hooks

from lbr.core.config import PATIENCE
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files
from lbr.store.addresses import address_of, is_postgresql, sqlite_path
from lbr.store.migrations import LATEST
from lbr.store.sql import SCHEMA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from os import PathLike
    from pathlib import Path

    from sqlalchemy import Connection

    from lbr.core.types import PathOrUrl
    from lbr.store.leases import Presence

P = ParamSpec("P")
T = TypeVar("T")
Statements: TypeAlias = "Callable[Concatenate[Connection, Millis, P], T]"
"""What runs within a transaction: it gets the connection, the time at the transaction's beginning, and more."""
Work: TypeAlias = "Callable[[Connection, Millis], T]"

# Without a handler, Python would print each retry for a program that set up no logging.
logging.getLogger("stamina").addHandler(logging.NullHandler())


def local_clock() -> Millis:
    """Return this machine's time in milliseconds since 1970."""
    return Millis(time.time_ns() // 1_000_000)


async def to_its_end(work: Awaitable[T]) -> T:
    """Await `work` to its end even if the caller is cancelled; only then is the cancellation raised."""
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
    knows which workers have ended. `one_writer`: all writers take turns, so do in one transaction what you can.
    """

    one_writer = False

    def __init__(self, name: str, *, patience: float, spool_places: Sequence[Path], presence: Presence) -> None:
        # What a retry imports, it imports now: later there may be no file handle left for it.
        get_on_retry_hooks()
        self.name = name
        self.presence = presence
        self.patience = patience
        self.spool_places = spool_places
        self._given_up = False

    def give_up(self) -> None:
        """Try nothing again from now on."""
        self._given_up = True

    async def write(self, work: Statements[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run one transaction, all of it again after a failure that passes, so `work` must be safe to repeat.

        It may be repeated even though it took place, if the reply to its commit was lost. A cancelled caller is
        cancelled only when the transaction has ended; it is not run again then. Raises DatabaseError when the database
        stays busy or away for longer than `patience`.
        """
        return await self._retried(partial(self._write, _bound(work, *args, **options)))

    async def read(self, work: Statements[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run one short read-only transaction, again after a failure that passes. Cancels and raises as `write` does.

        An open one would keep SQLite from taking a checkpoint.
        """
        return await self._retried(partial(self._read, _bound(work, *args, **options)))

    async def quick_read(self, work: Statements[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do the same as `read` for what takes next to no time: on a file, writes wait for it."""
        return await self._retried(partial(self._quick_read, _bound(work, *args, **options)))

    async def _retried(self, run: Callable[[], Awaitable[T]]) -> T:
        with self._errors():
            try:
                return await to_its_end(run())  # most succeed at once, without the cost of setting up retries
            except Exception as error:
                if not self._may_retry(error):
                    raise
            retry = stamina.AsyncRetryingCaller(
                attempts=None, timeout=self.patience, wait_initial=0.02, wait_max=1, wait_jitter=0.2
            )
            return await retry(self._may_retry, lambda: to_its_end(run()))

    def _may_retry(self, error: Exception) -> bool:
        return not self._given_up and self._passes(error)

    @abstractmethod
    def _write(self, work: Work[T]) -> Awaitable[T]:
        """Run `work` once in a writing transaction."""

    @abstractmethod
    def _read(self, work: Work[T]) -> Awaitable[T]:
        """Run `work` once in a read-only transaction."""

    def _quick_read(self, work: Work[T]) -> Awaitable[T]:
        return self._read(work)

    @abstractmethod
    def _passes(self, error: Exception) -> bool:
        """Return whether the same transaction may well succeed when it is run again."""

    @abstractmethod
    def _errors(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into `DatabaseError`, with the way out."""

    @abstractmethod
    async def changed(self) -> bool:
        """Return whether other processes may have changed something since the last call; it costs next to nothing."""

    @abstractmethod
    async def filled(self) -> None:
        """Note that an enqueue has finished: many rows may be new."""

    @abstractmethod
    async def give_back_space(self) -> None:
        """Return the space of removed rows to the file system, in short transactions."""

    def check_version(self, version: int, *, create: bool) -> None:
        """Raise DatabaseError for the schema of a newer version, UsageError for a missing one without `create`."""
        if version > LATEST:
            raise DatabaseError(
                f"expected {self.name} at schema version {LATEST} or older, got: {version}; a newer lbr wrote it: use "
                f"that one"
            )
        if version == 0 and not create:
            raise UsageError(f"there is no lbr queue in {self.name} yet; `lbr enqueue` creates it")

    @abstractmethod
    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection."""


def _bound(work: Statements[P, T], *args: P.args, **options: P.kwargs) -> Work[T]:
    return lambda connection, now: work(connection, now, *args, **options)


async def open_database(
    url: PathOrUrl,
    *,
    create: bool = False,
    allow_network_fs: bool = False,
    clock: Callable[[], Millis] | None = None,
    patience: float = PATIENCE,
) -> Database:
    """Open the queue at a path or URL and upgrade it if it is older; with `create`, create it first if it is missing.

    `clock` None is this machine's for a file, the server's for PostgreSQL. `patience` is for how many seconds a
    transaction is tried again while the database is busy or away.

    Raises UsageError for a URL or path that cannot be one, DatabaseError for what is no lbr database, is damaged, does
    not answer, or was written by a newer version. Nothing is created on an error or without `create`.
    """
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - its driver is an extra

        database: Database = postgres.PostgresDatabase(url, clock=clock, patience=patience)
    else:
        from lbr.store import sqlite  # noqa: PLC0415 - it imports this module

        database = sqlite.open_sqlite(
            url, create=create, allow_network_fs=allow_network_fs, clock=clock, patience=patience
        )
    try:
        await database.prepare(create=create)
    except BaseException:
        await database.close()
        raise
    return database


@asynccontextmanager
async def opened(
    url: PathOrUrl, *, create: bool = False, allow_network_fs: bool = False, patience: float = PATIENCE
) -> AsyncIterator[Database]:
    """Open a queue for a while; see `open_database`."""
    database = await open_database(url, create=create, allow_network_fs=allow_network_fs, patience=patience)
    try:
        yield database
    finally:
        # A cancelled caller must not interrupt the closing: SQLAlchemy would print a traceback.
        await to_its_end(database.close())


def file_of(url: PathOrUrl) -> Path | None:
    """Return the file that holds the queue, None if it is on a server. Raises UsageError as `open_database`."""
    return None if is_postgresql(url) else sqlite_path(url)


def shown(url: PathOrUrl) -> str:
    """Return how messages call the database at a URL: without its password. Raises UsageError as `open_database`."""
    return address_of(url).shown if is_postgresql(url) else str(sqlite_path(url))


def sole_worker(url: PathOrUrl) -> AbstractAsyncContextManager[None]:
    """Hold the lock of the queue's exclusive worker; a killed holder frees it. Raises AlreadyRunningError."""
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - as above

        return postgres.sole_worker(url)
    from lbr.store import sqlite  # noqa: PLC0415 - as above

    return sqlite.sole_worker(url)


async def backup(url: PathOrUrl, file: PathLike[str] | str, *, allow_network_fs: bool = False) -> None:
    """Copy the queue at one moment to a new file, private and whole, while others use it; also one of an older version.

    Raises UsageError for a server, or if the file exists; OutputError if it cannot be written.
    """
    if is_postgresql(url):
        raise UsageError(
            f"a backup copies a SQLite file, and this queue is on a server; use `pg_dump --schema={SCHEMA} "
            f"--format=custom --file={file} DATABASE`"
        )
    from lbr.store import sqlite  # noqa: PLC0415 - as above

    target = files.check_new(file)
    database = sqlite.open_sqlite(url, create=False, allow_network_fs=allow_network_fs, clock=None, patience=PATIENCE)
    try:
        await database.backup(target)
    finally:
        await to_its_end(database.close())


async def remove_queue(url: PathOrUrl, *, run: str) -> bool:
    """Remove a queue that no process uses and that holds one run only; else return False and change nothing."""
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - as above

        return await postgres.remove_queue(url, run=run)
    return await files.remove_unused(sqlite_path(url), run=run, query="SELECT name FROM runs")
