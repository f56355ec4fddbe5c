"""Connections to SQLite files: their pragmas, and how their transactions begin."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlencode

from lbr.store.trips import FileConnection, FileThread, WholeConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
    from pathlib import Path

    import sqlalchemy

    from lbr.store.connection import Connection
    from lbr.store.schema import AnyRow

T = TypeVar("T")

BUSY_TIMEOUT_MS = 2_500

# What a file's own schema says may call no function that could do harm.
HARMLESS = "PRAGMA trusted_schema = OFF"

SCHEMA_ROWS = "SELECT type, name, rootpage FROM sqlite_master"

READER_PRAGMAS = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    "PRAGMA query_only = ON",
    "PRAGMA mmap_size = 0",
    "PRAGMA cache_size = -16384",
)


def writer_pragmas(synchronous: str, wal_limit: int) -> tuple[str, ...]:
    """Return what a connection that writes begins with; `wal_limit`, in bytes, is what a checkpoint leaves of the WAL."""
    return (
        f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
        f"PRAGMA synchronous = {synchronous}",
        "PRAGMA wal_autocheckpoint = 0",
        f"PRAGMA journal_size_limit = {wal_limit}",
        "PRAGMA mmap_size = 0",
        "PRAGMA cache_size = -32768",
    )


def foreign_code(rows: Iterable[AnyRow], tables: Collection[str]) -> str:
    """Return what in a file's schema would run with our statements; empty if nothing does.

    It is every trigger, and a view or virtual table in the place of one of our tables. `rows` are `SCHEMA_ROWS`.
    """
    running = [
        f"the {row.type} {row.name[:50]!r}"
        for row in rows
        if row.type == "trigger" or (row.name in tables and (row.type != "table" or not row.rootpage))
    ]
    return ", ".join(running[:5])


class FileConnections:
    """Connections to one file, opened when they are needed and at most `most`, each in a thread of its own.

    Their transactions start with `begin`, and they themselves run `pragmas` first. `options` are those of SQLite's
    URI file names; None for connections that may write.
    """

    def __init__(
        self,
        path: Path,
        *,
        begin: str,
        most: int,
        pragmas: tuple[str, ...],
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._begin = begin
        self._open = partial(_connect, path, pragmas, options)
        self.changes = 0
        """How often a connection was opened, or closed behind its transaction."""
        self._room = asyncio.Semaphore(most)
        self._free: list[FileThread] = []
        self._closed = False

    def _connect(self) -> sqlite3.Connection:
        self.changes += 1
        return self._open()

    async def transact(self, work: Callable[[Connection], Awaitable[T]], *, begin: str | None = None) -> T:
        """Run one transaction, in one trip. `work` may wait for nothing but its connection.

        `begin` is what it starts with, None for what all do and empty for statements in no transaction.
        Raises SQLAlchemy's errors.
        """
        async with self._one() as thread:
            return await thread.transact(self._begin if begin is None else begin, work)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Be in a transaction that is committed at the end, and that may wait for anything: each statement is a trip."""
        async with self._one() as thread:
            begun: list[sqlalchemy.Connection] = []
            try:
                await thread.run(lambda: begun.append(thread.begun(self._begin)))
                yield FileConnection(thread, begun[0])
                await thread.run(begun[0].commit)
            finally:
                for connection in begun:
                    await thread.run(connection.close)
                    await thread.run(thread.roll_back)

    @asynccontextmanager
    async def _one(self) -> AsyncIterator[FileThread]:
        async with self._room:
            # The latest, which has the most of the file in its cache.
            thread = self._free.pop() if self._free else FileThread(self._connect)
            try:
                yield thread
            finally:
                if self._closed:
                    self.changes += 1
                    await thread.close()
                else:
                    self._free.append(thread)

    async def close(self) -> None:
        """Close every connection, one that is in a transaction at the end of that."""
        self._closed = True
        while self._free:
            await self._free.pop().close()


def _connect(path: Path, pragmas: tuple[str, ...], options: Mapping[str, str] | None) -> sqlite3.Connection:
    name = str(path) if options is None else f"{path.as_uri()}?{urlencode(options)}"
    connection = sqlite3.connect(
        name,
        timeout=BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,
        check_same_thread=False,  # rows that were read to their end are asked for outside
        factory=WholeConnection,
        uri=options is not None,
    )
    try:
        for pragma in (HARMLESS, *pragmas):
            connection.execute(pragma)
    except BaseException:
        connection.close()
        raise
    return connection
