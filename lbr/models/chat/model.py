"""The chat adapter: which endpoints and settings it serves, the requests it sends, and the calls."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.config import hide_user
from lbr.models.chat.answers import Costs, Reader, decoded
from lbr.models.checks import check_authority, check_trust, takes_max_completion_tokens
from lbr.models.failures import call_error
from lbr.models.http import Connections, shown_url, unsupported_proxy
from lbr.models.prompt import Image, turns_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientTimeout

    from lbr.core.errors import CallError
    from lbr.core.types import Json, Reply
    from lbr.models.base import Model, Request
    from lbr.models.prompt import Turn

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
        if endpoint.url.startswith("https:"):
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


PLACEHOLDER_KEY = "api-key-not-set"
"""Sent to a server that needs no key, as OpenAI's client does."""

_PROVIDERS = ("openai-chat", "openrouter", "ollama")
# Each changes what is sent in ways that only OpenAI's client knows.
_FOREIGN_VARIABLES = ("OPENAI_CUSTOM_HEADERS", "OPENAI_ADMIN_KEY", "OPENAI_LOG")
_URL = re.compile(
    r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::(?:\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}))?(?:/[\w./~:-]*)?\Z",
    re.ASCII,
)
_VISIBLE = re.compile(r"[!-~]+\Z")
_NO_SYSTEM = re.compile(r"(?:^|/)o1-mini")
"""Models that take no system messages; pydantic-ai sends them otherwise."""
_REASONS = re.compile(r"(?:^|[/:])(?:o\d|gpt-[5-9])")
"""Names among which are the models that take no sampling settings while they reason."""
_SPECIAL_TOKEN = re.compile(
    r"<\||<\uff5c|<[a-z_]{1,32}\|>|<(?:start|end)_of_turn>|\[\||INST\]|SYSTEM_PROMPT\]|AVAILABLE_TOOLS\]|TOOL_RESULTS\]"
    r"|TOOL_CALLS\]|\[e~\[|\]~"
)
"""What a chat template may read as a turn of its own. pydantic-ai breaks it up for the servers that would."""
_PLAIN_IMAGE = re.compile(r"(?!data:)|data:image/[\w.-]+;base64,[A-Za-z\d+/]+={0,2}\Z")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model's calls go: `url` is that of its chat completions, `base_url` what prices are looked up by.

    `thinking_tags` enclose the model's thoughts in its answers.
    """

    provider: str
    model: str
    base_url: str
    url: str
    headers: Mapping[str, str]
    thinking_tags: tuple[str, str]

    def __repr__(self) -> str:
        """Leave out the headers, which hold the key."""
        return f"Endpoint({self.provider}:{self.model} at {self.base_url})"


def serves(name: str) -> bool:
    """Return whether the chat adapter can serve a model, by its full name, `provider:model`."""
    provider, _, model = name.partition(":")
    if provider not in _PROVIDERS or _VISIBLE.match(model) is None:
        return False
    return (provider != "openrouter" or "/" in model) and _NO_SYSTEM.search(model) is None


def endpoint_of(name: str, api_key: str | None = None) -> Endpoint | None:
    """Return where a model's calls go by this process's environment; `api_key` is OpenRouter's, from a flag.

    None if the chat adapter cannot serve the model, or if a key or URL is missing or unusual: pydantic-ai's adapter
    then takes it, or reports what is wrong.
    """
    if not serves(name) or any(map(os.environ.get, _FOREIGN_VARIABLES)) or unsupported_proxy():
        return None
    provider, _, model = name.partition(":")
    base_url, key = _place_of(provider, api_key)
    if not base_url or not key or _URL.match(base_url) is None or _VISIBLE.match(key) is None:
        return None
    is_claude = provider == "openrouter" and model.removeprefix("~").startswith("anthropic/")
    return Endpoint(
        provider="openai" if provider == "openai-chat" else provider,
        model=model,
        base_url=base_url if provider == "openrouter" else f"{base_url.rstrip('/')}/",
        url=f"{base_url.rstrip('/')}/chat/completions",
        headers=_headers(provider, key),
        thinking_tags=("<thinking>", "</thinking>") if is_claude else ("<think>", "</think>"),
    )


def _place_of(provider: str, api_key: str | None) -> tuple[str | None, str | None]:
    """Return base URL and key; None or empty for what is missing."""
    get = os.environ.get
    if provider == "openrouter":
        return get("OPENROUTER_BASE_URL") or "https://openrouter.ai/api/v1", api_key or get("OPENROUTER_API_KEY")
    if provider == "ollama":
        return get("OLLAMA_BASE_URL"), get("OLLAMA_API_KEY") or PLACEHOLDER_KEY
    base_url, key = get("OPENAI_BASE_URL"), get("OPENAI_API_KEY")
    if base_url is None:
        return "https://api.openai.com/v1", key
    return base_url, PLACEHOLDER_KEY if key is None else key


def _headers(provider: str, key: str) -> dict[str, str]:
    variables = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    if provider == "openrouter":
        variables |= {"HTTP-Referer": "OPENROUTER_APP_URL", "X-Title": "OPENROUTER_APP_TITLE"}
    named = {header: os.environ.get(variable) for header, variable in variables.items()}
    return {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "lbr",
        **{header: value for header, value in named.items() if value},
    }


# --- settings ---------------------------------------------------------------------------------------------------------

_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_FITS: dict[str, Callable[[Json], bool]] = {
    **dict.fromkeys(_SAMPLING, lambda value: type(value) in {int, float}),
    "timeout": lambda value: type(value) in {int, float} and value > 0,
    "max_tokens": lambda value: type(value) is int,
    "seed": lambda value: type(value) is int,
    "stop_sequences": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
}
_OWN_FIELDS = frozenset({"model", "messages", "stream", "stream_options", "tools", "response_format"})


def knows(model: str, settings: Mapping[str, Json]) -> bool:
    """Return whether all of these settings are sent to a model unchanged, so that nothing about them need be checked."""
    if any(name in settings for name in _SAMPLING) and _REASONS.search(model):
        return False
    return all(name in _FITS and _FITS[name](value) for name, value in settings.items())


def fields_of(endpoint: Endpoint, settings: Mapping[str, Json]) -> dict[str, Json] | None:
    """Return the body for a task's settings, without the messages; None if only pydantic-ai knows how they are sent.

    `extra_body` may have any field but those that decide what an answer looks like.
    """
    extra = settings.get("extra_body") or {}
    plain = {name: value for name, value in settings.items() if name != "extra_body"}
    if not knows(endpoint.model, plain) or not isinstance(extra, dict) or _OWN_FIELDS & extra.keys():
        return None
    is_openai = endpoint.provider != "openrouter" and takes_max_completion_tokens(endpoint.base_url)
    names = {
        "max_tokens": "max_completion_tokens" if is_openai else "max_tokens",
        "stop_sequences": "stop",
    }
    sent = {names.get(name, name): value for name, value in plain.items() if name != "timeout"}
    return {"model": endpoint.model, **sent, "stream": False, **extra}


# --- messages ---------------------------------------------------------------------------------------------------------


def messages_of(request: Request) -> list[dict[str, Json]] | None:
    """Return a request's messages; None for the few that are left to pydantic-ai.

    These have tool calls, a system message after the first others, an unusual image, or what may be a special token.
    Raises Permanent for messages of which a part would not be sent.
    """
    messages: list[dict[str, Json]] = []
    systems = 0
    for turn in turns_of(request):
        if turn.role == "system":
            if systems < len(messages):
                return None
            systems += 1
        elif not _is_plain(turn):
            return None
        messages.append({"role": turn.role, "content": _content(turn.content)})
    if request.task.instructions is not None:
        messages.insert(systems, {"role": "system", "content": request.task.instructions})
    return messages


def _is_plain(turn: Turn) -> bool:
    parts = [turn.content] if isinstance(turn.content, str) else turn.content
    return not turn.calls and all(
        _PLAIN_IMAGE.match(part.url) if isinstance(part, Image) else _SPECIAL_TOKEN.search(part) is None
        for part in parts
    )


def _content(content: str | list[str | Image]) -> Json:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else _image(part) for part in content]


def _image(image: Image) -> dict[str, Json]:
    sent: dict[str, Any] = {"url": image.url}
    if image.detail is not None:
        sent["detail"] = image.detail
    return {"type": "image_url", "image_url": sent}
