"""What other packages read from the store: counts, answers in order, the details of one job. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import Float, bindparam, case, cast, func, or_, select

from lbr.core.errors import CUT_OFF, DatabaseError, UsageError
from lbr.core.extras import Extra, Extras, Include, RowUsage
from lbr.core.pricing import NANOS, output_limit
from lbr.core.types import MAX_SAMPLES, AnswerRow, JobState, Millis, Part, Prompt, Run, RunId, RunState, Shape
from lbr.store import counters, pulses, runs
from lbr.store.limits import LimitStatus, all_limits, is_ahead
from lbr.store.schema import LATENCY, SILENT_MS, attempts, items, jobs, limits, outages, prompts, results, workers
from lbr.store.schema import counters as counters_table
from lbr.store.schema import extras as extras_table
from lbr.store.schema import runs as runs_table
from lbr.store.sql import any_of, byte_length, if_small, is_after, json_object, pages

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator, Callable, Collection, Container, Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection, Select

    from lbr.core.types import Json
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

_COLLECTED = (
    *(items.c.idx, items.c.sample, items.c.custom_id, items.c.metadata, items.c.id_is_number),
    *(jobs.c.id, prompts.c.key, jobs.c.state, prompts.c.chat, prompts.c.body),
    *(results.c.text, results.c.finish_reason),
)
_NAMES = [column.name for column in _COLLECTED]
_JOB_ID, _STATE, _BODY = map(_NAMES.index, ("id", "state", "body"))
_OTHERS = [column for table in (jobs, results) for column in table.c if column not in set(_COLLECTED)]


def _inputs(*columns: ColumnElement[Any]) -> Select[Any]:
    return (
        select(*columns)
        .join_from(items, jobs, items.c.job_id == jobs.c.id)
        .join(prompts, prompts.c.job_id == jobs.c.id)
        .outerjoin(results, results.c.job_id == jobs.c.id)
        .where(items.c.run_id == bindparam("run"))
    )


_TRIES = attempts.alias("tries")


def last_try(name: str) -> ColumnElement[Any]:
    """Select a column of each job's newest attempt, late answers left out; null without one."""
    tries = select(_TRIES.c[name]).where(_TRIES.c.job_id == jobs.c.id, _TRIES.c.what != "stale")
    return tries.order_by(_TRIES.c.id.desc()).limit(1).scalar_subquery()


_AFTER = is_after(items.c.idx, items.c.sample)
_IN_ORDER = (items.c.idx, items.c.sample)
_STATES = (
    select(items.c.idx, items.c.sample, jobs.c.state)
    .join_from(items, jobs, items.c.job_id == jobs.c.id)
    .where(items.c.run_id == bindparam("run"))
)
_PLACES = _STATES.where(_AFTER).order_by(*_IN_ORDER).limit(5_000)


@cache
def _rows_of(shape: Shape, kept: tuple[Extra, ...]) -> Select[Any]:
    """Select a page of rows with what is kept of these kinds."""
    more = [extras_table.c[kind] for kind in kept]
    payloads = if_small(prompts.c.body, results.c.text, items.c.metadata, *more)
    query = _inputs(*(payloads.get(column.name, column) for column in (*_COLLECTED, *more)))
    if kept:
        query = query.outerjoin(extras_table, extras_table.c.job_id == jobs.c.id)
    if shape is Shape.UNIQUE:
        query = query.where(items.c.first == 1)
    return query.where(_AFTER).order_by(*_IN_ORDER).limit(bindparam("limit"))


_DETAIL = _inputs(*_COLLECTED, *_OTHERS, prompts.c.settings).where(
    items.c.idx == bindparam("idx"), items.c.sample == bindparam("sample")
)
# All samples of an input have its metadata.
_METADATA = (
    select(items.c.idx, items.c.sample, *if_small(items.c.metadata).values())
    .where(items.c.run_id == bindparam("run"), _AFTER, items.c.sample == 0, items.c.metadata.is_not(None))
    .order_by(*_IN_ORDER)
    .limit(bindparam("limit"))
)
_LAST = (last_try("message").label("error"), last_try("finish_reason").label("ending"))
_ERRORS = select(jobs.c.id, *_LAST).where(any_of(jobs.c.id, "ids"))
_USED = ("finish_reason", "input_tokens", "output_tokens", "cached_tokens", "cost_nanos", "latency_ms")
_OF_RESULT = {**results.c, "latency_ms": LATENCY}
_ENDED = [case((jobs.c.state == JobState.DONE, _OF_RESULT[name]), else_=last_try(name)) for name in _USED]
_LANE = case((jobs.c.state == JobState.DONE, func.coalesce(results.c.lane, "online")))
_USAGE = select(jobs.c.id, results.c.model, *_ENDED, jobs.c.attempts, _LANE).where(any_of(jobs.c.id, "ids"))
_USAGE = _USAGE.outerjoin_from(jobs, results, results.c.job_id == jobs.c.id)
_COOLDOWNS = select(limits.c.answerer, limits.c.cooldown_until, limits.c.reason)
_OUTAGES = select(outages.c.answerer, outages.c.since, outages.c.reason, outages.c.probe_at)
_LAST_IDX = select(runs_table.c.id).where(any_of(runs_table.c.id, "ids"))
_LAST_IDX = _LAST_IDX.add_columns(  # a subquery for each run, because a maximum by group reads all inputs
    select(items.c.idx).where(items.c.run_id == runs_table.c.id).order_by(items.c.idx.desc()).limit(1).scalar_subquery()
)
_OPEN = (
    select(counters_table.c.run_id)
    .where(counters_table.c.name.in_([JobState.PENDING, JobState.INFLIGHT]))
    .group_by(counters_table.c.run_id)
    .having(func.sum(counters_table.c.value) > 0)
)


class Cooldown(NamedTuple):
    """A model that no worker calls for some more seconds, and why."""

    answerer: str
    seconds: float
    reason: str


class OutageSeen(NamedTuple):
    """A model that all workers wait for: why, since when, and in how many seconds the next probe may start."""

    answerer: str
    reason: str
    seconds: float
    probe_seconds: float


class WorkerSeen(NamedTuple):
    """A worker as it last reported: jobs settled in all, and per second recently."""

    host: str
    pid: int
    concurrency: int
    settled: int
    rate: float
    up_seconds: float
    seen_seconds_ago: float

    @property
    def is_live(self) -> bool:
        """Whether it has reported recently."""
        return abs(self.seen_seconds_ago) * 1000 < SILENT_MS


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
        """How many jobs there are: one for each sample of each distinct input."""
        return sum(self.counts[state] for state in JobState)

    @property
    def open(self) -> int:
        """How many jobs are pending or in flight."""
        return self.counts[JobState.PENDING] + self.counts[JobState.INFLIGHT]

    @property
    def finished(self) -> bool:
        """Whether every input is in and every job has finished."""
        return self.open == 0 and self.run.sealed_at is not None

    @property
    def is_over(self) -> bool:
        """Whether the run is finished, or paused or cancelled without a call in flight."""
        return self.finished or (self.run.state != RunState.ACTIVE and not self.of(JobState.INFLIGHT))


@dataclass(frozen=True, slots=True)
class Overview:
    """Runs with their paces, workers, cooldowns, outages and limits at one moment."""

    now: Millis
    runs: list[RunCounts]
    workers: list[WorkerSeen]
    cooldowns: list[Cooldown]
    outages: list[OutageSeen]
    limits: list[LimitStatus]
    paces: dict[RunId, pulses.Pace]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job that was no plain success; tokens, cost and latency are None if they are not known."""

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
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class JobDetail:
    """Everything about one input's job. `settings` are its own, of a retry; None if it has none."""

    row: AnswerRow
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
    cached_tokens: int | None
    cost_nanos: int | None
    latency_ms: int | None
    reused: bool
    settings: dict[str, Json] | None
    tries: list[Attempt]


def find_run(connection: Connection, _now: Millis, name: str) -> Run:
    """Return the run of that name. Raises RunNotFoundError, which names the runs that there are."""
    return runs.find(connection, name)


def all_runs(connection: Connection, _now: Millis) -> list[Run]:
    """Return every run, oldest first."""
    return runs.all_runs(connection)


def open_runs(connection: Connection, _now: Millis, also: Collection[str] = ()) -> list[Run]:
    """Return the runs that still have jobs to do or inputs to come, and those of these names, oldest first."""
    named = runs_table.c.name.in_(also)
    return runs.all_runs(connection, or_(runs_table.c.sealed_at.is_(None), runs_table.c.id.in_(_OPEN), named))


def counts(connection: Connection, _now: Millis, run_ids: Iterable[RunId]) -> list[RunCounts]:
    """Return the runs of these ids with their counts, in the order of their ids."""
    return _counts(connection, runs.all_runs(connection, runs_table.c.id.in_(list(run_ids))))


def idle_runs(connection: Connection, now: Millis, age_ms: int) -> list[RunCounts]:
    """Return the finished and cancelled runs without a change for so long, but not those that `lbr move` holds.

    It reads all jobs.
    """
    known = _counts(connection, runs.all_runs(connection, runs_table.c.enqueued_at <= now - age_ms))
    found = [one for one in known if one.finished or one.run.state is RunState.CANCELLED]
    ended = select(jobs.c.run_id, func.max(jobs.c.finished_at)).where(jobs.c.run_id.in_([one.run.id for one in found]))
    last = {run_id: at or 0 for run_id, at in connection.execute(ended.group_by(jobs.c.run_id)).all()}
    changed = [max(one.run.sealed_at or 0, last.get(one.run.id, 0)) for one in found]
    old = (one for one, at in zip(found, changed, strict=True) if at <= now - age_ms)
    return [one for one in old if one.run.pause is None or not one.run.pause.cause.is_move]


def time(_connection: Connection, now: Millis) -> Millis:
    """Return the time of the database's clock."""
    return now


def overview(connection: Connection, now: Millis, name: str | Collection[str] | None = None) -> Overview:
    """Return one run, all of them, or the open ones and those named, with their counts; and the workers and limits."""
    if isinstance(name, str):
        found = [runs.find(connection, name)]
    else:
        found = runs.all_runs(connection) if name is None else open_runs(connection, now, name)
    counted = _counts(connection, found)
    seen = connection.execute(select(workers).order_by(workers.c.id)).all()
    cooling = connection.execute(_COOLDOWNS.where(limits.c.cooldown_until > now)).all()
    away = _OUTAGES.where(outages.c.since.is_not(None)).order_by(outages.c.answerer)
    return Overview(
        now=now,
        runs=counted,
        workers=[_worker(row, now) for row in seen],
        cooldowns=[Cooldown(who, (until - now) / 1000, why) for who, until, why in cooling if is_ahead(until, now)],
        outages=[
            OutageSeen(who, why, (now - since) / 1000, max(0, probe_at - now) / 1000)
            for who, since, why, probe_at in connection.execute(away).all()
        ],
        limits=all_limits(connection, now),
        paces=pulses.paces(connection, now, counted),
    )


def _worker(row: AnyRow, now: Millis) -> WorkerSeen:
    times = ((now - row.started_at) / 1000, (now - row.seen_at) / 1000)
    return WorkerSeen(row.host, row.pid, row.concurrency, row.settled, row.rate_milli / 1000, *times)


def _counts(connection: Connection, found: list[Run]) -> list[RunCounts]:
    ids = [run.id for run in found]
    by_run = counters.of_runs(connection, ids)
    rows = connection.execute(_LAST_IDX, {"ids": ids}).all()
    inputs = {run_id: 0 if idx is None else idx + 1 for run_id, idx in rows}
    return [RunCounts(run, inputs.get(run.id, 0), by_run[run.id]) for run in found]


async def rows(
    database: Database,
    run: Run,
    shape: Shape,
    states: Collection[str] = (),
    include: Container[str] = (),
    *,
    between: tuple[int, int] | None = None,
) -> AsyncIterator[list[AnswerRow]]:
    """Yield a run's rows in input order, page by page; each page is a short transaction of its own.

    `states` are those of the jobs to read, empty for all; `include` is what rows have beside their answers. `between`
    are the indexes before the first input and behind the last.
    """
    after = -1, 0
    query = _rows_of(shape, tuple(kind for kind in Extra if kind in include))
    if states:
        query = query.where(jobs.c.state.in_(states))
    if between is not None:
        after, until = (between[0], MAX_SAMPLES), between[1]
        query = query.where(items.c.idx < until)
    async for page in pages(lambda bound: database.read(_page, run, query, include, bound), after):
        yield list(page)


def places(connection: Connection, _now: Millis, run: Run, after: tuple[int, int]) -> list[tuple[int, int, str]]:
    """Return the index and the sample of some thousand rows behind `after`, each with the state of its job."""
    bound = {"run": run.id, "after": after[0], "after_sample": after[1]}
    return [(idx, sample, state) for idx, sample, state in connection.execute(_PLACES, bound).all()]


def rows_by_state(connection: Connection, _now: Millis, run: Run) -> dict[str, int]:
    """Return how many rows of a run there are in each state; this reads all of them."""
    query = _STATES.with_only_columns(jobs.c.state, func.count()).group_by(jobs.c.state)
    return {state: count for state, count in connection.execute(query, {"run": run.id}).all()}  # noqa: C416 - typed


def _page(
    connection: Connection, _now: Millis, run: Run, query: Select[Any], include: Container[str], bound: dict[str, int]
) -> tuple[int, list[AnswerRow]]:
    kept = tuple(kind for kind in Extra if kind in include)
    found = connection.execute(query, {"run": run.id, **bound}).all()
    bodies = [row[_BODY] for row in found]
    whole = found[: bodies.index(None)] if None in bodies else found
    page = _to_rows(connection, run, [row[: len(_COLLECTED)] for row in whole] if kept else whole)
    if kept:
        extras = (Extras(**dict(zip(kept, row[len(_COLLECTED) :], strict=True))) for row in whole)
        page = [replace(row, kept=one.to_dict(kept)) for row, one in zip(page, extras, strict=True)]
    if Include.USAGE in include:
        page = _with_usage(connection, page, [row.id for row in whole])
    return len(found), page


def _with_usage(connection: Connection, page: list[AnswerRow], ids: list[int]) -> list[AnswerRow]:
    """Return rows with what their jobs' last calls took."""
    found: Sequence[Any] = connection.execute(_USAGE, {"ids": list(set(ids))}).all()
    usages = {
        job_id: RowUsage(
            model, ending, read, written, cached, None if nanos is None else nanos / NANOS, ms, tried, lane
        )
        for job_id, model, ending, read, written, cached, nanos, ms, tried, lane in found
    }
    return [replace(row, usage=usages[job_id]) for row, job_id in zip(page, ids, strict=True)]


def _to_rows(connection: Connection, run: Run, found: Sequence[Sequence[Any]]) -> list[AnswerRow]:
    """Turn database rows into collected ones; a job that is not done gets the message of its last failed try."""
    done, failed = JobState.DONE, JobState.FAILED
    open_ids = list({row[_JOB_ID] for row in found if row[_STATE] != done})
    several = run.samples > 1
    last: dict[int, Any] = {}
    if open_ids:
        last = {row.id: row for row in connection.execute(_ERRORS, {"ids": open_ids}).all()}
    return [  # by position, in one expression: this runs for every row of a collect
        AnswerRow(
            idx,
            key.hex(),
            Prompt.from_body(body, chat=True) if chat else Prompt(body),
            state,
            text if state == done else None,
            last[job_id].error if job_id in last else None,
            _number(custom_id) if id_is_number else custom_id,
            None if metadata is None else json_object(metadata, "metadata"),
            (ending if state == done else state == failed and last[job_id].ending) == CUT_OFF,
            None,
            None,
            sample if several else None,
        )
        for idx, sample, custom_id, metadata, id_is_number, job_id, key, state, chat, body, text, ending in found
    ]


def _number(text: str) -> int:
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise DatabaseError(f"expected a stored id to be a whole number, got: {str(text)[:200]!r}") from error


def limits_answers(connection: Connection, _now: Millis, run: Run) -> bool:
    """Return whether the run's settings, or those of one of its jobs, limit the tokens of an answer."""
    query = select(prompts.c.settings).where(prompts.c.run_id == run.id, prompts.c.settings.is_not(None))
    own = connection.execute(query.distinct()).scalars()
    settings = [run.task.settings, *(orjson.loads(text) for text in own)]
    if any(output_limit(one) is not None for one in settings):
        return True
    limited = or_(*(prompts.c.body.contains(f'"{name}":') for name in ("max_tokens", "max_completion_tokens")))
    query = select(prompts.c.job_id).where(prompts.c.run_id == run.id, prompts.c.chat == 2, limited)
    return connection.scalar(query.limit(1)) is not None


async def columns(
    database: Database, run: Run, note: Callable[[dict[str, Json]], None] | None = None
) -> list[tuple[Part, str]]:
    """Return the columns of a run's inputs: those of the first input in their order, then those that others add.

    If the first input has no id but others have, the id comes first. `note` is called with the metadata of each input.
    """
    known = _first_columns(run)
    names: dict[str, None] = {}
    async for page in pages(lambda bound: database.read(_metadata_page, run, bound)):
        for row in page:
            fields = json_object(row.metadata, "metadata")
            names |= dict.fromkeys(fields)
            if note is not None:
                note(fields)
    found = [(part, name) for name, part in known.items()]
    if Part.ID not in known.values() and await database.read(_has_id, run):
        found.insert(0, (Part.ID, "id"))
    return found + [(Part.METADATA, name) for name in names if known.get(name) is not Part.METADATA]


def _metadata_page(connection: Connection, _now: Millis, run: Run, bound: dict[str, int]) -> tuple[int, list[AnyRow]]:
    rows = connection.execute(_METADATA, {"run": run.id, **bound}).all()
    return len(rows), list(takewhile(lambda row: row.metadata is not None, rows))


def _has_id(connection: Connection, _now: Millis, run: Run) -> bool:
    query = select(items.c.idx).where(items.c.run_id == run.id, items.c.custom_id.is_not(None)).limit(1)
    return connection.scalar(query) is not None


def typical_bytes(connection: Connection, _now: Millis, run: Run) -> int:
    """Return the root mean square of the bytes of a run's rows: few large ones weigh more than in the average."""
    sizes = [func.coalesce(byte_length(one), 0) for one in (prompts.c.body, results.c.text, items.c.metadata)]
    size = cast(sizes[0] + sizes[1] + sizes[2], Float)
    return int((connection.scalar(_inputs(func.avg(size * size)), {"run": run.id}) or 0) ** 0.5)


def _first_columns(run: Run) -> dict[str, Part]:
    """Return the columns that a run's first input had; only its prompt if they are not known."""
    if run.input_columns is None:
        return {"prompt": Part.PROMPT}
    what = f"columns of run {run.name!r}"
    try:
        return {name: Part(part) for name, part in json_object(run.input_columns, what).items()}
    except ValueError as error:
        raise DatabaseError(f"cannot read the {what}: {error}") from error


def story(connection: Connection, _now: Millis, run: Run, idx: int, sample: int = 0) -> JobDetail:
    """Return everything about a sample of the input at a place; UsageError if there is none."""
    if not 0 <= sample < run.samples:
        raise UsageError(f"expected a sample of run {run.name!r}, got: {sample}; there are 0 to {run.samples - 1}")
    bound = {"run": run.id, "idx": idx, "sample": sample}
    found = connection.execute(_DETAIL, bound).one_or_none() if 0 <= idx < 2**63 else None
    if found is None:
        last = connection.scalar(select(func.max(items.c.idx)).where(items.c.run_id == run.id))
        there = "none" if last is None else f"0 to {last}"
        raise UsageError(f"expected an input of run {run.name!r}, got: {idx}; there are {there}")
    tried = select(*(attempts.c[name] for name in Attempt.__slots__)).where(attempts.c.job_id == found.id)
    tries = [Attempt(*one) for one in connection.execute(tried.order_by(attempts.c.id)).all()]
    (row,) = _to_rows(connection, run, [found[: len(_COLLECTED)]])
    if run.keep:
        kept = select(*(extras_table.c[kind] for kind in Extra)).where(extras_table.c.job_id == found.id)
        row = replace(row, kept=Extras(*(connection.execute(kept).one_or_none() or ())).to_dict(run.keep))
    stored = [name for name in JobDetail.__slots__ if name not in {"row", "reused", "settings", "tries"}]
    fields = {name: getattr(found, name) for name in stored}
    own = None if found.settings is None else json_object(found.settings, "settings of a job")
    return JobDetail(row=row, reused=found.reused_from is not None, settings=own, tries=tries, **fields)
