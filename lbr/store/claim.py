"""Claims: which due jobs a worker takes, under the limits that all share, with what it needs to make the calls."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import bindparam, case, func, literal_column, select, update

from lbr.core.errors import UNREAD, DatabaseError, Family
from lbr.core.limits import fitting
from lbr.core.pricing import characters_of, max_output_tokens, table_price, tokens_of
from lbr.core.types import NO_HISTORY, BadTry, Claim, History, JobId, JobState, Millis, Prompt, RunId
from lbr.store import counters
from lbr.store.limits import load_capacity
from lbr.store.outages import note_probes
from lbr.store.schema import PENDING, SUSPECT_CRASHES, TRIED, attempts, jobs, prompts
from lbr.store.settle import settle
from lbr.store.sql import PreparedQuery, any_of, json_object

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Select

    from lbr.core.limits import CallBound
    from lbr.core.types import Settlement, WorkerId
    from lbr.store.limits import Capacity
    from lbr.store.schema import AnyRow
    from lbr.store.settle import Settled


def _due(*also: ColumnElement[bool], suspects: bool = False) -> Select[tuple[int]]:
    """Select the ids of a run's jobs that may be claimed now, the longest due first."""
    crashes: ColumnElement[bool] = literal_column(f"jobs.crashes {'>=' if suspects else '<'} {SUSPECT_CRASHES}")
    return (
        select(jobs.c.id)
        .where(PENDING, jobs.c.run_id == bindparam("run"), jobs.c.available_at <= bindparam("now"), crashes, *also)
        .order_by(jobs.c.available_at, jobs.c.id)
        .limit(bindparam("most"))
    )


def _claim_where(which: ColumnElement[bool]) -> PreparedQuery:
    columns = (jobs.c[name] for name in _Claimed._fields)
    return PreparedQuery(
        update(jobs)
        .where(which)
        .values(
            state=literal_column("'inflight'"),
            claim_seq=jobs.c.claim_seq + 1,
            worker_id=bindparam("worker"),
            lease_until=bindparam("until"),
        )
        .returning(*columns)
    )


def _claim_due(due: Select[tuple[int]]) -> PreparedQuery:
    # Materialised, because PostgreSQL may run an inner query again, and lock and claim more than the limit.
    chosen = due.with_for_update(skip_locked=True).cte("due").prefix_with("MATERIALIZED")
    return _claim_where(jobs.c.id.in_(select(chosen.c.id)))


def _with_sizes(due: Select[tuple[int]]) -> Any:
    return (
        due.add_columns(func.length(prompts.c.body).label("characters"))
        # Of messages only the texts count, not an image, which may be as long as a book.
        .add_columns(case((prompts.c.chat != 0, prompts.c.body)).label("messages"), prompts.c.settings)
        .join_from(jobs, prompts, prompts.c.job_id == jobs.c.id)
        .with_for_update(of=jobs, skip_locked=True)
    )


class _Claimed(NamedTuple):
    """A row that a claim returns."""

    id: JobId
    run_id: RunId
    claim_seq: int
    retry_seq: int
    attempts: int
    crashes: int


DUE, DUE_SUSPECT, DUE_TRIED = _due(), _due(suspects=True), _due(TRIED)
DUE_FRESH = _due(~TRIED)
"""For a batch."""
CLAIM, CLAIM_SUSPECT, CLAIM_TRIED = _claim_due(DUE), _claim_due(DUE_SUSPECT), _claim_due(DUE_TRIED)
# If tokens or dollars are limited: first look how large the prompts are, then claim those that fit.
DUE_SIZED, DUE_SUSPECT_SIZED, DUE_TRIED_SIZED = map(_with_sizes, (DUE, DUE_SUSPECT, DUE_TRIED))
CLAIM_CHOSEN = _claim_where(PENDING & any_of(jobs.c.id, "ids"))
PROMPTS = PreparedQuery(
    select(*(prompts.c[name] for name in ("job_id", "key", "body", "chat", "settings", "sample"))).where(
        any_of(prompts.c.job_id, "ids")
    )
)
# Stale answers belong to another claim and use up no budget.
_TRIES = (
    select(*(attempts.c[name] for name in ("job_id", "claim_seq", "family", "error", "message", "at")))
    .add_columns(case((attempts.c.family == Family.BAD_ANSWER, attempts.c.text)).label("text"))
    .where(any_of(attempts.c.job_id, "ids"), attempts.c.what != "stale")
    .order_by(attempts.c.id)
)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """What a worker asks for: up to `most` due jobs of these runs, in the order given, for `lease` seconds.

    With `suspects`, only jobs that have crashed their workers twice, each of which must run alone. `extra` is how
    many tokens a call of a run takes besides its prompt; `bounds` is what it may cost at most, if that is known.
    """

    worker: WorkerId
    run_ids: Sequence[RunId]
    most: int
    lease: float
    suspects: bool = False
    extra: Mapping[RunId, int] = field(default_factory=dict)
    bounds: Mapping[RunId, CallBound] = field(default_factory=dict)


def claim(connection: Connection, now: Millis, request: ClaimRequest) -> list[Claim]:
    """Claim due jobs. Runs that are not active and models that cool down are passed over; other limits are kept."""
    capacity = load_capacity(connection, request.run_ids, now, request.worker, lock=True, bounded=request.bounds)
    rows, tokens = _take(connection, capacity, request)
    claims = _with_prompts(connection, capacity, rows, tokens)
    probes = {capacity.answerers[one.run_id]: one for one in claims if one.probe}
    note_probes(connection, probes, request.worker)
    capacity.save(connection)
    if claims:
        counters.add(connection, _deltas(claims))
    return claims


def settle_and_claim(
    connection: Connection, now: Millis, batch: Sequence[Settlement], request: ClaimRequest
) -> tuple[Settled, list[Claim]]:
    """Settle and claim in one transaction, so that a file is locked and written once.

    Only if one transaction writes at a time: a claim and a settlement lock rows in different orders.
    """
    return settle(connection, now, batch), claim(connection, now, request)


def _deltas(claims: list[Claim]) -> counters.Deltas:
    return counters.moved((one.run_id, JobState.PENDING, JobState.INFLIGHT) for one in claims)


def _take(connection: Connection, capacity: Capacity, request: ClaimRequest) -> tuple[list[_Claimed], dict[int, int]]:
    """Claim what the capacity lets through and debit it; return the jobs, and the tokens of those that were counted."""
    rows: list[_Claimed] = []
    tokens: dict[int, int] = {}
    until = capacity.now + round(request.lease * 1000)
    for run_id in (r for r in request.run_ids if r in capacity.answerers):
        room = capacity.room(run_id, request.most - len(rows), bounded=run_id in request.bounds)
        if room <= 0:
            continue
        bound = {"run": run_id, "most": room, "worker": request.worker, "now": capacity.now, "until": until}
        sizes = _fitting(connection, capacity, bound, request)
        if sizes is None:
            claiming = CLAIM_TRIED if run_id in capacity.batching else CLAIM
            found = (CLAIM_SUSPECT if request.suspects else claiming).all(connection, bound)
            capacity.take(run_id, len(found))
        else:
            chosen = {"ids": list(sizes), "worker": request.worker, "until": until}
            found = CLAIM_CHOSEN.all(connection, chosen)
            taken = {job_id: size.tokens for job_id, size in sizes.items()}
            highest = max((size.nanos for size in sizes.values()), default=0)
            capacity.take(run_id, len(found), sum(taken.values()), highest)
            tokens |= taken
        rows += map(_Claimed._make, found)
    return rows, tokens


class _Size(NamedTuple):
    """About how many tokens a call takes, and its maximum cost, 0 if nothing bounds it."""

    tokens: int
    nanos: int


def _fitting(
    connection: Connection, capacity: Capacity, bound: dict[str, Any], request: ClaimRequest
) -> dict[int, _Size] | None:
    """Return the jobs that limits of tokens and of money let through, with their sizes; None without such a limit."""
    run_id = bound["run"]
    limit, budget = capacity.limit(run_id), capacity.budgets.get(run_id)
    call_bound = request.bounds.get(run_id)
    if (limit is None or limit.tpm is None) and (budget is None or call_bound is None):
        return None
    query = DUE_TRIED_SIZED if run_id in capacity.batching else DUE_SIZED
    found = connection.execute(DUE_SUSPECT_SIZED if request.suspects else query, bound).all()
    sizes = [_size(row, request.extra.get(run_id, 0), call_bound) for row in found]
    count = len(sizes)
    if limit is not None:
        count = fitting(limit, [one.tokens for one in sizes])
    if budget is not None and call_bound is not None:
        count = min(count, budget.fitting([one.nanos for one in sizes]))
    return {row.id: size for row, size in zip(found[:count], sizes[:count], strict=True)}


def _size(row: AnyRow, extra: int, bound: CallBound | None) -> _Size:
    chat = None if row.messages is None else Prompt.from_body(row.messages, chat=True)
    tokens = tokens_of(row.characters if chat is None else characters_of(chat))
    if bound is None:
        return _Size(extra + tokens, 0)
    own = own_settings(chat, row.settings) or {}
    if (price := table_price(own.get("model", ""))) is not None:
        bound = replace(bound, price=price)
    return _Size(extra + tokens, bound.nanos(tokens, max_output_tokens(own)))


def own_settings(prompt: Prompt | None, stored: str | None) -> dict[str, Any] | None:
    """Return what overrides the run's settings: those of the prompt, and over them the stored ones, of a retry."""
    of_prompt = None if prompt is None else prompt.settings
    if stored is None:
        return of_prompt
    return {**(of_prompt or {}), **json_object(stored, "settings of a job")}


def _with_prompts(
    connection: Connection, capacity: Capacity, rows: list[_Claimed], tokens: Mapping[int, int]
) -> list[Claim]:
    """Read, in the claim's own transaction, what its worker needs to make the calls."""
    if not rows:
        return []
    found = {row[0]: row for row in PROMPTS.all(connection, {"ids": [row.id for row in rows]})}
    histories = _histories(connection, [row for row in rows if row.claim_seq > row.retry_seq + 1], capacity.now)
    throttled = {run_id for run_id in capacity.answerers if capacity.is_throttled(run_id)}
    probed = set(capacity.probes.values())
    claims = []
    for job_id, run_id, claim_seq, _, attempts_, crashes in sorted(rows):
        if job_id not in found:
            raise DatabaseError(f"job {job_id} has no prompt: another program changed the database")
        _, key, body, chat, settings, sample = found[job_id]
        prompt = Prompt.from_body(body, chat=bool(chat))
        claims.append(
            Claim(
                job_id,
                run_id,
                claim_seq,
                attempts_,
                crashes,
                prompt,
                key,
                histories.get(job_id, NO_HISTORY),
                tokens=tokens.get(job_id, 0),
                throttled=run_id in throttled,
                settings=own_settings(prompt, settings),
                probe=run_id in probed,
                sample=sample or 0,
            )
        )
    return claims


def _histories(connection: Connection, rows: list[_Claimed], now: Millis) -> dict[int, History]:
    if not rows:
        return {}
    since = {row.id: row.retry_seq for row in rows}
    by_job: dict[int, list[AnyRow]] = {}
    for one in connection.execute(_TRIES, {"ids": list(since)}).all():
        if one.claim_seq > since[one.job_id]:
            by_job.setdefault(one.job_id, []).append(one)
    return {job_id: _history(tries, now) for job_id, tries in by_job.items()}


def _history(tries: list[AnyRow], now: Millis) -> History:
    bad = [t for t in tries if t.family == Family.BAD_ANSWER]
    shown = [t for t in bad if t.error not in UNREAD]  # no model is asked to correct an envelope
    limited = [t for t in tries if t.family == Family.RATE_LIMITED]
    return History(
        bad_answers=len(bad),
        denied_tries=sum(t.family == Family.PERMANENT for t in tries),
        limited_tries=len(limited),
        limited_ms=max(0, now - limited[0].at) if limited else 0,
        last_bad=BadTry(shown[-1].text or "", shown[-1].message) if shown else None,
    )
