"""Copies a run into another database, page by page, and hands it over.

The run is at rest in the one database and its copy is paused in the other, so no worker claims a job in either. A page
is one short transaction, written behind what the copy holds, so an interrupted copy continues where it stopped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import bindparam, case, func, select

from lbr.core.errors import DatabaseError, RunNotFoundError, UsageError
from lbr.core.extras import Extra
from lbr.core.text import pluralize
from lbr.core.types import JobState, Move, PauseCause, Paused, Run, RunState
from lbr.store import batches, counters, enqueue, runs
from lbr.store.schema import attempts, extras, items, jobs, prompts, results
from lbr.store.schema import runs as runs_table
from lbr.store.sql import (
    Inserting,
    any_of,
    byte_length,
    is_after,
    lock_table,
    reserve_job_ids,
    take_turns,
    wake_workers,
)
from lbr.store.sql import pages as pages_of_rows

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from sqlalchemy import Column, ColumnElement, Connection, Select, Table

    from lbr.core.types import Millis
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

REUSED_ELSEWHERE = 0
"""The `reused_from` of an answer that came from a job of the database that the run has left."""


def _columns(table: Table, without: str) -> list[Column[Any]]:
    """Return the columns that a copy takes over: all but those that a database sets for itself."""
    return [column for column in table.c if column.name not in without.split()]


_RUN = _columns(runs_table, "id name answerer state created_at pause_cause pause_message move")


def _bytes(column: Any) -> Any:
    return func.coalesce(byte_length(column), 0)


_ATTEMPT_BYTES = select(func.sum(_bytes(attempts.c.text))).where(attempts.c.job_id == prompts.c.job_id)
_JOB_BYTES = _bytes(prompts.c.body) + _bytes(results.c.text) + func.coalesce(_ATTEMPT_BYTES.scalar_subquery(), 0)
for _kind in Extra:
    _JOB_BYTES += _bytes(extras.c[_kind])
_BYTES = case((items.c.first == 1, _JOB_BYTES), else_=0) + _bytes(items.c.metadata)
_ITEMS = (
    select(items.c.job_id, _BYTES.label("bytes"), prompts.c.key, *_columns(items, "run_id job_id"))
    .join_from(items, prompts, prompts.c.job_id == items.c.job_id, isouter=True)
    .outerjoin(results, results.c.job_id == items.c.job_id)
    .outerjoin(extras, extras.c.job_id == items.c.job_id)
    .where(items.c.run_id == bindparam("run"), is_after(items.c.idx, items.c.sample))
    .order_by(items.c.idx, items.c.sample)
    .limit(bindparam("limit"))
)


def _part(job_id: Column[Any], without: str = "", **instead: ColumnElement[Any]) -> tuple[Select[Any], Inserting]:
    """Return how to read a table's rows of some jobs, their job's id first, and how to write them."""
    table: Any = job_id.table
    own = [name for name in (job_id.name, "run_id") if name in table.c]
    copied = [instead.get(one.name, one).label(one.name) for one in _columns(table, " ".join((*own, without)))]
    reading = select(job_id, *copied).where(any_of(job_id, "ids")).order_by(*table.primary_key)
    return reading, Inserting(table, *own, *(one.name for one in copied))


# What belongs to a job.
_PARTS = (
    _part(jobs.c.id, "worker_id lease_until"),
    _part(prompts.c.job_id),
    _part(results.c.job_id, reused_from=case((results.c.reused_from.is_not(None), REUSED_ELSEWHERE))),
    _part(extras.c.job_id),
    _part(attempts.c.job_id, "id"),
)


@dataclass(frozen=True, slots=True)
class Page:
    """A run's inputs behind `start`, an index and a sample, and the `_PARTS` of the jobs that are first among them."""

    start: tuple[int, int]
    items: Sequence[AnyRow]
    parts: Sequence[Sequence[AnyRow]]

    @property
    def end(self) -> tuple[int, int]:
        """The index and the sample of the last row."""
        return self.items[-1].idx, self.items[-1].sample


def has_left(run: Run, aim: str) -> bool:
    """Return whether a run was moved to `aim`."""
    return run.is_paused_by(PauseCause.MOVED_TO) and run.move is not None and run.move.place == aim


def is_copy(copy: Run, run: Run) -> bool:
    """Return whether one run was made as a copy of the other."""
    return (copy.task, copy.created_at) == (run.task, run.created_at)


def is_half_done(copy: Run, run: Run) -> bool:
    """Return whether one run is an unfinished copy of the other."""
    return copy.is_paused_by(PauseCause.MOVING_FROM) and is_copy(copy, run)


def prepare(connection: Connection, now: Millis, name: str, aim: str) -> tuple[Run, Counter[str]]:
    """Return a run that may leave for `aim`, or has left, with its counts. UsageError says what must happen first."""
    run = runs.find(connection, name)
    counts = counters.of_runs(connection, [run.id])[run.id]
    if has_left(run, aim):
        return run, counts
    runs.check_not_moving(run)
    runs.check_not_removing(run)
    batches.check_none_out(connection, now, run)
    if run.sealed_at is None:
        raise UsageError(
            f"run {run.name!r} may not have all of its inputs: its enqueue has not finished; run it again first"
        )
    pending, held = counts[JobState.PENDING], counts[JobState.INFLIGHT]
    if held or (pending and run.state is RunState.ACTIVE):
        way = f"`lbr pause {run.name}`, " if run.state is RunState.ACTIVE else ""
        raise UsageError(
            f"run {run.name!r} is {run.state}, with {pluralize(pending, 'job')} to do and {held} held by workers; {way}wait "
            f"until no worker holds a job (`lbr status {run.name}`), then run the same command again"
        )
    return run, counts


def open_copy(connection: Connection, now: Millis, run: Run, origin: str) -> Run:
    """Return the run that has this name, made as a paused copy if there is none. Safe to repeat."""
    try:
        return runs.find(connection, run.name)
    except RunNotFoundError:
        copy, made = runs.ensure(connection, runs.RunSpec(run.name, run.task, run.max_attempts), now)
    values = runs.pausing(Paused(PauseCause.MOVING_FROM, f"moving from {origin}"))
    return runs.change(connection, copy, values | {"created_at": run.created_at}) if made else copy


def _check_half_done(connection: Connection, copy: Run) -> None:
    """Keep the copy as it is until the transaction ends. UsageError if another process has finished or removed it."""
    current = runs.hold(connection, copy)
    if current.id != copy.id or not current.is_paused_by(PauseCause.MOVING_FROM):
        raise UsageError(
            f"another process finished or removed the copy of run {copy.name!r}; run the same command again"
        )


async def clear(target: Database, copy: Run) -> None:
    """Remove a half-done copy. Interrupted, `lbr rm` finishes it."""
    await target.write(_mark_removed, copy)
    await runs.remove(target, copy)


def _mark_removed(connection: Connection, _now: Millis, copy: Run) -> None:
    _check_half_done(connection, copy)
    runs.change(connection, copy, runs.BEING_REMOVED | {"state": RunState.CANCELLED})


async def pages(database: Database, run: Run, start: tuple[int, int] = (-1, 0)) -> AsyncGenerator[Page]:
    """Yield a run's inputs behind an index and a sample, in pages of as many bytes as a transaction should hold."""
    async for rows in pages_of_rows(lambda bound: database.read(_read_items, run, bound), after=start):
        page = Page(start, rows, await database.read(_read_parts, rows))
        whole = {row.id for row in page.parts[0]}
        if lost := next((row for row in rows if row.key is None or (row.first and row.job_id not in whole)), None):
            raise DatabaseError(
                f"input {lost.idx} of run {run.name!r} in {database.name} has no job or no prompt: another program "
                f"changed the database; restore a copy"
            )
        yield page
        start = page.end


def _read_items(connection: Connection, _now: Millis, run: Run, bound: dict[str, int]) -> tuple[int, list[AnyRow]]:
    rows = connection.execute(_ITEMS, {"run": run.id, **bound}).all()
    return len(rows), list(takewhile(lambda row: row.bytes <= bound["cap"], rows))


def _read_parts(connection: Connection, _now: Millis, rows: Sequence[AnyRow]) -> list[Sequence[AnyRow]]:
    ids = {"ids": [row.job_id for row in rows if row.first]}
    return [connection.execute(reading, ids).all() for reading, _ in _PARTS]


def add_page(connection: Connection, now: Millis, copy: Run, page: Page) -> None:
    """Write a page behind what the copy holds. Safe to repeat. UsageError if another process changed the copy."""
    take_turns(connection, copy.id)
    _check_half_done(connection, copy)
    place = enqueue.last_place(connection, now, copy)
    if place == page.end:
        return
    if place != page.start:
        raise UsageError(f"another process is copying run {copy.name!r}; wait until it ends")
    ids = _add_jobs(connection, copy, page)
    if lost := next((row for row in page.items if row.key not in ids), None):
        raise DatabaseError(
            f"input {lost.idx} of run {copy.name!r} shares the job of an earlier input, but none has it: another "
            f"program changed the database that the run is in; restore a copy"
        )
    rows = [row._asdict() | {"run_id": copy.id, "job_id": ids[row.key]} for row in page.items]
    enqueue.ADD_ITEMS.run(connection, rows)


def _add_jobs(connection: Connection, copy: Run, page: Page) -> dict[bytes, int]:
    """Write the page's jobs with everything that belongs to them; return the ids of all jobs that it names, by key."""
    keys = list(dict.fromkeys(row.key for row in page.items))
    found = connection.execute(enqueue.BY_KEY, {"run": copy.id, "keys": keys}).all()
    ids: dict[bytes, int] = {row.key: row.job_id for row in found}
    new = {row.job_id: row.key for row in page.items if row.first}
    ids |= zip(new.values(), reserve_job_ids(connection, len(new)), strict=True)
    for (_, adding), part in zip(_PARTS, page.parts, strict=True):
        rows = []
        for row in part:
            job_id = ids[new[row[0]]]
            rows.append(row._asdict() | {"id": job_id, "job_id": job_id, "run_id": copy.id})
        adding.run(connection, rows)
    counters.add(connection, Counter((copy.id, row.state) for row in page.parts[0]))
    return ids


async def digest(database: Database, run: Run) -> tuple[int, str]:
    """Return how many inputs a run holds, and a hash of everything that it holds, the same in every database."""
    inputs, running = 0, hashlib.blake2b(digest_size=16)
    async for page in pages(database, run):
        by_job: dict[int, list[list[Any]]] = {}
        for row in (row for part in page.parts for row in part):
            by_job.setdefault(row[0], []).append([*row[1:]])
        for row in page.items:
            # What a job has counts with its first input. The ids of rows do not, because each database has its own.
            facts = [[*row[2:]], *(by_job[row.job_id] if row.first else ())]
            running.update(orjson.dumps(facts, default=bytes.hex, option=orjson.OPT_APPEND_NEWLINE))
        inputs += sum(row.sample == 0 for row in page.items)
    return inputs, running.hexdigest()


def depart(
    connection: Connection, _now: Millis, run: Run, counts: Counter[str], aim: str, *, name: str
) -> dict[str, Any]:
    """Record that the run has gone to `aim`; return the columns that the copy takes over. Safe to repeat.

    Raises DatabaseError, which calls the database `name`, if the run has changed since it was prepared with these counts.
    """
    # A claim that saw the run active must be visible before the counts are read.
    lock_table(connection, runs_table)
    current = runs.find(connection, run.name)
    if not has_left(current, aim):
        if (current, counters.of_runs(connection, [run.id])[run.id]) != (run, counts):
            raise DatabaseError(
                f"run {run.name!r} in {name} changed while it was copied, and stays there; run the same command again"
            )
        pause = (None, None) if run.pause is None else (run.pause.cause, run.pause.message)
        values = runs.pausing(Paused(PauseCause.MOVED_TO, f"moved to {aim}"))
        values["move"] = Move(aim, run.state, *pause).to_json()
        current = runs.change(connection, run, values)
    columns = select(*_RUN).where(runs_table.c.id == run.id)
    state, before = (RunState.ACTIVE, None) if current.move is None else current.move.before
    pausing = runs.NOT_PAUSED if before is None else runs.NOT_PAUSED | runs.pausing(before)
    return connection.execute(columns).one()._asdict() | pausing | {"state": state}


def arrive(connection: Connection, _now: Millis, copy: Run, values: dict[str, Any], counts: Counter[str]) -> None:
    """Give the copy the columns and the other counts of the run: from now on it is the run.

    Raises UsageError if another process finished or removed the copy.
    """
    _check_half_done(connection, copy)
    others = {(copy.id, name): count for name, count in counts.items() if name not in set(JobState)}
    counters.add(connection, Counter(others))
    runs.change(connection, copy, values)
    wake_workers(connection)
