"""The SQLite queue: one file in WAL mode, with one writer at a time and checkpoints under a lock of our own."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import Timeout
from sqlalchemy.exc import DBAPIError

from lbr.core import ownership
from lbr.core.config import PATIENCE
from lbr.core.errors import AlreadyRunningError, DatabaseError
from lbr.store import files, schema
from lbr.store.addresses import sqlite_path, synchronous_in
from lbr.store.database import Database, local_clock, to_its_end
from lbr.store.leases import Presence
from lbr.store.sqlite_connection import (
    BEGIN_WRITING,
    BUSY_TIMEOUT_MS,
    READER_PRAGMAS,
    SCHEMA_ROWS,
    FileConnection,
    database_errors,
    foreign_code,
    is_busy,
    note_handles,
    reading_engine,
    writer_pragmas,
)

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.database import Work

T = TypeVar("T")

WAL_LIMIT_BYTES = 16 * 1024 * 1024
LARGE_WAL_BYTES = 4 * WAL_LIMIT_BYTES
"""From this size on, a checkpoint that a reader prevented is tried again sooner, and waits longer for the reader."""
CHECKPOINT_PAUSE_SECONDS, HASTY_PAUSE_SECONDS = 5.0, 1.0
READER_MS, HASTY_READER_MS = 100, 500
"""How long every writer waits, at a checkpoint, for a long reader."""


class SQLiteDatabase(Database):
    """An open SQLite queue: one connection that writes and one that polls, in a thread, and readers beside them."""

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
        folder = files.state_folder()  # for answers, if the database's own folder is full or gone
        places = [path] if folder is None else [path, folder / files.telling_name(str(path))]
        presence = presence or Presence(path)
        super().__init__(str(path), patience=patience, spool_places=places, presence=presence)
        self.path = path
        self._clock = clock
        # What a worker does all the time stays in one thread: the transactions that write, and the polls.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lbr-sqlite")
        self._writer = FileConnection(path, begin=BEGIN_WRITING, pragmas=writer_pragmas(synchronous, WAL_LIMIT_BYTES))
        self._poller = FileConnection(path, begin="BEGIN", pragmas=READER_PRAGMAS)
        self._identity: tuple[int, int] | None = None
        self._data_version = -1
        self._wal = Path(f"{path}-wal")
        self._log: tuple[int, int, int] | None = None
        """The log that the connection which writes has open, with how often it had been opened then."""
        self._checkpoint_lock = files.file_lock(files.lock_path(path, "checkpoint"), timeout=0)
        self._unfinished_checkpoint = float("-inf")

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
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _log_bytes(self) -> int:
        """Return the size of the log that we have just written to.

        Raises DatabaseError if it is no longer the one beside the file, because then no other process can read what we
        commit. `check_file` reports a file that went away with its log.
        """
        log: os.stat_result | None = None
        with suppress(FileNotFoundError):
            log = self._wal.stat()
        writer = self._writer.opened
        if self._log is None or self._log[0] != writer:
            self._log = None if log is None else (writer, log.st_dev, log.st_ino)
        elif (log is None or self._log[1:] != (log.st_dev, log.st_ino)) and self._found() == self._identity:
            raise DatabaseError(
                f"the log {self._wal} was {'removed' if log is None else 'replaced'} while in use, so that no other "
                f"process sees what is written: leave that file to lbr, and let no function copy or open {self.path}, "
                f"but by SQLite itself; then start again"
            )
        return 0 if log is None else log.st_size

    async def _write(self, work: Work[T]) -> T:
        return await self._in_thread(self._write_in_thread, work)

    def _write_in_thread(self, work: Work[T]) -> T:
        self.check_file()
        result = self._writer.transact(work, self._clock)
        self._checkpoint_if_large(self._log_bytes())
        return result

    async def _quick_read(self, work: Work[T]) -> T:
        return await self._in_thread(self._poller.transact, work, self._clock)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        try:
            # The end of the loop cancels all tasks at once, those that wait for others, too.
            return await to_its_end(asyncio.get_running_loop().run_in_executor(self._thread, function, *args))
        except DBAPIError as error:
            note_handles(error)
            raise

    async def _read(self, work: Work[T]) -> T:
        self.check_file()
        try:
            async with self._reader.connect() as connection:
                return await connection.run_sync(work, self._clock())
        except DBAPIError as error:
            note_handles(error)
            raise

    def _passes(self, error: Exception) -> bool:
        return is_busy(error)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.path)

    async def changed(self) -> bool:
        """Return whether another connection committed since the last call; it takes microseconds and no lock."""
        # Always on the same connection, because the number is compared with its earlier one.
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
        try:
            ownership.check_ours(files.lock_path(self.path, "checkpoint"), self.path)
            self._checkpoint_lock.acquire()
        except OSError:  # another process holds it (a Timeout), or this user may not open the file
            return
        try:
            complete = self._checkpoint(HASTY_READER_MS if hasty else READER_MS)
        finally:
            self._checkpoint_lock.release()
        if complete:
            self._unfinished_checkpoint = float("-inf")

    def _checkpoint(self, reader_ms: int) -> bool:
        try:
            self._writer.pragma(f"busy_timeout = {reader_ms}")
            return not self._writer.pragma("wal_checkpoint(TRUNCATE)")
        except DBAPIError:  # locked, or the disk is full; what does not pass, the next transaction reports
            return False
        finally:
            self._writer.pragma(f"busy_timeout = {BUSY_TIMEOUT_MS}")

    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""
        with self._errors():
            version = await self.quick_read(self.version) if self.path.exists() else 0
            self.check_version(version, create=create)
            if version == schema.LATEST:
                await self._in_thread(self._use_wal)
                return
            async with files.creation_lock(self.path):
                files.create_private(self.path)
                await self._in_thread(self._use_wal)
                await self.write(schema.migrate, self.presence.dead_workers)

    def _use_wal(self) -> None:
        """Let readers and the writer work side by side; the file keeps the mode."""
        if self._poller.pragma("journal_mode") != "wal":
            self._writer.pragma("journal_mode = WAL")

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
        return schema.applied_version(connection)

    async def close(self) -> None:
        """Close every connection, one that is in a transaction at the end of that."""
        for connection in (self._poller, self._writer):
            await self._in_thread(connection.close)
        self._thread.shutdown()
        if "_reader" in vars(self):
            await self._reader.dispose()


def _data_version(connection: Connection, _now: Millis) -> int:
    return int(connection.exec_driver_sql("PRAGMA data_version").scalar_one())


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
    presence: Presence | None = None
    if not allow_network_fs:
        files.refuse_network_file_system(path)
    elif files.is_network(files.file_system(path)):
        # A lock there may look free to other machines while it is held.
        presence = Presence()
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
    file = files.lock_path(path, "worker")
    lock = files.file_lock(file, timeout=0)
    try:
        ownership.check_ours(file, path)
        lock.acquire()
    except Timeout:
        raise AlreadyRunningError(f"an exclusive worker of {path} is running already; nothing to do") from None
    except OSError as error:
        raise DatabaseError(
            f"expected a lock for the exclusive worker at {lock.lock_file}, got: {error.strerror or error}; make the "
            f"file and its folder writable, or work as their owner"
        ) from error
    try:
        yield
    finally:
        lock.release()
