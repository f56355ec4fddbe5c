"""The tables, and the ordered steps that bring an older database up to them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    insert,
    inspect,
    literal_column,
    select,
    text,
    update,
)

from lbr.core.errors import DatabaseError
from lbr.core.types import Move, PauseCause, Paused, RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import ColumnElement, Connection, Row

    from lbr.core.types import WorkerId

AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"

# A job is rewritten three times in its life, a counter always. Pages keep room for the new version beside the old
# one; a counter's then touches no index, a job's still does, for its state decides which indexes have it. Dead rows
# are cleared away before they slow a claim down.
HOT = {
    "fillfactor": 70,
    "autovacuum_vacuum_scale_factor": 0.02,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_analyze_scale_factor": 0.05,
    "autovacuum_vacuum_cost_delay": 0,
}

metadata = MetaData()

# SQLite only treats INTEGER as the row's own id; PostgreSQL wants 64 bits said aloud.
Id = BigInteger().with_variant(Integer, "sqlite")
Millis = BigInteger().with_variant(Integer, "sqlite")

STATES = "('pending', 'inflight', 'done', 'failed', 'cancelled')"

schema_version = Table(
    "schema_version",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("applied_at", Millis, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
    Column("task", Text, nullable=False),
    Column("answerer", Text, nullable=False),
    Column("fingerprint", Text),
    Column("state", Text, nullable=False),
    # A PauseCause, and the text that people read.
    Column("pause_cause", Text),
    Column("pause_message", Text),
    Column("max_attempts", Integer, nullable=False),
    Column("created_at", Millis, nullable=False),
    # When its newest chunk was enqueued; sealed_at is null until an enqueue came to its end.
    Column("enqueued_at", Millis, nullable=False),
    Column("sealed_at", Millis),
    # Prices per million tokens as JSON, where the price table is not to be asked; what the run may cost.
    Column("price", Text),
    Column("budget_nanos", Id),
    # The highest cost of a call seen so far, or that a claimed call may reach.
    Column("highest_nanos", Id),
    # The columns of its input as JSON, in order; see `lbr.core.types.Item`.
    Column("input_columns", Text),
    # As JSON, after `lbr move` took the run away: the other database, and what the run was before.
    Column("move", Text),
    CheckConstraint("state IN ('active', 'paused', 'cancelled')", name="runs_state"),
    sqlite_autoincrement=True,
)

# Narrow on purpose: every claim, renewal and settlement rewrites this row and no payload.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("run_id", Id, nullable=False),
    Column("state", Text, nullable=False),
    Column("available_at", Millis, nullable=False),
    Column("claim_seq", Id, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    # The claim_seq at which somebody last put the job back by hand: older tries do not count any more.
    Column("retry_seq", Id, nullable=False),
    Column("worker_id", Id),
    Column("lease_until", Millis),
    Column("finished_at", Millis),
    CheckConstraint(f"state IN {STATES}", name="jobs_state"),
    # Ids are never given out twice, so that a stale claim cannot meet another job.
    sqlite_autoincrement=True,
)
_pending = Index(
    "jobs_pending",
    jobs.c.run_id,
    jobs.c.available_at,
    jobs.c.id,
    sqlite_where=text("state = 'pending'"),
)
SILENT_MS = 15_000
"""A worker that has not reported for so long is not counted as working."""

LIVE_MS = 60_000
"""A worker that has not reported for so long, which is the usual lease, does not keep a queue from being migrated."""

SUSPECT_CRASHES = 2
"""From this many crashes on a job runs alone in its worker, so that it cannot take others along."""

_SUSPECT = text(f"state = 'pending' AND crashes >= {SUSPECT_CRASHES}")
# Nearly always empty. Without it, to see that there is no suspect means to look at every pending job.
_suspects = Index(
    "jobs_suspects",
    jobs.c.run_id,
    jobs.c.available_at,
    jobs.c.id,
    sqlite_where=_SUSPECT,
)
_leases = Index("jobs_lease", jobs.c.lease_until, sqlite_where=text("state = 'inflight'"))

# Literals, so that the partial indexes serve the statements that name them.
PENDING: ColumnElement[bool] = literal_column("jobs.state = 'pending'")
INFLIGHT: ColumnElement[bool] = literal_column("jobs.state = 'inflight'")

# What a job is for ever. The key is here, for every index of jobs costs PostgreSQL an entry at each claim and each
# settlement.
prompts = Table(
    "prompts",
    metadata,
    Column("job_id", Id, primary_key=True, autoincrement=False),
    Column("run_id", Id, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("chat", SmallInteger, nullable=False),
    Column("body", Text, nullable=False),
    # Settings of this job alone, as JSON, that a retry by hand put over the task's.
    Column("settings", Text),
)
# The key first: an answer is looked for in all runs.
Index("prompts_key", prompts.c.key, prompts.c.run_id, unique=True)

results = Table(
    "results",
    metadata,
    Column("job_id", Id, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("model", Text),
    Column("finish_reason", Text),
    Column("input_tokens", Id),
    Column("output_tokens", Id),
    Column("cost_nanos", Id),
    Column("latency_ms", Id, nullable=False),
    # The job of another run whose answer this is, 0 where that one stayed in a database from which the run was
    # moved; null for an answer that was called for.
    Column("reused_from", Id),
)

# Every try that was not a plain success.
attempts = Table(
    "attempts",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", Id, nullable=False),
    Column("claim_seq", Id, nullable=False),
    Column("what", Text, nullable=False),
    Column("family", Text),
    Column("error", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("text", Text),
    Column("input_tokens", Id),
    Column("output_tokens", Id),
    Column("cost_nanos", Id),
    Column("latency_ms", Id),
    Column("at", Millis, nullable=False),
    # Why its answer ended, if there was one and its provider said so.
    Column("finish_reason", Text),
    CheckConstraint("what IN ('retried', 'failed', 'stale', 'crashed')", name="attempts_what"),
)
Index("attempts_job", attempts.c.job_id, attempts.c.id)

items = Table(
    "items",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("idx", Id, primary_key=True),
    Column("job_id", Id, nullable=False),
    # 1 where this input is the first of its job: the order of distinct inputs.
    Column("first", SmallInteger, nullable=False),
    Column("custom_id", Text),
    Column("metadata", Text),
    # 1 where the input's id is a number.
    Column("id_is_number", SmallInteger),
    sqlite_with_rowid=False,
)

# Job states, tokens, cost and failed tries of a run, kept in the transactions that change them.
counters = Table(
    "counters",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("shard", SmallInteger, primary_key=True),
    Column("value", Id, nullable=False),
    sqlite_with_rowid=False,
)

# What all workers share about one answerer; null where nothing was set or seen.
limits = Table(
    "limits",
    metadata,
    Column("answerer", Text, primary_key=True),
    # Until when nobody should call it, and why.
    Column("cooldown_until", Millis, nullable=False),
    Column("reason", Text, nullable=False),
    # Set by hand: requests and tokens a minute, calls at a time.
    Column("rpm", Integer),
    Column("tpm", Integer),
    Column("concurrency", Integer),
    # Learned: calls at a time, up to where they double, when they were last cut.
    Column("slots", Double),
    Column("threshold", Double),
    Column("cut_at", Millis),
    # What is left of the minute's requests and tokens, below 0 where more was taken, and when that was so.
    Column("requests", Double),
    Column("tokens", Double),
    Column("balanced_at", Millis),
    # The share of calls refused of late, and how many had been answered when it was updated.
    Column("refused", Double),
    Column("answered", Id),
)

# Models that all workers wait, or waited, for; see `lbr.core.outages.ModelState`.
outages = Table(
    "outages",
    metadata,
    Column("answerer", Text, primary_key=True),
    Column("since", Millis),
    Column("reason", Text, nullable=False),
    Column("worker", Id),
    Column("recognised_by", Id),
    Column("probe_at", Millis, nullable=False),
    Column("wait_ms", Id, nullable=False),
    Column("waited_ms", Id, nullable=False),
    Column("patience_ms", Id, nullable=False),
    Column("done", Id, nullable=False),
    Column("recovered_by", Id),
    Column("recovered_at", Millis),
    # The claim that is the probe: while it is in flight, no other begins.
    Column("probe_job", Id),
    Column("probe_seq", Id),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("concurrency", Integer, nullable=False),
    Column("started_at", Millis, nullable=False),
    Column("seen_at", Millis, nullable=False),
    Column("settled", Id, nullable=False),
    # Jobs settled per 1,000 seconds, over the worker's latest half minute.
    Column("rate_milli", Id, nullable=False),
    sqlite_autoincrement=True,
)


def _for_postgresql() -> None:
    """Say what is PostgreSQL's own of a table or an index: its dialect is not imported for a file."""
    for table, options in (
        (jobs, HOT),
        (counters, HOT | {"fillfactor": 25, "autovacuum_vacuum_threshold": 200}),
    ):
        table.dialect_kwargs["postgresql_with"] = options
    for index in (_pending, _suspects, _leases):
        index.dialect_kwargs["postgresql_where"] = index.dialect_kwargs["sqlite_where"]


def _create_tables(connection: Connection) -> None:
    metadata.create_all(connection, checkfirst=True)


def _index_suspects(connection: Connection) -> None:
    # Made last even where the tables were just made with all of their indexes, in whatever order: of two that would
    # do, SQLite takes the younger.
    _suspects.drop(connection, checkfirst=True)
    _suspects.create(connection)


def _alter(connection: Connection, table: Table, change: str) -> None:
    where = _schema_of(connection)
    name = table.name if where is None else f"{where}.{table.name}"
    connection.execute(text(f"ALTER TABLE {name} {change}"))


def _move_keys(connection: Connection) -> None:
    columns = {
        column["name"] for column in inspect(connection).get_columns("jobs", schema=_schema_of(connection))
    }
    if "key" not in columns:
        return
    old = Table("prompts_before", MetaData(), *(Column(name) for name in ("job_id", "chat", "body")))
    keyed = Table("jobs", MetaData(), *(Column(name) for name in ("id", "run_id", "key")))
    _alter(connection, prompts, "RENAME TO prompts_before")
    prompts.create(connection)
    whole = select(old.c.job_id, keyed.c.run_id, keyed.c.key, old.c.chat, old.c.body)
    rows = whole.join_from(old, keyed, keyed.c.id == old.c.job_id)
    connection.execute(prompts.insert().from_select(["job_id", "run_id", "key", "chat", "body"], rows))
    old.drop(connection)
    for name, column in (("jobs_run_key", keyed.c.run_id), ("jobs_done_key", keyed.c.key)):
        Index(name, column).drop(connection)
    _alter(connection, jobs, "DROP COLUMN key")


def _add_columns(connection: Connection) -> None:
    _add_missing(connection, limits, runs, prompts)


def _keep_finish_reasons(connection: Connection) -> None:
    _add_missing(connection, attempts)


def _add_missing(connection: Connection, *tables: Table) -> None:
    for table in tables:
        there = {
            column["name"]
            for column in inspect(connection).get_columns(table.name, schema=_schema_of(connection))
        }
        for column in table.columns:
            if column.name not in there:
                _alter(
                    connection, table, f"ADD COLUMN {column.name} {column.type.compile(connection.dialect)}"
                )


def _add_shares_and_costs(connection: Connection) -> None:
    _add_named(connection, (limits, ("refused", "answered")), (runs, ("highest_nanos",)))


def _add_input_columns(connection: Connection) -> None:
    _add_named(connection, (runs, ("input_columns",)), (items, ("id_is_number",)))


def _add_named(connection: Connection, *wanted: tuple[Table, tuple[str, ...]]) -> None:
    for table, names in wanted:
        columns = inspect(connection).get_columns(table.name, schema=_schema_of(connection))
        for name in set(names) - {column["name"] for column in columns}:
            kind = table.c[name].type.compile(connection.dialect)
            _alter(connection, table, f"ADD COLUMN {name} {kind}")


def _add_outages(connection: Connection) -> None:
    outages.create(connection, checkfirst=True)


_BEFORE = " (was "
_CAUSES = {
    PauseCause.BUDGET: re.compile(r"it may cost \$.* spent there is no room for a call"),
    PauseCause.UNPRICED: re.compile(r"its calls tell no cost: expected .*"),
    PauseCause.OUTAGE: re.compile(r".+ could not be reached in .+ of waits: .*", re.DOTALL),
    PauseCause.SET_UP: re.compile(r"all \d+ jobs? that were called failed alike: .*", re.DOTALL),
    # The class of the error, or the provider's code.
    PauseCause.ACCOUNT: re.compile(r"[\w.]+: .*", re.DOTALL),
}


def _cause_of(reason: str) -> Paused:
    """Read a reason of a version that kept the cause of a pause in its words."""
    for cause, words in _CAUSES.items():
        if words.fullmatch(reason):
            return Paused(cause, reason)
    return Paused(PauseCause.USER, reason)


_MOVING_TO = "moving_to"


def _read_reason(state: str, reason: str) -> tuple[str, str, Move | None]:
    """Read such a reason, also one of `lbr move`; return cause and message."""
    if state == RunState.CANCELLED:
        return PauseCause.REMOVING, reason, None
    for cause in (_MOVING_TO, PauseCause.MOVED_TO, PauseCause.MOVING_FROM):
        start = f"{cause.replace('_', ' ')} "
        if reason.startswith(start):
            message, _, before = reason.partition(_BEFORE)
            place, before = message.removeprefix(start), before.removesuffix(")")
            if before == RunState.CANCELLED:
                return cause, message, Move(place, RunState.CANCELLED)
            if before:
                was = _cause_of(before.removeprefix("paused: "))
                return cause, message, Move(place, RunState.PAUSED, was.cause, was.message)
            return cause, message, Move(place)
    pause = _cause_of(reason)
    return pause.cause, pause.message, None


def _name_causes(connection: Connection) -> None:
    columns = {
        column["name"] for column in inspect(connection).get_columns("runs", schema=_schema_of(connection))
    }
    if "pause_reason" not in columns:
        return
    _add_missing(connection, runs)
    old = Table("runs", MetaData(), *(Column(name) for name in ("id", "state", "pause_reason")))
    for row in connection.execute(select(old).where(old.c.pause_reason.is_not(None))).all():
        cause, message, move = _read_reason(row.state, row.pause_reason)
        values = {
            "pause_cause": cause,
            "pause_message": message,
            "move": None if move is None else move.to_json(),
        }
        connection.execute(update(runs).where(runs.c.id == row.id).values(values))
    _alter(connection, runs, "DROP COLUMN pause_reason")


def _end_moves(connection: Connection) -> None:
    """Let runs that were being moved away rest here, as they were before, or paused: the same `lbr move` goes on."""
    leaving = select(runs.c.id, runs.c.pause_message, runs.c.move).where(runs.c.pause_cause == _MOVING_TO)
    for row in connection.execute(leaving).all():
        state, pause = Move(**orjson.loads(row.move)).before
        if state is RunState.ACTIVE:
            state, pause = RunState.PAUSED, Paused(PauseCause.USER, row.pause_message)
        values = {
            "state": state,
            "pause_cause": None if pause is None else pause.cause,
            "pause_message": None if pause is None else pause.message,
            "move": None,
        }
        connection.execute(update(runs).where(runs.c.id == row.id).values(values))


MIGRATIONS: tuple[tuple[str, Callable[[Connection], None]], ...] = (
    ("create the tables", _create_tables),
    ("index the suspects", _index_suspects),
    ("keep keys beside prompts", _move_keys),
    ("share limits, price runs, set jobs apart", _add_columns),
    ("keep why answers of failed tries ended", _keep_finish_reasons),
    ("add the share of refused calls and the highest cost of a call", _add_shares_and_costs),
    ("note outages of models", _add_outages),
    ("keep the order of columns, and which ids are numbers", _add_input_columns),
    ("keep the cause of a pause apart from its message", _name_causes),
    ("let runs rest that were being moved away", _end_moves),
)
"""Ordered and append-only: a database's version is the number of them that it has seen."""

LATEST = len(MIGRATIONS)


def _schema_of(connection: Connection) -> str | None:
    where: str | None = connection.get_execution_options().get("schema_translate_map", {}).get(None)
    return where


def applied_version(connection: Connection) -> int:
    """Return how many migrations the database has seen, 0 for an empty one."""
    if not inspect(connection).has_table("schema_version", schema=_schema_of(connection)):
        return 0
    versions = connection.execute(select(schema_version.c.version)).scalars().all()
    return max(versions, default=0)


def migrate(
    connection: Connection, now: int, dead_workers: Callable[[Iterable[WorkerId]], list[WorkerId]]
) -> None:
    """Apply what is missing, with its record, in the caller's transaction. Safe to repeat.

    Raises DatabaseError, and changes nothing, while workers of an older version report; `dead` returns those of them
    that have certainly ended.
    """
    if connection.dialect.name == "postgresql":
        _for_postgresql()
    applied = applied_version(connection)
    if 0 < applied < LATEST:
        _check_no_workers(connection, now, dead_workers)
    for version, (name, step) in enumerate(MIGRATIONS, start=1):
        if version > applied:
            step(connection)
            connection.execute(insert(schema_version).values(version=version, name=name, applied_at=now))


def _check_no_workers(
    connection: Connection, now: int, dead_workers: Callable[[Iterable[WorkerId]], list[WorkerId]]
) -> None:
    seen = workers.c.seen_at.between(now - LIVE_MS, now + LIVE_MS)
    rows = connection.execute(select(workers).where(seen).order_by(workers.c.id)).all()
    ended = dead_workers([row.id for row in rows])
    live = [row for row in rows if row.id not in ended]
    if not live:
        return
    wait = max(row.seen_at for row in live) + LIVE_MS - now
    shown = ", ".join(f"{row.host}:{row.pid}" for row in live[:5])
    more = f" and {len(live) - 5} more" if len(live) > 5 else ""
    raise DatabaseError(
        f"workers of an older version are running on this queue ({shown}{more}), and this version must change its tables; "
        f"stop them first. If they were killed, run the same command again in {-(-wait // 1000)} s"
    )
