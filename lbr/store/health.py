"""How a queue stands, wherever it is: the file or the server, the schema, and what the tables say. Nothing here writes.

A queue may be in use, damaged, of another version, or no queue at all: whatever can be seen of it is told, and what
cannot be is a problem among others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lbr.core.errors import LbrError
from lbr.store import file_health, files, schema
from lbr.store.addresses import address_of, is_postgresql
from lbr.store.database import local_clock
from lbr.store.queue_health import Looker, Problem, QueueHealth, look_at
from lbr.store.sqlite import SQLiteDatabase, sqlite_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.file_health import FileHealth
    from lbr.store.server_health import ServerHealth, Writers

PATIENCE = 5.0
"""A doctor waits for a busy database for so many seconds at each look."""

LATEST = schema.LATEST
OPENING = "database"
"""The check whose problem is that the queue cannot be read at all."""


@dataclass(slots=True)
class Health:
    """What was seen of a queue; None is what could not be, or is not there for this kind of database.

    `version` is the schema's, 0 for an empty database; `damages` is empty for a sound file; `refused` tells that the
    file was not opened, for it is on a network file system.
    """

    name: str
    spool_places: Sequence[Path]
    file: FileHealth | None = None
    refused: bool = False
    server: ServerHealth | None = None
    writers: Writers | None = None
    version: int | None = None
    damages: list[str] | None = None
    queue: QueueHealth | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_current(self) -> bool:
        """Whether the tables are those that this lbr knows."""
        return self.version == LATEST


async def examine(
    url: PathOrUrl, *, allow_network_fs: bool = False, clock: Callable[[], Millis] | None = None
) -> Health:
    """Look at the queue at a path or URL. UsageError for what cannot be one; else it raises nothing."""
    if is_postgresql(url):
        return await _examine_server(url, clock)
    path = sqlite_path(url)
    health, disturbed = await _examine_file(path, allow_network_fs, clock or local_clock, hasty=True)
    if disturbed:
        health, _ = await _examine_file(path, allow_network_fs, clock or local_clock, hasty=False)
    return health


async def _examine_file(
    path: Path, allow_network_fs: bool, clock: Callable[[], Millis], *, hasty: bool
) -> tuple[Health, bool]:
    """Return how a file stands, and whether others came in between, so that it has to be looked at again."""
    health = Health(str(path), SQLiteDatabase(path).spool_places)
    try:
        health.file = file_health.look_at_file(path)
        health.refused = health.file.is_network and not allow_network_fs
        files.check_location(path, create=False)
        files.check_file(path)
        database = file_health.LookingDatabase(path, clock=clock, patience=PATIENCE, hasty=hasty)
    except (LbrError, OSError, ValueError) as error:
        health.problems.append(Problem(OPENING, str(error)))
        return health, False
    if health.refused:
        return health, False
    looker = Looker(health.problems)
    try:
        health.version = await looker.look(OPENING, database.read(database.version))
        if health.version is not None:
            health.damages = await looker.look("integrity", file_health.damages(database))
        if health.is_current:
            health.queue = await look_at(database, looker)
        return health, database.disturbed
    finally:
        await database.close()


async def _examine_server(url: PathOrUrl, clock: Callable[[], Millis] | None) -> Health:
    from lbr.store import postgres, server_health  # noqa: PLC0415 - its driver is an extra

    database = postgres.open_postgres(url, clock=clock, patience=PATIENCE)
    health = Health(database.name, database.spool_places)
    looker = Looker(health.problems)
    try:
        health.version = await looker.look(
            OPENING, database.read(lambda connection: connection.run_sync(schema.applied_version))
        )
        if health.version is None:
            return health
        health.server = await looker.look("server", server_health.look_at_server(database, address_of(url)))
        if health.is_current:
            health.writers = await looker.look("writers", server_health.look_at_writers(database))
            health.queue = await look_at(database, looker)
        return health
    finally:
        await database.close()
