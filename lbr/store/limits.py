"""Rate limits and budgets: what a claim may take now, what ended calls teach, what runs may cost.

One row of `limits` for each model. A claim locks the rows that hold anything back, in the order of their names, and
debits them in its own transaction; other rows are only read.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, literal_column, select, update

from lbr.core import limits as arithmetic
from lbr.core.batches import AUTO_REQUESTS, TAIL, Lane
from lbr.core.errors import DatabaseError
from lbr.core.limits import Budget, Limit
from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.types import JobState, PauseCause, Paused, RunId, RunState
from lbr.store.counters import (
    ANSWERED,
    COST_NANOS,
    CRASHED,
    ESTIMATED_NANOS,
    PARKED,
    RESERVED,
    REUSED,
    TRY,
    UNPRICED,
    estimated,
    of_runs,
)
from lbr.store.outages import waiting
from lbr.store.runs import pausing
from lbr.store.schema import SILENT_MS, attempts, counters, limits, outages, runs, workers
from lbr.store.sql import Inserting, PreparedQuery, Updating, any_of, wake_workers

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from sqlalchemy import Connection

    from lbr.core.types import JobId, Millis, WorkerId
    from lbr.store.counters import Deltas
    from lbr.store.schema import AnyRow

_LEARNED = ("slots", "threshold", "cut_at", "requests", "tokens", "balanced_at", "refused", "answered")
_COLUMNS = [limits.c[one.name] for one in fields(Limit)]
_NO_LIMIT = Limit()
_OPEN = PreparedQuery(
    select(runs.c.id, runs.c.budget_nanos, runs.c.lane, runs.c.warm_cache, runs.c.answerer)
    .add_columns(outages.c.since, limits.c.cooldown_until, *_COLUMNS)
    .join_from(runs, limits, runs.c.answerer == limits.c.answerer, isouter=True)
    .join(outages, runs.c.answerer == outages.c.answerer, isouter=True)
    .where(any_of(runs.c.id, "ids"), runs.c.state == RunState.ACTIVE)
)
_LOCKED = PreparedQuery(
    select(limits.c.answerer, limits.c.cooldown_until, *_COLUMNS)
    .where(any_of(limits.c.answerer, "answerers"))
    .order_by(limits.c.answerer)
    .with_for_update()
)
_ALL = select(limits.c.answerer, *_COLUMNS).order_by(limits.c.answerer)
_CEILING = PreparedQuery(select(func.sum(workers.c.concurrency)).where(workers.c.seen_at > bindparam("since")))
_BUDGETS = (
    select(runs.c.id, runs.c.budget_nanos, runs.c.highest_nanos)
    .where(any_of(runs.c.id, "ids"), runs.c.state == RunState.ACTIVE)
    .order_by(runs.c.id)
)
_ESTIMATES = select(attempts.c.id, attempts.c.job_id, attempts.c.claim_seq, attempts.c.cost_nanos).where(
    any_of(attempts.c.job_id, "ids"),
    literal_column("attempts.what = 'crashed'"),
    attempts.c.cost_nanos.is_not(None),
)
_CALLS = PreparedQuery(
    select(runs.c.answerer, counters.c.name, func.sum(counters.c.value))
    .join_from(runs, counters, runs.c.id == counters.c.run_id)
    .where(any_of(runs.c.answerer, "answerers"), literal_column(f"counters.name IN ('inflight', '{ANSWERED}')"))
    .group_by(runs.c.answerer, counters.c.name)
)
_MAKE = Inserting(limits, "answerer", "cooldown_until", "reason", unless="answerer")


MAX_COLD_CALLS = 3
"""After this many failed calls, a run no longer waits for a first answer to fill the provider's cache."""
BATCH_WAIT_MS = 5_000
"""How long to wait if only the end of a batch can leave room in a budget."""
_SAVE = Updating(limits, "answerer", *_LEARNED)


@dataclass(slots=True)
class Capacity:
    """What may be claimed now, of which run.

    `answerers` are the models of the runs that are active and do not cool down, `limits` those of them that hold
    anything back, refilled, and `budgets` those of the runs that have one. `ceiling` is how many slots all workers
    have; `waits` are the times when cooldowns end. `debited` are the models, and `raised` the runs whose highest cost,
    to be saved. Of a model in `probes` one job may be claimed; its run is noted there. `outages` are the models that
    all workers wait for, with the cause. Of a run in `batching`, only jobs that were tried may be claimed.
    Of a run in `cold`, whose calls in flight are counted there, one job at a time.
    """

    now: Millis
    ceiling: int = 0
    answerers: dict[RunId, str] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    inflight: dict[str, int] = field(default_factory=dict)
    budgets: dict[RunId, Budget] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    debited: set[str] = field(default_factory=set)
    raised: set[RunId] = field(default_factory=set)
    probes: dict[str, RunId | None] = field(default_factory=dict)
    outages: dict[str, str] = field(default_factory=dict)
    batching: set[RunId] = field(default_factory=set)
    cold: dict[RunId, int] = field(default_factory=dict)

    def pass_over(self, until: Mapping[str, int]) -> None:
        """Claim nothing of these models until their times."""
        self.waits += until.values()
        self.answerers = {run_id: who for run_id, who in self.answerers.items() if who not in until}

    def limit(self, run_id: RunId) -> Limit | None:
        """Return what holds a run's jobs back, None for nothing."""
        return self.limits.get(self.answerers[run_id])

    def room(self, run_id: RunId, most: int, *, bounded: bool) -> int:
        """Return how many of a run's jobs may be claimed, up to `most`; `bounded` if their maximum cost is known."""
        who, limit = self.answerers[run_id], self.limit(run_id)
        rooms: list[int | None] = [most]
        if limit is not None:
            rooms.append(arithmetic.room(limit, self.inflight[who]))
        if run_id in self.budgets:
            self.budgets[run_id] = replace(self.budgets[run_id], bounded=bounded)
            rooms.append(self.budgets[run_id].room)
        if who in self.probes:
            rooms.append(int(self.probes[who] is None))
        if run_id in self.cold:
            rooms.append(1 - self.cold[run_id])
        return min(room for room in rooms if room is not None)

    def wait_ms(self, run_id: RunId) -> int:
        """Return after how long a run's job may perhaps be claimed, 0 for now or if the run must be paused."""
        limit, budget = self.limit(run_id), self.budgets.get(run_id)
        if budget is not None and budget.room == 0:
            return 0 if budget.is_spent else arithmetic.RETRY_MS if budget.inflight else BATCH_WAIT_MS
        if self.cold.get(run_id):
            return arithmetic.RETRY_MS
        return 0 if limit is None else arithmetic.wait_ms(limit, self.inflight[self.answerers[run_id]])

    def is_throttled(self, run_id: RunId) -> bool:
        """Return whether successful calls should raise what is learned of the model."""
        limit = self.limit(run_id)
        if limit is None or limit.slots is None or limit.concurrency is not None:
            return False
        return limit.slots < self.ceiling

    def take(self, run_id: RunId, calls: int, tokens: int = 0, highest: int = 0) -> None:
        """Debit what was claimed; `highest` is what the most expensive of these calls may cost, 0 if not known."""
        who, limit = self.answerers[run_id], self.limit(run_id)
        if limit is not None and calls:
            self.debited.add(who)
            self.limits[who] = arithmetic.debited(limit, calls, tokens)
            self.inflight[who] += calls
        if calls and who in self.probes:
            self.probes[who] = run_id
        if run_id in self.cold:
            self.cold[run_id] += calls
        budget = self.budgets.get(run_id)
        if budget is not None:
            inflight, most = budget.inflight + calls, max(budget.highest, highest)
            self.budgets[run_id] = replace(budget, inflight=inflight, highest=most)
            if highest > budget.highest:
                self.raised.add(run_id)

    def save(self, connection: Connection) -> None:
        """Write the balances, and pause the runs whose budget is spent."""
        for run_id, budget in self.budgets.items():
            if budget.is_spent and budget.pending:
                pause = Paused(PauseCause.BUDGET, budget.spent_message)
                connection.execute(update(runs).where(runs.c.id == run_id).values(pausing(pause)))
        raise_highest(connection, {run_id: self.budgets[run_id].highest for run_id in self.raised})
        _save(connection, {who: self.limits[who] for who in sorted(self.debited)})


def is_ahead(until: int, now: int) -> bool:
    """Return whether a cooldown goes on; one that is too far ahead was set by a wrong clock."""
    return now < until <= now + MAX_AHEAD_MS


def load_capacity(
    connection: Connection,
    run_ids: Sequence[RunId],
    now: Millis,
    worker: WorkerId,
    *,
    lock: bool,
    bounded: Container[RunId] = (),
) -> Capacity:
    """Return what may be claimed of these runs; with `lock` it stays so until the transaction ends.

    `bounded` are those of which the maximum cost of a call is known.
    """
    capacity = Capacity(now)
    known: dict[str, Limit] = {}
    limited: list[RunId] = []
    away: set[str] = set()
    rows = _OPEN.all(connection, {"ids": list(run_ids)})
    lanes = {RunId(row[0]): Lane(row[2]) for row in rows if row[2] in {Lane.BATCH, Lane.AUTO}}
    first = {RunId(row[0]) for row in rows if row[3]}
    for run_id, budget, _, _, who, since, cooldown_until, *values in rows:
        if cooldown_until is not None and is_ahead(cooldown_until, now):
            capacity.waits.append(cooldown_until)
            continue
        capacity.answerers[run_id] = who
        known[who] = _limit_of(who, values)
        if since is not None:
            away.add(who)
        if budget is not None or run_id in first:
            limited.append(run_id)
    if limited:  # runs before models, as a settlement does
        found_runs = connection.execute(_BUDGETS.with_for_update() if lock else _BUDGETS, {"ids": limited}).all()
        capacity.budgets = _budgets_of(connection, [row for row in found_runs if row.budget_nanos is not None])
        # The others were paused while we waited for the lock, perhaps for this very budget.
        for run_id in set(limited) - {row.id for row in found_runs}:
            del capacity.answerers[run_id]
        capacity.cold = _cold(connection, first & capacity.answerers.keys(), lock=lock)
    if away:
        found = waiting(connection, away, worker, now, lock=lock)
        capacity.outages = {who: reason for who, (reason, _) in found.items()}
        capacity.probes = {who: None for who, (_, until) in found.items() if not until}
        capacity.pass_over({who: until for who, (_, until) in found.items() if until})
    if any(limit != _NO_LIMIT for limit in known.values()):
        _load_limits(connection, capacity, known, lock=lock)
    counts = of_runs(connection, lanes) if lanes else {}
    capacity.batching = {
        run_id
        for run_id, lane in lanes.items()
        if is_batching(lane, counts[run_id], capacity.budgets.get(run_id), bounded=run_id in bounded)
    }
    return capacity


def _cold(connection: Connection, run_ids: set[RunId], *, lock: bool) -> dict[RunId, int]:
    """Return those of the runs whose first call must go alone, with their calls in flight; with `lock`, end it for others.

    A first call that fails, or dies with its worker, is followed by another one, alone as well, up to MAX_COLD_CALLS.
    """
    counts = of_runs(connection, run_ids) if run_ids else {}
    cold = {
        run_id: found[JobState.INFLIGHT]
        for run_id, found in counts.items()
        if not found[ANSWERED]
        and sum(count for name, count in found.items() if name.startswith(TRY) or name == CRASHED) < MAX_COLD_CALLS
    }
    if lock and (warm := run_ids - cold.keys()):
        connection.execute(update(runs).where(runs.c.id.in_(warm)).values(warm_cache=None))
    return cold


def is_batching(lane: Lane, counts: Counter[str], budget: Budget | None, *, bounded: bool) -> bool:
    """Return whether a run's jobs wait for a batch unless they were tried; `bounded` as in `Budget`."""
    left = counts[JobState.PENDING] - counts[PARKED]
    if left <= (AUTO_REQUESTS - 1 if lane is Lane.AUTO else TAIL):
        return False
    # Without a bound, the first calls show what a batch may cost.
    return budget is None or bounded or budget.calls >= arithmetic.KNOWN_CALLS


def _load_limits(connection: Connection, capacity: Capacity, known: dict[str, Limit], *, lock: bool) -> None:
    now = capacity.now
    capacity.ceiling = max(1, _slots_reported(connection, now))
    binding = {who: limit for who, limit in known.items() if limit.binds(capacity.ceiling)}
    if binding and lock:
        rows = _LOCKED.all(connection, {"answerers": list(binding)})
        binding = {who: _limit_of(who, values) for who, _, *values in rows}
        # The last holder of the lock may have let the model cool down.
        capacity.pass_over({who: until for who, until, *_ in rows if is_ahead(until, now)})
    capacity.limits = {who: arithmetic.refilled(limit, now) for who, limit in binding.items()}
    calls = _calls_of(connection, [who for who, limit in binding.items() if limit.at_a_time is not None])
    capacity.inflight = {who: calls[who, JobState.INFLIGHT] for who in binding}


def _limit_of(answerer: str, values: Sequence[Any]) -> Limit:
    found = Limit(*values)
    if any(value is not None and value < 1 for value in (found.rpm, found.tpm, found.concurrency)):
        raise DatabaseError(f"expected stored limits of at least 1 for {answerer!r}, got: {found}")
    learned = (found.slots, found.threshold, found.requests, found.tokens, found.refused)
    if any(math.isinf(value or 0) for value in learned):
        raise DatabaseError(f"expected stored limits of finite numbers for {answerer!r}, got: {found}")
    return found


def _slots_reported(connection: Connection, now: Millis) -> int:
    [(slots,)] = _CEILING.all(connection, {"since": now - SILENT_MS})
    return int(slots or 0)


def _calls_of(connection: Connection, answerers: list[str]) -> Counter[tuple[str, str]]:
    """Return how many calls of these models are in flight and were answered, in all runs."""
    rows = _CALLS.all(connection, {"answerers": answerers}) if answerers else ()
    return Counter({(who, name): int(calls) for who, name, calls in rows})


def _save(connection: Connection, changed: Mapping[str, Limit]) -> None:
    _SAVE.run_plain(connection, [(who, *(getattr(limit, name) for name in _LEARNED)) for who, limit in changed.items()])


@dataclass(slots=True)
class Feedback:
    """What a batch of ended calls shows about their model.

    `tokens` and `calls` were debited and not used, `successes` may raise what is learned; `too_much` is when the latest
    call began that the provider refused as one too many, None if it refused none. `refusals` counts the calls refused
    so, `answered` those that were answered. `cooldown` is until when the provider wants no call, 0 if it did not say,
    and why.
    """

    tokens: int = 0
    calls: int = 0
    successes: int = 0
    too_much: int | None = None
    refusals: int = 0
    answered: int = 0
    cooldown: tuple[int, str] = (0, "")

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows from it."""
        return not (self.tokens or self.calls or self.successes) and self.too_much is None


def apply_feedback(connection: Connection, feedback: Mapping[str, Feedback], now: Millis) -> None:
    """Update limits by what ended calls show, model by model in the order of their names.

    If a model refuses many calls, all workers wait as long as it asked, and never shorter than before.
    """
    feedback = {who: one for who, one in feedback.items() if not one.is_empty}
    if not feedback:
        return
    refused = {who for who, one in feedback.items() if one.too_much is not None}
    _make(connection, sorted(refused))
    rows = _LOCKED.all(connection, {"answerers": sorted(feedback)})
    slots = max(1, _slots_reported(connection, now))
    before = {who: (until, _limit_of(who, values)) for who, until, *values in rows}
    # A model that never refused a call has no share to update.
    shared = [who for who, (_, limit) in before.items() if who in refused or limit.refused is not None]
    calls = _calls_of(connection, shared)
    changed: dict[str, Limit] = {}
    for who, (until, limit) in before.items():
        one, inflight = feedback[who], calls[who, JobState.INFLIGHT]
        after = arithmetic.debited(arithmetic.refilled(limit, now), -one.calls, -one.tokens)
        if who in shared:
            answered = calls[who, ANSWERED] + one.answered
            after = arithmetic.observed(after, refusals=one.refusals, answered=answered, inflight=inflight)
        if one.successes:
            after = arithmetic.grown(after, one.successes, slots)
        if one.too_much is not None:
            after = arithmetic.cut(after, began=one.too_much, now=now, inflight=inflight, ceiling=slots)
            end, reason = one.cooldown
            if after.refuses_much and end and not (is_ahead(until, now) and until >= end):
                wait = update(limits).where(limits.c.answerer == who).values(cooldown_until=end, reason=reason)
                connection.execute(wait)
        if replace(after, balanced_at=limit.balanced_at) != limit:
            changed[who] = after
    _save(connection, changed)


def give_back(connection: Connection, unused: Sequence[tuple[RunId, int]], now: Millis) -> None:
    """Credit the models with what was debited for claims without a call, given the run and the tokens of each."""
    query = select(runs.c.id, runs.c.answerer).where(any_of(runs.c.id, "ids"))
    found = connection.execute(query, {"ids": list({run_id for run_id, _ in unused})}).all()
    answerers = {row.id: row.answerer for row in found}
    feedback: dict[str, Feedback] = {}
    for run_id, tokens in unused:
        one = feedback.setdefault(answerers[run_id], Feedback())
        one.calls += 1
        one.tokens += tokens
    apply_feedback(connection, feedback, now)


def _make(connection: Connection, answerers: Iterable[str]) -> None:
    _MAKE.run_plain(connection, [(who, 0, "") for who in answerers])


def slow_start(connection: Connection, _now: Millis, answerers: list[str]) -> None:
    """Begin with few calls at a time if nothing has been learned of a model yet."""
    _make(connection, answerers)
    unknown = any_of(limits.c.answerer, "answerers") & limits.c.slots.is_(None)
    connection.execute(update(limits).where(unknown).values(slots=arithmetic.FIRST_SLOTS), {"answerers": answerers})


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """What is set for and learned of a model, refilled, with its calls in flight and the slots of all workers.

    `ceiling`, the slots, is 0 if no worker reports.
    """

    answerer: str
    limit: Limit
    inflight: int
    ceiling: int


def all_limits(connection: Connection, now: Millis) -> list[LimitStatus]:
    """Return every model for which anything is set or learned, by name."""
    rows = connection.execute(_ALL).all()
    known = {who: _limit_of(who, values) for who, *values in rows}
    held = {who: limit for who, limit in known.items() if limit != _NO_LIMIT}
    if not held:
        return []
    slots, calls = _slots_reported(connection, now), _calls_of(connection, list(held))
    return [
        LimitStatus(who, arithmetic.refilled(limit, now), calls[who, JobState.INFLIGHT], slots)
        for who, limit in held.items()
    ]


def set_limits(connection: Connection, _now: Millis, answerer: str, values: Mapping[str, int | None]) -> Limit:
    """Set `rpm`, `tpm` or `concurrency` of a model, None to lift them, for all workers from now on."""
    buckets = {"rpm": "requests", "tpm": "tokens"}
    _make(connection, [answerer])
    [(_, _, *stored)] = _LOCKED.all(connection, {"answerers": [answerer]})
    before = _limit_of(answerer, stored)
    changed = {name: value for name, value in values.items() if getattr(before, name) != value}
    if changed:
        # A bucket of another size begins full: what was left of the old one means nothing.
        full: dict[str, Any] = {buckets[name]: None for name in changed if name in buckets}
        connection.execute(update(limits).where(limits.c.answerer == answerer).values(**changed, **full))
        wake_workers(connection)
    return replace(before, **changed)


def _budgets_of(connection: Connection, rows: Sequence[AnyRow]) -> dict[RunId, Budget]:
    counts = of_runs(connection, [RunId(row.id) for row in rows])
    return {RunId(row.id): budget_of(row.budget_nanos or 0, counts[row.id], row.highest_nanos) for row in rows}


def budget_of(limit: int, counts: Counter[str], highest: int | None = None) -> Budget:
    """Return the budget of a run with these counts and a limit in nanos.

    `highest` is the highest cost of a call, None if that is not known.
    """
    # At least those whose answers are there: a run of an earlier version has no count of answered calls.
    answered = max(counts[ANSWERED], counts[JobState.DONE] - counts[REUSED])
    return Budget(
        limit=limit,
        spent=counts[COST_NANOS],
        calls=max(0, answered - counts[UNPRICED]),
        inflight=counts[JobState.INFLIGHT],
        pending=counts[JobState.PENDING] - counts[PARKED],
        highest=highest or 0,
        estimated=counts[ESTIMATED_NANOS],
        parked=counts[PARKED],
        held=counts[RESERVED],
    )


def likely_costs(connection: Connection, run_ids: Iterable[RunId]) -> dict[RunId, int]:
    """Return what a call of each run that died with its worker probably cost; nothing for runs of unknown cost."""
    query = select(runs.c.id, runs.c.budget_nanos, runs.c.highest_nanos).where(any_of(runs.c.id, "ids"))
    budgets = _budgets_of(connection, connection.execute(query, {"ids": list(run_ids)}).all())
    return {run_id: budget.likely for run_id, budget in budgets.items() if budget.likely is not None}


def forget_estimates(connection: Connection, claims: Mapping[tuple[JobId, int], RunId]) -> Deltas:
    """Remove the estimated costs of calls that were thought dead and are not; return what that changes.

    `claims` maps their jobs and claim_seqs to the run.
    """
    deltas: Deltas = Counter()
    ids = [job_id for job_id, _ in claims]
    for row in connection.execute(_ESTIMATES, {"ids": ids}).all() if ids else ():
        run_id = claims.get((row.job_id, row.claim_seq))
        if run_id is not None:
            deltas.update(estimated(run_id, -row.cost_nanos))
            connection.execute(update(attempts).where(attempts.c.id == row.id).values(cost_nanos=None))
    return deltas


def raise_highest(connection: Connection, costs: Mapping[RunId, int]) -> None:
    """Store what the most expensive call of these runs costs, or may cost, if it is more than before."""
    for run_id, nanos in sorted(costs.items()):  # in one order, so that two never wait for each other
        lower = runs.c.highest_nanos.is_(None) | (runs.c.highest_nanos < nanos)
        connection.execute(update(runs).where(runs.c.id == run_id, lower).values(highest_nanos=nanos))


def set_budget(connection: Connection, _now: Millis, run_id: RunId, nanos: int | None) -> None:
    """Set what a run may cost, including all that it has cost; None lifts it."""
    connection.execute(update(runs).where(runs.c.id == run_id).values(budget_nanos=nanos))
