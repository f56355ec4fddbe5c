"""Jobs that the user has redone: chosen by how they ended, or validated again from their kept answers.

Each page is read without a lock and written in a short transaction, which takes only jobs that are as they were read.
So a call is safe to repeat, and one that was killed has done some of the pages.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import ColumnElement, Select, bindparam, case, delete, func, literal, literal_column, select, update

from lbr.core.errors import UNREAD, Family, UsageError
from lbr.core.retry import failure_of
from lbr.core.types import JobState, Json, RunState
from lbr.store import counters, reads, runs
from lbr.store.schema import attempts, extras, jobs, prompts, results
from lbr.store.settle import ADD_RESULTS
from lbr.store.sql import any_of, json_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from sqlalchemy import Connection

    from lbr.core.types import Millis, Run
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

LOOK = 5_000
"""Jobs that one transaction reads."""
PAGE = 500
"""Jobs that one transaction puts back, with their answers."""
REPARSE_PAGE = 200
"""Failed jobs that one transaction reads with their kept answers."""

FORMS = (
    f"family={'|'.join(Family)}, error~TEXT, finish_reason=WORD or "
    f"status={JobState.FAILED}|{JobState.CANCELLED}|{JobState.DONE}"
)
_FORM = re.compile(r"\s*(?:(family|finish_reason|status)\s*=|(error)\s*~)(.*)", re.DOTALL)
_STATES = {
    "family": frozenset({JobState.FAILED}),
    "error": frozenset({JobState.FAILED}),
    "finish_reason": frozenset({JobState.DONE, JobState.FAILED}),
    "status": frozenset({JobState.FAILED, JobState.CANCELLED, JobState.DONE}),
}
_KNOWN = {"family": frozenset(Family), "status": _STATES["status"]}


def _page_of(query: Select[Any]) -> Select[Any]:
    """Return the first jobs of a query behind a job, of a run's jobs in some states."""
    chosen = (jobs.c.run_id == bindparam("run"), jobs.c.state.in_(bindparam("states", expanding=True)))
    return query.where(jobs.c.id > bindparam("after"), *chosen).order_by(jobs.c.id).limit(bindparam("limit"))


def _of_failure(name: str) -> ColumnElement[Any]:
    return case((jobs.c.state == JobState.FAILED, reads.last_try(name))).label(name)


_SEEN = (jobs.c.id, jobs.c.state, jobs.c.claim_seq)
ENDED = (
    select(*_SEEN, *map(_of_failure, ("family", "error", "message")))
    .add_columns(func.coalesce(_of_failure("finish_reason"), results.c.finish_reason).label("finish_reason"))
    .outerjoin_from(jobs, results, results.c.job_id == jobs.c.id)
)
"""Jobs with all that a `Condition` looks at."""
_ENDED = _page_of(ENDED)
_USAGE = ("input_tokens", "output_tokens", "cost_nanos", "cached_tokens")
_RESULT = ("finish_reason", *_USAGE)
_LAST_TEXTS = _page_of(
    select(*_SEEN, *(reads.last_try(name).label(name) for name in ("family", "error", "text", "latency_ms", *_RESULT)))
    .add_columns(prompts.c.settings)
    .join_from(jobs, prompts, prompts.c.job_id == jobs.c.id)
)
_LOCKED = select(*_SEEN).where(any_of(jobs.c.id, "ids")).order_by(jobs.c.id).with_for_update()
# In this order, because an enqueue that reuses answers locks them in it.
_ANSWERS = (
    select(results.c.job_id, results.c.reused_from)
    .where(any_of(results.c.job_id, "ids"))
    .order_by(results.c.job_id)
    .with_for_update()
)
_ATTEMPT: dict[str, ColumnElement[Any]] = {
    "job_id": jobs.c.id,
    "claim_seq": jobs.c.claim_seq,
    "what": literal_column("'retried'"),
    "error": literal_column("'Redone'"),
    "message": case(
        (results.c.reused_from.is_(None), literal("its answer was redone on request")),
        else_=literal("its answer, reused from another run, was redone on request"),
    ),
    **{name: results.c[name] for name in ("text", "finish_reason", "latency_ms")},
    **{name: counters.own_usage(results.c[name]) for name in _USAGE},
    "at": bindparam("now", type_=attempts.c.at.type),
}
_KEEP_ANSWERS = attempts.insert().from_select(
    list(_ATTEMPT),
    select(*_ATTEMPT.values())
    .join_from(results, jobs, results.c.job_id == jobs.c.id)
    .where(any_of(results.c.job_id, "ids"))
    .order_by(results.c.job_id),
    include_defaults=False,
)
_REMOVE_ANSWERS = delete(results).where(any_of(results.c.job_id, "ids"))
_REMOVE_EXTRAS = delete(extras).where(any_of(extras.c.job_id, "ids"))
_SET = update(prompts).where(any_of(prompts.c.job_id, "ids")).values(settings=bindparam("own"))


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on the jobs to redo: what of them must be `value`, or, of error, contain it."""

    name: str
    value: str

    @property
    def states(self) -> frozenset[JobState]:
        """The states of the jobs that can meet it."""
        return frozenset({JobState(self.value)}) if self.name == "status" else _STATES[self.name]

    def holds(self, row: AnyRow) -> bool:
        """Return whether a job of `ENDED` meets it."""
        if self.name == "error":
            return self.value.casefold() in f"{row.error or ''}\n{row.message or ''}".casefold()
        return bool(getattr(row, "state" if self.name == "status" else self.name) == self.value)


@dataclass(frozen=True, slots=True)
class Reparsed:
    """The result of validating kept answers again.

    `taken` fit and are their jobs' answers now, `left` still do not; `problem` is what is wrong with the first of
    those, None if there is none.
    """

    taken: int = 0
    left: int = 0
    problem: str | None = None


def read_conditions(texts: Sequence[str]) -> list[Condition]:
    """Read conditions as users write them; UsageError for an unknown form, and if no job could meet them all."""
    conditions = [_read_condition(text) for text in texts]
    if not _states_of(conditions):
        raise UsageError(
            f"no job can meet all of these conditions: {' and '.join(texts)}; family and error are of failed jobs, "
            f"finish_reason of failed and done ones"
        )
    return conditions


def _states_of(conditions: Sequence[Condition]) -> frozenset[JobState]:
    """Return the states of the jobs that can meet all conditions; without any, those of jobs without an answer."""
    if not conditions:
        return frozenset({JobState.FAILED, JobState.CANCELLED})
    return frozenset.intersection(*(one.states for one in conditions))


def _read_condition(text: str) -> Condition:
    form = _FORM.fullmatch(text)
    name, value = (form[1] or form[2], form[3].strip()) if form else ("", "")
    if not value or value not in _KNOWN.get(name, {value}):
        raise UsageError(f"expected a condition of the form {FORMS}, got: {text!r}")
    return Condition(name, value)


async def retry(
    database: Database, run: Run, conditions: Sequence[Condition] = (), settings: Mapping[str, Json] | None = None
) -> int:
    """Put the jobs that meet all conditions back to pending with all their tries; return how many.

    Without conditions these are the failed and cancelled jobs. An answer that is redone is kept among its job's
    tries. `settings` become the jobs' own and replace those of an earlier retry; None leaves them. A cancelled run
    becomes active again; if it is cancelled meanwhile, this ends early. UsageError for a run that is being moved.
    """
    runs.check_not_moving(run)
    await database.write(runs.revive, run)
    states = _states_of(conditions)
    (counted,) = await database.read(reads.counts, [run.id])
    if not any(counted.of(state) for state in states):
        return 0
    own = None if settings is None else orjson.dumps(dict(settings)).decode()
    moved = 0
    async for rows in _pages(database, _ENDED, run, states, LOOK):
        found = [row for row in rows if all(one.holds(row) for one in conditions)]
        for start in range(0, len(found), PAGE):
            put = await database.write(_put_back, run, found[start : start + PAGE], own)
            if put is None:
                return moved
            moved += put
    return moved


async def _pages(
    database: Database, query: Select[Any], run: Run, states: frozenset[JobState], limit: int
) -> AsyncIterator[Sequence[AnyRow]]:
    after = 0
    while True:
        bound = {"run": run.id, "after": after, "states": sorted(states), "limit": limit}
        rows = await database.read(_execute, query, bound)
        yield rows
        if len(rows) < limit:
            return
        after = rows[-1].id


def _execute(connection: Connection, _now: Millis, query: Select[Any], bound: dict[str, Any]) -> Sequence[AnyRow]:
    return connection.execute(query, bound).all()


def _put_back(connection: Connection, now: Millis, run: Run, page: list[AnyRow], own: str | None) -> int | None:
    """Put those of a page back that are as they were; return how many, None if the run was cancelled meanwhile."""
    if runs.hold_unmoved(connection, run).state is RunState.CANCELLED:
        return None
    unchanged = _lock_unchanged(connection, page)
    if not unchanged:
        return 0
    ids = {"ids": [row.id for row in unchanged]}
    answers = connection.execute(_ANSWERS, ids).all()
    if answers:
        answered = {"ids": [row.job_id for row in answers]}
        connection.execute(_KEEP_ANSWERS, answered | {"now": now})
        connection.execute(_REMOVE_ANSWERS, answered)
        if run.keep:
            connection.execute(_REMOVE_EXTRAS, answered)
    if own is not None:
        connection.execute(_SET, ids | {"own": own})
    runs.move_page(connection, run, unchanged, JobState.PENDING, now)
    reused = sum(row.reused_from is not None for row in answers)
    counters.add(connection, Counter({(run.id, counters.REUSED): -reused}))
    return len(unchanged)


def _lock_unchanged(connection: Connection, seen: Sequence[AnyRow]) -> list[AnyRow]:
    """Lock jobs and return those that are as they were seen; nothing else of them can have changed then."""
    before = {row.id: (row.state, row.claim_seq) for row in seen}
    rows = connection.execute(_LOCKED, {"ids": list(before)}).all()
    return [row for row in rows if (row.state, row.claim_seq) == before[row.id]]


async def reparse(database: Database, run: Run, check: Callable[[str], str]) -> Reparsed:
    """Validate the kept text of failed jobs whose last try was a bad answer; those that fit are done.

    `check` returns the answer to keep, or raises. No call is made. UsageError for a run that is being moved.
    """
    runs.check_not_moving(run)
    taken, left, problem = 0, 0, None
    async for rows in _pages(database, _LAST_TEXTS, run, frozenset({JobState.FAILED}), REPARSE_PAGE):
        fitting: dict[int, dict[str, Any]] = {}
        for row in filter(_is_bad_answer, rows):
            # Outside of any transaction, because it may take long.
            try:
                fitting[row.id] = _result(run, row, check(row.text))
            except Exception as error:  # noqa: BLE001 - a class of the user's own may raise anything
                problem = problem or failure_of(error).message
                left += 1
        if fitting:
            seen = [row for row in rows if row.id in fitting]
            taken += await database.write(_take, run, seen, fitting)
    return Reparsed(taken, left, problem)


def _is_bad_answer(row: AnyRow) -> bool:
    return row.family in {Family.BAD_ANSWER, Family.CUT_OFF} and row.text is not None and row.error not in UNREAD


def _result(run: Run, kept: AnyRow, text: str) -> dict[str, Any]:
    """Return the row of an answer. The provider's name for its model is not kept with a bad answer."""
    settings = {} if kept.settings is None else json_object(kept.settings, "settings of a job")
    model = settings.get("model", run.task.model)
    own = {"job_id": kept.id, "text": text, "model": model, "latency_ms": kept.latency_ms or 0}
    return own | {name: getattr(kept, name) for name in _RESULT}


def _take(connection: Connection, now: Millis, run: Run, seen: list[AnyRow], fitting: dict[int, dict[str, Any]]) -> int:
    """Write answers of jobs that are as they were seen; their usage was counted with their tries."""
    runs.hold_unmoved(connection, run)
    unchanged = _lock_unchanged(connection, seen)
    ADD_RESULTS.run(connection, [fitting[row.id] for row in unchanged])
    runs.move_page(connection, run, unchanged, JobState.DONE, now)
    return len(unchanged)
