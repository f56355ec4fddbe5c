"""Failures judged by the other calls: outages and their probes, keys that let no call in, runs that are set up wrongly.

One row of `outages` for each model that all workers wait, or waited, for. Locked are first runs, then outages, then
limits.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, select, update

from lbr.core.errors import Symptom
from lbr.core.outage import MAX_WAIT_MS, TURN_MS, Backlog, ModelState, Verdict, consider, is_stale
from lbr.core.text import pluralize
from lbr.core.types import JobId, JobState, PauseCause, Paused, RunId, RunState
from lbr.store.arrays import BulkStatement, PreparedQuery, Rows, any_of
from lbr.store.counters import of_runs
from lbr.store.runs import hold_states, move_page, run_of
from lbr.store.schema import INFLIGHT, SILENT_MS, attempts, counters, jobs, outages, runs, workers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lbr.core.outage import Judgement
    from lbr.core.types import Claim, Failure, Millis, Settlement, WorkerId
    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

SAME_FAILURES = 20
"""So many jobs of a run that has nothing done, failed alike: the run asks for what its model does not have."""
PROBED_MS = 1_000
"""How long until a look at a model that is being probed; its end wakes the workers sooner."""

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
_WAITED_FOR_LOCKED = _WAITED_FOR.with_for_update()
# A statement of its own: who waited for the lock must see what its last holder wrote.
_PROBED = select(jobs.c.id, jobs.c.claim_seq).where(any_of(jobs.c.id, "ids"), INFLIGHT)
_BACKLOG = (
    select(runs.c.answerer, counters.c.name, func.sum(counters.c.value).label("value"))
    .join_from(runs, counters, runs.c.id == counters.c.run_id)
    .where(any_of(runs.c.answerer, "answerers"), runs.c.state == RunState.ACTIVE)
    .where(counters.c.name.in_([JobState.PENDING, JobState.INFLIGHT, JobState.DONE]))
    .group_by(runs.c.answerer, counters.c.name)
)
_OTHERS = select(func.count()).where(
    workers.c.id != bindparam("worker"), workers.c.seen_at > bindparam("since")
)
_FAILED_LATELY = (
    select(attempts.c.job_id, attempts.c.error, attempts.c.message)
    .join_from(attempts, jobs, (jobs.c.id == attempts.c.job_id) & (jobs.c.claim_seq == attempts.c.claim_seq))
    .where(attempts.c.what == "failed", jobs.c.state == JobState.FAILED, jobs.c.run_id == bindparam("run"))
    .order_by(attempts.c.id.desc())
    .limit(1_000)
)


def _row(given: Rows) -> dict[str, Any]:
    return {"answerer": given["who"], **{name: given[f"new_{name}"] for name in _STATE}}


def _making(given: Rows) -> Any:
    return given.insert_into(outages, _row(given)).on_conflict_do_nothing(index_elements=["answerer"])


def _saving(given: Rows) -> Any:
    return (
        update(outages)
        .where(outages.c.answerer == given["who"])
        .values({name: given[f"new_{name}"] for name in _STATE})
    )


_TYPES = {"who": outages.c.answerer.type, **{f"new_{name}": outages.c[name].type for name in _STATE}}
_MAKE, _SAVE = BulkStatement(_TYPES, _making), BulkStatement(_TYPES, _saving)


@dataclass(slots=True)
class Judged:
    """What became of a batch: its settlements, the runs to pause, and the models that this worker alone cannot reach.

    `reached` are models that a worker has reached since the first refusal that this one counts, `given_back` the jobs
    that are not charged, `notices` lines for the worker's log.
    """

    settlements: list[Settlement]
    pauses: dict[RunId, Paused] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)
    given_back: set[JobId] = field(default_factory=set)

    def add(self, place: int, model: str, one: Judgement) -> None:
        """Note what follows from the settlement at this place."""
        self.settlements[place] = one.settlement
        if one.verdict is not Verdict.JOB:
            self.given_back.add(one.settlement.claim.job_id)
        failure = one.settlement.outcome.failure
        if one.verdict is Verdict.WORKER and failure is not None:
            self.unreachable[model] = failure.message
        if one.notice is not None:
            self.notices.append(one.notice)


async def judge_failures(
    connection: Connection, settlements: list[Settlement], answerers: Mapping[int, str], now: Millis
) -> Judged:
    """Judge the failed calls of a batch by what all workers saw of their models; most batches need no statement."""
    judged = Judged(settlements)
    places = [place for place, one in enumerate(settlements) if _is_to_judge(one)]
    if not places:
        return judged
    named = {place: answerers[settlements[place].claim.job_id] for place in places}
    # Runs before outages, outages before limits: so does a claim. All at once, so that two never wait for each other.
    held = {one.claim.run_id for one in settlements}
    held |= set(await _active_runs(connection, sorted(set(named.values()))))
    await hold_states(connection, sorted(held), to_change=True)
    states = await _states(connection, settlements, named)
    backlogs = await _backlogs(connection, list(states))
    before = dict(states)
    for place, model in named.items():
        backlog = backlogs[model]
        if settlements[place].claim.probe:
            backlog = replace(
                backlog, others=await _calls_of_others(connection, model, settlements[place].claim)
            )
        evidence = settlements[place].evidence
        if evidence is not None and is_stale(evidence, states[model], now):
            judged.reached.add(model)
        one = consider(settlements[place], model, states[model], backlog, now)
        states[model] = one.state
        judged.add(place, model, one)
        if one.pause is not None:
            judged.pauses |= dict.fromkeys(await _open_runs(connection, model), one.pause)
    changed = [model for model in states if states[model] != before[model]]
    await _SAVE.run(connection, [_fields(model, states[model]) for model in changed])
    return judged


def _is_to_judge(settlement: Settlement) -> bool:
    failure = settlement.outcome.failure
    return settlement.claim.probe or (failure is not None and failure.symptom is not None)


async def _states(
    connection: Connection, settlements: list[Settlement], named: Mapping[int, str]
) -> dict[str, ModelState]:
    """Return the models' states, locked until the transaction ends; those with evidence get a row."""
    seen = sorted({model for place, model in named.items() if settlements[place].evidence is not None})
    await _MAKE.run(connection, [_fields(model, ModelState()) for model in seen])
    names = sorted(set(named.values()))
    rows = await _LOCKED.all(connection, {"answerers": names})
    return dict.fromkeys(names, ModelState()) | {model: ModelState(*values) for model, *values in rows}


def _fields(model: str, state: ModelState) -> dict[str, Any]:
    return {"who": model, **{f"new_{name}": getattr(state, name) for name in _STATE}}


async def _backlogs(connection: Connection, names: list[str]) -> dict[str, Backlog]:
    counts: Counter[tuple[str, str]] = Counter()
    for answerer, name, value in (await connection.execute(_BACKLOG, {"answerers": names})).all():
        counts[answerer, name] = int(value)
    return {
        who: Backlog(
            open=counts[who, JobState.PENDING] + counts[who, JobState.INFLIGHT],
            done=counts[who, JobState.DONE],
        )
        for who in names
    }


async def _calls_of_others(connection: Connection, model: str, claim: Claim) -> int:
    """Count the calls of a model that other workers have in flight than the one that holds this claim."""
    holder = select(jobs.c.worker_id).where(jobs.c.id == claim.job_id).scalar_subquery()
    query = select(func.count()).join_from(jobs, runs, jobs.c.run_id == runs.c.id)
    query = query.where(INFLIGHT, runs.c.answerer == model, jobs.c.worker_id != holder)
    return int(await connection.scalar(query) or 0)


async def _active_runs(connection: Connection, models: list[str]) -> list[RunId]:
    query = select(runs.c.id).where(any_of(runs.c.answerer, "answerers"), runs.c.state == RunState.ACTIVE)
    return [RunId(run_id) for run_id in (await connection.execute(query, {"answerers": models})).scalars()]


async def _open_runs(connection: Connection, model: str) -> list[RunId]:
    """Return the active runs of a model that have something to do: a pause of the others would only be in the way."""
    open_jobs = counters.c.name.in_([JobState.PENDING, JobState.INFLIGHT])
    query = (
        select(runs.c.id)
        .join_from(runs, counters, runs.c.id == counters.c.run_id)
        .where(runs.c.answerer == model, runs.c.state == RunState.ACTIVE, open_jobs)
        .group_by(runs.c.id)
        .having(func.sum(counters.c.value) > 0)
    )
    return [RunId(run_id) for run_id in (await connection.execute(query)).scalars()]


# --- what may be claimed meanwhile --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Waiting:
    """The models that are waited for, at a claim or a look: those to probe now, when to look for the others, and why."""

    probes: set[str] = field(default_factory=set)
    until: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


async def waiting(
    connection: Connection, names: Iterable[str], worker: WorkerId, now: Millis, *, lock: bool
) -> Waiting:
    """Return what the outages of these models let this worker claim; with `lock` until the transaction ends."""
    found = Waiting()
    query = _WAITED_FOR_LOCKED if lock else _WAITED_FOR
    rows = (await connection.execute(query, {"answerers": sorted(names)})).all()
    probes = [one.probe_job for one in rows if one.probe_job is not None]
    probed = (
        {tuple(one) for one in (await connection.execute(_PROBED, {"ids": probes})).all()}
        if probes
        else set()
    )
    for model, probe_job, probe_seq, *values in rows:
        state = ModelState(*values)
        found.reasons[model] = state.reason
        turn = 0
        if state.worker == worker and await _has_others(connection, worker, now):
            turn = TURN_MS
        # A clock that was ahead must not set a time that no worker waits for.
        probe_at = min(state.probe_at, now + MAX_WAIT_MS) + turn
        if (probe_job, probe_seq) in probed:
            found.until[model] = now + PROBED_MS
        elif probe_at > now:
            found.until[model] = probe_at
        else:
            found.probes.add(model)
    return found


async def _has_others(connection: Connection, worker: WorkerId, now: Millis) -> bool:
    bound = {"worker": worker, "since": now - SILENT_MS}
    return bool(await connection.scalar(_OTHERS, bound))


async def note_probes(connection: Connection, probes: Mapping[str, Claim], worker: WorkerId) -> None:
    """Write down which claims are probes, so that no other begins before they end."""
    for model, claim in sorted(probes.items()):
        values = {"probe_job": claim.job_id, "probe_seq": claim.claim_seq, "worker": worker}
        await connection.execute(update(outages).where(outages.c.answerer == model).values(values))


# --- runs that are set up wrongly ---------------------------------------------------------------------------------------


async def pause_wrong_set_ups(
    connection: Connection, database: Database, settlements: Sequence[Settlement]
) -> tuple[dict[RunId, Paused], set[JobId]]:
    """Give back the jobs of runs whose every call failed alike, uncharged.

    Return the runs to pause, each with its pause, and those jobs. After the counters of the batch were changed.
    """
    given_back: set[JobId] = set()
    failed = {s.claim.run_id: s.outcome.failure for s in settlements if _is_of_set_up(s)}
    pauses: dict[RunId, Paused] = {}
    for run_id, failure in sorted(failed.items()):
        if failure is None:
            continue
        row = (await connection.execute(select(runs).where(runs.c.id == run_id))).one()
        needed = await _alike_needed(connection, row)
        if needed is None:
            continue
        rows = (await connection.execute(_FAILED_LATELY, {"run": run_id})).all()
        alike = [(int(one.job_id), str(JobState.FAILED)) for one in rows if _sign(one) == _sign(failure)]
        if len(alike) >= needed:
            await move_page(database, connection, run_of(row), alike, JobState.PENDING)
            given_back |= {JobId(job_id) for job_id, _ in alike}
            words = (
                f"all {pluralize(len(alike), 'job')} that were called failed alike: {failure.message} "
                f"(a wrong model or setting: `lbr rm {row.name}`, then enqueue it again)"
            )
            pauses[run_id] = Paused(PauseCause.SET_UP, words)
    return pauses, given_back


def _is_of_set_up(settlement: Settlement) -> bool:
    failure = settlement.outcome.failure
    return settlement.state is JobState.FAILED and failure is not None and failure.symptom is Symptom.SET_UP


async def _alike_needed(connection: Connection, run: AnyRow) -> int | None:
    """Return how many jobs must have failed alike for the run to be paused; None while no number would do."""
    counts = (await of_runs(connection, [RunId(run.id)]))[RunId(run.id)]
    if counts[JobState.DONE]:
        return None
    if run.state == RunState.PAUSED:  # by this very failure: these calls were under way
        return 1
    left = counts[JobState.PENDING] + counts[JobState.INFLIGHT]
    is_all = not left and run.sealed_at is not None
    return min(SAME_FAILURES, counts[JobState.FAILED]) if is_all else SAME_FAILURES


def _sign(failure: AnyRow | Failure) -> tuple[str, str]:
    return failure.error, _DIGITS.sub("", failure.message)
