"""A network between a worker and its server that a test can cut, as a real one fails: without a word, or at once."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Coroutine

Lost: TypeAlias = Literal["reply", "commit", "late"]
LATE_SECONDS = 0.5
STARTUP_VERSION = (196_608).to_bytes(4)


class Proxy:
    """Passes bytes on between those who connect to its port and a PostgreSQL server on 127.0.0.1.

    `silence` passes nothing on and says nothing. Of that many commits `eat_answers` eats the answer, `eat_commits`
    the commit itself, and breaks the connection off; `lose` chooses the commit. What the client says of `says` reaches
    the server as `hears`, of the same length. `delay` is how many seconds everything takes, in each direction.
    """

    def __init__(self, server_url: str) -> None:
        self._target = make_url(server_url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._to_lose: list[tuple[Lost, str]] = []
        self.eat_answers = 0
        self.eat_commits = 0
        self.says = self.hears = b"-"
        self.delay = 0.0
        self.port = 0

    @property
    def url(self) -> str:
        """The server's URL, by way of the proxy."""
        return self._target.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    @property
    def server_url(self) -> str:
        """The server's URL, past the proxy."""
        return self._target.render_as_string(hide_password=False)

    def silence(self, silent: bool) -> None:
        """Stop or go on passing bytes on, in both directions."""
        self._loop.call_soon_threadsafe(self._flowing.clear if silent else self._flowing.set)

    def lose(self, part: Lost, statement: str) -> None:
        """Break the connection off at the commit of the next transaction that runs a matching statement.

        The server gets the commit and the client no reply, or the server gets no commit, or it gets it `late`, when the
        client has long been cut off. `statement` is a regular expression.
        """
        self._to_lose.append((part, statement))

    @property
    def unlost(self) -> list[str]:
        """The statements of `lose` whose commits have not been lost yet."""
        return [statement for _, statement in self._to_lose]

    def cut(self) -> None:
        """Break every connection off."""
        self._do(self._cut())

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _join(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        server, to_server = await asyncio.open_connection("127.0.0.1", self._target.port)
        eating = asyncio.Event()
        self._open |= {to_client, to_server}
        answering = asyncio.create_task(self._answer(server, to_client, eating))
        await self._ask(client, to_client, to_server, eating)
        if not eating.is_set():
            to_server.transport.abort()
        await answering
        to_server.transport.abort()
        self._open -= {to_client, to_server}

    async def _ask(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        to_server: asyncio.StreamWriter,
        eating: asyncio.Event,
    ) -> None:
        """Pass on what the client says, until the connection ends; with `eating` set, the next answer is lost."""
        asked = _Asked()
        with suppress(OSError):
            while data := await client.read(65_536):
                await self._pause()
                lost = self._lost_at(asked) if asked.commits(data) else None
                if lost == "commit":
                    return
                if lost is not None:
                    eating.set()
                if lost == "late":
                    to_client.transport.abort()
                    await asyncio.sleep(LATE_SECONDS)
                to_server.write(data.replace(self.says, self.hears))
                await to_server.drain()

    async def _answer(
        self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter, eating: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while (data := await server.read(65_536)) and not eating.is_set():
                await self._pause()
                to_client.write(data)
                await to_client.drain()
        to_client.transport.abort()

    async def _pause(self) -> None:
        await self._flowing.wait()
        if self.delay:
            await asyncio.sleep(self.delay)

    def _lost_at(self, asked: _Asked) -> Lost | None:
        """Return what to lose of a transaction that commits, None for nothing."""
        if self.eat_commits:
            self.eat_commits -= 1
            return "commit"
        if self.eat_answers:
            self.eat_answers -= 1
            return "reply"
        for one in self._to_lose:
            part, statement = one
            if any(re.search(statement, text) for text in asked.statements):
                self._to_lose.remove(one)
                return part
        return None

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


@dataclass
class _Asked:
    """What one client asks, read from its messages; see "Message Formats" in PostgreSQL's manual.

    `statements` are those of the transaction that is open.
    """

    statements: list[str] = field(default_factory=list)
    _prepared: dict[bytes, str] = field(default_factory=dict)
    _rest: bytes = b""
    _started: bool = False

    def commits(self, data: bytes) -> bool:
        """Take in what the client has sent, and return whether it commits with that."""
        self._rest += data
        commits = False
        while (message := self._next()) is not None:
            kind, body = message
            if kind == b"P":
                name, statement, _ = body.split(b"\0", 2)
                self._prepared[name] = statement.decode()
            elif kind == b"B":
                _, name, _ = body.split(b"\0", 2)
                self.statements.append(self._prepared.get(name, ""))
            elif kind == b"Q":
                commits = body.startswith(b"COMMIT")
                if body.startswith(b"BEGIN"):
                    self.statements = []
        return commits

    def _next(self) -> tuple[bytes, bytes] | None:
        """Return the type and the body of the next message, None if it is not all there. The first ones have no type."""
        start = int(self._started)
        end = start + int.from_bytes(self._rest[start : start + 4])
        if len(self._rest) < max(end, start + 4):
            return None
        kind, body, self._rest = self._rest[:start], self._rest[start + 4 : end], self._rest[end:]
        self._started |= body.startswith(STARTUP_VERSION)
        return kind, body
