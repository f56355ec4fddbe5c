"""aiosqlite with one trip to a connection's thread for each statement.

As it comes, a statement takes four: a cursor is made, the statement run, its rows fetched, the cursor closed, and each
trip costs two switches between threads, which is more than most statements. Here the first waits for nothing, the
second brings the rows along, and the others find everything done.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import aiosqlite
from aiosqlite.context import contextmanager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

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
    """A connection whose cursors take one trip to its thread."""

    @contextmanager
    async def cursor(self) -> aiosqlite.Cursor:
        """Return a cursor, without a trip."""
        return OneTripCursor(self)


def connect(database: str | Path, **options: Any) -> OneTripConnection:
    """Return what `aiosqlite.connect` would, with cursors of one trip."""
    return OneTripConnection(lambda: sqlite3.connect(database, **options), ITER_CHUNK)
