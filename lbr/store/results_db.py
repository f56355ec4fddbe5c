"""The results database: the answers of runs as plain rows, for programs that read SQLite and know nothing of lbr."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
)
from sqlalchemy.types import UserDefinedType

from lbr.core import ownership
from lbr.core.errors import DatabaseError, OutputError, UsageError
from lbr.core.types import AnswerRow, Prompt
from lbr.store import files
from lbr.store.addresses import is_postgresql, sqlite_path
from lbr.store.sql import if_small, is_after, pages
from lbr.store.sqlite import (
    BEGIN_WRITING,
    SCHEMA_ROWS,
    database_errors,
    file_engine,
    foreign_code,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator
    from pathlib import Path

    from sqlalchemy import ColumnElement, Connection, RowMapping, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.core.types import PathOrUrl

# The default journal, not a WAL: the file stays one file, which can be copied or sent.
PRAGMAS = ("PRAGMA busy_timeout = 30000", "PRAGMA synchronous = FULL")


class _AsGiven(UserDefinedType[Any]):
    """A column that keeps numbers and texts as they are."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the type that converts nothing."""
        return "BLOB"


metadata = MetaData()
results = Table(
    "results",
    metadata,
    Column("run", Text, primary_key=True),
    Column("idx", Integer, primary_key=True),
    Column("id", _AsGiven),
    Column("key", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("metadata", Text),
    Column("sample", Integer, primary_key=True),
)
_OLD = [column.name for column in results.c][:-1]
"""The columns in files of earlier versions."""
_PAYLOADS = if_small(results.c.prompt, results.c.result, results.c.metadata)


def _rows_of(sample: ColumnElement[int]) -> Select[Any]:
    number = sample.label("sample")
    return (
        select(*(_PAYLOADS.get(name, results.c[name]) for name in _OLD), number)
        .where(results.c.run == bindparam("run"), is_after(results.c.idx, sample))
        .order_by(results.c.idx, number)
        .limit(bindparam("limit"))
    )


_RUNS = text("SELECT run FROM results GROUP BY run ORDER BY max(rowid)")


async def check(url: PathOrUrl, *, name: str, queue: Path | None) -> None:
    """Raise UsageError, OutputError or DatabaseError if no results could be written; change nothing.

    `name` is what messages call the URL's option, `queue` the file of the queue, None if it is on a server.
    """
    if is_postgresql(url):
        raise UsageError(f"expected {name} to name a file, got: a PostgreSQL URL; leave it out, or name a file")
    path = sqlite_path(url, name=name)
    files.check_location(path, create=True, name=name)
    if path == queue:
        raise _the_queue()
    if path.exists():
        ownership.check_database(path)
        async with _transaction(path) as connection:
            await connection.run_sync(_check_table)


async def write_run(url: PathOrUrl, run: str, pages: AsyncIterable[list[AnswerRow]]) -> int:
    """Replace one run's rows in the results database, in one transaction; return how many rows.

    The file is created if it is new, private like the queue. Other runs' rows stay.
    """
    path = sqlite_path(url)
    files.check_location(path, create=True)
    files.create_private(path)
    ownership.check_database(path)
    count = 0
    async with _transaction(path, begin=BEGIN_WRITING) as connection:
        await connection.run_sync(_check_table)
        await connection.run_sync(_upgrade)
        await connection.execute(delete(results).where(results.c.run == run))
        async for page in pages:
            await connection.execute(insert(results), [_to_columns(run, row) for row in page])
            count += len(page)
    return count


async def runs_in(url: PathOrUrl) -> list[str]:
    """Return the names of the runs in a results database, the newest last; none if it is another kind of file."""
    path = sqlite_path(url)
    files.check_location(path, create=False)
    async with _transaction(path) as connection:
        tables = {row.name for row in (await connection.exec_driver_sql(SCHEMA_ROWS)).all() if row.type == "table"}
        if "results" not in tables or "schema_version" in tables:
            return []
        return list((await connection.execute(_RUNS)).scalars())


async def read_run(url: PathOrUrl, run: str) -> AsyncIterator[list[AnswerRow]]:
    """Yield one run's rows in order, page by page, chat messages as text; nothing if there is no such run."""
    path = sqlite_path(url)
    async with _transaction(path) as connection:
        is_old = await connection.run_sync(_names) == _OLD
        sample = literal_column("0", Integer) if is_old else results.c.sample
        several = bool(await connection.scalar(select(func.max(sample)).where(results.c.run == run)))
    query = _rows_of(sample)

    async def read(bound: dict[str, int]) -> tuple[int, list[Any]]:
        async with _transaction(path) as connection:
            rows = (await connection.execute(query, {"run": run, **bound})).all()
        return len(rows), list(takewhile(lambda row: row.prompt is not None, rows))

    async for page in pages(read):
        found = [_from_columns(row._mapping) for row in page]  # noqa: SLF001 - SQLAlchemy's public name
        yield [replace(one, sample=row.sample) for one, row in zip(found, page, strict=True)] if several else found


async def remove(url: PathOrUrl, *, run: str) -> bool:
    """Remove a results database that no process uses and that holds one run only; return whether it did."""
    return await files.remove_unused(sqlite_path(url), run=run, query="SELECT DISTINCT run FROM results")


@asynccontextmanager
async def _transaction(path: Path, *, begin: str = "BEGIN") -> AsyncIterator[AsyncConnection]:
    engine = file_engine(path, begin, *PRAGMAS)
    try:
        with database_errors(path):
            async with engine.begin() as connection:
                yield connection
    finally:
        await engine.dispose()


def _check_table(connection: Connection) -> None:
    found = connection.exec_driver_sql(SCHEMA_ROWS).all()
    if running := foreign_code(found, metadata.tables):
        raise OutputError(
            f"expected a results database of lbr, got: one with {running}, which would run when answers are written; "
            f"drop it, or name another file for the results"
        )
    if "schema_version" in {row.name for row in found}:
        raise _the_queue()
    names = _names(connection)
    if names and names not in (_OLD, [column.name for column in results.c]):
        raise OutputError(
            f"expected a results database of lbr, got: one with other columns ({', '.join(names)}); "
            f"name another file for the results"
        )


def _names(connection: Connection) -> list[str]:
    return list(connection.exec_driver_sql("SELECT name FROM pragma_table_info('results')").scalars())


def _upgrade(connection: Connection) -> None:
    """Make the table; that of an earlier version gets the column of samples, which is part of the key."""
    is_old = _names(connection) == _OLD
    if is_old:
        connection.exec_driver_sql("ALTER TABLE results RENAME TO results_before")
    metadata.create_all(connection)
    if is_old:
        names = ", ".join(_OLD)
        copying = f"INSERT INTO results ({names}, sample) SELECT {names}, 0 FROM results_before ORDER BY rowid"  # noqa: S608 - our own names
        connection.exec_driver_sql(copying)
        connection.exec_driver_sql("DROP TABLE results_before")


def _the_queue() -> UsageError:
    return UsageError("expected a results database of its own, got: the queue; name another file for the results")


def _to_columns(run: str, row: AnswerRow) -> dict[str, Any]:
    plain = replace(row, kept=None) if row.kept else row
    fields = {"id": None, "metadata": None} | plain.to_dict() | {"run": run, "sample": row.sample or 0}
    for name in ("prompt", "metadata"):
        if not isinstance(fields[name], str | None):
            fields[name] = orjson.dumps(fields[name]).decode()
    return fields


def _from_columns(found: RowMapping) -> AnswerRow:
    try:
        metadata = None if found["metadata"] is None else orjson.loads(found["metadata"])
    except orjson.JSONDecodeError as error:  # also for what is no text
        shown = str(found["metadata"])[:200]
        raise DatabaseError(f"expected stored metadata to be JSON, got: {shown!r}") from error
    plain = {name: found[name] for name in ("idx", "key", "status", "result", "error")}
    return AnswerRow(**plain, prompt=Prompt(found["prompt"]), custom_id=found["id"], metadata=metadata)
