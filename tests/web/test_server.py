"""The dashboard's server over real HTTP: what it refuses, and what it shows."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web

from lbr.core.errors import Family
from lbr.core.retry import RetryPolicy
from lbr.core.types import Failure, RunState
from lbr.store import reads, schema
from lbr.store.database import open_database
from lbr.store.settle import settle
from lbr.web.server import HEADERS, Dashboard, application
from tests.support import Queue, answered, failed, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lbr.store.database import Database
    from tests.support.proxy import Proxy

TOKEN = "t" * 43
BAD = Failure(Family.BAD_ANSWER, "BadAnswer", "expected 17 <script>", text="<img src=x onerror=alert(1)>")
DOWN = Failure(Family.PERMANENT, "BadRequest", "no such model")


@asynccontextmanager
async def served(db_url: str, **more: Any) -> AsyncIterator[Ask]:
    """Serve a queue, and yield what asks it as a page does."""
    runner = web.AppRunner(application(Dashboard(db_url, TOKEN, **more)), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession() as session:
            yield Ask(session, runner.addresses[0][1])
    finally:
        await runner.cleanup()


class Ask:
    """Asks a server with the token, and checks what every answer has."""

    def __init__(self, session: ClientSession, port: int) -> None:
        self.session, self.base = session, f"http://127.0.0.1:{port}"

    async def __call__(self, path: str, method: str = "GET", **more: Any) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        headers = {"Authorization": f"Bearer {TOKEN}"} | more.pop("headers", {})
        headers = {name: value for name, value in headers.items() if value is not None}
        async with self.session.request(method, f"{self.base}{path}", headers=headers, **more) as answer:
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert "Set-Cookie" not in answer.headers
            body = await answer.read()
            is_json = answer.content_type == "application/json"
            return answer.status, json.loads(body) if body and is_json else body.decode()

    async def get(self, path: str) -> Any:
        """Return the JSON of an answer that must be good."""
        status, found = await self(path)
        assert status == 200, found
        return found


@pytest.fixture
async def filled(database: Database) -> Database:
    """Return a queue with a run of 60 jobs: 50 done, 6 failed in two ways, 4 pending."""
    run = await put(database, [f"prompt {n}" for n in range(60)], name="r")
    queue = Queue(database)
    worker = await queue.register(host="h", pid=7, concurrency=64)
    claims = await queue.claim(worker, [run.id], 56, lease=60)
    ends = [answered(one, f"answer {n}") for n, one in enumerate(claims[:50])]
    ends += [
        failed(one, BAD if n < 4 else DOWN, RetryPolicy(bad_answer_retries=0)) for n, one in enumerate(claims[50:])
    ]
    await database.write(settle, ends)
    return database


REFUSED = [
    ("another host", "GET", {"Host": "evil.example"}, 421),
    ("another host with a known port", "GET", {"Host": "evil.example:8765"}, 421),
    ("a name that begins as a known one", "GET", {"Host": "localhost.evil.example"}, 421),
    ("another origin", "GET", {"Origin": "http://evil.example"}, 403),
    ("an origin without a name", "GET", {"Origin": "null"}, 403),
    ("a page of another site", "GET", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("a page of a neighbour", "GET", {"Sec-Fetch-Site": "same-site"}, 403),
    ("no token", "GET", {"Authorization": None}, 401),
    ("another token", "GET", {"Authorization": f"Bearer {TOKEN[:-1]}x"}, 401),
    ("part of the token", "GET", {"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
    ("a put", "PUT", {}, 405),
    ("a delete", "DELETE", {}, 405),
    ("a preflight", "OPTIONS", {"Origin": "http://evil.example"}, 403),
]


@pytest.mark.parametrize(("what", "method", "headers", "status"), REFUSED, ids=[one[0] for one in REFUSED])
async def test_others_are_refused(what: str, method: str, headers: dict[str, str], status: int, tmp_path: Any) -> None:
    """Each request that a page of another site, or a program without the token, could make."""
    async with served(str(tmp_path / "queue.db")) as ask:
        for path in ("/api/runs", "/metrics"):
            found, body = await ask(path, method, headers=headers)
            assert found == status, (what, body)
            assert set(body) == {"error"}
        good = {"Host": "localhost:1", "Origin": "http://[::1]:1", "Sec-Fetch-Site": "same-origin"}
        assert (await ask("/api/runs", headers=good))[0] == 200


async def test_pages_are_public_and_hold_no_data(tmp_path: Any) -> None:
    """Without the token there are the page and its scripts, and nothing outside their folder."""
    async with served(str(tmp_path / "queue.db"), hosts=frozenset({"box.example"})) as ask:
        there = {"Host": "box.example", "Authorization": None}
        status, page = await ask("/", headers=there)
        assert status == 200
        scripts = re.findall(r'(?:src|href)="(assets/[^"]+)"', page)
        assert len(scripts) >= 4
        for path in scripts:
            assert (await ask(f"/{path}", headers=there))[0] == 200
        for path in ("/assets/..%2fserver.py", "/assets/VENDORED.md", "/assets/", "/nothing"):
            assert (await ask(path, headers=there))[0] == 404
        assert (await ask("/", "POST", headers=there))[0] == 405
        assert (await ask("/"))[0] == 421


async def test_bodies_are_bounded_json(filled: Database, db_url: str) -> None:
    """A form, a body that is no object, one of more than a megabyte, and unknown fields change nothing."""
    async with served(db_url) as ask:
        pause = "/api/runs/r/pause"
        assert (await ask(pause, "POST", data={"a": "b"}))[0] == 415
        assert (await ask(pause, "POST", json=[]))[0] == 400
        assert (await ask(pause, "POST", json={"because": 1}))[0] == 400
        assert (await ask(pause, "POST", json={"a": "x" * 1_000_001}))[0] == 413
        assert (await ask("/api/runs/r/remove", "POST", json={}))[0] == 404
        assert (await ask("/api/runs/nobody/pause", "POST", json={}))[0] == 404
        assert (await ask("/api/runs/r/resume", "POST", json={"max_cost": "5"}))[0] == 400
        assert (await ask("/api/runs/r/retry", "POST", json={"family": "nonsense"}))[0] == 400
    (run,) = await filled.read(reads.all_runs)
    assert run.state is RunState.ACTIVE


async def test_a_read_only_server_changes_nothing(filled: Database, db_url: str) -> None:
    """It refuses every action, and says so on the page of a run; the metrics have a token of their own."""
    async with served(db_url, read_only=True, metrics_token="m" * 40) as ask:
        for action in ("pause", "resume", "cancel", "retry"):
            status, body = await ask(f"/api/runs/r/{action}", "POST", json={})
            assert (status, "read-only" in body["error"]) == (403, True)
        assert (await ask.get("/api/runs/r"))["read_only"] is True
        other = {"Authorization": f"Bearer {'m' * 40}"}
        assert (await ask("/metrics", headers=other))[0] == 200
        assert (await ask("/api/runs", headers=other))[0] == 401


async def test_actions_are_those_of_the_commands(filled: Database, db_url: str) -> None:
    """Pause, resume with a budget, retry what matches a filter, cancel: as their commands do them."""
    async with served(db_url) as ask:
        assert await ask("/api/runs/r/pause", "POST", json={}) == (200, {})
        (shown,) = (await ask.get("/api/runs"))["runs"]
        assert (shown["state"], "lbr resume r" in shown["reason"]) == ("paused", True)
        attention = (await ask.get("/api/runs"))["attention"]
        assert attention[0]["command"] == "lbr resume r"
        assert await ask("/api/runs/r/resume", "POST", json={}) == (200, {})
        only = {"state": "failed", "family": "bad_answer", "error": "EXPECTED 17"}
        assert await ask("/api/runs/r/retry", "POST", json=only) == (200, {"count": 4})
        assert (await ask.get("/api/runs/r"))["counts"]["failed"] == 2
        assert await ask("/api/runs/r/cancel", "POST", json={}) == (200, {"count": 8})


async def test_a_run_has_its_numbers_errors_and_series(filled: Database, db_url: str) -> None:
    """Errors are grouped with one example each; the columns of the series are as long as the time asked for."""
    async with served(db_url) as ask:
        one = await ask.get("/api/runs/r")
        assert one["counts"] == {"pending": 4, "inflight": 0, "done": 50, "failed": 6, "cancelled": 0, "at_provider": 0}
        groups = [(group["family"], group["count"], group["message"]) for group in one["errors"]]
        assert groups == [("bad_answer", 4, "expected 17 <script>"), ("permanent", 2, "no such model")]
        series = await ask.get("/api/runs/r/series?minutes=30")
        assert {len(column) for column in series.values() if isinstance(column, list)} == {30}
        assert (await ask("/api/runs/nobody"))[0] == 404
        assert (await ask("/api/runs/r/series?minutes=x"))[0] == 400


async def test_jobs_are_found_and_come_by_pages(filled: Database, db_url: str) -> None:
    """Each state, condition and text; 50 at a time, each job once."""
    async with served(db_url) as ask:

        async def all_of(query: str) -> list[Any]:
            found: list[Any] = []
            after: str | None = ""
            while after is not None:
                page = await ask.get(f"/api/runs/r/jobs?{query}&after={after}")
                found += page["jobs"]
                assert len(page["jobs"]) <= 50
                after = page["next"]
            return found

        assert [one["idx"] for one in await all_of("")] == list(range(60))
        assert len(await all_of("state=done")) == 50
        assert [one["idx"] for one in await all_of("state=pending")] == [56, 57, 58, 59]
        assert await all_of("state=inflight") == []
        bad = await all_of("state=failed&family=bad_answer")
        assert [one["error"] for one in bad] == ["BadAnswer: expected 17 <script>"] * 4
        assert len(await all_of("error=NO+SUCH")) == 2
        assert [one["answer"] for one in await all_of("text=ANSWER+49")] == ["answer 49"]
        assert [one["prompt"] for one in await all_of("text=prompt+59")] == ["prompt 59"]
        assert await all_of("text=100%25") == []
        for query in ("state=lost", "family=nonsense", "after=x"):
            assert (await ask(f"/api/runs/r/jobs?{query}"))[0] == 400


async def test_a_job_has_all_its_attempts(filled: Database, db_url: str) -> None:
    """Its turns, its attempts with their raw answers as they came, and its neighbours."""
    async with served(db_url) as ask:
        (first, *_) = (await ask.get("/api/runs/r/jobs?state=failed"))["jobs"]
        one = await ask.get(f"/api/jobs/{first['id']}")
        assert (one["run"], one["idx"], one["state"]) == ("r", 50, "failed")
        assert one["turns"] == [{"role": "user", "content": "prompt 50"}]
        assert [(try_["family"], try_["text"]) for try_ in one["attempts"]] == [("bad_answer", BAD.text)]
        assert (await ask.get(f"/api/jobs/{one['previous']}"))["idx"] == 49
        assert (await ask.get(f"/api/jobs/{one['next']}"))["idx"] == 51
        assert (await ask("/api/jobs/999999"))[0] == 404
        assert (await ask("/api/jobs/9999999999999999999999"))[0] == 404


async def test_what_has_not_changed_is_not_sent_again(filled: Database, db_url: str) -> None:
    """The same answer has the same tag, and is then an empty 304."""
    async with served(db_url) as ask:
        path = f"{ask.base}/api/runs/r/jobs"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with ask.session.get(path, headers=headers) as answer:
            tag = answer.headers["ETag"]
        async with ask.session.get(path, headers=headers | {"If-None-Match": tag}) as answer:
            assert (answer.status, await answer.read()) == (304, b"")


async def test_workers_doctor_and_an_empty_folder(filled: Database, db_url: str, tmp_path: Any) -> None:
    """Workers with what they hold; what doctor finds; a queue that is not there yet is empty, not an error."""
    now = await open_database(db_url)
    await Queue(now).register(host="h", pid=8, concurrency=64)
    await now.close()
    async with served(db_url) as ask:
        (worker,) = (await ask.get("/api/workers"))["workers"]
        assert (worker["host"], worker["pid"], worker["inflight"]) == ("h", 8, 0)
        checks = {one["check"] for one in (await ask.get("/api/doctor"))["findings"]}
        assert {"leases", "runs"} <= checks
        assert not checks & {"integrity", "counters"}
    async with served(str(tmp_path / "none.db")) as ask:
        assert await ask.get("/api/runs") == {"attention": [], "runs": []}
        assert (await ask("/api/runs/r"))[0] == 404
        assert not (tmp_path / "none.db").exists()


async def test_a_damaged_run_is_told_of(filled: Database, db_url: str) -> None:
    """A value that lbr never writes ends in an error with the headers of all answers, not in a broken connection."""
    await filled.write(lambda connection, _: connection.execute(schema.runs.update().values(keep="nonsense")))
    async with served(db_url) as ask:
        status, body = await ask("/api/runs/r")
        assert status in {500, 503}, body


RAW = [
    ("a token that is no text", b"Host: localhost\r\nAuthorization: Bearer \xff\xfe", 401),
    ("a token without its word", b"Host: localhost\r\nAuthorization: %s" % TOKEN.encode(), 401),
    ("an origin that is no address", b"Host: localhost\r\nOrigin: http://[", 403),
    ("a host that is no name", b"Host: [", 421),
]


@pytest.mark.parametrize(("what", "headers", "status"), RAW, ids=[one[0] for one in RAW])
async def test_nonsense_is_refused_like_the_rest(what: str, headers: bytes, status: int, tmp_path: Any) -> None:
    """Headers that no browser sends get an answer with all the headers of the others, not a broken one."""
    async with served(str(tmp_path / "queue.db")) as ask:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(ask.base.rpartition(":")[2]))
        writer.write(b"GET /api/runs HTTP/1.1\r\n%s\r\nConnection: close\r\n\r\n" % headers)
        found = (await reader.read()).decode()
        writer.close()
        assert found.startswith(f"HTTP/1.1 {status} "), (what, found)
        assert all(f"{name}: {value}\r\n" in found for name, value in HEADERS.items())


async def test_batches_are_shown_with_what_went_wrong(filled: Database, db_url: str) -> None:
    """The newest first; without one the list is empty."""
    async with served(db_url) as ask:
        assert await ask.get("/api/batches") == {"batches": []}
        row = {"run_id": 1, "count": 5, "reserved_nanos": 0, "cursor": 0, "created_at": 7, "next_poll_at": 8}
        found = '{"provider_id": "batch_1", "completed": 3, "message": "too many <tokens>"}'
        rows = [row | {"nonce": "a", "state": "planned"}, row | {"nonce": "b", "state": "sent", "found": found}]
        for one in rows:
            await filled.write(lambda connection, _, one: connection.execute(schema.batches.insert(), one), one)
        newest, oldest = (await ask.get("/api/batches"))["batches"]
        assert (newest["id"], newest["run"], newest["state"], newest["jobs"]) == ("b", "r", "sent", 5)
        assert (newest["provider_id"], newest["completed"], newest["message"]) == ("batch_1", 3, "too many <tokens>")
        assert (oldest["id"], oldest["provider_id"], oldest["message"]) == ("a", None, None)


async def test_a_killed_worker_is_told_of(filled: Database, db_url: str) -> None:
    """While it is silent, the page names it and what helps, and shows no rate."""
    now = await open_database(db_url)
    queue = Queue(now)
    worker = await queue.register(host="h", pid=8, concurrency=4)
    async with served(db_url) as ask:
        assert (await ask.get("/api/runs"))["attention"] == []
        silent = (
            schema.workers.update()
            .where(schema.workers.c.id == worker)
            .values(seen_at=schema.workers.c.seen_at - 60_000)
        )
        await now.write(lambda connection, _: connection.execute(silent))
        shown = await ask.get("/api/runs")
        assert [one["command"] for one in shown["attention"]] == ["lbr worker", None]
        assert "worker h 8 has not reported for 6" in shown["attention"][1]["text"]
        (run,) = shown["runs"]
        assert (run["per_minute"], run["eta_seconds"]) == (None, None)
        assert "no worker is running" in run["reason"]
        assert (await ask.get("/api/workers"))["workers"] == []
    await now.close()


async def test_a_server_that_is_away_is_told_of(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request ends with what is wrong before the page gives up on it; the next one finds the server again."""
    await (await open_database(proxy.url, create=True)).close()
    async with served(proxy.url) as ask:
        assert await ask.get("/api/runs") == {"attention": [], "runs": []}
        with monkeypatch.context() as patched:
            patched.setattr("lbr.web.server.ANSWER_SECONDS", 0.2)
            proxy.silence(True)
            status, body = await ask("/api/runs")
            assert (status, body["error"]) == (503, "the database does not answer; lbr dashboard still runs")
        proxy.silence(False)
        proxy.cut()
        assert await ask.get("/api/runs") == {"attention": [], "runs": []}
