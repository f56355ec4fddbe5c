"""Runs: made once, found by name, paused, resumed, cancelled and put back for another try."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import delete, select, update

from lbr.core.errors import DatabaseError, RunMismatchError, RunNotFoundError, UsageError
from lbr.core.pricing import Price
from lbr.core.types import (
    JobState,
    Millis,
    Move,
    PauseCause,
    Paused,
    Run,
    RunId,
    RunState,
    Task,
    differences,
)
from lbr.store import counters
from lbr.store.schema import attempts, items, jobs, outages, prompts, results, runs
from lbr.store.schema import counters as counters_table
from lbr.store.sql import BulkStatement, Rows, any_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

BATCH = 5_000
NAME_LENGTH = 200
REASON_LENGTH = 1_000

BEING_REMOVED = {"pause_cause": PauseCause.REMOVING, "pause_message": "being removed"}
NOT_PAUSED = {"pause_cause": None, "pause_message": None, "move": None}


def _making(given: Rows) -> Any:
    """Insert a run whose name is new; of two that come at once, the second finds the first one's."""
    names = {f"new_{name}": name for name in _NEW}
    adding = given.insert_into(runs, {column: given[field] for field, column in names.items()})
    return adding.on_conflict_do_nothing(index_elements=["name"])


_NEW = (
    "name",
    "task",
    "answerer",
    "fingerprint",
    "state",
    "max_attempts",
    "created_at",
    "enqueued_at",
    "price",
)
_MAKE = BulkStatement({f"new_{name}": runs.c[name].type for name in _NEW}, _making)
_STATES = select(runs.c.id, runs.c.state).where(any_of(runs.c.id, "ids")).order_by(runs.c.id)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What an enqueue asks for. `fingerprint` is a function's, None for a model. Raises UsageError for a bad name.

    `price` is what calls cost from then on; None leaves it as it is. It is no part of the task.
    `refusal` is why the run must not be new, None if it may be.
    """

    name: str
    task: Task
    max_attempts: int
    fingerprint: str | None = None
    price: Price | None = None
    refusal: str | None = None

    def __post_init__(self) -> None:
        """Check what no database should see."""
        name = self.name
        if not name or name != name.strip() or not name.isprintable() or len(name) > NAME_LENGTH:
            raise UsageError(
                f"expected a run name of 1 to {NAME_LENGTH} printable characters, got: {name[:250]!r}; set --run"
            )


def check_reason(reason: str) -> None:
    """Raise UsageError for a reason to pause a run that no database should see."""
    if not reason.strip() or not reason.isprintable() or len(reason) > REASON_LENGTH:
        raise UsageError(
            f"expected a reason of 1 to {REASON_LENGTH} printable characters, got: {reason[:250]!r}; set --reason"
        )


def run_of(row: AnyRow) -> Run:
    """Read a row of `runs`. DatabaseError names the run whose row is none."""
    try:
        return _run_of(row)
    except (DatabaseError, ValueError, TypeError) as error:
        raise DatabaseError(f"cannot read run {row.name!r}: {error}") from error


def _run_of(row: AnyRow) -> Run:
    return Run(
        id=RunId(row.id),
        name=row.name,
        task=Task.from_json(row.task),
        state=RunState(row.state),
        pause=None
        if row.pause_cause is None
        else Paused(PauseCause(row.pause_cause), row.pause_message or ""),
        max_attempts=row.max_attempts,
        fingerprint=row.fingerprint,
        created_at=row.created_at,
        enqueued_at=row.enqueued_at,
        sealed_at=row.sealed_at,
        price=None if row.price is None else Price.from_json(row.price),
        budget_nanos=row.budget_nanos,
        input_columns=row.input_columns,
        move=None if row.move is None else Move(**orjson.loads(row.move)),
    )


async def find(connection: Connection, name: str) -> Run:
    """Return the run of that name; RunNotFoundError names those that there are."""
    if name.isprintable():  # nothing else is ever stored, and some of it could not even be asked for
        row = (await connection.execute(select(runs).where(runs.c.name == name))).one_or_none()
        if row is not None:
            return run_of(row)
    names = (
        (await connection.execute(select(runs.c.name).order_by(runs.c.id.desc()).limit(8))).scalars().all()
    )
    known = f"the newest runs here are {', '.join(names)}" if names else "there are no runs here yet"
    raise RunNotFoundError(f"expected the name of a run, got: {name!r}; {known}")


async def all_runs(connection: Connection) -> list[Run]:
    """Return every run, oldest first."""
    return [run_of(row) for row in (await connection.execute(select(runs).order_by(runs.c.id))).all()]


async def prices(connection: Connection, run_ids: Iterable[RunId]) -> dict[RunId, Price | None]:
    """Return what the calls of these runs cost by their users' word, None where there is none."""
    query = select(runs.c.id, runs.c.price).where(any_of(runs.c.id, "ids"))
    rows = (await connection.execute(query, {"ids": list(run_ids)})).all()
    return {RunId(row.id): None if row.price is None else Price.from_json(row.price) for row in rows}


async def open_run(database: Database, spec: RunSpec) -> Run:
    """Return the run of that name, made if it is new, with the price and the order of fields that the spec names.

    A known run takes over the order of the spec's schema and settings, which is no part of the task.

    Raises RunMismatchError where the name is taken by another task, UsageError where the run was cancelled or
    is being moved.
    """

    async def work(connection: Connection) -> Run:
        run, _ = await ensure(database, connection, spec)
        if run.state is RunState.CANCELLED:
            raise UsageError(f"run {spec.name!r} was cancelled; `lbr retry {spec.name}` takes it up again")
        check_not_moving(run)
        values = {}
        if spec.price not in {None, run.price}:
            values["price"] = _price_text(spec.price)
        if run.task.to_json() != spec.task.to_json():
            values["task"] = spec.task.to_json()
        if not values:
            return run
        await connection.execute(update(runs).where(runs.c.id == run.id).values(**values))
        return await find(connection, spec.name)

    return await database.write(work)


async def ensure(database: Database, connection: Connection, spec: RunSpec) -> tuple[Run, bool]:
    """Return the run of that name, made if it is new, and whether it was.

    Raises RunMismatchError for another task's, UsageError for a new one that the spec refuses.
    """
    made = await _make(database, connection, spec)
    run = await find(connection, spec.name)
    differs = run.task.canonical() != spec.task.canonical()
    if spec.refusal is not None and (made or differs):
        raise UsageError(spec.refusal)
    if differs:
        raise RunMismatchError(
            f"expected run {spec.name!r} to be free or to ask for the same, got: another task "
            f"({'; '.join(differences(run.task, spec.task))}); choose another name with --run"
        )
    return run, made


async def _make(database: Database, connection: Connection, spec: RunSpec) -> bool:
    """Insert the run where its name is free; tell whether it was. For one that is known, nothing is written."""
    if await connection.scalar(select(runs.c.id).where(runs.c.name == spec.name)) is not None:
        return False
    now = await database.now(connection)
    row = {
        "new_name": spec.name,
        "new_task": spec.task.to_json(),
        "new_answerer": spec.task.answerer,
        "new_fingerprint": spec.fingerprint,
        "new_state": RunState.ACTIVE,
        "new_max_attempts": spec.max_attempts,
        "new_created_at": now,
        "new_enqueued_at": now,
        "new_price": _price_text(spec.price),
    }
    return await _MAKE.run(connection, [row]) == 1


def _price_text(price: Price | None) -> str | None:
    return None if price is None else price.to_json()


def pausing(pause: Paused) -> dict[str, Any]:
    """Return the columns of a run that is paused so."""
    return {"state": RunState.PAUSED, "pause_cause": pause.cause, "pause_message": pause.message}


def check_not_moving(run: Run) -> None:
    """Raise UsageError if a run takes no changes, because it is being or was moved."""
    pause = run.pause
    if pause is not None and pause.cause is PauseCause.MOVED_TO:
        raise UsageError(
            f"run {run.name!r} was {pause.message} and goes on there; name that database with --db"
        )
    _check_whole(run)


def _check_whole(run: Run) -> None:
    """Raise UsageError where only a part of a run may be here yet, so that no worker may work on it."""
    pause = run.pause
    if pause is not None and pause.cause is PauseCause.MOVING_FROM:
        raise UsageError(
            f"run {run.name!r} is still {pause.message}; finish that with the same `lbr move` first"
        )


def check_not_removing(run: Run) -> None:
    """Raise UsageError for a run of which a part is gone, because its removal was interrupted."""
    if run.is_paused_by(PauseCause.REMOVING):
        raise UsageError(f"run {run.name!r} is being removed; `lbr rm {run.name}` finishes that")


async def hold_states(
    connection: Connection, run_ids: Iterable[RunId], *, to_change: bool = False
) -> dict[RunId, RunState]:
    """Return the states of runs, which stay as they are until this transaction ends.

    Whoever puts a job back to rest must look so: a cancel that goes on at the same time would pass it by.
    With `to_change` this transaction may change them itself.
    """
    query = _STATES.with_for_update(read=not to_change)
    rows = (await connection.execute(query, {"ids": list(run_ids)})).all()
    return {RunId(row.id): RunState(row.state) for row in rows}


def resting_state(run_state: RunState) -> JobState:
    """Return where a job goes that is given back: a cancelled run takes no job up again."""
    return JobState.CANCELLED if run_state is RunState.CANCELLED else JobState.PENDING


async def seal(database: Database, run: Run) -> None:
    """Record that an enqueue has come to its end."""

    async def work(connection: Connection) -> None:
        now = await database.now(connection)
        await connection.execute(update(runs).where(runs.c.id == run.id).values(sealed_at=now))

    await database.write(work)


async def adopt_fingerprint(database: Database, run: Run, fingerprint: str, *, changed: bool) -> bool:
    """Store the fingerprint that a named function has now, unless its code `changed` since the run's first answers.

    Returns whether it was stored.
    """

    async def work(connection: Connection) -> bool:
        counted = (await counters.of_runs(connection, [run.id]))[run.id]
        if changed and (counted[JobState.DONE] or counted[JobState.INFLIGHT]):
            return False
        await connection.execute(update(runs).where(runs.c.id == run.id).values(fingerprint=fingerprint))
        return True

    return await database.write(work)


async def pause(database: Database, run: Run, reason: str, *, cause: PauseCause = PauseCause.USER) -> Run:
    """Stop the claiming of a run's jobs until `resume`; calls in flight go on. Safe to repeat.

    UsageError for a cancelled run, and for one that is being or was moved.
    """
    return await _set_state(database, run, pausing(Paused(cause, reason)), check_not_moving)


async def resume(database: Database, run: Run, *, moved: bool = True, **budget: int | None) -> Run:
    """Let a paused run's jobs be claimed again, also those of a copy that a move has left behind. Safe to repeat.

    UsageError for a cancelled run, where only a part of it may be here, and without `moved` for one that is being or
    was moved.

    `budget_nanos` is what it may cost from now on, None for any amount; left out, that stays as it is.
    """
    check = _check_whole if moved else check_not_moving
    return await _set_state(database, run, {"state": RunState.ACTIVE} | NOT_PAUSED | budget, check)


async def _set_state(
    database: Database, run: Run, values: dict[str, Any], check: Callable[[Run], None]
) -> Run:
    async def work(connection: Connection) -> Run:
        await hold_states(connection, [run.id], to_change=True)
        current = await find(connection, run.name)
        if current.state is RunState.CANCELLED:
            raise UsageError(f"run {run.name!r} was cancelled; `lbr retry {run.name}` takes it up again")
        check(current)
        await connection.execute(update(runs).where(runs.c.id == run.id).values(**values))
        if values["state"] is RunState.ACTIVE:
            # Calls are made again, whatever was known of an outage.
            await connection.execute(delete(outages).where(outages.c.answerer == run.task.answerer))
        await database.wake(connection)
        return await find(connection, run.name)

    return await database.write(work)


async def cancel(database: Database, run: Run) -> int:
    """Cancel a run and its pending jobs; return how many jobs. Answers on their way are still kept.

    UsageError for a run that is being or was moved.
    """

    async def mark(connection: Connection) -> None:
        await hold_states(connection, [run.id], to_change=True)
        now = await find(connection, run.name)
        check_not_moving(now)
        values = {"state": RunState.CANCELLED} | ({} if now.is_paused_by(PauseCause.REMOVING) else NOT_PAUSED)
        await connection.execute(update(runs).where(runs.c.id == run.id).values(**values))

    await database.write(mark)
    return await _cancel_pending(database, run)


async def remove(database: Database, run: Run) -> int:
    """Remove a cancelled run none of whose jobs is in flight, with all that it holds; return how many jobs.

    Safe to repeat after a crash: the run itself goes last.
    """
    removed = 0
    while page := await database.write(lambda connection: _remove_page(connection, run)):
        removed += page

    async def end(connection: Connection) -> int:
        some = select(items.c.idx).where(items.c.run_id == run.id).limit(BATCH)
        gone = (
            await connection.execute(delete(items).where(items.c.run_id == run.id, items.c.idx.in_(some)))
        ).rowcount
        if not gone:
            await connection.execute(delete(counters_table).where(counters_table.c.run_id == run.id))
            await connection.execute(delete(runs).where(runs.c.id == run.id))
        return gone

    while await database.write(end):
        pass
    return removed


async def _remove_page(connection: Connection, run: Run) -> int:
    if (await hold_states(connection, [run.id], to_change=True)).get(run.id) is not RunState.CANCELLED:
        raise UsageError(f"run {run.name!r} was taken up again meanwhile, so that it stays")
    await connection.execute(update(runs).where(runs.c.id == run.id).values(BEING_REMOVED))
    chosen = select(prompts.c.job_id).where(prompts.c.run_id == run.id).limit(BATCH)
    ids = list((await connection.execute(chosen)).scalars())
    for column in (results.c.job_id, attempts.c.job_id, jobs.c.id, prompts.c.job_id):
        await connection.execute(delete(column.table).where(any_of(column, "ids")), {"ids": ids})
    return len(ids)


async def revive(database: Database, run: Run) -> None:
    """Make a cancelled run active again. UsageError where it is being or was moved. Safe to repeat."""

    async def work(connection: Connection) -> None:
        await hold_states(connection, [run.id], to_change=True)
        now = await find(connection, run.name)
        check_not_removing(now)
        check_not_moving(now)
        values = {"state": RunState.ACTIVE}
        where = (runs.c.id == run.id) & (runs.c.state == RunState.CANCELLED)
        await connection.execute(update(runs).where(where).values(**values))

    await database.write(work)


async def _cancel_pending(database: Database, run: Run) -> int:
    """Cancel a run's pending jobs, in short transactions of one page each; return how many.

    It ends early where the run has meanwhile been taken up again, by somebody who then moves them back.
    """
    moved, last = 0, 0
    while True:

        async def work(connection: Connection, after: int = last) -> list[tuple[int, str]]:
            if (await hold_states(connection, [run.id]))[run.id] is not RunState.CANCELLED:
                return []
            query = (
                select(jobs.c.id, jobs.c.state)
                .where(jobs.c.id > after, jobs.c.run_id == run.id, jobs.c.state == JobState.PENDING)
                .order_by(jobs.c.id)
                .limit(BATCH)
                .with_for_update()
            )
            page = [(row.id, row.state) for row in (await connection.execute(query)).all()]
            await move_page(database, connection, run, page, JobState.CANCELLED)
            return page

        page = await database.write(work)
        moved += len(page)
        if len(page) < BATCH:
            return moved
        last = page[-1][0]


async def move_page(
    database: Database, connection: Connection, run: Run, page: list[tuple[int, str]], target: JobState
) -> None:
    """Move jobs, each named with the state that it has, to another resting state. Pending, they have all their tries."""
    now = await database.now(connection)
    values: dict[str, Any] = {"state": target, "finished_at": Millis(now)}
    if target is JobState.PENDING:
        values = {
            "state": target,
            "finished_at": None,
            "available_at": now,
            "attempts": 0,
            "crashes": 0,
            "retry_seq": jobs.c.claim_seq,
            "worker_id": None,
        }
    query = update(jobs).where(any_of(jobs.c.id, "ids")).values(**values)
    await connection.execute(query, {"ids": [job_id for job_id, _ in page]})
    deltas: counters.Deltas = Counter()
    for _, state in page:
        deltas[run.id, state] -= 1
        deltas[run.id, target] += 1
    await counters.add(connection, deltas)
    if target is JobState.PENDING:
        await database.wake(connection)
