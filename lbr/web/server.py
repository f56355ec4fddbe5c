"""The server of the dashboard, and what it refuses: other hosts, other sites' requests, and whoever lacks the token.

The pages and their scripts hold no data and are public; every request for data carries the token in a header. There are no
cookies, so no other site can make a browser send it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from lbr.api import metrics
from lbr.core.errors import DatabaseError, LbrError, RunNotFoundError
from lbr.core.text import parse_json
from lbr.store import reads
from lbr.store.database import file_of, open_database, to_its_end
from lbr.web import data
from lbr.web.actions import ACTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiohttp.typedefs import Handler

    from lbr.core.types import Json, PathOrUrl
    from lbr.store.database import Database

# Without a handler, Python would print each broken request, with the bytes that came, on the terminal.
logging.getLogger("aiohttp.server").addHandler(logging.NullHandler())

ASSETS = Path(__file__).with_name("assets")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY = 1_000_000
PATIENCE_SECONDS, ANSWER_SECONDS = 5.0, 10.0
"""How long a read tries again while the database is busy or away, and when a request ends without its answer.

The page waits for 15 seconds, and must show what it is that does not answer.
"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(slots=True)
class Dashboard:
    """What a server shows and to whom; `metrics_token` opens the metrics only, None for no other token."""

    db_url: PathOrUrl
    token: str
    allow_network_fs: bool = False
    read_only: bool = False
    hosts: frozenset[str] = LOCAL_HOSTS
    metrics_token: str | None = None
    _database: Database | None = field(default=None, init=False)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def database(self) -> Database | None:
        """Return the queue, opened once; None as long as its file is missing."""
        async with self._opening:
            if self._database is None:
                file = file_of(self.db_url)
                if file is not None and not file.exists():
                    return None
                self._database = await open_database(
                    self.db_url, allow_network_fs=self.allow_network_fs, patience=PATIENCE_SECONDS
                )
            return self._database

    async def close(self) -> None:
        """Close the queue."""
        if self._database is not None:
            await to_its_end(self._database.close())

    def is_known(self, host: str) -> bool:
        """Return whether a request was sent to this machine by a name of it, and not by a web page's name."""
        try:
            return (urlsplit(f"//{host}").hostname or "") in self.hosts
        except ValueError:
            return False

    def is_own(self, origin: str) -> bool:
        """Return whether a request came from a page of such a name."""
        return self.is_known(origin.partition("//")[2])

    def is_allowed(self, request: web.Request) -> bool:
        """Return whether a request for data carries the token, or one for metrics theirs."""
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        known = [self.token]
        if request.path == "/metrics" and self.metrics_token:
            known.append(self.metrics_token)
        return any(hmac.compare_digest(given, f"Bearer {one}".encode()) for one in known)


def application(dashboard: Dashboard) -> web.Application:
    """Return the server's application."""
    app = web.Application(middlewares=[_secured(dashboard), _reported], client_max_size=MAX_BODY)
    files = {path.name: (path.read_bytes(), KINDS[path.suffix]) for path in ASSETS.iterdir() if path.suffix in KINDS}

    async def asset(request: web.Request) -> web.Response:
        body, kind = files.get(request.match_info.get("name", "index.html"), (b"", ""))
        if not kind:
            raise web.HTTPNotFound
        return web.Response(body=body, headers={"Content-Type": kind})

    app.router.add_get("/", asset)
    app.router.add_get("/assets/{name}", asset)
    app.router.add_get("/metrics", _metrics(dashboard))
    for path, read in _pages(dashboard).items():
        app.router.add_get(f"/api/{path}", _answering(read))
    app.router.add_post("/api/runs/{name}/{action}", _action(dashboard))

    async def at_the_end(_: web.Application) -> AsyncIterator[None]:
        yield
        await dashboard.close()

    app.cleanup_ctx.append(at_the_end)
    return app


def _secured(dashboard: Dashboard) -> Any:
    @web.middleware
    async def secured(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = _refused(dashboard, request) or await handler(request)
        response.headers.update(HEADERS)
        return response

    return secured


def _refused(dashboard: Dashboard, request: web.Request) -> web.Response | None:
    """Return why a request is refused; None if it is not."""
    if not dashboard.is_known(request.host):
        return _problem(421, "call this machine localhost or 127.0.0.1, or name the host with --allow-host")
    origin = request.headers.get("Origin")
    if origin is not None and not dashboard.is_own(origin):
        return _problem(403, "a page of another site may not ask this")
    if request.method not in {"GET", "HEAD", "POST"}:
        return _problem(405, f"{request.method} is not allowed")
    if not (request.path.startswith("/api/") or request.path == "/metrics"):
        return None
    if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"}:
        return _problem(403, "a page of another site may not ask this")
    if not dashboard.is_allowed(request):
        return _problem(401, "give the token that `lbr dashboard` printed at the end of its address")
    if request.method == "POST" and dashboard.read_only:
        return _problem(403, "this dashboard is read-only: start it without --read-only")
    return None


@web.middleware
async def _reported(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with what went wrong, as JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _problem(error.status, error.reason)
    except LbrError as error:
        missing = isinstance(error, RunNotFoundError) or (request.method == "GET" and "/jobs/" in request.path)
        return _problem(503 if isinstance(error, DatabaseError) else 404 if missing else 400, str(error))
    except Exception as error:  # noqa: BLE001 - a database may hold anything
        return _problem(500, f"{type(error).__name__}: `lbr doctor` may find out more")


def _problem(status: int, text: str) -> web.Response:
    return _json({"error": text}, status)


def _json(value: Json, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, headers={"Content-Type": "application/json"})


def _pages(dashboard: Dashboard) -> dict[str, Callable[[web.Request], Awaitable[dict[str, Json]]]]:
    """Return what answers each path of the data."""

    async def runs(_: web.Request) -> dict[str, Json]:
        database = await dashboard.database()
        return data.EMPTY if database is None else await data.runs(database, time.time())

    async def run(request: web.Request) -> dict[str, Json]:
        found = await data.run(await _queue(dashboard), request.match_info["name"], time.time())
        return found | {"read_only": dashboard.read_only}

    async def series(request: web.Request) -> dict[str, Json]:
        minutes = request.query.get("minutes", "60")
        if not (minutes.isdecimal() and len(minutes) < 6):
            raise web.HTTPBadRequest(reason="expected minutes to be a number")
        return await data.series(await _queue(dashboard), request.match_info["name"], int(minutes))

    async def jobs(request: web.Request) -> dict[str, Json]:
        return await data.jobs(await _queue(dashboard), request.match_info["name"], request.query)

    async def job(request: web.Request) -> dict[str, Json]:
        return await data.job(await _queue(dashboard), int(request.match_info["id"]))

    async def workers(_: web.Request) -> dict[str, Json]:
        database = await dashboard.database()
        return {"workers": [], "limits": []} if database is None else await data.workers(database)

    async def batches(_: web.Request) -> dict[str, Json]:
        database = await dashboard.database()
        return {"batches": []} if database is None else await data.batches(database)

    async def doctor(_: web.Request) -> dict[str, Json]:
        return await data.doctor(dashboard.db_url, allow_network_fs=dashboard.allow_network_fs)

    return {
        "runs": runs,
        "runs/{name}": run,
        "runs/{name}/series": series,
        "runs/{name}/jobs": jobs,
        r"jobs/{id:\d{1,18}}": job,
        "workers": workers,
        "batches": batches,
        "doctor": doctor,
    }


async def _queue(dashboard: Dashboard) -> Database:
    database = await dashboard.database()
    if database is None:
        raise web.HTTPNotFound(reason="there is no queue yet")
    return database


def _answering(read: Callable[[web.Request], Awaitable[dict[str, Json]]]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        reading = asyncio.ensure_future(read(request))
        # A read cannot be cancelled: it ends later, unseen.
        if not (await asyncio.wait([reading], timeout=ANSWER_SECONDS))[0]:
            reading.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            return _problem(503, "the database does not answer; lbr dashboard still runs")
        response = _json(reading.result())
        tag = hashlib.blake2b(bytes(response.body or b""), digest_size=16).hexdigest()  # type: ignore[arg-type]
        if request.headers.get("If-None-Match") == f'"{tag}"':
            response = web.Response(status=304)
        response.headers["ETag"] = f'"{tag}"'
        return response

    return answer


def _action(dashboard: Dashboard) -> Handler:
    async def act(request: web.Request) -> web.StreamResponse:
        action = ACTIONS.get(request.match_info["action"])
        if action is None:
            raise web.HTTPNotFound
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(reason="send JSON")
        try:
            given = parse_json(await request.text())
        except ValueError as error:
            raise web.HTTPBadRequest(reason="expected a JSON object") from error
        if not isinstance(given, dict):
            raise web.HTTPBadRequest(reason="expected a JSON object")
        queue = {"db_url": dashboard.db_url, "allow_network_fs": dashboard.allow_network_fs}
        return _json(await action(request.match_info["name"], given, queue))

    return act


def _metrics(dashboard: Dashboard) -> Handler:
    async def respond(_: web.Request) -> web.StreamResponse:
        database = await _queue(dashboard)
        found = metrics.render(await database.read(reads.overview))
        return web.Response(body=found.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return respond
