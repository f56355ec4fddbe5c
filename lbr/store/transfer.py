"""A run's way into another database: read in pages here, written there, compared, and only then taken up.

The run is paused in both databases for as long as it takes, so what is copied is at rest. A page is one short
transaction, written where it follows what is there: a copy that was interrupted goes on, and two at once do the
work of one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, select, update

from lbr.core.errors import DatabaseError, RunNotFoundError, UsageError
from lbr.core.types import JobState, Move, PauseCause, Paused, Run, RunState
from lbr.store import counters, enqueue, runs
from lbr.store.arrays import Inserting, among
from lbr.store.contents import ITEM, JOB, PROMPT, RESULT, TRY, Contents, Page
from lbr.store.locks import alone_with
from lbr.store.paging import PAGE
from lbr.store.schema import INFLIGHT, attempts, items, jobs, prompts, results
from lbr.store.schema import counters as counters_table
from lbr.store.schema import runs as runs_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

ELSEWHERE = 0
"""The `reused_from` of an answer whose source is a job of the database that the run has left."""

_LAST = (
    select(items.c.idx, items.c.job_id, items.c.first, jobs.c.state)
    .join_from(items, jobs, items.c.job_id == jobs.c.id)
    .where(items.c.run_id == bindparam("run"))
    .order_by(items.c.idx.desc())
    .limit(PAGE)
)
_ADD_PROMPTS = Inserting(prompts, "job_id", "run_id", "key", *PROMPT)
_ADD_RESULTS = Inserting(results, "job_id", *RESULT, "reused_from")
_ADD_TRIES = Inserting(attempts, "job_id", *TRY)


class NotHalfDoneError(UsageError):
    """A copy that was being made is finished, or was changed by somebody else."""


def _fields(row: AnyRow, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


async def find(database: Database, name: str) -> Run | None:
    """Return the run of that name, None where there is none."""
    try:
        return await database.read(lambda connection: runs.find(connection, name))
    except RunNotFoundError:
        return None


def has_left(run: Run, aim: str) -> bool:
    """Tell whether a run was moved to `aim`."""
    return _leaves(run, aim, PauseCause.MOVED_TO)


def check_may_leave(run: Run, aim: str) -> None:
    """Raise UsageError where a run is on its way to another database than `aim`, or is not whole."""
    if not _leaves(run, aim) and run.state is RunState.PAUSED:
        runs.check_not_moving(run)


def check_whole(run: Run) -> None:
    """Raise UsageError where inputs of a run may still be on their way."""
    if run.sealed_at is None:
        raise UsageError(
            f"expected run {run.name!r} to hold all of its inputs, got: an enqueue that has not come to its end; run "
            f"it again first"
        )


def _leaves(run: Run, aim: str, *causes: PauseCause) -> bool:
    """Return whether a run is being or was moved to `aim`."""
    leaving = run.is_paused_by(*(causes or (PauseCause.MOVING_TO, PauseCause.MOVED_TO)))
    return run.state is RunState.PAUSED and leaving and run.move is not None and run.move.place == aim


def is_copy(copy: Run, run: Run) -> bool:
    """Tell whether one run was made as a copy of the other."""
    return (copy.task, copy.created_at) == (run.task, run.created_at)


def is_half_done(copy: Run, run: Run) -> bool:
    """Tell whether one run is a copy of the other whose making has not come to its end."""
    moving = copy.state is RunState.PAUSED and copy.is_paused_by(PauseCause.MOVING_FROM)
    return moving and is_copy(copy, run)


async def hold(source: Database, name: str, aim: str) -> Run:
    """Pause a run as on its way to `aim`, and return it; none of its jobs is claimed from then on. Safe to repeat.

    Raises UsageError as `check_may_leave`.
    """

    async def work(connection: Connection) -> Run:
        # A claim that saw the run active must be in sight before anybody counts what is in flight.
        await connection.execute(alone_with(runs_table))
        run = await runs.find(connection, name)
        check_may_leave(run, aim)
        check_whole(run)
        if _leaves(run, aim):
            return run
        pause = Paused(PauseCause.MOVING_TO, f"moving to {aim}")
        before = (None, None) if run.pause is None else (run.pause.cause, run.pause.message)
        values = runs.pausing(pause) | {"move": Move(aim, run.state, *before).to_json()}
        await connection.execute(update(runs_table).where(runs_table.c.id == run.id).values(**values))
        return await runs.find(connection, name)

    return await source.write(work)


async def in_flight(database: Database, run: Run) -> tuple[int, float]:
    """Return how many of a run's jobs are in flight, and in how many seconds the last of their leases ends."""
    query = select(func.count(), func.max(jobs.c.lease_until)).where(INFLIGHT, jobs.c.run_id == run.id)

    async def work(connection: Connection) -> tuple[int, float]:
        count, until = (await connection.execute(query)).one()
        return count, (until - await database.now(connection)) / 1000 if count else 0.0

    return await database.read(work)


async def open_copy(target: Database, run: Run, origin: str) -> Run:
    """Return the run's copy, made paused where its name is free. Safe to repeat."""
    spec = runs.RunSpec(run.name, run.task, run.max_attempts, run.fingerprint, run.price)
    pause = Paused(PauseCause.MOVING_FROM, f"moving from {origin}")
    values = runs.pausing(pause) | {"move": Move(origin).to_json(), "created_at": run.created_at}

    async def work(connection: Connection) -> Run:
        copy, made = await runs.ensure(target, connection, spec)
        if not made:
            return copy
        await connection.execute(update(runs_table).where(runs_table.c.id == copy.id).values(**values))
        return await runs.find(connection, run.name)

    return await target.write(work)


async def add_page(target: Database, copy: Run, page: Page) -> int:
    """Write a page where it follows what the copy holds; return the place behind that then. Safe to repeat.

    Raises NotHalfDoneError where the copy was finished or changed by somebody else.
    """

    async def work(connection: Connection) -> int:
        await target.take_turns(connection, copy.id)
        await _check_half_done(connection, copy)
        place = await enqueue.place_behind(connection, copy)
        if place != page.start:
            return place
        ids = await _add_jobs(target, connection, copy, page)
        if lost := next((row for row in page.places if row.key not in ids), None):
            raise DatabaseError(
                f"expected input {lost.idx} of run {copy.name!r} to share the job of an input before it, got: none that "
                f"has it; the database that it is moved from was changed by another program: restore a copy"
            )
        rows = [{"run_id": copy.id, "job_id": ids[row.key]} | _fields(row, ITEM) for row in page.places]
        await enqueue.ADD_ITEMS.run(connection, rows)
        return page.end

    return await target.write(work)


async def _check_half_done(connection: Connection, copy: Run) -> None:
    """Hold the copy as it is until the transaction ends; NotHalfDoneError where its making is over."""
    await runs.hold_states(connection, [copy.id], to_change=True)
    now = await runs.find(connection, copy.name)
    if (now.id, now.state, now.pause, now.move) != (copy.id, RunState.PAUSED, copy.pause, copy.move):
        raise NotHalfDoneError(
            f"expected run {copy.name!r} to stay paused while it is copied, got: {now.state}; another process has "
            f"finished or changed it"
        )


async def _add_jobs(target: Database, connection: Connection, copy: Run, page: Page) -> dict[bytes, int]:
    """Write the page's jobs with all that is theirs; return the ids of all jobs that it names."""
    new = [row for row in page.places if row.first]
    if any(row.state == JobState.INFLIGHT for row in new):
        raise DatabaseError(
            f"expected run {copy.name!r} to be at rest, got: a job in flight, which a worker has taken up again; "
            f"run the same command again"
        )
    keys = list(dict.fromkeys(row.key for row in page.places))
    found = (await connection.execute(enqueue.BY_KEY, {"run": copy.id, "keys": keys})).all()
    ids: dict[bytes, int] = {row.key: row.job_id for row in found}
    reserved = await target.reserve_job_ids(connection, len(new))
    ids |= zip((row.key for row in new), reserved, strict=True)
    rows = [{"id": ids[row.key], "run_id": copy.id} | _fields(row, JOB) for row in new]
    await enqueue.ADD_JOBS.run(connection, rows)
    await _add_payloads(connection, copy, {row.id: ids[row.key] for row in new}, page)
    await counters.add(connection, Counter((copy.id, row.state) for row in new))
    return ids


async def _add_payloads(connection: Connection, copy: Run, ids: dict[int, int], page: Page) -> None:
    """Write what stands beside the jobs; `ids` maps their ids where they come from to those here."""
    asked = [
        {"job_id": new, "run_id": copy.id} | _fields(page.prompts[old], ("key", *PROMPT))
        for old, new in ids.items()
    ]
    await _ADD_PROMPTS.run(connection, asked)
    answered = [
        {"job_id": ids[old], "reused_from": None if row.reused_from is None else ELSEWHERE}
        | _fields(row, RESULT)
        for old, row in page.results.items()
    ]
    await _ADD_RESULTS.run(connection, answered)
    tried = [{"job_id": ids[old]} | _fields(one, TRY) for old, tries in page.tries.items() for one in tries]
    await _ADD_TRIES.run(connection, tried)


async def clear(target: Database, copy: Run) -> None:
    """Take away what a half-done copy holds, from its end on, so that at any moment its beginning is whole."""

    async def work(connection: Connection) -> bool:
        await target.take_turns(connection, copy.id)
        await _check_half_done(connection, copy)
        last = (await connection.execute(_LAST, {"run": copy.id})).all()
        gone = [row for row in last if row.first]
        for column in (attempts.c.job_id, results.c.job_id, prompts.c.job_id, jobs.c.id):
            await connection.execute(
                delete(column.table).where(among(column, "ids")), {"ids": [row.job_id for row in gone]}
            )
        if last:
            behind = (items.c.run_id == copy.id) & (items.c.idx >= last[-1].idx)
            await connection.execute(delete(items).where(behind))
        await counters.add(
            connection, Counter({k: -n for k, n in Counter((copy.id, r.state) for r in gone).items()})
        )
        return bool(last)

    while await target.write(work):
        pass


async def counts(database: Database, run: Run) -> Counter[str]:
    """Return a run's counts by name."""
    return (await database.read(lambda connection: counters.of_runs(connection, [run.id])))[run.id]


async def depart(source: Database, run: Run, aim: str, *, seen: Counter[str]) -> None:
    """Write down that the run has gone to `aim`, where its counts are still those `seen`. Safe to repeat.

    Raises DatabaseError where anything has happened to it meanwhile.
    """

    async def work(connection: Connection) -> None:
        await runs.hold_states(connection, [run.id], to_change=True)
        now = await runs.find(connection, run.name)
        counted = (await counters.of_runs(connection, [run.id]))[run.id]
        if not _leaves(now, aim) or counted != seen or counted[JobState.INFLIGHT]:
            raise DatabaseError(
                f"expected run {run.name!r} to stay as it was while it was copied, got: a change by somebody else "
                f"in {source.name}; nothing was taken up at {aim}: run the same command again"
            )
        values = runs.pausing(Paused(PauseCause.MOVED_TO, f"moved to {aim}"))
        await connection.execute(update(runs_table).where(runs_table.c.id == run.id).values(values))

    await source.write(work)


async def arrive(target: Database, copy: Run, run: Run, *, held: Contents, seen: Counter[str]) -> None:
    """Give the copy the run's other counts, its seal, and the state that it had: from now on it is the run.

    Raises NotHalfDoneError where somebody else has done so, DatabaseError where its counts by state are not
    those of the jobs `held`.
    """
    state, pause = (RunState.ACTIVE, None) if run.move is None else run.move.before
    values = runs.NOT_PAUSED | ({} if pause is None else runs.pausing(pause))
    values |= {"state": state, "max_attempts": run.max_attempts, "input_columns": run.input_columns}
    values |= {"fingerprint": run.fingerprint, "enqueued_at": run.enqueued_at, "sealed_at": run.sealed_at}
    values |= {"price": None if run.price is None else run.price.to_json(), "budget_nanos": run.budget_nanos}
    states = {str(state) for state in JobState}

    async def work(connection: Connection) -> None:
        await target.take_turns(connection, copy.id)
        await _check_half_done(connection, copy)
        counted = (await counters.of_runs(connection, [copy.id]))[copy.id]
        if any(counted[state] != held.states[state] for state in states):
            raise DatabaseError(
                f"expected the counters of run {copy.name!r} in {target.name} to be {dict(held.states)}, got: "
                f"{dict(counted)}; they were changed by hand: copy it again with --restart"
            )
        others = counters_table.c.name.not_in(states)
        await connection.execute(delete(counters_table).where(counters_table.c.run_id == copy.id, others))
        await counters.add(connection, Counter({(copy.id, n): v for n, v in seen.items() if n not in states}))
        await connection.execute(update(runs_table).where(runs_table.c.id == copy.id).values(**values))
        await target.wake(connection)

    await target.write(work)
    if state is RunState.CANCELLED:
        # What was given back while the run was on its way was pending there.
        await runs.cancel(target, copy)
    await target.filled()
