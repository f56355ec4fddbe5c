"""The PostgreSQL queue: its connections, its clock, LISTEN, the exclusive worker's lock, its errors and outages.

Everything is in a schema of its own, `lbr`, so that the database may hold other programs' tables too.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files, schema
from lbr.store.addresses import Address, address_of
from lbr.store.database import Database, to_its_end
from lbr.store.leases import Presence
from lbr.store.sql import SHARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.core.types import PathOrUrl, RunId
    from lbr.store.database import Connection

T = TypeVar("T")

SCHEMA = "lbr"
CHANNEL = "lbr"
SHARDS = 32
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
OPEN_PATIENCE_SECONDS = 10.0
POLL_SECONDS = 1.0
"""How often to look without a notification: a transaction pooler drops LISTEN, and one may be lost with its connection."""
RECONNECT_SECONDS = 5.0
SOLE_RETRY_SECONDS = 1.0
STALL_SECONDS = 30.0
"""A transaction that takes longer than this is given up and run again, because the network may be cut."""

# The server ends the transaction of a worker that is cut off, and so frees its locks.
SERVER_SETTINGS = {
    "application_name": "lbr",
    "jit": "off",
    "idle_in_transaction_session_timeout": "20s",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# Every statement of a writer finds its rows by an index and in its order. Before a table is analysed, PostgreSQL 14
# would sort all pending jobs each time.
WRITER_SETTINGS = SERVER_SETTINGS | dict.fromkeys(
    ("enable_seqscan", "enable_bitmapscan", "enable_sort"), "off"
)
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
_TRY_SOLE = "SELECT pg_try_advisory_lock($1, 0)"

# SQLSTATE codes, from PostgreSQL's manual, appendix A.
PASSING_CLASSES = frozenset({"08", "57"})
"""Connection exceptions; operator intervention: the server is stopped, started, or ended our session."""

PASSING = frozenset({"40001", "40P01", "55P03", "53300", "25P03"})
"""Serialization failure, deadlock, lock timeout, too many connections, a transaction that idled for too long."""

READ_ONLY = "25006"

REASONS = {
    "28P01": "the server refused the password; check user and password in the URL, PGPASSWORD or ~/.pgpass",
    "28000": "the server refused the login: {message}; check the user and the server's pg_hba.conf",
    "3D000": "{message}; create it with `createdb`, or name another",
    "42501": "{message}; the role needs the right to create the schema lbr (GRANT CREATE ON DATABASE …) or to use it",
    "53300": "the server has no connection left; start fewer workers, raise max_connections, or use a pooler",
    "53100": "the server's disk is full; make room there and run the same command again",
    "3F000": "its schema lbr is gone; it was removed while in use",
    "42P01": "a table of its schema lbr is gone: {message}; it was removed while in use, or another program made it",
    "08P01": "{message}; behind a transaction pooler add pgbouncer=true to the URL",
}


@dataclass(frozen=True, slots=True)
class _Doubt(Generic[T]):
    """A transaction, by its number, whose commit was sent and not confirmed."""

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
        self._writer = _make_engine(
            address, "READ COMMITTED", pool_size=2, options=options, settings=WRITER_SETTINGS
        )
        # Workers, and the two lanes of one worker, use different shards, so that they do not queue for one row.
        shard = SystemRandom().randrange(SHARDS)
        self._lane = _Lane(self._writer, shard)
        self._beside = _Lane(self._writer, (shard + SHARDS // 2) % SHARDS)
        reading = options | {"postgresql_readonly": True}
        self._reader = _make_engine(address, "REPEATABLE READ", pool_size=2, options=reading)
        self._listener = Listener(arguments_of(address), CHANNEL, listen=not address.pooled)

    async def write(self, work: Callable[[Connection], Awaitable[T]], *, beside: bool = False) -> T:
        """Run one transaction when its turn has come, again after a failure that passes."""
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


class Listener:
    """A connection that listens for notifications, with polling behind it. That it cannot listen is never an error."""

    def __init__(self, arguments: Mapping[str, Any], channel: str, *, listen: bool) -> None:
        self._arguments = arguments
        self._channel = channel
        self._listen = listen
        self._connection: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._called = True
        self._next_poll = 0.0
        self._next_try = 0.0

    def heard(self) -> bool:
        """Return whether a notification came since the last call, or it is time to look without one."""
        now = time.monotonic()
        if self._listen and self._connecting is None and now >= self._next_try and not self._alive():
            self._next_try = now + RECONNECT_SECONDS
            self._connecting = asyncio.create_task(self._connect())
        if not self._called and now < self._next_poll:
            return False
        self._called = False
        self._next_poll = now + POLL_SECONDS
        return True

    def _alive(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def _connect(self) -> None:
        import asyncpg  # noqa: PLC0415 - an extra

        try:
            connection = await asyncpg.connect(**self._arguments)
            try:
                await connection.add_listener(self._channel, self._hear)
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
            # A notification from before we listened is lost.
            self._called = True
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return
        finally:
            self._connecting = None

    def _hear(self, *_: object) -> None:
        self._called = True

    async def close(self) -> None:
        """Stop listening."""
        if self._connecting is not None:
            self._connecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._connecting
        if self._alive():
            self._connection.terminate()


def open_postgres(url: PathOrUrl, *, clock: Callable[[], Millis] | None, patience: float) -> PostgresDatabase:
    """Return the queue on a server, not yet connected. UsageError for a URL that cannot be read."""
    check_driver()
    return PostgresDatabase(address_of(url), clock=clock, patience=patience)


async def remove_queue(url: PathOrUrl, *, run: str) -> bool:
    """Drop a queue that nobody else uses and that holds one run only; see `lbr.store.database.remove_queue`."""
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

    async def watch(self, holder: asyncio.Task[Any]) -> None:
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
    holder = asyncio.current_task()
    watching: asyncio.Task[None] | None = None
    try:
        if not await lock.take():
            raise taken
        if holder is not None:
            watching = asyncio.create_task(lock.watch(holder))
        try:
            yield
        except asyncio.CancelledError:
            if not lock.lost:
                raise
            raise taken from None
    finally:
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        lock.release()


def check_driver() -> None:
    """Raise UsageError if the driver is not installed."""
    try:
        import asyncpg  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise UsageError(
            "expected asyncpg to be installed for a PostgreSQL URL, got: no such package; "
            "`pip install asyncpg`, or in a checkout `pip install '.[postgres]'`"
        ) from None


def arguments_of(address: Address, settings: Mapping[str, str] = SERVER_SETTINGS) -> dict[str, Any]:
    """Return the arguments of a connection. A pooler refuses settings and keeps no prepared statement."""
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


class PassingError(Exception):
    """Why a transaction cannot succeed for now."""


def sqlstate_of(error: BaseException) -> str | None:
    """Return the server's code for an error, None if it has none."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = getattr(error, "sqlstate", None)
    return code if isinstance(code, str) else None


def is_passing(error: Exception) -> bool:
    """Return whether the same transaction may well succeed when it is run again."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, OSError | TimeoutError | PassingError):
        return True
    code = sqlstate_of(error)
    if code is not None:
        # A pooler has this one code; a setting that it refuses, it will always refuse.
        refused = code == "08P01" and "startup parameter" in _words(error)
        return not refused and (code[:2] in PASSING_CLASSES or code in PASSING)
    # An error without a code is the driver's, about a connection that is gone or breaks off.
    return isinstance(error, DBAPIError) and (error.connection_invalidated or _is_cut_off(error))


def _is_cut_off(error: DBAPIError) -> bool:
    words = str(error.orig)
    return "connection" in words and any(
        word in words for word in ("closed", "lost", "reset", "in the middle")
    )


def reason_of(error: BaseException, patience: float) -> str:
    """Return what is wrong and what to do, never with the URL's password."""
    code = sqlstate_of(error)
    message = _words(error)
    if code in REASONS:
        return REASONS[code].format(message=message)
    if isinstance(error, Exception) and is_passing(error):
        return (
            f"{message}; tried for {patience:g} s; check that the server runs and can be reached, "
            f"then run the same command again"
        )
    return message


def _words(error: BaseException) -> str:
    """Return the driver's message, without the statement and the class names that SQLAlchemy adds."""
    cause: BaseException = error
    if isinstance(error, DBAPIError) and error.orig is not None:
        cause = error.orig.__cause__ or error.orig
    if isinstance(cause, TimeoutError):
        return "it does not answer"
    return str(cause) or type(cause).__name__


@contextmanager
def database_errors(name: str, patience: float) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except (OSError, TimeoutError, PassingError) as error:
        raise DatabaseError(f"cannot reach the database {name}: {reason_of(error, patience)}") from error
    except (DBAPIError, SQLAlchemyError) as error:
        raise DatabaseError(f"cannot use the database {name}: {reason_of(error, patience)}") from error
