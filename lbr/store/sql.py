"""SQL that both databases understand in their own form: lists, many rows in one statement, pages, a lock on a table.

On SQLite a list is a JSON array (keys: one string of bytes), and many rows are an executemany of plain tuples; on
PostgreSQL they are `= ANY(array)` and `unnest`. So the text of a statement is the same for every length.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import (
    ARRAY,
    Integer,
    bindparam,
    case,
    column,
    func,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.types import Boolean, LargeBinary, Text, TypeDecorator

from lbr.core.errors import DatabaseError
from lbr.core.types import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Dialect, Table
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

    from lbr.core.types import Json, RunId

SCHEMA = "lbr"
CHANNEL = "lbr"
TURNS_LOCK = 0x6C_62_72_02
SHARDS = 32
PAGE = 2_500
FIRST_PAGE = 500
PAGE_BYTES = 8_000_000
_ANY_SIZE = 2**31 - 1
_SQLITE = sqlite.dialect(paramstyle="qmark")


class _List(TypeDecorator[Any]):
    """A list of values of one type, for SQLite: keys, which have one length, behind each other, others as JSON."""

    impl = Text
    cache_ok = True

    def __init__(self, *, keys: bool) -> None:
        super().__init__()
        self.keys = keys

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type of the whole."""
        return dialect.type_descriptor(LargeBinary() if self.keys else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | bytes:
        """Write the list."""
        return b"".join(value) if self.keys else orjson.dumps(value).decode()


class any_of(FunctionElement[bool]):  # noqa: N801 - reads as an operator
    """Whether a column is one of a list that is given by its name when the statement is run."""

    inherit_cache = True
    type = Boolean()

    def __init__(self, column: ColumnElement[Any], name: str) -> None:
        super().__init__(column, bindparam(name, type_=_List(keys=isinstance(column.type, LargeBinary))))

    def self_group(self, against: Any = None) -> any_of:
        """Stay as it is: a comparison, not a column of booleans, which SQLite would have compared with 1."""
        return self


_KEYS = f"""\
WITH RECURSIVE places(place) AS (
  SELECT 1 UNION ALL SELECT place + {KEY_BYTES} FROM places WHERE place + {KEY_BYTES} <= length(%s)
) SELECT substr(%s, place, {KEY_BYTES}) FROM places"""


@compiles(any_of)
def _in_list(element: any_of, compiler: SQLCompiler, **options: Any) -> str:
    what, given = element.clauses
    text = compiler.process(given, **options)
    chosen = _KEYS % (text, text) if isinstance(what.type, LargeBinary) else f"SELECT value FROM json_each({text})"
    return f"{compiler.process(what, **options)} IN ({chosen})"


@compiles(any_of, "postgresql")
def _in_array(element: any_of, compiler: SQLCompiler, **options: Any) -> str:
    what, given = element.clauses
    array = bindparam(given.key, type_=ARRAY(what.type, dimensions=1))
    return compiler.process(what == func.any(array), **options)


def driver_of(connection: Connection) -> sqlite3.Connection | None:
    """Return sqlite3's own connection, None if it is in another thread or of another driver."""
    driver = connection.connection.driver_connection
    return driver if isinstance(driver, sqlite3.Connection) else None


def fetch(driver: sqlite3.Connection, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Have sqlite3 run text with these values in its places, and return all rows. Raises as SQLAlchemy does."""
    with _as_sqlalchemy():
        return driver.execute(statement, values).fetchall()


def change(driver: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> int:
    """Have sqlite3 run text for each of the rows, and return how many it changed. Raises as SQLAlchemy does."""
    with _as_sqlalchemy():
        return driver.executemany(statement, rows).rowcount


@contextmanager
def _as_sqlalchemy() -> Iterator[None]:
    """Raise what SQLAlchemy would raise, without the statement and its values, which are a job's own."""
    try:
        yield
    except sqlite3.Error as error:
        raise DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True) from error


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a bulk statement: `rows["name"]` is a field of each of them, `insert` makes the INSERT of them all."""

    fields: Mapping[str, ColumnElement[Any]]
    insert: Callable[[Table], Any]

    def __getitem__(self, name: str) -> ColumnElement[Any]:
        return self.fields[name]


class BulkStatement:
    """One statement for many rows, whose fields have these types; `build` makes it of a `Rows`."""

    def __init__(self, types: Mapping[str, TypeEngine[Any]], build: Callable[[Rows], Any]) -> None:
        self._types = types
        self._build = build

    @cached_property
    def each(self) -> Any:
        """The statement for one row at a time."""
        fields = {name: bindparam(name, type_=type_) for name, type_ in self._types.items()}
        return self._build(Rows(fields, lambda table: sqlite.insert(table).values(fields)))

    @cached_property
    def _direct(self) -> tuple[str, Callable[[tuple[Any, ...]], tuple[Any, ...]] | None]:
        """The text for one row at a time, and what puts its values into the text's order, None if they have it.

        sqlite3 gets both as they are, because SQLAlchemy takes as long for a row as SQLite takes to write it.
        """
        compiled = self.each.compile(dialect=_SQLITE)
        names = list(self._types)
        places = [names.index(name) for name in compiled.positiontup or []]
        return str(compiled), None if places == list(range(len(names))) else itemgetter(*places)

    @cached_property
    def whole(self) -> Any:
        """The statement for arrays, one for each field, named `all_` and the field."""
        from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415 - slow to load, and not needed for a file

        arrays = [bindparam(f"all_{name}", type_=ARRAY(type_, dimensions=1)) for name, type_ in self._types.items()]
        columns = [column(name, type_) for name, type_ in self._types.items()]
        rows = func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
        fields = dict(rows.c.items())
        return self._build(Rows(fields, lambda table: insert(table).from_select(list(fields), select(rows))))

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run the statement for all of the rows; return how many rows it changed."""
        fields = list(self._types)
        return self.run_plain(connection, [tuple([row[name] for name in fields]) for row in rows])

    def run_plain(self, connection: Connection, rows: list[tuple[Any, ...]]) -> int:
        """Do the same for tuples of values in the order of the fields."""
        if not rows:
            return 0
        driver = driver_of(connection)
        if driver is None:
            arrays = zip(self._types, map(list, zip(*rows, strict=True)), strict=True)
            return connection.execute(self.whole, {f"all_{name}": array for name, array in arrays}).rowcount
        text, ordered = self._direct
        return change(driver, text, rows if ordered is None else [ordered(row) for row in rows])


def types_of(table: Table, *names: str) -> dict[str, TypeEngine[Any]]:
    """Return the types of these columns by name."""
    return {name: table.c[name].type for name in names}


class Inserting(BulkStatement):
    """The bulk INSERT of these columns of a table, `unless` there is a row with the same value of that column."""

    def __init__(self, table: Table, *names: str, unless: str | None = None) -> None:
        def build(rows: Rows) -> Any:
            adding = rows.insert(table)
            return adding if unless is None else adding.on_conflict_do_nothing(index_elements=[unless])

        super().__init__(types_of(table, *names), build)


class Updating(BulkStatement):
    """The bulk UPDATE of these columns of a table; the first field is that of the `key` which finds the row."""

    def __init__(self, table: Table, key: str, *names: str) -> None:
        def build(rows: Rows) -> Any:
            return update(table).where(table.c[key] == rows[key]).values({name: rows[name] for name in names})

        super().__init__(types_of(table, key, *names), build)


class PreparedQuery:
    """A statement that is run for every batch of jobs, with values by name; it returns rows.

    On SQLite the driver gets its text, made once, because SQLAlchemy takes about as long as SQLite itself.
    """

    def __init__(self, statement: Any) -> None:
        self.statement = statement

    @cached_property
    def _direct(self) -> tuple[str, list[tuple[Any, Callable[[Any], Any] | None]]]:
        """The text, and for each of its places the parameter and what converts its value."""
        compiled = self.statement.compile(dialect=_SQLITE)
        if compiled.literal_execute_params or compiled.post_compile_params:
            raise TypeError("expected a statement whose text never changes, got: one that depends on its values")
        bound = [compiled.binds[name] for name in compiled.positiontup or []]
        return str(compiled), [(one, one.type.bind_processor(_SQLITE)) for one in bound]

    def all(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[tuple[Any, ...]]:
        """Run it and return the rows, as tuples."""
        driver = driver_of(connection)
        if driver is None:
            return connection.execute(self.statement, values).all()
        text, places = self._direct
        sent = []
        for bound, convert in places:
            value = values[bound.key] if bound.required else bound.value
            try:
                sent.append(value if convert is None else convert(value))
            except (TypeError, ValueError) as error:
                # A row had a value of another type; SQLAlchemy raises this, too.
                raise StatementError(str(error), None, None, error, hide_parameters=True) from error
        return fetch(driver, text, sent)


_NOTIFY = text(f"SELECT pg_notify('{CHANNEL}', '')")
_TAKE_TURNS = text("SELECT pg_advisory_xact_lock(:kind, :run)")
_IDS = text(
    "SELECT nextval((SELECT CAST(pg_get_serial_sequence(:table, 'id') AS regclass))) "
    "FROM generate_series(1, :count) ORDER BY 1"
)
# SQLite keeps the highest id that there was, but another program may have changed that.
_LAST_ID = text(
    "SELECT max(coalesce((SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = 'jobs'), 0), "
    "coalesce((SELECT max(id) FROM jobs), 0))"
)


def is_server(connection: Connection) -> bool:
    """Return whether many transactions may write at a time."""
    return connection.dialect.name == "postgresql"


def wake_workers(connection: Connection) -> None:
    """Let this transaction's commit wake idle workers; those of a file see every commit."""
    if is_server(connection):
        connection.execute(_NOTIFY)


def take_turns(connection: Connection, run_id: RunId) -> None:
    """Block other enqueues of a run until this transaction ends; workers do not wait for it."""
    if is_server(connection):
        connection.execute(_TAKE_TURNS, {"kind": TURNS_LOCK, "run": run_id % 2**31})


def reserve_job_ids(connection: Connection, count: int) -> Sequence[int]:
    """Return `count` ascending ids that no job has, had, or will have otherwise."""
    if is_server(connection):
        return connection.execute(_IDS, {"table": f"{SCHEMA}.jobs", "count": count}).scalars().all() if count else []
    first = connection.execute(_LAST_ID).scalar_one() + 1
    return range(first, first + count)


def shard(connection: Connection) -> int:
    """Return which row of each count a transaction adds to, so that those of a server do not wait for one row."""
    return (
        int(connection.info.setdefault("lbr_shard", SystemRandom().randrange(SHARDS))) if is_server(connection) else 0
    )


class byte_length(GenericFunction[int]):  # noqa: N801 - a function of SQL
    """The bytes of a text. SQLite knows them without reading it, unlike its characters."""

    type = Integer()
    inherit_cache = True


@compiles(byte_length)
def _octet_length(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(byte_length, "sqlite")
def _length_of_blob(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


def if_small(marker: ColumnElement[Any], *others: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    """Return columns by name that are null if they have more than `:cap` bytes; the marker, if all have together."""
    sizes: list[Any] = [byte_length(column) for column in others]
    whole: Any = sum((func.coalesce(size, 0) for size in sizes), byte_length(marker))
    return {
        column.name: case((size <= bindparam("cap"), column)).label(column.name)
        for column, size in zip((marker, *others), [whole, *sizes], strict=True)
    }


def is_after(idx: ColumnElement[int], sample: ColumnElement[int]) -> ColumnElement[bool]:
    """Return whether a row comes behind the place that `pages` asks for."""
    return tuple_(idx, sample) > tuple_(
        bindparam("after", type_=idx.type), bindparam("after_sample", type_=sample.type)
    )


async def pages(
    read: Callable[[dict[str, int]], Awaitable[tuple[int, Sequence[Any]]]], after: tuple[int, int] = (-1, 0)
) -> AsyncIterator[Sequence[Any]]:
    """Yield pages of rows behind an `idx` and `sample`, in that order: at most 2,500 rows and some megabytes at a time.

    `read` gets the values of `after`, `after_sample`, `limit` and `cap`, and returns how many rows there were, and
    those before the first that `if_small` left out.
    """
    limit = FIRST_PAGE
    while True:
        cap = PAGE_BYTES // limit if limit > 1 else _ANY_SIZE
        count, whole = await read({"after": after[0], "after_sample": after[1], "limit": limit, "cap": cap})
        if whole:
            yield whole
            after = whole[-1].idx, whole[-1].sample or 0
        if len(whole) < count:
            limit = len(whole) or limit // 8 or 1
        elif count < limit:
            return
        else:
            limit = min(PAGE, limit * 2)


def lock_table(connection: Connection, table: Table) -> None:
    """Wait until every transaction that has read the table is over, and block others until this one ends.

    A write to an SQLite file has the only write lock already.
    """
    if is_server(connection):
        connection.execute(text(f"LOCK TABLE {SCHEMA}.{table.name} IN ACCESS EXCLUSIVE MODE"))


def json_object(text: str, what: str) -> dict[str, Json]:
    """Parse a stored JSON object. Raises DatabaseError, naming `what` it should be, because others may have written it."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise DatabaseError(f"expected stored {what} to be a JSON object, got: {text[:200]!r}")
    return value
