"""How lists and many rows reach a database: as one value each, whatever their length.

A statement over a list of ids names it with `any_of`; a statement over many rows is a `BulkStatement`; one that is run for every
batch of jobs is a `PreparedQuery`. All are built once and sent in the form of the database that they meet: on SQLite a JSON
array (or, for keys, one string of bytes) that the statement takes apart, and executemany of plain tuples; on PostgreSQL
`= ANY(array)` and `unnest`. The text of a statement, unlike an IN list's, is thus the same for every length, and is made
once.
"""

from __future__ import annotations

from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import ARRAY, ColumnElement, bindparam, column, func, insert, select
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import Boolean, LargeBinary, Text, TypeDecorator

from lbr.core.types import KEY_BYTES
from lbr.store.trips import FileConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Dialect, Table
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

    from lbr.store.connection import Connection

SHARD = "lbr_shard"
"""Execution option of a connection: which shard of the counters it adds to, the first where it is not set."""


class any_of(ColumnElement[bool]):  # noqa: N801 - reads as an operator
    """Whether a column is one of a list that is given when the statement is run, by its name."""

    inherit_cache = True
    type = Boolean()
    _traverse_internals = [  # noqa: RUF012 - SQLAlchemy's own form
        ("column", InternalTraversal.dp_clauseelement),
        ("name", InternalTraversal.dp_string),
    ]

    def __init__(self, column: ColumnElement[Any], name: str) -> None:
        self.column = column
        self.name = name

    def self_group(self, against: Any = None) -> any_of:
        """Stay as it is: a comparison, not a column of booleans, which SQLite would have compared with 1."""
        return self


class _JsonArray(TypeDecorator[Any]):
    """A list of numbers or texts as JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """Write the list."""
        return orjson.dumps(value).decode()


class _KeysInARow(TypeDecorator[Any]):
    """A list of keys, which are all of one length, as one string of bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> bytes:
        """Put the keys behind each other."""
        return b"".join(value)


_KEYS = f"""\
WITH RECURSIVE places(place) AS (
  SELECT 1 UNION ALL SELECT place + {KEY_BYTES} FROM places WHERE place + {KEY_BYTES} <= length(%s)
) SELECT substr(%s, place, {KEY_BYTES}) FROM places"""


@compiles(any_of)
def _in_values(element: any_of, compiler: SQLCompiler, **options: Any) -> str:
    what = compiler.process(element.column, **options)
    if isinstance(element.column.type, LargeBinary):
        given = compiler.process(bindparam(element.name, type_=_KeysInARow()), **options)
        return f"{what} IN ({_KEYS % (given, given)})"
    given = compiler.process(bindparam(element.name, type_=_JsonArray()), **options)
    return f"{what} IN (SELECT value FROM json_each({given}))"


@compiles(any_of, "postgresql")
def _in_array(element: any_of, compiler: SQLCompiler, **options: Any) -> str:
    given = bindparam(element.name, type_=ARRAY(element.column.type, dimensions=1))
    return compiler.process(element.column == func.any(given), **options)


class Rows:
    """The rows of a bulk statement as its SQL sees them: `given["name"]` is a field of each of them.

    For the sake of SQLite's form, a field that goes into a VALUES clause is not called as its column is.
    """

    def __init__(
        self, fields: Mapping[str, ColumnElement[Any]], insert: Callable[..., Any], *, arrays: bool
    ) -> None:
        self._fields = fields
        self._insert = insert
        self._arrays = arrays

    def __getitem__(self, name: str) -> ColumnElement[Any]:
        return self._fields[name]

    def insert_into(
        self, table: Table, values: Mapping[str, ColumnElement[Any]], *, where: Sequence[Any] = ()
    ) -> Any:
        """Return the INSERT of one row of `values` for each given row, joined `where` it says."""
        if not self._arrays and not where:
            return self._insert(table).values(dict(values))
        chosen = select(*values.values()).where(*where)
        return self._insert(table).from_select(list(values), chosen, include_defaults=False)


class BulkStatement:
    """One statement for many rows, whose fields have these types; `build` makes it of a `Rows`."""

    def __init__(self, types: Mapping[str, TypeEngine[Any]], build: Callable[[Rows], Any]) -> None:
        self._types = types
        self._build = build

    @cached_property
    def each(self) -> Any:
        """The statement for one row at a time."""
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert  # noqa: PLC0415 - a dialect is loaded by those who use it

        fields: dict[str, ColumnElement[Any]] = {
            name: bindparam(name, type_=type_) for name, type_ in self._types.items()
        }
        return self._build(Rows(fields, sqlite_insert, arrays=False))

    @cached_property
    def _direct(self) -> tuple[str, Callable[[tuple[Any, ...]], tuple[Any, ...]] | None]:
        """The text for one row at a time, and what puts its values into the text's order, None where they have it.

        The driver gets both as they are: what SQLAlchemy does for each row of an executemany takes as long as the
        row's way into the table.
        """
        from sqlalchemy.dialects.sqlite import dialect  # noqa: PLC0415 - see `each`

        names = list(self._types)
        compiled = self.each.compile(dialect=dialect(paramstyle="qmark"), column_keys=names)
        wanted = compiled.positiontup or []
        if not set(wanted) <= set(names):
            raise TypeError(f"expected a statement over {names} alone, got: one over {wanted}")
        places = [names.index(name) for name in wanted]
        return str(compiled), None if places == list(range(len(names))) else itemgetter(*places)

    @cached_property
    def whole(self) -> Any:
        """The statement for arrays, one for each field."""
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert  # noqa: PLC0415 - see above

        arrays = [bindparam(name, type_=ARRAY(type_, dimensions=1)) for name, type_ in self._types.items()]
        columns = [column(name, type_) for name, type_ in self._types.items()]
        rows = func.unnest(*arrays).table_valued(*columns, name="given").render_derived()
        return self._build(Rows(dict(rows.c.items()), postgresql_insert, arrays=True))

    async def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run the statement for all of the rows; return how many rows it changed, 0 for none given."""
        fields = list(self._types)
        return await self.run_plain(connection, [tuple([row[name] for name in fields]) for row in rows])

    async def run_plain(self, connection: Connection, rows: list[tuple[Any, ...]]) -> int:
        """Do the same with the values of the rows alone, in the order of the fields: for rows in great numbers."""
        if not rows:
            return 0
        if not isinstance(connection, FileConnection):
            columns = dict(zip(self._types, map(list, zip(*rows, strict=True)), strict=True))
            return (await connection.execute(self.whole, columns)).rowcount
        text, ordered = self._direct
        return await connection.change(text, rows if ordered is None else [ordered(row) for row in rows])


class _Place(NamedTuple):
    """Where a text takes a value: its name, what makes the driver's of it, and what it is where none is given."""

    name: str
    made: Callable[[Any], Any] | None
    required: bool
    fixed: Any


class PreparedQuery:
    """One statement that is run for every batch of jobs, with values by name; it returns rows.

    On SQLite the driver gets its text, made once, and its values as they are: SQLAlchemy's way there takes about as
    long as SQLite itself.
    """

    def __init__(self, statement: Any) -> None:
        self.statement = statement

    @cached_property
    def _direct(self) -> tuple[str, list[_Place]]:
        from sqlalchemy.dialects.sqlite import dialect  # noqa: PLC0415 - see `BulkStatement.each`

        sqlite = dialect(paramstyle="qmark")
        compiled = self.statement.compile(dialect=sqlite)
        if compiled.literal_execute_params or compiled.post_compile_params:
            raise TypeError(
                "expected a statement whose text never changes, got: one that is made anew for its values"
            )
        bound = [compiled.binds[name] for name in compiled.positiontup or []]
        return str(compiled), [
            _Place(one.key, one.type.bind_processor(sqlite), one.required, one.value) for one in bound
        ]

    async def all(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[tuple[Any, ...]]:
        """Run it and return the rows, as tuples."""
        if not isinstance(connection, FileConnection):
            return (await connection.execute(self.statement, values)).all()
        text, places = self._direct
        sent = []
        for name, made, required, fixed in places:
            value = values[name] if required else values.get(name, fixed)
            sent.append(value if made is None else _as_given(made, value))
        return await connection.fetch(text, sent)


def _as_given(made: Callable[[Any], Any], value: Any) -> Any:
    try:
        return made(value)
    except (TypeError, ValueError) as error:
        # A row had a value of another type; SQLAlchemy says it so as well.
        raise StatementError(str(error), None, None, error, hide_parameters=True) from error


class Inserting(BulkStatement):
    """The bulk INSERT of these columns of a table, whose fields are called as they are."""

    def __init__(self, table: Table, *names: str) -> None:
        types = {name: table.c[name].type for name in names}
        super().__init__(types, lambda given: given.insert_into(table, {name: given[name] for name in names}))
        self._table = table

    @cached_property
    def each(self) -> Any:
        """The statement for one row at a time."""
        return insert(self._table)


def option(connection: Connection, name: str) -> Any:
    """Return an execution option of a connection, None where it is not set."""
    return (
        connection.sync_connection.get_execution_options().get(name) if connection.sync_connection else None
    )
