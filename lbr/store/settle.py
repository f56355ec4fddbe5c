"""Settlement: how calls ended, many claims in one transaction, each under its fence."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import case, literal_column, null, select, update

from lbr.core import value
from lbr.core.errors import NO_USAGE, DatabaseError, Family
from lbr.core.extras import Extra
from lbr.core.retry import is_overload
from lbr.core.types import JobId, JobState, Millis, PauseCause, Paused, RunId, RunState, Settlement
from lbr.store import counters
from lbr.store.limits import Feedback, apply_feedback, forget_estimates, raise_highest
from lbr.store.outages import judge_failures, pause_wrong_set_ups
from lbr.store.runs import hold_states, pausing, resting_state
from lbr.store.schema import IS_PARKED, attempts, extras, jobs, prompts, results, runs
from lbr.store.sql import BulkStatement, Inserting, PreparedQuery, Rows, any_of

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from sqlalchemy import ColumnElement, Connection

_OF_RUN = (runs.c.state.label("run_state"), runs.c.answerer, runs.c.budget_nanos, runs.c.highest_nanos)
STATUS = PreparedQuery(
    select(jobs.c.id, jobs.c.run_id, jobs.c.state, jobs.c.claim_seq, jobs.c.retry_seq, *_OF_RUN)
    .join_from(jobs, runs, jobs.c.run_id == runs.c.id)
    .where(any_of(jobs.c.id, "ids"))
    .order_by(jobs.c.id)
    .with_for_update(of=jobs)
)
# Claims whose settlement is already recorded must be neither charged nor counted again.
_RECORDED = select(attempts.c.job_id, attempts.c.claim_seq, attempts.c.what).where(
    any_of(attempts.c.job_id, "ids"), literal_column("attempts.what IN ('retried', 'failed', 'stale')")
)


def _settling(given: Rows) -> Any:
    # Pending too: a late answer to a job that was reclaimed but not claimed again is paid for.
    fence: ColumnElement[bool] = literal_column("jobs.state IN ('inflight', 'pending')")
    return (
        update(jobs)
        .where(fence, jobs.c.id == given["job"], jobs.c.claim_seq == given["seq"])
        .values(
            state=given["to"],
            available_at=given["available"],
            attempts=jobs.c.attempts + given["charge"],
            finished_at=given["finished"],
            worker_id=null(),
            lease_until=null(),
        )
    )


SETTLE = BulkStatement(
    {
        "to": jobs.c.state.type,
        "available": jobs.c.available_at.type,
        "charge": jobs.c.attempts.type,
        "finished": jobs.c.finished_at.type,
        "job": jobs.c.id.type,
        "seq": jobs.c.claim_seq.type,
    },
    _settling,
)
_USAGE = ("input_tokens", "output_tokens", "cost_nanos", "cached_tokens")
ADD_RESULTS = Inserting(results, "job_id", "text", "model", "finish_reason", "latency_ms", *_USAGE)
EXTRAS_CHARACTERS = 16_000_000
_ADD_EXTRAS = Inserting(extras, "job_id", *Extra)
_ADD_ATTEMPTS = Inserting(
    attempts,
    *("job_id", "claim_seq", "what", "family", "error", "message", "text", "finish_reason", "latency_ms", "at"),
    *_USAGE,
)


@value(frozen=True, slots=True)
class JobStatus:
    """How a job and its run stand when an outcome comes; states are words as stored."""

    job_id: int
    run_id: int
    state: str
    claim_seq: int
    retry_seq: int
    run_state: str
    answerer: str
    budget_nanos: int | None = None
    highest_nanos: int | None = None


@dataclass(slots=True)
class Settled:
    """What became of a batch: the jobs whose outcome was taken, those refused as stale, the runs paused.

    Outcomes that were settled before, because the reply to that was lost, are among them, as they were then.
    `given_back` are taken jobs that went back uncharged. `unreachable` are the models that other workers reach and this
    one does not, with the reason. `notices` are lines for the worker's log.
    """

    taken: set[JobId] = field(default_factory=set)
    stale: set[JobId] = field(default_factory=set)
    paused: dict[str, Paused] = field(default_factory=dict)
    given_back: set[JobId] = field(default_factory=set)
    unreachable: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def settle(connection: Connection, now: Millis, batch: Sequence[Settlement]) -> Settled:
    """Write a batch of outcomes. Safe to repeat.

    An outcome whose job has been claimed again, or has finished, changes nothing but is recorded as stale.
    """
    settled = Settled()
    found = STATUS.all(connection, {"ids": [s.claim.job_id for s in batch]})
    statuses = {row[0]: JobStatus(*row) for row in found}
    if len(statuses) != len({s.claim.job_id for s in batch}):
        batch = _without_removed_runs(connection, batch, statuses)
    mine, stale = _sort_by_fence(connection, batch, statuses, settled)
    answerers = {one.job_id: one.answerer for one in statuses.values()}
    mine, pauses = judge_failures(connection, mine, answerers, now, settled)
    both = [*mine, *stale]
    pauses = _pauses(mine, both, statuses) | pauses
    highest = _highest(both, statuses)
    targets = _targets(connection, mine, statuses, to_change=bool(pauses or highest))
    _update_jobs(connection, mine, targets, now)
    _insert_results(connection, mine)
    _insert_attempts(connection, mine, stale, now)
    settled.paused |= _pause(connection, pauses)
    raise_highest(connection, highest)
    # This locks all models in the order of their names.
    apply_feedback(connection, _feedback(mine, both, statuses, now), now)
    deltas = _deltas(mine, targets, stale, statuses)
    # The estimated cost of calls that ended after their jobs were reclaimed: now it is known.
    late = [s.claim for s in both if not _is_held(s, statuses)]
    claims = {(claim.job_id, claim.claim_seq): claim.run_id for claim in late}
    deltas.update(forget_estimates(connection, claims))
    counters.add(connection, deltas)
    settled.paused |= _pause(connection, pause_wrong_set_ups(connection, mine, now, settled))
    settled.taken.update(s.claim.job_id for s in mine)
    settled.stale.update(s.claim.job_id for s in stale)
    return settled


def _without_removed_runs(
    connection: Connection, batch: Sequence[Settlement], statuses: dict[int, JobStatus]
) -> list[Settlement]:
    """Leave out calls of removed runs. Raises DatabaseError if a run is there without a job that was claimed."""
    missing = {s.claim.run_id for s in batch if s.claim.job_id not in statuses}
    query = select(runs.c.id).where(any_of(runs.c.id, "ids"))
    if connection.execute(query, {"ids": list(missing)}).first() is not None:
        raise DatabaseError("some jobs that were called are gone: the database was replaced meanwhile")
    return [s for s in batch if s.claim.job_id in statuses]


def _is_held(settlement: Settlement, statuses: dict[int, JobStatus]) -> bool:
    """Return whether the claim still holds its job."""
    job = statuses[settlement.claim.job_id]
    return job.state == JobState.INFLIGHT and job.claim_seq == settlement.claim.claim_seq


def is_mine(settlement: Settlement, job: JobStatus) -> bool:
    """Return whether the fence lets a settlement through: no worker has claimed the job again."""
    if job.claim_seq != settlement.claim.claim_seq:
        return False
    if job.state == JobState.PENDING and job.retry_seq == job.claim_seq:
        # The user has put the job back since: a late answer is welcome, a late failure is outdated.
        return settlement.outcome.failure is None
    return job.state in {JobState.INFLIGHT, JobState.PENDING}


def is_repeated(settlement: Settlement, job: JobStatus, recorded: Container[tuple[int, int]]) -> bool:
    """Return whether this very settlement is in the database already.

    `recorded` are the claims, by job and claim_seq, whose failure, late answer or redone answer is recorded.
    """
    claim = settlement.claim
    if (claim.job_id, claim.claim_seq) in recorded:
        return True
    done = job.state == JobState.DONE and job.claim_seq == claim.claim_seq
    return done and settlement.outcome.failure is None


def _sort_by_fence(
    connection: Connection, batch: Sequence[Settlement], statuses: dict[int, JobStatus], settled: Settled
) -> tuple[list[Settlement], list[Settlement]]:
    """Return what to take and what came too late; note in `settled` what became of those that were settled before."""
    mine = [s for s in batch if s.outcome.failure is None and _is_held(s, statuses)]
    if len(mine) == len(batch):
        return mine, []
    plain, stale = {id(s) for s in mine}, list[Settlement]()
    rest = [s for s in batch if id(s) not in plain]
    found = connection.execute(_RECORDED, {"ids": [s.claim.job_id for s in rest]}).all()
    recorded: dict[tuple[int, int], str] = {(row.job_id, row.claim_seq): row.what for row in found}
    for s in rest:
        job_id, job = s.claim.job_id, statuses[s.claim.job_id]
        if is_repeated(s, job, recorded):
            what = recorded.get((job_id, s.claim.claim_seq), "done")
            (settled.stale if what == "stale" else settled.taken).add(job_id)
            if what == "retried" and s.state is JobState.FAILED:
                settled.given_back.add(job_id)
        else:
            (mine if is_mine(s, job) else stale).append(s)
    return mine, stale


def _targets(
    connection: Connection, mine: list[Settlement], statuses: dict[int, JobStatus], *, to_change: bool
) -> list[JobState]:
    """Return the states to write. The runs of jobs that go back are held until the transaction ends."""
    back = {s.claim.run_id for s in mine if s.state is JobState.PENDING}
    if not back:
        return [s.state for s in mine]
    states = {RunId(job.run_id): RunState(job.run_state) for job in statuses.values()}
    states |= hold_states(connection, back, to_change=to_change)
    return [resting_state(states[s.claim.run_id]) if s.state is JobState.PENDING else s.state for s in mine]


def _update_jobs(connection: Connection, mine: list[Settlement], targets: list[JobState], now: Millis) -> None:
    rows = []
    for s, to in zip(mine, targets, strict=True):
        claim = s.claim
        finished = None if to is JobState.PENDING else now
        # A plain str, because sqlite3 is slow with a subclass.
        rows.append((str(to), now + s.wait_ms, s.charge, finished, claim.job_id, claim.claim_seq))
    done = SETTLE.run_plain(connection, rows)
    if done != len(rows):
        raise DatabaseError(f"expected {len(rows)} jobs to be settled, got: {done}; nothing was written")


def _insert_results(connection: Connection, mine: list[Settlement]) -> None:
    rows, kept = [], []
    for s in mine:
        reply = s.outcome.reply
        if reply is None:
            continue
        usage, job_id, latency = reply.usage, s.claim.job_id, s.outcome.latency_ms
        counted = (usage.input_tokens, usage.output_tokens, usage.cost_nanos, usage.cached_tokens)
        rows.append((job_id, reply.text, reply.model, reply.finish_reason, latency, *counted))
        if reply.extras is not None:
            kept.append((job_id, *(getattr(reply.extras, kind) for kind in Extra)))
    ADD_RESULTS.run_plain(connection, rows)
    if kept:
        _insert_extras(connection, kept)


def _insert_extras(connection: Connection, kept: list[tuple[Any, ...]]) -> None:
    """Write what is kept in statements of some megabytes, because a server takes at most one gigabyte at a time."""
    page, characters = [], 0
    for row in kept:
        page.append(row)
        characters += sum(len(text or "") for text in row[1:])
        if characters > EXTRAS_CHARACTERS:
            _ADD_EXTRAS.run_plain(connection, page)
            page, characters = [], 0
    _ADD_EXTRAS.run_plain(connection, page)


def _insert_attempts(connection: Connection, mine: list[Settlement], stale: list[Settlement], now: Millis) -> None:
    failed = [s for s in mine if s.outcome.failure is not None]
    rows = [_attempt(s, "retried" if s.state is JobState.PENDING else "failed", now) for s in failed]
    _ADD_ATTEMPTS.run_plain(connection, rows + [_attempt(s, "stale", now) for s in stale])


def _attempt(settlement: Settlement, what: str, now: Millis) -> tuple[Any, ...]:
    claim, outcome, usage = settlement.claim, settlement.outcome, settlement.outcome.usage
    if outcome.failure is not None:
        failure = outcome.failure
        why: tuple[str | None, ...] = (str(failure.family), failure.error, failure.message, failure.text)
    else:
        answer = None if outcome.reply is None else outcome.reply.text
        why = (None, "Stale", "the answer came after another worker had taken the job", answer)
    ended = (outcome.finish_reason, outcome.latency_ms, now)
    counted = (usage.input_tokens, usage.output_tokens, usage.cost_nanos, usage.cached_tokens)
    return (claim.job_id, claim.claim_seq, what, *why, *ended, *counted)


def _deltas(
    mine: list[Settlement], targets: list[JobState], stale: list[Settlement], statuses: dict[int, JobStatus]
) -> counters.Deltas:
    ended = zip(mine, targets, strict=True)
    deltas = counters.moved([(s.claim.run_id, statuses[s.claim.job_id].state, to) for s, to in ended])
    functions = {RunId(job.run_id) for job in statuses.values() if job.answerer.startswith("function:")}
    for s in (*mine, *stale):
        run_id, usage, failure = s.claim.run_id, s.outcome.usage, s.outcome.failure
        if s.outcome.is_paid:
            deltas[run_id, counters.ANSWERED] += 1
        if s.outcome.is_unpriced and (run_id not in functions or usage is not NO_USAGE):
            deltas[run_id, counters.UNPRICED] += 1
        if usage is not NO_USAGE:
            deltas[run_id, counters.INPUT_TOKENS] += usage.input_tokens or 0
            deltas[run_id, counters.OUTPUT_TOKENS] += usage.output_tokens or 0
            deltas[run_id, counters.COST_NANOS] += usage.cost_nanos or 0
            deltas[run_id, counters.CACHED_TOKENS] += usage.cached_tokens or 0
        if failure is not None:
            deltas[run_id, counters.TRY + failure.family] += 1
    for s in stale:
        deltas[s.claim.run_id, counters.STALE] += 1
    for s in (*(s for s in mine if s.outcome.failure is not None), *stale):
        deltas[s.claim.run_id, counters.WASTED_NANOS] += s.outcome.usage.cost_nanos or 0
    return deltas


def _feedback(
    mine: list[Settlement], both: list[Settlement], statuses: dict[int, JobStatus], now: Millis
) -> dict[str, Feedback]:
    """Return what these calls show about their models' limits."""
    feedback: defaultdict[str, Feedback] = defaultdict(Feedback)
    for s in both:
        claim, failure = s.claim, s.outcome.failure
        one = feedback[statuses[claim.job_id].answerer]
        one.answered += s.outcome.is_paid
        if claim.tokens:
            one.tokens += claim.tokens - _tokens_used(s)
        if claim.settings and claim.model is not None:  # it shows nothing about the run's model
            continue
        if failure is None and claim.throttled:
            one.successes += 1
        if failure is not None and is_overload(failure):
            one.too_much = max(one.too_much or 0, now - s.outcome.latency_ms)
            one.refusals += 1
    for s in mine:
        if s.cool_down and s.outcome.failure is not None and s.claim.model is None:
            one = feedback[statuses[s.claim.job_id].answerer]
            one.cooldown = max(one.cooldown, (now + s.wait_ms, s.outcome.failure.message))
    return feedback


def _tokens_used(settlement: Settlement) -> int:
    """Return what a call took of its model's tokens: what was debited if the provider did not say."""
    usage, failure = settlement.outcome.usage, settlement.outcome.failure
    if failure is not None and failure.family is Family.RATE_LIMITED:
        return 0
    if usage.input_tokens is None and usage.output_tokens is None:
        return settlement.claim.tokens
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def _pauses(mine: list[Settlement], both: list[Settlement], statuses: dict[int, JobStatus]) -> dict[RunId, Paused]:
    """Return the runs to pause: those whose account does not work, or whose cost is limited but not known."""
    pauses: dict[RunId, Paused] = {}
    limited = {job.job_id: job.answerer for job in statuses.values() if job.budget_nanos is not None}
    for s in both if limited else ():
        if s.claim.job_id in limited and s.outcome.is_unpriced:
            usage = s.outcome.usage
            counted = usage.input_tokens is not None and usage.output_tokens is not None
            message = _unpriced_message(s.claim.model or limited[s.claim.job_id], counted=counted)
            pauses[s.claim.run_id] = Paused(PauseCause.UNPRICED, message)
    return pauses | {s.claim.run_id: s.pause for s in mine if s.pause is not None}


def _unpriced_message(model: str, *, counted: bool) -> str:
    if model.startswith("function:"):
        return (
            f"its calls report {'tokens but no cost' if counted else 'neither tokens nor cost'}; return lbr.Answer with "
            f"cost_usd, or with tokens and repeat the enqueue with --price in=…,out=…"
        )
    if counted:
        return f"its calls report no cost and no price is known for {model}; repeat the enqueue with --price in=…,out=…"
    return (
        f"its calls report no cost, because {model} does not count their tokens; "
        f"if they are free, repeat the enqueue with --price in=0,out=0"
    )


def _highest(both: list[Settlement], statuses: dict[int, JobStatus]) -> dict[RunId, int]:
    """Return the runs of which a call cost more than any before, with its cost."""
    found: dict[RunId, int] = {}
    for s in both:
        cost = s.outcome.usage.cost_nanos
        if cost and cost > max(statuses[s.claim.job_id].highest_nanos or 0, found.get(s.claim.run_id, 0)):
            found[s.claim.run_id] = cost
    return found


def _pause(connection: Connection, pauses: dict[RunId, Paused]) -> dict[str, Paused]:
    """Pause runs; return the names of those that were active, each with its pause."""
    paused: dict[str, Paused] = {}
    for run_id, pause in sorted(pauses.items()):  # in one order, so that two never wait for each other
        query = (
            update(runs)
            .where(runs.c.id == run_id, runs.c.state == RunState.ACTIVE)
            .values(pausing(pause))
            .returning(runs.c.name)
        )
        for name in connection.execute(query).scalars():
            paused[name] = pause
    return paused


class JobStanding(NamedTuple):
    """A job's state; `claim_seq` is that of its last claim, `common` is False if it has settings of its own."""

    job_id: JobId
    run_id: RunId
    state: JobState
    claim_seq: int
    common: bool


def jobs_of_keys(connection: Connection, _now: Millis, keys: Sequence[bytes]) -> dict[bytes, list[JobStanding]]:
    """Return the jobs of all runs that ask for the content of these keys, by key."""
    # A job in a batch is held, as if a worker called.
    state = case((IS_PARKED, literal_column("'inflight'")), else_=jobs.c.state)
    columns = (prompts.c.key, jobs.c.id, jobs.c.run_id, state, jobs.c.claim_seq, prompts.c.settings)
    query = select(*columns).join(jobs, jobs.c.id == prompts.c.job_id).where(any_of(prompts.c.key, "keys"))
    by_key: dict[bytes, list[JobStanding]] = {key: [] for key in keys}
    for key, job_id, run_id, state, claim_seq, settings in connection.execute(query, {"keys": list(keys)}).all():
        by_key[key].append(JobStanding(job_id, run_id, JobState(state), claim_seq, settings is None))
    return by_key
