"""How a PostgreSQL server stands that a queue is on, and what stands between it and us."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import text

from lbr.store.database import local_clock
from lbr.store.postgres import SCHEMA, SERVER_SETTINGS

if TYPE_CHECKING:
    from lbr.store.addresses import Address
    from lbr.store.connection import Connection
    from lbr.store.postgres import PostgresDatabase
    from lbr.store.schema import AnyRow

WATCHED = (
    "server_version",
    "server_version_num",
    "synchronous_commit",
    "fsync",
    "full_page_writes",
    "autovacuum",
)
IDLE_TIMEOUT = "idle_in_transaction_session_timeout"
SILENT_MS = 3_600_000
"""A writer that has written nothing for so long is idle, or was killed."""

_SETTINGS = text("SELECT name, setting FROM pg_settings WHERE name = ANY(:names)")
_SESSION = text(
    f"SELECT pg_backend_pid() AS pid, current_setting('{IDLE_TIMEOUT}') AS idle, pg_is_in_recovery() AS standby, "
    f"current_setting('application_name') AS name"
)
_WRITERS = text(
    f"SELECT count(*) AS total, count(*) FILTER (WHERE at < :since) AS silent FROM {SCHEMA}.writers"
)


@dataclass(frozen=True, slots=True)
class ServerHealth:
    """What the server says of itself.

    `settings` are those of `WATCHED`, as our session has them. `pooled` is what the URL says, `pooler` why something
    seems to stand before the server all the same, None for nothing; `idle_timeout` is after what time the server ends
    a session that is silent in a transaction, "0" for never. `clock_ms` is how far this machine's clock is ahead of
    the server's, give or take `unsure_ms`; `pid` is the server's number of the session that we had.
    """

    settings: dict[str, str]
    pooled: bool
    pooler: str | None
    idle_timeout: str
    standby: bool
    clock_ms: int
    unsure_ms: int
    pid: int

    @property
    def version(self) -> int:
        """The server's major version."""
        return int(self.settings["server_version_num"]) // 10_000


@dataclass(frozen=True, slots=True)
class Writers:
    """Rows of writers: all, and those that have written nothing for an hour."""

    total: int
    silent: int


async def look_at_server(database: PostgresDatabase, address: Address) -> ServerHealth:
    """Ask the server; nothing of the queue is needed."""

    async def ask(connection: Connection) -> ServerHealth:
        settings = (await connection.execute(_SETTINGS, {"names": list(WATCHED)})).all()
        session = (await connection.execute(_SESSION)).one()
        before = local_clock()
        theirs = await database.now(connection)
        after = local_clock()
        return ServerHealth(
            settings={row.name: row.setting for row in settings},
            pooled=address.pooled,
            pooler=_pooler(address, session),
            idle_timeout=session.idle,
            standby=session.standby,
            clock_ms=(before + after) // 2 - theirs,
            unsure_ms=(after - before) // 2,
            pid=session.pid,
        )

    async def again(connection: Connection) -> int:
        return int((await connection.execute(_SESSION)).one().pid)

    found = await database.read(ask)
    # The same connection of ours: by now it may have another session behind it.
    if await database.read(again) != found.pid:
        return replace(
            found, pooler="two transactions of one connection came to different sessions of the server"
        )
    return found


def _pooler(address: Address, session: AnyRow) -> str | None:
    if address.pooled or session.idle == SERVER_SETTINGS[IDLE_TIMEOUT]:
        return None
    return "the settings that our connection asks for do not reach the server"


async def look_at_writers(database: PostgresDatabase) -> Writers:
    """Count the rows of writers."""

    async def work(connection: Connection) -> Writers:
        since = await database.now(connection) - SILENT_MS
        row = (await connection.execute(_WRITERS, {"since": since})).one()
        return Writers(row.total, row.silent)

    return await database.read(work)
