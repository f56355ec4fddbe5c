"""Failures judged by other calls: outages and their probes, wrong keys, wrong set-ups; decided by `lbr.core.outages`.

One row of `outages` for each model that all workers wait, or waited, for. Runs are locked before outages, outages
before limits.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, select, update

from lbr.core.errors import Symptom
from lbr.core.outages import MAX_WAIT_MS, TURN_MS, Backlog, ModelState, judge
from lbr.core.text import pluralize
from lbr.core.types import JobId, JobState, PauseCause, Paused, RunId, RunState
from lbr.store.counters import of_runs
from lbr.store.runs import hold_states, move_page, run_of
from lbr.store.schema import INFLIGHT, SILENT_MS, attempts, counters, jobs, outages, runs, workers
from lbr.store.sql import Inserting, PreparedQuery, Updating, any_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy import Connection

    from lbr.core.types import Claim, Failure, Millis, Settlement, WorkerId
    from lbr.store.schema import AnyRow

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
_COUNTS = (
    select(runs.c.answerer, runs.c.id, counters.c.name, func.sum(counters.c.value))
    .join_from(runs, counters, runs.c.id == counters.c.run_id)
    .where(any_of(runs.c.answerer, "answerers"), runs.c.state == RunState.ACTIVE)
    .where(counters.c.name.in_([JobState.PENDING, JobState.INFLIGHT, JobState.DONE]))
    .group_by(runs.c.answerer, runs.c.id, counters.c.name)
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
_MAKE, _SAVE = Inserting(outages, "answerer", *_STATE, unless="answerer"), Updating(outages, "answerer", *_STATE)


@dataclass(slots=True)
class Judged:
    """What became of a batch: its settlements, and the runs to pause.

    `given_back` are the jobs that are not charged. `unreachable` are the models that only this worker cannot reach,
    with the reason; `reached` those that a worker has reached since this one's first refusal. `notices` are lines for
    the worker's log.
    """

    settlements: list[Settlement]
    pauses: dict[RunId, Paused] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)
    given_back: set[JobId] = field(default_factory=set)


def judge_failures(
    connection: Connection, settlements: list[Settlement], answerers: Mapping[int, str], now: Millis
) -> Judged:
    """Judge the failed calls of a batch by what all workers saw of their models; most batches need no statement."""
    judged = Judged(list(settlements))
    models = {place: answerers[one.claim.job_id] for place, one in enumerate(settlements) if _needs_judging(one)}
    if not models:
        return judged
    before = _lock(connection, settlements, models)
    states = dict(before)
    backlogs, unfinished = _backlogs(connection, list(states))
    for place, model in models.items():
        settlement, backlog = settlements[place], backlogs[model]
        if settlement.claim.probe:
            bound = {"answerer": model, "job": settlement.claim.job_id}
            backlog = replace(backlog, others=connection.scalar(_CALLS_OF_OTHERS, bound) or 0)
        one = judge(settlement, model, states[model], backlog, now)
        states[model] = one.state
        judged.settlements[place] = one.settlement
        if one.settlement is not settlement:
            judged.given_back.add(settlement.claim.job_id)
        if one.pause is not None:
            judged.pauses |= dict.fromkeys(unfinished[model], one.pause)
        if one.alone and settlement.outcome.failure is not None:
            judged.unreachable[model] = settlement.outcome.failure.message
        if one.reached:
            judged.reached.add(model)
        judged.notices += [] if one.notice is None else [one.notice]
    _SAVE.run(connection, [_fields(model, state) for model, state in states.items() if state != before[model]])
    return judged


def _needs_judging(settlement: Settlement) -> bool:
    failure = settlement.outcome.failure
    return settlement.claim.probe or (failure is not None and failure.symptom is not None)


def _lock(connection: Connection, settlements: list[Settlement], models: Mapping[int, str]) -> dict[str, ModelState]:
    """Return the models' states, locked until the transaction ends like their runs; those with evidence get a row."""
    names = sorted(set(models.values()))
    # All runs at once and before outages, as a claim does, so that two transactions never wait for each other.
    active = set(connection.execute(_ACTIVE, {"answerers": names}).scalars())
    hold_states(connection, sorted(active | {one.claim.run_id for one in settlements}), to_change=True)
    suspected = sorted({models[n] for n in models if settlements[n].evidence is not None})
    _MAKE.run(connection, [_fields(model, ModelState()) for model in suspected])
    rows = _LOCKED.all(connection, {"answerers": names})
    return dict.fromkeys(names, ModelState()) | {model: ModelState(*values) for model, *values in rows}


def _fields(model: str, state: ModelState) -> dict[str, Any]:
    return {"answerer": model, **{name: getattr(state, name) for name in _STATE}}


def _backlogs(connection: Connection, models: list[str]) -> tuple[dict[str, Backlog], dict[str, set[RunId]]]:
    """Return what is left of the models' active runs, and which of these have unfinished jobs."""
    open_, done = Counter[str](), Counter[str]()
    unfinished: dict[str, set[RunId]] = {model: set() for model in models}
    for model, run_id, name, value in connection.execute(_COUNTS, {"answerers": models}).all():
        (done if name == JobState.DONE else open_)[model] += int(value)
        if value and name != JobState.DONE:
            unfinished[model].add(RunId(run_id))
    return {model: Backlog(open=open_[model], done=done[model]) for model in models}, unfinished


@dataclass(slots=True)
class Waiting:
    """The models that all workers wait for: which to probe now, when to look at the others again, and why."""

    probes: set[str] = field(default_factory=set)
    until: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def waiting(connection: Connection, names: Iterable[str], worker: WorkerId, now: Millis, *, lock: bool) -> Waiting:
    """Return what the outages of these models let this worker claim; with `lock` until the transaction ends."""
    found = Waiting()
    query = _WAITED_FOR.with_for_update() if lock else _WAITED_FOR
    rows = connection.execute(query, {"answerers": sorted(names)}).all()
    probes = [one.probe_job for one in rows if one.probe_job is not None]
    inflight = connection.execute(_PROBED, {"ids": probes}).all() if probes else []
    probed = {tuple(one) for one in inflight}
    for model, probe_job, probe_seq, *values in rows:
        state = ModelState(*values)
        found.reasons[model] = state.reason
        bound = {"worker": worker, "since": now - SILENT_MS}
        last = state.worker == worker and connection.scalar(_OTHERS, bound)
        # A clock that was ahead must not set a time that no worker waits for.
        probe_at = min(state.probe_at, now + MAX_WAIT_MS) + (TURN_MS if last else 0)
        if (probe_job, probe_seq) in probed:
            found.until[model] = now + PROBED_MS
        elif probe_at > now:
            found.until[model] = probe_at
        else:
            found.probes.add(model)
    return found


def note_probes(connection: Connection, probes: Mapping[str, Claim], worker: WorkerId) -> None:
    """Store which claims are probes, so that no other begins before they end."""
    for model, claim in sorted(probes.items()):
        values = {"probe_job": claim.job_id, "probe_seq": claim.claim_seq, "worker": worker}
        connection.execute(update(outages).where(outages.c.answerer == model).values(values))


def pause_wrong_set_ups(
    connection: Connection, settlements: Sequence[Settlement], now: Millis
) -> tuple[dict[RunId, Paused], set[JobId]]:
    """Give back, uncharged, the jobs of runs whose calls all failed alike; after the batch's counters were changed.

    Return the runs to pause and those jobs.
    """
    given_back: set[JobId] = set()
    pauses: dict[RunId, Paused] = {}
    failures = ((s.claim.run_id, s.outcome.failure) for s in settlements if s.state is JobState.FAILED)
    failed = {run_id: one for run_id, one in failures if one is not None and one.symptom is Symptom.SET_UP}
    for run_id, failure in sorted(failed.items()):
        row = connection.execute(select(runs).where(runs.c.id == run_id)).one()
        needed = _alike_needed(connection, row)
        if needed is None:
            continue
        rows = connection.execute(_FAILED_LATELY, {"run": run_id}).all()
        alike = [(int(one.job_id), str(JobState.FAILED)) for one in rows if _sign(one) == _sign(failure)]
        if len(alike) >= needed:
            move_page(connection, run_of(row), alike, JobState.PENDING, now)
            given_back |= {JobId(job_id) for job_id, _ in alike}
            words = (
                f"all {pluralize(len(alike), 'job')} that were called failed alike: {failure.message} "
                f"(a wrong model or setting: `lbr rm {row.name}`, then enqueue it again)"
            )
            pauses[run_id] = Paused(PauseCause.SET_UP, words)
    return pauses, given_back


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
