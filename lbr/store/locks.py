"""A lock on a whole table, where a database lets others read while somebody writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.sql.compiler import SQLCompiler


class lock_table(Executable, ClauseElement):  # noqa: N801 - reads as a statement
    """Wait until every transaction that has read the table is over, and have it alone until this one ends.

    What others decided by what they read is then committed, and in sight. In a write to an SQLite file nobody
    else can be deciding anything: the write lock is ours.
    """

    inherit_cache = False

    def __init__(self, table: Table) -> None:
        self.table = table


@compiles(lock_table)
def _nothing(_: lock_table, __: SQLCompiler, **___: Any) -> str:
    return "SELECT 1"


@compiles(lock_table, "postgresql")
def _lock(element: lock_table, compiler: SQLCompiler, **_: Any) -> str:
    return f"LOCK TABLE {compiler.preparer.format_table(element.table)} IN ACCESS EXCLUSIVE MODE"
