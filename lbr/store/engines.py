"""The door to the databases: which kind a URL names, and everything that is done before one is open.

This module, the two beside it, `sqlite` and `postgres`, and `arrays` know the kinds of database by name; the
rest of the store knows `lbr.store.database.Database`.
"""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from lbr.core.config import PATIENCE
from lbr.store import file_errors, files, sqlite
from lbr.store.addresses import address_of, is_postgresql
from lbr.store.database import to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.database import Database


async def open_database(
    url: PathOrUrl,
    *,
    create: bool = False,
    allow_network_fs: bool = False,
    clock: Callable[[], Millis] | None = None,
    patience: float = PATIENCE,
) -> Database:
    """Open the queue at a path or URL; with `create`, make or upgrade it first.

    `clock` None is the one that the database goes by: this machine's for a file, the server's for PostgreSQL.
    `patience` is for how many seconds a transaction is tried again while the database is busy or away.

    Raises UsageError for a URL or path that cannot be one, DatabaseError for what is no lbr database, is
    damaged, does not answer, or was written by a newer version. Nothing is created on an error or without `create`.
    """
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - its driver is an extra

        database: Database = postgres.open_postgres(url, clock=clock, patience=patience)
    else:
        database = sqlite.open_sqlite(
            url, create=create, allow_network_fs=allow_network_fs, clock=clock, patience=patience
        )
    try:
        await database.prepare(create=create)
    except BaseException:
        await database.close()
        raise
    return database


@asynccontextmanager
async def opened(
    url: PathOrUrl, *, create: bool = False, allow_network_fs: bool = False, patience: float = PATIENCE
) -> AsyncIterator[Database]:
    """Open a queue for a while; see `open_database`."""
    database = await open_database(url, create=create, allow_network_fs=allow_network_fs, patience=patience)
    try:
        yield database
    finally:
        # A caller that is cancelled just now must not break the closing off: SQLAlchemy would print a traceback.
        await to_its_end(database.close())


def file_of(url: PathOrUrl) -> Path | None:
    """Return the file that holds the queue, None where it is on a server. Raises UsageError as `open_database`."""
    return None if is_postgresql(url) else sqlite.sqlite_path(url)


def misfit(url: PathOrUrl) -> str | None:
    """Return what of a queue's rows is of a type that lbr never writes, None where all is well or cannot be read.

    On a server no such value can be.
    """
    path = file_of(url)
    if path is None or not path.is_file():
        return None
    try:
        return file_errors.misfit(path)
    except sqlite3.Error:
        return None


def shown(url: PathOrUrl) -> str:
    """Return how messages call the database at a URL: without its password. Raises UsageError as `open_database`."""
    return address_of(url).shown if is_postgresql(url) else str(sqlite.sqlite_path(url))


def sole_worker(url: PathOrUrl) -> AbstractAsyncContextManager[None]:
    """Be the queue's only exclusive worker while the context lasts.

    Raises AlreadyRunningError where another one is. A killed holder frees it at once.
    """
    if is_postgresql(url):
        from lbr.store import sole  # noqa: PLC0415 - see above

        return sole.sole_worker(url)
    return sqlite.sole_worker(url)


async def remove_queue(url: PathOrUrl, *, run: str) -> bool:
    """Remove a queue that nobody else uses and that holds one run only; False, and nothing changed, where not so.

    No connection of this process to it may be open.
    """
    if is_postgresql(url):
        from lbr.store import postgres  # noqa: PLC0415 - see above

        return await postgres.remove_queue(url, run=run)
    return await files.remove_unused(sqlite.sqlite_path(url), run=run, query="SELECT name FROM runs")
