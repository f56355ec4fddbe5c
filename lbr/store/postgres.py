"""The PostgreSQL queue: its connections, its clock, its errors, and outages that are ridden out.

Everything is in a schema of its own, `lbr`, so that the database may hold other programs' tables too.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files, schema
from lbr.store.addresses import Address, address_of
from lbr.store.database import Database, to_its_end
from lbr.store.listener import Listener
from lbr.store.presence import Presence
from lbr.store.server_errors import READ_ONLY, PassingError, is_passing, reason_of, sqlstate_of
from lbr.store.sql import SHARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.core.types import PathOrUrl, RunId
    from lbr.store.connection import Connection

T = TypeVar("T")

SCHEMA = "lbr"
CHANNEL = "lbr"
SHARDS = 32
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
OPEN_PATIENCE_SECONDS = 10.0
STALL_SECONDS = 30.0
"""A transaction that takes longer than this is given up and run again: the network may be cut, which no one says."""

# What a worker that is cut off leaves behind: the server ends its transaction, and with it its locks, by itself.
SERVER_SETTINGS = {
    "application_name": "lbr",
    "jit": "off",
    "idle_in_transaction_session_timeout": "20s",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# Whatever the planner knows of a table that has just been filled: every statement of a writer finds its rows by an
# index and takes the pending in the order of theirs. Never analysed, PostgreSQL 14 would sort all of them each time.
WRITER_SETTINGS = SERVER_SETTINGS | dict.fromkeys(
    ("enable_seqscan", "enable_bitmapscan", "enable_sort"), "off"
)
# Advisory locks are shared by all users of a database; these numbers spell lbr.
CREATION_LOCK, TURNS_LOCK, SOLE_LOCK = 0x6C_62_72_01, 0x6C_62_72_02, 0x6C_62_72_03

_CLOCK = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
_NOW = text(f"SELECT {_CLOCK}")
# Each lane of an open queue numbers its transactions in a row of its own, which goes with their commit: whether a commit whose
# answer was lost was carried out can be read there. The transaction's own number would not do, for a server that
# crashed gives the numbers of what it lost to others.
_WRITERS = (
    f"CREATE TABLE IF NOT EXISTS {SCHEMA}.writers (id text PRIMARY KEY, seq bigint NOT NULL, at bigint NOT NULL) "
    f"WITH (fillfactor = 25)"
)
_BEGIN = text(
    f"INSERT INTO {SCHEMA}.writers (id, seq, at) VALUES (:writer, :seq, {_CLOCK}) "
    f"ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, at = excluded.at RETURNING at"
)
# Waits for the lost connection's transaction to end, if the server still has it; an insert that is not committed yet
# could not be waited for by looking.
_LAST = text(
    f"INSERT INTO {SCHEMA}.writers (id, seq, at) VALUES (:writer, -1, {_CLOCK}) "
    f"ON CONFLICT (id) DO UPDATE SET at = writers.at RETURNING seq"
)
_FORGET = text(
    f"DELETE FROM {SCHEMA}.writers WHERE id IN (:one, :other) OR at < {_CLOCK} - {24 * 3600 * 1000}"
)
_TAKE_TURNS = text("SELECT pg_advisory_xact_lock(:kind, :run)")
_CREATING = text("SELECT pg_advisory_xact_lock(:kind, 0)")
_IDS = text("SELECT nextval(pg_get_serial_sequence(:table, 'id')) FROM generate_series(1, :count) ORDER BY 1")
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'lbr' AND pid <> pg_backend_pid()"
)
_WRITE_NOW = "lbr_now"


@dataclass(frozen=True, slots=True)
class _Doubt(Generic[T]):
    """A transaction, by its number, that was sent its commit and of which nothing was heard since."""

    seq: int
    result: T


class _Lane:
    """Transactions that take turns on one connection; `id` names their row of writers, `seq` the latest of them."""

    def __init__(self, engine: AsyncEngine, shard: int) -> None:
        self.engine = engine.execution_options(**{SHARD: shard})
        self.id = uuid4().hex
        self.seq = 0
        self.turn = asyncio.Lock()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncConnection]:
        """Connect to a server that takes writes. Raises PassingError where it has ceased to."""
        async with self.engine.connect() as connection:
            try:
                yield connection
            except DBAPIError as error:
                if sqlstate_of(error) != READ_ONLY:
                    raise
                # It was the primary when we connected; the next connection may lead to the one that is now.
                await connection.invalidate()
                raise PassingError("the server is read-only: another may have taken its place") from error


class PostgresDatabase(Database):
    """An open PostgreSQL queue: two writing connections, up to two readers, one that listens."""

    def __init__(self, address: Address, *, clock: Callable[[], Millis] | None, patience: float) -> None:
        folders = [folder for folder in (files.state_folder(), Path.cwd()) if folder is not None]
        places = [folder / files.telling_name(address.server) for folder in folders]
        # The server frees a dead worker's locks at once, but those of one that is merely cut off as well.
        super().__init__(address.shown, patience=patience, spool_places=places, presence=Presence())
        self._clock = clock
        options = {"schema_translate_map": {None: SCHEMA}}
        self._writer = _make_engine(
            address, "READ COMMITTED", pool_size=2, options=options, settings=WRITER_SETTINGS
        )
        # Workers of one machine or of many draw different shards, so that they do not queue for one row; nor do the
        # two lanes of one worker.
        shard = SystemRandom().randrange(SHARDS)
        self._lane = _Lane(self._writer, shard)
        self._beside = _Lane(self._writer, (shard + SHARDS // 2) % SHARDS)
        reading = options | {"postgresql_readonly": True}
        self._reader = _make_engine(address, "REPEATABLE READ", pool_size=2, options=reading)
        self._listener = Listener(arguments_of(address), CHANNEL, listen=not address.pooled)

    async def write(self, work: Callable[[Connection], Awaitable[T]], *, beside: bool = False) -> T:
        """Run one transaction, `_retried`, when its turn has come; each try `to_its_end`."""
        lane = self._beside if beside else self._lane
        doubt: _Doubt[T] | None = None

        async def once() -> T:
            nonlocal doubt
            async with asyncio.timeout(STALL_SECONDS), lane.connected() as connection:
                if doubt is not None:
                    if await connection.scalar(_LAST, {"writer": lane.id}) == doubt.seq:
                        return doubt.result
                    doubt = None
                lane.seq += 1
                bound = {"writer": lane.id, "seq": lane.seq}
                connection.info[_WRITE_NOW] = await connection.scalar(_BEGIN, bound)
                result = await work(connection)
                doubt = _Doubt(lane.seq, result)
                await connection.commit()
            return result

        # The turn ends only with the last try: the next transaction's number would hide whether this one's commit,
        # whose answer was lost, was carried out.
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
        """Return the server's time, for its users' clocks may be hours apart; in a write, that of its beginning."""
        if self._clock is not None:
            return self._clock()
        beneath = connection.sync_connection
        begun = None if beneath is None else beneath.info.get(_WRITE_NOW)
        return Millis(begun if begun is not None else await connection.scalar(_NOW))

    async def at_one_moment(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run it in a reader, for the server shows each statement of a writer its own moment."""
        return await self.read(work)

    async def changed(self) -> bool:
        """Tell whether somebody called, or enough time has passed that a call may have been lost."""
        return self._listener.heard()

    async def wake(self, connection: Connection) -> None:
        """Have this transaction's commit call those who listen."""
        await connection.execute(text(f"SELECT pg_notify('{CHANNEL}', '')"))

    async def take_turns(self, connection: Connection, run_id: RunId) -> None:
        """Wait for the other enqueues of a run; the lock goes with the transaction."""
        await connection.execute(_TAKE_TURNS, {"kind": TURNS_LOCK, "run": run_id % 2**31})

    async def reserve_job_ids(self, connection: Connection, count: int) -> Sequence[int]:
        """Return `count` ascending ids of the sequence."""
        bound = {"table": f"{SCHEMA}.jobs", "count": count}
        return (await connection.execute(_IDS, bound)).scalars().all() if count else []

    async def filled(self) -> None:
        """Let the planner know how many rows there are now; autovacuum would come a minute later."""
        await self.write(lambda connection: connection.execute(text(f"ANALYZE {SCHEMA}.jobs")))

    async def prepare(self, *, create: bool) -> None:
        """Make sure the tables are there and current: older ones are upgraded, missing ones created only with `create`."""
        patience, self.patience = self.patience, min(self.patience, OPEN_PATIENCE_SECONDS)
        version = await self.read(lambda connection: connection.run_sync(schema.applied_version))
        if version > schema.LATEST:
            raise DatabaseError(
                f"expected {self.name} at schema version {schema.LATEST} or older, got: {version}; a newer lbr "
                f"wrote it: use that one"
            )
        if version == 0 and not create:
            raise UsageError(
                f"expected an lbr queue in {self.name}, got: none there; `lbr enqueue` creates it"
            )
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
        """Remove our rows of writers, and those of killed ones; one that stays does no harm for a day."""
        with suppress(DBAPIError, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS), self._writer.begin() as connection:
                await connection.execute(_FORGET, {"one": self._lane.id, "other": self._beside.id})

    async def remove(self, run: str) -> bool:
        """Drop the queue where this is its only user and `run` its only run; tell whether it did."""

        async def work(connection: Connection) -> bool:
            await connection.execute(_CREATING, {"kind": CREATION_LOCK})
            if await connection.scalar(_OTHERS):
                return False
            # Whoever comes now waits for the lock, and finds no table behind it.
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
    """Drop a queue that nobody else uses and that holds one run only; see `lbr.store.engines.remove_queue`."""
    database = open_postgres(url, clock=None, patience=OPEN_PATIENCE_SECONDS)
    try:
        return await database.remove(run)
    finally:
        await database.close()


def check_driver() -> None:
    """Raise UsageError where the driver is not installed."""
    try:
        import asyncpg  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise UsageError(
            "expected asyncpg to be installed for a PostgreSQL URL, got: no such package; "
            "`pip install asyncpg`, or in a checkout `pip install '.[postgres]'`"
        ) from None


def arguments_of(address: Address, settings: Mapping[str, str] = SERVER_SETTINGS) -> dict[str, Any]:
    """Return what a connection is made with. A pooler refuses settings and keeps no prepared statement."""
    shared: dict[str, Any] = {"dsn": address.dsn, "timeout": CONNECT_SECONDS}
    if address.pooled:
        return shared | {"statement_cache_size": 0, "server_settings": {"application_name": "lbr"}}
    return shared | {"server_settings": dict(settings)}


def _make_engine(
    address: Address,
    isolation: Any,
    *,
    pool_size: int,
    options: dict[str, Any],
    settings: Mapping[str, str] = SERVER_SETTINGS,
) -> AsyncEngine:
    arguments = arguments_of(address, settings)
    if address.pooled:
        arguments |= {
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"lbr_{uuid4().hex}",
        }
    return create_async_engine(
        "postgresql+asyncpg://",
        connect_args=arguments,
        isolation_level=isolation,
        pool_size=pool_size,
        max_overflow=0,
        execution_options=options,
    )


@contextmanager
def database_errors(name: str, patience: float) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except (OSError, TimeoutError, PassingError) as error:
        raise DatabaseError(f"cannot reach the database {name}: {reason_of(error, patience)}") from error
    except (DBAPIError, SQLAlchemyError) as error:
        raise DatabaseError(f"cannot use the database {name}: {reason_of(error, patience)}") from error
