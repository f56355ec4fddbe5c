"""Migrations: databases of earlier versions, and workers that still use them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text

import lbr
from lbr.api.enqueue import put as put_items
from lbr.core.errors import (
    DatabaseError,
    Family,
    RunChangedError,
)
from lbr.core.extras import Extra
from lbr.core.types import (
    Failure,
    Item,
    KeyMaker,
    Move,
    Part,
    PauseCause,
    Paused,
    Prompt,
    RunState,
    Shape,
    WorkerId,
)
from lbr.store import endings, enqueue, migrations, pulses, reads, runs, schema
from lbr.store.database import open_database
from lbr.store.runs import RunSpec
from lbr.store.settle import settle
from tests.support import ECHO, Clock, Queue, answered, assert_counted, failed, is_postgresql, put, states

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from lbr.core.types import Millis
    from lbr.store.database import Database

PERMANENT = Failure(Family.PERMANENT, "BadRequest", "400: no")

LIMITED = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=10.0)


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_schema_migrates_once(database: Database, db_url: str) -> None:
    """Opening an up-to-date database applies nothing; every migration is recorded by version and name."""
    other = await open_database(db_url, create=True)
    await other.close()
    rows = (await database.read(lambda c, _: c.execute(select(schema.schema_version)))).all()
    assert [(row.version, row.name) for row in rows] == [
        (1, "create the tables"),
        (2, "index the suspects"),
        (3, "keep keys beside prompts"),
        (4, "share limits, price runs, set jobs apart"),
        (5, "keep why answers of failed tries ended"),
        (6, "add the share of refused calls and the highest cost of a call"),
        (7, "note outages of models"),
        (8, "keep the order of columns, and which ids are numbers"),
        (9, "keep the cause of a pause apart from its message"),
        (10, "let runs rest that were being moved away"),
        (11, "forget the numbers of transactions on a server"),
        (12, "count cached tokens"),
        (13, "keep reasoning, log probabilities and raw answers"),
        (14, "number the samples of an input"),
        (15, "count what each worker does in a minute"),
        (16, "note which ends of runs were reported"),
        (17, "send jobs in batches"),
        (18, "index the failed jobs"),
        (19, "let a run's first call go alone"),
    ]


def _run(connection: Connection, _now: Millis, sql: str) -> None:
    connection.execute(text(sql))


async def test_older_schema_is_brought_up(db_url: str) -> None:
    """A queue whose jobs hold the keys, as they did at version 2, keeps all that is in it."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(settle, [answered(claim, "kept")])
    before = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    items = [Item(Prompt(text=prompt)) for prompt in ("b", "c")]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    where, binary = ("lbr.", "bytea") if is_postgresql(db_url) else ("", "BLOB")
    for statement in (
        f"ALTER TABLE {where}jobs ADD COLUMN key {binary}",
        f"UPDATE {where}jobs SET key = (SELECT key FROM {where}prompts WHERE job_id = jobs.id)",
        f"CREATE UNIQUE INDEX jobs_run_key ON {where}jobs (run_id, key)",
        f"CREATE INDEX jobs_done_key ON {where}jobs (key) WHERE state = 'done'",
        f"DROP INDEX {where}prompts_key",
        f"ALTER TABLE {where}prompts DROP COLUMN key",
        f"ALTER TABLE {where}prompts DROP COLUMN run_id",
        f"ALTER TABLE {where}prompts DROP COLUMN settings",
        f"ALTER TABLE {where}runs DROP COLUMN price",
        f"ALTER TABLE {where}limits DROP COLUMN rpm",
        f"ALTER TABLE {where}attempts DROP COLUMN finish_reason",
        f"ALTER TABLE {where}limits DROP COLUMN refused",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > 2",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    assert [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page] == before
    assert [row.status for row in before] == ["done", "pending"]
    counts = await database.write(enqueue.add_chunk, run, 2, items, keys, reuse=False)
    assert (counts.new, counts.duplicate) == (1, 1)
    reused = await put(database, ["a"], name="again")
    assert await states(database, reused) == {"done": 1}
    queue, worker, _ = await two_workers(database)
    (claim, *_) = await queue.claim(worker, [run.id], 5, lease=60)
    await database.write(settle, [failed(claim, replace(PERMANENT, finish_reason="length"))])
    assert (await database.read(reads.story, run, 1)).tries[0].finish_reason == "length"
    await database.close()


async def test_a_run_of_the_version_before_is_not_changed(db_url: str) -> None:
    """Metadata that were stored in alphabetical order, and an id as text, are the same line as before."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a"])
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in (
        rf"""UPDATE {where}items SET custom_id = '7', metadata = '{{"a"\:1,"b"\:{{"x"\:2,"y"\:3}}}}'""",
        f"ALTER TABLE {where}items DROP COLUMN id_is_number",
        f"ALTER TABLE {where}runs DROP COLUMN input_columns",
        f"DELETE FROM {where}schema_version WHERE version > 7",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    assert await reads.columns(database, run) == [
        (Part.ID, "id"),
        (Part.PROMPT, "prompt"),
        (Part.METADATA, "a"),
        (Part.METADATA, "b"),
    ]
    metadata = {"b": {"y": 3, "x": 2}, "a": 1}
    columns = {"b": Part.METADATA, "prompt": Part.PROMPT, "a": Part.METADATA, "id": Part.ID}
    items = [Item(Prompt(text), 7, metadata, columns=columns) for text in ("a", "b")]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    counts = await database.write(enqueue.add_chunk, run, 0, items, keys, reuse=False)
    assert (counts.known, counts.new) == (1, 1)
    first, second = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert (first.custom_id, list(first.metadata or {})) == ("7", ["a", "b"])
    assert (second.custom_id, list(second.metadata or {})) == (7, ["b", "a"])
    run = await database.read(reads.find_run, run.name)
    assert await reads.columns(database, run) == [(part, name) for name, part in columns.items()]
    changed = [replace(items[0], metadata={"b": {"y": 4, "x": 2}, "a": 1})]
    with pytest.raises(RunChangedError):
        await database.write(enqueue.add_chunk, run, 0, changed, keys[:1], reuse=False)
    await database.close()


async def test_answers_of_the_version_before_have_no_cached_tokens(db_url: str) -> None:
    """They are not known of old answers and attempts; new ones have them."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 5, lease=60)
    await database.write(settle, [answered(claim)])
    where = "lbr." if is_postgresql(db_url) else ""
    version = [name for name, _ in migrations.MIGRATIONS].index("count cached tokens")
    for statement in (
        f"ALTER TABLE {where}results DROP COLUMN cached_tokens",
        f"ALTER TABLE {where}attempts DROP COLUMN cached_tokens",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    await put(database, ["a"], name="again")
    for name in ("r", "again"):
        run = await database.read(reads.find_run, name)
        detail = await database.read(reads.story, run, 0)
        assert (detail.row.result, detail.cached_tokens) == ("answer", None)
    await database.close()


REASONS = {
    "it may cost $1, with $0.99 spent there is no room for a call": PauseCause.BUDGET,
    "its calls tell no cost: expected a price for m, got: none; give it with --price": PauseCause.UNPRICED,
    "m could not be reached in 60 min of waits: Connection refused": PauseCause.OUTAGE,
    "all 3 jobs that were called failed alike: no such model": PauseCause.SET_UP,
    "insufficient_quota: You exceeded\nyour quota": PauseCause.ACCOUNT,
    "by hand": PauseCause.USER,
    "it may cost too much": PauseCause.USER,
}

MOVES = {
    "moving to /b.db": ("paused", Paused(PauseCause.USER, "moving to /b.db"), None),
    "moving to /b.db (was cancelled)": ("cancelled", None, None),
    "moving to /b.db (was paused: it was slow)": ("paused", Paused(PauseCause.USER, "it was slow"), None),
    "moved to postgresql://h/d (was cancelled)": (
        "paused",
        Paused(PauseCause.MOVED_TO, "moved to postgresql://h/d"),
        Move("postgresql://h/d", RunState.CANCELLED),
    ),
    "moving from /a.db": ("paused", Paused(PauseCause.MOVING_FROM, "moving from /a.db"), Move("/a.db")),
}


def to_reasons(where: str) -> list[str]:
    """Return what makes a queue one of the version that kept the cause of a pause in its words."""
    columns = [f"DROP COLUMN {name}" for name in ("pause_cause", "pause_message", "move")]
    changes = [f"ALTER TABLE {where}runs {change}" for change in (*columns, "ADD COLUMN pause_reason text")]
    return [*changes, f"DELETE FROM {where}schema_version WHERE version > 8"]


async def test_the_causes_of_old_pauses_are_read_once(db_url: str) -> None:
    """A queue that kept the cause of a pause in its words has it in a column, and runs that were moving away rest."""
    database = await open_database(db_url, create=True)
    words = [*REASONS, *MOVES, "being removed", None]
    for number, _ in enumerate(words):
        await put(database, ["a"], name=f"r{number}")
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in to_reasons(where):
        await database.write(_run, statement)
    update = text(f"UPDATE {where}runs SET state = :state, pause_reason = :reason WHERE name = :name")
    for number, reason in enumerate(words):
        state = {"being removed": "cancelled", None: "active"}.get(reason, "paused")
        bound = {"state": state, "reason": reason, "name": f"r{number}"}
        await database.write(lambda c, _, bound: c.execute(update, bound), bound)
    await database.close()
    database = await open_database(db_url)
    found = await database.read(reads.all_runs)
    await database.close()
    paused = [(run.pause, run.move) for run in found]
    moved = [(run.state, run.pause, run.move) for run in found[len(REASONS) : -2]]
    assert moved == list(MOVES.values())
    assert paused[: len(REASONS)] == [(Paused(cause, reason), None) for reason, cause in REASONS.items()]
    assert paused[-2:] == [(Paused(PauseCause.REMOVING, "being removed"), None), (None, None)]


async def test_no_migration_under_workers_of_an_older_version(db_url: str, clock: Clock) -> None:
    """While they report, the queue stays as it is; a dead one counts for a minute at most, on a file not at all."""
    database = await open_database(db_url, create=True, clock=clock)
    await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=17, concurrency=1)
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in to_reasons(where):
        await database.write(_run, statement)
    clock.forward(20)
    with pytest.raises(DatabaseError, match=r"workers of an older version .*\(h:17\).*stop them first.* in 40 s"):
        await open_database(db_url, clock=clock)
    await database.read(lambda c, _: c.execute(text(f"SELECT pause_reason FROM {where}runs")))
    if is_postgresql(db_url):
        clock.forward(41)
    else:
        queue.leave(worker)
    newer = await open_database(db_url, clock=clock)
    assert [run.pause for run in await newer.read(reads.all_runs)] == [None]
    await newer.close()
    await database.close()


async def test_shares_and_highest_costs_are_added(db_url: str) -> None:
    """A queue of the version before that has a budget and limits goes on with them."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in (
        f"INSERT INTO {where}limits (answerer, cooldown_until, reason, slots) VALUES ('offline:echo', 0, '', 7.5)",
        f"UPDATE {where}runs SET budget_nanos = 1000",
        f"ALTER TABLE {where}limits DROP COLUMN refused",
        f"ALTER TABLE {where}limits DROP COLUMN answered",
        f"ALTER TABLE {where}runs DROP COLUMN highest_nanos",
        f"DROP TABLE {where}outages",
        f"DELETE FROM {where}schema_version WHERE version > 5",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(settle, [failed(claim, LIMITED)])
    (seen,) = (await database.read(reads.overview)).limits
    assert seen.limit.slots == 7.5
    assert seen.limit.refused == pytest.approx(0.1)
    await database.close()


async def test_a_run_of_before_keeps_only_its_answers(db_url: str) -> None:
    """A queue without the table of extras gets it; its answers have none, so that a run that keeps some asks again."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    await database.write(settle, [answered(one) for one in await queue.claim(worker, [run.id], 1, lease=60)])
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in (
        f"DROP TABLE {where}extras",
        f"ALTER TABLE {where}runs DROP COLUMN keep",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > 11",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    run = await database.read(reads.find_run, run.name)
    (row,) = [row async for page in reads.rows(database, run, Shape.ORIGINAL, include=tuple(Extra)) for row in page]
    assert (run.keep, row.result, row.kept) == ((), "answer", dict.fromkeys(Extra))
    again = await put(database, ["a"], name="keeps", keep=(Extra.RAW,))
    assert (again.keep, await states(database, again)) == ((Extra.RAW,), {"pending": 1})
    await database.close()


async def test_items_of_the_version_before_are_first_samples(db_url: str) -> None:
    """Their key gets the number of the sample, 0; the run goes on, and can get more samples."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b", "a"])
    queue, worker, _ = await two_workers(database)
    (claim, _) = await queue.claim(worker, [run.id], 5, lease=60)
    await database.write(settle, [answered(claim, "kept")])
    before = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    server = is_postgresql(db_url)
    where = "lbr." if server else ""
    columns = "run_id, idx, job_id, first, custom_id, metadata, id_is_number"
    typed = "run_id INTEGER NOT NULL, idx INTEGER NOT NULL, job_id INTEGER NOT NULL, first SMALLINT NOT NULL"
    typed += ", custom_id TEXT, metadata TEXT, id_is_number SMALLINT"
    old_table = [
        f"CREATE TABLE old ({typed}, PRIMARY KEY (run_id, idx)) WITHOUT ROWID",
        f"INSERT INTO old SELECT {columns} FROM items",
        "DROP TABLE items",
        "ALTER TABLE old RENAME TO items",
    ]
    if server:
        change = "DROP CONSTRAINT items_pkey, DROP COLUMN sample, ADD CONSTRAINT items_pkey PRIMARY KEY (run_id, idx)"
        old_table = [f"ALTER TABLE lbr.items {change}"]
    version = [name for name, _ in migrations.MIGRATIONS].index("number the samples of an input")
    for statement in (
        *old_table,
        f"ALTER TABLE {where}runs DROP COLUMN samples",
        f"ALTER TABLE {where}prompts DROP COLUMN sample",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    run = await database.read(reads.find_run, run.name)
    assert (run.samples, [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]) == (
        1,
        before,
    )
    prompts = [Item(Prompt(text=text)) for text in ("a", "b", "a", "c")]
    report = await put_items(database, RunSpec(run.name, ECHO, 8, samples=2), prompts)
    assert (report.counts.known, report.counts.new, report.counts.duplicate) == (3, 4, 1)
    run = await database.read(reads.find_run, run.name)
    rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert [(row.idx, row.sample) for row in rows] == [(idx, sample) for idx in range(4) for sample in range(2)]
    assert [row.result for row in rows] == ["kept", None, None, None, "kept", None, None, None]
    await assert_counted(database, run)
    await database.close()


async def test_a_run_of_before_has_pulses_from_now_on(db_url: str) -> None:
    """A queue without the table of pulses gets it; what was done before is not in it, and the run goes on."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    await database.write(settle, [answered(one) for one in await queue.claim(worker, [run.id], 1, lease=60)])
    where = "lbr." if is_postgresql(db_url) else ""
    version = [name for name, _ in migrations.MIGRATIONS].index("count what each worker does in a minute")
    for statement in (
        f"DROP TABLE {where}pulses",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    assert (await lbr.work(db_url=db_url)).done == 1
    database = await open_database(db_url)
    (pulse,) = await database.read(pulses.series, run.id, run.created_at)
    assert (pulse.done, await states(database, run)) == (1, {"done": 2})
    await database.close()


async def test_ends_of_before_are_not_reported_yet(db_url: str) -> None:
    """A run that goes on under this version has an end to report, whether its jobs were counted before or not."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a"])
    where = "lbr." if is_postgresql(db_url) else ""
    version = [name for name, _ in migrations.MIGRATIONS].index("note which ends of runs were reported")
    for statement in (
        f"ALTER TABLE {where}runs DROP COLUMN reported",
        f"DELETE FROM {where}counters WHERE name = 'opened'",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    queue, worker, _ = await two_workers(database)
    assert await database.read(endings.unreported, [run.id]) == []
    await database.write(settle, [answered(one) for one in await queue.claim(worker, [run.id], 1, lease=60)])
    assert [len((await database.write(endings.take, [run.id]))[1]) for _ in range(2)] == [1, 0]
    await database.close()


async def test_runs_of_before_are_online(db_url: str) -> None:
    """A run that goes on under this version is answered online; it may be sent in batches from the next enqueue on."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    await database.write(settle, [answered(one) for one in await queue.claim(worker, [run.id], 1, lease=60)])
    where = "lbr." if is_postgresql(db_url) else ""
    version = [name for name, _ in migrations.MIGRATIONS].index("send jobs in batches")
    for statement in (
        f"DROP TABLE {where}batches",
        f"DROP TABLE {where}batch_jobs",
        f"DROP INDEX {where}jobs_tried",
        f"ALTER TABLE {where}runs DROP COLUMN lane",
        f"ALTER TABLE {where}results DROP COLUMN lane",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    assert (await lbr.work(db_url=db_url)).done == 1
    database = await open_database(db_url)
    assert (await database.read(reads.find_run, "r")).lane is None
    spec = RunSpec("r", ECHO, 8, lane="batch")
    assert (await database.write(runs.open_run, spec)).lane == "batch"
    assert (await database.write(runs.open_run, replace(spec, lane=None))).lane == "batch"
    assert (await database.write(runs.open_run, replace(spec, lane="online"))).lane == "online"
    await assert_counted(database, run)
    await database.close()


async def test_no_run_of_before_waits_for_a_first_call(db_url: str) -> None:
    """A run that goes on under this version claims at once; it may be asked to wait from the next enqueue on."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    where = "lbr." if is_postgresql(db_url) else ""
    version = [name for name, _ in migrations.MIGRATIONS].index("let a run's first call go alone")
    for statement in (
        f"ALTER TABLE {where}runs DROP COLUMN warm_cache",
        f"DELETE FROM {where}schema_version WHERE version > {version}",
    ):
        await database.write(_run, statement)
    await database.close()
    database = await open_database(db_url)
    queue, worker, _ = await two_workers(database)
    claims = await queue.claim(worker, [run.id], 2, lease=60)
    assert len(claims) == 2
    await queue.release(worker, claims)
    await database.write(runs.open_run, RunSpec("r", ECHO, 8, warm_cache=True))
    assert len(await queue.claim(worker, [run.id], 2, lease=60)) == 1
    await database.close()
