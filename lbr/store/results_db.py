"""The results database: the answers of runs as plain rows, for whoever reads SQLite and knows nothing of lbr."""

from __future__ import annotations

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
    inspect,
    literal_column,
    select,
)
from sqlalchemy.types import UserDefinedType

from lbr.core import ownership
from lbr.core.errors import DatabaseError, OutputError, UsageError
from lbr.store import files
from lbr.store.addresses import is_postgresql
from lbr.store.file_connections import SCHEMA_ROWS, FileConnections, foreign_code
from lbr.store.file_errors import database_errors
from lbr.store.sql import if_small, pages
from lbr.store.sqlite import sqlite_path
from lbr.store.trips import BEGIN_WRITING

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator
    from pathlib import Path

    from sqlalchemy import ColumnElement, Connection, RowMapping

    from lbr.core.types import PathOrUrl, Row


class _AsGiven(UserDefinedType[Any]):
    """A column that keeps numbers and texts as they are."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the type whose affinity is none."""
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
)
_PAYLOADS = if_small(results.c.prompt, results.c.result, results.c.metadata)
_ROWS = (
    select(*(_PAYLOADS.get(column.name, column) for column in results.c))
    .where(results.c.run == bindparam("run"), results.c.idx > bindparam("after"))
    .order_by(results.c.idx)
    .limit(bindparam("limit"))
)
PATIENCE_MS = 30_000


async def check(url: PathOrUrl, *, name: str, queue: Path | None) -> None:
    """Raise UsageError, OutputError or DatabaseError where no results could be written, and make and change nothing.

    `name` is what messages call the URL's option, `queue` the file of the queue, None where it is on a server.
    """
    if is_postgresql(url):
        raise UsageError(
            f"expected {name} to name a file, got: a PostgreSQL URL; leave it out, or name a file"
        )
    path = sqlite_path(url, name=name)
    files.check_location(path, create=True, name=name)
    if path == queue:
        raise _the_queue()
    if not path.exists():
        return
    ownership.check_database(path)
    connections = _open(path, begin="BEGIN")
    try:
        with database_errors(path):
            async with connections.transaction() as connection:
                await connection.run_sync(_check_table)
    finally:
        await connections.close()


async def write_run(url: PathOrUrl, run: str, pages: AsyncIterable[list[Row]]) -> int:
    """Replace one run's rows in the results database, in one transaction; return how many rows.

    The file is made if it is new, private like the queue. Other runs' rows stay.
    """
    path = sqlite_path(url)
    files.check_location(path, create=True)
    files.create_private(path)
    ownership.check_database(path)
    connections = _open(path, begin=BEGIN_WRITING)
    count = 0
    try:
        with database_errors(path):
            async with connections.transaction() as connection:
                await connection.run_sync(_check_table)
                await connection.run_sync(metadata.create_all)
                await connection.execute(delete(results).where(results.c.run == run))
                async for page in pages:
                    await connection.execute(insert(results), [_to_columns(run, row) for row in page])
                    count += len(page)
    finally:
        await connections.close()
    return count


async def runs_in(url: PathOrUrl) -> list[str]:
    """Return the names of the runs in a results database, the newest last; none where it is another kind of file."""
    path = sqlite_path(url)
    files.check_location(path, create=False)
    connections = _open(path, begin="BEGIN")
    try:
        with database_errors(path):
            async with connections.transaction() as connection:
                if not await connection.run_sync(_has_table):
                    return []
                newest: ColumnElement[int] = func.max(literal_column("rowid"))
                query = select(results.c.run).group_by(results.c.run).order_by(newest)
                return list((await connection.execute(query)).scalars())
    finally:
        await connections.close()


async def read_run(url: PathOrUrl, run: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Yield one run's rows in order, page by page, as they are collected; UsageError where there is no such run."""
    path = sqlite_path(url)
    connections = _open(path, begin="BEGIN")

    async def read(bound: dict[str, int]) -> tuple[int, list[Any]]:
        with database_errors(path):
            async with connections.transaction() as connection:
                rows = (await connection.execute(_ROWS, {"run": run, **bound})).all()
        return len(rows), list(takewhile(lambda row: row.prompt is not None, rows))

    try:
        async for page in pages(read):
            yield [_from_columns(row._mapping) for row in page]  # noqa: SLF001 - SQLAlchemy's public name
    finally:
        await connections.close()


async def remove(url: PathOrUrl, *, run: str) -> bool:
    """Remove a results database that nobody else uses and that holds one run only; tell whether it did."""
    return await files.remove_unused(sqlite_path(url), run=run, query="SELECT DISTINCT run FROM results")


def _open(path: Path, *, begin: str) -> FileConnections:
    # The default journal, not a WAL: the file stays one file, which can be copied or sent.
    pragmas = (f"PRAGMA busy_timeout = {PATIENCE_MS}", "PRAGMA synchronous = FULL")
    return FileConnections(path, begin=begin, most=1, pragmas=pragmas)


def _has_table(connection: Connection) -> bool:
    return inspect(connection).has_table("results") and not inspect(connection).has_table("schema_version")


def _check_table(connection: Connection) -> None:
    if running := foreign_code(connection.exec_driver_sql(SCHEMA_ROWS).all(), metadata.tables):
        raise OutputError(
            f"expected a results database of lbr, got: one with {running}, which would run when answers are written; "
            f"drop it, or name another file for the results"
        )
    if inspect(connection).has_table("schema_version"):
        raise _the_queue()
    if inspect(connection).has_table("results"):
        names = [column["name"] for column in inspect(connection).get_columns("results")]
        if names != [column.name for column in results.c]:
            raise OutputError(
                f"expected a results database of lbr, got: one with other columns ({', '.join(names)}); "
                f"name another file for the results"
            )


def _the_queue() -> UsageError:
    return UsageError(
        "expected a results database of its own, got: the queue; name another file for the results"
    )


def _to_columns(run: str, row: Row) -> dict[str, Any]:
    fields = row.to_dict()
    for name in ("prompt", "metadata"):
        if not isinstance(fields.get(name), str | None):
            fields[name] = orjson.dumps(fields[name]).decode()
    return {"id": None, "metadata": None} | fields | {"run": run}


def _from_columns(found: RowMapping) -> dict[str, Any]:
    fields: dict[str, Any] = {"idx": found["idx"]}
    if found["id"] is not None:
        fields["id"] = found["id"]
    fields |= {name: found[name] for name in ("key", "prompt", "status", "result", "error")}
    if found["metadata"] is not None:
        fields["metadata"] = _metadata(found["metadata"])
    return fields


def _metadata(text: Any) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:  # for what is no text, too
        raise DatabaseError(f"expected stored metadata to be JSON, got: {str(text)[:200]!r}") from error
