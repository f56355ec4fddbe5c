"""How the file of an SQLite queue stands, looked at by connections that cannot write, not even take a checkpoint."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, Integer, LargeBinary, func, select
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect

from lbr.store import files, schema
from lbr.store.file_connections import HARMLESS, READER_PRAGMAS, FileConnections
from lbr.store.sqlite import SQLiteDatabase

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Column
    from sqlalchemy.types import TypeEngine

    from lbr.core.types import Millis
    from lbr.store.connection import Connection

MOST_DAMAGES = 5

_LITERALLY: dict[str, Any] = {"dialect": sqlite_dialect(), "compile_kwargs": {"literal_binds": True}}


@dataclass(frozen=True, slots=True)
class FileHealth:
    """What can be said of the file without opening it.

    `file_system` is None where the system does not tell it. `modes` are the permissions of the database and of what
    SQLite keeps beside it, by name. `writable` tells whether this user may write the file and make others beside it,
    `closed_locks` are the lock files that are there and that this user may not open.
    """

    path: Path
    sqlite_version: str
    file_system: str | None
    is_network: bool
    modes: dict[str, int]
    wal_bytes: int
    writable: bool
    closed_locks: list[Path]


class LookingDatabase(SQLiteDatabase):
    """A queue that nothing can be written to, and whose file and WAL stay as they are when it is closed.

    A `hasty` one takes a file beside which there is no WAL for one that nobody uses; `disturbed` tells that it erred.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], Millis], patience: float, hasty: bool = True
    ) -> None:
        super().__init__(path, clock=clock, patience=patience)
        self._before = _state_of(path)
        # A connection in WAL mode makes the files that it shares with others, and one that cannot write would leave
        # them behind. Where they are not there, nobody has the database open, and all of it is in the one file.
        alone = hasty and not self._wal.exists() and not Path(f"{path}-journal").exists()
        options = {"immutable": "1"} if alone else {"mode": "ro"}
        self._alone = alone
        self._reader = FileConnections(path, begin="BEGIN", most=1, pragmas=READER_PRAGMAS, options=options)

    @property
    def disturbed(self) -> bool:
        """Whether somebody has opened the database since, whom we could not hear: what was seen may be wrong."""
        return self._alone and (self._wal.exists() or _state_of(self.path) != self._before)


def _state_of(path: Path) -> tuple[int, ...]:
    found = _stat(path)
    return () if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def look_at_file(path: Path) -> FileHealth:
    """Look at the file from outside; nothing is opened. What is not there is left out."""
    kind = files.file_system(path)
    found = {suffix: one for suffix in files.SUFFIXES if (one := _stat(Path(f"{path}{suffix}"))) is not None}
    return FileHealth(
        path=path,
        sqlite_version=sqlite3.sqlite_version,
        file_system=kind,
        is_network=files.is_network(kind),
        modes={f"{path.name}{suffix}": stat.S_IMODE(one.st_mode) for suffix, one in found.items()},
        wal_bytes=found["-wal"].st_size if "-wal" in found else 0,
        writable=_may_write(path) and _may_write(path.parent),
        closed_locks=[lock for lock in _locks(path) if lock.exists() and not _may_write(lock)],
    )


def misfit(path: Path) -> str | None:
    """Return where the file has a value of another type than its column: SQLite lets anybody write one.

    None where all fit. It reads all rows, and is for those whom such a value may have made fail. Raises sqlite3.Error.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute(HARMLESS)
        for table in schema.metadata.sorted_tables:
            for column in table.columns:
                fitting = _fitting_types(column)
                kind = func.typeof(column)
                query = select(kind).where(kind.not_in(fitting)).limit(1)
                found = connection.execute(str(query.compile(**_LITERALLY))).fetchone()
                if found is not None:
                    return f"expected {column.name} of {table.name} to be {fitting[0]}, got: {found[0]}"
    return None


def _fitting_types(column: Column[Any]) -> list[str]:
    kinds: list[tuple[type[TypeEngine[Any]], list[str]]] = [
        (Integer, ["integer"]),
        (Float, ["real", "integer"]),
        (LargeBinary, ["blob"]),
    ]
    fitting = next((types for kind, types in kinds if isinstance(column.type, kind)), ["text"])
    return [*fitting, "null"] if column.nullable else fitting


def _locks(path: Path) -> list[Path]:
    """Return the locks that are taken by turns; those by which workers tell that they live are nobody else's matter."""
    return [files.lock_path(path, purpose) for purpose in ("checkpoint", "create", "worker")]


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _stat(path: Path) -> os.stat_result | None:
    """Look at a regular file; None for none, and for what is something else."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


async def damages(database: SQLiteDatabase) -> list[str]:
    """Return what SQLite finds wrong in the file, a few lines at most. It reads all of it."""

    async def work(connection: Connection) -> list[str]:
        found = await connection.exec_driver_sql(f"PRAGMA integrity_check({MOST_DAMAGES})")
        lines = [str(line) for line in found.scalars().all()]
        return [] if lines == ["ok"] else lines

    return await database.read(work)
