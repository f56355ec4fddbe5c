"""A network between a worker and its server that a test can cut, as a real one fails: without a word, or at once."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Proxy:
    """Passes bytes on between those who connect to its port and a PostgreSQL server on 127.0.0.1.

    `silence` passes nothing on and says nothing. Of that many commits `eat_answers` eats the answer, `eat_commits`
    the commit itself, and breaks the connection off. What the client says of `says` reaches the server as `hears`, of
    the same length.
    """

    def __init__(self, server_url: str) -> None:
        self._target = make_url(server_url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.eat_answers = 0
        self.eat_commits = 0
        self.says = self.hears = b"-"
        self.port = 0

    @property
    def url(self) -> str:
        """The server's URL, by way of the proxy."""
        return self._target.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def silence(self, silent: bool) -> None:
        """Stop or go on passing bytes on, in both directions."""
        self._loop.call_soon_threadsafe(self._flowing.clear if silent else self._flowing.set)

    def cut(self) -> None:
        """Break every connection off."""
        self._do(self._cut())

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        there, back = await asyncio.open_connection("127.0.0.1", self._target.port)
        eating = asyncio.Event()
        self._open |= {writer, back}
        await asyncio.gather(
            self._pass_on(reader, back, eating, asks=True), self._pass_on(there, writer, eating, asks=False)
        )
        self._open -= {writer, back}

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, eating: asyncio.Event, *, asks: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                await self._flowing.wait()
                commits = asks and b"COMMIT;" in data
                if commits and self.eat_commits:
                    self.eat_commits -= 1
                    break
                if commits and self.eat_answers:
                    self.eat_answers -= 1
                    eating.set()
                elif not asks and eating.is_set():
                    break
                target.write(data.replace(self.says, self.hears) if asks else data)
                await target.drain()
        target.transport.abort()

    def _do(self, work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._serve())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        self._flowing.set()
        await self._cut()
        ours = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(ours, timeout=10) if ours else None
