"""Connections to a PostgreSQL server: their settings, LISTEN, and what the server's errors mean."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from lbr.core.errors import DatabaseError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.store.addresses import Address

CONNECT_SECONDS = 10.0
POLL_SECONDS = 1.0
"""How often to look without a notification: a transaction pooler drops LISTEN, and one may be lost with its connection."""
RECONNECT_SECONDS = 5.0
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
WRITER_SETTINGS = SERVER_SETTINGS | dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_sort"), "off")

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


def make_engine(
    address: Address,
    isolation: Any,
    *,
    pool_size: int,
    options: dict[str, Any],
    settings: Mapping[str, str] = SERVER_SETTINGS,
) -> AsyncEngine:
    """Return an engine whose connections have this isolation level, execution options and server settings."""
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
    return "connection" in words and any(word in words for word in ("closed", "lost", "reset", "in the middle"))


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
