"""Connections to SQLite files: their pragmas, and how their transactions begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lbr.store import trips

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BUSY_TIMEOUT_MS = 2_500

# What a file's own schema says may call no function that could do harm.
HARMLESS = "PRAGMA trusted_schema = OFF"

READER_PRAGMAS = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    "PRAGMA query_only = ON",
    "PRAGMA mmap_size = 0",
    "PRAGMA cache_size = -16384",
)


def writer_pragmas(synchronous: str, wal_limit: int) -> tuple[str, ...]:
    """Return what a connection that writes begins with; `wal_limit`, in bytes, is what a checkpoint leaves of the WAL."""
    return (
        f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
        f"PRAGMA synchronous = {synchronous}",
        "PRAGMA wal_autocheckpoint = 0",
        f"PRAGMA journal_size_limit = {wal_limit}",
        "PRAGMA mmap_size = 0",
        "PRAGMA cache_size = -32768",
    )


def make_engine(
    path: Path,
    *,
    begin: str,
    pool_size: int,
    pragmas: tuple[str, ...],
    options: Mapping[str, str] | None = None,
) -> AsyncEngine:
    """Return an engine over a file whose transactions start with `begin` and whose connections run `pragmas`.

    `options` are those of SQLite's URI file names; None for a connection that may write.
    """
    # Not a string, in which a path's ? would begin a query.
    url = URL.create("sqlite+aiosqlite", database=str(path))
    if options is not None:
        url = URL.create("sqlite+aiosqlite", database=path.as_uri(), query={"uri": "true", **options})
    engine = create_async_engine(
        url,
        connect_args={
            "isolation_level": None,
            "timeout": BUSY_TIMEOUT_MS / 1000,
            "async_creator_fn": trips.connect,
        },
        pool_size=pool_size,
        max_overflow=0,
        pool_reset_on_return="rollback",
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _set_pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in (HARMLESS, *pragmas):
            cursor.execute(pragma)
        cursor.close()
        # SQLAlchemy's, in Python: a check in the file could call it with a pattern that takes for ever.
        connection.create_function("regexp", 2, None)

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:
        statement = connection.get_execution_options().get("lbr_begin", begin)
        if statement:
            connection.exec_driver_sql(statement)

    return engine
