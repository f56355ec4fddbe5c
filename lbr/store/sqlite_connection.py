"""Connections to an SQLite file, each in a thread of its own; their pragmas, and what their errors mean.

A whole transaction is one trip to the thread: with a trip for each statement, the file would be locked while two threads
take turns. What every batch of jobs runs goes to sqlite3 directly, by `fetch` and `change`, because SQLAlchemy takes
longer than most of these statements.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar
from urllib.parse import urlencode

from sqlalchemy import StaticPool, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from lbr.core import open_files
from lbr.core.errors import DatabaseBusyError, DatabaseError, MisfitError

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from pathlib import Path

    import sqlalchemy
    from sqlalchemy import CursorResult, Executable

    from lbr.store.database import Connection
    from lbr.store.schema import AnyRow

AnyResult: TypeAlias = "CursorResult[*tuple[Any, ...]]"
P = ParamSpec("P")
T = TypeVar("T")

BUSY_TIMEOUT_MS = 2_500
BEGIN_WRITING = "BEGIN IMMEDIATE"
"""Begins a transaction that has the file's lock from its beginning."""
HARMLESS = "PRAGMA trusted_schema = OFF"
"""What a file's own schema contains may call no function that could do harm."""
SCHEMA_ROWS = "SELECT type, name, rootpage FROM sqlite_master"
READER_PRAGMAS = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    "PRAGMA query_only = ON",
    "PRAGMA mmap_size = 0",
    "PRAGMA cache_size = -16384",
)

# Primary result codes of SQLite, https://sqlite.org/rescode.html
HANDLES_LEFT = "handles_left"
"""The attribute of a sqlite3 error that could not open a file: how many handles were left then."""
ERROR, BUSY, LOCKED, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, NOTADB = 1, 5, 6, 8, 10, 11, 13, 14, 26
REASONS = {
    READONLY: "it is read-only; make the file and its folder writable",
    IOERR: "the disk reported an error",
    CORRUPT: "the file is damaged; restore a copy, or enqueue into a new one",
    FULL: "the disk is full; make room and run the same command again",
    CANTOPEN: "it cannot be opened; check the path and the permissions of the file and its folder",
    NOTADB: "the file is not a SQLite database; name another path",
}
REPAIR = "restore a copy, or fix that value"
_UNDECODED = re.compile(r"Could not decode to UTF-8 column '([^']*)'")


def writer_pragmas(synchronous: str, wal_limit: int) -> tuple[str, ...]:
    """Return the pragmas of a connection that writes; `wal_limit`, in bytes, is what a checkpoint leaves of the WAL."""
    return (
        f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
        f"PRAGMA synchronous = {synchronous}",
        "PRAGMA wal_autocheckpoint = 0",
        f"PRAGMA journal_size_limit = {wal_limit}",
        "PRAGMA mmap_size = 0",
        "PRAGMA cache_size = -32768",
    )


def foreign_code(rows: Iterable[AnyRow], tables: Collection[str]) -> str:
    """Return what in a file's schema would run with our statements; empty if nothing would.

    It is every trigger, and a view or virtual table in the place of one of our tables. `rows` are `SCHEMA_ROWS`.
    """
    running = [
        f"the {row.type} {row.name[:50]!r}"
        for row in rows
        if row.type == "trigger" or (row.name in tables and (row.type != "table" or not row.rootpage))
    ]
    return ", ".join(running[:5])


class WholeCursor(sqlite3.Cursor):
    """A cursor that fetches all rows at once: none is open when a transaction ends."""

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
    """Is done when a function in a thread has ended, and not before: a cancelled waiter is cancelled then."""

    def cancel(self, msg: Any = None) -> bool:
        """Do nothing: the function goes on."""
        return False


def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it may hold the connection, which would stay open while the thread waits


class FileThread:
    """A connection to a file and the thread that it lives in, opened by the first transaction.

    `connect` opens it; its errors are raised as SQLAlchemy's DBAPIError.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._engine = create_engine("sqlite://", creator=self._open, poolclass=StaticPool)
        event.listen(self._engine, "connect", _harmless)
        self._opened: sqlite3.Connection | None = None
        self._kept: sqlalchemy.Connection | None = None
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, because a program that ends without closing it must not hang.
        self._thread = threading.Thread(target=_serve, args=(self._calls,), daemon=True)
        self._thread.start()
        self._closed = False

    def _open(self) -> sqlite3.Connection:
        self._opened = self._connect()
        return self._opened

    @property
    def driver(self) -> sqlite3.Connection:
        """sqlite3's own connection, for use in the thread, after the first transaction has begun."""
        if self._opened is None:
            raise ValueError("expected a connection that is open, got: one that was closed")
        return self._opened

    @property
    def here(self) -> bool:
        """Whether the caller is in the thread."""
        return threading.get_ident() == self._thread.ident

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in the thread.

        A cancelled caller is cancelled only when that has ended, because the next one to get the connection would find
        a transaction open.
        """
        if self._closed:
            raise ValueError("expected an open connection, got: one that was closed")
        loop = asyncio.get_running_loop()
        ended: _Ended[T] = _Ended(loop=loop)
        self._calls.put(partial(_call, function, ended, loop))
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
        """Leave no transaction open, even if a commit has failed and SQLAlchemy takes it for ended; in the thread."""
        try:
            self.driver.rollback()
        except sqlite3.Error:
            if self._kept is not None:
                # Closing ends the transaction; the next one opens the file again.
                self._kept.invalidate()
                self._kept.close()
                self._kept = None

    def begun(self, begin: str) -> sqlalchemy.Connection:
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
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    async def close(self) -> None:
        """Close the connection and end the thread."""
        if not self._closed:
            try:
                await self.run(self._dispose)
            finally:
                self._closed = True
                self._calls.put(None)
                self._thread.join()


def _call(function: Callable[[], T], ended: _Ended[T], loop: asyncio.AbstractEventLoop) -> None:
    finish: Callable[[Any], None]
    result: Any
    try:
        finish, result = ended.set_result, function()
    except BaseException as error:  # noqa: BLE001 - raised where it is awaited
        if isinstance(error, DBAPIError) and _code(error) == CANTOPEN:
            vars(error.orig)[HANDLES_LEFT] = open_files.left()  # calls may free some before the error is judged
        finish, result = ended.set_exception, error
    with suppress(RuntimeError):  # the loop was closed, so nothing waits any more
        loop.call_soon_threadsafe(finish, result)
    del finish, result, function, ended  # the traceback of an error would keep them


class FileConnection:
    """SQLAlchemy's connection in its thread; from elsewhere each statement is a trip there."""

    def __init__(self, thread: FileThread, connection: sqlalchemy.Connection) -> None:
        self._thread = thread
        self.sync_connection = connection

    async def _call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        if self._thread.here:
            return function(*args, **options)
        return await self._thread.run(partial(function, *args, **options))

    async def execute(self, statement: Executable, parameters: Any = None, /) -> AnyResult:
        """Run a statement, once or for each of the parameters."""
        return await self._call(self.sync_connection.execute, statement, parameters)

    async def scalar(self, statement: Executable, parameters: Any = None, /) -> Any:
        """Run a statement and return the first column of its first row, None without one."""
        return await self._call(self.sync_connection.scalar, statement, parameters)

    async def exec_driver_sql(self, statement: str, parameters: Any = None, /) -> AnyResult:
        """Run text as sqlite3 takes it, with a tuple of parameters or a list of tuples."""
        return await self._call(self.sync_connection.exec_driver_sql, statement, parameters)

    async def run_sync(
        self, fn: Callable[Concatenate[sqlalchemy.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function with SQLAlchemy's connection."""
        return await self._call(fn, self.sync_connection, *args, **kwargs)

    async def fetch(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Have sqlite3 run text with these values in its places, and return all rows. Raises as `execute` does."""
        return await self._call(self.drive, statement, values)

    async def change(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        """Have sqlite3 run text for each of the rows, and return how many it changed. Raises as `execute` does."""
        return await self._call(self.drive_each, statement, rows)

    def drive(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Do the same as `fetch`, in the thread."""
        with _as_sqlalchemy():
            return self._cursor().execute(statement, values).fetchall()

    def drive_each(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do the same as `change`, in the thread."""
        with _as_sqlalchemy():
            return self._cursor().executemany(statement, rows).rowcount

    def _cursor(self) -> sqlite3.Cursor:
        return sqlite3.Connection.cursor(self._thread.driver, sqlite3.Cursor)


def _harmless(connection: sqlite3.Connection, _record: Any) -> None:
    # SQLAlchemy's, in Python: a check in the file could call it with a pattern that takes for ever.
    connection.create_function("regexp", 2, None)


@contextmanager
def _as_sqlalchemy() -> Iterator[None]:
    """Raise what SQLAlchemy would raise, without the statement and its values, which are a job's own."""
    try:
        yield
    except sqlite3.Error as error:
        raise DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True) from error


def _complete(work: Awaitable[T]) -> T:
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    steps.close()
    raise RuntimeError("expected a transaction to wait for its database alone, got: one that waits for more")


class FileConnections:
    """Connections to one file, opened when they are needed and at most `most`, each in a thread of its own.

    Their transactions start with `begin`, and they themselves run `pragmas` first. `options` are those of SQLite's
    URI file names; None for connections that may write. `changes` counts how often a connection was opened or closed.
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
        self._room = asyncio.Semaphore(most)
        self._free: list[FileThread] = []
        self._closed = False

    def _connect(self) -> sqlite3.Connection:
        self.changes += 1
        return self._open()

    async def transact(self, work: Callable[[Connection], Awaitable[T]], *, begin: str | None = None) -> T:
        """Run one transaction, in one trip. `work` may wait for nothing but its connection.

        `begin` None is that of all; with an empty one, the statements are in no transaction. Raises SQLAlchemy's errors.
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
    connection = sqlite3.connect(
        str(path) if options is None else f"{path.as_uri()}?{urlencode(options)}",
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


def _code(error: DBAPIError) -> int | None:
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def _is_exhausted(error: DBAPIError) -> bool:
    """Return whether no file handle is left: SQLite has the same code for a file that it may not open."""
    return _code(error) == CANTOPEN and vars(error.orig).get(HANDLES_LEFT, open_files.LOOK_UP) < open_files.LOOK_UP


def is_busy(error: Exception) -> bool:
    """Return whether another process held the file, or no file handle was left: both pass."""
    return isinstance(error, DBAPIError) and (_code(error) in {BUSY, LOCKED} or _is_exhausted(error))


def _reason(error: DBAPIError) -> str:
    code, words = _code(error), str(error.orig)
    if _is_exhausted(error):
        return open_files.exhausted_message()
    if code in REASONS:
        return REASONS[code]
    if (found := _UNDECODED.match(words)) is not None:  # what follows is the value, however long
        return f"expected text in UTF-8 in a column {found[1][:50]}, got: other bytes; {REPAIR}"
    if code == ERROR:
        return f"its tables are not those that lbr makes ({words[:200]}); restore a copy"
    return words


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except DBAPIError as error:
        if _code(error) in {BUSY, LOCKED}:
            raise DatabaseBusyError(
                f"another process has kept {path} locked for too long; find it with `fuser {path}`, then run again"
            ) from error
        raise DatabaseError(f"cannot use the database {path}: {_reason(error)}") from error
    except StatementError as error:  # its own words would show the statement, with all that was to be written
        raise MisfitError(
            f"cannot use the database {path}: it has a value of another type than lbr writes ({error.orig}); {REPAIR}"
        ) from error
    except SQLAlchemyError as error:
        raise DatabaseError(f"cannot use the database {path}: {error}") from error
    except UnicodeDecodeError as error:  # sqlite3's own words about a schema whose names are no text
        raise DatabaseError(f"cannot use the database {path}: its schema is damaged; restore a copy") from error
    except OverflowError as error:  # lbr's own numbers are far from it
        raise MisfitError(
            f"cannot use the database {path}: a number in it is so large that a sum with it is too large to write; {REPAIR}"
        ) from error
