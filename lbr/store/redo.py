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
from sqlalchemy import ColumnElement, bindparam, case, delete, literal, literal_column, select, update

from lbr.core.errors import UNREAD, Family, UsageError
from lbr.core.retry import failure_of
from lbr.core.types import JobState, Json, RunState
from lbr.store import counters, runs
from lbr.store.schema import attempts, jobs, prompts, results
from lbr.store.settle import ADD_RESULTS
from lbr.store.sql import any_of

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

_ENDED = (
    select(jobs.c.id, jobs.c.state, jobs.c.claim_seq, results.c.finish_reason)
    .outerjoin_from(jobs, results, results.c.job_id == jobs.c.id)
    .where(jobs.c.run_id == bindparam("run"), jobs.c.id > bindparam("after"))
    .where(jobs.c.state.in_(bindparam("states", expanding=True)))
    .order_by(jobs.c.id)
    .limit(bindparam("limit"))
)
_TRIES = (
    select(*(attempts.c[name] for name in ("id", "job_id", "family", "error", "message", "finish_reason")))
    .where(any_of(attempts.c.job_id, "ids"), attempts.c.what != "stale")
    .order_by(attempts.c.id)
)
_KEPT_TEXTS = (
    select(attempts)
    .where(any_of(attempts.c.id, "ids"), attempts.c.text.is_not(None))
    .where(attempts.c.error.not_in(sorted(UNREAD)))
    .order_by(attempts.c.job_id)
)
_LOCKED = (
    select(jobs.c.id, jobs.c.state, jobs.c.claim_seq)
    .where(any_of(jobs.c.id, "ids"))
    .order_by(jobs.c.id)
    .with_for_update()
)
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
    **{name: counters.own_usage(results.c[name]) for name in ("input_tokens", "output_tokens", "cost_nanos")},
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

    def holds(self, row: AnyRow, last: AnyRow | None) -> bool:
        """Return whether a job meets it; `last` is its latest failed try, None if there is none."""
        match self.name:
            case "finish_reason":
                return bool((row if last is None else last).finish_reason == self.value)
            case "family":
                return last is not None and last.family == self.value
            case "error":
                text = "" if last is None else f"{last.error}\n{last.message}"
                return self.value.casefold() in text.casefold()
        return True


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
    database: Database,
    run: Run,
    conditions: Sequence[Condition] = (),
    settings: Mapping[str, Json] | None = None,
) -> int:
    """Put the jobs that meet all conditions back to pending with all their tries; return how many.

    Without conditions these are the failed and cancelled jobs. An answer that is redone is kept among its job's
    tries. `settings` become the jobs' own and replace those of an earlier retry; None leaves them. A cancelled run
    becomes active again; if it is cancelled meanwhile, this ends early. UsageError for a run that is being moved.
    """
    runs.check_not_moving(run)
    await database.write(runs.revive, run)
    states = _states_of(conditions)
    counted = await database.read(_counts, run)
    if not any(counted[state] for state in states):
        return 0
    own = None if settings is None else orjson.dumps(dict(settings)).decode()
    moved = 0
    async for rows, tries in _ended(database, run, states, LOOK, with_tries=bool(conditions)):
        found = [row for row in rows if all(one.holds(row, tries.get(row.id)) for one in conditions)]
        for start in range(0, len(found), PAGE):
            put = await database.write(_put_back, run, found[start : start + PAGE], own)
            if put is None:
                return moved
            moved += put
    return moved


async def _ended(
    database: Database, run: Run, states: frozenset[JobState], limit: int, *, with_tries: bool = True
) -> AsyncIterator[tuple[Sequence[AnyRow], dict[int, AnyRow]]]:
    """Yield pages of the jobs in these states, with the latest tries, by job, of those that failed."""
    after = 0
    while True:
        rows, tries = await database.read(_ended_page, run, states, after, limit, with_tries=with_tries)
        if rows:
            yield rows, tries
            after = rows[-1].id
        if len(rows) < limit:
            return


def _counts(connection: Connection, _now: Millis, run: Run) -> Counter[str]:
    return counters.of_runs(connection, [run.id])[run.id]


def _ended_page(
    connection: Connection,
    _now: Millis,
    run: Run,
    states: frozenset[JobState],
    after: int,
    limit: int,
    *,
    with_tries: bool,
) -> tuple[Sequence[AnyRow], dict[int, AnyRow]]:
    bound = {"run": run.id, "after": after, "states": sorted(states), "limit": limit}
    rows = connection.execute(_ENDED, bound).all()
    failed = [row.id for row in rows if row.state == JobState.FAILED]
    if not (failed and with_tries):
        return rows, {}
    tries = connection.execute(_TRIES, {"ids": failed}).all()
    return rows, {row.job_id: row for row in tries}


def _put_back(connection: Connection, now: Millis, run: Run, page: list[AnyRow], own: str | None) -> int | None:
    """Put those of a page back that are as they were; return how many, None if the run was cancelled meanwhile."""
    if _hold(connection, run).state is RunState.CANCELLED:
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
    if own is not None:
        connection.execute(_SET, ids | {"own": own})
    moving = [(row.id, row.state) for row in unchanged]
    runs.move_page(connection, run, moving, JobState.PENDING, now)
    reused = sum(row.reused_from is not None for row in answers)
    counters.add(connection, Counter({(run.id, counters.REUSED): -reused}))
    return len(unchanged)


def _hold(connection: Connection, run: Run) -> Run:
    """Return the run, which stays as it is until the transaction ends; UsageError if it is being moved."""
    runs.hold_states(connection, [run.id])
    current = runs.find(connection, run.name)
    runs.check_not_moving(current)
    return current


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
    async for rows, tries in _ended(database, run, frozenset({JobState.FAILED}), REPARSE_PAGE):
        ids = [one.id for one in tries.values() if one.family in {Family.BAD_ANSWER, Family.CUT_OFF}]
        if not ids:
            continue
        found = await database.read(_kept_texts, ids)
        fitting: dict[int, dict[str, Any]] = {}
        for one in found:
            # Outside of any transaction, because it may take long.
            try:
                fitting[one.job_id] = _result(run, one, check(one.text))
            except Exception as error:  # noqa: BLE001 - a class of the user's own may raise anything
                problem = problem or failure_of(error).message
                left += 1
        if fitting:
            seen = [row for row in rows if row.id in fitting]
            taken += await database.write(_take, run, seen, fitting)
    return Reparsed(taken, left, problem)


def _kept_texts(connection: Connection, _now: Millis, ids: list[int]) -> Sequence[AnyRow]:
    return connection.execute(_KEPT_TEXTS, {"ids": ids}).all()


def _result(run: Run, kept: AnyRow, text: str) -> dict[str, Any]:
    """Return the row of an answer. The provider's name for its model is not kept with a bad answer."""
    copied = ("job_id", "finish_reason", "input_tokens", "output_tokens", "cost_nanos")
    fields = {name: getattr(kept, name) for name in copied}
    return fields | {"text": text, "model": run.task.model, "latency_ms": kept.latency_ms or 0}


def _take(connection: Connection, now: Millis, run: Run, seen: list[AnyRow], fitting: dict[int, dict[str, Any]]) -> int:
    """Write answers of jobs that are as they were seen; their usage was counted with their tries."""
    _hold(connection, run)
    unchanged = _lock_unchanged(connection, seen)
    ADD_RESULTS.run(connection, [fitting[row.id] for row in unchanged])
    moving = [(row.id, row.state) for row in unchanged]
    runs.move_page(connection, run, moving, JobState.DONE, now)
    return len(unchanged)
