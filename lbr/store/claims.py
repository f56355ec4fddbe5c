"""From due jobs to claims: which are taken, and the prompts and the past that a worker needs to make the calls."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import bindparam, case, func, literal_column, select, update

from lbr.core.errors import UNREAD, DatabaseError, Family
from lbr.core.limits import fitting
from lbr.core.pricing import characters_of, max_output_tokens, tokens_of
from lbr.core.types import NO_HISTORY, BadTry, Claim, History, JobId, Millis, Prompt, RunId
from lbr.store.outages import note_probes
from lbr.store.schema import PENDING, SUSPECT_CRASHES, attempts, jobs, prompts
from lbr.store.sql import PreparedQuery, any_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, Select

    from lbr.core.limits import CallBound
    from lbr.core.types import Json, WorkerId
    from lbr.store.database import Connection
    from lbr.store.limiting import Capacity
    from lbr.store.schema import AnyRow


def _due(*, suspects: bool) -> Select[tuple[int]]:
    """Select the ids of a run's jobs that may be claimed now, the longest due first."""
    crashes: ColumnElement[bool] = literal_column(
        f"jobs.crashes {'>=' if suspects else '<'} {SUSPECT_CRASHES}"
    )
    return (
        select(jobs.c.id)
        .where(PENDING, jobs.c.run_id == bindparam("run"), jobs.c.available_at <= bindparam("now"), crashes)
        .order_by(jobs.c.available_at, jobs.c.id)
        .limit(bindparam("most"))
    )


DUE, DUE_SUSPECT = _due(suspects=False), _due(suspects=True)


def _claiming(which: ColumnElement[bool]) -> PreparedQuery:
    return PreparedQuery(
        update(jobs)
        .where(which)
        .values(
            state=literal_column("'inflight'"),
            claim_seq=jobs.c.claim_seq + 1,
            worker_id=bindparam("worker"),
            lease_until=bindparam("until"),
        )
        .returning(
            jobs.c.id,
            jobs.c.run_id,
            jobs.c.claim_seq,
            jobs.c.retry_seq,
            jobs.c.attempts,
            jobs.c.crashes,
        )
    )


class _Taken(NamedTuple):
    """A row of what a claim returns."""

    id: JobId
    run_id: RunId
    claim_seq: int
    retry_seq: int
    attempts: int
    crashes: int


def _claim(due: Select[tuple[int]]) -> PreparedQuery:
    # Materialised: PostgreSQL may otherwise run the inner query anew, and lock and claim more than the limit.
    chosen = due.with_for_update(skip_locked=True).cte("due").prefix_with("MATERIALIZED")
    return _claiming(jobs.c.id.in_(select(chosen.c.id)))


CLAIM, CLAIM_SUSPECT = _claim(DUE), _claim(DUE_SUSPECT)


def _sized(due: Select[tuple[int]]) -> Any:
    return (
        due.add_columns(func.length(prompts.c.body).label("characters"))
        # Of messages the texts count, and an image in them, which may be as long as a book, does not.
        .add_columns(case((prompts.c.chat != 0, prompts.c.body)).label("messages"), prompts.c.settings)
        .join_from(jobs, prompts, prompts.c.job_id == jobs.c.id)
        .with_for_update(of=jobs, skip_locked=True)
    )


# Where tokens are counted: first look how large the prompts are, then claim those that fit.
DUE_SIZED, DUE_SUSPECT_SIZED = _sized(DUE), _sized(DUE_SUSPECT)
CLAIM_CHOSEN = _claiming(PENDING & any_of(jobs.c.id, "ids"))

_PROMPTS = PreparedQuery(
    select(prompts.c.job_id, prompts.c.key, prompts.c.body, prompts.c.chat, prompts.c.settings).where(
        any_of(prompts.c.job_id, "ids")
    )
)
# Without what came too late: that is another claim's, was charged to nobody and must use up no budget.
_TRIES = (
    select(*(attempts.c[name] for name in ("job_id", "claim_seq", "family", "error", "message", "at")))
    .add_columns(case((attempts.c.family == Family.BAD_ANSWER, attempts.c.text)).label("text"))
    .where(any_of(attempts.c.job_id, "ids"), attempts.c.what != "stale")
    .order_by(attempts.c.id)
)


_ID = itemgetter(0)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a worker asks for: up to `most` due jobs of these runs, in the order given.

    With `suspects`, only jobs that have crashed their workers twice, each of which must run alone. `extra` is how
    many tokens a call of a run takes besides its prompt, where they are limited; `bounds` is what it may cost at most,
    for the runs of which that is known.
    """

    worker: WorkerId
    run_ids: Sequence[RunId]
    most: int
    suspects: bool
    extra: Mapping[RunId, int]
    bounds: Mapping[RunId, CallBound] = field(default_factory=dict)


async def take(connection: Connection, gate: Capacity, wish: ClaimRequest, *, until: int) -> list[Claim]:
    """Claim what the gate lets through, with leases that hold until then, and debit it there."""
    rows: list[_Taken] = []
    sizes: dict[int, int] = {}
    for run_id in gate.budgets.keys() & wish.bounds.keys():
        gate.budgets[run_id] = replace(gate.budgets[run_id], bounded=True)
    for run_id in (r for r in wish.run_ids if r in gate.answerers):
        room = gate.room(run_id, wish.most - len(rows))
        if room > 0:
            asked = {"run": run_id, "most": room, "worker": wish.worker, "now": gate.now, "until": until}
            fit = await _fitting(connection, gate, asked, wish)
            statement, bound = _taking(asked, fit, wish)
            found = await statement.all(connection, bound)
            tokens = {job_id: one.tokens for job_id, one in (fit or {}).items()}
            highest = max((one.nanos for one in (fit or {}).values()), default=0)
            gate.take(run_id, len(found), sum(tokens.values()), highest)
            rows += map(_Taken._make, found)
            sizes |= tokens
    claims = await _with_prompts(connection, rows, gate.now)
    if gate.probed:
        claims = [replace(one, probe=True) if one.run_id in gate.probed.values() else one for one in claims]
        probes = {who: one for who, run_id in gate.probed.items() for one in claims if one.run_id == run_id}
        await note_probes(connection, probes, wish.worker)
    return _marked(claims, gate, sizes) if gate.limits else claims


async def _with_prompts(connection: Connection, rows: list[_Taken], now: Millis) -> list[Claim]:
    """Read, in the claim's own transaction, what its worker needs to make the calls."""
    if not rows:
        return []
    found = await _PROMPTS.all(connection, {"ids": [row.id for row in rows]})
    by_id = {row[0]: row for row in found}
    tried = [row for row in rows if row.claim_seq > row.retry_seq + 1]
    histories = await _histories(connection, tried, now)
    claims = []
    for job_id, run_id, claim_seq, _, attempts_, crashes in sorted(rows, key=_ID):
        if job_id not in by_id:
            raise DatabaseError(
                f"expected a prompt for job {job_id}, got: none; the database was changed by hand"
            )
        _, key, body, chat, settings = by_id[job_id]
        claims.append(
            Claim(
                job_id,
                run_id,
                claim_seq,
                attempts_,
                crashes,
                Prompt.from_body(body, chat=bool(chat)),
                key,
                histories.get(job_id, NO_HISTORY),
                settings=None if settings is None else _settings(settings),
            )
        )
    return claims


def _settings(text: str) -> dict[str, Json]:
    try:
        settings = orjson.loads(text)
    except orjson.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise DatabaseError(f"expected the stored settings of a job to be an object, got: {text[:200]!r}")
    return settings


async def _histories(connection: Connection, rows: list[_Taken], now: Millis) -> dict[int, History]:
    if not rows:
        return {}
    since = {row.id: row.retry_seq for row in rows}
    tries = (await connection.execute(_TRIES, {"ids": list(since)})).all()
    by_job: dict[int, list[AnyRow]] = {}
    for one in tries:
        if one.claim_seq > since[one.job_id]:
            by_job.setdefault(one.job_id, []).append(one)
    return {job_id: _history(group, now) for job_id, group in by_job.items()}


def _history(tries: list[AnyRow], now: Millis) -> History:
    bad = [t for t in tries if t.family == Family.BAD_ANSWER]
    shown = [t for t in bad if t.error not in UNREAD]  # no model is asked to correct an envelope
    limited = [t for t in tries if t.family == Family.RATE_LIMITED]
    denied = [t for t in tries if t.family == Family.PERMANENT]
    return History(
        bad_answers=len(bad),
        denied_tries=len(denied),
        limited_tries=len(limited),
        limited_ms=max(0, now - limited[0].at) if limited else 0,
        last_bad=BadTry(shown[-1].text or "", shown[-1].message) if shown else None,
    )


class _Size(NamedTuple):
    """What a call takes by estimate, in tokens, and may cost at most, 0 where nothing bounds it."""

    tokens: int
    nanos: int


async def _fitting(
    connection: Connection, gate: Capacity, asked: dict[str, Any], wish: ClaimRequest
) -> dict[int, _Size] | None:
    """Return the jobs that limits of tokens and of money let through, with their sizes; None without such a limit."""
    run_id = asked["run"]
    limit, budget, bound = gate.limit(run_id), gate.budgets.get(run_id), wish.bounds.get(run_id)
    by_tokens, by_cost = limit is not None and limit.tpm is not None, budget is not None and bound is not None
    if not (by_tokens or by_cost):
        return None
    found = (await connection.execute(DUE_SUSPECT_SIZED if wish.suspects else DUE_SIZED, asked)).all()
    sizes = [_size(row, wish.extra.get(run_id, 0), bound) for row in found]
    count = len(sizes)
    if limit is not None:
        count = fitting(limit, [one.tokens for one in sizes])
    if budget is not None and bound is not None:
        count = min(count, budget.fitting([one.nanos for one in sizes]))
    return {row.id: size for row, size in zip(found[:count], sizes[:count], strict=True)}


def _size(row: AnyRow, extra: int, bound: CallBound | None) -> _Size:
    tokens = tokens_of(_characters(row))
    if bound is None:
        return _Size(extra + tokens, 0)
    own = {} if row.settings is None else _settings(row.settings)
    return _Size(extra + tokens, bound.nanos(tokens, max_output_tokens(own)))


def _characters(row: AnyRow) -> int:
    if row.messages is None:
        return int(row.characters)
    return characters_of(Prompt.from_body(row.messages, chat=True))


def _taking(
    asked: dict[str, Any], fit: dict[int, _Size] | None, wish: ClaimRequest
) -> tuple[PreparedQuery, dict[str, Any]]:
    """Return the statement that claims, with what it is given."""
    if fit is None:
        return CLAIM_SUSPECT if wish.suspects else CLAIM, asked
    return CLAIM_CHOSEN, {"ids": list(fit), "worker": asked["worker"], "until": asked["until"]}


def _marked(claims: list[Claim], gate: Capacity, sizes: dict[int, int]) -> list[Claim]:
    """Note on the claims what is to be made good when they are settled."""
    throttled = {run_id for run_id in gate.answerers if gate.is_throttled(run_id)}
    return [
        replace(claim, tokens=sizes.get(claim.job_id, 0), throttled=claim.run_id in throttled)
        if claim.job_id in sizes or claim.run_id in throttled
        else claim
        for claim in claims
    ]
