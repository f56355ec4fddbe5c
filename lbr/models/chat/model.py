"""The chat adapter: built once per task, called once per request."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.config import hide_user
from lbr.models.chat.answers import Reader, decoded
from lbr.models.chat.costs import Costs
from lbr.models.chat.request import fields_of, messages_of
from lbr.models.checks import check_authority, check_trust
from lbr.models.failures import call_error
from lbr.models.http import Connections, shown_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientTimeout

    from lbr.core.errors import CallError
    from lbr.core.types import Json, Reply
    from lbr.models.base import Model, Request
    from lbr.models.chat.request import Endpoint

MAX_SILENCE_SECONDS = 600.0
"""How long to wait for the next bytes of an answer if neither the task nor the caller has a timeout."""
CONNECT_SECONDS = 5.0


class ChatModel:
    """One endpoint that speaks OpenAI's chat completions, over `connections`, None for some of its own.

    `response_format` is what the body has for the task's schema, None without one. `build_other` builds pydantic-ai's
    adapter, for requests that only it can send. Construction raises UsageError for settings that no database may hold.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        task_settings: Mapping[str, Json],
        build_other: Callable[[], Model],
        response_format: Json = None,
        api_key: str | None = None,
        connections: Connections | None = None,
    ) -> None:
        check_authority(task_settings)  # again, because others than lbr may write to the database
        check_trust()
        self._endpoint = endpoint
        self._settings = dict(task_settings)
        self._format = {} if response_format is None else {"response_format": response_format}
        self._start = self._body_start(self._settings)
        self._build_other = build_other
        self._other: Model | None = None
        self._lock = asyncio.Lock()
        self._api_key = api_key
        self._connections = connections or Connections()
        self._shared = connections is not None
        self._costs = Costs(endpoint)
        self._reader = Reader(endpoint, self._costs, api_key)

    async def answer(self, request: Request) -> Reply:
        """Make one call. Raises CallError with the family of the failure."""
        body = self._body(request)
        if body is None:
            return await (await self._pydantic_ai()).answer(request)
        self._costs.begin()
        started = time.monotonic()
        response, content = await self._connections.fetch(
            "POST",
            self._endpoint.url,
            timeout=self._timeout(request),
            data=body,
            headers=self._endpoint.headers,
        )
        if response.status < 300:
            seconds = (request.timeout or MAX_SILENCE_SECONDS) - (time.monotonic() - started)
            await self._costs.ready(seconds / 2)
            return self._reader.read(content, _charset(response.headers.get("content-type", "")))
        raise self._failed(response.status, response.headers, content)

    def _body_start(self, settings: Mapping[str, Json]) -> bytes | None:
        """Return a body up to its messages; None if only pydantic-ai knows how these settings are sent."""
        fields = fields_of(self._endpoint, settings)
        return None if fields is None else orjson.dumps({**fields, **self._format})[:-1] + b',"messages":'

    def _body(self, request: Request) -> bytes | None:
        """Return the whole body; None if only pydantic-ai can make it."""
        own = request.settings
        if own is None:
            start = self._start
        else:  # an `extra_body` has to be checked first
            start = None if "extra_body" in own else self._body_start({**self._settings, **own})
        messages = None if start is None else messages_of(request)
        if start is None or messages is None:
            return None
        try:
            return b"".join((start, orjson.dumps(messages), b"}"))
        except TypeError:  # text that is no Unicode
            return None

    async def _pydantic_ai(self) -> Model:
        """Return pydantic-ai's adapter, built by the first call that needs it; a later call tries again if that fails."""
        async with self._lock:
            if self._other is None:
                self._other = await asyncio.to_thread(self._build_other)  # takes a second or two
            return self._other

    def _timeout(self, request: Request) -> ClientTimeout:
        own = (request.settings or {}).get("timeout", self._settings.get("timeout"))
        seconds = own or request.timeout or MAX_SILENCE_SECONDS
        # If only the caller has a timeout, it ends the call itself, and two timers are saved.
        return _client_timeout(float(seconds), is_callers=own is None and request.timeout is not None)

    def _failed(self, status: int, headers: Mapping[str, str], content: bytes) -> CallError:
        """Return the error for an answer with a status of 300 or more."""
        if status < 400:
            place = hide_user(headers.get("location", "another URL").partition("?")[0])
            words = f"the server redirects to {place}, and lbr does not follow; correct the provider's base URL"
            return call_error(f"{words} (HTTP {status})", status=status, api_key=self._api_key)
        text = decoded(content, _charset(headers.get("content-type", ""))).strip()
        try:
            error: Any = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            error = text
        if isinstance(error, dict):
            error = error.get("error", error)
        return call_error(
            f"status_code: {status}, model_name: {self._endpoint.model}, body: {error}",
            status=status,
            body=error,
            headers=headers,
            url=shown_url(self._endpoint.url),
            api_key=self._api_key,
        )

    async def aclose(self) -> None:
        """Close the connections, unless they are shared."""
        if not self._shared:
            await self._connections.aclose()
        if self._other is not None:
            await self._other.aclose()


@functools.lru_cache(maxsize=64)
def _client_timeout(seconds: float, *, is_callers: bool) -> ClientTimeout:
    from aiohttp import ClientTimeout  # noqa: PLC0415

    # No bound on the whole: an answer that comes bit by bit may take its time.
    read = None if is_callers else seconds
    return ClientTimeout(total=None, connect=min(seconds, CONNECT_SECONDS), sock_read=read)


@functools.lru_cache(maxsize=64)
def _charset(content_type: str) -> str:
    """Return the charset that a content type names, empty if it names none."""
    return content_type.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
