"""What is PostgreSQL's own: its schema, plans, clock, locks, calls that wake, and what its errors say."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from lbr import prompt_map
from lbr.api.enqueue import enqueue as put_prompts
from lbr.core.errors import AlreadyRunningError, DatabaseError, Family, Usage, UsageError
from lbr.core.types import Failure, Outcome, Reply, Shape, Task
from lbr.store import claim, enqueue, limits, migrations, pages, reads, runs, settle, transfer
from lbr.store.addresses import address_of
from lbr.store.claim import CLAIM, CLAIM_CHOSEN, CLAIM_SUSPECT, DUE, DUE_SIZED, DUE_SUSPECT
from lbr.store.database import open_database, sole_worker
from lbr.store.leases import CLAIMED_BY, EXPIRED, RECLAIM, RENEW
from lbr.store.postgres import SOLE_LOCK, Listener, PostgresDatabase
from lbr.store.sql import SHARDS, BulkStatement, PreparedQuery
from tests.support import ECHO, Cli, Queue, answered, assert_counted, eventually, failed, postgres, put, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Connection

    from lbr.core.types import Millis
    from lbr.store.database import Database

FAR = 10**15
HELD = 500
REVERSED = Task(model="offline:reverse")


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    """Return the URL of an empty database."""
    return new_database()


@pytest.fixture
async def live(url: str) -> AsyncIterator[Database]:
    """Return an empty queue that goes by the server's clock."""
    opened = await open_database(url, create=True)
    yield opened
    await opened.close()


class Undo(Exception):  # noqa: N818
    """Rolls a transaction back."""


async def plan(database: Database, statement: Any, bound: dict[str, Any]) -> str:
    """Run a statement, undo it, and return the server's plan of what was sent."""
    sent: list[tuple[str, Any]] = []
    steps: list[str] = []
    if isinstance(statement, BulkStatement):
        statement = statement.whole
    elif isinstance(statement, PreparedQuery):
        statement = statement.statement

    def work(connection: Connection, _now: Millis) -> None:
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _c, _cursor, sql, parameters, _context, _many: sent.append((sql, parameters)),
        )
        names = statement.compile(dialect=connection.dialect).params
        fields = {name: name.removeprefix("all_") for name in names}
        connection.execute(statement, {name: bound[field] for name, field in fields.items() if field in bound})
        explained = connection.exec_driver_sql(f"EXPLAIN {sent[0][0]}", sent[0][1])
        steps.extend(explained.scalars())
        raise Undo

    with pytest.raises(Undo):
        await database.write(work)
    return "\n".join(steps)


def _run(connection: Connection, _now: Millis, sql: str) -> None:
    connection.execute(text(sql))


async def fill(database: Database, *, statistics: str) -> int:
    """Make a run of a million pending and some held jobs, with statistics that are fresh, old or missing."""

    async def rows(state: str, first: int, last: int, held: str = "NULL, NULL") -> None:
        sql = (
            "WITH made AS (INSERT INTO lbr.jobs (run_id, state, available_at, claim_seq, attempts, crashes, "
            f"retry_seq, worker_id, lease_until) SELECT 1, '{state}', n, 0, 0, 0, 0, {held} "
            f"FROM generate_series({first}, {last}) AS n RETURNING id) "
            "INSERT INTO lbr.prompts (job_id, run_id, key, chat, body) "
            "SELECT id, 1, decode(md5(id::text), 'hex'), 0, '' FROM made"
        )
        await database.write(lambda connection, _: connection.execute(text(sql)))

    await put(database, ["first"])
    for table in ("jobs", "prompts"):
        for statement in (
            f"DELETE FROM lbr.{table}",
            f"ALTER TABLE lbr.{table} SET (autovacuum_enabled = false)",
        ):
            await database.write(_run, statement)
    if statistics == "of finished jobs":
        await rows("done", 1, 100_000)
        await database.filled()
    for first in range(1_000_001, 2_000_001, 200_000):  # a statement may take 30 s
        await rows("pending", first, first + 199_999)
    await rows("inflight", 3_000_001, 3_000_000 + HELD, "1, n")
    if statistics == "fresh":
        await database.filled()
    query = text("SELECT min(id) FROM lbr.jobs WHERE state = 'pending'")
    return int((await database.read(lambda c, _: c.scalar(query))) or 0)


AFTER = "AND (ROW(idx, sample) > ROW('3'::bigint, '0'::smallint))"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("statistics", ["fresh", "missing", "of finished jobs"])
async def test_plans_hold_at_a_million_jobs(live: Database, statistics: str) -> None:
    """No statement of the hot path reads the table of jobs through, or sorts it, whatever the planner was told."""
    first = await fill(live, statistics=statistics)
    ids = list(range(first, first + 128))
    bound: dict[str, Any] = {"run": 1, "now": FAR, "most": 128, "worker": 1, "until": FAR, "before": FAR, "ids": ids}
    bound["keys"] = [bytes(16), bytes(range(16))]
    bound |= {"after": 3, "after_sample": 0, "limit": 5, "cap": 1_000, "look": 50, "available": 0}
    settling = {"job": ids, "seq": [0] * 128, "to": ["done"] * 128, "charge": [1] * 128}
    settling |= {"available": [1] * 128, "finished": [1] * 128}
    for statement, index in (
        (DUE, "jobs_pending"),
        (DUE_SUSPECT, "jobs_suspects"),
        (CLAIM, "jobs_pending"),
        (DUE_SIZED, "jobs_pending"),
        (CLAIM_CHOSEN, "jobs_"),
        (CLAIM_SUSPECT, "jobs_suspects"),
        (EXPIRED, "jobs_lease"),
        (CLAIMED_BY, "jobs_lease"),
        (RECLAIM, "jobs_"),
        (RENEW, "jobs_"),
        (settle.STATUS, "jobs_pkey"),
        (settle.SETTLE, "jobs_pkey"),
        (enqueue.BY_KEY, "prompts_key"),
        (enqueue._KEYS_OF_EQUALS, "prompts_key"),
        (enqueue._DONE, "jobs_pkey"),
        (claim.PROMPTS, "prompts"),
        (reads._rows_of(Shape.ORIGINAL, ()), AFTER),
        (reads._PLACES, AFTER),
        (transfer._ITEMS, AFTER),
        (pages.LOOKS["failed"], "jobs_failed"),
        (pages.LOOKS["pending"], "jobs_pending"),
        (pages.LOOKS[""], "jobs_pkey"),
        (pages.SHORT, "jobs_pkey"),
        (pages.FAILURES, "jobs_failed"),
    ):
        steps = await plan(live, statement, bound | (settling if statement is settle.SETTLE else {}))
        assert index in steps, steps
        assert "Seq Scan on jobs" not in steps, steps
        assert "Seq Scan on prompts" not in steps, steps
        if statement in {CLAIM, CLAIM_SUSPECT}:
            assert re.search(rf"Limit.*LockRows.*Scan (using|on) {index} ", steps, re.DOTALL), steps
            # Of few suspects a sort is as good; the pending must come in the order of their index.
            assert statement is CLAIM_SUSPECT or f"Index Scan using {index}" in steps, steps
            assert "using jobs_pkey on jobs" in steps, steps


async def test_everything_is_in_a_schema_of_its_own(url: str) -> None:
    """Tables of another program in the same database, even of the same names, stay as they are."""
    postgres.execute(url, "CREATE TABLE jobs (theirs int)")
    database = await open_database(url, create=True)
    await put(database, ["a"])
    await database.close()
    with postgres.connect(url) as connection:
        found = connection.execute(
            "SELECT table_schema, count(*) FROM information_schema.tables "
            "WHERE table_schema NOT LIKE 'pg_%' AND table_schema <> 'information_schema' GROUP BY 1 ORDER BY 1"
        ).fetchall()
        assert found == [("lbr", 15), ("public", 1)]
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (0,)


async def test_hot_tables_keep_room_for_their_updates(live: Database, url: str) -> None:
    """The fill factor lets most settlements of a job be written beside it, without touching an index."""
    with postgres.connect(url) as connection:
        options: dict[str, str] = dict(
            connection.execute(
                "SELECT relname, array_to_string(reloptions, ' ') FROM pg_class WHERE reloptions IS NOT NULL "
                "AND relnamespace = 'lbr'::regnamespace"
            ).fetchall()
        )
    assert set(options) == {"jobs", "counters"}
    assert "fillfactor=70" in options["jobs"]
    assert "autovacuum_vacuum_scale_factor=0.02" in options["jobs"]


async def test_missing_queue_is_told(url: str) -> None:
    """A database without a queue is an error for all but an enqueue, and stays as it is."""
    with pytest.raises(UsageError, match="there is no lbr queue in postgresql://"):
        await open_database(url)
    with postgres.connect(url) as connection:
        assert connection.execute("SELECT to_regnamespace('lbr')").fetchone() == (None,)


async def test_newer_schema_is_refused(live: Database, url: str) -> None:
    """A queue of a newer lbr is left as it is."""
    postgres.execute(url, "INSERT INTO lbr.schema_version VALUES (99, 'future', 0)")
    with pytest.raises(DatabaseError, match=rf"schema version {migrations.LATEST} or older, got: 99.*a newer lbr"):
        await open_database(url, create=True)


async def test_many_may_create_at_once(url: str) -> None:
    """Processes that all want to create the queue end up with one, whole."""
    opened = await asyncio.gather(*(open_database(url, create=True) for _ in range(8)))
    run = await put(opened[0], ["a"])
    assert await states(opened[7], run) == {"pending": 1}
    await asyncio.gather(*(database.close() for database in opened))


async def test_writes_are_refused_on_a_reading_connection(live: Database) -> None:
    """Nothing that reads can change the queue by mistake."""
    with pytest.raises(DatabaseError, match="read-only"):
        await live.read(lambda c, _: c.execute(text("DELETE FROM lbr.jobs")))


async def test_leases_go_by_the_servers_clock(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose clock is a day ahead reclaims nothing that is held, and its own leases end in time."""
    run = await put(live, ["a", "b"])
    queue = Queue(live)
    worker = await queue.register(host="here", pid=1, concurrency=1)
    await queue.claim(worker, [run.id], 1, lease=60)
    before = await live.read(reads.time)
    monkeypatch.setattr(time, "time_ns", lambda: 10**18 * 3)
    monkeypatch.setattr(time, "time", lambda: 3e9)
    assert await queue.reclaim() == []
    await queue.claim(worker, [run.id], 1, lease=60)
    found = await live.read(lambda c, _: c.execute(text("SELECT lease_until FROM lbr.jobs ORDER BY id")))
    assert all(before - 10_000 < until - 60_000 < before + 10_000 for until in found.scalars())


async def test_counters_are_in_shards(url: str) -> None:
    """Processes add to shards of their own, and their sum is the count."""
    databases = [await open_database(url, create=True) for _ in range(6)]
    run = await put(databases[0], [f"p{n}" for n in range(60)])
    for database in databases:
        queue = Queue(database)
        worker = await queue.register(host="h", pid=1, concurrency=10)
        claimed = await queue.claim(worker, [run.id], 10, lease=60)
        await database.write(settle.settle, [answered(claim) for claim in claimed])
    await assert_counted(databases[0], run)
    shards = await databases[0].read(lambda c, _: c.execute(text("SELECT DISTINCT shard FROM lbr.counters")))
    found = set(shards.scalars())
    assert len(found) > 1
    assert found <= set(range(SHARDS))
    for database in databases:
        await database.close()


async def test_enqueue_wakes_idle_workers(live: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for an enqueue, however many its rows, reaches those who listen, and polling is not what did it."""
    monkeypatch.setattr("lbr.store.postgres.POLL_SECONDS", 3_600.0)
    idle = await open_database(url)
    assert isinstance(idle, PostgresDatabase)
    await idle.changed()
    await eventually(lambda: idle._listener._connection)
    await idle.changed()
    assert not await idle.changed()
    calls: list[str] = []
    with postgres.connect(url, autocommit=True) as connection:
        connection.execute("LISTEN lbr")
        await put_prompts([f"p{n}" for n in range(5_000)], run="r", model="offline:echo", db_url=url)
        postgres.execute(url, "NOTIFY lbr, 'the end'")
        for call in connection.notifies(timeout=30):
            calls.append(call.payload)
            if call.payload:
                break
    assert calls == ["", "the end"]
    deadline = time.monotonic() + 30
    while not (woken := await idle.changed()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await idle.close()
    assert woken


async def test_polling_stands_behind(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can be heard, as behind a transaction pooler, a worker looks all the same, now and then."""
    monkeypatch.setattr("lbr.store.postgres.POLL_SECONDS", 0.05)
    deaf = Listener(address_of("postgresql:///d?pgbouncer=true"))
    assert deaf.heard()
    assert not deaf.heard()
    await eventually(deaf.heard)


async def test_lost_listener_comes_back(live: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listening connection that the server ended is made anew, and what may have been missed is looked for."""
    monkeypatch.setattr("lbr.store.postgres.RECONNECT_SECONDS", 0.05)
    monkeypatch.setattr("lbr.store.postgres.POLL_SECONDS", 3_600.0)
    assert isinstance(live, PostgresDatabase)
    await live.changed()
    await eventually(lambda: live._listener._connection)
    await live.changed()
    first = live._listener._connection
    postgres.execute(url, f"SELECT pg_terminate_backend({first.get_server_pid()})")
    await eventually(first.is_closed)
    deadline = time.monotonic() + 30
    while not await live.changed():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert live._listener._connection is not first


async def test_sole_worker_of_all_machines(live: Database, url: str) -> None:
    """An exclusive worker keeps others out wherever they are, and its end lets them in."""
    async with sole_worker(url):
        with pytest.raises(AlreadyRunningError, match="is running already"):
            async with sole_worker(url):
                pass
    async with sole_worker(url):
        pass
    with pytest.raises(UsageError, match="pgbouncer=true"):
        async with sole_worker(f"{url}{'&' if '?' in url else '?'}pgbouncer=true"):
            pass


async def test_lost_lock_of_the_sole_worker(live: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that was lost with its connection is taken again; where another was quicker, its holder ends."""
    monkeypatch.setattr("lbr.store.postgres.SOLE_RETRY_SECONDS", 0.02)
    # Of this database alone: other tests use the same server at the same time.
    locks = (
        "FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
        "WHERE datname = current_database() AND locktype = 'advisory'"
    )
    holders = text(f"SELECT pid {locks} AND classid = :kind AND granted")

    async def holder() -> int:
        bound = {"kind": SOLE_LOCK}
        return int(await live.read(lambda connection, _: connection.scalar(holders, bound)) or 0)

    async def work(started: asyncio.Event) -> None:
        async with sole_worker(url):
            started.set()
            await asyncio.Event().wait()

    started = asyncio.Event()
    task = asyncio.create_task(work(started))
    await asyncio.wait_for(started.wait(), 30)
    first = await holder()
    postgres.execute(url, f"SELECT pg_terminate_backend({first})")
    deadline = time.monotonic() + 30
    while await holder() in {0, first}:
        assert time.monotonic() < deadline
    assert not task.done()
    waiting = text(f"SELECT count(*) {locks} AND NOT granted")
    with postgres.connect(url) as thief:
        wait = asyncio.create_task(asyncio.to_thread(thief.execute, "SELECT pg_advisory_lock(%s, 0)", (SOLE_LOCK,)))
        while not (await live.read(lambda connection, _: connection.scalar(waiting))):
            assert time.monotonic() < deadline
        postgres.execute(url, f"SELECT pg_terminate_backend({await holder()})")
        await wait
        with pytest.raises(AlreadyRunningError, match="is running already"):
            await asyncio.wait_for(task, 30)


async def test_a_pooled_url_works(url: str) -> None:
    """Behind a transaction pooler no setting is sent and no prepared statement or listener is kept."""
    pooled = f"{url}{'&' if '?' in url else '?'}pgbouncer=true"
    rows = await prompt_map(["a", "b", "a"], model_name="offline:echo", db_url=pooled)
    assert [row["result"] for row in rows] == ["a", "b"]


async def test_teardown_drops_the_queue_of_its_sole_user(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """After a complete run teardown leaves nothing, but not while others use the queue or keep a run in it."""

    async def shout(prompt: str) -> str:
        return prompt.upper()

    async def torn_down() -> bool:
        await prompt_map(["a"], shout, db_url=url, teardown=True)
        with postgres.connect(url) as connection:
            return connection.execute("SELECT to_regnamespace('lbr')").fetchone() == (None,)

    assert await torn_down()
    other = await open_database(url, create=True)
    await put(other, ["b"])
    assert not await torn_down()
    await other.close()
    assert not await torn_down()
    assert "stays: it holds other runs, or another process uses it" in caplog.text


@pytest.mark.slow
def test_passwords_of_any_kind_work_and_are_never_shown(own_server: postgres.Server, tmp_path: Path) -> None:
    """A password with every awkward character lets a user in, and is in no output, not even of `ps`.

    Only an @ must be percent-encoded.
    """
    password = "p@ss:w/o?r#d %1&x=y'"
    own_server.create_role("me", password)
    postgres.execute(own_server.url(), "GRANT CREATE ON DATABASE postgres TO me")
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(120)))
    where = f"127.0.0.1:{own_server.port}/postgres?sslmode=prefer"
    for spelled in (password.replace("%", "%25").replace("@", "%40"), quote(password, safe="")):
        cli = Cli(tmp_path, db_url=f"postgres://me:{spelled}@{where}")
        cli.outside_url = own_server.url()
        output = cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.1")
        worker = cli.start("worker", "--processes", "2", "--concurrency", "4")
        cli.wait_for("in", "done", 5)
        children = psutil.Process(worker.pid).children()
        assert len(children) == 2
        assert all("pass" not in word and password not in word for c in children for word in c.cmdline())
        told = worker.communicate(timeout=60)
        done = cli("status", "--json")
        assert '"done":120' in done.stdout
        assert password not in output.stdout + output.stderr + "".join(told) + done.stdout
        cli.stop_all()
        postgres.execute(own_server.url(), "DROP SCHEMA lbr CASCADE")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Return the port of a server where the role `me` has another password, and `poor` may do nothing."""
    with postgres.Server() as server:
        server.create_role("me", "another")
        server.create_role("poor", "hunter2")
        yield server.port


@pytest.mark.processes
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:hunter2@127.0.0.1:{port}/postgres", "the server refused the password"),
        ("postgresql://postgres:hunter2@127.0.0.1:{port}/nowhere", 'database "nowhere" does not exist'),
        ("postgresql://postgres:hunter2@127.0.0.1:1/postgres", "cannot reach the database"),
        ("postgresql://postgres:hunter2@127.0.0.1:{port}/postgres?sslmode=require", "SSL"),
        ("postgresql://postgres:hunter2@127.0.0.1:{port}/postgres?sslmode=sideways", "sslmode"),
        ("postgresql://poor:hunter2@127.0.0.1:{port}/postgres", "GRANT CREATE ON DATABASE"),
    ],
)
def test_errors_say_what_to_do(port: int, tmp_path: Path, url: str, words: str) -> None:
    """Whatever is wrong with a server is said in words, soon, with an exit code and without the password."""
    (tmp_path / "in.txt").write_text("a\n")
    cli = Cli(tmp_path, db_url=url.format(port=port))
    cli.constants["lbr.store.postgres.OPEN_PATIENCE_SECONDS"] = 1.0
    started = time.monotonic()
    done = cli("enqueue", "in.txt", "--model", "offline:echo", check=False)
    assert done.returncode in {1, 2}
    assert words in done.stderr
    assert "hunter2" not in done.stderr
    assert time.monotonic() - started < 30


async def test_cancel_takes_in_what_comes_back_late(live: Database, url: str) -> None:
    """A job that is given back while its run is cancelled ends cancelled, never pending where nobody takes it."""
    other = await open_database(url)
    queue = Queue(live)
    worker = await queue.register(host="h", pid=1, concurrency=1)
    for n in range(25):
        run = await put(live, [f"p{m}" for m in range(12)], name=f"r{n}", reuse=False)
        claims_ = await queue.claim(worker, [run.id], 12, lease=60)
        await asyncio.gather(
            queue.release(worker, claims_[:6]), runs.cancel(other, run), queue.release(worker, claims_[6:])
        )
        assert await states(live, run) == {"cancelled": 12}
        await assert_counted(live, run)
    await other.close()


async def test_deadlocks_and_conflicts_are_run_again(live: Database) -> None:
    """A transaction that the server chose as a deadlock's victim is run again, whole."""
    tries = 0

    def work(connection: Connection, _now: Millis) -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            connection.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))
        return tries

    assert await live.write(work) == 3
    with pytest.raises(DatabaseError) as caught:
        await live.write(lambda c, _: c.execute(text("SELECT 1 / 0")))
    assert isinstance(caught.value.__cause__, DBAPIError)


@pytest.mark.parametrize(
    "change",
    [
        "runs SET state = 'paused', pause_cause = 'budget' WHERE name = 'a'",
        f"limits SET cooldown_until = extract(epoch FROM now()) * 1000 + 60000 WHERE answerer = '{ECHO.answerer}'",
    ],
    ids=["paused", "cooled"],
)
async def test_what_a_claim_waited_for_it_obeys(live: Database, url: str, change: str) -> None:
    """A claim that waits for somebody who pauses its run, or cools its answerer down, takes nothing of it then."""
    queue = Queue(live)
    worker = await queue.register(host="h", pid=1, concurrency=40)
    run, free = await put(live, ["a", "b"], name="a"), await put(live, ["c"], name="b", task=REVERSED)
    await live.write(limits.set_budget, run.id, 10**9)
    await live.write(limits.set_limits, run.task.answerer, {"rpm": 6000})
    with postgres.connect(url, autocommit=False) as other:
        assert other.execute(f"UPDATE lbr.{change}").rowcount == 1
        claiming = asyncio.create_task(queue.claim(worker, [run.id, free.id], 40, lease=60))
        await eventually(lambda: postgres.waiting(url))
        other.commit()
    assert [one.run_id for one in await claiming] == [free.id]


async def test_cooling_and_learning_lock_in_one_order(live: Database, url: str) -> None:
    """A settlement that cools one answerer down and teaches about another waits for neither while it holds the other."""
    queue = Queue(live)
    worker = await queue.register(host="h", pid=1, concurrency=40)
    runs_ = [await put(live, ["a"], name=task.model or "", task=task) for task in (ECHO, REVERSED)]
    for run in runs_:
        await live.write(limits.set_limits, run.task.answerer, {"tpm": 60_000})
    first, second = await queue.claim(worker, [run.id for run in runs_], 2, lease=60)
    limited = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=1.0)
    told = replace(answered(first), outcome=Outcome(Reply("answer", Usage(1, 1, 1)), None, 5))
    with postgres.connect(url, autocommit=False) as other:
        lock = "SELECT 1 FROM lbr.limits WHERE answerer = %s FOR UPDATE"
        other.execute(lock, [ECHO.answerer])
        settling = asyncio.create_task(live.write(settle.settle, [told, failed(second, limited)]))
        await eventually(lambda: postgres.waiting(url))
        other.execute(f"{lock} NOWAIT", [REVERSED.answerer])
        other.commit()
    assert len((await settling).taken) == 2
