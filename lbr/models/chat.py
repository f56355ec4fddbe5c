"""Endpoints that speak OpenAI's chat completions, called with aiohttp and orjson; pydantic-ai serves all others.

Of an answer only the text is required, in any envelope: it is paid for, whatever else is odd.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.config import hide_user
from lbr.core.errors import CallError, Family
from lbr.core.extras import Extra, Extras
from lbr.core.messages import texts_in, with_instructions
from lbr.core.pricing import processing_of
from lbr.core.types import Reply
from lbr.models.base import messages_of
from lbr.models.checks import settings_of, takes_max_completion_tokens
from lbr.models.costs import Costs
from lbr.models.failures import (
    call_error,
    check_answer,
    clean,
    ending_of,
    filter_words,
    message_in,
    page_words,
    status_in,
)
from lbr.models.http import Connections, unsupported_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientTimeout

    from lbr.core.errors import Usage
    from lbr.core.pricing import Processing
    from lbr.core.types import Json
    from lbr.models.base import Model, Request

MAX_SILENCE_SECONDS = 600.0
"""How long to wait for the next bytes of an answer if neither the task nor the caller has a timeout."""
CONNECT_SECONDS = 5.0


class ChatModel:
    """One endpoint that speaks OpenAI's chat completions, over `connections`, None for some of its own; it closes them.

    `response_format` is what the body has for the task's schema, None without one. `build_other` builds pydantic-ai's
    adapter, for requests that only it can send.
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
        self.endpoint = endpoint
        self._settings = task_settings
        self._format = {} if response_format is None else {"response_format": response_format}
        self._start = self._body_start(task_settings)
        self._build_other = build_other
        self._other: Model | None = None
        self._lock = asyncio.Lock()
        self._api_key = api_key
        self._connections = connections or Connections()
        self.reader = Reader(endpoint.provider, endpoint.model, endpoint.base_url, api_key)

    async def answer(self, request: Request) -> Reply:
        """Make one call. Raises CallError with the family of the failure."""
        body = self.body(request)
        if body is None:
            return await (await self._pydantic_ai()).answer(request)
        settings = settings_of(request, self._settings)
        self.reader.costs.begin()
        started = time.monotonic()
        head, content = await self._connections.fetch(
            "POST",
            self.endpoint.url,
            timeout=_timeout(settings.get("timeout"), request.timeout),
            data=body,
            headers=self.endpoint.headers,
        )
        if head.code >= 300:
            raise self.failed(head.code, head.headers, content)
        seconds = (request.timeout or MAX_SILENCE_SECONDS) - (time.monotonic() - started)
        await self.reader.costs.ready(seconds / 2)
        return self.reader.read(content, keep=bool(request.keep), processing=processing_of(settings))

    def body(self, request: Request) -> bytes | None:
        """Return the body of a request; None if only pydantic-ai knows how it is sent. Raises Permanent if nothing can."""
        settings, logprobs = settings_of(request, self._settings), Extra.LOGPROBS in request.keep
        is_common = request.settings is None and not logprobs
        start = self._start if is_common else self._body_start(settings, logprobs=logprobs)
        messages = None if start is None else _messages_of(request)
        return None if start is None or messages is None else b"".join((start, orjson.dumps(messages), b"}"))

    def _body_start(self, settings: Mapping[str, Json], *, logprobs: bool = False) -> bytes | None:
        """Return a body up to its messages; None if only pydantic-ai knows how these settings are sent."""
        fields = fields_of(self.endpoint, settings)
        if fields is None or (logprobs and not sends_logprobs(self.endpoint.name)):
            return None
        more = {"logprobs": True} if logprobs else {}
        return orjson.dumps({**more, **self._format, **fields})[:-1] + b',"messages":'

    async def _pydantic_ai(self) -> Model:
        """Return pydantic-ai's adapter, built by the first call that needs it; a later call tries again if that fails."""
        async with self._lock:
            if self._other is None:
                self._other = await asyncio.to_thread(self._build_other)  # takes a second or two
            return self._other

    def failed(self, status: int, headers: Mapping[str, str], content: bytes, url: str | None = None) -> CallError:
        """Return the error for an answer with a status of 300 or more; `url` is None for one of chat completions."""
        if status < 400:
            place = hide_user(headers.get("location", "another URL").partition("?")[0])
            words = f"the server redirects to {place}, and lbr does not follow; correct the provider's base URL"
            return call_error(f"{words} (HTTP {status})", status=status, api_key=self._api_key)
        text = content.decode("utf-8-sig", errors="replace").strip()
        try:
            error: Any = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            error = text
        if isinstance(error, dict):
            error = error.get("error", error)
        return call_error(
            f"status_code: {status}, model_name: {self.endpoint.model}, body: {error}",
            status=status,
            body=error,
            headers=headers,
            url=url or self.endpoint.url,
            api_key=self._api_key,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()
        if self._other is not None:
            await self._other.aclose()


@functools.lru_cache(maxsize=64)
def _timeout(setting: float | None, callers: float | None) -> ClientTimeout:
    """Return the timeout of a call. If only the caller has one, it ends the call itself, and two timers are saved."""
    from aiohttp import ClientTimeout  # noqa: PLC0415

    seconds = float(setting or callers or MAX_SILENCE_SECONDS)
    read = None if setting is None and callers is not None else seconds
    # No bound on the whole: an answer that comes bit by bit may take its time.
    return ClientTimeout(total=None, connect=min(seconds, CONNECT_SECONDS), sock_read=read)


# --- endpoints --------------------------------------------------------------------------------------------------------

PLACEHOLDER_KEY = "api-key-not-set"
"""Sent to a server that needs no key, as OpenAI's client does."""

_PROVIDERS = {
    "openai-chat": ("OPENAI", "https://api.openai.com/v1"),
    "openrouter": ("OPENROUTER", "https://openrouter.ai/api/v1"),
    "ollama": ("OLLAMA", None),
}
"""The beginning of each provider's variables, and its base URL."""
_NAME = re.compile(r"[!-~]+\Z")
_URL = re.compile(r"https?://[\w.:\[\]/~-]+\Z", re.ASCII)
"""A URL without user, query and escapes: only pydantic-ai serves those."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model's calls go: `url` is that of its chat completions, `base_url` what prices are looked up by."""

    name: str
    provider: str
    model: str
    base_url: str
    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)  # they hold the key


def _serves(name: str) -> bool:
    """Return whether the chat adapter can serve a model, by its full name, `provider:model`."""
    provider, _, model = name.partition(":")
    return provider in _PROVIDERS and _NAME.match(model) is not None and (provider != "openrouter" or "/" in model)


def endpoint_of(name: str, api_key: str | None = None) -> Endpoint | None:
    """Return where a model's calls go by this process's environment; `api_key` is OpenRouter's, from a flag.

    None if the chat adapter cannot serve the model, or if a key or URL is missing or unusual: pydantic-ai's adapter
    then takes it, or reports what is wrong.
    """
    if not _serves(name) or os.environ.get("OPENAI_CUSTOM_HEADERS") or unsupported_proxy():
        return None
    provider, _, model = name.partition(":")
    prefix, default_url = _PROVIDERS[provider]
    own_url, key = os.environ.get(f"{prefix}_BASE_URL"), os.environ.get(f"{prefix}_API_KEY")
    if provider == "openrouter":
        key = api_key or key
    elif own_url and (key is None or (provider == "ollama" and not key)):
        key = PLACEHOLDER_KEY
    base_url = own_url or default_url
    if not base_url or not key or _URL.match(base_url) is None:
        return None
    return Endpoint(
        name=name,
        provider="openai" if provider == "openai-chat" else provider,
        model=model,
        base_url=base_url,
        url=f"{base_url.rstrip('/')}/chat/completions",
        headers=_headers(provider, key),
    )


def _headers(provider: str, key: str) -> tuple[tuple[str, str], ...]:
    variables = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    if provider == "openrouter":
        variables |= {"HTTP-Referer": "OPENROUTER_APP_URL", "X-Title": "OPENROUTER_APP_TITLE"}
    found = {header: value for header, variable in variables.items() if (value := os.environ.get(variable))}
    plain = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lbr"}
    return tuple({"Authorization": f"Bearer {key}", **plain, **found}.items())


# --- requests ---------------------------------------------------------------------------------------------------------

_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_FITS: dict[str, Callable[[Json], bool]] = {
    **dict.fromkeys(_SAMPLING, lambda value: type(value) in {int, float}),
    "timeout": lambda value: type(value) in {int, float} and value > 0,
    "max_tokens": lambda value: type(value) is int,
    "seed": lambda value: type(value) is int,
    "service_tier": lambda value: value in ("auto", "default", "flex", "priority"),
    "stop_sequences": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
}
_OWN_FIELDS = frozenset({"model", "messages", "stream", "stream_options", "tools"})
_REASONS = re.compile(r"(?:^|[/:])(?:o\d|gpt-[5-9])")
"""Names among which are the models that take no sampling settings, and give no log probabilities, while they reason."""
_SPECIAL_TOKEN = re.compile(
    r"<\||<\uff5c|\|>|_of_turn>|\[\||(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]|\[e~\[|\]~"
)
"""What a chat template may read as a turn of its own. pydantic-ai breaks it up for the servers that would."""


def sends(name: str, settings: Mapping[str, Json]) -> bool:
    """Return whether all of these settings are sent to a model unchanged, so that nothing about them need be checked."""
    if not _serves(name) or (any(one in settings for one in _SAMPLING) and _REASONS.search(name)):
        return False
    return all(one in _FITS and _FITS[one](value) for one, value in settings.items())


def sends_logprobs(name: str) -> bool:
    """Return whether a model can be asked for log probabilities, without settings."""
    return _serves(name) and _REASONS.search(name) is None


def as_sent(name: str, settings: dict[str, Json]) -> dict[str, Json]:
    """Return settings with a reasoning model's sampling in `extra_body`: the server decides whether it takes it."""
    moved = {one: settings[one] for one in _SAMPLING if one in settings}
    if not moved or not _serves(name) or not _REASONS.search(name):
        return settings
    rest = {one: value for one, value in settings.items() if one not in moved}
    return {**rest, "extra_body": {**moved, **settings.get("extra_body", {})}}


def fields_of(endpoint: Endpoint, settings: Mapping[str, Json]) -> dict[str, Json] | None:
    """Return the body for a task's settings, without the messages; None if only pydantic-ai knows how they are sent.

    `extra_body` may have any field but those that decide what an answer looks like.
    """
    extra = settings.get("extra_body") or {}
    plain = {name: value for name, value in settings.items() if name != "extra_body"}
    if not sends(endpoint.name, plain) or not isinstance(extra, dict) or _OWN_FIELDS & extra.keys():
        return None
    is_openai = endpoint.provider != "openrouter" and takes_max_completion_tokens(endpoint.base_url)
    names = {"max_tokens": "max_completion_tokens" if is_openai else "max_tokens", "stop_sequences": "stop"}
    sent = {names.get(name, name): value for name, value in plain.items() if name != "timeout"}
    return {"model": endpoint.model, **sent, "stream": False, **extra}


def _messages_of(request: Request) -> list[dict[str, Json]] | None:
    """Return a request's messages; None if one of them may hold a special token, which is left to pydantic-ai."""
    messages = messages_of(request)
    if any(_is_special(message) for message in messages if message["role"] != "system"):
        return None
    return with_instructions(messages, request.task.instructions)


def _is_special(message: Mapping[str, Json]) -> bool:
    # Most texts have none of these signs, which are found sooner than a pattern.
    return any(sign in text and _SPECIAL_TOKEN.search(text) for text in texts_in(message["content"]) for sign in "<>[]")


# --- answers ----------------------------------------------------------------------------------------------------------

ANSWER_TOOL = "answer"
"""The tool whose arguments are the answer, for models that take no schema in another way."""
EVENTS = ("data:", "event:", "id:", "retry:", ":")
"""How server-sent events begin."""
_REASONING = ("reasoning_content", "reasoning")
_THOUGHT = re.compile("<think>(.*?)</think>", re.DOTALL)
CUT_OFF_STREAM = "the stream of the answer was cut off"


class Reader:
    """Reads the answers of one model."""

    def __init__(self, provider: str, model: str, base_url: str, api_key: str | None = None) -> None:
        self.costs = Costs(provider, model, base_url)
        self._api_key = api_key

    def read(self, content: bytes, *, keep: bool = False, processing: Processing = "standard") -> Reply:
        """Read the body of an answer with a status of 2xx, to `keep` with all that came with it, at that price.

        Raises CallError, with what came, if it cannot be used.
        """
        body = _object(self._parse(content))
        choices = body.get("choices")
        choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
        message = _object(choice.get("message"))
        text = whole = _text_of(message)
        if "<think>" in text:  # of a thought without an end, only the tag is left out
            text = _THOUGHT.sub("", text).replace("<think>", "", 1)
        usage, ending = self.costs.usage(body, processing), ending_of(choice.get("finish_reason"))
        if error := body.get("error") or choice.get("error"):
            self._check_error(error, text, usage, ending)
        refusal = message.get("refusal")
        if not text.strip() or ending not in {"stop", "length"} or refusal:
            raw = content.decode(errors="replace")
            if not choice:
                words = "expected an answer, got: JSON without one; `lbr show` has it as it came"
                raise CallError(words, family=Family.BAD_ANSWER, kind="UnreadAnswer", text=raw, usage=usage)
            why = filter_words(choice) or filter_words(body)
            refusal = refusal if isinstance(refusal, str) else None
            check_answer(text, ending, usage, raw=raw, refusal=refusal, why=why)
        name = body.get("model")
        model = name if isinstance(name, str) and name else self.costs.model
        extras = _extras_of(message, whole, choice.get("logprobs"), content) if keep else None
        return Reply(text=text, usage=usage, model=model, finish_reason=ending, extras=extras)

    def _check_error(self, error: Any, text: str, usage: Usage, ending: str | None) -> None:
        """Raise CallError for an error in the place of an answer, or one that broke the answer off."""
        status = status_in(error)
        if error is CUT_OFF_STREAM:
            failed = CallError(CUT_OFF_STREAM, kind="UnreadAnswer")
        elif text.strip() and status is None and ending is not None:
            return
        else:
            words = "expected an answer, got: the error " + orjson.dumps(error, default=str).decode()
            body = error if message_in(error) else None
            failed = call_error(words, status=status or 0, body=body, api_key=self._api_key)
        failed.text, failed.usage, failed.finish_reason = text if text.strip() else None, usage, ending
        raise failed

    def _parse(self, content: bytes) -> Any:
        """Parse JSON, also if it is a little damaged, or server-sent events that were not requested.

        Raises CallError, with the text, for anything else.
        """
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            text = content.decode("utf-8-sig", errors="replace")
        try:
            return json.loads(text, strict=False)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith(EVENTS):
                return _assembled(text)
            page = page_words(text)
            if page is not None:  # of a proxy or a portal, and no answer of a model
                words, kept = f"expected JSON, got: the page {page!r}", None
            elif text.strip():
                words, kept = f"the answer is cut off, or no JSON: {error}", text
            else:
                words, kept = "the answer is empty", None
            raise CallError(clean(words, self._api_key), kind="UnreadAnswer", text=kept) from error


def _assembled(text: str) -> dict[str, Any]:
    """Return the answer that server-sent events add up to, with an error if not all of them came."""
    body: dict[str, Any] = {}
    parts: dict[str, list[str]] = {name: [] for name in ("content", "refusal", *_REASONING)}
    ending, whole = None, False
    for line in re.split(r"\r\n|\r|\n", text):  # str.splitlines would also split inside of JSON strings
        name, _, data = line.partition(":")
        if name.strip() != "data":
            continue
        if whole := data.strip() == "[DONE]":
            break
        try:
            event = _object(json.loads(data, strict=False))
        except (ValueError, RecursionError):
            break
        body |= {name: event[name] for name in ("model", "usage", "service_tier", "error") if event.get(name)}
        choices = event.get("choices")
        for choice in map(_object, choices if isinstance(choices, list) else []):
            if choice.get("index", 0) == 0:
                delta = _object(choice.get("delta") or choice.get("message"))
                for name, texts in parts.items():
                    texts.append(_text_of({"content": delta.get(name)}))
                ending = choice.get("finish_reason") or ending
    if not whole and ending is None:
        body.setdefault("error", CUT_OFF_STREAM)
    message = {name: "".join(texts) for name, texts in parts.items()}
    return {**body, "choices": [{"message": message, "finish_reason": ending}]}


def _object(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def _text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, which may come in parts, without those that are the model's thoughts."""
    match message:
        case {"tool_calls": [{"function": {"name": name, "arguments": str(arguments)}}, *_]} if name == ANSWER_TOOL:
            return arguments
        case {"content": str(text)}:
            return text
        case {"content": [*parts]}:
            return "".join(map(_part_text, parts))
    return ""


def _extras_of(message: dict[str, Any], text: str, logprobs: Any, content: bytes) -> Extras:
    """Return what came with an answer; the model's thoughts are in a field of their own or else in its text."""
    fields = (message.get(name) for name in _REASONING)
    own = next((one for one in fields if isinstance(one, str) and one.strip()), None)
    return extras("\n\n".join(_THOUGHT.findall(text)) if own is None else own, logprobs, content)


def extras(reasoning: str, logprobs: Any, content: bytes) -> Extras:
    """Return what came with an answer as it is kept; `logprobs` is None if none came."""
    text = ""
    if logprobs is not None:
        with suppress(TypeError):  # of what no output could hold: half a surrogate pair, deep nesting
            text = orjson.dumps(logprobs).decode()
    return Extras(reasoning, text, content.decode(errors="replace"))


def _part_text(part: Any) -> str:
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") in {"text", "output_text"} else None
    return part if isinstance(part, str) else ""
