"""A server with OpenAI's files and batches, in a thread of the test: it remembers what it accepted, whoever is killed.

What it does wrong is chosen by `Fault` for the next request of a route, and by `Plan` for the batches to come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

from tests.support.http_server import completion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = "test-key-0123456789"
MAX_PAGE = 100
ENDED = ("completed", "failed", "expired", "cancelled")


class Fault(StrEnum):
    """What goes wrong with one request."""

    DROP = "drop"  # it is carried out, and the connection is closed without a reply
    LATE_500 = "late 500"  # it is carried out, and the reply is a 500
    DROP_BEFORE = "drop before"  # the others are not carried out
    BUSY = "503"
    LIMITED = "429"
    REFUSED = "400"
    HANG = "hang"  # it is carried out, and no reply comes


@dataclass(frozen=True)
class Plan:
    """How batches end. Counts are of lines from the beginning, in the order of the upload.

    `ends` is the final status; of one that expires or fails, only `answered` lines have an answer (None for all).
    """

    seconds: float = 0.0
    ends: str = "completed"
    code: str = "token_limit_exceeded"  # of one that fails
    answered: int | None = None
    missing: int = 0
    twice: int = 0
    errors: int = 0
    """So many lines end in the error file, with a 400."""
    is_reversed: bool = False


@dataclass
class Batch:
    """A batch that the server accepted."""

    id: str
    key: str
    file_id: str
    nonce: str | None
    metadata: dict[str, str]
    plan: Plan
    total: int
    created: float
    listed_from: float
    ends_at: float
    cancelling: float | None = None
    status: str = "in_progress"
    output: str | None = None
    errors: str | None = None
    counts: dict[str, int] = field(default_factory=dict)


class BatchServer:
    """The server, for the length of a block. `answer` makes the text of an answer from a request's body.

    `watch` hears the name of each request (`upload`, `create`, `list`, `poll`, `content`, `cancel`, `delete`, `chat`)
    before it is carried out, and again with " done" before its reply: it may kill the client. `asked` counts them.
    `accepted` are the nonces of all batches, `batched` and `online` how often each prompt was answered there.
    """

    def __init__(
        self, *, answer: Callable[[dict[str, Any]], str] = lambda body: f"answer to {prompt_in(body)}"
    ) -> None:
        self.answer = answer
        self.plan = Plan()
        self.listing_lags = 0.0
        """Seconds until a new batch is in the list."""
        self.watch: Callable[[str], None] = lambda _: None
        self.asked: Counter[str] = Counter()
        self.batches: dict[str, Batch] = {}
        self.batched: Counter[str] = Counter()
        self.online: Counter[str] = Counter()
        self.deleted: list[str] = []
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._names: dict[str, tuple[str, str]] = {}  # of files: their key and name
        self._folder = tempfile.TemporaryDirectory(prefix="batches-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._serial = 0
        self.port = 0

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def accepted(self) -> list[str | None]:
        """The nonces of all batches that it ever accepted."""
        return [batch.nonce for batch in self.batches.values()]

    @property
    def uploads(self) -> list[str]:
        """The names of all uploads."""
        return [name for _, name in self._names.values() if name.startswith("lbr-")]

    def fail(self, route: str, *faults: Fault) -> None:
        """Let the next requests of a route go wrong, one each."""
        self._faults[route].extend(faults)

    def end_all(self) -> None:
        """Let every batch end now."""
        for batch in self.batches.values():
            batch.ends_at = 0.0

    # --- routes ---

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        name, path, purpose = "", self._new_path("file"), ""
        part: Any
        async for part in await request.multipart():
            if part.name == "purpose":
                purpose = (await part.read()).decode()
            else:
                name = part.filename or ""
                with path.open("wb") as file:
                    while chunk := await part.read_chunk(65_536):
                        file.write(chunk)
        if purpose != "batch" or not name.endswith(".jsonl"):
            return refused(f"bad upload: {purpose} {name}")
        self._names[path.name] = (key_of(request), name)
        return web.json_response({"id": path.name, "object": "file", "filename": name, "purpose": purpose})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        key, file_id = key_of(request), asked["input_file_id"]
        if self._names.get(file_id, ("", ""))[0] != key:
            return refused(f"no such file: {file_id}", 404)
        endpoint, ids = asked["endpoint"], set()
        with self._path(file_id).open("rb") as file:
            for raw in file:
                line = json.loads(raw)
                assert line["url"] == endpoint, raw
                assert line["method"] == "POST", raw
                ids.add(line["custom_id"])
        metadata = asked.get("metadata") or {}
        now = time.time()
        batch = Batch(
            id=self._new_id("batch"),
            key=key,
            file_id=file_id,
            nonce=metadata.get("lbr"),
            metadata=metadata,
            plan=self.plan,
            total=len(ids),
            created=now,
            listed_from=now + self.listing_lags,
            ends_at=now + self.plan.seconds,
        )
        self.batches[batch.id] = batch
        return web.json_response(self._shown(batch))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if "limit" not in request.query:
            return web.json_response({"object": "list", "data": [], "has_more": False})
        own = [one for one in self.batches.values() if one.key == key_of(request) and one.listed_from <= time.time()][
            ::-1
        ]
        ids = [one.id for one in own]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = own[start : start + min(MAX_PAGE, int(request.query["limit"]))]
        shown = [self._shown(one) for one in page]
        more = start + len(page) < len(own)
        last = page[-1].id if page else None
        return web.json_response({"object": "list", "data": shown, "has_more": more, "last_id": last})

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        batch = self._own_batch(request)
        return refused("no such batch", 404) if batch is None else web.json_response(self._shown(batch))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        batch = self._own_batch(request)
        if batch is None:
            return refused("no such batch", 404)
        if self._shown(batch)["status"] in ENDED:
            return refused("Cannot cancel a batch with status completed.", 409)
        batch.cancelling = time.time()
        return web.json_response(self._shown(batch))

    async def _content(self, request: web.Request) -> web.StreamResponse:
        file_id = request.match_info["id"]
        if self._names.get(file_id, ("", ""))[0] != key_of(request):
            return refused("no such file", 404)
        return web.FileResponse(self._path(file_id), headers={"Content-Type": "application/octet-stream"})

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        file_id = request.match_info["id"]
        if self._names.get(file_id, ("", ""))[0] != key_of(request) or file_id in self.deleted:
            return refused("no such file", 404)
        self.deleted.append(file_id)
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.online[prompt_in(body)] += 1
        return web.Response(text=completion(self.answer(body)), content_type="application/json")

    # --- batches ---

    def _own_batch(self, request: web.Request) -> Batch | None:
        batch = self.batches.get(request.match_info["id"])
        return batch if batch is not None and batch.key == key_of(request) else None

    def _shown(self, batch: Batch) -> dict[str, Any]:
        """Return a batch as the API does, after it ended if its time has come."""
        if batch.status not in ENDED:
            if time.time() >= batch.ends_at:
                self._end(batch, batch.plan.ends)
            elif batch.cancelling is not None:
                self._end(batch, "cancelled")
        error = {"code": batch.plan.code, "message": "Enqueued token limit reached", "param": None, "line": None}
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "input_file_id": batch.file_id,
            "completion_window": "24h",
            "status": batch.status,
            "errors": {"object": "list", "data": [error]} if batch.status == "failed" else None,
            "output_file_id": batch.output,
            "error_file_id": batch.errors,
            "created_at": int(batch.created),
            "request_counts": {"total": batch.total, "completed": 0, "failed": 0, **batch.counts},
            "metadata": batch.metadata,
        }

    def _end(self, batch: Batch, status: str) -> None:
        batch.status, plan = status, batch.plan
        if status == "failed":
            return
        with self._path(batch.file_id).open("rb") as file:
            lines = [json.loads(raw) for raw in file]
        answered = lines if status == "completed" or plan.answered is None else lines[: plan.answered]
        if status == "cancelled" and plan.answered is None:
            answered = []
        left = lines[len(answered) :]
        answered = answered[plan.missing :]
        wrong, good = answered[: plan.errors], answered[plan.errors :]
        for line in good:
            self.batched[prompt_in(line["body"])] += 1
        good = [*good, *good[: plan.twice]]
        batch.output = self._written(batch, self._outputs(good[::-1] if plan.is_reversed else good))
        unused = f"batch_{status}"
        batch.errors = self._written(batch, [*map(failed_line, wrong), *(failed_line(one, unused) for one in left)])
        batch.counts = {"completed": len(good), "failed": len(wrong) + len(left)}

    def _outputs(self, lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for line in lines:
            body = {**json.loads(completion(self.answer(line["body"]))), "model": line["body"]["model"]}
            response = {"status_code": 200, "request_id": "r", "body": body}
            yield {"id": "batch_req", "custom_id": line["custom_id"], "response": response, "error": None}

    def _written(self, batch: Batch, lines: Any) -> str | None:
        path, count = self._new_path("file"), 0
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for count, line in enumerate(lines, 1):  # noqa: B007 - counted
                file.write(json.dumps(line, ensure_ascii=False) + "\n")  # U+2028 comes raw
        self._names[path.name] = (batch.key, "output.jsonl")
        return path.name if count else None

    def _new_id(self, kind: str) -> str:
        self._serial += 1
        return f"{kind}-{self._serial:06}"

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, name)

    def _new_path(self, kind: str) -> Path:
        return self._path(self._new_id(kind))

    # --- the thread ---

    def _routed(self, name: str, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.asked[name] += 1
            self.watch(name)
            fault = self._faults[name].popleft() if self._faults[name] else None
            match fault:
                case Fault.DROP_BEFORE:
                    return drop(request)
                case Fault.BUSY | Fault.LIMITED | Fault.REFUSED:
                    await request.read()
                    return refused(f"fault {fault}", int(fault))
            reply = await handler(request)
            self.watch(f"{name} done")
            match fault:
                case Fault.DROP:
                    return drop(request)
                case Fault.LATE_500:
                    return refused("fault after it was carried out", 500)
                case Fault.HANG:
                    await asyncio.Event().wait()
            return reply

        return handle

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        files, batches = "/v1/files", "/v1/batches"
        routes = [
            ("POST", files, "upload", self._upload),
            ("GET", files + "/{id}/content", "content", self._content),
            ("DELETE", files + "/{id}", "delete", self._delete),
            ("POST", batches, "create", self._create),
            ("GET", batches, "list", self._list),
            ("GET", batches + "/{id}", "poll", self._poll),
            ("POST", batches + "/{id}/cancel", "cancel", self._cancel),
            ("POST", "/v1/chat/completions", "chat", self._chat),
        ]
        for method, path, name, handler in routes:
            app.router.add_route(method, path, self._routed(name, handler))
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner is not None:
            self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self._folder.cleanup()


def prompt_in(body: dict[str, Any]) -> str:
    """Return the first message of the user."""
    return str(next(one["content"] for one in body["messages"] if one["role"] == "user"))


def key_of(request: web.Request) -> str:
    """Return who asks."""
    return request.headers.get("Authorization", "")


def refused(message: str, status: int = 400) -> web.Response:
    """Return an error."""
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)


def drop(request: web.Request) -> web.Response:
    """Close the connection without a reply."""
    with contextlib.suppress(AttributeError):
        request.transport.abort()  # type: ignore[union-attr]
    return web.Response()


def failed_line(line: dict[str, Any], unused: str | None = None) -> dict[str, Any]:
    """Return the line of a request that failed, or of one that was never carried out."""
    head = {"id": "batch_req", "custom_id": line["custom_id"]}
    if unused is not None:
        error = {"code": unused, "message": "This request could not be executed."}
        return {**head, "response": None, "error": error}
    body = {"error": {"message": "not this one", "type": "invalid_request_error"}}
    return {**head, "response": {"status_code": 400, "request_id": "r", "body": body}, "error": None}
