"""Hearing of work without asking for it: PostgreSQL's LISTEN, with polling behind it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL_SECONDS = 1.0
"""How often to look although nobody called: a transaction pooler drops LISTEN, and a call may be lost with its connection."""

RECONNECT_SECONDS = 5.0


class Listener:
    """Keeps a connection that listens, and notes what it hears. That it cannot listen is never an error."""

    def __init__(self, arguments: Mapping[str, Any], channel: str, *, listen: bool) -> None:
        self._arguments = arguments
        self._channel = channel
        self._listen = listen
        self._connection: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._called = True
        self._next_poll = 0.0
        self._next_try = 0.0

    def heard(self) -> bool:
        """Tell whether somebody called since the last time, or whether it is time to look all the same."""
        now = time.monotonic()
        if self._listen and self._connecting is None and now >= self._next_try and not self._alive():
            self._next_try = now + RECONNECT_SECONDS
            self._connecting = asyncio.create_task(self._connect())
        if not self._called and now < self._next_poll:
            return False
        self._called = False
        self._next_poll = now + POLL_SECONDS
        return True

    def _alive(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def _connect(self) -> None:
        import asyncpg  # noqa: PLC0415 - an extra

        try:
            connection = await asyncpg.connect(**self._arguments)
            try:
                await connection.add_listener(self._channel, self._hear)
            except BaseException:
                connection.terminate()
                raise
            self._connection = connection
            # Whatever was called out before we listened is not heard any more.
            self._called = True
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return
        finally:
            self._connecting = None

    def _hear(self, *_: object) -> None:
        self._called = True

    async def close(self) -> None:
        """Stop listening."""
        if self._connecting is not None:
            self._connecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._connecting
        if self._alive():
            self._connection.terminate()
