"""A server that sends what it is told to, byte by byte, and keeps what it was asked; and both adapters side by side."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError, UsageError
from lbr.core.types import Task
from lbr.models.build import Authority, build_model
from lbr.models.chat import ChatModel, endpoint_of
from lbr.models.pydantic_ai import PydanticAIModel

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping

    from lbr.models.base import Model, Request

MODELS = {
    "openai": "openai-chat:gpt-4o-mini",
    "openrouter": "openrouter:google/gemini-2.5-flash",
    "ollama": "ollama:llama3.2",
}
KEY = "sk-of-this-test"


@dataclass(frozen=True)
class Script:
    """What the server does with a request: sends these bytes, then closes, resets or hangs."""

    sent: bytes = b""
    then: str = "close"
    wait_seconds: float = 0.0


def http(status: int, body: str | bytes, headers: Mapping[str, str] | None = None) -> Script:
    """Return an answer."""
    data = body.encode() if isinstance(body, str) else body
    named = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return Script(f"HTTP/1.1 {status} Whatever\r\n{head}connection: close\r\n\r\n".encode() + data)


class Wire:
    """The server; `script` is what it does next."""

    def __init__(self) -> None:
        self.script = Script()
        self.asked: list[tuple[dict[str, str], Any]] = []
        self._ended = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            named = (line.partition(":") for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in named}
            headers["path"] = head[0].split()[1]
            body = await reader.readexactly(int(headers["content-length"]))
            self.asked.append((headers, json.loads(body)))
            await asyncio.sleep(self.script.wait_seconds)
            writer.write(self.script.sent)
            await writer.drain()
            if self.script.then == "hang":
                await self._ended.wait()
            if self.script.then == "reset":
                writer.transport.abort()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def open(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve for the length of the block, at the URL that it gives."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=10_000_000, ssl=tls)
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield f"http://{place}" if tls is None else f"https://{place.replace('127.0.0.1', 'localhost')}"
        finally:
            self._ended.set()
            server.close()


def environment(url: str) -> dict[str, str]:
    """Return the variables with which calls of all three providers go to a URL."""
    bases = {f"{name}_BASE_URL": url for name in ("OPENAI", "OPENROUTER", "OLLAMA")}
    return bases | {f"{name}_API_KEY": KEY for name in ("OPENAI", "OPENROUTER", "OLLAMA")}


def unused() -> PydanticAIModel:
    """Stand for pydantic-ai's adapter if it must not be needed."""
    raise AssertionError("handed over a request")


def chat_model(
    name: str, settings: Mapping[str, Any] | None = None, schema: Any = None, *, alone: bool = False
) -> Model:
    """Build what a worker would; `alone`, it is the chat adapter, which fails if it would hand over."""
    if not alone:
        return build_model(
            Task(model=name, settings=dict(settings or {}), schema=schema), Authority(), concurrency=1
        )
    endpoint = endpoint_of(name)
    assert endpoint is not None
    return ChatModel(endpoint, task_settings=settings or {}, build_other=unused)


def reference_model(name: str, settings: Mapping[str, Any] | None = None) -> PydanticAIModel:
    """Build pydantic-ai's adapter."""
    return PydanticAIModel(name, task_settings=settings or {})


async def outcome(model: Model, request: Request) -> dict[str, Any]:
    """Make a call and return all that can be seen of how it ended."""
    try:
        reply = await model.answer(request)
    except CallError as error:
        told = {name: getattr(error, name) for name in ("family", "text", "kind", "usage", "overloaded")}
        wait = None if error.retry_after is None else round(error.retry_after, 1)
        return {**told, "class": type(error).__name__, "words": str(error), "retry_after": wait}
    except UsageError as error:
        return {"class": "UsageError", "words": str(error)}
    return {
        "text": reply.text,
        "usage": reply.usage,
        "model": reply.model,
        "finish_reason": reply.finish_reason,
    }
