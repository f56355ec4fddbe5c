"""How pydantic-ai does it, for an adapter that makes most calls by itself: what it would send, what it reads."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError
from lbr.models.loading import Loading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.core.types import Json, Reply
    from lbr.models.base import Request
    from lbr.models.http import Connections
    from lbr.models.pydantic_ai import PydanticAIModel


@dataclass
class _Exchange:
    """An answer to be given without any network, and the request that was made for it, None while there was none."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    asked: bytes | None = field(default=None, init=False)


_exchange: ContextVar[_Exchange] = ContextVar("exchange")


class Reference:
    """Builds pydantic-ai's models when they are first needed, in a thread, for the first takes a second or two.

    `ready` is one that is built already, `connections` are those of its calls, None for some of its own. Raises what `PydanticAIModel` raises; one that could not be built is built
    anew for a later call.
    """

    def __init__(
        self,
        name: str,
        *,
        task_settings: Mapping[str, Json],
        api_key: str | None = None,
        ready: PydanticAIModel | None = None,
        connections: Connections | None = None,
    ) -> None:
        self._name = name
        self._settings = task_settings
        self._api_key = api_key
        self._ready = ready
        self._connections = connections
        self._calling = Loading(self._build)
        self._replaying = Loading(self._build_replaying)

    async def answer(self, request: Request) -> Reply:
        """Make the call with pydantic-ai."""
        model = await self._calling.get()
        return await model.answer(request)

    async def body(self, request: Request) -> bytes:
        """Return the body that pydantic-ai would send, without sending it. Raises CallError as `answer` does."""
        model = await self._replaying.get()
        with _exchanged(400, {}, b"{}") as exchange:
            try:
                await model.answer(request)
            except CallError:
                if exchange.asked is None:
                    raise
        if exchange.asked is None:
            raise LookupError("expected pydantic-ai to send a request, got: none")
        return exchange.asked

    async def read(self, request: Request, status: int, headers: Mapping[str, str], content: bytes) -> Reply:
        """Read an answer that came to another with pydantic-ai; what is asked is not sent."""
        model = await self._replaying.get()
        with _exchanged(status, headers, content):
            return await model.answer(request)

    def _build(self) -> PydanticAIModel:
        if self._ready is not None:
            return self._ready
        from lbr.models.pydantic_ai import PydanticAIModel  # noqa: PLC0415

        return PydanticAIModel(
            self._name, task_settings=self._settings, api_key=self._api_key, connections=self._connections
        )

    def _build_replaying(self) -> PydanticAIModel:
        from lbr.models.pydantic_ai import PydanticAIModel  # noqa: PLC0415

        return PydanticAIModel(
            self._name, task_settings=self._settings, api_key=self._api_key, transport=_replay()
        )

    async def aclose(self) -> None:
        """Close both models, where they were built."""
        calling, replaying = await self._calling.made(), await self._replaying.made()
        for model in (calling or self._ready, replaying):
            if model is not None:
                await model.aclose()


@contextmanager
def _exchanged(status: int, headers: Mapping[str, str], content: bytes) -> Iterator[_Exchange]:
    exchange = _Exchange(status, headers, content)
    token = _exchange.set(exchange)
    try:
        yield exchange
    finally:
        _exchange.reset(token)


def _replay() -> Any:
    import httpx2  # noqa: PLC0415

    class Replay(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            exchange = _exchange.get()
            exchange.asked = await request.aread()
            return httpx2.Response(
                exchange.status, headers=dict(exchange.headers), content=exchange.content, request=request
            )

    return Replay()
