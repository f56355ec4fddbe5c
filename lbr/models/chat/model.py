"""The model: built once per task, called once per request."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from lbr.core.errors import CallError
from lbr.models.chat.answers import Reader, decoded
from lbr.models.chat.asking import Template, messages_of
from lbr.models.chat.costs import Costs
from lbr.models.chat.endpoints import words_of
from lbr.models.chat.kinds import categories_of, kind_of
from lbr.models.checking import check_authority
from lbr.models.environment import check_trust
from lbr.models.http import AnswerTooLarge, Connections, check_size, is_unreachable, lost_words, shown_url
from lbr.models.refusals import ProviderError, call_error
from lbr.models.waits import asked_wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import ClientTimeout

    from lbr.core.types import Json, Reply
    from lbr.models.base import Request
    from lbr.models.chat.endpoints import Endpoint

SLOWEST_SECONDS = 600.0
"""How long to wait for the next bytes of an answer where nobody said."""

CONNECT_SECONDS = 5.0
KEPT_TEMPLATES = 64


class Reference(Protocol):
    """How pydantic-ai does it, for all that is out of the ordinary."""

    async def answer(self, request: Request) -> Reply:
        """Make the call in its place."""
        ...

    async def body(self, request: Request) -> bytes:
        """Return the body that it would send, without sending it. Raises CallError as `answer` does."""
        ...

    async def read(self, request: Request, status: int, headers: Mapping[str, str], content: bytes) -> Reply:
        """Read an answer that came to another adapter. Raises CallError for one that is none."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class ChatModel:
    """One endpoint that speaks OpenAI's chat completions, over `connections`, None for some of its own.

    What it cannot word as pydantic-ai does it hands to `reference`. Construction raises UsageError for
    settings that no database may bring.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        task_settings: Mapping[str, Json],
        reference: Reference,
        api_key: str | None = None,
        connections: Connections | None = None,
    ) -> None:
        check_authority(task_settings)  # again, for whoever wrote to the database need not have been lbr
        self._endpoint = endpoint
        self._settings = dict(task_settings)
        self._reference = reference
        self._api_key = api_key
        check_trust()
        self._connections = connections or Connections()
        self._shared = connections is not None
        self._costs = Costs(endpoint)
        self._reader = Reader(endpoint, self._costs, api_key)
        self._templates: OrderedDict[bytes, Template | None] = OrderedDict()
        self._of_task: tuple[object, Template | None] | None = None
        self._timeouts: dict[tuple[Json, float | None], ClientTimeout] = {}
        self._lock = asyncio.Lock()

    async def answer(self, request: Request) -> Reply:
        """Make one call; CallError with the family of whatever goes wrong."""
        messages = messages_of(request)
        template = None if messages is None else await self._template(request, messages)
        if messages is None or template is None:
            return await self._reference.answer(request)
        try:
            body = template.body(messages)
        except TypeError:
            return await self._reference.answer(request)
        self._costs.begin()
        ends = time.monotonic() + (request.timeout or SLOWEST_SECONDS)
        status, packed, content = await self._post(body, self._timeout(request))
        if 300 <= status < 400:
            # Nothing was answered, so that this is no second call; where keys may follow to is decided there.
            return await self._reference.answer(request)
        headers = _plain(packed)
        charset = _charset(headers.get("content-type", ""))
        if status < 300:
            await self._costs.ready((ends - time.monotonic()) / 2)
            return self._reader.read(content, charset)
        text, url = decoded(content, charset), shown_url(self._endpoint.url)
        refusal = refusal_of(self._endpoint.model, status, headers, text, url)
        if isinstance(refusal.body, dict) and refusal.body.get("code") == "model_not_found":
            await self._suggest(request, status, headers, content, (ends - time.monotonic()) / 2)
        raise call_error(refusal, api_key=self._api_key)

    async def _suggest(
        self, request: Request, status: int, headers: Mapping[str, str], content: bytes, seconds: float
    ) -> None:
        """Let pydantic-ai raise a refusal, because it may know the name that was meant; return if it cannot be built."""
        try:
            async with asyncio.timeout(seconds):
                await self._reference.read(request, status, headers, content)
        except CallError:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, the refusal stands
            return

    # --- what is sent -------------------------------------------------------------------------------------------------

    async def _template(self, request: Request, messages: list[dict[str, Json]]) -> Template | None:
        """Return what the settings and the schema of a request make of a body; None where pydantic-ai has to send it."""
        schema = request.task.schema
        if request.settings is None and self._of_task is not None and self._of_task[0] is schema:
            return self._of_task[1]
        settings = self._settings | dict(request.settings or {})
        key = orjson.dumps([settings, schema])
        async with self._lock:
            if key not in self._templates:
                self._templates[key] = await self._made(settings, request, messages)
            self._templates.move_to_end(key)
            if len(self._templates) > KEPT_TEMPLATES:
                self._templates.popitem(last=False)
            template = self._templates[key]
        if request.settings is None:
            self._of_task = schema, template
        return template

    async def _made(
        self, settings: Mapping[str, Json], request: Request, messages: list[dict[str, Json]]
    ) -> Template | None:
        words = words_of(self._endpoint, settings) if request.task.schema is None else None
        if words is not None:
            return Template({"model": self._endpoint.model, **words, "stream": False})
        if "request_timeout" in settings:  # it is no part of the body
            return None
        body = orjson.loads(await self._reference.body(request))
        fits = body.pop("messages") == messages and "tools" not in body
        return Template(body) if fits else None

    def _timeout(self, request: Request) -> ClientTimeout:
        settings = self._settings if request.settings is None else {**self._settings, **request.settings}
        asked = settings.get("timeout")
        found = self._timeouts.get((asked, request.timeout))
        if found is None:
            from aiohttp import ClientTimeout  # noqa: PLC0415

            # No bound on the whole: an answer that comes in bit by bit may take its time. Where nobody waits after the
            # request's timeout, two timers of each call are saved.
            bounds = [float(one) for one in (asked, request.timeout) if one is not None]
            seconds = bounds[0] if bounds else SLOWEST_SECONDS
            read = None if asked is None and bounds else seconds
            found = ClientTimeout(total=None, connect=min(seconds, CONNECT_SECONDS), sock_read=read)
            self._timeouts[asked, request.timeout] = found
        return found

    async def _post(self, body: bytes, timeout: ClientTimeout) -> tuple[int, Mapping[str, str], bytes]:
        """Make the call and return status, headers and body of its answer.

        Raises CallError if none came whole, with what came of an answer.
        """
        endpoint, chunks, size, answered = self._endpoint, [], 0, False
        try:
            async with await self._connections.request(
                "POST", endpoint.url, timeout=timeout, data=body, headers=endpoint.headers
            ) as response:
                answered = response.status < 300
                while chunk := await response.content.readany():
                    size += len(chunk)
                    check_size(size)
                    chunks.append(chunk)
                return response.status, response.headers, b"".join(chunks)
        except _client_errors() as error:
            lost = _lost(error, endpoint.url)
            if answered and chunks and not isinstance(error, AnswerTooLarge):
                lost.text = b"".join(chunks).decode(errors="replace")
            raise lost from error

    async def aclose(self) -> None:
        """Close the connections, unless they are shared."""
        if not self._shared:
            await self._connections.aclose()
        await self._reference.aclose()


@functools.cache
def _client_errors() -> tuple[type[Exception], ...]:
    from aiohttp import ClientError  # noqa: PLC0415

    return ClientError, OSError, ValueError  # a timeout is an OSError


def _lost(error: Exception, url: str) -> CallError:
    """Say that no answer came from a URL, or not all of it."""
    from aiohttp import ConnectionTimeoutError  # noqa: PLC0415

    late, connecting = isinstance(error, TimeoutError), isinstance(error, ConnectionTimeoutError)
    kind = "ModelTimeoutError" if late else "ModelConnectionError"
    refusal = ProviderError(
        kind=kind,
        categories=categories_of(kind),
        words="Request timed out." if late and not connecting else lost_words(error, url),
        connecting=connecting,
        unreachable=is_unreachable(error),
    )
    return call_error(refusal)


def _plain(packed: Mapping[str, str]) -> dict[str, str]:
    """Return headers by their names in small letters, but not those that told how the body was packed."""
    headers: dict[str, str] = {}
    for name, value in packed.items():
        low = name.lower()
        headers[low] = f"{headers[low]}, {value}" if low in headers else value
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        headers.pop(name, None)
    return headers


@functools.lru_cache(maxsize=64)
def _charset(content_type: str) -> str:
    """Return the charset that a content type names, empty if it names none."""
    return content_type.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")


def refusal_of(
    model: str, status: int, headers: Mapping[str, str], text: str, url: str | None = None
) -> ProviderError:
    """Read an answer with a status of 400 or more."""
    text = text.strip()
    try:
        body: Any = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        body = text
    if isinstance(body, dict):
        body = body.get("error", body)
    kind = kind_of(status, body)
    return ProviderError(
        kind=kind,
        categories=categories_of(kind),
        words=f"status_code: {status}, model_name: {model}, body: {body}",
        status=status,
        body=body,
        headers=headers,
        retry_after=asked_wait(headers),
        url=url,
    )
