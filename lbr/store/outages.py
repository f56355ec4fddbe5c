"""Failures judged by other calls: outages and their probes, wrong keys, wrong set-ups; decided by `lbr.core.outages`.

One row of `outages` for each model that all workers wait, or waited, for. Runs are locked before outages, outages
before limits.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, func, select, update

from lbr.core.errors import Symptom
from lbr.core.outages import MAX_WAIT_MS, TURN_MS, Backlog, ModelState, judge
from lbr.core.text import pluralize
from lbr.core.types import JobId, JobState, PauseCause, Paused, RunId, RunState
from lbr.store.counters import of_runs
from lbr.store.runs import hold_states, move_page, run_of
from lbr.store.schema import INFLIGHT, SILENT_MS, attempts, counters, jobs, outages, runs, workers
from lbr.store.sql import BulkStatement, PreparedQuery, Rows, any_of, types_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy import Connection

    from lbr.core.types import Claim, Failure, Millis, Settlement, WorkerId
    from lbr.store.schema import AnyRow
    from lbr.store.settle import Settled

SAME_FAILURES = 20
"""If this many jobs of a run that has nothing done fail alike, the run asks for what its model does not have."""
PROBED_MS = 1_000
"""How long to wait while a model is being probed; the end of the probe wakes the workers sooner."""

_DIGITS = re.compile(r"\d+")
_STATE = [one.name for one in fields(ModelState)]
_STATE_COLUMNS = [outages.c[name] for name in _STATE]
_LOCKED = PreparedQuery(
    select(outages.c.answerer, *_STATE_COLUMNS)
    .where(any_of(outages.c.answerer, "answerers"))
    .order_by(outages.c.answerer)
    .with_for_update()
)
_WAITED_FOR = (
    select(outages.c.answerer, outages.c.probe_job, outages.c.probe_seq, *_STATE_COLUMNS)
    .where(any_of(outages.c.answerer, "answerers"), outages.c.since.is_not(None))
    .order_by(outages.c.answerer)
)
# A statement of its own, so that it sees what the last holder of the lock wrote.
_PROBED = select(jobs.c.id, jobs.c.claim_seq).where(any_of(jobs.c.id, "ids"), INFLIGHT)
_ACTIVE = select(runs.c.id).where(any_of(runs.c.answerer, "answerers"), runs.c.state == RunState.ACTIVE)
_DONE = case((counters.c.name == JobState.DONE, counters.c.value), else_=0)
_BACKLOG = (
    select(runs.c.answerer, runs.c.id, func.sum(counters.c.value - _DONE), func.sum(_DONE))
    .join_from(runs, counters, runs.c.id == counters.c.run_id)
    .where(any_of(runs.c.answerer, "answerers"), runs.c.state == RunState.ACTIVE)
    .where(counters.c.name.in_([JobState.PENDING, JobState.INFLIGHT, JobState.DONE]))
    .group_by(runs.c.answerer, runs.c.id)
)
_CALLS_OF_OTHERS = (
    select(func.count())
    .join_from(jobs, runs, jobs.c.run_id == runs.c.id)
    .where(INFLIGHT, runs.c.answerer == bindparam("answerer"))
    .where(jobs.c.worker_id != select(jobs.c.worker_id).where(jobs.c.id == bindparam("job")).scalar_subquery())
)
_OTHERS = select(func.count()).where(workers.c.id != bindparam("worker"), workers.c.seen_at > bindparam("since"))
_FAILED_LATELY = (
    select(attempts.c.job_id, attempts.c.error, attempts.c.message)
    .join_from(attempts, jobs, (jobs.c.id == attempts.c.job_id) & (jobs.c.claim_seq == attempts.c.claim_seq))
    .where(attempts.c.what == "failed", jobs.c.state == JobState.FAILED, jobs.c.run_id == bindparam("run"))
    .order_by(attempts.c.id.desc())
    .limit(1_000)
)


def _replacing(rows: Rows) -> Any:
    adding = rows.insert(outages)
    changed = {name: adding.excluded[name] for name in _STATE}
    return adding.on_conflict_do_update(index_elements=["answerer"], set_=changed)


_SAVE = BulkStatement(types_of(outages, "answerer", *_STATE), _replacing)


def judge_failures(
    connection: Connection, batch: list[Settlement], answerers: Mapping[int, str], now: Millis, settled: Settled
) -> tuple[list[Settlement], dict[RunId, Paused]]:
    """Judge the failed calls of a batch by what all workers saw of their models; most batches need no statement.

    Return the batch, uncharged where the job is not to blame, and the runs to pause; note the rest in `settled`.
    """
    models = {place: answerers[one.claim.job_id] for place, one in enumerate(batch) if _needs_judging(one)}
    judged, pauses = list(batch), dict[RunId, Paused]()
    if not models:
        return judged, pauses
    before = _lock(connection, batch, sorted(set(models.values())))
    states, backlogs = dict(before), _backlogs(connection, list(before))
    for place, model in models.items():
        settlement, backlog, job_id = batch[place], backlogs[model], batch[place].claim.job_id
        if settlement.claim.probe:
            others = connection.scalar(_CALLS_OF_OTHERS, {"answerer": model, "job": job_id})
            backlog = replace(backlog, others=others or 0)
        one = judge(settlement, model, states[model], backlog, now)
        states[model], judged[place] = one.state, one.settlement
        if one.settlement is not settlement:
            settled.given_back.add(job_id)
        if one.pause is not None:
            pauses |= dict.fromkeys(backlog.runs, one.pause)
        if one.alone and settlement.outcome.failure is not None:
            settled.unreachable[model] = settlement.outcome.failure.message
        if one.notice is not None:
            settled.notices.append(one.notice)
    changed = [(model, *_values(state)) for model, state in states.items() if state != before[model]]
    _SAVE.run_plain(connection, changed)
    return judged, pauses


def _needs_judging(settlement: Settlement) -> bool:
    failure = settlement.outcome.failure
    return settlement.claim.probe or (failure is not None and failure.symptom not in {None, Symptom.NO_CAPACITY})


def _lock(connection: Connection, batch: list[Settlement], models: list[str]) -> dict[str, ModelState]:
    """Return the models' states, locked until the transaction ends like all of their runs."""
    # All runs at once and before outages, as a claim does, so that two transactions never wait for each other.
    active = set(connection.execute(_ACTIVE, {"answerers": models}).scalars())
    hold_states(connection, active | {one.claim.run_id for one in batch}, to_change=True)
    rows = _LOCKED.all(connection, {"answerers": models})
    return dict.fromkeys(models, ModelState()) | {model: ModelState(*values) for model, *values in rows}


def _values(state: ModelState) -> list[Any]:
    return [getattr(state, name) for name in _STATE]


def _backlogs(connection: Connection, models: list[str]) -> dict[str, Backlog]:
    found = dict.fromkeys(models, Backlog())
    for model, run_id, open_, done in connection.execute(_BACKLOG, {"answerers": models}).all():
        one = found[model]
        unfinished = one.runs | {run_id} if open_ else one.runs
        found[model] = Backlog(one.open + int(open_), one.done + int(done), runs=unfinished)
    return found


def waiting(
    connection: Connection, names: Iterable[str], worker: WorkerId, now: Millis, *, lock: bool
) -> dict[str, tuple[str, int]]:
    """Return the models of these that all workers wait for, with the cause, and until when this worker does.

    That time is 0 if the worker may probe now. With `lock` it stays so until the transaction ends.
    """
    found = {}
    query = _WAITED_FOR.with_for_update() if lock else _WAITED_FOR
    rows = connection.execute(query, {"answerers": sorted(names)}).all()
    probes = [one.probe_job for one in rows if one.probe_job is not None]
    probed = {tuple(one) for one in connection.execute(_PROBED, {"ids": probes}).all()} if probes else set()
    for model, probe_job, probe_seq, *values in rows:
        state = ModelState(*values)
        bound = {"worker": worker, "since": now - SILENT_MS}
        last = state.worker == worker and connection.scalar(_OTHERS, bound)
        # A clock that was ahead must not set a time that no worker waits for.
        until = min(state.probe_at, now + MAX_WAIT_MS) + (TURN_MS if last else 0)
        if (probe_job, probe_seq) in probed:
            until = now + PROBED_MS
        found[model] = state.reason, until if until > now else 0
    return found


def note_probes(connection: Connection, probes: Mapping[str, Claim], worker: WorkerId) -> None:
    """Store which claims are probes, so that no other begins before they end."""
    for model, claim in sorted(probes.items()):
        values = {"probe_job": claim.job_id, "probe_seq": claim.claim_seq, "worker": worker}
        connection.execute(update(outages).where(outages.c.answerer == model).values(values))


def pause_wrong_set_ups(
    connection: Connection, batch: Sequence[Settlement], now: Millis, settled: Settled
) -> dict[RunId, Paused]:
    """Give back, uncharged, the jobs of runs whose calls all failed alike; after the batch's counters were changed.

    Return the runs to pause; note the jobs in `settled`.
    """
    pauses: dict[RunId, Paused] = {}
    failures = ((s.claim.run_id, s.outcome.failure) for s in batch if s.state is JobState.FAILED)
    failed = {run_id: one for run_id, one in failures if one is not None and one.symptom is Symptom.SET_UP}
    for run_id, failure in sorted(failed.items()):
        row = connection.execute(select(runs).where(runs.c.id == run_id)).one()
        needed = _alike_needed(connection, row)
        rows = connection.execute(_FAILED_LATELY, {"run": run_id}).all() if needed else ()
        alike = [(int(one.job_id), str(JobState.FAILED)) for one in rows if _sign(one) == _sign(failure)]
        if needed and len(alike) >= needed:
            move_page(connection, run_of(row), alike, JobState.PENDING, now)
            settled.given_back |= {JobId(job_id) for job_id, _ in alike}
            words = (
                f"all {pluralize(len(alike), 'job')} that were called failed alike: {failure.message} "
                f"(a wrong model or setting: `lbr rm {row.name}`, then enqueue it again)"
            )
            pauses[run_id] = Paused(PauseCause.SET_UP, words)
    return pauses


def _alike_needed(connection: Connection, run: AnyRow) -> int | None:
    """Return how many jobs must have failed alike for the run to be paused; None if no number is enough."""
    counts = of_runs(connection, [RunId(run.id)])[RunId(run.id)]
    if counts[JobState.DONE]:
        return None
    if run.state == RunState.PAUSED:  # by this very failure: these calls were under way
        return 1
    left = counts[JobState.PENDING] + counts[JobState.INFLIGHT]
    is_all = not left and run.sealed_at is not None
    return min(SAME_FAILURES, counts[JobState.FAILED]) if is_all else SAME_FAILURES


def _sign(failure: AnyRow | Failure) -> tuple[str, str]:
    return failure.error, _DIGITS.sub("", failure.message)
