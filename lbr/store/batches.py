"""Batches: each step of one is a short transaction, of the worker that holds the batch's lease.

A step names the state in which the worker took the batch, so that of two workers one does it. The jobs of a batch are
parked: pending, with `claim_seq` raised, and skipped by whatever makes jobs due. Only the end of their batch unparks
them. Batches are locked before runs, runs before jobs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import bindparam, case, delete, func, insert, literal_column, or_, select, update

from lbr.core.batches import (
    AUTO_REQUESTS,
    LOOK_AGAIN_MS,
    PARKED,
    TAIL,
    TOKEN_LIMIT,
    BatchRow,
    BatchState,
    Found,
    Lane,
    new_nonce,
)
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.pricing import max_output_tokens, tokens_of
from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.text import pluralize
from lbr.core.types import Claim, JobId, JobState, Millis, PauseCause, Paused, Prompt, RunId, RunState, WorkerId
from lbr.store import counters
from lbr.store.claim import DUE_FRESH, own_settings
from lbr.store.limits import budget_of, is_batching
from lbr.store.runs import all_runs, find, hold_states, pausing
from lbr.store.schema import IS_PARKED, batch_jobs, batches, jobs, prompts, results, runs
from lbr.store.settle import Settled, settle
from lbr.store.sql import Inserting, any_of, json_object, wake_workers

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import ColumnElement, Connection, Select

    from lbr.core.limits import Budget, CallBound
    from lbr.core.types import Run, Settlement
    from lbr.store.schema import AnyRow

PAGE = 100
"""Claims that are read at a time to be uploaded."""
ABANDONED_MS = 30_000
"""An enqueue that has added nothing for this long counts as interrupted: its run is not waited for."""
OVERDUE_MS = 25 * 3600 * 1000
"""Providers promise an answer within a day."""
OPEN: ColumnElement[bool] = literal_column("batches.state NOT IN ('settled', 'released')")
_UNSENT: ColumnElement[bool] = literal_column("batches.state IN ('planned', 'uploaded')")
_ADD_JOBS = Inserting(batch_jobs, "batch_id", "job_id", "claim_seq")
_OF_BATCH = select(batch_jobs.c.job_id).where(batch_jobs.c.batch_id == bindparam("batch"))
_SEQ = (
    select(batch_jobs.c.claim_seq)
    .where(batch_jobs.c.batch_id == bindparam("batch"), batch_jobs.c.job_id == jobs.c.id)
    .scalar_subquery()
)
_CLAIMS = (
    select(batch_jobs.c.job_id, batch_jobs.c.claim_seq)
    .add_columns(*(prompts.c[name] for name in ("key", "body", "chat", "settings", "sample")))
    .join_from(batch_jobs, prompts, prompts.c.job_id == batch_jobs.c.job_id)
    .where(batch_jobs.c.batch_id == bindparam("batch"), batch_jobs.c.job_id > bindparam("after"))
    .order_by(batch_jobs.c.job_id)
    .limit(PAGE)
)
_LINES = select(batch_jobs.c.job_id, batch_jobs.c.claim_seq).where(
    batch_jobs.c.batch_id == bindparam("batch"), any_of(batch_jobs.c.job_id, "ids")
)
_PARKED = select(jobs.c.id).where(IS_PARKED, any_of(jobs.c.id, "ids")).order_by(jobs.c.id).with_for_update()
_ID = re.compile(r"[\w.:-]{1,200}", re.ASCII)
_NO_LEASE = {"worker_id": None, "lease_until": None}


class LostBatchError(Exception):
    """The batch is another worker's by now, or the user has given it up: this worker does nothing more with it."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a worker asks for: a batch of at most `most` requests of a run, if no more than `batches` are out.

    `bound` is what a call may cost besides its prompt, None if that is not known.
    """

    worker: WorkerId
    lease: float
    run_id: RunId
    most: int
    batches: int
    bound: CallBound | None = None


def row_of(row: AnyRow) -> BatchRow:
    """Read a row of `batches`. DatabaseError names the batch if the row is invalid."""
    values = {one.name: getattr(row, one.name) for one in fields(BatchRow)}
    try:
        found = None
        if row.found is not None:
            stored = json_object(row.found, "state of a batch")
            found = Found(**{**stored, "files": tuple(stored.get("files", ()))})
        names = () if found is None else (found.provider_id, *found.files)
        if not all(_ID.fullmatch(name) for name in (row.file_id or "none", *names)):  # they become parts of addresses
            raise DatabaseError(f"expected the provider's ids, got: {row.file_id!r}, {names!r}"[:200])  # noqa: TRY301 - as others
        return BatchRow(**values | {"state": BatchState(row.state), "found": found})
    except (DatabaseError, ValueError, TypeError) as error:
        raise DatabaseError(f"cannot read batch {row.nonce!r}: {error}") from error


def all_batches(connection: Connection, _now: Millis, run_id: RunId | None = None) -> list[BatchRow]:
    """Return the batches of a run, or all, the oldest first."""
    query = select(batches).order_by(batches.c.id)
    return [row_of(row) for row in connection.execute(query if run_id is None else query.where(_of(run_id))).all()]


def of_runs(connection: Connection, now: Millis, name: str | None) -> tuple[Millis, list[tuple[str, BatchRow]]]:
    """Return the time, and the batches of the run of that name, or all, the oldest first, with their runs' names."""
    found = all_runs(connection) if name is None else [find(connection, name)]
    names = {run.id: run.name for run in found}
    rows = all_batches(connection, now, None if name is None else found[0].id)
    return now, [(names[row.run_id], row) for row in rows if row.run_id in names]


def _of(run_id: RunId) -> ColumnElement[bool]:
    return batches.c.run_id == run_id


# --- plan -------------------------------------------------------------------------------------------------------------


def can_plan(connection: Connection, now: Millis, request: PlanRequest) -> bool:
    """Look, without a lock, whether `plan` would do anything."""
    chosen = _choose(connection, now, request, DUE_FRESH)
    return bool(chosen.ids) or chosen.pause is not None


def plan(connection: Connection, now: Millis, request: PlanRequest) -> BatchRow | None:
    """Claim and park the jobs of a new batch, and reserve what it may cost; None if there is nothing to send yet.

    A run whose budget is spent is paused.
    """
    hold_states(connection, [request.run_id], to_change=True)
    chosen = _choose(connection, now, request, DUE_FRESH.with_for_update(skip_locked=True))
    if chosen.pause is not None:
        connection.execute(update(runs).where(runs.c.id == request.run_id).values(pausing(chosen.pause)))
    if not chosen.ids:
        return None
    parking = update(jobs).where(any_of(jobs.c.id, "ids")).values(claim_seq=jobs.c.claim_seq + 1, available_at=PARKED)
    parked = connection.execute(parking.returning(jobs.c.id, jobs.c.claim_seq), {"ids": list(chosen.ids)}).all()
    values = {"run_id": request.run_id, "nonce": new_nonce(), "state": BatchState.PLANNED, "count": len(parked)}
    times = {"created_at": now, "next_poll_at": now, "cursor": 0, "reserved_nanos": chosen.nanos}
    made = connection.execute(insert(batches).values(values | times | _lease(now, request)).returning(batches)).one()
    _ADD_JOBS.run_plain(connection, [(made.id, row.id, row.claim_seq) for row in sorted(parked)])
    run_id = request.run_id
    deltas = Counter({(run_id, counters.PARKED): len(parked), (run_id, counters.RESERVED): chosen.nanos})
    counters.add(connection, deltas)
    return row_of(made)


def _lease(now: Millis, request: PlanRequest) -> dict[str, int]:
    return {"worker_id": request.worker, "lease_until": now + round(request.lease * 1000)}


class _Chosen(NamedTuple):
    """The jobs for a batch that may be planned now, and what they may cost; or why the run must pause."""

    ids: Sequence[int] = ()
    nanos: int = 0
    pause: Paused | None = None


def _choose(connection: Connection, now: Millis, request: PlanRequest, due: Select[tuple[int]]) -> _Chosen:
    run = connection.execute(select(runs).where(runs.c.id == request.run_id)).one_or_none()
    if run is None or run.state != RunState.ACTIVE or run.lane not in {Lane.BATCH, Lane.AUTO}:
        return _Chosen()
    counts = counters.of_runs(connection, [request.run_id])[request.run_id]
    budget = None if run.budget_nanos is None else budget_of(run.budget_nanos, counts, run.highest_nanos)
    if not is_batching(Lane(run.lane), counts, budget, bounded=request.bound is not None):
        return _Chosen()
    if budget is not None:
        budget = replace(budget, bounded=True)
        if budget.is_spent:
            return _Chosen(pause=Paused(PauseCause.BUDGET, budget.spent_message))
    most = _most(connection, now, request)
    found = connection.execute(due, {"run": run.id, "now": now, "most": most}).all() if most else ()
    ids = [row.id for row in found]
    is_whole = run.sealed_at is not None or now - run.enqueued_at > ABANDONED_MS
    least = min(most, AUTO_REQUESTS if run.lane == Lane.AUTO else TAIL + 1) if is_whole else most
    if not most or len(ids) < least:
        return _Chosen()
    count, nanos = len(ids), 0
    if budget is not None:
        count, nanos = budget.reserve(_bounds(connection, ids, budget, request.bound))
    return _Chosen(ids[:count], nanos)


def _bounds(connection: Connection, ids: Sequence[int], budget: Budget, bound: CallBound | None) -> list[int]:
    """Return what the call of each job may cost."""
    if bound is None:
        return [budget.reserved] * len(ids)
    # The characters of the stored form, because the texts of a batch of images would not fit into memory.
    sizes = select(prompts.c.job_id, func.length(prompts.c.body), prompts.c.settings)
    rows = connection.execute(sizes.where(any_of(prompts.c.job_id, "ids")), {"ids": list(ids)}).all()
    costs = {
        job_id: bound.nanos(tokens_of(characters), max_output_tokens(own_settings(None, settings) or {}))
        for job_id, characters, settings in rows
    }
    return [costs.get(job_id, 0) for job_id in ids]


def _most(connection: Connection, now: Millis, request: PlanRequest) -> int:
    """Return how many requests a new batch of the run may have.

    When the account's tokens in batches were too many, the next batch is half as large, and waits for all others.
    """
    open_ = select(func.count()).select_from(batches).where(OPEN)
    if (connection.scalar(open_.where(_of(request.run_id))) or 0) >= request.batches:
        return 0
    capped = select(batches.c.count.label("size"), batches.c.credential, batches.c.ended_at).where(
        _of(request.run_id), batches.c.state == BatchState.RELEASED, batches.c.error == TOKEN_LIMIT
    )
    last = connection.execute(capped.order_by(batches.c.id.desc()).limit(1)).one_or_none()
    if last is None:
        return request.most
    others = connection.scalar(open_.where(batches.c.credential == last.credential))
    if others or 0 <= now - last.ended_at < LOOK_AGAIN_MS:
        return 0
    return max(1, min(request.most, int(last.size) // 2))


# --- take and give back ------------------------------------------------------------------------------------------------


def _due(now: Millis, run_ids: Collection[RunId]) -> Select[tuple[int]]:
    """Select the ids of these runs' batches of which a step is due; a time too far ahead is that of a wrong clock."""

    def has_come(column: ColumnElement[Any]) -> ColumnElement[bool]:
        return or_(column <= now, column > now + MAX_AHEAD_MS)

    free = batches.c.lease_until.is_(None) | has_come(batches.c.lease_until)
    # A paused run sends nothing; what was sent goes on.
    goes_on = ~_UNSENT | (runs.c.state != RunState.PAUSED)
    return (
        select(batches.c.id)
        .join_from(batches, runs, runs.c.id == batches.c.run_id)
        .where(OPEN, batches.c.run_id.in_(list(run_ids)), has_come(batches.c.next_poll_at), free, goes_on)
        .order_by(batches.c.next_poll_at, batches.c.id)
        .limit(1)
    )


def runs_of_open(connection: Connection, _now: Millis) -> set[RunId]:
    """Return the runs that have a batch which is not settled or released."""
    return set(connection.execute(select(batches.c.run_id).where(OPEN)).scalars())


def is_due(connection: Connection, now: Millis, run_ids: Collection[RunId]) -> bool:
    """Look, without a lock, whether `take` would return a batch."""
    return connection.scalar(_due(now, run_ids)) is not None


def take(
    connection: Connection, now: Millis, worker: WorkerId, run_ids: Collection[RunId], lease: float
) -> BatchRow | None:
    """Take the batch of these runs whose step has been due the longest. One whose sender died is unsure from now on."""
    chosen = _due(now, run_ids).with_for_update(of=batches, skip_locked=True).cte("due").prefix_with("MATERIALIZED")
    state = case((batches.c.state == BatchState.SENDING, literal_column("'unsure'")), else_=batches.c.state)
    leased = {"worker_id": worker, "lease_until": now + round(lease * 1000)}
    taking = update(batches).where(batches.c.id.in_(select(chosen.c.id))).values(state=state, **leased)
    row = connection.execute(taking.returning(batches)).one_or_none()
    return None if row is None else row_of(row)


def renew(connection: Connection, now: Millis, row: BatchRow, lease: float) -> None:
    """Hold a batch for longer, in whatever state it is by now."""
    mine = (batches.c.id == row.id, batches.c.worker_id == row.worker_id, OPEN)
    connection.execute(update(batches).where(*mine).values(lease_until=now + round(lease * 1000)))


def _advance(connection: Connection, row: BatchRow, **values: Any) -> BatchRow:
    """Change a batch that is as this worker took it. Raises LostBatchError, and changes nothing, for any other."""
    mine = (batches.c.id == row.id, batches.c.state == row.state, batches.c.cursor == row.cursor)
    changing = update(batches).where(*mine, batches.c.worker_id == row.worker_id).values(**values)
    changed = connection.execute(changing.returning(batches)).one_or_none()
    if changed is None:
        raise LostBatchError
    return row_of(changed)


def put_back(connection: Connection, now: Millis, row: BatchRow, wait_ms: int, error: str | None = None) -> None:
    """Give a batch back as it is; its next step is due after a wait. `error` is why, for people."""
    _advance(connection, row, next_poll_at=now + wait_ms, error=error, **_NO_LEASE)


# --- the steps ----------------------------------------------------------------------------------------------------------


def claims_of(connection: Connection, _now: Millis, row: BatchRow, after: int) -> list[Claim]:
    """Return a page of the claims of a batch behind a job, in the order of their jobs."""
    claims = []
    for one in connection.execute(_CLAIMS, {"batch": row.id, "after": after}).all():
        prompt = Prompt.from_body(one.body, chat=bool(one.chat))
        own, sample = own_settings(prompt, one.settings), one.sample or 0
        claim = Claim(one.job_id, row.run_id, one.claim_seq, 0, 0, prompt, one.key, settings=own, sample=sample)
        claims.append(claim)
    return claims


def leave_out(connection: Connection, now: Millis, row: BatchRow, ids: Sequence[JobId], *, fresh: bool) -> BatchRow:
    """Unpark jobs that this batch cannot hold: for another batch if `fresh`, else to be answered online."""
    left = _advance(connection, row, count=batches.c.count - len(ids))
    for start in range(0, len(ids), 5_000):
        chosen = {"ids": list(ids[start : start + 5_000])}
        _unpark(connection, now, row, any_of(jobs.c.id, "ids"), chosen, fresh=fresh)
        gone = delete(batch_jobs).where(batch_jobs.c.batch_id == row.id, any_of(batch_jobs.c.job_id, "ids"))
        connection.execute(gone, chosen)
    return left


def uploaded(connection: Connection, now: Millis, /, row: BatchRow, **values: Any) -> BatchRow:
    """Record the upload: `file_id`, `bytes`, `provider` and `credential`."""
    return _advance(connection, row, state=BatchState.UPLOADED, next_poll_at=now, **values)


def intend(connection: Connection, now: Millis, row: BatchRow, lease: float) -> BatchRow:
    """Record that the batch is about to be created: from now on the provider may have it. A paused run sends none."""
    until = now + round(lease * 1000)
    sending = _advance(connection, row, state=BatchState.SENDING, sent_at=now, looked_at=None, lease_until=until)
    if hold_states(connection, [row.run_id]).get(row.run_id) is not RunState.ACTIVE:
        raise LostBatchError
    return sending


def withdraw(connection: Connection, now: Millis, row: BatchRow, wait_ms: int, error: str | None = None) -> None:
    """Take the intent back, because nothing was sent."""
    _advance(connection, row, state=BatchState.UPLOADED, next_poll_at=now + wait_ms, error=error, **_NO_LEASE)


def doubt(connection: Connection, now: Millis, row: BatchRow, wait_ms: int, error: str) -> None:
    """Record that the reply to the creation was lost."""
    _advance(connection, row, state=BatchState.UNSURE, next_poll_at=now + wait_ms, error=error, **_NO_LEASE)


def not_found(connection: Connection, now: Millis, row: BatchRow) -> bool:
    """Record that the provider does not list an unsure batch. Return whether that proves it: at the second look."""
    first = row.looked_at
    if first is not None and now - first >= LOOK_AGAIN_MS:
        withdraw(connection, now, row, 0)
        return True
    looked = first if first is not None and first <= now else now
    _advance(connection, row, looked_at=looked, next_poll_at=looked + LOOK_AGAIN_MS, **_NO_LEASE)
    return False


def sent(connection: Connection, now: Millis, row: BatchRow, found: Found, wait_ms: int) -> None:
    """Record what the provider reports of a batch: after its creation, when it was found again, and at each poll."""
    state = BatchState.ENDED if found.ended else BatchState.SENT
    due = now if found.ended else now + wait_ms
    values = {"found": orjson.dumps(asdict(found)).decode(), "error": None, "next_poll_at": due}
    _advance(connection, row, state=state, **values, **_NO_LEASE)


def settle_page(
    connection: Connection, now: Millis, row: BatchRow, page: Sequence[Settlement], cursor: int
) -> tuple[BatchRow, Settled]:
    """Settle lines of the results up to a cursor. What is no line of this batch, or a repeated one, changes nothing."""
    moved = _advance(connection, row, cursor=cursor)
    by_job = {one.claim.job_id: one for one in reversed(page)}
    bound = {"batch": row.id, "ids": sorted(by_job)}
    known = {(line.job_id, line.claim_seq) for line in connection.execute(_LINES, bound).all()}
    ours = {job_id: s for job_id, s in by_job.items() if (job_id, s.claim.claim_seq) in known}
    before = set(connection.execute(_PARKED, {"ids": sorted(ours)}).scalars())
    settled = settle(connection, now, [s for job_id, s in sorted(ours.items()) if job_id in before])
    if not before <= settled.taken:
        raise DatabaseError(f"expected {len(before)} answers of batch {row.nonce} to be taken; nothing was written")
    marking = update(results).where(any_of(results.c.job_id, "ids")).values(lane=Lane.BATCH)
    connection.execute(marking, {"ids": sorted(before)})
    counters.add(connection, Counter({(row.run_id, counters.PARKED): -len(before)}))
    return moved, settled


def finish(connection: Connection, now: Millis, row: BatchRow) -> int:
    """End a batch whose results are settled; the jobs that were not among them go online. Return how many."""
    return _close(connection, now, _advance(connection, row, **_ended(now, BatchState.SETTLED)), row, fresh=False)


def release(connection: Connection, now: Millis, row: BatchRow, error: str, pause: Paused | None = None) -> int:
    """End a batch that the provider does not have; its jobs may be in another one. Return how many. `pause` the run."""
    released = _advance(connection, row, **_ended(now, BatchState.RELEASED), error=error)
    if pause is not None:
        active = (runs.c.id == row.run_id, runs.c.state == RunState.ACTIVE)
        connection.execute(update(runs).where(*active).values(pausing(pause)))
    return _close(connection, now, released, row, fresh=True)


def forget(connection: Connection, now: Millis, nonce: str) -> int:
    """Give a batch up, whatever the provider does with it; its jobs are due again. Return how many.

    UsageError if there is no such batch, or it has ended.
    """
    query = select(batches).where(batches.c.nonce == nonce).with_for_update()
    row = connection.execute(query).one_or_none() if nonce.isascii() and nonce.isprintable() else None
    if row is None or not BatchState(row.state).is_open:
        what = "no batch" if row is None else f"batch is {row.state}, so there is nothing to forget:"
        raise UsageError(f"{what} {nonce!r}; `lbr batches` shows those that are open")
    return release(connection, now, row_of(row), "forgotten by the user")


def _ended(now: Millis, state: BatchState) -> dict[str, Any]:
    return {"state": state, "ended_at": now, "reserved_nanos": 0, **_NO_LEASE}


def _close(connection: Connection, now: Millis, closed: BatchRow, row: BatchRow, *, fresh: bool) -> int:
    count = _unpark(connection, now, closed, jobs.c.id.in_(_OF_BATCH), {}, fresh=fresh)
    counters.add(connection, Counter({(row.run_id, counters.RESERVED): -row.reserved_nanos}))
    connection.execute(delete(batch_jobs).where(batch_jobs.c.batch_id == row.id))
    return count


def _unpark(
    connection: Connection,
    now: Millis,
    row: BatchRow,
    which: ColumnElement[bool],
    values: dict[str, Any],
    *,
    fresh: bool,
) -> int:
    """Make parked jobs of a batch due again, uncharged; those of a cancelled run are cancelled. Return how many."""
    cancelled = hold_states(connection, [row.run_id]).get(row.run_id) is RunState.CANCELLED
    state = JobState.CANCELLED if cancelled else JobState.PENDING
    changed: dict[str, Any] = {"state": state, "available_at": now, "finished_at": now if cancelled else None}
    if fresh:
        changed["retry_seq"] = jobs.c.claim_seq
    unparking = update(jobs).where(IS_PARKED, which, jobs.c.claim_seq == _SEQ).values(changed)
    count = connection.execute(unparking, values | {"batch": row.id}).rowcount
    deltas = counters.moved([(row.run_id, JobState.PENDING, state)] * count)
    deltas[row.run_id, counters.PARKED] -= count
    counters.add(connection, deltas)
    wake_workers(connection)
    return count


# --- other commands -----------------------------------------------------------------------------------------------------


def cancel(connection: Connection, now: Millis, run: Run) -> int:
    """Release the batches of a cancelled run that were not sent, and make the others due; return how many jobs ended."""
    mine = select(batches).where(_of(run.id), OPEN).order_by(batches.c.id).with_for_update()
    count = 0
    for row in map(row_of, connection.execute(mine).all()):
        if row.state.may_be_out:
            connection.execute(update(batches).where(batches.c.id == row.id).values(next_poll_at=now))
        else:
            count += release(connection, now, row, "cancelled")
    return count


def check_none_out(connection: Connection, _now: Millis, run: Run) -> None:
    """Raise UsageError if a batch of the run is open, so that it must stay as it is."""
    found = connection.execute(select(batches.c.nonce, batches.c.count.label("size")).where(_of(run.id), OPEN)).all()
    if found:
        count = pluralize(sum(row.size for row in found), "request")
        raise UsageError(
            f"run {run.name!r} has {len(found)} batch{'es' * (len(found) > 1)} of {count} at its provider, and their "
            f"answers are paid for; let a worker settle them (`lbr batches {run.name}`), or end them with "
            f"`lbr cancel {run.name}` and a worker, or give one up with `lbr batches --forget {found[0].nonce}`"
        )


def overdue(connection: Connection, now: Millis) -> list[tuple[BatchRow, str]]:
    """Return the batches that should have ended by now, each with the name of its run."""
    query = select(batches, runs.c.name).join_from(batches, runs, runs.c.id == batches.c.run_id).where(OPEN)
    rows = connection.execute(query.where(batches.c.sent_at < now - OVERDUE_MS).order_by(batches.c.id)).all()
    return [(row_of(row), row.name) for row in rows]
