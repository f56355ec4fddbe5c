"""Writing down how calls ended: many claims in one transaction, each under its fence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, literal_column, null, select, update

from lbr.core.errors import NO_USAGE, DatabaseError, Family, Usage
from lbr.core.retry import MAX_AHEAD_MS, is_overload
from lbr.core.types import JobId, JobState, Millis, PauseCause, Paused, RunId, RunState, Settlement
from lbr.store import counters
from lbr.store.budgets import forget_estimates, raise_highest
from lbr.store.fence import FENCE, JobStatus, is_doubtful, is_mine, is_plain, is_repeated
from lbr.store.limiting import Feedback, learn
from lbr.store.outages import judge_failures, pause_wrong_set_ups
from lbr.store.runs import hold_states, pausing, resting_state
from lbr.store.schema import attempts, jobs, limits, results, runs
from lbr.store.sql import BulkStatement, Inserting, PreparedQuery, Rows, any_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.store.database import Connection, Database

_STANDING = PreparedQuery(
    select(
        jobs.c.id,
        jobs.c.run_id,
        jobs.c.state,
        jobs.c.claim_seq,
        jobs.c.retry_seq,
        runs.c.state.label("run_state"),
        runs.c.answerer,
        runs.c.budget_nanos,
        runs.c.highest_nanos,
    )
    .join_from(jobs, runs, jobs.c.run_id == runs.c.id)
    .where(any_of(jobs.c.id, "ids"))
    .order_by(jobs.c.id)
    .with_for_update(of=jobs)
)
# What is on record of these claims: what is written already must be neither charged nor counted again.
_TOLD = select(attempts.c.job_id, attempts.c.claim_seq).where(
    any_of(attempts.c.job_id, "ids"), literal_column("attempts.what IN ('retried', 'failed', 'stale')")
)


def _settling(given: Rows) -> Any:
    return (
        update(jobs)
        .where(FENCE, jobs.c.id == given["job"], jobs.c.claim_seq == given["seq"])
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


def _cooling(given: Rows) -> Any:
    row = {"answerer": given["who"], "cooldown_until": given["until"], "reason": given["why"]}
    adding = given.insert_into(limits, row)
    return adding.on_conflict_do_update(
        index_elements=["answerer"],
        set_={"cooldown_until": adding.excluded.cooldown_until, "reason": adding.excluded.reason},
        where=adding.excluded.cooldown_until > limits.c.cooldown_until,
    )


_COOL_DOWN = BulkStatement(
    {"who": limits.c.answerer.type, "until": limits.c.cooldown_until.type, "why": limits.c.reason.type},
    _cooling,
)
_FORGET_FAR = (
    update(limits)
    .where(any_of(limits.c.answerer, "answerers"), limits.c.cooldown_until > bindparam("farthest"))
    .values(cooldown_until=0)
)
_USAGE = ("input_tokens", "output_tokens", "cost_nanos")
ADD_RESULTS = Inserting(results, "job_id", "text", "model", "finish_reason", "latency_ms", *_USAGE)
_ADD_ATTEMPTS = Inserting(
    attempts,
    "job_id",
    "claim_seq",
    "what",
    "family",
    "error",
    "message",
    "text",
    "finish_reason",
    "latency_ms",
    "at",
    *_USAGE,
)


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a batch: the jobs whose outcome was taken, those refused as stale, the runs paused.

    `given_back` are jobs of those taken that went back uncharged.
    `reached` are models that a worker has reached since this one's first refusal; `unreachable` has the models that other workers reach and this one does not, with the reason; `notices` are lines
    for the worker's log.
    """

    taken: frozenset[JobId]
    stale: frozenset[JobId]
    paused: dict[str, Paused]
    given_back: frozenset[JobId] = frozenset()
    unreachable: dict[str, str] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)


async def settle(database: Database, batch: Sequence[Settlement]) -> Settled:
    """Write a batch of outcomes in one transaction.

    An outcome whose job was claimed again since, or has come to its end, changes nothing but is recorded as
    stale. Safe to repeat.
    """
    return await database.write(lambda connection: settle_within(connection, database, batch))


async def settle_within(connection: Connection, database: Database, batch: Sequence[Settlement]) -> Settled:
    """Write a batch of outcomes in the caller's transaction; see `settle`."""
    now = await database.now(connection)
    ids = [s.claim.job_id for s in batch]
    found = await _STANDING.all(connection, {"ids": ids})
    standing = {row[0]: JobStatus(*row) for row in found}
    if len(standing) != len(set(ids)):
        batch = await _of_runs_that_are_there(connection, batch, standing)
    mine, stale = await _sorted_by_fence(connection, batch, standing)
    judged = await judge_failures(
        connection, mine, {one.job_id: one.answerer for one in standing.values()}, now
    )
    mine = judged.settlements
    pauses = _pauses(mine, stale, standing) | judged.pauses
    highest = _highest([*mine, *stale], standing)
    states = await _run_states(connection, mine, standing, pausing=bool(pauses or highest))
    targets = [_target(s, states) for s in mine]
    await _update_jobs(connection, mine, targets, now)
    await _insert_results(connection, mine)
    await _insert_attempts(connection, mine, stale, now)
    paused = await _pause(connection, pauses)
    await raise_highest(connection, highest)
    # First what locks all answerers in the order of their names; those that cool down are among them.
    refusing = await learn(connection, _lessons([*mine, *stale], standing, now), now)
    await _cool_down(connection, mine, standing, now, refusing)
    deltas = _deltas(mine, targets, stale, standing)
    deltas.update(await _not_lost([*mine, *stale], standing, connection))
    await counters.add(connection, deltas)
    wrong, given_back = await pause_wrong_set_ups(connection, database, mine)
    paused |= await _pause(connection, wrong)
    return Settled(
        taken=frozenset(s.claim.job_id for s in mine),
        stale=frozenset(s.claim.job_id for s in stale),
        paused=paused,
        given_back=frozenset(judged.given_back | given_back),
        unreachable=judged.unreachable,
        reached=frozenset(judged.reached),
        notices=judged.notices,
    )


async def _of_runs_that_are_there(
    connection: Connection, batch: Sequence[Settlement], standing: dict[int, JobStatus]
) -> list[Settlement]:
    """Leave out calls of runs that were removed; DatabaseError if a run is there without a job that was claimed."""
    missing = {s.claim.run_id for s in batch if s.claim.job_id not in standing}
    found = await connection.execute(
        select(runs.c.id).where(any_of(runs.c.id, "ids")), {"ids": list(missing)}
    )
    if found.first() is not None:
        raise DatabaseError(
            "expected the jobs of every call to exist, got: some removed; the database was replaced"
        )
    return [s for s in batch if s.claim.job_id in standing]


async def _sorted_by_fence(
    connection: Connection, batch: Sequence[Settlement], standing: dict[int, JobStatus]
) -> tuple[list[Settlement], list[Settlement]]:
    """Return what is to be taken, and what came too late; what is on record already is neither."""
    seen = [(s, standing[s.claim.job_id]) for s in batch]
    mine = [s for s, job in seen if is_plain(s, job)]
    if len(mine) == len(seen):
        return mine, []
    fits = [(s, job, is_mine(s, job)) for s, job in seen if not is_plain(s, job)]
    told = await _told(connection, [s for s, job, fit in fits if is_doubtful(s, job, fits=fit)])
    new = [(s, fit) for s, job, fit in fits if not is_repeated(s, job, told)]
    return mine + [s for s, fit in new if fit], [s for s, fit in new if not fit]


async def _told(connection: Connection, doubtful: list[Settlement]) -> set[tuple[int, int]]:
    if not doubtful:
        return set()
    bound = {"ids": [s.claim.job_id for s in doubtful]}
    return {(row.job_id, row.claim_seq) for row in (await connection.execute(_TOLD, bound)).all()}


async def _run_states(
    connection: Connection, mine: list[Settlement], standing: dict[int, JobStatus], *, pausing: bool
) -> dict[RunId, RunState]:
    """Return the states of the runs of these jobs, held where a job goes back to rest."""
    back = {s.claim.run_id for s in mine if s.state is JobState.PENDING}
    found = {(row.run_id, row.run_state) for row in standing.values()}
    states = {RunId(run_id): RunState(state) for run_id, state in found}
    if back:
        states |= await hold_states(connection, back, to_change=pausing)
    return states


def _target(settlement: Settlement, states: dict[RunId, RunState]) -> JobState:
    """Return the state to write."""
    if settlement.state is JobState.PENDING:
        return resting_state(states[settlement.claim.run_id])
    return settlement.state


async def _update_jobs(
    connection: Connection, mine: list[Settlement], targets: list[JobState], now: Millis
) -> None:
    rows = []
    for s, to in zip(mine, targets, strict=True):
        claim = s.claim
        finished = None if to is JobState.PENDING else now
        # A plain str: sqlite3 asks a value of any other class how it wants to be written.
        rows.append((str(to), now + s.wait_ms, s.charge, finished, claim.job_id, claim.claim_seq))
    done = await SETTLE.run_plain(connection, rows)
    if done != len(rows):
        raise DatabaseError(f"expected {len(rows)} jobs to be settled, got: {done}; nothing was written")


async def _insert_results(connection: Connection, mine: list[Settlement]) -> None:
    rows = []
    for s in mine:
        reply = s.outcome.reply
        if reply is None:
            continue
        usage, job_id, latency = reply.usage, s.claim.job_id, s.outcome.latency_ms
        counted = (usage.input_tokens, usage.output_tokens, usage.cost_nanos)
        rows.append((job_id, reply.text, reply.model, reply.finish_reason, latency, *counted))
    await ADD_RESULTS.run_plain(connection, rows)


def _usage(usage: Usage) -> dict[str, int | None]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_nanos": usage.cost_nanos,
    }


async def _insert_attempts(
    connection: Connection, mine: list[Settlement], stale: list[Settlement], now: Millis
) -> None:
    rows = [
        _attempt(s, "retried" if s.state is JobState.PENDING else "failed", now)
        for s in mine
        if s.outcome.failure is not None
    ]
    rows += [_attempt(s, "stale", now) for s in stale]
    await _ADD_ATTEMPTS.run(connection, rows)


def _attempt(settlement: Settlement, what: str, now: Millis) -> dict[str, Any]:
    failure, reply = settlement.outcome.failure, settlement.outcome.reply
    answer = reply.text if reply is not None else None
    return {
        "job_id": settlement.claim.job_id,
        "claim_seq": settlement.claim.claim_seq,
        "what": what,
        "family": failure.family if failure else None,
        "error": failure.error if failure else "Stale",
        "message": failure.message if failure else "the answer came after another worker had taken the job",
        "text": failure.text if failure else answer,
        "finish_reason": settlement.outcome.finish_reason,
        "latency_ms": settlement.outcome.latency_ms,
        "at": now,
        **_usage(settlement.outcome.usage),
    }


def _deltas(
    mine: list[Settlement],
    targets: list[JobState],
    stale: list[Settlement],
    standing: dict[int, JobStatus],
) -> counters.Deltas:
    ended = zip(mine, targets, strict=True)
    deltas = counters.moved([(s.claim.run_id, standing[s.claim.job_id].state, to) for s, to in ended])
    both = [*mine, *stale] if stale else mine
    paid = [s.claim.run_id for s in both if s.outcome.failure is None or s.outcome.is_paid]
    for run_id, count in Counter(paid).items():
        deltas[run_id, counters.ANSWERED] += count
    answerers = {job.run_id: job.answerer for job in standing.values()}
    functions = {run_id for run_id, answerer in answerers.items() if answerer.startswith("function:")}
    for s in both:
        if s.claim.run_id not in functions and s.outcome.is_unpriced:
            deltas[s.claim.run_id, counters.UNPRICED] += 1
    for s in stale:
        deltas[s.claim.run_id, counters.STALE] += 1
    for s in [*stale, *(s for s in mine if s.outcome.failure is not None)]:
        deltas[s.claim.run_id, counters.WASTED_NANOS] += s.outcome.usage.cost_nanos or 0
    for s in both:
        usage, failure = s.outcome.usage, s.outcome.failure
        if usage is not NO_USAGE:
            deltas[s.claim.run_id, counters.INPUT_TOKENS] += usage.input_tokens or 0
            deltas[s.claim.run_id, counters.OUTPUT_TOKENS] += usage.output_tokens or 0
            deltas[s.claim.run_id, counters.COST_NANOS] += usage.cost_nanos or 0
        if failure is not None:
            deltas[s.claim.run_id, counters.TRY + failure.family] += 1
    return deltas


async def _cool_down(
    connection: Connection,
    mine: list[Settlement],
    standing: dict[int, JobStatus],
    now: Millis,
    refusing: set[str],
) -> None:
    """Make every worker wait for the answerers that refuse too many calls, until their provider's wait is over."""
    longest: dict[str, Settlement] = {}
    for s in sorted((s for s in mine if s.cool_down), key=lambda s: s.wait_ms):
        if standing[s.claim.job_id].answerer in refusing:
            longest[standing[s.claim.job_id].answerer] = s
    rows = [
        {
            "who": answerer,
            "until": now + s.wait_ms,
            "why": s.outcome.failure.message if s.outcome.failure else "",
        }
        for answerer, s in sorted(longest.items())
    ]
    if rows:
        # What a clock that was ahead has set holds nobody back, and would be taken for the longer wait.
        far = {"answerers": [row["who"] for row in rows], "farthest": now + MAX_AHEAD_MS}
        await connection.execute(_FORGET_FAR, far)
    await _COOL_DOWN.run(connection, rows)


def _lessons(ended: list[Settlement], standing: dict[int, JobStatus], now: Millis) -> dict[str, Feedback]:
    """Return what these calls say about their answerers' limits."""
    lessons: dict[str, Feedback] = {}
    for s in ended:
        claim, failure = s.claim, s.outcome.failure
        too_much = failure is not None and is_overload(failure)
        lesson = lessons.setdefault(standing[claim.job_id].answerer, Feedback())
        lesson.answered += failure is None or s.outcome.is_paid
        if claim.tokens:
            lesson.tokens += claim.tokens - _tokens_used(s)
        if failure is None and claim.throttled:
            lesson.successes += 1
        if too_much:
            lesson.too_much = max(lesson.too_much or 0, now - s.outcome.latency_ms)
            lesson.refusals += 1
    return lessons


def _tokens_used(settlement: Settlement) -> int:
    """Return what a call took of its answerer's tokens: as much as was debited where nobody said."""
    usage, failure = settlement.outcome.usage, settlement.outcome.failure
    if failure is not None and failure.family is Family.RATE_LIMITED:
        return 0
    if usage.input_tokens is None and usage.output_tokens is None:
        return settlement.claim.tokens
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def _pauses(
    mine: list[Settlement], stale: list[Settlement], standing: dict[int, JobStatus]
) -> dict[RunId, Paused]:
    """Return the runs that are to be paused, each with its pause.

    Those whose account does not work, and those that may cost so much only, but of whose calls nobody knows the cost.
    """
    pauses: dict[RunId, Paused] = {}
    limited = {job.job_id for job in standing.values() if job.budget_nanos is not None}
    for s in [*mine, *stale] if limited else ():
        job = standing[s.claim.job_id]
        if job.job_id in limited and s.outcome.is_unpriced:
            usage = s.outcome.usage
            counted = usage.input_tokens is not None and usage.output_tokens is not None
            pauses[s.claim.run_id] = Paused(
                PauseCause.UNPRICED, _unpriced_message(job.answerer, counted=counted)
            )
    return pauses | {s.claim.run_id: s.pause for s in mine if s.pause is not None}


def _unpriced_message(model: str, *, counted: bool) -> str:
    if counted:
        return f"its calls report no cost and no price is known for {model}; repeat the enqueue with --price in=…,out=…"
    return (
        f"its calls report no cost, because {model} does not count their tokens; "
        f"if they are free, repeat the enqueue with --price in=0,out=0"
    )


def _highest(ended: list[Settlement], standing: dict[int, JobStatus]) -> dict[RunId, int]:
    """Return the runs of which a call cost more than any before, with what it cost."""
    found: dict[RunId, int] = {}
    for s in ended:
        cost = s.outcome.usage.cost_nanos
        if cost and cost > max(standing[s.claim.job_id].highest_nanos or 0, found.get(s.claim.run_id, 0)):
            found[s.claim.run_id] = cost
    return found


async def _not_lost(
    ended: list[Settlement], standing: dict[int, JobStatus], connection: Connection
) -> counters.Deltas:
    """Forget the estimated cost of calls that ended after their jobs were taken back: now it is known."""
    late = [
        s.claim
        for s in ended
        if (job := standing[s.claim.job_id]).state != JobState.INFLIGHT or job.claim_seq != s.claim.claim_seq
    ]
    return await forget_estimates(connection, {c.job_id: (c.run_id, c.claim_seq) for c in late})


async def _pause(connection: Connection, pauses: dict[RunId, Paused]) -> dict[str, Paused]:
    """Pause runs; return the names of those that were active, each with its pause."""
    paused: dict[str, Paused] = {}
    for run_id, pause in sorted(pauses.items()):  # in one order, so that two never wait for each other
        query = (
            update(runs)
            .where(runs.c.id == run_id, runs.c.state == RunState.ACTIVE)
            .values(pausing(pause))
            .returning(runs.c.name)
        )
        for name in (await connection.execute(query)).scalars():
            paused[name] = pause
    return paused
