"""aiosqlite with one trip to a connection's thread for a whole transaction, or for a statement outside of one.

As it comes, a statement takes four: a cursor is made, the statement run, its rows fetched, the cursor closed, and each
trip costs two switches between threads, which is more than most statements. Here the first waits for nothing, the
second brings the rows along, and the others find everything done. A transaction is taken to the thread as it is: in
there nothing has to be waited for, and the file's lock is held while it computes, not while threads take turns.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import aiosqlite
from aiosqlite.context import contextmanager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

ITER_CHUNK = 64


class OneTripCursor(aiosqlite.Cursor):
    """A cursor that has all rows of its statement once that was run, and is closed by then."""

    def __init__(self, connection: OneTripConnection) -> None:
        super().__init__(connection, None)  # type: ignore[arg-type]  # made in the thread, with the statement
        self._rows: list[Any] = []

    def _run(self, connection: sqlite3.Connection, sql: str, parameters: Any) -> None:
        self._cursor = connection.execute(sql, parameters)
        self._rows = self._cursor.fetchall() if self._cursor.description else []
        self._cursor.close()

    def _run_many(self, connection: sqlite3.Connection, sql: str, parameters: Any) -> None:
        self._cursor = connection.executemany(sql, parameters)
        self._cursor.close()

    async def _go(self, run: Callable[..., None], sql: str, parameters: Any) -> None:
        connection = self._conn._conn  # noqa: SLF001 - aiosqlite's own name for what its cursors use
        await self._execute(run, connection, sql, parameters)  # type: ignore[no-untyped-call]

    async def execute(self, sql: str, parameters: Iterable[Any] | None = None) -> OneTripCursor:
        """Run a statement and fetch its rows."""
        await self._go(self._run, sql, parameters or ())
        return self

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> OneTripCursor:
        """Run a statement once for each of the parameters."""
        await self._go(self._run_many, sql, parameters)
        return self

    async def fetchall(self) -> list[Any]:
        """Return the rows."""
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        """Do nothing: the statement's end closed it."""


class OneTripConnection(aiosqlite.Connection):
    """A connection whose cursors take one trip to its thread, and none from within it."""

    async def _execute(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if threading.get_ident() == self._thread.ident:
            return fn(*args, **options)
        return await super()._execute(fn, *args, **options)  # type: ignore[no-untyped-call]

    async def rollback(self) -> None:
        """Roll back, without a trip where there is nothing to: a pool asks for it after every transaction."""
        if self.in_transaction:
            await super().rollback()

    async def complete(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end in the thread. It may wait for nothing but this connection.

        A cancelled caller hears of it only then: whoever gets the connection next would find a transaction open.
        """
        if not self._running or self._connection is None:
            coroutine.close()
            raise ValueError("Connection closed")
        # Of no task's: a loop that ends cancels every task, but cannot cancel this.
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((ended, partial(_complete, coroutine)))
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            try:
                await asyncio.wait([ended])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            ended.exception()
            raise cancelled
        return ended.result()

    @contextmanager
    async def cursor(self) -> aiosqlite.Cursor:
        """Return a cursor, without a trip."""
        return OneTripCursor(self)


def connect(database: str | Path, **options: Any) -> OneTripConnection:
    """Return what `aiosqlite.connect` would, with cursors of one trip."""
    connection = OneTripConnection(lambda: sqlite3.connect(database, **options), ITER_CHUNK)
    # A program that ends without closing it must not hang; SQLAlchemy does so with aiosqlite's own.
    connection._thread.daemon = True  # noqa: SLF001
    return connection


def _complete(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("expected a transaction to wait for its database alone, got: one that waits for more")


async def transact(connection: AsyncConnection, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Run a transaction in one trip, from its beginning to its commit, or to its end by what `work` raises."""

    async def transaction() -> T:
        async with connection.begin():
            return await work(connection)

    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    if not isinstance(driver, OneTripConnection):
        raise TypeError(f"expected a connection that `connect` made, got: {driver!r}")
    return await driver.complete(transaction())
