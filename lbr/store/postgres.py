"""The PostgreSQL queue: its writing lanes, its clock, and the exclusive worker's lock; outages are waited out.

Everything is in a schema of its own, `lbr`, so that the database may hold other programs' tables too.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files, schema
from lbr.store.addresses import Address, address_of
from lbr.store.database import Database, to_its_end
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
from lbr.store.sql import SHARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from lbr.core.types import PathOrUrl, RunId
    from lbr.store.database import Connection

T = TypeVar("T")

SCHEMA = "lbr"
CHANNEL = "lbr"
SHARDS = 32
CLOSE_SECONDS = 2.0
OPEN_PATIENCE_SECONDS = 10.0
SOLE_RETRY_SECONDS = 1.0
STALL_SECONDS = 30.0
"""A transaction that takes longer than this is given up and run again, because the network may be cut."""

# Advisory locks are shared by all users of a database; these numbers spell lbr.
CREATION_LOCK, TURNS_LOCK, SOLE_LOCK = 0x6C_62_72_01, 0x6C_62_72_02, 0x6C_62_72_03

_CLOCK = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
_NOW = text(f"SELECT {_CLOCK}")
# Each lane of an open queue numbers its transactions in a row of its own, in the same commit: it shows whether a commit
# whose reply was lost took place. PostgreSQL's transaction id would not do: after a crash the server reuses lost ids.
_WRITERS = (
    f"CREATE TABLE IF NOT EXISTS {SCHEMA}.writers (id text PRIMARY KEY, seq bigint NOT NULL, at bigint NOT NULL) "
    f"WITH (fillfactor = 25)"
)
_BEGIN = text(
    f"INSERT INTO {SCHEMA}.writers (id, seq, at) VALUES (:writer, :seq, {_CLOCK}) "
    f"ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, at = excluded.at RETURNING at"
)
# An insert, because it waits for the lost connection's transaction to end, if the server still has it.
_LAST = text(
    f"INSERT INTO {SCHEMA}.writers (id, seq, at) VALUES (:writer, -1, {_CLOCK}) "
    f"ON CONFLICT (id) DO UPDATE SET at = writers.at RETURNING seq"
)
_FORGET = text(f"DELETE FROM {SCHEMA}.writers WHERE id IN (:one, :other) OR at < {_CLOCK} - {24 * 3600 * 1000}")
_TAKE_TURNS = text("SELECT pg_advisory_xact_lock(:kind, :run)")
_CREATING = text("SELECT pg_advisory_xact_lock(:kind, 0)")
_IDS = text("SELECT nextval(pg_get_serial_sequence(:table, 'id')) FROM generate_series(1, :count) ORDER BY 1")
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'lbr' AND pid <> pg_backend_pid()"
)
_WRITE_NOW = "lbr_now"
_TRY_SOLE = "SELECT pg_try_advisory_lock($1, 0)"


class _Lane:
    """Transactions that take turns on one connection; `id` names their row of writers, `seq` the latest of them."""

    def __init__(self, engine: AsyncEngine, shard: int) -> None:
        self.engine = engine.execution_options(**{SHARD: shard})
        self.id = uuid4().hex
        self.seq = 0
        self.turn = asyncio.Lock()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncConnection]:
        """Connect to a server that takes writes. Raises PassingError if it no longer does."""
        async with self.engine.connect() as connection:
            try:
                yield connection
            except DBAPIError as error:
                if sqlstate_of(error) != READ_ONLY:
                    raise
                # It was the primary when we connected; the next connection may lead to the new one.
                await connection.invalidate()
                raise PassingError("the server is read-only: another may have taken its place") from error


class PostgresDatabase(Database):
    """An open PostgreSQL queue: two writing connections, up to two readers, one that listens."""

    def __init__(self, address: Address, *, clock: Callable[[], Millis] | None, patience: float) -> None:
        folders = [folder for folder in (files.state_folder(), Path.cwd()) if folder is not None]
        places = [folder / files.telling_name(address.server) for folder in folders]
        # The server frees a dead worker's locks at once, but also those of one that is only cut off.
        super().__init__(address.shown, patience=patience, spool_places=places, presence=Presence())
        self._clock = clock
        options = {"schema_translate_map": {None: SCHEMA}}
        self._writer = make_engine(address, "READ COMMITTED", pool_size=2, options=options, settings=WRITER_SETTINGS)
        # Workers, and the two lanes of one worker, use different shards, so that they do not queue for one row.
        shard = SystemRandom().randrange(SHARDS)
        self._lane = _Lane(self._writer, shard)
        self._beside = _Lane(self._writer, (shard + SHARDS // 2) % SHARDS)
        reading = options | {"postgresql_readonly": True}
        self._reader = make_engine(address, "REPEATABLE READ", pool_size=2, options=reading)
        self._listener = Listener(arguments_of(address), CHANNEL, listen=not address.pooled)

    async def write(self, work: Callable[[Connection], Awaitable[T]], *, beside: bool = False) -> T:
        """Run one transaction when its turn has come, again after a failure that passes."""
        lane = self._beside if beside else self._lane
        doubt: tuple[int, T] | None = None

        async def once() -> T:
            nonlocal doubt
            async with asyncio.timeout(STALL_SECONDS), lane.connected() as connection:
                if doubt is not None:
                    if await connection.scalar(_LAST, {"writer": lane.id}) == doubt[0]:
                        return doubt[1]
                    doubt = None
                lane.seq += 1
                bound = {"writer": lane.id, "seq": lane.seq}
                connection.info[_WRITE_NOW] = await connection.scalar(_BEGIN, bound)
                result = await work(connection)
                doubt = (lane.seq, result)  # the commit may be lost, or only its reply
                await connection.commit()
            return result

        # The turn ends only with the last try: the next transaction's number would hide whether this one's commit took
        # place.
        async with lane.turn:
            return await self._retried(lambda: to_its_end(once()))

    async def _read(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with asyncio.timeout(STALL_SECONDS), self._reader.connect() as connection:
            return await work(connection)

    def _passes(self, error: Exception) -> bool:
        return is_passing(error)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.name, self.patience)

    async def now(self, connection: Connection) -> Millis:
        """Return the server's time, because its users' clocks may differ; in a write, that of its beginning."""
        if self._clock is not None:
            return self._clock()
        beneath = connection.sync_connection
        begun = None if beneath is None else beneath.info.get(_WRITE_NOW)
        return Millis(begun if begun is not None else await connection.scalar(_NOW))

    async def at_one_moment(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run it in a reader, because each statement of a writer sees its own moment."""
        return await self.read(work)

    async def changed(self) -> bool:
        """Return whether a notification came, or may have been lost."""
        return self._listener.heard()

    async def wake(self, connection: Connection) -> None:
        """Let this transaction's commit notify the listeners."""
        await connection.execute(text(f"SELECT pg_notify('{CHANNEL}', '')"))

    async def take_turns(self, connection: Connection, run_id: RunId) -> None:
        """Wait for the other enqueues of a run; the lock goes with the transaction."""
        await connection.execute(_TAKE_TURNS, {"kind": TURNS_LOCK, "run": run_id % 2**31})

    async def reserve_job_ids(self, connection: Connection, count: int) -> Sequence[int]:
        """Return `count` ascending ids of the sequence."""
        bound = {"table": f"{SCHEMA}.jobs", "count": count}
        return (await connection.execute(_IDS, bound)).scalars().all() if count else []

    async def filled(self) -> None:
        """Tell the planner how many rows there are; autovacuum would do so a minute later."""
        await self.write(lambda connection: connection.execute(text(f"ANALYZE {SCHEMA}.jobs")))

    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""
        patience, self.patience = self.patience, min(self.patience, OPEN_PATIENCE_SECONDS)
        version = await self.read(lambda connection: connection.run_sync(schema.applied_version))
        self.check_version(version, create=create)
        if version < schema.LATEST:
            await self._retried(self._create)
        self.patience = patience

    async def _create(self) -> None:
        async with asyncio.timeout(STALL_SECONDS), self._writer.begin() as connection:
            await connection.execute(_CREATING, {"kind": CREATION_LOCK})
            await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
            await connection.execute(text(_WRITERS))
            await connection.run_sync(schema.migrate, await self.now(connection), self.presence.dead_workers)

    async def close(self) -> None:
        """Close every connection."""
        await self._listener.close()
        if (self._lane.seq or self._beside.seq) and not self._given_up:
            await self._forget()
        await self._reader.dispose()
        await self._writer.dispose()

    async def _forget(self) -> None:
        """Remove our rows of writers, and those of processes killed a day ago."""
        with suppress(DBAPIError, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS), self._writer.begin() as connection:
                await connection.execute(_FORGET, {"one": self._lane.id, "other": self._beside.id})

    async def remove(self, run: str) -> bool:
        """Drop the queue if this is its only user and `run` its only run; return whether it did."""

        async def work(connection: Connection) -> bool:
            await connection.execute(_CREATING, {"kind": CREATION_LOCK})
            if await connection.scalar(_OTHERS):
                return False
            # Another process that comes now waits for the lock, and then finds no table.
            await connection.execute(text(f"LOCK TABLE {SCHEMA}.runs IN ACCESS EXCLUSIVE MODE"))
            names = (await connection.execute(select(schema.runs.c.name))).scalars().all()
            if set(names) != {run}:
                return False
            await connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))
            return True

        return await self.write(work)


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
