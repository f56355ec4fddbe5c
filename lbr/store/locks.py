"""A lock on a whole table, where a database lets others read while somebody writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.sql.compiler import SQLCompiler


class alone_with(Executable, ClauseElement):  # noqa: N801 - reads as a statement
    """Wait until every transaction that has read the table is over, and have it alone until this one ends.

    What others decided by what they read is then committed, and in sight. In a write to an SQLite file nobody
    else can be deciding anything: the write lock is ours.
    """

    inherit_cache = False

    def __init__(self, table: Table) -> None:
        self.table = table


@compiles(alone_with)
def _nothing(_: alone_with, __: SQLCompiler, **___: Any) -> str:
    return "SELECT 1"


@compiles(alone_with, "postgresql")
def _lock(element: alone_with, compiler: SQLCompiler, **_: Any) -> str:
    return f"LOCK TABLE {compiler.preparer.format_table(element.table)} IN ACCESS EXCLUSIVE MODE"
