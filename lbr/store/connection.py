"""What a transaction asks its database through: the part of SQLAlchemy's AsyncConnection that both kinds offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import sqlalchemy
    from sqlalchemy import CursorResult, Executable

P = ParamSpec("P")
T = TypeVar("T")


class Connection(Protocol):
    """A connection within a transaction. On PostgreSQL it is an AsyncConnection, on SQLite a `FileConnection`."""

    @property
    def sync_connection(self) -> sqlalchemy.Connection | None:
        """SQLAlchemy's connection beneath, for its options; nothing may be run on it."""
        ...

    async def execute(
        self,
        statement: Executable,
        parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        /,
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement, once or for each of the parameters; its rows are all there when it returns."""
        ...

    async def scalar(self, statement: Executable, parameters: Mapping[str, Any] | None = None, /) -> Any:
        """Run a statement and return the first column of its first row, None without one."""
        ...

    async def exec_driver_sql(
        self, statement: str, parameters: Any = None, /
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run text as the driver takes it, with its kind of parameters: a tuple, or a list of tuples."""
        ...

    async def run_sync(
        self, fn: Callable[Concatenate[sqlalchemy.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function with the connection beneath, on which it may run statements."""
        ...
