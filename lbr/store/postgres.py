"""The PostgreSQL queue: its connections, its clock, and the exclusive worker's lock; outages are waited out.

Everything is in a schema of its own, `lbr`, so that the database may hold other programs' tables too.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files, schema
from lbr.store.addresses import Address, address_of
from lbr.store.database import Database
from lbr.store.leases import Presence
from lbr.store.postgres_connection import (
    READ_ONLY,
    WRITER_SETTINGS,
    Listener,
    PassingError,
    arguments_of,
    check_driver,
    database_errors,
    is_passing,
    make_engine,
    sqlstate_of,
)
from lbr.store.sql import CHANNEL, SCHEMA

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from lbr.core.types import PathOrUrl
    from lbr.store.database import Work

T = TypeVar("T")

OPEN_PATIENCE_SECONDS = 10.0
SOLE_RETRY_SECONDS = 1.0
STALL_SECONDS = 30.0
"""A transaction that takes longer than this is given up and run again, because the network may be cut."""

# Advisory locks are shared by all users of a database; these numbers spell lbr.
CREATION_LOCK, SOLE_LOCK = 0x6C_62_72_01, 0x6C_62_72_03

_NOW = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)")
_CREATING = text("SELECT pg_advisory_xact_lock(:kind, 0)")
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'lbr' AND pid <> pg_backend_pid()"
)
_TRY_SOLE = "SELECT pg_try_advisory_lock($1, 0)"


class PostgresDatabase(Database):
    """An open PostgreSQL queue: a few writing connections, a few readers, one that listens."""

    def __init__(self, address: Address, *, clock: Callable[[], Millis] | None, patience: float) -> None:
        folders = [folder for folder in (files.state_folder(), Path.cwd()) if folder is not None]
        places = [folder / files.telling_name(address.server) for folder in folders]
        # The server frees a dead worker's locks at once, but also those of one that is only cut off.
        super().__init__(address.shown, patience=patience, spool_places=places, presence=Presence())
        self._clock = clock
        options = {"schema_translate_map": {None: SCHEMA}}
        self._writer = make_engine(address, "READ COMMITTED", pool_size=3, options=options, settings=WRITER_SETTINGS)
        reading = options | {"postgresql_readonly": True}
        self._reader = make_engine(address, "REPEATABLE READ", pool_size=2, options=reading)
        self._listener = Listener(arguments_of(address), CHANNEL, listen=not address.pooled)

    async def _write(self, work: Work[T]) -> T:
        async with asyncio.timeout(STALL_SECONDS), self._writer.connect() as connection:
            try:
                result = await connection.run_sync(self._timed, work)
                await connection.commit()
            except DBAPIError as error:
                if sqlstate_of(error) != READ_ONLY:
                    raise
                # It was the primary when we connected; the next connection may lead to the new one.
                await connection.invalidate()
                raise PassingError("the server is read-only: another may have taken its place") from error
        return result

    async def _read(self, work: Work[T]) -> T:
        async with asyncio.timeout(STALL_SECONDS), self._reader.connect() as connection:
            return await connection.run_sync(self._timed, work)

    def _timed(self, connection: Connection, work: Work[T]) -> T:
        # The server's time, because its users' clocks may differ.
        now = connection.scalar(_NOW) if self._clock is None else self._clock()
        return work(connection, Millis(now or 0))

    def _passes(self, error: Exception) -> bool:
        return is_passing(error)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.name, self.patience)

    async def changed(self) -> bool:
        """Return whether a notification came, or may have been lost."""
        return self._listener.heard()

    async def filled(self) -> None:
        """Tell the planner how many rows there are; autovacuum would do so a minute later."""
        await self.write(_analyze)

    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""
        patience, self.patience = self.patience, min(self.patience, OPEN_PATIENCE_SECONDS)
        version = await self.read(lambda connection, _: schema.applied_version(connection))
        self.check_version(version, create=create)
        if version < schema.LATEST:
            await self.write(_create, self.presence.dead_workers)
        self.patience = patience

    async def close(self) -> None:
        """Close every connection."""
        await self._listener.close()
        await self._reader.dispose()
        await self._writer.dispose()

    async def remove(self, run: str) -> bool:
        """Drop the queue if this is its only user and `run` its only run; return whether it did."""
        return await self.write(_drop, run)


def _analyze(connection: Connection, _now: Millis) -> None:
    connection.execute(text(f"ANALYZE {SCHEMA}.jobs"))


def _create(connection: Connection, now: Millis, dead_workers: Any) -> None:
    connection.execute(_CREATING, {"kind": CREATION_LOCK})
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    schema.migrate(connection, now, dead_workers)


def _drop(connection: Connection, _now: Millis, run: str) -> bool:
    connection.execute(_CREATING, {"kind": CREATION_LOCK})
    if connection.scalar(_OTHERS):
        return False
    # Another process that comes now waits for the lock, and then finds no table.
    connection.execute(text(f"LOCK TABLE {SCHEMA}.runs IN ACCESS EXCLUSIVE MODE"))
    if set(connection.execute(select(schema.runs.c.name)).scalars()) != {run}:
        return False
    connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))
    return True


def open_postgres(url: PathOrUrl, *, clock: Callable[[], Millis] | None, patience: float) -> PostgresDatabase:
    """Return the queue on a server, not yet connected. UsageError for a URL that cannot be read."""
    check_driver()
    return PostgresDatabase(address_of(url), clock=clock, patience=patience)


async def remove_queue(url: PathOrUrl, *, run: str) -> bool:
    """Drop a queue that no process uses and that holds one run only; see `lbr.store.database.remove_queue`."""
    database = open_postgres(url, clock=None, patience=OPEN_PATIENCE_SECONDS)
    try:
        return await database.remove(run)
    finally:
        await database.close()


class _Lock:
    """The lock of the exclusive worker; `lost` is set if its connection was lost and another worker has it now."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Any = None
        self._broken = asyncio.Event()
        self.lost = False

    async def take(self) -> bool:
        """Connect and try; return whether the lock is ours. Raises DatabaseError."""
        import asyncpg  # noqa: PLC0415 - an extra

        with database_errors(self._address.shown, SOLE_RETRY_SECONDS):
            try:
                self._connection = await asyncpg.connect(**arguments_of(self._address))
                self._broken.clear()
                self._connection.add_termination_listener(lambda _: self._broken.set())
                return bool(await self._connection.fetchval(_TRY_SOLE, SOLE_LOCK))
            except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                raise DatabaseError(f"cannot use the database {self._address.shown}: {error}") from error

    async def watch(self, holder: asyncio.Task[Any] | None) -> None:
        """Take the lock again whenever its connection is lost; cancel its holder if another worker has it."""
        while True:
            await self._broken.wait()
            try:
                self.lost = not await self.take()
            except DatabaseError:
                # The holder waits the outage out, or ends with it.
                await asyncio.sleep(SOLE_RETRY_SECONDS)
                continue
            if self.lost:
                if holder is not None:
                    holder.cancel()
                return

    def release(self) -> None:
        """Close the connection, and the lock with it."""
        if self._connection is not None:
            self._connection.terminate()


@asynccontextmanager
async def sole_worker(url: PathOrUrl) -> AsyncIterator[None]:
    """Hold the lock of the queue's exclusive worker, on whatever machine.

    Raises AlreadyRunningError if another worker has it, also if it was lost with its connection and another worker
    took it: the body is then cancelled and releases its jobs.
    """
    check_driver()
    address = address_of(url)
    if address.pooled:
        raise UsageError(
            "expected a URL without pgbouncer=true for --exclusive, whose lock a transaction pooler would give "
            "to others; name the server itself"
        )
    lock = _Lock(address)
    taken = AlreadyRunningError(f"an exclusive worker of {address.shown} is running already; nothing to do")
    try:
        if not await lock.take():
            raise taken
        watching = asyncio.create_task(lock.watch(asyncio.current_task()))
        try:
            yield
        except asyncio.CancelledError:
            if not lock.lost:
                raise
            raise taken from None
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
    finally:
        lock.release()
