"""What front ends ask of the store: counts, answers in order, one job's story. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import bindparam, func, or_, select

from lbr.core.errors import CUT_OFF, DatabaseError, UsageError
from lbr.core.pricing import output_limit
from lbr.core.types import JobId, JobState, Millis, Part, Prompt, Row, Run, RunId, Shape
from lbr.store import counters, runs
from lbr.store.limiting import LimitSeen, all_limits, is_ahead
from lbr.store.schema import INFLIGHT, attempts, items, jobs, limits, outages, prompts, results, workers
from lbr.store.schema import counters as counters_table
from lbr.store.schema import runs as runs_table
from lbr.store.sql import any_of, if_small, pages

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator, Iterable, Sequence

    from sqlalchemy import ColumnElement

    from lbr.core.pricing import Price
    from lbr.core.types import Json
    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow


def _of_last_try(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return (
        select(column)
        .where(attempts.c.job_id == jobs.c.id, attempts.c.what != "stale")
        .order_by(attempts.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )


_COLLECTED = (
    items.c.idx,
    items.c.custom_id,
    items.c.metadata,
    items.c.id_is_number,
    jobs.c.id,
    prompts.c.key,
    jobs.c.state,
    prompts.c.chat,
    prompts.c.body,
    results.c.text,
    results.c.finish_reason,
)
_BODY = [column.name for column in _COLLECTED].index("body")
_REST = [column for table in (jobs, results) for column in table.c if column not in set(_COLLECTED)]
_PAYLOADS = if_small(prompts.c.body, results.c.text, items.c.metadata)
_ROWS = (
    select(*(_PAYLOADS.get(column.name, column) for column in _COLLECTED))
    .join_from(items, jobs, items.c.job_id == jobs.c.id)
    .join(prompts, prompts.c.job_id == jobs.c.id)
    .outerjoin(results, results.c.job_id == jobs.c.id)
    .where(items.c.run_id == bindparam("run"), items.c.idx > bindparam("after"))
    .order_by(items.c.idx)
    .limit(bindparam("limit"))
)
_METADATA = (
    select(items.c.idx, *if_small(items.c.metadata).values())
    .where(
        items.c.run_id == bindparam("run"), items.c.idx > bindparam("after"), items.c.metadata.is_not(None)
    )
    .order_by(items.c.idx)
    .limit(bindparam("limit"))
)
_HELD = select(jobs.c.worker_id, jobs.c.run_id).where(INFLIGHT).distinct()
_OUTAGES = (
    select(outages.c.answerer, outages.c.since, outages.c.reason, outages.c.probe_at)
    .where(outages.c.since.is_not(None))
    .order_by(outages.c.answerer)
)
ROWS = {Shape.ORIGINAL: _ROWS, Shape.UNIQUE: _ROWS.where(items.c.first == 1)}
_ERRORS = select(
    jobs.c.id,
    _of_last_try(attempts.c.message).label("error"),
    _of_last_try(attempts.c.finish_reason).label("ending"),
).where(any_of(jobs.c.id, "ids"))
_OWN_SETTINGS = (
    select(prompts.c.settings)
    .where(prompts.c.run_id == bindparam("run"), prompts.c.settings.is_not(None))
    .distinct()
)


@dataclass(frozen=True, slots=True)
class Cooldown:
    """An answerer that nobody calls until a time, and why."""

    answerer: str
    until: Millis
    reason: str


@dataclass(frozen=True, slots=True)
class OutageSeen:
    """A model that all workers wait for since a time, why, and when the next probe may begin."""

    answerer: str
    since: Millis
    reason: str
    probe_at: Millis


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker as it last reported: jobs settled in all, and per second of late. `runs` are those it holds jobs of."""

    host: str
    pid: int
    concurrency: int
    started_at: Millis
    seen_at: Millis
    settled: int
    rate: float
    runs: frozenset[RunId]


@dataclass(frozen=True, slots=True)
class RunCounts:
    """A run with its number of inputs and its counters."""

    run: Run
    inputs: int
    counts: Counter[str]

    def of(self, state: JobState) -> int:
        """Return how many jobs are in a state."""
        return self.counts[state]

    @property
    def jobs(self) -> int:
        """How many distinct inputs there are."""
        return sum(self.counts[state] for state in JobState)

    @property
    def open(self) -> int:
        """How many jobs are neither answered nor given up."""
        return self.counts[JobState.PENDING] + self.counts[JobState.INFLIGHT]

    @property
    def finished(self) -> bool:
        """Whether every input is in and every job has come to its end."""
        return self.open == 0 and self.run.sealed_at is not None


@dataclass(frozen=True, slots=True)
class Overview:
    """Runs, workers, cooldowns, outages and limits at one moment."""

    now: Millis
    runs: list[RunCounts]
    workers: list[WorkerSeen]
    cooldowns: list[Cooldown]
    outages: list[OutageSeen]
    limits: list[LimitSeen]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job that was no plain success; tokens, cost and latency are None where they are not known."""

    claim_seq: int
    what: str
    family: str | None
    error: str
    message: str
    text: str | None
    at: Millis
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_nanos: int | None = None
    latency_ms: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class JobDetail:
    """Everything about one input's job."""

    row: Row
    attempts: int
    crashes: int
    claim_seq: int
    available_at: Millis
    lease_until: Millis | None
    finished_at: Millis | None
    model: str | None
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    cost_nanos: int | None
    latency_ms: int | None
    reused: bool
    tries: list[Attempt]


async def find_run(database: Database, name: str) -> Run:
    """Return the run of that name; RunNotFoundError names those that there are."""
    return await database.read(lambda connection: runs.find(connection, name))


async def all_runs(database: Database) -> list[Run]:
    """Return every run, oldest first."""
    return await database.read(runs.all_runs)


async def counts(database: Database, run_ids: Iterable[RunId]) -> list[RunCounts]:
    """Return the runs of these ids as they stand, in the order of their ids."""
    ids = list(run_ids)

    async def work(connection: Connection) -> list[RunCounts]:
        found = select(runs_table).where(runs_table.c.id.in_(ids)).order_by(runs_table.c.id)
        return await _counts(
            connection, [runs.run_of(row) for row in (await connection.execute(found)).all()]
        )

    return await database.read(work)


async def prices(database: Database, run_ids: Iterable[RunId]) -> dict[RunId, Price | None]:
    """Return what the calls of these runs cost by their users' word, None where there is none."""
    ids = list(run_ids)
    return await database.read(lambda connection: runs.prices(connection, ids))


async def open_runs(database: Database) -> list[Run]:
    """Return the runs that still have jobs to do or inputs to come, oldest first."""
    left = (
        select(counters_table.c.run_id)
        .where(counters_table.c.name.in_([JobState.PENDING, JobState.INFLIGHT]))
        .group_by(counters_table.c.run_id)
        .having(func.sum(counters_table.c.value) > 0)
    )
    query = select(runs_table).where(or_(runs_table.c.sealed_at.is_(None), runs_table.c.id.in_(left)))

    async def work(connection: Connection) -> list[Run]:
        return [runs.run_of(row) for row in (await connection.execute(query.order_by(runs_table.c.id))).all()]

    return await database.read(work)


@dataclass(frozen=True, slots=True)
class JobStanding:
    """How a job stands; `claim_seq` is that of its last claim, `common` tells that its key says all that it asks."""

    job_id: JobId
    run_id: RunId
    state: JobState
    claim_seq: int
    common: bool


async def jobs_of_keys(database: Database, keys: Sequence[bytes]) -> dict[bytes, list[JobStanding]]:
    """Return the jobs that ask for the content of these keys, by key, in all runs."""
    columns = (prompts.c.key, jobs.c.id, jobs.c.run_id, jobs.c.state, jobs.c.claim_seq, prompts.c.settings)
    query = select(*columns).join(jobs, jobs.c.id == prompts.c.job_id).where(any_of(prompts.c.key, "keys"))
    found = await database.read(lambda connection: connection.execute(query, {"keys": list(keys)}))
    by_key: dict[bytes, list[JobStanding]] = {key: [] for key in keys}
    for key, job_id, run_id, state, claim_seq, settings in found.all():
        job = JobStanding(JobId(job_id), RunId(run_id), JobState(state), claim_seq, settings is None)
        by_key[key].append(job)
    return by_key


async def now(database: Database) -> Millis:
    """Return the time that the database goes by."""
    return await database.read(database.now)


async def overview(database: Database, name: str | None = None) -> Overview:
    """Return how one run stands, or all of them, with the workers, cooldowns and limits of the database."""

    async def work(connection: Connection) -> Overview:
        found = await runs.all_runs(connection) if name is None else [await runs.find(connection, name)]
        now = await database.now(connection)
        seen = (await connection.execute(select(workers).order_by(workers.c.id))).all()
        held = (await connection.execute(_HELD)).all()
        cooling = (await connection.execute(select(limits).where(limits.c.cooldown_until > now))).all()
        return Overview(
            now=now,
            runs=await _counts(connection, found),
            workers=[
                WorkerSeen(
                    w.host,
                    w.pid,
                    w.concurrency,
                    w.started_at,
                    w.seen_at,
                    w.settled,
                    w.rate_milli / 1000,
                    frozenset(RunId(row.run_id) for row in held if row.worker_id == w.id),
                )
                for w in seen
            ],
            cooldowns=[
                Cooldown(c.answerer, c.cooldown_until, c.reason)
                for c in cooling
                if is_ahead(c.cooldown_until, now)
            ],
            outages=[OutageSeen(*row) for row in (await connection.execute(_OUTAGES)).all()],
            limits=await all_limits(connection, now),
        )

    return await database.read(work)


async def _counts(connection: Connection, found: list[Run]) -> list[RunCounts]:
    ids = [run.id for run in found]
    by_run = await counters.of_runs(connection, ids)
    last = (
        select(items.c.run_id, func.max(items.c.idx)).where(items.c.run_id.in_(ids)).group_by(items.c.run_id)
    )
    inputs = {run_id: idx + 1 for run_id, idx in (await connection.execute(last)).all()}
    return [RunCounts(run, inputs.get(run.id, 0), by_run[run.id]) for run in found]


async def rows(database: Database, run: Run, shape: Shape) -> AsyncIterator[list[Row]]:
    """Yield a run's rows in input order, page by page; each page is a short transaction of its own."""

    async def read(bound: dict[str, int]) -> tuple[int, list[Row]]:
        async def work(connection: Connection) -> tuple[int, list[Row]]:
            found = (await connection.execute(ROWS[shape], {"run": run.id, **bound})).all()
            whole = list(takewhile(lambda row: row[_BODY] is not None, found))
            return len(found), await _with_errors(connection, whole)

        return await database.read(work)

    async for page in pages(read):
        yield list(page)


async def _with_errors(connection: Connection, found: Sequence[Sequence[Any]]) -> list[Row]:
    """Turn database rows into collected ones; what is not done gets what its last failed try said."""
    open_ids = list({job_id for _, _, _, _, job_id, _, state, *_ in found if state != JobState.DONE})
    last: dict[int, Any] = {}
    if open_ids:
        last = {row.id: row for row in (await connection.execute(_ERRORS, {"ids": open_ids})).all()}
    return [
        Row(
            idx,
            key.hex(),
            Prompt.from_body(body, chat=True) if chat else Prompt(body),
            state,
            text if state == JobState.DONE else None,
            last[job_id].error if job_id in last else None,
            _id(custom_id) if id_is_number else custom_id,
            None if metadata is None else _metadata(metadata),
            (ending if state == JobState.DONE else state == JobState.FAILED and last[job_id].ending)
            == CUT_OFF,
        )
        for idx, custom_id, metadata, id_is_number, job_id, key, state, chat, body, text, ending in found
    ]


def _id(text: str) -> int:
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise DatabaseError(f"expected a stored id to be a whole number, got: {str(text)[:200]!r}") from error


def _metadata(text: str) -> dict[str, Json]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DatabaseError(f"expected stored metadata to be JSON, got: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise DatabaseError(f"expected stored metadata to be an object, got: {text[:200]!r}")
    return value


async def limits_answers(database: Database, run: Run) -> bool:
    """Return whether the run's settings, or those of one of its jobs, limit the tokens of an answer."""
    own = await database.read(lambda connection: connection.execute(_OWN_SETTINGS, {"run": run.id}))
    settings = [run.task.settings, *(orjson.loads(text) for text in own.scalars())]
    return any(output_limit(one) is not None for one in settings)


async def columns(database: Database, run: Run) -> list[tuple[Part, str]]:
    """Return the columns of a run's inputs: those of the first one in their order, then what others add.

    An id that the first input does not have goes before them.
    """

    async def read(bound: dict[str, int]) -> tuple[int, list[Any]]:
        found = await database.read(
            lambda connection: connection.execute(_METADATA, {"run": run.id, **bound})
        )
        rows = found.all()
        return len(rows), list(takewhile(lambda row: row.metadata is not None, rows))

    known = _input_columns(run)
    names: dict[str, None] = {}
    async for page in pages(read):
        for row in page:
            names |= dict.fromkeys(_metadata(row.metadata))
    found = [(part, name) for name, part in known.items()]
    if Part.ID not in known.values() and await _has_id(database, run):
        found.insert(0, (Part.ID, "id"))
    return found + [(Part.METADATA, name) for name in names if known.get(name) is not Part.METADATA]


async def _has_id(database: Database, run: Run) -> bool:
    query = select(items.c.idx).where(items.c.run_id == run.id, items.c.custom_id.is_not(None)).limit(1)
    found = await database.read(lambda connection: connection.execute(query))
    return found.first() is not None


def _input_columns(run: Run) -> dict[str, Part]:
    """Return the columns that a run's first input had; its prompt alone if they are not known."""
    if run.input_columns is None:
        return {"prompt": Part.PROMPT}
    try:
        return {name: Part(part) for name, part in orjson.loads(run.input_columns).items()}
    except (ValueError, AttributeError) as error:
        msg = (
            f"expected the columns of run {run.name!r} to be a JSON object, got: {run.input_columns[:200]!r}"
        )
        raise DatabaseError(msg) from error


async def story(database: Database, run: Run, idx: int) -> JobDetail:
    """Return everything about the input at a place; UsageError where there is none."""

    async def work(connection: Connection) -> JobDetail:
        query = (
            select(*_COLLECTED, *_REST)
            .join_from(items, jobs, items.c.job_id == jobs.c.id)
            .join(prompts, prompts.c.job_id == jobs.c.id)
            .outerjoin(results, results.c.job_id == jobs.c.id)
            .where(items.c.run_id == run.id, items.c.idx == idx)
        )
        found = (await connection.execute(query)).one_or_none() if 0 <= idx < 2**63 else None
        if found is None:
            last = await connection.scalar(select(func.max(items.c.idx)).where(items.c.run_id == run.id))
            there = "none" if last is None else f"0 to {last}"
            raise UsageError(f"expected an input of run {run.name!r}, got: {idx}; there are {there}")
        tried = select(attempts).where(attempts.c.job_id == found.id).order_by(attempts.c.id)
        tries = [
            Attempt(**{name: getattr(t, name) for name in Attempt.__slots__})
            for t in (await connection.execute(tried)).all()
        ]
        return _story(found, (await _with_errors(connection, [found[: len(_COLLECTED)]]))[0], tries)

    return await database.read(work)


def _story(found: AnyRow, row: Row, tries: list[Attempt]) -> JobDetail:
    return JobDetail(
        row=row,
        attempts=found.attempts,
        crashes=found.crashes,
        claim_seq=found.claim_seq,
        available_at=found.available_at,
        lease_until=found.lease_until,
        finished_at=found.finished_at,
        model=found.model,
        finish_reason=found.finish_reason,
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        cost_nanos=found.cost_nanos,
        latency_ms=found.latency_ms,
        reused=found.reused_from is not None,
        tries=tries,
    )
