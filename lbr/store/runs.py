"""Runs: created once, found by name, paused, resumed, cancelled and removed."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import delete, func, select, true, update

from lbr.core.batches import Lane
from lbr.core.errors import DatabaseError, RunMismatchError, RunNotFoundError, UsageError
from lbr.core.extras import Extra
from lbr.core.pricing import Price
from lbr.core.types import JobState, Move, PauseCause, Paused, Run, RunId, RunState, Task, canonical_json
from lbr.store import counters
from lbr.store.schema import NOT_PARKED, attempts, batches, extras, items, jobs, outages, prompts, pulses, results, runs
from lbr.store.schema import counters as counters_table
from lbr.store.sql import Inserting, any_of, wake_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection

    from lbr.core.types import Millis
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

BATCH = 5_000
NAME_LENGTH = 200
REASON_LENGTH = 1_000
NEWEST = 500

BEING_REMOVED = {"pause_cause": PauseCause.REMOVING, "pause_message": "being removed"}
NOT_PAUSED = {"pause_cause": None, "pause_message": None, "move": None}
FULL_TRIES = {"attempts": 0, "crashes": 0, "retry_seq": jobs.c.claim_seq, "worker_id": None}

_STATES = select(runs.c.id, runs.c.state).where(any_of(runs.c.id, "ids")).order_by(runs.c.id)
_NEW = ("name", "task", "answerer", "fingerprint", "state", "max_attempts", "created_at", "enqueued_at", "price")
_MAKE = Inserting(runs, *_NEW, "keep", "samples", "lane", unless="name")

SHOWN, BEFORE = 60, 20
"""How many characters of a long text are shown, and how many of them before the first difference."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What an enqueue asks for. `fingerprint` is a function's, None for a model. Raises UsageError for a bad name.

    `price` is the price of calls from now on, None to leave it as it is; it is not part of the task. `keep` is what to
    keep besides the answers. `samples` is the number of answers per input, and `lane` a `lbr.core.batches.Lane`, None to
    leave them as they are. `warm_cache` lets the first call go alone, so that the others find the provider's cache filled.
    """

    name: str
    task: Task
    max_attempts: int
    fingerprint: str | None = None
    price: Price | None = None
    keep: tuple[Extra, ...] = ()
    samples: int | None = None
    lane: str | None = None
    warm_cache: bool = False

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
    """Read a row of `runs`. DatabaseError names the run if the row is invalid."""
    fields = {name: getattr(row, name) for name in Run.__slots__ if name != "pause"}
    paused = row.pause_cause is not None
    try:
        fields |= {
            "task": Task.from_json(row.task),
            "state": RunState(row.state),
            "price": None if row.price is None else Price.from_json(row.price),
            "keep": () if row.keep is None else tuple(map(Extra, orjson.loads(row.keep))),
            "move": None if row.move is None else Move(**orjson.loads(row.move)),
            "samples": 1 if row.samples is None else row.samples,
        }
        pause = Paused(PauseCause(row.pause_cause), row.pause_message or "") if paused else None
    except (DatabaseError, ValueError, TypeError) as error:
        raise DatabaseError(f"cannot read run {row.name!r}: {error}") from error
    return Run(**fields, pause=pause)


def find(connection: Connection, name: str) -> Run:
    """Return the run of that name. Raises RunNotFoundError, which names the runs that there are."""
    if name.isprintable():  # no other name is stored, and some could not be sent to the database
        row = connection.execute(select(runs).where(runs.c.name == name)).one_or_none()
        if row is not None:
            return run_of(row)
    newest = select(runs.c.name).order_by(runs.c.id.desc()).limit(8)
    names = connection.execute(newest).scalars().all()
    total = connection.scalar(select(func.count()).select_from(runs))
    more = f" and {total - len(names)} more" if total and total > len(names) else ""
    known = f"runs here: {', '.join(names)}{more}" if names else "there are no runs here yet"
    raise RunNotFoundError(f"no run named {name!r}; {known}")


def newest_names(connection: Connection, _now: Millis) -> list[tuple[str, str]]:
    """Return the names of the newest runs, the latest first, each with its model or function."""
    query = select(runs.c.name, runs.c.answerer).order_by(runs.c.id.desc()).limit(NEWEST)
    return [(row.name, row.answerer) for row in connection.execute(query).all()]


def all_runs(connection: Connection, where: ColumnElement[bool] | None = None) -> list[Run]:
    """Return every run, or those that a condition selects, oldest first."""
    query = select(runs).where(true() if where is None else where).order_by(runs.c.id)
    return [run_of(row) for row in connection.execute(query).all()]


def open_run(connection: Connection, now: Millis, spec: RunSpec) -> Run:
    """Return the run of that name, created if it is new, with the price and the order of fields in the spec.

    A known run takes over the order of the spec's schema and settings, and its tier if it has one: they are not part of
    the task.

    Raises RunMismatchError if the name is that of another task, of a run that keeps something else, or of one with more
    samples, UsageError if the run was cancelled or is being moved.
    """
    run, _ = ensure(connection, spec, now)
    check_not_cancelled(run)
    check_not_moving(run)
    if run.keep != spec.keep:
        raise RunMismatchError(
            f"run {spec.name!r} keeps {','.join(run.keep) or 'only answers'}, not {','.join(spec.keep) or 'only answers'}, "
            f"and that cannot change; repeat its --keep, or use another name (--run)"
        )
    if spec.samples is not None and spec.samples < run.samples:
        raise RunMismatchError(
            f"run {spec.name!r} has {run.samples} samples of each input, and the number cannot become smaller; repeat "
            f"its --samples, or use another name (--run), which reuses the answers"
        )
    values: dict[str, Any] = {}
    if spec.price is not None and spec.price != run.price:
        values["price"] = spec.price.to_json()
    if spec.lane is not None and spec.lane != (run.lane or Lane.ONLINE):
        values["lane"] = spec.lane
    if spec.warm_cache:
        values["warm_cache"] = 1
    task = replace(spec.task, tier=spec.task.tier or run.task.tier)
    if run.task.to_json() != task.to_json():
        values["task"] = task.to_json()
    return change(connection, run, values) if values else run


def ensure(connection: Connection, spec: RunSpec, now: Millis) -> tuple[Run, bool]:
    """Return the run of that name, created if it is new, and whether it was.

    Raises RunMismatchError if it has another task.
    """
    made = 0
    if connection.scalar(select(runs.c.id).where(runs.c.name == spec.name)) is None:
        task, price = spec.task, None if spec.price is None else spec.price.to_json()
        row = (spec.name, task.to_json(), task.answerer, spec.fingerprint, RunState.ACTIVE)
        keep = orjson.dumps(spec.keep).decode() if spec.keep else None
        values = (spec.max_attempts, now, now, price, keep, spec.samples, spec.lane)
        made = _MAKE.run_plain(connection, [(*row, *values)])
    run = find(connection, spec.name)
    if run.task.canonical() != spec.task.canonical():
        if replace(run.task, fingerprint=spec.task.fingerprint).canonical() == spec.task.canonical():
            raise RunMismatchError(
                f"run {spec.name!r} was created with different code of its function, or by another version of Python or "
                f"lbr. Use another name (--run); `lbr collect {spec.name}` writes the answers that it has"
            )
        raise RunMismatchError(
            f"run {spec.name!r} already exists with a different task ({'; '.join(differences(run.task, spec.task))}). "
            f"Use another name (--run), or `lbr rm {spec.name}`"
        )
    return run, bool(made)


def raise_samples(connection: Connection, now: Millis, run: Run, samples: int) -> Run:
    """Set how many answers each input gets, if that is more; the run is complete again when it is sealed.

    UsageError if it was cancelled or is being moved.
    """
    current = hold(connection, run)
    check_not_cancelled(current)
    check_not_moving(current)
    values = {"samples": max(samples, current.samples), "enqueued_at": now, "sealed_at": None}
    return change(connection, current, values)


def change(connection: Connection, run: Run, values: dict[str, Any]) -> Run:
    """Set columns of a run; return the run as it is then."""
    connection.execute(update(runs).where(runs.c.id == run.id).values(**values))
    return find(connection, run.name)


def pausing(pause: Paused) -> dict[str, Any]:
    """Return the columns of a run with this pause."""
    return {"state": RunState.PAUSED, "pause_cause": pause.cause, "pause_message": pause.message}


def check_not_cancelled(run: Run) -> None:
    """Raise UsageError for a cancelled run."""
    if run.state is RunState.CANCELLED:
        raise UsageError(f"run {run.name!r} was cancelled; `lbr retry {run.name}` takes it up again")


def check_not_moving(run: Run) -> None:
    """Raise UsageError if a run takes no changes, because it is being or was moved."""
    if run.pause is not None and run.pause.cause is PauseCause.MOVED_TO:
        raise UsageError(f"run {run.name!r} was {run.pause.message} and goes on there; name that database with --db")
    _check_whole(run)


def _check_whole(run: Run) -> None:
    if run.pause is not None and run.pause.cause is PauseCause.MOVING_FROM:
        raise UsageError(f"run {run.name!r} is still {run.pause.message}; finish that with the same `lbr move` first")


def check_not_removing(run: Run) -> None:
    """Raise UsageError for a run that is partly gone, because its removal was interrupted."""
    if run.is_paused_by(PauseCause.REMOVING):
        raise UsageError(f"run {run.name!r} is being removed; `lbr rm {run.name}` finishes that")


def hold_states(connection: Connection, run_ids: Iterable[RunId], *, to_change: bool = False) -> dict[RunId, RunState]:
    """Return the states of runs, which stay as they are until this transaction ends.

    Call it before you make a job pending: a cancel that runs at the same time would miss that job.
    With `to_change` this transaction may change the states itself.
    """
    query = _STATES.with_for_update(read=not to_change)
    rows = connection.execute(query, {"ids": list(run_ids)}).all()
    return {RunId(row.id): RunState(row.state) for row in rows}


def hold(connection: Connection, run: Run, *, to_change: bool = True) -> Run:
    """Return the run as it is now and until this transaction, which may change it, ends."""
    hold_states(connection, [run.id], to_change=to_change)
    return find(connection, run.name)


def hold_unmoved(connection: Connection, run: Run) -> Run:
    """Return the run as it stays until this transaction ends. Raises UsageError if it is being or was moved."""
    current = hold(connection, run, to_change=False)
    check_not_moving(current)
    return current


def resting_state(run_state: RunState) -> JobState:
    """Return the state of a job that is released: a cancelled run takes no job back."""
    return JobState.CANCELLED if run_state is RunState.CANCELLED else JobState.PENDING


def seal(connection: Connection, now: Millis, run: Run) -> None:
    """Record that an enqueue has finished."""
    connection.execute(update(runs).where(runs.c.id == run.id).values(sealed_at=now))


def adopt_fingerprint(connection: Connection, _now: Millis, run: Run, fingerprint: str, *, changed: bool) -> bool:
    """Store the fingerprint that a named function has now, unless its code `changed` since the run's first answers.

    Returns whether it was stored.
    """
    counted = counters.of_runs(connection, [run.id])[run.id]
    if changed and (counted[JobState.DONE] or counted[JobState.INFLIGHT]):
        return False
    connection.execute(update(runs).where(runs.c.id == run.id).values(fingerprint=fingerprint))
    return True


def pause(connection: Connection, _now: Millis, run: Run, reason: str, *, cause: PauseCause = PauseCause.USER) -> Run:
    """Stop the claiming of a run's jobs until `resume`; calls in flight go on. Safe to repeat.

    UsageError for a cancelled run, and for one that is being or was moved.
    """
    return _set_state(connection, run, pausing(Paused(cause, reason)), check_not_moving)


def resume(connection: Connection, _now: Millis, /, run: Run, *, moved: bool = True, **budget: int | None) -> Run:
    """Let a paused run's jobs be claimed again, also those of the copy that a move has left. Safe to repeat.

    `budget_nanos` is what the run may cost from now on, None for any amount; without it, that stays as it is.
    UsageError for a cancelled run, for one that is only partly here, and without `moved` for one that was moved.
    """
    check = _check_whole if moved else check_not_moving
    return _set_state(connection, run, {"state": RunState.ACTIVE} | NOT_PAUSED | budget, check)


def _set_state(connection: Connection, run: Run, values: dict[str, Any], check: Callable[[Run], None]) -> Run:
    current = hold(connection, run)
    check_not_cancelled(current)
    check(current)
    if values["state"] is RunState.ACTIVE:
        # Calls are made again, whatever was known of an outage.
        connection.execute(delete(outages).where(outages.c.answerer == run.task.answerer))
        counters.add(connection, Counter({(run.id, counters.OPENED): int(current.state is RunState.PAUSED)}))
    wake_workers(connection)
    return change(connection, run, values)


def revive(connection: Connection, _now: Millis, run: Run) -> None:
    """Make a cancelled run active again. UsageError if it is being or was moved or removed. Safe to repeat."""
    current = hold(connection, run)
    check_not_removing(current)
    check_not_moving(current)
    if current.state is RunState.CANCELLED:
        change(connection, run, {"state": RunState.ACTIVE})


def cancel_unchanged(connection: Connection, _now: Millis, seen: Run, counts: Counter[str]) -> bool:
    """Cancel a run unless it, or what it counts, has changed since it was `seen`; return whether it is cancelled."""
    current = hold(connection, seen)
    if current.enqueued_at != seen.enqueued_at or counters.of_runs(connection, [seen.id])[seen.id] != counts:
        return False
    if current.state is not RunState.CANCELLED:
        change(connection, current, {"state": RunState.CANCELLED} | NOT_PAUSED)
    return True


async def cancel(database: Database, run: Run) -> int:
    """Cancel a run and its pending jobs; return how many jobs. Answers of calls in flight are still kept.

    UsageError for a run that is being or was moved.
    """
    await database.write(_mark_cancelled, run)
    moved, after = 0, 0
    while True:
        page = await database.write(_cancel_page, run, after)
        moved += len(page)
        if len(page) < BATCH:
            return moved
        after = page[-1].id


def _mark_cancelled(connection: Connection, _now: Millis, run: Run) -> None:
    current = hold(connection, run)
    check_not_moving(current)
    kept = {} if current.is_paused_by(PauseCause.REMOVING) else NOT_PAUSED
    change(connection, run, {"state": RunState.CANCELLED} | kept)


def _cancel_page(connection: Connection, now: Millis, run: Run, after: int) -> Sequence[AnyRow]:
    if hold_states(connection, [run.id])[run.id] is not RunState.CANCELLED:
        return []  # a retry made it active meanwhile, and puts the jobs back
    query = (
        select(jobs.c.id, jobs.c.state)
        .where(jobs.c.id > after, jobs.c.run_id == run.id, jobs.c.state == JobState.PENDING, NOT_PARKED)
        .order_by(jobs.c.id)
        .limit(BATCH)
        .with_for_update()
    )
    page = connection.execute(query).all()
    move_page(connection, run, page, JobState.CANCELLED, now)
    return page


def move_page(connection: Connection, run: Run, page: Sequence[Sequence[Any]], target: JobState, now: Millis) -> None:
    """Move jobs, each a row of its id and its state, to another resting state. Pending jobs have all their tries again."""
    values: dict[str, Any] = {"state": target, "finished_at": now}
    if target is JobState.PENDING:
        values |= {"finished_at": None, "available_at": now} | FULL_TRIES
    query = update(jobs).where(any_of(jobs.c.id, "ids")).values(**values)
    connection.execute(query, {"ids": [row[0] for row in page]})
    deltas = counters.moved((run.id, row[1], target) for row in page)
    deltas[run.id, counters.OPENED] = int(target is JobState.PENDING)
    counters.add(connection, deltas)
    if target is JobState.PENDING:
        wake_workers(connection)


async def remove(database: Database, run: Run) -> int:
    """Remove a cancelled run with all that it holds, none of whose jobs is in flight; return how many jobs.

    Safe to repeat after a crash: the run itself goes last.
    """
    removed = 0
    while page := await database.write(_remove_jobs, run):
        removed += page
    while await database.write(_remove_items, run):
        pass
    return removed


def _remove_jobs(connection: Connection, _now: Millis, run: Run) -> int:
    if hold_states(connection, [run.id], to_change=True).get(run.id) is not RunState.CANCELLED:
        raise UsageError(f"run {run.name!r} was taken up again meanwhile, so that it stays")
    connection.execute(update(runs).where(runs.c.id == run.id).values(BEING_REMOVED))
    chosen = select(prompts.c.job_id).where(prompts.c.run_id == run.id).limit(BATCH)
    ids = list(connection.execute(chosen).scalars())
    for column in (results.c.job_id, extras.c.job_id, attempts.c.job_id, jobs.c.id, prompts.c.job_id):
        connection.execute(delete(column.table).where(any_of(column, "ids")), {"ids": ids})
    return len(ids)


def _remove_items(connection: Connection, _now: Millis, run: Run) -> int:
    """Remove a page of items, or, if there is none, the run; return how many items."""
    some = select(items.c.idx).where(items.c.run_id == run.id).limit(BATCH)
    removing = delete(items).where(items.c.run_id == run.id, items.c.idx.in_(some))
    gone = connection.execute(removing).rowcount
    if not gone:
        connection.execute(delete(counters_table).where(counters_table.c.run_id == run.id))
        for table in (pulses, batches):
            connection.execute(delete(table).where(table.c.run_id == run.id))
        connection.execute(delete(runs).where(runs.c.id == run.id))
    return gone


def differences(old: Task, new: Task) -> list[str]:
    """Return a line for each field in which two tasks differ, with the text around the first difference."""
    found = []
    for name in (name for name in Task.__slots__ if name != "tier"):
        texts = [canonical_json(getattr(task, name)).decode() for task in (old, new)]
        if texts[0] != texts[1]:
            start = max(0, len(os.path.commonprefix(texts)) - BEFORE)  # noqa: RUF071 - of texts
            there, here = ("none" if text == "null" else _excerpt(text, start) for text in texts)
            found.append(f"{name}: {there} there, {here} here")
    return found


def _excerpt(text: str, start: int) -> str:
    if len(text) <= SHOWN:
        return text
    return "…" * (start > 0) + text[start : start + SHOWN] + "…" * (start + SHOWN < len(text))
