"""What a page in a browser shows of jobs: each read looks at a bounded number of them. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import bindparam, func, or_, select, tuple_

from lbr.core.errors import UsageError
from lbr.core.pulses import MINUTE_MS
from lbr.core.types import JobState, Millis, Run, RunId
from lbr.store import redo, runs
from lbr.store.batches import row_of
from lbr.store.pulses import HOUR
from lbr.store.reads import JobDetail, last_try, story
from lbr.store.schema import FAILED, INFLIGHT, PENDING, items, jobs, prompts, pulses, results, workers
from lbr.store.schema import batches as batches_table
from lbr.store.schema import runs as runs_table
from lbr.store.sql import any_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Select

    from lbr.core.batches import BatchRow
    from lbr.store.redo import Condition
    from lbr.store.schema import AnyRow

SHOWN = 50
LOOK = 2_000
"""Jobs that one read looks at to find those that match."""
LOOK_TEXTS = 500
"""As above, where prompts and answers are searched."""
CUT = 300
"""Characters of a prompt, an answer and a message that a list shows."""
NEAR = 1_000
"""Jobs of other runs between two of a run that are passed over."""
MAX_FAILED = 2_000
"""The newest failed jobs, whose errors are grouped."""

_WITHIN = (jobs.c.run_id == bindparam("run"), jobs.c.id > bindparam("after"))
_QUEUE = tuple_(jobs.c.available_at, jobs.c.id)
_AFTER = tuple_(bindparam("available", type_=jobs.c.available_at.type), bindparam("after", type_=jobs.c.id.type))
_ONE = (jobs.c.id, jobs.c.run_id, jobs.c.state, jobs.c.available_at)


def _some(*conditions: Any) -> Select[Any]:
    return select(*_ONE).where(*conditions).order_by(jobs.c.id).limit(bindparam("look"))


# By the partial indexes, or along the table, where jobs of other runs may lie between.
LOOKS: dict[str, Select[Any]] = {
    JobState.FAILED: _some(FAILED, *_WITHIN),
    JobState.INFLIGHT: _some(INFLIGHT, *_WITHIN),
    JobState.PENDING: select(*_ONE)
    .where(PENDING, jobs.c.run_id == bindparam("run"), _QUEUE > _AFTER)
    .order_by(jobs.c.available_at, jobs.c.id)
    .limit(bindparam("look")),
    "": _some(jobs.c.id > bindparam("after")),
}
_FIRST = select(items.c.job_id).where(items.c.run_id == bindparam("run")).order_by(items.c.idx, items.c.sample).limit(1)
_PLACES = select(prompts.c.job_id, prompts.c.idx, func.coalesce(prompts.c.sample, 0).label("sample")).where(
    any_of(prompts.c.job_id, "ids"), prompts.c.idx.is_not(None)
)
# Of jobs that older versions wrote: no index leads from them to their inputs, so this reads the run's inputs.
_OLD_PLACES = select(items.c.job_id, items.c.idx, items.c.sample).where(
    items.c.run_id == bindparam("run"), items.c.first == 1, any_of(items.c.job_id, "ids")
)
_USED = ("input_tokens", "output_tokens", "cost_nanos", "latency_ms")
SHORT = (
    select(jobs.c.id, jobs.c.state, prompts.c.chat, func.substr(prompts.c.body, 1, 2 * CUT).label("body"))
    .add_columns(func.substr(results.c.text, 1, CUT).label("answer"))
    .add_columns(*(func.coalesce(results.c[name], last_try(name)).label(name) for name in _USED))
    .add_columns(last_try("error").label("error"), func.substr(last_try("message"), 1, CUT).label("message"))
    .join_from(jobs, prompts, prompts.c.job_id == jobs.c.id)
    .outerjoin(results, results.c.job_id == jobs.c.id)
    .where(any_of(jobs.c.id, "ids"))
)
FAILURES = (
    select(jobs.c.id, *(last_try(name).label(name) for name in ("family", "error")))
    .add_columns(func.substr(last_try("message"), 1, CUT).label("message"))
    .where(FAILED, jobs.c.run_id == bindparam("run"))
    .order_by(jobs.c.id.desc())
    .limit(MAX_FAILED)
)
SPARKS = (
    select(pulses.c.run_id, pulses.c.minute, func.sum(pulses.c.done + pulses.c.failed).label("ended"))
    .where(any_of(pulses.c.run_id, "runs"), pulses.c.minute > bindparam("first"))
    .group_by(pulses.c.run_id, pulses.c.minute)
)
_HELD = (
    select(jobs.c.worker_id, func.count(), workers.c.host, workers.c.pid)
    .join_from(jobs, workers, workers.c.id == jobs.c.worker_id)
    .where(INFLIGHT)
    .group_by(jobs.c.worker_id, workers.c.host, workers.c.pid)
)
_BATCHES = (
    select(batches_table, runs_table.c.name.label("run"))
    .join_from(batches_table, runs_table, runs_table.c.id == batches_table.c.run_id)
    .order_by(batches_table.c.id.desc())
    .limit(SHOWN)
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs of a run to show: in a state, meeting conditions, with a text in their prompt or answer."""

    state: str = ""
    conditions: Sequence[Condition] = ()
    text: str = ""


class Place(NamedTuple):
    """Where a list goes on: behind a job and, among pending ones, behind the time from which it may be claimed."""

    job: int = 0
    available: int = 0


class Page(NamedTuple):
    """Jobs that match, as rows of `SHORT`, with the first input of each: its index and sample.

    `next` is where the next page begins, None if all were looked at; `looked_to` is the index of the last input looked at.
    """

    rows: list[AnyRow]
    places: dict[int, tuple[int, int]]
    next: Place | None
    looked_to: int | None


def page(connection: Connection, _now: Millis, run: Run, given: Filter, after: Place) -> Page:
    """Return the next jobs of a run that match, after looking at a bounded number of them."""
    narrow = bool(given.conditions or given.text)
    look = LOOK_TEXTS if given.text else LOOK if narrow or given.state not in LOOKS else SHOWN + 1
    first = max(after.job, (connection.scalar(_FIRST, {"run": run.id}) or 1) - 1)
    bound = {"run": run.id, "after": first, "available": after.available, "look": look}
    if given.state == JobState.PENDING:
        bound["after"] = after.job
    seen = connection.execute(LOOKS.get(given.state, LOOKS[""]), bound).all()
    mine = [row for row in seen if row.run_id == run.id and given.state in {"", row.state}]
    found = _matching(connection, mine, given) if narrow else mine
    shown, last = found[:SHOWN], seen[-1] if seen else None
    if len(found) > SHOWN:
        last = shown[-1]
    elif len(seen) < look:
        last = None
    ids = [row.id for row in shown]
    places = _places(connection, run, [*ids, *([last.id] if last is not None else [])])
    rows = {row.id: row for row in connection.execute(SHORT, {"ids": ids}).all()}
    looked_to = None if last is None else places.get(last.id, (None,))[0]
    following = None if last is None else Place(last.id, last.available_at)
    return Page([rows[one] for one in ids if one in rows], places, following, looked_to)


def _matching(connection: Connection, rows: list[AnyRow], given: Filter) -> list[AnyRow]:
    ids = [row.id for row in rows]
    if given.conditions:
        seen = connection.execute(redo.ENDED.where(any_of(jobs.c.id, "ids")), {"ids": ids}).all()
        ids = [row.id for row in seen if all(one.holds(row) for one in given.conditions)]
    if given.text:
        there = or_(*(one.icontains(given.text, autoescape=True) for one in (prompts.c.body, results.c.text)))
        query = select(prompts.c.job_id).outerjoin(results, results.c.job_id == prompts.c.job_id)
        ids = list(connection.execute(query.where(any_of(prompts.c.job_id, "ids"), there), {"ids": ids}).scalars())
    matching = set(ids)
    return [row for row in rows if row.id in matching]


def _places(connection: Connection, run: Run, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the index and the sample of the first inputs of jobs."""
    found = list(connection.execute(_PLACES, {"ids": list(ids)}).all()) if ids else []
    if missing := set(ids) - {row.job_id for row in found}:
        found += connection.execute(_OLD_PLACES, {"run": run.id, "ids": list(missing)}).all()
    return {row.job_id: (row.idx, row.sample) for row in found}


def failures(connection: Connection, _now: Millis, run: Run) -> list[AnyRow]:
    """Return why jobs of a run failed, the newest first, of which there may be more than are returned."""
    return list(connection.execute(FAILURES, {"run": run.id}).all())


class JobPage(NamedTuple):
    """Everything about one job, with its run and the jobs of that run before and behind it; None without one."""

    run: Run
    detail: JobDetail
    previous: int | None
    next: int | None


def job(connection: Connection, now: Millis, job_id: int) -> JobPage:
    """Return everything about a job. Raises UsageError if there is none."""
    run_id = connection.scalar(select(jobs.c.run_id).where(jobs.c.id == job_id)) if job_id < 2**63 else None
    found = [] if run_id is None else runs.all_runs(connection, runs_table.c.id == run_id)
    places = _places(connection, found[0], [job_id]) if found else {}
    if job_id not in places:
        raise UsageError(f"there is no job {job_id}; its run may have been removed")
    detail = story(connection, now, found[0], *places[job_id])
    return JobPage(found[0], detail, *(_neighbour(connection, job_id, found[0], ahead=way) for way in (False, True)))


def _neighbour(connection: Connection, job_id: int, run: Run, *, ahead: bool) -> int | None:
    where, order = (jobs.c.id > job_id, jobs.c.id) if ahead else (jobs.c.id < job_id, jobs.c.id.desc())
    query = select(jobs.c.id, jobs.c.run_id).where(where).order_by(order).limit(NEAR)
    near = query.subquery()
    inner = near.c.id if ahead else near.c.id.desc()
    found: int | None = connection.scalar(select(near.c.id).where(near.c.run_id == run.id).order_by(inner).limit(1))
    return found


def sparks(connection: Connection, now: Millis, ids: Sequence[RunId]) -> dict[RunId, list[int]]:
    """Return how many jobs of each run ended in each minute of the last hour, this minute last."""
    first = now // MINUTE_MS - HOUR
    found = {run_id: [0] * HOUR for run_id in ids}
    for row in connection.execute(SPARKS, {"runs": list(ids), "first": first}).all():
        if row.minute - first <= HOUR:
            found[row.run_id][row.minute - first - 1] = int(row.ended)
    return found


def batches(connection: Connection, _now: Millis) -> list[tuple[BatchRow, str]]:
    """Return the newest batches, the newest first, each with the name of its run."""
    return [(row_of(row), row.run) for row in connection.execute(_BATCHES).all()]


def held(connection: Connection, _now: Millis) -> dict[tuple[str, int], int]:
    """Return how many jobs each worker holds, by host and process."""
    return {(host, pid): count for _, count, host, pid in connection.execute(_HELD).all()}
