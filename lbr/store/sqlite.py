"""The SQLite queue: one file in WAL mode, with one writer at a time and checkpoints under a lock of our own."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import Timeout
from sqlalchemy import StaticPool, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from lbr.core import open_files
from lbr.core.config import PATIENCE
from lbr.core.errors import AlreadyRunningError, DatabaseBusyError, DatabaseError, MisfitError, OutputError, UsageError
from lbr.store import files, migrations, schema
from lbr.store.addresses import sqlite_path, synchronous_in
from lbr.store.database import Database, local_clock, to_its_end
from lbr.store.leases import Presence
from lbr.store.sql import fetch

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.database import Work
    from lbr.store.schema import AnyRow

T = TypeVar("T")

WAL_LIMIT_BYTES = 16 * 1024 * 1024
LARGE_WAL_BYTES = 4 * WAL_LIMIT_BYTES
"""From this size on, a checkpoint that a reader prevented is tried again sooner, and waits longer for the reader."""
CHECKPOINT_PAUSE_SECONDS, HASTY_PAUSE_SECONDS = 5.0, 1.0
READER_MS, HASTY_READER_MS = 100, 500
"""How long every writer waits, at a checkpoint, for a long reader."""
BUSY_TIMEOUT_MS = 2_500
COPY_PAGES = 1_000
"""How many pages of a backup are copied between looks at whether it was interrupted."""
VACUUM_PAGES, VACUUM_PAUSE_SECONDS = 500, 0.05
"""How many free pages a transaction gives back, in tens of milliseconds, and how long others have their turn then."""
BEGIN_WRITING = "BEGIN IMMEDIATE"
"""Begins a transaction that has the file's lock from its beginning."""
HARMLESS = "PRAGMA trusted_schema = OFF"
"""What a file's own schema contains may call no function that could do harm."""
SCHEMA_ROWS = "SELECT type, name, rootpage FROM sqlite_master"
READER_PRAGMAS = ("PRAGMA query_only = ON", "PRAGMA mmap_size = 0", "PRAGMA cache_size = -16384")

BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
REASONS = {
    sqlite3.SQLITE_READONLY: "it is read-only; make the file and its folder writable",
    sqlite3.SQLITE_IOERR: "the disk reported an error",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a copy, or enqueue into a new one",
    sqlite3.SQLITE_FULL: "the disk is full; make room and run the same command again",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the path and the permissions of the file and its folder",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database; name another path",
}
REPAIR = "restore a copy, or fix that value"
_UNDECODED = re.compile(r"Could not decode to UTF-8 column '([^']*)'")


class SQLiteDatabase(Database):
    """An open SQLite queue: one connection in a thread, for what a worker does all the time, and readers beside it."""

    one_writer = True

    def __init__(
        self,
        path: Path,
        *,
        synchronous: str = "FULL",
        clock: Callable[[], Millis] = local_clock,
        patience: float = PATIENCE,
        presence: Presence | None = None,
    ) -> None:
        places = [path, *files.state_places(str(path))]  # the others if the database's folder is full or gone
        super().__init__(str(path), patience=patience, spool_places=places, presence=presence or Presence(path))
        self.path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lbr-sqlite")
        self._engine = create_engine("sqlite://", creator=self._open, poolclass=StaticPool)
        _prepare(
            self._engine,
            f"PRAGMA synchronous = {synchronous}",
            "PRAGMA wal_autocheckpoint = 0",
            f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}",
            "PRAGMA mmap_size = 0",
            "PRAGMA cache_size = -32768",
        )
        self._identity: tuple[int, int] | None = None
        self._data_version = -1
        self._wal = Path(f"{path}-wal")
        self._log: tuple[int, int] | None = None
        """The log that the connection in the thread has open."""
        self._unfinished_checkpoint = float("-inf")

    def _open(self) -> sqlite3.Connection:
        self._log, self._data_version = None, -1
        return sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False)

    @cached_property
    def _reader(self) -> AsyncEngine:
        return reading_engine(self.path)  # made for the first read: importing what it needs takes a tenth of a second

    def check_file(self) -> None:
        """Raise DatabaseError if the file that we have open is no longer the one at its path."""
        identity = self._found()
        if self._identity is None:
            self._identity = identity
        if identity is None or identity != self._identity:
            # SQLite would take the old file's log for the new one's, and write its pages into it.
            log = identity is not None and self._wal.exists()
            raise DatabaseError(
                f"the database {self.path} was {'removed' if identity is None else 'replaced'} while in use; "
                f"what was written to it is gone with it: put it back, or enqueue again"
                + f". Unless it came with the new file, remove {self._wal} first, which would damage it"
                * log
            )

    def _found(self) -> tuple[int, int] | None:
        return _identity_of(_stat(self.path))

    def _log_bytes(self) -> int:
        """Return the size of the log that we have just written to.

        Raises DatabaseError if it is no longer the one beside the file, because then no other process can read what we
        commit. `check_file` reports a file that went away with its log.
        """
        log = _stat(self._wal)
        if _identity_of(log) != self._log and self._found() == self._identity:
            raise DatabaseError(
                f"the log {self._wal} was {'removed' if log is None else 'replaced'} while in use, so that no other "
                f"process sees what is written: leave that file to lbr, and let no function copy or open {self.path}, "
                f"but by SQLite itself; then start again"
            )
        return 0 if log is None else log.st_size

    def _write(self, work: Work[T]) -> Awaitable[T]:
        return self._in_thread(self._write_in_thread, work)

    def _write_in_thread(self, work: Work[T]) -> T:
        self.check_file()
        result = self._transact(BEGIN_WRITING, work)
        self._data_version = -1  # our own commits count as changes
        self._checkpoint_if_large(self._log_bytes())
        return result

    def _quick_read(self, work: Work[T]) -> Awaitable[T]:
        return self._in_thread(self._transact, "BEGIN", work)

    def _transact(self, begin: str, work: Work[T]) -> T:
        # Whatever fails, the pool rolls back, and opens another connection if it cannot.
        with self._engine.begin() as connection:
            connection.exec_driver_sql(begin)
            result = work(connection, self._clock())
        self._log = self._log or _identity_of(_stat(self._wal))
        return result

    def _pragma(self, text: str) -> Any:
        """Run a pragma outside of any transaction and return the first column of its first row, None without one."""
        with self._engine.connect() as connection:
            found = connection.exec_driver_sql(f"PRAGMA {text}")
            return found.scalar() if found.returns_rows else None

    def _in_thread(self, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        # Not a task: the end of the loop cancels all of these at once, those that wait for others, too.
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _read(self, work: Work[T]) -> T:
        self.check_file()
        async with self._reader.connect() as connection:
            return await connection.run_sync(work, self._clock())

    def _passes(self, error: Exception) -> bool:
        """Return whether another process held the file, or no file handle was left."""
        return isinstance(error, DBAPIError) and (_code(error) in BUSY_CODES or _is_exhausted(error))

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.path)

    async def changed(self) -> bool:
        """Return whether a transaction was committed since the last call; it takes microseconds and no lock."""
        version = await self.quick_read(_data_version)
        before, self._data_version = self._data_version, version
        return before != version

    async def filled(self) -> None:
        """Do nothing: the plans do not depend on statistics."""

    def _checkpoint_if_large(self, size: int) -> None:
        """Move the WAL into the file, in one process at a time and in a mode that holds the write lock.

        SQLite before 3.51.3 can corrupt a database when a commit falls between two checkpoints that follow each
        other closely; with its own checkpoints off, and ours under a lock, that cannot happen. A checkpoint that fails
        is no error, because the transaction before it is committed.
        """
        hasty = size >= LARGE_WAL_BYTES
        pause = HASTY_PAUSE_SECONDS if hasty else CHECKPOINT_PAUSE_SECONDS
        if size < WAL_LIMIT_BYTES or time.monotonic() < self._unfinished_checkpoint + pause:
            return
        self._unfinished_checkpoint = time.monotonic()
        # Another process may hold the lock, or this user may not open its file. The file may be locked, or the disk
        # full: what does not pass, the next transaction reports.
        with suppress(OSError, DBAPIError), files.locked(self.path, "checkpoint"):
            try:
                self._pragma(f"busy_timeout = {HASTY_READER_MS if hasty else READER_MS}")
                if not self._pragma("wal_checkpoint(TRUNCATE)"):
                    self._unfinished_checkpoint = float("-inf")
            finally:
                self._pragma(f"busy_timeout = {BUSY_TIMEOUT_MS}")

    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""
        with self._errors():
            version = await self.quick_read(self.version) if self.path.exists() else 0
            self.check_version(version, create=create)
            if version == migrations.LATEST:
                await self._in_thread(self._use_wal)
                return
            async with files.creation_lock(self.path):
                files.create_private(self.path)
                if not version:  # later, only VACUUM changes it
                    await self._in_thread(self._pragma, "auto_vacuum = INCREMENTAL")
                await self._in_thread(self._use_wal)
                await self.write(migrations.migrate, self.presence.dead_workers)

    def _use_wal(self) -> None:
        """Let readers and the writer work side by side; the file keeps the mode."""
        if self._pragma("journal_mode") != "wal":
            self._pragma("journal_mode = WAL")

    async def give_back_space(self) -> None:
        """Return free pages to the file system. Does nothing in files of older versions, which keep them for later rows."""
        left = await self.write(_vacuum)
        while left:
            left = await self.write(_vacuum)
            await asyncio.sleep(VACUUM_PAUSE_SECONDS)

    async def backup(self, target: Path) -> None:
        """Copy the file as it is at one moment to a new one, while others write. Raises as `lbr.store.database.backup`."""
        self.check_version(await self.quick_read(self.version), create=False)
        copying = asyncio.ensure_future(self._in_thread(self._copy, target))
        try:
            with self._errors():
                await asyncio.shield(copying)
        except asyncio.CancelledError:
            self.give_up()
            copying.add_done_callback(lambda ended: ended.exception())  # else Python would print it
            raise
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot copy {self.path} to {target}: {reason}; nothing was written there") from error

    def _copy(self, target: Path) -> None:
        def check(*_: int) -> None:
            if self._given_up:
                raise InterruptedError

        # One reading transaction: between steps without it, each commit of a worker would make SQLite begin again.
        with files.new_private(target) as (part, _), self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN")
            connection.exec_driver_sql(SCHEMA_ROWS).all()
            # Without locks, because no process knows the file yet, and it may be on a network file system.
            with closing(sqlite3.connect(f"{part.as_uri()}?nolock=1", uri=True)) as copy:
                copy.execute("PRAGMA journal_mode = OFF")
                driver: Any = connection.connection.driver_connection
                driver.backup(copy, pages=COPY_PAGES, progress=check)
            files.check_new(target)  # the name may be taken by now

    def version(self, connection: Connection, _now: Millis) -> int:
        """Return the schema's version, 0 for an empty file; DatabaseError for another program's."""
        found = connection.exec_driver_sql(SCHEMA_ROWS).all()
        tables = [row.name for row in found if row.type == "table"]
        if tables and "schema_version" not in tables:
            raise DatabaseError(
                f"expected an lbr database at {self.path}, got: a SQLite file of another program, with tables {', '.join(tables[:5])}; "
                f"name another path"
            )
        if running := foreign_code(found, schema.metadata.tables):
            raise DatabaseError(
                f"expected an lbr database at {self.path}, got: one with {running}, which would run in lbr's "
                f"transactions and which lbr never makes; drop what another program has added, or restore a copy"
            )
        return migrations.applied_version(connection)

    async def close(self) -> None:
        """Close every connection, one that is in a transaction at the end of that."""
        await to_its_end(self._in_thread(self._engine.dispose))
        self._thread.shutdown()
        if "_reader" in vars(self):
            await self._reader.dispose()


def _vacuum(connection: Connection, _now: Millis) -> int:
    """Give some free pages back; return how many are left, 0 if the file was made without that."""
    driver: Any = connection.connection.driver_connection
    if fetch(driver, "PRAGMA auto_vacuum") != [(2,)]:
        return 0
    for _ in range(VACUUM_PAGES):
        fetch(driver, "PRAGMA incremental_vacuum(1)")  # Python would run a larger number for one page only
    return int(fetch(driver, "PRAGMA freelist_count")[0][0])


def _data_version(connection: Connection, _now: Millis) -> int:
    return int(connection.exec_driver_sql("PRAGMA data_version").scalar_one())


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _identity_of(found: os.stat_result | None) -> tuple[int, int] | None:
    return None if found is None else (found.st_dev, found.st_ino)


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


def reading_engine(path: Path, *, options: Mapping[str, str] | None = None) -> AsyncEngine:
    """Return an engine of a few connections that cannot write; `options` are those of SQLite's URI file names."""
    return file_engine(path, "BEGIN", *READER_PRAGMAS, most=4, options=options)


def file_engine(
    path: Path, begin: str, *pragmas: str, most: int = 1, options: Mapping[str, str] | None = None
) -> AsyncEngine:
    """Return an engine whose transactions start with `begin`, and whose connections run `pragmas` first."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - not every command reads this way

    url = URL.create("sqlite+aiosqlite", database=str(path))
    if options is not None:
        url = URL.create("sqlite+aiosqlite", database=path.as_uri(), query={**options, "uri": "true"})
    arguments = {"timeout": BUSY_TIMEOUT_MS / 1000, "isolation_level": None}
    engine = create_async_engine(url, pool_size=most, max_overflow=0, connect_args=arguments)
    _prepare(engine.sync_engine, *pragmas)
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _prepare(engine: Engine, *pragmas: str) -> None:
    """Run these pragmas on every new connection of an engine, and let the file's own schema do no harm."""

    def prepare(connection: Any, _record: Any) -> None:
        # SQLAlchemy's, in Python: a check in the file could call it with a pattern that takes for ever.
        try:
            connection.create_function("regexp", 2, None)
            for pragma in (HARMLESS, *pragmas):
                connection.execute(pragma)
        except BaseException:  # of what is no database, above all; the pool would forget the connection
            connection.close()
            raise

    event.listen(engine, "connect", prepare)


def _code(error: DBAPIError) -> int | None:
    """Return the primary result code of SQLite, https://sqlite.org/rescode.html; None for another driver's error."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def _is_exhausted(error: DBAPIError) -> bool:
    """Return whether no file handle is left: SQLite has the same code for a file that it may not open."""
    return _code(error) == sqlite3.SQLITE_CANTOPEN and open_files.left() < open_files.LOOK_UP


def _reason(error: Exception) -> str:
    if isinstance(error, DBAPIError):
        code, words = _code(error), str(error.orig)
        if _is_exhausted(error):
            return open_files.exhausted_message()
        if code in REASONS:
            return REASONS[code]
        if (found := _UNDECODED.match(words)) is not None:  # what follows is the value, however long
            return f"expected text in UTF-8 in a column {found[1][:50]}, got: other bytes; {REPAIR}"
        if code == sqlite3.SQLITE_ERROR:
            return f"its tables are not those that lbr makes ({words[:200]}); restore a copy"
        return words
    if isinstance(error, StatementError):  # its own words would show the statement, with all that was to be written
        return f"it has a value of another type than lbr writes ({error.orig}); {REPAIR}"
    if isinstance(error, UnicodeDecodeError):  # sqlite3's own words about a schema whose names are no text
        return "its schema is damaged; restore a copy"
    if isinstance(error, OverflowError):  # lbr's own numbers are far from it
        return f"a number in it is so large that a sum with it is too large to write; {REPAIR}"
    return str(error)


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except (SQLAlchemyError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, DBAPIError) and _code(error) in BUSY_CODES:
            raise DatabaseBusyError(
                f"another process has kept {path} locked for too long; find it with `fuser {path}`, then run again"
            ) from error
        is_misfit = isinstance(error, OverflowError | StatementError) and not isinstance(error, DBAPIError)
        kind = MisfitError if is_misfit else DatabaseError
        raise kind(f"cannot use the database {path}: {_reason(error)}") from error


def open_sqlite(
    url: PathOrUrl,
    *,
    create: bool,
    allow_network_fs: bool,
    clock: Callable[[], Millis] | None,
    patience: float,
) -> SQLiteDatabase:
    """Return the queue in a file, not yet connected; see `lbr.store.database.open_database`."""
    path = sqlite_path(url)
    synchronous = synchronous_in(url)
    files.check_location(path, create=create)
    files.check_file(path)
    kind = files.file_system(path)
    if not allow_network_fs and files.is_network(kind):
        raise UsageError(
            f"expected {path} on a local disk, got: a network file system ({kind}), whose locks can fail and "
            f"corrupt the database; {files.NETWORK_WAYS}, or insist with --allow-network-fs"
        )
    # A lock there may look free to other machines while it is held.
    presence = Presence() if files.is_network(kind) else None
    return SQLiteDatabase(
        path, synchronous=synchronous, clock=clock or local_clock, patience=patience, presence=presence
    )


@asynccontextmanager
async def sole_worker(url: PathOrUrl) -> AsyncIterator[None]:
    """Hold the lock of the queue's exclusive worker, which the kernel frees.

    Raises AlreadyRunningError if another process holds it, DatabaseError if it cannot be opened.
    """
    path = sqlite_path(url)
    files.check_location(path, create=False)
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, "worker"))
        except Timeout:
            raise AlreadyRunningError(f"an exclusive worker of {path} is running already; nothing to do") from None
        except OSError as error:
            raise DatabaseError(
                f"expected a lock for the exclusive worker at {files.lock_path(path, 'worker')}, got: "
                f"{error.strerror or error}; make the file and its folder writable, or work as their owner"
            ) from error
        yield
