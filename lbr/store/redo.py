"""Jobs that a person has redone: chosen by how they ended, answered ones among them, or validated once more.

Every page is looked for without a lock and written in a short transaction of its own, which takes what is still as
it was seen. So each call is safe to repeat, and one that was killed has done some of the pages.
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
from lbr.core.types import JobState, Json, Millis, RunState
from lbr.store import counters, runs
from lbr.store.schema import attempts, jobs, prompts, results
from lbr.store.settle import ADD_RESULTS
from lbr.store.sql import BulkStatement, Rows, any_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lbr.core.types import Run
    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

LOOK = 5_000
"""How many jobs one look has before it."""

PAGE = 500
"""How many jobs one transaction puts back: their answers are written once more."""

REPARSE_PAGE = 200
"""How many failed jobs are looked at for kept answers, which are all read."""

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

_AT_REST = (
    select(jobs.c.id, jobs.c.state, jobs.c.claim_seq, results.c.finish_reason)
    .outerjoin_from(jobs, results, results.c.job_id == jobs.c.id)
    .where(
        jobs.c.run_id == bindparam("run"),
        jobs.c.id > bindparam("after"),
        jobs.c.state.in_(bindparam("states", expanding=True)),
    )
    .order_by(jobs.c.id)
    .limit(bindparam("most"))
)
_TRIES = (
    select(*(attempts.c[name] for name in ("id", "job_id", "family", "error", "message", "finish_reason")))
    .where(any_of(attempts.c.job_id, "ids"), attempts.c.what != "stale")
    .order_by(attempts.c.id)
)
_BAD = (
    select(attempts)
    .where(
        any_of(attempts.c.id, "ids"),
        attempts.c.text.is_not(None),
        attempts.c.error.not_in(sorted(UNREAD)),
    )
    .order_by(attempts.c.job_id)
)
_LOCKED = (
    select(jobs.c.id, jobs.c.state, jobs.c.claim_seq)
    .where(any_of(jobs.c.id, "ids"))
    .order_by(jobs.c.id)
    .with_for_update()
)
# In this order, for an enqueue that reuses answers holds them in it.
_ANSWERS = (
    select(results.c.job_id, results.c.reused_from)
    .where(any_of(results.c.job_id, "ids"))
    .order_by(results.c.job_id)
    .with_for_update()
)

_KEPT: dict[str, ColumnElement[Any]] = {
    "job_id": jobs.c.id,
    "claim_seq": jobs.c.claim_seq,
    "what": literal_column("'retried'"),
    "error": literal_column("'Redone'"),
    "message": case(
        (results.c.reused_from.is_(None), literal("its answer was asked for again by hand")),
        else_=literal("its answer, reused from another run, was asked for again by hand"),
    ),
    "text": results.c.text,
    "finish_reason": results.c.finish_reason,
    "input_tokens": counters.own_usage(results.c.input_tokens),
    "output_tokens": counters.own_usage(results.c.output_tokens),
    "cost_nanos": counters.own_usage(results.c.cost_nanos),
    "latency_ms": results.c.latency_ms,
    "at": bindparam("now", type_=attempts.c.at.type),
}
_KEEP_ANSWERS = attempts.insert().from_select(
    list(_KEPT),
    select(*_KEPT.values())
    .join_from(results, jobs, results.c.job_id == jobs.c.id)
    .where(any_of(results.c.job_id, "ids"))
    .order_by(results.c.job_id),
    include_defaults=False,
)
_REMOVE_ANSWERS = delete(results).where(any_of(results.c.job_id, "ids"))
_SET = update(prompts).where(any_of(prompts.c.job_id, "ids")).values(settings=bindparam("own"))


def _taking(given: Rows) -> Any:
    return update(jobs).where(jobs.c.id == given["job"]).values(state=given["to"], finished_at=given["at"])


_TAKE = BulkStatement(
    {"job": jobs.c.id.type, "to": jobs.c.state.type, "at": jobs.c.finished_at.type}, _taking
)


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on the jobs to redo: `name` is what of them, `value` what it must be or, for error, contain."""

    name: str
    value: str

    @property
    def states(self) -> frozenset[JobState]:
        """The states of the jobs that can meet it."""
        return frozenset({JobState(self.value)}) if self.name == "status" else _STATES[self.name]

    def holds(self, row: AnyRow, last: AnyRow | None) -> bool:
        """Tell whether a job meets it, given its latest try that was no plain success, None where there is none."""
        match self.name:
            case "finish_reason":
                ending = row.finish_reason if last is None else last.finish_reason
                return bool(ending == self.value)
            case "family":
                return last is not None and last.family == self.value
            case "error":
                words = "" if last is None else f"{last.error}\n{last.message}"
                return self.value.casefold() in words.casefold()
        return True


@dataclass(frozen=True, slots=True)
class Reparsed:
    """What validating kept answers again came to.

    `taken` fit and are their jobs' answers now, `left` still do not; `problem` says what is wrong with the first of
    those, None where there is none.
    """

    taken: int = 0
    left: int = 0
    problem: str | None = None


def read_conditions(texts: Sequence[str]) -> list[Condition]:
    """Read conditions as users write them; UsageError for an unknown form, and where no job could meet them all."""
    conditions = [_read_condition(text) for text in texts]
    if not _states_of(conditions):
        raise UsageError(
            f"expected conditions that one job can meet, got: {' and '.join(texts)}; family and error are of failed "
            f"jobs, finish_reason of failed and done ones"
        )
    return conditions


def _states_of(conditions: Sequence[Condition]) -> frozenset[JobState]:
    """Return the states of the jobs that can meet all conditions; without any, those of jobs without an answer."""
    if not conditions:
        return frozenset({JobState.FAILED, JobState.CANCELLED})
    return frozenset.intersection(*(one.states for one in conditions))


def _read_condition(text: str) -> Condition:
    form = _FORM.fullmatch(text)
    condition = Condition(form[1] or form[2], form[3].strip()) if form else None
    known = {"family": set(Family), "status": _STATES["status"]}
    if (
        condition is None
        or not condition.value
        or condition.value not in known.get(condition.name, {condition.value})
    ):
        raise UsageError(f"expected a condition of the form {FORMS}, got: {text!r}")
    return condition


async def retry(
    database: Database,
    run: Run,
    conditions: Sequence[Condition] = (),
    settings: Mapping[str, Json] | None = None,
) -> int:
    """Put the jobs that meet all conditions back to pending with all their tries; return how many.

    Without conditions these are the failed and cancelled ones. An answer that is redone is kept among its job's
    tries. `settings` become the jobs' own and replace those of an earlier retry; None leaves them. A cancelled run
    becomes active again; where it is cancelled meanwhile, this ends early. UsageError for a run that is being moved.
    """
    runs.check_not_moving(run)
    await runs.revive(database, run)
    states = sorted(_states_of(conditions))
    counted = await database.read(lambda connection: counters.of_runs(connection, [run.id]))
    if not any(counted[run.id][state] for state in states):
        return 0
    own = None if settings is None else orjson.dumps(dict(settings)).decode()
    moved, after = 0, 0
    while True:

        async def look(connection: Connection, after: int = after) -> tuple[int | None, list[AnyRow]]:
            return await _matching(connection, run, states, conditions, after)

        last, found = await database.read(look)
        for start in range(0, len(found), PAGE):
            page = found[start : start + PAGE]

            async def work(connection: Connection, page: list[AnyRow] = page) -> int | None:
                return await _put_back(database, connection, run, page, own)

            if (put := await database.write(work)) is None:
                return moved
            moved += put
        if last is None:
            return moved
        after = last


async def _matching(
    connection: Connection, run: Run, states: list[JobState], conditions: Sequence[Condition], after: int
) -> tuple[int | None, list[AnyRow]]:
    """Return where the next look begins, None behind the last job, and the jobs of this one that meet the conditions."""
    bound = {"run": run.id, "after": after, "states": states, "most": LOOK}
    rows = list((await connection.execute(_AT_REST, bound)).all())
    failed = [row.id for row in rows if row.state == JobState.FAILED]
    tries = await _latest_tries(connection, failed) if conditions else {}
    found = [row for row in rows if all(one.holds(row, tries.get(row.id)) for one in conditions)]
    return (rows[-1].id if len(rows) == LOOK else None), found


async def _latest_tries(connection: Connection, job_ids: list[int]) -> dict[int, AnyRow]:
    if not job_ids:
        return {}
    return {row.job_id: row for row in (await connection.execute(_TRIES, {"ids": job_ids})).all()}


async def _put_back(
    database: Database, connection: Connection, run: Run, page: list[AnyRow], own: str | None
) -> int | None:
    """Put those of a page back that are as they were; return how many, None where the run was cancelled meanwhile."""
    if (await _hold(connection, run)).state is RunState.CANCELLED:
        return None
    unchanged = await _lock_unchanged(connection, page)
    if not unchanged:
        return 0
    ids = {"ids": [row.id for row in unchanged]}
    answers = (await connection.execute(_ANSWERS, ids)).all()
    if answers:
        answered = {"ids": [row.job_id for row in answers]}
        await connection.execute(_KEEP_ANSWERS, answered | {"now": await database.now(connection)})
        await connection.execute(_REMOVE_ANSWERS, answered)
    if own is not None:
        await connection.execute(_SET, ids | {"own": own})
    moving = [(row.id, row.state) for row in unchanged]
    await runs.move_page(database, connection, run, moving, JobState.PENDING)
    reused = sum(row.reused_from is not None for row in answers)
    await counters.add(connection, Counter({(run.id, counters.REUSED): -reused}))
    return len(unchanged)


async def _hold(connection: Connection, run: Run) -> Run:
    """Return the run, which stays as it is until the transaction ends; UsageError where it is being moved."""
    await runs.hold_states(connection, [run.id])
    now = await runs.find(connection, run.name)
    runs.check_not_moving(now)
    return now


async def _lock_unchanged(connection: Connection, seen: Sequence[AnyRow]) -> list[AnyRow]:
    """Lock jobs and return those that stand as they were seen: nothing else of them can have changed then."""
    before = {row.id: (row.state, row.claim_seq) for row in seen}
    rows = (await connection.execute(_LOCKED, {"ids": list(before)})).all()
    return [row for row in rows if (row.state, row.claim_seq) == before[row.id]]


async def reparse(database: Database, run: Run, check: Callable[[str], str]) -> Reparsed:
    """Validate the kept text of failed jobs whose last try was a bad answer; those that fit are done.

    `check` returns the answer as it is to be kept, or raises. No call is made. UsageError for a run that is being
    moved.
    """
    runs.check_not_moving(run)
    taken, left, problem, after = 0, 0, None, 0
    while True:

        async def look(connection: Connection, after: int = after) -> tuple[int | None, list[AnyRow], Any]:
            return await _bad_answers(connection, run, after)

        last, seen, bad = await database.read(look)
        fitting: dict[int, dict[str, Any]] = {}
        for one in bad:
            # Outside of any transaction: it may take its time.
            text, complaint = _check(check, one.text)
            if text is None:
                problem = problem or complaint
                left += 1
            else:
                fitting[one.job_id] = _result(run, one, text)

        async def work(
            connection: Connection, seen: list[AnyRow] = seen, fitting: dict[int, Any] = fitting
        ) -> int:
            return await _take(database, connection, run, [row for row in seen if row.id in fitting], fitting)

        taken += await database.write(work) if fitting else 0
        if last is None:
            return Reparsed(taken, left, problem)
        after = last


async def _bad_answers(
    connection: Connection, run: Run, after: int
) -> tuple[int | None, list[AnyRow], Sequence[AnyRow]]:
    """Return where the next look begins, None behind the last job, failed jobs, and the bad answers they ended with."""
    bound = {"run": run.id, "after": after, "states": [JobState.FAILED], "most": REPARSE_PAGE}
    rows = list((await connection.execute(_AT_REST, bound)).all())
    tries = await _latest_tries(connection, [row.id for row in rows])
    ids = [one.id for one in tries.values() if one.family in {Family.BAD_ANSWER, Family.CUT_OFF}]
    bad = (await connection.execute(_BAD, {"ids": ids})).all() if ids else []
    return (rows[-1].id if len(rows) == REPARSE_PAGE else None), rows, bad


def _check(check: Callable[[str], str], text: str) -> tuple[str | None, str]:
    try:
        return check(text), ""
    except Exception as error:  # noqa: BLE001 - a class of the user's own may raise anything
        return None, failure_of(error).message


def _result(run: Run, bad: AnyRow, text: str) -> dict[str, Any]:
    # How the provider calls its model is not kept with a bad answer.
    return {
        "job_id": bad.job_id,
        "text": text,
        "model": run.task.model,
        "finish_reason": bad.finish_reason,
        "latency_ms": bad.latency_ms or 0,
        "input_tokens": bad.input_tokens,
        "output_tokens": bad.output_tokens,
        "cost_nanos": bad.cost_nanos,
    }


async def _take(
    database: Database,
    connection: Connection,
    run: Run,
    seen: list[AnyRow],
    fitting: dict[int, dict[str, Any]],
) -> int:
    """Write answers of jobs that are still as they were seen; what they took was counted with their tries."""
    await _hold(connection, run)
    now = Millis(await database.now(connection))
    unchanged = await _lock_unchanged(connection, seen)
    await ADD_RESULTS.run(connection, [fitting[row.id] for row in unchanged])
    await _TAKE.run(connection, [{"job": row.id, "to": JobState.DONE, "at": now} for row in unchanged])
    deltas = counters.moved((run.id, JobState.FAILED, JobState.DONE) for _ in unchanged)
    await counters.add(connection, deltas)
    return len(unchanged)
