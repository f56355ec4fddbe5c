"""OpenAI's files and batches, with the bodies and answers of `lbr.models.chat`; Groq and others speak the same format.

A request is sent once, whatever happens to its reply: lbr looks for the batch instead of creating it again.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from lbr.core.batches import LANES, Found, Lane, Refused, Unsure, WrongKey
from lbr.core.errors import CallError, UsageError
from lbr.core.retry import failure_of
from lbr.core.tiers import sent_settings
from lbr.core.types import Outcome
from lbr.models import chat
from lbr.models.base import Kind, Request, kind_of
from lbr.models.build import build_model
from lbr.models.failures import clean
from lbr.models.http import MAX_ANSWER_BYTES, Connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from aiohttp import ClientTimeout

    from lbr.core.extras import Extra
    from lbr.core.types import Claim, Json, Millis, Task
    from lbr.models.build import Authority

MARKER = "lbr"
"""The name in a batch's metadata under which its nonce is found."""
PAGE = 100
"""Batches on one page of the list. Some servers return none if the size is not given."""
SILENCE_SECONDS = 120.0
TABLE_SECONDS = 30.0
"""The longest wait for the price table before results are read."""
_URL = "/v1/chat/completions"
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_DOUBTFUL = frozenset({408, 409, 429})
"""Statuses below 500 after which the server may have created the batch."""


class ChatBatches:
    """A `lbr.core.batches.BatchProvider` for one task that `model` answers; it closes the model, and `connections`."""

    max_requests = 50_000
    max_bytes = 200_000_000

    def __init__(self, model: chat.ChatModel, connections: Connections, task: Task, keep: tuple[Extra, ...]) -> None:
        endpoint = model.endpoint
        self._model = model
        self._connections = connections
        self._task = task
        self._keep = keep
        self._base = endpoint.base_url.rstrip("/")
        self.name = urlsplit(self._base).hostname or self._base
        self.credential = hashlib.sha256(repr((self._base, endpoint.headers)).encode()).hexdigest()[:16]

    def line(self, claim: Claim, custom_id: str) -> bytes:
        """Return the line of the upload for a claim. Raises CallError for a request that only a call can make."""
        request = Request(
            claim.prompt, self._task, claim.job_id, claim.claim_seq, settings=claim.settings, keep=self._keep
        )
        body = self._model.body(request)
        if body is None:
            raise CallError("this prompt or its settings cannot be sent in a batch")
        head = orjson.dumps({"custom_id": custom_id, "method": "POST", "url": _URL})
        return b'%b,"body":%b}\n' % (head[:-1], body)

    async def upload(self, nonce: str, path: Path) -> str:
        """Upload a file; return its id."""
        from aiohttp import FormData  # noqa: PLC0415

        url = f"{self._base}/files"
        headers = tuple((name, value) for name, value in self._model.endpoint.headers if name != "Content-Type")
        with path.open("rb") as file:
            form = FormData({"purpose": "batch"})
            form.add_field("file", file, filename=f"lbr-{nonce}.jsonl", content_type="application/jsonl")
            async with self._connections.stream("POST", url, timeout=_timeout(), headers=headers, data=form) as answer:
                content = await answer.read()
        if answer.status >= 300:
            raise self._model.failed(answer.status, answer.headers, content, url)
        return _id_in(_object(content))

    async def create(self, file_id: str, nonce: str) -> Found:
        """Create the batch with one request. Raises Refused if that failed for certain, else Unsure."""
        asked = {"input_file_id": file_id, "endpoint": _URL, "completion_window": "24h", "metadata": {MARKER: nonce}}
        try:
            status, content, error = await self._ask("POST", "/batches", asked)
            if error is None:
                return _found(_object(content))
        except CallError as lost:
            raise Unsure(str(lost)) from lost
        raise Unsure(str(error)) if status in _DOUBTFUL or status >= 500 else Refused(str(error))

    async def find(self, nonce: str, since: Millis) -> Found | None:
        """Return the batch with this nonce, from all pages of those created `since` then; lists begin with the newest."""
        after = ""
        while True:
            page = await self._object("GET", f"/batches?limit={PAGE}{after}")
            batches = [one for one in page.get("data") or [] if isinstance(one, dict)]
            for one in batches:
                if (one.get("metadata") or {}).get(MARKER) == nonce:
                    return _found(one)
            times = [at for one in batches if type(at := one.get("created_at")) is int]
            is_past = times == sorted(times, reverse=True) and all(at * 1000 < since for at in times)
            following = f"&after={_id_in(batches[-1])}" if batches else after
            if not page.get("has_more") or (times and is_past) or following == after:
                return None
            after = following

    async def poll(self, provider_id: str) -> Found:
        """Return the batch as it is now. Raises WrongKey if it is not visible with this key."""
        return _found(await self._object("GET", f"/batches/{provider_id}"))

    async def results(self, found: Found, start: int) -> AsyncIterator[tuple[int, str, Outcome]]:
        """Yield the cursor behind each line after the cursor `start`, its custom_id, and how its request ended."""
        costs = self._model.reader.costs
        costs.begin()
        await costs.ready(TABLE_SECONDS)
        cursor = 0
        for file_id in found.files:
            begin = cursor
            async for size, raw in self._lines(f"{self._base}/files/{file_id}/content"):
                cursor = begin + size
                ended = self._ended(raw) if cursor > start else None
                if ended is not None:
                    yield cursor, *ended

    async def cancel(self, provider_id: str) -> None:
        """Ask the provider to cancel the batch. One that has ended meanwhile is refused, and stays as it is."""
        status, _, error = await self._ask("POST", f"/batches/{provider_id}/cancel")
        if error is not None and status not in {400, 409}:
            raise WrongKey(str(error)) if status == 404 else error

    async def delete(self, file_id: str) -> None:
        """Delete a file, if it is still there."""
        status, _, error = await self._ask("DELETE", f"/files/{file_id}")
        if error is not None and status != 404:
            raise error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._model.aclose()

    async def _ask(self, method: str, path: str, asked: Json = None) -> tuple[int, bytes, CallError | None]:
        """Make one call; return its status, its answer, and the error if it failed. Raises CallError without an answer."""
        data = b"" if asked is None else orjson.dumps(asked)
        headers, url = self._model.endpoint.headers, self._base + path
        head, content = await self._connections.fetch(method, url, timeout=_timeout(), headers=headers, data=data)
        failed = head.code >= 300
        return head.code, content, self._model.failed(head.code, head.headers, content, url) if failed else None

    async def _object(self, method: str, path: str) -> dict[str, Any]:
        status, content, error = await self._ask(method, path)
        if error is not None:
            raise WrongKey(str(error)) if status == 404 else error
        return _object(content)

    async def _lines(self, url: str) -> AsyncIterator[tuple[int, bytes]]:
        """Yield each line of a file, and how long the file is up to its end. A line that is too long comes empty."""
        headers = self._model.endpoint.headers
        async with self._connections.stream("GET", url, timeout=_timeout(), headers=headers) as answer:
            if answer.status >= 300:
                raise self._model.failed(answer.status, answer.headers, await answer.read(), url)
            parts: list[bytes] = []
            size = end = 0
            async for chunk in answer.content.iter_any():
                for number, part in enumerate(chunk.split(b"\n")):  # str.splitlines would also split at U+2028
                    if number:
                        end += size + 1
                        yield end, b"".join(parts)
                        parts, size = [], 0
                    size += len(part)
                    if size <= MAX_ANSWER_BYTES:
                        parts.append(part)
                    else:
                        parts.clear()
            if size:
                yield end + size, b"".join(parts)

    def _ended(self, raw: bytes) -> tuple[str, Outcome] | None:
        """Return a line's custom_id and how its request ended; None if that was not carried out, or is unreadable."""
        try:
            line = json.loads(raw.decode(errors="replace"), strict=False)
        except (ValueError, RecursionError):
            return None
        match line:
            case {"custom_id": str(custom_id), "response": {"body": body} as response}:
                pass
            case _:
                return None
        content, status = json.dumps(body, ensure_ascii=False).encode(errors="replace"), response.get("status_code")
        try:
            if type(status) is int and status >= 300:
                raise self._model.failed(status, {}, content)
            reply = self._model.reader.read(content, keep=bool(self._keep), processing="batch")
        except CallError as error:
            return custom_id, Outcome(None, failure_of(error), latency_ms=0)
        return custom_id, Outcome(reply, None, latency_ms=0)


def _timeout() -> ClientTimeout:
    from aiohttp import ClientTimeout  # noqa: PLC0415

    return ClientTimeout(total=None, connect=chat.CONNECT_SECONDS, sock_read=SILENCE_SECONDS)


def _object(content: bytes) -> dict[str, Any]:
    """Read the object that a server returned. Raises CallError for anything else."""
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise CallError(f"expected a JSON object, got: {content[:200].decode(errors='replace')}", kind="UnreadAnswer")
    return found


def _id_in(found: Mapping[str, Any]) -> str:
    name = found.get("id")
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise CallError(f"expected an id, got: {str(found)[:200]}", kind="UnreadAnswer")
    return name


def _found(batch: Mapping[str, Any]) -> Found:
    """Read a batch."""
    status, errors = str(batch.get("status")).lower(), batch.get("errors")
    counts = batch.get("request_counts")
    first: dict[str, Any] = {}
    match errors:
        case {"data": [dict(first), *_]}:
            pass
    completed, failed = (counts.get(name) if isinstance(counts, dict) else None for name in ("completed", "failed"))
    return Found(
        provider_id=_id_in(batch),
        ended=status in _ENDED,
        files=tuple(one for name in ("output_file_id", "error_file_id") if isinstance(one := batch.get(name), str)),
        completed=completed if type(completed) is int else None,
        failed=failed if type(failed) is int else None,
        error=clean(str(first.get("code") or status)) if status in _ENDED - {"completed"} else None,
        message=clean(str(first["message"])) if "message" in first else None,
    )


# --- who has batches --------------------------------------------------------------------------------------------------

_OTHERS = {
    "openai": "is called by OpenAI's Responses; use openai-chat:{}, its chat completions",
    "openai-responses": "is called by OpenAI's Responses; use openai-chat:{}, its chat completions",
    "groq": "is asked in another way; use openai-chat:{} with OPENAI_BASE_URL=https://api.groq.com/openai/v1 and Groq's "
    "key as OPENAI_API_KEY",
    "openrouter": "has no batches",
    "ollama": "has no batches",
    "azure": "has batches of its deployments, which lbr does not support",
}
_HOSTS = {
    "azure.com": "Azure has batches of its deployments, which lbr does not support",
    "together.ai": "Together's uploads differ, and its batches have no metadata by which lbr could find a lost one",
    "together.xyz": "Together's uploads differ, and its batches have no metadata by which lbr could find a lost one",
}


def check_lane(lane: str | None, task: Task, base_url: str | None) -> None:
    """Raise UsageError for an unknown lane, or if no batch can ask for a task.

    `base_url` is where calls in OpenAI's format go, None to OpenAI.
    """
    if lane not in {None, *LANES}:
        raise UsageError(f"expected the lane to be {', '.join(LANES[:-1])} or {LANES[-1]}, got: {lane!r}")
    if lane in {None, Lane.ONLINE}:
        return
    name, why = task.model or "", ""
    provider, _, model = name.partition(":")
    host = urlsplit(base_url or "").hostname or ""
    settings = {one: value for one, value in sent_settings(task).items() if one != "extra_body"}
    if kind_of(task) is Kind.FUNCTION:
        why = "a function of yours answers, not a provider"
    elif kind_of(task) is Kind.OFFLINE:
        why = f"{name} answers on this machine, not at a provider"
    elif provider != "openai-chat":
        why = f"{name} " + _OTHERS.get(provider, "has batches in another format or none, which lbr does not support")
        why = why.format(model)
    elif found := next((words for ending, words in _HOSTS.items() if host.endswith(ending)), None):
        why = found
    elif "service_tier" in settings:
        why = "--tier is for calls online, at the same price; give one of both"
    elif odd := [one for one in settings if not chat.sends(name, {one: settings[one]})]:
        why = f"lbr cannot send {', '.join(odd)} in a batch; put it into extra_body as the provider names it"
    if why:
        raise UsageError(f"no batches for this run: {why}. Leave --lane out to call it online")


def batch_provider(task: Task, authority: Authority, keep: tuple[Extra, ...] = ()) -> ChatBatches:
    """Build the batches of a task's model. Raises UsageError, with what to do, if this process may not or cannot."""
    connections = Connections()
    model = build_model(task, authority, concurrency=1, connections=connections)
    if not isinstance(model, chat.ChatModel):
        raise UsageError(
            f"no batches for model {task.model!r}: this process cannot call it by OpenAI's chat completions"
        )
    check_lane(Lane.BATCH, task, model.endpoint.base_url)
    return ChatBatches(model, connections, task, keep)
