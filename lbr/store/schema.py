"""The tables; `lbr.store.migrations` has the steps that upgrade an older database to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

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
    case,
    literal_column,
    text,
)

from lbr.core.batches import PARKED

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row


AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"

# A job is rewritten three times in its life, a counter always: pages keep room for the new version beside the old one,
# and dead rows are removed before they slow claims down.
HOT = {
    "fillfactor": 70,
    "autovacuum_vacuum_scale_factor": 0.02,
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_analyze_scale_factor": 0.05,
    "autovacuum_vacuum_cost_delay": 0,
}

metadata = MetaData()

# SQLite treats only INTEGER as the row's own id; PostgreSQL needs the 64 bits named.
Id = BigInteger().with_variant(Integer, "sqlite")
Millis = BigInteger().with_variant(Integer, "sqlite")

STATES = "('pending', 'inflight', 'done', 'failed', 'cancelled')"


def _columns(kind: Any, names: str, *, nullable: bool = False) -> list[Column[Any]]:
    return [Column(name, kind, nullable=nullable) for name in names.split()]


def _id(name: str = "id") -> Column[Any]:
    return Column(name, Id, primary_key=True, autoincrement=True)


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
    _id(),
    Column("name", Text, nullable=False, unique=True),
    *_columns(Text, "task answerer"),
    Column("fingerprint", Text),
    Column("state", Text, nullable=False),
    # A PauseCause, and the text that people read.
    *_columns(Text, "pause_cause pause_message", nullable=True),
    Column("max_attempts", Integer, nullable=False),
    # enqueued_at: when its newest chunk was enqueued; sealed_at: when its latest enqueue finished, null until then.
    *_columns(Millis, "created_at enqueued_at"),
    Column("sealed_at", Millis),
    # Prices per million tokens as JSON, if they are the user's own.
    Column("price", Text),
    # What the run may cost; the highest cost of a call seen so far, or that a claimed call may reach.
    *_columns(Id, "budget_nanos highest_nanos", nullable=True),
    # The columns of its input as JSON, in order; see `lbr.core.types.Item`.
    Column("input_columns", Text),
    # As JSON, after `lbr move`: the other database, and the state that the run had before.
    Column("move", Text),
    # As a JSON list, what is kept besides its answers; see `extras`.
    Column("keep", Text),
    # How many answers each input gets, null for one.
    Column("samples", Integer),
    # The number of its end that was reported last; see `lbr.store.endings`.
    Column("reported", Id),
    # A Lane, null for online.
    Column("lane", Text),
    # 1 until a first call, which goes alone, has filled the provider's cache.
    Column("warm_cache", Integer),
    CheckConstraint("state IN ('active', 'paused', 'cancelled')", name="runs_state"),
    sqlite_autoincrement=True,
)

# Narrow, because every claim, renewal and settlement rewrites this row and no payload.
jobs = Table(
    "jobs",
    metadata,
    _id(),
    Column("run_id", Id, nullable=False),
    Column("state", Text, nullable=False),
    Column("available_at", Millis, nullable=False),
    Column("claim_seq", Id, nullable=False),
    *_columns(Integer, "attempts crashes"),
    # The claim_seq at which the user last retried the job: older tries no longer count.
    Column("retry_seq", Id, nullable=False),
    Column("worker_id", Id),
    *_columns(Millis, "lease_until finished_at", nullable=True),
    CheckConstraint(f"state IN {STATES}", name="jobs_state"),
    # An id is never used twice, so that a stale claim cannot meet another job.
    sqlite_autoincrement=True,
)
SILENT_MS = 15_000
"""A worker that has not reported for this time is not counted as working."""
LIVE_MS = 60_000
"""A worker that has not reported for this time, the usual lease, does not prevent a migration."""
SUSPECT_CRASHES = 2
"""From this many crashes on, a job runs alone in its worker, so that no other job crashes with it."""

_ORDER = (jobs.c.run_id, jobs.c.available_at, jobs.c.id)
_pending = Index("jobs_pending", *_ORDER, sqlite_where=text("state = 'pending'"))
# Nearly always empty. Without it, a claim would read every pending job to find that there is no suspect.
_SUSPECT = text(f"state = 'pending' AND crashes >= {SUSPECT_CRASHES}")
suspects = Index("jobs_suspects", *_ORDER, sqlite_where=_SUSPECT)
_leases = Index("jobs_lease", jobs.c.lease_until, sqlite_where=text("state = 'inflight'"))
failed = Index("jobs_failed", jobs.c.run_id, jobs.c.id, sqlite_where=text("state = 'failed'"))

# In a run of the batch lane, a claim would read every job that waits for a batch to find those that were tried.
_TRIED = "claim_seq > retry_seq"
tried = Index("jobs_tried", *_ORDER, sqlite_where=text(f"state = 'pending' AND {_TRIED}"))

# Literals, so that the partial indexes serve the statements that name them.
PENDING: ColumnElement[bool] = literal_column("jobs.state = 'pending'")
TRIED: ColumnElement[bool] = literal_column("jobs.claim_seq > jobs.retry_seq")
"""Claimed since it was enqueued or retried by the user."""
IS_PARKED: ColumnElement[bool] = literal_column(f"(jobs.state = 'pending' AND jobs.available_at = {PARKED})")
NOT_PARKED: ColumnElement[bool] = literal_column(f"jobs.available_at < {PARKED}")
INFLIGHT: ColumnElement[bool] = literal_column("jobs.state = 'inflight'")
FAILED: ColumnElement[bool] = literal_column("jobs.state = 'failed'")

# What never changes of a job. The key is here, because every index of jobs costs PostgreSQL an entry at each claim
# and each settlement.
prompts = Table(
    "prompts",
    metadata,
    Column("job_id", Id, primary_key=True, autoincrement=False),
    Column("run_id", Id, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("chat", SmallInteger, nullable=False),
    Column("body", Text, nullable=False),
    # Settings of this job alone, as JSON, which a retry put over the task's.
    Column("settings", Text),
    # The number of the answer among those to the same input, null for the first, 0.
    Column("sample", SmallInteger),
    # The first input that it answers; null in what older versions wrote.
    Column("idx", Id),
)
# The key first, because an answer is searched for in all runs.
Index("prompts_key", prompts.c.key, prompts.c.run_id, unique=True)

results = Table(
    "results",
    metadata,
    Column("job_id", Id, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    *_columns(Text, "model finish_reason", nullable=True),
    *_columns(Id, "input_tokens output_tokens cost_nanos", nullable=True),
    Column("latency_ms", Id, nullable=False),
    # The job of another run whose answer this is, 0 if it is in the database that the run was moved from; null for
    # the answer of a call.
    Column("reused_from", Id),
    # Tokens of the input that the provider had in its cache.
    Column("cached_tokens", Id),
    # "batch" for an answer of a batch, whose latency means nothing; null for others.
    Column("lane", Text),
)

LATENCY: ColumnElement[int | None] = case((results.c.lane.is_(None), results.c.latency_ms))
"""That of an answer, null if it is of a batch."""

# What came with an answer, if its run keeps it: null if it is not kept, empty if none came. Raw is the body as it came.
extras = Table(
    "extras",
    metadata,
    Column("job_id", Id, primary_key=True, autoincrement=False),
    *_columns(Text, "reasoning logprobs raw", nullable=True),
)

# Every try that was not a plain success.
attempts = Table(
    "attempts",
    metadata,
    _id(),
    *_columns(Id, "job_id claim_seq"),
    Column("what", Text, nullable=False),
    Column("family", Text),
    *_columns(Text, "error message"),
    Column("text", Text),
    *_columns(Id, "input_tokens output_tokens cost_nanos latency_ms", nullable=True),
    Column("at", Millis, nullable=False),
    # Why its answer ended, if it is known.
    Column("finish_reason", Text),
    Column("cached_tokens", Id),
    CheckConstraint("what IN ('retried', 'failed', 'stale', 'crashed')", name="attempts_what"),
)
Index("attempts_job", attempts.c.job_id, attempts.c.id)

items = Table(
    "items",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("idx", Id, primary_key=True),
    Column("sample", SmallInteger, primary_key=True),
    Column("job_id", Id, nullable=False),
    # 1 if this row is the first of its job: the order of distinct inputs.
    Column("first", SmallInteger, nullable=False),
    *_columns(Text, "custom_id metadata", nullable=True),
    # 1 if the input's id is a number.
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

# What all workers share about one model; null if nothing was set or seen.
limits = Table(
    "limits",
    metadata,
    Column("answerer", Text, primary_key=True),
    # Until when no worker should call it, and why.
    Column("cooldown_until", Millis, nullable=False),
    Column("reason", Text, nullable=False),
    # Set by the user: requests and tokens a minute, calls at a time.
    *_columns(Integer, "rpm tpm concurrency", nullable=True),
    # Learned: calls at a time, up to where they double, when they were last cut.
    *_columns(Double, "slots threshold", nullable=True),
    Column("cut_at", Millis),
    # What is left of the minute's requests and tokens, below 0 if more was taken, and at what time.
    *_columns(Double, "requests tokens", nullable=True),
    Column("balanced_at", Millis),
    # The share of calls refused of late, and how many had been answered when it was updated.
    Column("refused", Double),
    Column("answered", Id),
)

# Models that all workers wait for, or waited for; see `lbr.core.outages.ModelState`.
outages = Table(
    "outages",
    metadata,
    Column("answerer", Text, primary_key=True),
    Column("since", Millis),
    Column("reason", Text, nullable=False),
    *_columns(Id, "worker recognised_by", nullable=True),
    Column("probe_at", Millis, nullable=False),
    *_columns(Id, "wait_ms waited_ms patience_ms done"),
    Column("recovered_by", Id),
    Column("recovered_at", Millis),
    # The claim that is the probe: while it is in flight, no other starts.
    *_columns(Id, "probe_job probe_seq", nullable=True),
)

workers = Table(
    "workers",
    metadata,
    _id(),
    Column("host", Text, nullable=False),
    *_columns(Integer, "pid concurrency"),
    *_columns(Millis, "started_at seen_at"),
    # rate_milli: jobs settled per 1,000 seconds, over the worker's latest half minute.
    *_columns(Id, "settled rate_milli"),
    sqlite_autoincrement=True,
)

# What a worker did for a run in a minute, and of worker 0 what all did in an hour; see `lbr.core.pulses.Pulse`.
pulses = Table(
    "pulses",
    metadata,
    *(Column(name, Id, primary_key=True) for name in ("run_id", "minute", "worker_id")),
    *_columns(Id, "since until done failed retried limited input_tokens output_tokens cost_nanos slowest_ms slots"),
    Column("slowest_job", Id),
    Column("histogram", Text, nullable=False),
    sqlite_with_rowid=False,
)
_unfolded = Index("pulses_unfolded", pulses.c.minute, sqlite_where=text("worker_id > 0"))


# What a provider answers within a day; see `lbr.core.batches.BatchRow`.
batches = Table(
    "batches",
    metadata,
    _id(),
    Column("run_id", Id, nullable=False),
    Column("nonce", Text, nullable=False, unique=True),
    Column("state", Text, nullable=False),
    Column("count", Integer, nullable=False),
    *_columns(Id, "reserved_nanos cursor"),
    *_columns(Millis, "created_at next_poll_at"),
    Column("bytes", Id),
    # `found` is a `lbr.core.batches.Found` as JSON.
    *_columns(Text, "provider credential file_id found error", nullable=True),
    *_columns(Millis, "sent_at looked_at ended_at lease_until", nullable=True),
    Column("worker_id", Id),
    sqlite_autoincrement=True,
)

# The jobs of the batches that are not settled or released.
batch_jobs = Table(
    "batch_jobs",
    metadata,
    *(Column(name, Id, primary_key=True) for name in ("batch_id", "job_id")),
    *_columns(Id, "claim_seq"),
    sqlite_with_rowid=False,
)


def set_postgresql_options() -> None:
    """Set what only PostgreSQL knows of tables and indexes: its dialect is not imported for a file."""
    jobs.dialect_kwargs["postgresql_with"] = HOT
    counters.dialect_kwargs["postgresql_with"] = HOT | {"fillfactor": 25, "autovacuum_vacuum_threshold": 200}
    for index in (_pending, suspects, tried, _leases, failed, _unfolded):
        index.dialect_kwargs["postgresql_where"] = index.dialect_kwargs["sqlite_where"]
