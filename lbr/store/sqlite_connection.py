"""Connections to an SQLite file: their pragmas, what goes past SQLAlchemy, and what their errors mean.

What every batch of jobs runs goes to sqlite3 directly, by `fetch` and `change`, because SQLAlchemy takes longer than most
of these statements.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import NullPool, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from lbr.core import open_files
from lbr.core.errors import DatabaseBusyError, DatabaseError, MisfitError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from lbr.core.types import Millis
    from lbr.store.database import Work
    from lbr.store.schema import AnyRow

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


def driver_of(connection: Connection) -> sqlite3.Connection | None:
    """Return sqlite3's own connection, None if it is in another thread or of another driver."""
    driver = connection.connection.driver_connection
    return driver if isinstance(driver, sqlite3.Connection) else None


def fetch(driver: sqlite3.Connection, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Have sqlite3 run text with these values in its places, and return all rows. Raises as SQLAlchemy does."""
    with _as_sqlalchemy():
        return driver.execute(statement, values).fetchall()


def change(driver: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> int:
    """Have sqlite3 run text for each of the rows, and return how many it changed. Raises as SQLAlchemy does."""
    with _as_sqlalchemy():
        return driver.executemany(statement, rows).rowcount


@contextmanager
def _as_sqlalchemy() -> Iterator[None]:
    """Raise what SQLAlchemy would raise, without the statement and its values, which are a job's own."""
    try:
        yield
    except sqlite3.Error as error:
        raise DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True) from error


class FileConnection:
    """A plain connection to a file, for use in one thread; its first transaction opens it.

    Its transactions start with `begin`, and it runs `pragmas` when it is opened, which `opened` counts.
    """

    def __init__(self, path: Path, *, begin: str, pragmas: Sequence[str]) -> None:
        self._path = path
        self._begin = begin
        self._pragmas = pragmas
        self._engine = create_engine("sqlite://", creator=self._open, poolclass=NullPool)
        event.listen(self._engine, "connect", _make_harmless)
        self._connection: Connection | None = None
        self.opened = 0

    def _open(self) -> sqlite3.Connection:
        self.opened += 1
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in (HARMLESS, *self._pragmas):
                connection.execute(pragma)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def transact(self, work: Work[T], clock: Callable[[], Millis]) -> T:
        """Run a transaction, from its beginning to its commit, or to its end by what `work` raises."""
        connection = self._connected()
        try:
            with connection.begin():
                connection.exec_driver_sql(self._begin)
                return work(connection, clock())
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Leave no transaction open, even if a commit has failed and SQLAlchemy takes it for ended."""
        driver = None if self._connection is None else driver_of(self._connection)
        try:
            if driver is not None:
                driver.rollback()
        except sqlite3.Error:
            self.close()  # which ends the transaction

    def pragma(self, text: str) -> Any:
        """Run a pragma outside of any transaction and return the first column of its first row, None without one."""
        driver = driver_of(self._connected())
        rows = [] if driver is None else fetch(driver, f"PRAGMA {text}")
        return rows[0][0] if rows else None

    def close(self) -> None:
        """Close it; the next transaction opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def reading_engine(path: Path, *, options: Mapping[str, str] | None = None) -> AsyncEngine:
    """Return an engine of a few connections that cannot write; `options` are those of SQLite's URI file names."""
    return file_engine(path, begin="BEGIN", pragmas=READER_PRAGMAS, most=4, options=options)


def file_engine(
    path: Path, *, begin: str, pragmas: Sequence[str], most: int = 1, options: Mapping[str, str] | None = None
) -> AsyncEngine:
    """Return an engine whose transactions start with `begin`, and whose connections run `pragmas` first."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - not every command reads this way

    url = URL.create("sqlite+aiosqlite", database=str(path))
    if options is not None:
        url = URL.create("sqlite+aiosqlite", database=path.as_uri(), query={**options, "uri": "true"})
    arguments = {"timeout": BUSY_TIMEOUT_MS / 1000, "isolation_level": None}
    engine = create_async_engine(url, pool_size=most, max_overflow=0, connect_args=arguments)

    def prepare(connection: Any, record: Any) -> None:
        _make_harmless(connection, record)
        for pragma in (HARMLESS, *pragmas):
            connection.execute(pragma)

    event.listen(engine.sync_engine, "connect", prepare)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _make_harmless(connection: Any, _record: Any) -> None:
    # SQLAlchemy's, in Python: a check in the file could call it with a pattern that takes for ever.
    connection.create_function("regexp", 2, None)


def _code(error: DBAPIError) -> int | None:
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def _is_exhausted(error: DBAPIError) -> bool:
    """Return whether no file handle is left: SQLite has the same code for a file that it may not open."""
    return _code(error) == CANTOPEN and vars(error.orig).get(HANDLES_LEFT, open_files.LOOK_UP) < open_files.LOOK_UP


def note_handles(error: DBAPIError) -> None:
    """Note in an error about a file that could not be opened how many file handles are left just now."""
    if _code(error) == CANTOPEN:
        vars(error.orig)[HANDLES_LEFT] = open_files.left()


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
