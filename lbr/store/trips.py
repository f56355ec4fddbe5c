"""SQLAlchemy in the thread that aiosqlite gives a connection: a whole transaction is one trip there.

With a trip for each statement the file would be locked while two threads take turns, which lasts longer than most
statements, and much longer beside a function that computes. In the thread nothing has to be waited for, and
SQLAlchemy speaks to sqlite3 as it does in any program that is not async. What every batch of jobs runs goes to sqlite3
as it is, by `fetch` and `change`: SQLAlchemy's way there takes longer than most of these statements.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import aiosqlite
from sqlalchemy import StaticPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from lbr.core import open_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from sqlalchemy import Connection, CursorResult, Executable

P = ParamSpec("P")
T = TypeVar("T")

ITER_CHUNK = 64
BEGIN_WRITING = "BEGIN IMMEDIATE"
"""Begins a transaction that has the file's lock from its beginning."""


class WholeCursor(sqlite3.Cursor):
    """A cursor that has all rows of its statement once that was run: none is open when a transaction ends."""

    _rows: Iterator[Any] = iter(())

    def execute(self, sql: str, parameters: Any = (), /) -> WholeCursor:
        """Run a statement and fetch its rows."""
        super().execute(sql, parameters)
        self._rows = iter(super().fetchall() if self.description else ())
        return self

    def fetchone(self) -> Any:
        """Return the next row, None after the last."""
        return next(self._rows, None)

    def fetchmany(self, size: int | None = 1) -> list[Any]:
        """Return the next rows."""
        return list(islice(self._rows, size))

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""
        return list(self._rows)


class WholeConnection(sqlite3.Connection):
    """A connection that makes such cursors."""

    def cursor(self, factory: Any = WholeCursor) -> Any:
        """Return a cursor."""
        return super().cursor(factory)


class _Ended(asyncio.Future[T]):
    """Is done when a function in a thread has ended, and not before: nobody cancels it.

    A task that waits for it and is cancelled hears of that when it is done.
    """

    def cancel(self, msg: Any = None) -> bool:
        """Do nothing: the function goes on."""
        return False


class FileThread(aiosqlite.Connection):
    """A connection to a file and the thread that it lives in, opened by the first transaction.

    `connect` opens it; what it raises comes out as SQLAlchemy's DBAPIError.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connect, ITER_CHUNK)
        self._engine = create_engine("sqlite://", creator=self._open, poolclass=StaticPool)
        event.listen(self._engine, "connect", _harmless)
        self._kept: Connection | None = None
        # A program that ends without closing it must not hang.
        self._thread.daemon = True
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        self._connection = self._connector()
        return self._connection

    @property
    def driver(self) -> sqlite3.Connection:
        """sqlite3's own connection, for use in the thread; there is one once a transaction has begun."""
        if self._connection is None:
            raise ValueError("expected a connection that is open, got: one that was closed")
        return self._connection

    @property
    def here(self) -> bool:
        """Whether the caller is in the thread."""
        return threading.get_ident() == self._thread.ident

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in the thread.

        A cancelled caller hears of it only when that has ended: whoever gets the connection next would find a
        transaction open.
        """
        if not self._running:
            raise ValueError("expected an open connection, got: one that was closed")
        ended: _Ended[T] = _Ended()
        # The thread remembers what it ran last, and would by that keep this connection and what the function holds.
        once = [function]

        def call() -> T:
            try:
                return once.pop()()
            except DBAPIError as error:
                _note_exhausted(error)
                raise

        self._tx.put_nowait((ended, call))
        return await ended

    async def transact(self, begin: str, work: Callable[[FileConnection], Awaitable[T]]) -> T:
        """Run a transaction in one trip, from its beginning to its commit, or to its end by what `work` raises.

        `begin` is the statement that it starts with, empty for none. `work` may wait for nothing but its connection.
        """
        return await self.run(partial(self._transact, begin, work))

    def _transact(self, begin: str, work: Callable[[FileConnection], Awaitable[T]]) -> T:
        connection = self._kept = self._kept or self._engine.connect()
        own = FileConnection(self, connection)
        try:
            with connection.begin():
                if begin:
                    own.drive(begin)
                return _complete(work(own))
        except BaseException:
            self.roll_back()
            raise

    def roll_back(self) -> None:
        """Leave no transaction open, even where a commit has failed and SQLAlchemy takes it for ended; in the thread."""
        try:
            self.driver.rollback()
        except sqlite3.Error:
            if self._kept is not None:
                # Closed, which ends the transaction; whoever is next opens the file anew.
                self._kept.invalidate()
                self._kept.close()
                self._kept = None

    def begun(self, begin: str) -> Connection:
        """Return a connection in a transaction that is open until it is closed; to be called in the thread."""
        connection = self._engine.connect()
        try:
            connection.exec_driver_sql(begin)
        except BaseException:
            connection.close()
            raise
        return connection

    def _dispose(self) -> None:
        if self._kept is not None:
            self._kept.close()
        self._engine.dispose()

    async def close(self) -> None:
        """Close the connection and end the thread."""
        if self._running:
            try:
                await self.run(self._dispose)
            finally:
                stopped = self.stop()
            if stopped is not None:
                await stopped


class FileConnection:
    """SQLAlchemy's connection in its thread; from elsewhere each statement is a trip there."""

    def __init__(self, thread: FileThread, connection: Connection) -> None:
        self._thread = thread
        self.sync_connection = connection

    async def _call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        if self._thread.here:
            return function(*args, **options)
        return await self._thread.run(partial(function, *args, **options))

    async def execute(
        self,
        statement: Executable,
        parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        /,
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement, once or for each of the parameters."""
        return await self._call(self.sync_connection.execute, statement, parameters)

    async def scalar(self, statement: Executable, parameters: Mapping[str, Any] | None = None, /) -> Any:
        """Run a statement and return the first column of its first row, None without one."""
        return await self._call(self.sync_connection.scalar, statement, parameters)

    async def exec_driver_sql(
        self, statement: str, parameters: Any = None, /
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run text as sqlite3 takes it, with a tuple of parameters or a list of tuples."""
        return await self._call(self.sync_connection.exec_driver_sql, statement, parameters)

    async def fetch(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Have sqlite3 run text with these values in its places, and return all rows. Raises as `execute` does."""
        return await self._call(self.drive, statement, values)

    async def change(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        """Have sqlite3 run text for each of the rows, and return how many it changed. Raises as `execute` does."""
        return await self._call(self.drive_each, statement, rows)

    def drive(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Do what `fetch` does, in the thread."""
        try:
            return self._cursor().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise _as_sqlalchemy(error) from error

    def drive_each(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do what `change` does, in the thread."""
        try:
            return self._cursor().executemany(statement, rows).rowcount
        except sqlite3.Error as error:
            raise _as_sqlalchemy(error) from error

    def _cursor(self) -> sqlite3.Cursor:
        return sqlite3.Connection.cursor(self._thread.driver, sqlite3.Cursor)

    async def run_sync(
        self, fn: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function with SQLAlchemy's connection."""
        return await self._call(fn, self.sync_connection, *args, **kwargs)


def _harmless(connection: sqlite3.Connection, _record: Any) -> None:
    # SQLAlchemy's, in Python: a check in the file could call it with a pattern that takes for ever.
    connection.create_function("regexp", 2, None)


def _note_exhausted(error: DBAPIError) -> None:
    """Note on an error whether no file handle was left when it came: later there may be some again."""
    if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN:
        error.orig.__dict__["exhausted"] = open_files.left() < open_files.LOOK_UP


def _as_sqlalchemy(error: sqlite3.Error) -> Exception:
    """Return what SQLAlchemy would raise, without the statement and its values: they are a job's own."""
    return DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True)


def _complete(work: Awaitable[T]) -> T:
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    steps.close()
    raise RuntimeError("expected a transaction to wait for its database alone, got: one that waits for more")
