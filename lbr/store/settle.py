"""Writing down how calls ended: many claims in one transaction, each under its fence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, insert, literal_column, select, text, update

from lbr.errors import DatabaseError, Usage
from lbr.jobs import JobId, JobState, Millis, RunState, Settlement
from lbr.store import counters
from lbr.store.schema import attempts, jobs, results, runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.store.engines import Database
    from lbr.store.schema import AnyRow

# The fence: a claim's outcome is taken while nobody has claimed the job again. Pending is let in, for a late
# answer to a job that was reclaimed but not yet claimed again is paid for.
FENCE: ColumnElement[bool] = literal_column("jobs.state IN ('inflight', 'pending')")

_STANDING = (
    select(
        jobs.c.id,
        jobs.c.run_id,
        jobs.c.state,
        jobs.c.claim_seq,
        runs.c.state.label("run_state"),
        runs.c.answerer,
    )
    .join_from(jobs, runs, jobs.c.run_id == runs.c.id)
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .with_for_update(of=jobs)
)
SETTLE = (
    update(jobs)
    .where(FENCE, jobs.c.id == bindparam("job"), jobs.c.claim_seq == bindparam("seq"))
    .values(
        state=bindparam("to"),
        available_at=bindparam("available"),
        attempts=jobs.c.attempts + bindparam("charge"),
        finished_at=bindparam("finished"),
        worker_id=None,
        lease_until=None,
    )
)
_COOL_DOWN = text(
    "INSERT INTO limits (answerer, cooldown_until, reason) VALUES (:answerer, :until, :reason) "
    "ON CONFLICT (answerer) DO UPDATE SET cooldown_until = excluded.cooldown_until, reason = excluded.reason "
    "WHERE excluded.cooldown_until > limits.cooldown_until"
)


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a batch: the jobs whose outcome was taken, those refused as stale, the runs paused."""

    taken: frozenset[JobId]
    stale: frozenset[JobId]
    paused: dict[str, str]


def is_mine(settlement: Settlement, row: AnyRow) -> bool:
    """Tell whether the fence lets a settlement through, given how the job stands."""
    return bool(
        row.claim_seq == settlement.claim.claim_seq and row.state in {JobState.INFLIGHT, JobState.PENDING}
    )


def is_repeated(settlement: Settlement, row: AnyRow) -> bool:
    """Tell whether this very settlement is in the database already: only its claim could have written it."""
    return bool(
        row.claim_seq == settlement.claim.claim_seq
        and settlement.state is JobState.DONE
        and row.state == JobState.DONE
    )


async def settle(database: Database, batch: Sequence[Settlement]) -> Settled:
    """Write a batch of outcomes in one transaction.

    An outcome whose job was claimed again since, or has come to its end, changes nothing but is recorded as
    stale. Safe to repeat for answers.
    """

    async def work(connection: AsyncConnection) -> Settled:
        now = await database.now(connection)
        ids = [s.claim.job_id for s in batch]
        standing = {row.id: row for row in (await connection.execute(_STANDING, {"ids": ids})).all()}
        if len(standing) != len(set(ids)):
            raise DatabaseError(
                "expected the jobs of every call to exist, got: some removed; the database was replaced"
            )
        mine = [s for s in batch if is_mine(s, standing[s.claim.job_id])]
        rest = [s for s in batch if not is_mine(s, standing[s.claim.job_id])]
        stale = [s for s in rest if not is_repeated(s, standing[s.claim.job_id])]
        await _update_jobs(connection, mine, standing, now)
        await _insert_results(connection, mine)
        await _insert_attempts(connection, mine, stale, now)
        await counters.add(connection, _deltas(mine, stale, standing))
        await _cool_down(connection, mine, standing, now)
        paused = await _pause(connection, mine)
        return Settled(
            taken=frozenset(s.claim.job_id for s in mine),
            stale=frozenset(s.claim.job_id for s in stale),
            paused=paused,
        )

    return await database.write(work)


def _target(settlement: Settlement, row: AnyRow) -> JobState:
    """Return the state to write: a cancelled run takes no job up again."""
    if settlement.state is JobState.PENDING and row.run_state == RunState.CANCELLED:
        return JobState.CANCELLED
    return settlement.state


async def _update_jobs(
    connection: AsyncConnection, mine: list[Settlement], standing: dict[int, AnyRow], now: Millis
) -> None:
    if not mine:
        return
    rows = []
    for s in mine:
        to = _target(s, standing[s.claim.job_id])
        rows.append(
            {
                "job": s.claim.job_id,
                "seq": s.claim.claim_seq,
                "to": to,
                "available": now + s.wait_ms,
                "charge": s.charge,
                "finished": None if to is JobState.PENDING else now,
            }
        )
    done = await connection.execute(SETTLE, rows)
    if done.rowcount != len(rows):
        raise DatabaseError(
            f"expected {len(rows)} jobs to be settled, got: {done.rowcount}; nothing was written"
        )


async def _insert_results(connection: AsyncConnection, mine: list[Settlement]) -> None:
    rows = []
    for s in mine:
        reply = s.outcome.reply
        if reply is None:
            continue
        rows.append(
            {
                "job_id": s.claim.job_id,
                "text": reply.text,
                "model": reply.model,
                "finish_reason": reply.finish_reason,
                "latency_ms": s.outcome.latency_ms,
                "reused_from": None,
                **_usage(reply.usage),
            }
        )
    if rows:
        await connection.execute(insert(results), rows)


def _usage(usage: Usage) -> dict[str, int | None]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_nanos": usage.cost_nanos,
    }


def _usage_of(settlement: Settlement) -> Usage:
    outcome = settlement.outcome
    if outcome.reply is not None:
        return outcome.reply.usage
    return outcome.failure.usage if outcome.failure is not None else Usage()


async def _insert_attempts(
    connection: AsyncConnection, mine: list[Settlement], stale: list[Settlement], now: Millis
) -> None:
    rows = [
        _attempt(s, "retried" if s.state is JobState.PENDING else "failed", now)
        for s in mine
        if s.outcome.failure is not None
    ]
    rows += [_attempt(s, "stale", now) for s in stale]
    if rows:
        await connection.execute(insert(attempts), rows)


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
        "latency_ms": settlement.outcome.latency_ms,
        "at": now,
        **_usage(_usage_of(settlement)),
    }


def _deltas(mine: list[Settlement], stale: list[Settlement], standing: dict[int, AnyRow]) -> counters.Deltas:
    deltas: counters.Deltas = Counter()
    for s in mine:
        row = standing[s.claim.job_id]
        deltas[row.run_id, row.state] -= 1
        deltas[row.run_id, _target(s, row)] += 1
    for s in stale:
        deltas[s.claim.run_id, counters.STALE] += 1
    for s in [*mine, *stale]:
        usage = _usage_of(s)
        deltas[s.claim.run_id, counters.INPUT_TOKENS] += usage.input_tokens or 0
        deltas[s.claim.run_id, counters.OUTPUT_TOKENS] += usage.output_tokens or 0
        deltas[s.claim.run_id, counters.COST_NANOS] += usage.cost_nanos or 0
        if s.outcome.failure is not None:
            deltas[s.claim.run_id, counters.TRY + s.outcome.failure.family] += 1
    return deltas


async def _cool_down(
    connection: AsyncConnection, mine: list[Settlement], standing: dict[int, AnyRow], now: Millis
) -> None:
    """Tell every worker to leave an answerer alone until its provider's wait is over."""
    longest: dict[str, Settlement] = {}
    for s in sorted((s for s in mine if s.cool_down), key=lambda s: s.wait_ms):
        longest[standing[s.claim.job_id].answerer] = s
    for answerer, s in longest.items():
        reason = s.outcome.failure.message if s.outcome.failure else ""
        await connection.execute(
            _COOL_DOWN, {"answerer": answerer, "until": now + s.wait_ms, "reason": reason}
        )


async def _pause(connection: AsyncConnection, mine: list[Settlement]) -> dict[str, str]:
    """Pause the runs whose account does not work; return their names with the reason."""
    paused: dict[str, str] = {}
    reasons = {s.claim.run_id: s.pause for s in mine if s.pause is not None}
    for run_id, reason in reasons.items():
        query = (
            update(runs)
            .where(runs.c.id == run_id, runs.c.state == RunState.ACTIVE)
            .values(state=RunState.PAUSED, pause_reason=reason)
            .returning(runs.c.name)
        )
        for name in (await connection.execute(query)).scalars():
            paused[name] = reason
    return paused
