"""The SQLite queue: one file in WAL mode, its errors, and checkpoints in our own hands."""

from __future__ import annotations

import asyncio
import os
import re
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import Timeout
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from lbr.core import ownership
from lbr.core.config import PATIENCE, a_name
from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.store import files, schema
from lbr.store.database import Database, local_clock, to_its_end
from lbr.store.file_connections import (
    BUSY_TIMEOUT_MS,
    READER_PRAGMAS,
    SCHEMA_ROWS,
    FileConnections,
    foreign_code,
    writer_pragmas,
)
from lbr.store.file_errors import database_errors, is_busy
from lbr.store.presence import FilePresence, Presence
from lbr.store.trips import BEGIN_WRITING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager

    from lbr.core.types import Millis, PathOrUrl, RunId
    from lbr.store.connection import Connection

T = TypeVar("T")

WAL_LIMIT_BYTES = 16 * 1024 * 1024
LARGE_WAL_BYTES = 4 * WAL_LIMIT_BYTES
"""From here on a checkpoint that a reader was in the way of is tried again sooner, and waits longer for it."""
CHECKPOINT_PAUSE_SECONDS, HASTY_PAUSE_SECONDS = 5.0, 1.0
READER_MS, HASTY_READER_MS = 100, 500
"""How long every writer waits, at a checkpoint, for a long reader."""

_ALMOST_POSTGRESQL = re.compile(r"postgres(ql)?\b.*@", re.IGNORECASE)


def sqlite_path(url: PathOrUrl, *, name: str = "--db") -> Path:
    """Return the file that a path or SQLite URL names; UsageError for anything else. Passwords are not shown.

    `name` is what messages call the option.
    """
    url = os.fspath(url)
    if _ALMOST_POSTGRESQL.match(url):  # and perhaps with a password in it
        raise UsageError(
            f"expected {name} to be a path or a database URL, got: something that is nearly a PostgreSQL URL; "
            "write postgresql://user@host/database"
        )
    path = _path_in(url, name) if "://" in url else url
    if not path.strip() or path == ":memory:":
        raise UsageError(
            f"expected {name} to name a file, got: {path!r}; processes share the queue through it"
        )
    try:
        found = Path(a_name(name, path)).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(
            f"expected {name} to name a file, got: {path!r}, in the home of a user who is not known here; "
            f"write ./{path} for a file of that name"
        ) from error
    if not found.name:
        raise UsageError(f"expected {name} to name a file, got: the folder {path}")
    ownership.refuse_foreign_link(str(found))
    # SQLite keeps the WAL beside the file, not beside a link to it; so must we, and our locks.
    return Path(os.path.realpath(found)) if os.path.islink(found) else found


def _path_in(url: str, name: str) -> str:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number is the second; its words show the URL
        raise UsageError(
            f"expected {name} to be a path or a database URL, got: something unreadable; write sqlite:///runs.db"
        ) from None
    if parsed.get_backend_name() != "sqlite":
        raise UsageError(
            f"expected {name} to be a path, an sqlite or a postgresql URL, got: a {parsed.drivername} URL"
        )
    unknown = sorted(set(parsed.query) - {"synchronous"})
    if parsed.host or unknown:
        more = "a host" if parsed.host else f"the options {', '.join(unknown)}"
        raise UsageError(f"expected an sqlite URL with a path alone, got: {more}; write sqlite:///runs.db")
    return parsed.database or ""


def _synchronous_in(url: PathOrUrl) -> str:
    """Return the durability that a URL asks for: FULL, or NORMAL, which may lose the last commits to a power cut."""
    url = os.fspath(url)
    asked = make_url(url).query.get("synchronous", "FULL") if "://" in url else "FULL"
    if asked not in {"FULL", "NORMAL"}:
        raise UsageError(f"expected synchronous to be FULL or NORMAL, got: {asked!r}")
    return str(asked)


class SQLiteDatabase(Database):
    """An open SQLite queue: one writing connection, and readers that cannot write."""

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
        places = [path, *_elsewhere(path)]
        presence = presence or FilePresence(path)
        super().__init__(str(path), patience=patience, spool_places=places, presence=presence)
        self.path = path
        self._clock = clock
        self._writer = FileConnections(
            path, begin=BEGIN_WRITING, most=1, pragmas=writer_pragmas(synchronous, WAL_LIMIT_BYTES)
        )
        self._reader = FileConnections(path, begin="BEGIN", most=4, pragmas=READER_PRAGMAS)
        self._watch = FileConnections(path, begin="", most=1, pragmas=READER_PRAGMAS)
        self._identity: tuple[int, int] | None = None
        self._write_lock = asyncio.Lock()
        self._data_version = -1
        self._wal = Path(f"{path}-wal")
        self._log: tuple[int, int, int] | None = None
        """The log that the connection which writes has open, with the `changes` that led to that."""
        self._checkpoint_lock = files.file_lock(files.lock_path(path, "checkpoint"), timeout=0)
        self._unfinished_checkpoint = float("-inf")

    async def now(self, connection: Connection) -> Millis:
        """Return the time that leases are compared with: SQLite's users share one machine and its clock."""
        return self._clock()

    def check_file(self) -> None:
        """Raise DatabaseError where the file that we have open is no longer the one at its path."""
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

        Raises DatabaseError where it is not the one beside the file any more, for then nobody else can read what we
        commit. A file that went away with its log is for `check_file` to tell: it has everything.
        """
        log: os.stat_result | None = None
        with suppress(FileNotFoundError):
            log = self._wal.stat()
        writer = self._writer.changes
        if self._log is None or self._log[0] != writer:
            self._log = None if log is None else (writer, log.st_dev, log.st_ino)
        elif (log is None or self._log[1:] != (log.st_dev, log.st_ino)) and self._found() == self._identity:
            raise DatabaseError(
                f"the log {self._wal} was {'removed' if log is None else 'replaced'} while in use, so that no other "
                f"process sees what is written: leave that file to lbr, and let no function copy or open {self.path}, "
                f"but by SQLite itself; then start again"
            )
        return 0 if log is None else log.st_size

    async def write(self, work: Callable[[Connection], Awaitable[T]], *, beside: bool = False) -> T:
        """Run one transaction, `_retried`, when its turn has come; each try `to_its_end`."""
        del beside  # a file takes one writer at a time

        async def once() -> T:
            async with self._write_lock:
                self.check_file()
                result = await self._writer.transact(work)
                await self._checkpoint_if_large(self._log_bytes())
            return result

        return await self._retried(lambda: to_its_end(once()))

    async def _read(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        return await self._reader.transact(work)

    def _passes(self, error: Exception) -> bool:
        return is_busy(error)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.path)

    async def at_one_moment(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run it in the transaction itself, whose lock lets nobody else write."""
        return await work(connection)

    async def changed(self) -> bool:
        """Tell whether anybody committed since the last call; it costs microseconds and takes no lock."""
        # Always by the same connection, whose own view is what it counts for.
        found = await self._retried(
            lambda: self._watch.transact(lambda watch: watch.exec_driver_sql("PRAGMA data_version"))
        )
        with self._errors():
            version = found.scalar_one()
        before, self._data_version = self._data_version, version
        return bool(before != version)

    async def reserve_job_ids(self, connection: Connection, count: int) -> Sequence[int]:
        """Return `count` ids that no job has or had; the write lock keeps them ours."""
        # SQLite keeps the highest id that there was, where another program can write anything.
        seq = "SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = 'jobs'"
        kept = (await connection.exec_driver_sql(seq)).scalar() or 0
        there = (await connection.exec_driver_sql("SELECT max(id) FROM jobs")).scalar() or 0
        first = max(kept, there) + 1
        return range(first, first + count)

    async def wake(self, connection: Connection) -> None:
        """Do nothing: every commit is seen by those who poll."""

    async def take_turns(self, connection: Connection, run_id: RunId) -> None:
        """Do nothing: whoever writes holds the lock of the whole file."""

    async def filled(self) -> None:
        """Do nothing: the plans do not depend on statistics."""

    async def _checkpoint_if_large(self, size: int) -> None:
        """Move the WAL into the file, in one process at a time and in a mode that holds the write lock.

        SQLite before 3.51.3 can corrupt a database when a commit falls between two checkpoints that follow each
        other closely; with its own checkpoints off, and ours under a lock, that cannot happen.

        The transaction before is committed, and its caller must hear so: what keeps a checkpoint back, the doctor tells.
        """
        hasty = size >= LARGE_WAL_BYTES
        pause = HASTY_PAUSE_SECONDS if hasty else CHECKPOINT_PAUSE_SECONDS
        if size < WAL_LIMIT_BYTES or time.monotonic() < self._unfinished_checkpoint + pause:
            return
        self._unfinished_checkpoint = time.monotonic()
        try:
            ownership.check_ours(files.lock_path(self.path, "checkpoint"), self.path)
            self._checkpoint_lock.acquire()
        except OSError:  # somebody holds it, which is a Timeout, or it is a file that this user may not open
            return
        try:
            complete = await self._checkpoint(HASTY_READER_MS if hasty else READER_MS)
        finally:
            self._checkpoint_lock.release()
        if complete:
            self._unfinished_checkpoint = float("-inf")

    async def _checkpoint(self, reader_ms: int) -> bool:
        async def work(connection: Connection) -> bool:
            await connection.exec_driver_sql(f"PRAGMA busy_timeout = {reader_ms}")
            try:
                return not (await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one()[0]
            except DBAPIError:
                # Locked, or no room for what is to be moved. The transaction before is committed all the same, and
                # its caller must hear so; what does not pass by itself the next one tells.
                return False
            finally:
                await connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

        return await self._writer.transact(work, begin="")

    async def prepare(self, *, create: bool) -> None:
        """Make sure the tables are there and current: older ones are upgraded, missing ones created only with `create`."""
        with self._errors():
            version = await self.read(self.version) if self.path.exists() else 0
            if version > schema.LATEST:
                raise DatabaseError(
                    f"expected {self.path} at schema version {schema.LATEST} or older, got: {version}; a newer lbr "
                    f"wrote it: use that one"
                )
            if version == schema.LATEST:
                await self._use_wal()
                return
            if not create and version == 0:
                raise UsageError(
                    f"expected an lbr database at {self.path}, got: an empty one; `lbr enqueue` fills it"
                )
            async with files.creation_lock(self.path):
                files.create_private(self.path)
                await self._use_wal()
                await self.write(
                    lambda connection: connection.run_sync(
                        schema.migrate, self._clock(), self.presence.dead_workers
                    )
                )

    async def _use_wal(self) -> None:
        """Let readers and the writer work side by side. It is kept in the file, so this is nearly always a look."""
        mode = await self._reader.transact(
            lambda connection: connection.exec_driver_sql("PRAGMA journal_mode"), begin=""
        )
        if mode.scalar() != "wal":
            await self._writer.transact(
                lambda connection: connection.exec_driver_sql("PRAGMA journal_mode = WAL"), begin=""
            )

    async def version(self, connection: Connection) -> int:
        """Return the schema's version, 0 for an empty file; DatabaseError for another program's."""
        found = (await connection.exec_driver_sql(SCHEMA_ROWS)).all()
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
        return await connection.run_sync(schema.applied_version)

    async def close(self) -> None:
        """Close every connection."""
        for kind in (self._watch, self._reader, self._writer):
            await kind.close()


def _elsewhere(path: Path) -> list[Path]:
    """Return where to keep answers when the database's own folder is full or gone."""
    folder = files.state_folder()
    return [] if folder is None else [folder / files.telling_name(str(path))]


def open_sqlite(
    url: PathOrUrl,
    *,
    create: bool,
    allow_network_fs: bool,
    clock: Callable[[], Millis] | None,
    patience: float,
) -> SQLiteDatabase:
    """Open the queue in a file; see `lbr.store.engines.open_database`."""
    path = sqlite_path(url)
    synchronous = _synchronous_in(url)
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

    Raises AlreadyRunningError where another one holds it, DatabaseError where it cannot be had.
    """
    path = sqlite_path(url)
    files.check_location(path, create=False)
    file = files.lock_path(path, "worker")
    lock = files.file_lock(file, timeout=0)
    try:
        ownership.check_ours(file, path)
        lock.acquire()
    except Timeout:
        raise AlreadyRunningError(
            f"an exclusive worker of {path} is running already; nothing to do"
        ) from None
    except OSError as error:
        raise DatabaseError(
            f"expected a lock for the exclusive worker at {lock.lock_file}, got: {error.strerror or error}; make the "
            f"file and its folder writable, or work as their owner"
        ) from error
    try:
        yield
    finally:
        lock.release()
