"""A server of chat completions that keeps what it was asked, and both adapters side by side."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError, UsageError
from lbr.core.types import Task
from lbr.models.build import Authority, build_model
from lbr.models.chat import ChatModel, endpoint_of
from lbr.models.pydantic_ai import PydanticAIModel
from tests.support.http_server import Script, http, scripted, serving

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping

    from lbr.models.base import Model, Request
    from tests.support.http_server import Request as HttpRequest

__all__ = ["MODELS", "Script", "Wire", "chat_model", "environment", "http", "outcome", "reference_model"]

MODELS = {
    "openai": "openai-chat:gpt-4o-mini",
    "openrouter": "openrouter:google/gemini-2.5-flash",
    "ollama": "ollama:llama3.2",
}
KEY = "sk-of-this-test"


class Wire:
    """The server; `script` is what it does next."""

    def __init__(self) -> None:
        self.script = Script()
        self.asked: list[tuple[dict[str, str], Any]] = []

    def _respond(self, request: HttpRequest) -> Script:
        self.asked.append((request.headers | {"path": request.path}, request.json()))
        return self.script

    @asynccontextmanager
    async def open(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve for the length of the block, at the URL that it gives."""
        async with serving(scripted(self._respond), tls) as served:
            yield served.url if tls is None else served.url.replace("127.0.0.1", "localhost")


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
        return build_model(Task(model=name, settings=dict(settings or {}), schema=schema), Authority(), concurrency=1)
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
