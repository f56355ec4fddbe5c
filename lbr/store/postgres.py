"""The PostgreSQL queue: its connections and clock, LISTEN, what the server's errors mean, and the exclusive worker's lock.

Everything is in a schema of its own, `lbr`, so that the database may hold other programs' tables too.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.core.types import Millis
from lbr.store import files, migrations, schema
from lbr.store.addresses import Address, address_of
from lbr.store.database import Database
from lbr.store.leases import Presence
from lbr.store.sql import CHANNEL, SCHEMA

try:
    import asyncpg
except ImportError:  # an extra
    raise UsageError(
        "expected asyncpg to be installed for a PostgreSQL URL, got: no such package; "
        "`pip install asyncpg`, or in a checkout `pip install '.[postgres]'`"
    ) from None

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from lbr.core.types import PathOrUrl
    from lbr.store.database import Work

T = TypeVar("T")

CONNECT_SECONDS = OPEN_PATIENCE_SECONDS = 10.0
POLL_SECONDS = 1.0
"""How often to look without a notification: a transaction pooler drops LISTEN, and one may be lost with its connection."""
RECONNECT_SECONDS = 5.0
SOLE_RETRY_SECONDS = 1.0
MAX_ANSWER_AGE_SECONDS = 60.0
STALL_SECONDS = 30.0
"""A transaction that takes longer than this is given up and run again, because the network may be cut."""
MIGRATION_SECONDS = 3600.0
"""The same for a migration, which may build an index of a large table."""
# Advisory locks are shared by all users of a database; these numbers spell lbr.
CREATION_LOCK, SOLE_LOCK = 0x6C_62_72_01, 0x6C_62_72_03
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
# would sort all pending jobs each time; of a small one it would read every row to claim a few.
_SLOW_PLANS = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "enable_hashjoin", "enable_mergejoin")
WRITER_SETTINGS = SERVER_SETTINGS | dict.fromkeys(_SLOW_PLANS, "off")

_NOW = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)")
_CREATING = text(f"SELECT pg_advisory_xact_lock({CREATION_LOCK}, 0)")
_TRY_SOLE = f"SELECT pg_try_advisory_lock({SOLE_LOCK}, 0)"
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'lbr' AND pid <> pg_backend_pid()"
)

DRIVER_ERRORS = asyncpg.PostgresError, asyncpg.InterfaceError
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


def arguments_of(address: Address, settings: Mapping[str, str] = SERVER_SETTINGS) -> dict[str, Any]:
    """Return the arguments of a connection. A pooler refuses settings and keeps no prepared statement."""
    shared: dict[str, Any] = {"dsn": address.dsn, "timeout": CONNECT_SECONDS}
    if address.pooled:
        return shared | {"statement_cache_size": 0, "server_settings": {"application_name": "lbr"}}
    return shared | {"server_settings": dict(settings)}


def make_engine(address: Address, isolation: Any, settings: Mapping[str, str], **options: Any) -> AsyncEngine:
    """Return an engine of two connections with this isolation level, server settings and execution options."""
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
        pool_size=2,
        max_overflow=0,
        execution_options={"schema_translate_map": {None: SCHEMA}} | options,
    )


class Listener:
    """A connection that listens for notifications, with polling behind it. That it cannot listen is never an error."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._listening: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._called = True
        self._next_poll = 0.0

    def heard(self) -> bool:
        """Return whether a notification came since the last call, or it is time to look without one."""
        if self._listening is None and not self._address.pooled:
            self._listening = asyncio.create_task(self._keep_listening())
        now = time.monotonic()
        if not self._called and now < self._next_poll:
            return False
        self._called = False
        self._next_poll = now + POLL_SECONDS
        return True

    async def _keep_listening(self) -> None:
        while True:
            with suppress(OSError, TimeoutError, *DRIVER_ERRORS):
                connection, lost = await asyncpg.connect(**arguments_of(self._address)), asyncio.Event()
                try:
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    await connection.add_listener(CHANNEL, self._hear)
                    self._connection = connection
                    self._hear()  # a notification from before is lost
                    await lost.wait()
                finally:
                    connection.terminate()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _hear(self, *_: object) -> None:
        self._called = True

    async def close(self) -> None:
        """Stop listening."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)


class PassingError(Exception):
    """Why a transaction cannot succeed for now."""


def _driver_error(error: BaseException) -> BaseException:
    """Return what the driver raised, without what SQLAlchemy adds."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def sqlstate_of(error: BaseException) -> str | None:
    """Return the server's code for an error, None if it has none."""
    code = getattr(_driver_error(error), "sqlstate", None)
    return code if isinstance(code, str) else None


def is_passing(error: Exception) -> bool:
    """Return whether the same transaction may well succeed when it is run again."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, OSError | TimeoutError | PassingError):
        return True
    code, words = sqlstate_of(error), _words(error)
    if code is not None:
        # A pooler has this one code; a setting that it refuses, it will always refuse.
        refused = code == "08P01" and "startup parameter" in words
        return not refused and (code[:2] in PASSING_CLASSES or code in PASSING)
    # An error without a code is the driver's, about a connection that is gone or breaks off.
    cut_off = "connection" in words and any(one in words for one in ("closed", "lost", "reset", "in the middle"))
    return isinstance(error, DBAPIError) and (error.connection_invalidated or cut_off)


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
    cause = _driver_error(error)
    return "it does not answer" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__


@contextmanager
def database_errors(name: str, patience: float) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except (OSError, TimeoutError, PassingError) as error:
        raise DatabaseError(f"cannot reach the database {name}: {reason_of(error, patience)}") from error
    except (SQLAlchemyError, *DRIVER_ERRORS) as error:
        raise DatabaseError(f"cannot use the database {name}: {reason_of(error, patience)}") from error


class PostgresDatabase(Database):
    """An open PostgreSQL queue: two writing connections, up to two readers, one that listens."""

    def __init__(self, url: PathOrUrl, *, clock: Callable[[], Millis] | None, patience: float) -> None:
        address = address_of(url)
        places = [*files.state_places(address.server), Path.cwd() / files.telling_name(address.server)]
        # The server frees a dead worker's locks at once, but also those of one that is only cut off.
        super().__init__(address.shown, patience=patience, spool_places=places, presence=Presence())
        self._clock = clock
        self._stall_seconds = STALL_SECONDS
        self._server_time = 0, -math.inf  # its latest answer, and when that came
        self._writer = make_engine(address, "READ COMMITTED", WRITER_SETTINGS)
        self._reader = make_engine(address, "REPEATABLE READ", SERVER_SETTINGS, postgresql_readonly=True)
        self._listener = Listener(address)

    async def _write(self, work: Work[T]) -> T:
        async with asyncio.timeout(self._stall_seconds), self._writer.connect() as connection:
            try:
                result = await connection.run_sync(lambda plain: work(plain, self._time(plain, 0)))
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
            return await connection.run_sync(lambda plain: work(plain, self._time(plain, MAX_ANSWER_AGE_SECONDS)))

    def _time(self, connection: Connection, max_age: float) -> Millis:
        """Return the server's time, because its users' clocks may differ, by an answer of it that is at most so old."""
        if self._clock is not None:
            return self._clock()
        if time.monotonic() - self._server_time[1] >= max_age:
            self._server_time = int(connection.scalar(_NOW) or 0), time.monotonic()
        now, at = self._server_time
        return Millis(now + round((time.monotonic() - at) * 1000))

    def _passes(self, error: Exception) -> bool:
        return is_passing(error)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.name, self.patience)

    async def changed(self) -> bool:
        """Return whether a notification came, or may have been lost."""
        return self._listener.heard()

    async def filled(self) -> None:
        """Tell the planner how many rows there are; autovacuum would do so a minute later."""
        await self.write(lambda connection, _: connection.execute(text(f"ANALYZE {SCHEMA}.jobs")))

    async def give_back_space(self) -> None:
        """Do nothing: autovacuum lets later rows use the space."""

    async def prepare(self, *, create: bool) -> None:
        """Upgrade older tables; create missing ones only with `create`."""
        patience, self.patience = self.patience, min(self.patience, OPEN_PATIENCE_SECONDS)
        version = await self.read(lambda connection, _: migrations.applied_version(connection))
        self.check_version(version, create=create)
        if version < migrations.LATEST:
            self._stall_seconds = MIGRATION_SECONDS if version else STALL_SECONDS
            await self.write(_create, self.presence.dead_workers)
        self.patience, self._stall_seconds = patience, STALL_SECONDS

    async def close(self) -> None:
        """Close every connection."""
        await self._listener.close()
        await self._reader.dispose()
        await self._writer.dispose()


def _create(connection: Connection, now: Millis, dead_workers: Any) -> None:
    connection.execute(_CREATING)
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    migrations.migrate(connection, now, dead_workers)


def _drop(connection: Connection, _now: Millis, run: str) -> bool:
    """Drop the queue if this is its only user and `run` its only run; return whether it did."""
    connection.execute(_CREATING)
    if connection.scalar(_OTHERS):
        return False
    # Another process that comes now waits for the lock, and then finds no table.
    connection.execute(text(f"LOCK TABLE {SCHEMA}.runs IN ACCESS EXCLUSIVE MODE"))
    if set(connection.execute(select(schema.runs.c.name)).scalars()) != {run}:
        return False
    connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))
    return True


async def remove_queue(url: PathOrUrl, *, run: str) -> bool:
    """Drop a queue that no process uses and that holds one run only; see `lbr.store.database.remove_queue`."""
    database = PostgresDatabase(url, clock=None, patience=OPEN_PATIENCE_SECONDS)
    try:
        return await database.write(_drop, run)
    finally:
        await database.close()


@asynccontextmanager
async def sole_worker(url: PathOrUrl) -> AsyncIterator[None]:
    """Hold the lock of the queue's exclusive worker, on whatever machine.

    Raises AlreadyRunningError if another worker has it, also if it was lost with its connection and another worker
    took it: the body is then cancelled and releases its jobs.
    """
    address = address_of(url)
    if address.pooled:
        raise UsageError(
            "expected a URL without pgbouncer=true for --exclusive, whose lock a transaction pooler would give "
            "to others; name the server itself"
        )
    connection, holder = await _lock(address), asyncio.current_task()

    async def keep() -> None:
        """Take the lock again whenever its connection is lost; cancel the body if another worker has it."""
        nonlocal connection
        while True:
            await asyncio.sleep(SOLE_RETRY_SECONDS)
            try:
                if connection.is_closed():
                    connection = await _lock(address)
            except DatabaseError:
                continue  # the body waits the outage out, or ends with it
            except AlreadyRunningError:
                if holder is not None:
                    holder.cancel()
                raise

    keeping = asyncio.create_task(keep())
    try:
        yield
    except asyncio.CancelledError:
        if keeping.done():
            keeping.result()  # raises why
        raise
    finally:
        keeping.cancel()
        try:
            await asyncio.gather(keeping, return_exceptions=True)
        finally:
            connection.terminate()


async def _lock(address: Address) -> Any:
    """Return a connection that holds the lock. Raises AlreadyRunningError if another worker has it, DatabaseError."""
    with database_errors(address.shown, SOLE_RETRY_SECONDS):
        connection = await asyncpg.connect(**arguments_of(address))
        held = False
        try:
            held = await connection.fetchval(_TRY_SOLE)
        finally:
            if not held:
                connection.terminate()
    if not held:
        raise AlreadyRunningError(f"an exclusive worker of {address.shown} is running already; nothing to do")
    return connection
