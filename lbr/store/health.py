"""What the doctor reads of a queue, which may be in use, damaged, of another version or missing. Nothing here writes."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, LargeBinary, func, select, text
from sqlalchemy.types import Float

from lbr.store import migrations, schema
from lbr.store.addresses import is_postgresql, sqlite_path
from lbr.store.database import local_clock
from lbr.store.schema import INFLIGHT, jobs
from lbr.store.sqlite import HARMLESS, SQLiteDatabase, reading_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Column, Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.database import Database

PATIENCE = 5.0
"""Seconds that the doctor waits for a busy database at each step."""
MAX_DAMAGES = 5
_SETTINGS = text(
    "SELECT name, setting AS value FROM pg_settings UNION ALL SELECT 'standby', CAST(pg_is_in_recovery() AS text)"
)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """A PostgreSQL server: the settings of a session, with "standby", and by how much this machine's clock is ahead."""

    settings: dict[str, str]
    clock_ms: int


def open_unchanged(url: PathOrUrl, clock: Callable[[], Millis] | None = None) -> Database:
    """Return the queue at a path or URL, whatever is there, to read from it. Raises UsageError if it can be neither."""
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - its driver is an extra

        return postgres.PostgresDatabase(url, clock=clock, patience=PATIENCE)
    return _UnchangedDatabase(sqlite_path(url), clock=clock or local_clock, patience=PATIENCE)


def version(connection: Connection, now: Millis, database: Database) -> int:
    """Return the version of the schema, 0 for an empty database. Raises DatabaseError for another program's file."""
    if isinstance(database, SQLiteDatabase):
        return database.version(connection, now)
    return migrations.applied_version(connection)


def server_facts(connection: Connection, now: Millis, before: Millis) -> ServerFacts:
    """Return the state of the server; `before` is this machine's time just before."""
    settings = {row.name: row.value for row in connection.execute(_SETTINGS)}
    return ServerFacts(settings, max(0, before - now) or min(0, local_clock() - now))


def expired(connection: Connection, now: Millis) -> tuple[int, int]:
    """Return the number of expired leases, and the age of the oldest in milliseconds."""
    query = select(func.count(), func.min(jobs.c.lease_until)).where(INFLIGHT, jobs.c.lease_until < now)
    count, oldest = connection.execute(query).one()
    return count, now - oldest if count else 0


class _UnchangedDatabase(SQLiteDatabase):
    """A queue whose file and WAL stay as they are."""

    @cached_property
    def _reader(self) -> AsyncEngine:
        options = None  # the last connection to close removes the files that SQLite shares
        if self._wal.exists():
            options = {"mode": "ro"}  # takes no checkpoint when it closes
        elif not (may_write(self.path) and may_write(self.path.parent)):
            options = {"immutable": "1"}  # needs no file beside the database
        return reading_engine(self.path, options=options)


def damages(connection: Connection, _now: Millis) -> list[str]:
    """Return what SQLite's own check of the whole file finds."""
    found = connection.exec_driver_sql(f"PRAGMA integrity_check({MAX_DAMAGES})")
    lines = [" ".join(str(line).split()) for line in found.scalars().all()]
    return [] if lines == ["ok"] else lines


def may_write(path: Path) -> bool:
    """Return whether this user may write a file or a folder."""
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
