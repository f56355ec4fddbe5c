"""The facts that the doctor judges, about a queue in use, damaged, of another version or missing. Nothing here writes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Integer, LargeBinary, func, select, text
from sqlalchemy.types import Float

from lbr.core.errors import LbrError
from lbr.store import counters, files, reads, schema
from lbr.store.addresses import is_postgresql, sqlite_path
from lbr.store.database import local_clock
from lbr.store.schema import INFLIGHT, jobs
from lbr.store.sqlite import HARMLESS, SQLiteDatabase, reading_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy import Column, Connection

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.counters import Drift
    from lbr.store.database import Database
    from lbr.store.reads import Overview

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that the doctor waits for a busy database at each step."""
MAX_DAMAGES = 5
OPENING = "database"
"""The check whose problem is that the queue cannot be opened."""
_SETTINGS = text(
    "SELECT name, setting AS value FROM pg_settings UNION ALL SELECT 'standby', CAST(pg_is_in_recovery() AS text)"
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The file of an SQLite queue from outside; `file_system` is None if the system does not report it.

    `modes` are the permissions of the database and SQLite's files beside it; `unwritable` are those files, locks and the
    folder that this user may not write.
    """

    path: Path
    file_system: str | None
    modes: dict[Path, int]
    unwritable: list[Path]
    wal_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """A PostgreSQL server: the settings of a session, with "standby", and by how much this machine's clock is ahead."""

    settings: dict[str, str]
    clock_ms: int


@dataclass(slots=True)
class Health:
    """Everything that was found out about a queue; None for what could not be read or does not apply.

    `refused`: the file is on a network file system and was not opened. `version`: the schema's, 0 for an empty database.
    `damages`: what SQLite's own check found. `expired`: the number of expired leases, and the age of the oldest in ms.
    `problems`: what could not be read, each with its check and the error.
    """

    name: str
    spool_places: Sequence[Path]
    file: FileFacts | None = None
    refused: bool = False
    server: ServerFacts | None = None
    version: int | None = None
    damages: list[str] | None = None
    view: Overview | None = None
    expired: tuple[int, int] | None = None
    drifts: list[Drift] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)

    async def look(self, check: str, at: Awaitable[T]) -> T | None:
        """Return a fact, or None with a problem noted under `check`: a damaged part must not hide the others."""
        try:
            return await at
        except LbrError as error:
            self.problems.append((check, str(error)))
        except Exception as error:  # noqa: BLE001 - a database may hold anything
            words = f"the tables hold values that lbr never writes ({type(error).__name__}: {error})"
            self.problems.append((check, words))
        return None


async def examine(
    url: PathOrUrl, *, allow_network_fs: bool = False, clock: Callable[[], Millis] | None = None
) -> Health:
    """Return the facts about the queue at a path or URL. Raises only UsageError, if it can be neither."""
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - its driver is an extra

        server = postgres.PostgresDatabase(url, clock=clock, patience=PATIENCE)
        health = Health(server.name, server.spool_places)
        await _examine_tables(server, health)
        return health
    path = sqlite_path(url)
    health = Health(str(path), SQLiteDatabase(path).spool_places)
    try:
        health.file = _file_facts(path)
        health.refused = files.is_network(health.file.file_system) and not allow_network_fs
        files.check_location(path, create=False)
        files.check_file(path)
    except (LbrError, OSError, ValueError) as error:
        health.problems.append((OPENING, str(error)))
        return health
    if not health.refused:
        await _examine_tables(_UnchangedDatabase(path, clock or local_clock), health)
    return health


async def _examine_tables(database: Database, health: Health) -> None:
    """Add the facts that are in the database, and close it."""
    try:
        health.version = await health.look(OPENING, database.read(_version, database))
        if health.version is not None and health.file is None:
            health.server = await health.look("server", database.read(_server_facts, local_clock()))
        elif health.version is not None:
            health.damages = await health.look("integrity", database.read(_damages))
        if health.version == schema.LATEST:
            health.view = await health.look("runs", database.read(reads.overview))
            health.expired = await health.look("leases", database.read(_expired))
            health.drifts = await health.look("counters", database.read(counters.recount))
    finally:
        await database.close()


def _version(connection: Connection, now: Millis, database: Database) -> int:
    if isinstance(database, SQLiteDatabase):
        return database.version(connection, now)
    return schema.applied_version(connection)


def _server_facts(connection: Connection, now: Millis, before: Millis) -> ServerFacts:
    settings = {row.name: row.value for row in connection.execute(_SETTINGS)}
    return ServerFacts(settings, max(0, before - now) or min(0, local_clock() - now))


def _expired(connection: Connection, now: Millis) -> tuple[int, int]:
    query = select(func.count(), func.min(jobs.c.lease_until)).where(INFLIGHT, jobs.c.lease_until < now)
    count, oldest = connection.execute(query).one()
    return count, now - oldest if count else 0


class _UnchangedDatabase(SQLiteDatabase):
    """A queue whose file and WAL stay as they are."""

    def __init__(self, path: Path, clock: Callable[[], Millis]) -> None:
        super().__init__(path, clock=clock, patience=PATIENCE)
        options = None  # the last connection to close removes the files that SQLite shares
        if self._wal.exists():
            options = {"mode": "ro"}  # takes no checkpoint when it closes
        elif not (_may_write(path) and _may_write(path.parent)):
            options = {"immutable": "1"}  # needs no file beside the database
        self._reader = reading_engine(path, options=options)


def _damages(connection: Connection, _now: Millis) -> list[str]:
    found = connection.exec_driver_sql(f"PRAGMA integrity_check({MAX_DAMAGES})")
    lines = [" ".join(str(line).split()) for line in found.scalars().all()]
    return [] if lines == ["ok"] else lines


def _file_facts(path: Path) -> FileFacts:
    regular = [one for suffix in files.SUFFIXES if os.path.isfile(one := Path(f"{path}{suffix}"))]
    locks = [files.lock_path(path, purpose) for purpose in ("checkpoint", "create", "worker")]
    used = [path.parent, path, *filter(os.path.exists, locks)]
    wal = Path(f"{path}-wal")
    return FileFacts(
        path=path,
        file_system=files.file_system(path),
        modes={one: stat.S_IMODE(one.stat().st_mode) for one in regular},
        unwritable=[one for one in used if not _may_write(one)],
        wal_bytes=wal.stat().st_size if wal in regular else 0,
        free_bytes=shutil.disk_usage(path.parent).free if os.path.isdir(path.parent) else 0,
    )


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def misfit(url: PathOrUrl) -> str | None:
    """Return which column of a file has a value of a type that lbr never writes; None if all fit or cannot be read.

    SQLite stores any value anywhere. It reads all rows, to explain an error that such a value may have caused.
    """
    if is_postgresql(url) or not (path := sqlite_path(url)).is_file():
        return None
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute(HARMLESS)
        for column in (column for table in schema.metadata.sorted_tables for column in table.columns):
            fitting = _fitting_types(column)
            typed = f'SELECT typeof("{column.name}") AS found FROM "{column.table.name}"'  # noqa: S608 - our own names
            query = f"SELECT found FROM ({typed}) WHERE found NOT IN ({', '.join('?' * len(fitting))}) LIMIT 1"  # noqa: S608
            if (found := connection.execute(query, fitting).fetchone()) is not None:
                return f"expected {column.name} of {column.table.name} to be {fitting[0]}, got: {found[0]}"
    return None


def _fitting_types(column: Column[Any]) -> list[str]:
    kinds = ((Integer, ["integer"]), (Float, ["real", "integer"]), (LargeBinary, ["blob"]))
    fitting = next((names for kind, names in kinds if isinstance(column.type, kind)), ["text"])
    return [*fitting, "null"] if column.nullable else fitting
