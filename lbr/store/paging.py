"""Pages of rows that may be of any size: at most 1,000 rows and some megabytes at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import Integer, bindparam, case, func
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.sql.compiler import SQLCompiler

PAGE = 1_000
FIRST_PAGE = 500
PAGE_BYTES = 8_000_000
_ANY_SIZE = 2**31 - 1


class byte_length(GenericFunction[int]):  # noqa: N801 - a function of SQL
    """How many bytes a text has. SQLite knows that without a look at it, but the length in characters only with one."""

    type = Integer()
    inherit_cache = True


@compiles(byte_length)
def _octet_length(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(byte_length, "sqlite")
def _length_of_blob(element: byte_length, compiler: SQLCompiler, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


class Placed(Protocol):
    """A row with its place."""

    @property
    def idx(self) -> int:
        """Its place."""
        ...


R = TypeVar("R", bound=Placed)


def if_small(marker: ColumnElement[Any], *others: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    """Return columns by name that are null if they have more than `:cap` bytes; the marker, if all have together."""
    sizes: list[Any] = [byte_length(column) for column in others]
    whole: Any = sum((func.coalesce(size, 0) for size in sizes), byte_length(marker))
    small = [whole, *sizes]
    return {
        column.name: case((size <= bindparam("cap"), column)).label(column.name)
        for column, size in zip((marker, *others), small, strict=True)
    }


async def pages(
    read: Callable[[dict[str, int]], Awaitable[tuple[int, Sequence[R]]]],
) -> AsyncIterator[Sequence[R]]:
    """Yield pages of rows in the order of their places.

    `read` is given what to bind, `after`, `limit` and `cap`, and returns how many rows there were, and those before
    the first that `if_small` left out.
    """
    after, limit = -1, FIRST_PAGE
    while True:
        cap = PAGE_BYTES // limit if limit > 1 else _ANY_SIZE
        count, whole = await read({"after": after, "limit": limit, "cap": cap})
        if whole:
            yield whole
            after = whole[-1].idx
        if len(whole) < count:
            limit = len(whole) or limit // 8 or 1
        elif count < limit:
            return
        else:
            limit = min(PAGE, limit * 2)
