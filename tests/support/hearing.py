"""What a database is told: every statement before it is sent, and every commit, by whatever way they go there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

from sqlalchemy import Engine, event

from lbr.store import sql

if TYPE_CHECKING:
    from collections.abc import Callable


class Hearing:
    """Tells of statements, each with its values, and of commits, from `begin` to `end`, in all connections."""

    def __init__(self, statement: Callable[[str, Any], object], commit: Callable[[], object] = lambda: None) -> None:
        self._statement = statement
        self._commit = commit
        self._ways = ExitStack()

    def begin(self) -> None:
        """Listen, to SQLAlchemy and to what goes past it."""
        for name, on_progress in (("before_cursor_execute", self._sent), ("commit", self._committed)):
            event.listen(Engine, name, on_progress)
            self._ways.callback(event.remove, Engine, name, on_progress)
        for name in ("fetch", "change"):
            self._ways.enter_context(mock.patch.object(sql, name, self._through(getattr(sql, name))))

    def end(self) -> None:
        """Listen no more."""
        self._ways.close()

    def _sent(self, _c: Any, _cursor: Any, text: str, values: Any, _context: Any, _many: bool) -> None:
        self._statement(text, values)

    def _committed(self, _connection: Any) -> None:
        self._commit()

    def _through(self, way: Any) -> Any:
        def sent(driver: Any, text: str, values: Any = ()) -> Any:
            self._statement(text, values)
            return way(driver, text, values)

        return sent
