"""What all workers share about an answerer: what a claim may take of it now, and what ended calls teach about it.

One row of `limits` for each answerer. A claim locks the rows that hold anything back, in the order of their names,
and debits them in its own transaction; those that hold nothing back are only read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, func, select, update

from lbr.core import limits as arithmetic
from lbr.core.errors import DatabaseError
from lbr.core.limits import Limit
from lbr.core.retry import MAX_AHEAD_MS
from lbr.core.types import JobState, PauseCause, Paused, RunState
from lbr.store.budgets import budgets_of, raise_highest
from lbr.store.counters import ANSWERED
from lbr.store.outages import waiting
from lbr.store.runs import pausing
from lbr.store.schema import SILENT_MS, counters, limits, outages, runs, workers
from lbr.store.sql import BulkStatement, PreparedQuery, Rows, any_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lbr.core.limits import Budget
    from lbr.core.types import Claim, Millis, RunId, WorkerId
    from lbr.store.database import Connection, Database
    from lbr.store.outages import Waiting

_LEARNED = ("slots", "threshold", "cut_at", "requests", "tokens", "balanced_at", "refused", "answered")
_COLUMNS = [limits.c[one.name] for one in fields(Limit)]
_OPEN = PreparedQuery(
    select(
        runs.c.id, runs.c.budget_nanos, runs.c.answerer, outages.c.since, limits.c.cooldown_until, *_COLUMNS
    )
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


def _totals(counter: str) -> PreparedQuery:
    return PreparedQuery(
        select(runs.c.answerer, func.sum(counters.c.value))
        .join_from(runs, counters, runs.c.id == counters.c.run_id)
        .where(any_of(runs.c.answerer, "answerers"), counters.c.name == counter)
        .group_by(runs.c.answerer)
    )


_INFLIGHT, _ANSWERED = _totals(str(JobState.INFLIGHT)), _totals(ANSWERED)
_CEILING = PreparedQuery(
    select(func.sum(workers.c.concurrency)).where(workers.c.seen_at > bindparam("since"))
)


def _saving(given: Rows) -> Any:
    learned = {name: given[f"new_{name}"] for name in _LEARNED}
    return update(limits).where(limits.c.answerer == given["who"]).values(learned)


_SAVE = BulkStatement(
    {"who": limits.c.answerer.type, **{f"new_{name}": limits.c[name].type for name in _LEARNED}}, _saving
)


def _making(given: Rows) -> Any:
    row = {"answerer": given["who"], "cooldown_until": given["until"], "reason": given["why"]}
    return given.insert_into(limits, row).on_conflict_do_nothing(index_elements=["answerer"])


_MAKE = BulkStatement(
    {"who": limits.c.answerer.type, "until": limits.c.cooldown_until.type, "why": limits.c.reason.type},
    _making,
)


@dataclass(slots=True)
class Capacity:
    """What may be claimed now, of which run.

    `answerers` are those of the runs that are active and do not cool down; `limits` those of them that hold
    anything back, refilled, and `budgets` those of the runs that have one. `ceiling` is how many slots the workers
    have together; `waits` are the times of the ends of cooldowns; `debited` are those from which was taken, and
    `raised` the runs of which a claimed call may cost more than any before. Of a model
    in `probes` one job may be claimed, to see whether an outage is over; `outages` are the models in one, with the cause.
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
    probes: set[str] = field(default_factory=set)
    outages: dict[str, str] = field(default_factory=dict)
    probed: dict[str, RunId] = field(default_factory=dict)

    def cool(self, until: Mapping[str, int]) -> None:
        """Pass over the runs of answerers that cool down, each until its time."""
        cooling = {who: end for who, end in until.items() if is_ahead(end, self.now)}
        self.waits += cooling.values()
        self.answerers = {run_id: who for run_id, who in self.answerers.items() if who not in cooling}

    def wait_for(self, found: Waiting) -> None:
        """Pass over the runs of models that all workers wait for, but for a probe."""
        self.waits += found.until.values()
        self.probes, self.outages = found.probes, found.reasons
        self.answerers = {run_id: who for run_id, who in self.answerers.items() if who not in found.until}

    def limit(self, run_id: RunId) -> Limit | None:
        """Return what holds a run's jobs back, None for nothing."""
        return self.limits.get(self.answerers[run_id])

    def room(self, run_id: RunId, most: int) -> int:
        """Return how many of a run's jobs may be claimed, `most` at most."""
        limit, budget = self.limit(run_id), self.budgets.get(run_id)
        rooms = [
            None if limit is None else arithmetic.room(limit, self._inflight(run_id)),
            None if budget is None else budget.room,
            self._probe_room(self.answerers[run_id]),
        ]
        return min([most, *(room for room in rooms if room is not None)])

    def _probe_room(self, who: str) -> int | None:
        return int(who not in self.probed) if who in self.probes else None

    def wait_ms(self, run_id: RunId) -> int:
        """Return after how long a run's job may perhaps be claimed, 0 for now, or for a run that is to be paused."""
        limit, budget = self.limit(run_id), self.budgets.get(run_id)
        if budget is not None and budget.room == 0:
            return 0 if budget.is_spent else arithmetic.RETRY_MS
        return 0 if limit is None else arithmetic.wait_ms(limit, self._inflight(run_id))

    def is_throttled(self, run_id: RunId) -> bool:
        """Tell whether calls that go well should widen what is learned of the answerer."""
        limit = self.limit(run_id)
        if limit is None or limit.slots is None or limit.concurrency is not None:
            return False
        return limit.slots < self.ceiling

    def take(self, run_id: RunId, calls: int, tokens: int, highest: int = 0) -> None:
        """Debit what was claimed; `highest` is what the most expensive of these calls may cost, 0 if not known."""
        who, limit = self.answerers[run_id], self.limit(run_id)
        if limit is not None and calls:
            self.debited.add(who)
            self.limits[who] = arithmetic.debited(limit, calls, tokens)
            self.inflight[who] = self._inflight(run_id) + calls
        if calls and who in self.probes:
            self.probed[who] = run_id
        if run_id in self.budgets:
            budget = self.budgets[run_id]
            self.budgets[run_id] = replace(
                budget, inflight=budget.inflight + calls, highest=max(budget.highest, highest)
            )
            if highest > budget.highest:
                self.raised.add(run_id)

    def _inflight(self, run_id: RunId) -> int:
        return self.inflight.get(self.answerers[run_id], 0)

    async def save(self, connection: Connection) -> None:
        """Write the balances down, and pause the runs whose budget is spent."""
        for run_id, budget in self.budgets.items():
            if budget.is_spent and budget.pending:
                pause = Paused(PauseCause.BUDGET, budget.spent_message)
                await connection.execute(update(runs).where(runs.c.id == run_id).values(pausing(pause)))
        await raise_highest(connection, {run_id: self.budgets[run_id].highest for run_id in self.raised})
        await _save(connection, {who: self.limits[who] for who in sorted(self.debited)})


def is_ahead(until: int, now: int) -> bool:
    """Tell whether a cooldown goes on; one that would go on for too long was set by a clock that was ahead."""
    return now < until <= now + MAX_AHEAD_MS


async def load_capacity(
    connection: Connection, run_ids: Sequence[RunId], now: Millis, worker: WorkerId, *, lock: bool
) -> Capacity:
    """Return what may be claimed of these runs; with `lock` it stays so until the transaction ends."""
    gate = Capacity(now)
    known: dict[str, Limit] = {}
    limited: list[RunId] = []
    away: set[str] = set()
    for run_id, budget, who, since, cooldown_until, *values in await _OPEN.all(
        connection, {"ids": list(run_ids)}
    ):
        if cooldown_until is not None and is_ahead(cooldown_until, now):
            gate.waits.append(cooldown_until)
            continue
        gate.answerers[run_id] = who
        known[who] = _limit_of(who, values)
        if since is not None:
            away.add(who)
        if budget is not None:
            limited.append(run_id)
    # Runs before answerers: so does whoever settles.
    gate.budgets, active = await budgets_of(connection, limited, lock=lock)
    for run_id in set(limited) - active:
        # Paused while we waited for the lock, perhaps for this very budget.
        del gate.answerers[run_id]
    if away:
        gate.wait_for(await waiting(connection, away, worker, now, lock=lock))
    if any(limit != _NONE for limit in known.values()):
        gate.ceiling = await ceiling(connection, now)
        binding = {who: limit for who, limit in known.items() if limit.binds(gate.ceiling)}
        if binding and lock:
            found = await _LOCKED.all(connection, {"answerers": list(binding)})
            binding = {who: _limit_of(who, values) for who, _, *values in found}
            # Who held the lock before us may have been told to wait.
            gate.cool({who: cooldown_until for who, cooldown_until, *_ in found})
        gate.limits = {who: arithmetic.refilled(limit, now) for who, limit in binding.items()}
        gate.inflight = await _calls_in_flight(
            connection, [who for who, limit in binding.items() if limit.at_a_time is not None]
        )
    return gate


_NONE = Limit()


def _limit_of(answerer: str, values: Sequence[Any]) -> Limit:
    """Return the limit that is stored in these columns, which are those of `_COLUMNS`."""
    found = Limit(*values)
    if any(value is not None and value < 1 for value in (found.rpm, found.tpm, found.concurrency)):
        raise DatabaseError(f"expected stored limits of at least 1 for {answerer!r}, got: {found}")
    if math.inf in (
        abs(value or 0)
        for value in (found.slots, found.threshold, found.requests, found.tokens, found.refused)
    ):
        raise DatabaseError(f"expected stored limits of finite numbers for {answerer!r}, got: {found}")
    return found


async def ceiling(connection: Connection, now: Millis) -> int:
    """Return how many slots the workers that report have together, at least one."""
    return max(1, await _slots_reported(connection, now))


async def _slots_reported(connection: Connection, now: Millis) -> int:
    [(slots,)] = await _CEILING.all(connection, {"since": now - SILENT_MS})
    return int(slots or 0)


async def _calls_in_flight(connection: Connection, answerers: list[str]) -> dict[str, int]:
    return await _counted(_INFLIGHT, connection, answerers)


async def _counted(query: PreparedQuery, connection: Connection, answerers: list[str]) -> dict[str, int]:
    if not answerers:
        return {}
    return {who: int(calls) for who, calls in await query.all(connection, {"answerers": answerers})}


async def _save(connection: Connection, changed: Mapping[str, Limit]) -> None:
    rows = [
        {"who": who, **{f"new_{name}": getattr(limit, name) for name in _LEARNED}}
        for who, limit in changed.items()
    ]
    await _SAVE.run(connection, rows)


@dataclass(slots=True)
class Feedback:
    """What a batch of ended calls says about their answerer.

    `tokens` and `calls` were debited and not used, `successes` are those that may widen what is learned;
    `too_much` is when the latest call began that the provider refused as one too many, None where it refused none.
    `refusals` and `answered` count the calls refused so, and all that were answered.
    """

    tokens: int = 0
    calls: int = 0
    successes: int = 0
    too_much: int | None = None
    refusals: int = 0
    answered: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows from it."""
        return not (self.tokens or self.calls or self.successes) and self.too_much is None


async def learn(connection: Connection, lessons: Mapping[str, Feedback], now: Millis) -> set[str]:
    """Carry over what ended calls say, answerer by answerer in the order of their names.

    Return those that refuse so many calls that all workers should wait.
    """
    lessons = {who: lesson for who, lesson in lessons.items() if not lesson.is_empty}
    if not lessons:
        return set()
    refused = sorted(who for who, lesson in lessons.items() if lesson.too_much is not None)
    await make(connection, refused)
    rows = await _LOCKED.all(connection, {"answerers": sorted(lessons)})
    slots = await ceiling(connection, now)
    # An answerer that never refused a call has no share to keep.
    shared = [who for who, _, *values in rows if who in refused or _limit_of(who, values).refused is not None]
    inflight = await _calls_in_flight(connection, shared)
    answered = await _counted(_ANSWERED, connection, shared)
    changed: dict[str, Limit] = {}
    for who, _, *values in rows:
        before, lesson = _limit_of(who, values), lessons[who]
        after = arithmetic.debited(arithmetic.refilled(before, now), -lesson.calls, -lesson.tokens)
        calls, total = inflight.get(who, 0), answered.get(who, 0) + lesson.answered
        if who in shared:
            after = arithmetic.observed(after, refusals=lesson.refusals, answered=total, inflight=calls)
        after = arithmetic.grown(after, lesson.successes, slots) if lesson.successes else after
        if lesson.too_much is not None:
            after = arithmetic.cut(after, began=lesson.too_much, now=now, inflight=calls, ceiling=slots)
        if replace(after, balanced_at=before.balanced_at) != before:
            changed[who] = after
    await _save(connection, changed)
    return {who for who in refused if who in changed and changed[who].refuses_much}


async def give_back(connection: Connection, claims: Iterable[Claim], released: set[int], now: Millis) -> None:
    """Credit the answerers with what claims were debited that were released without a call."""
    back = [claim for claim in claims if claim.job_id in released]
    query = select(runs.c.id, runs.c.answerer).where(any_of(runs.c.id, "ids"))
    found = (await connection.execute(query, {"ids": list({claim.run_id for claim in back})})).all()
    answerers = {row.id: row.answerer for row in found}
    lessons: dict[str, Feedback] = {}
    for claim in back:
        lesson = lessons.setdefault(answerers[claim.run_id], Feedback())
        lesson.calls += 1
        lesson.tokens += claim.tokens
    await learn(connection, lessons, now)


async def make(connection: Connection, answerers: Iterable[str]) -> None:
    """Make sure that there is a row for each."""
    await _MAKE.run(connection, [{"who": who, "until": 0, "why": ""} for who in answerers])


async def begin_slowly(database: Database, answerers: Iterable[str]) -> None:
    """Begin with few calls at a time where nothing has been learned of an answerer yet. Safe to repeat."""
    wanted = sorted(set(answerers))

    async def missing(connection: Connection) -> list[str]:
        query = select(limits.c.answerer).where(
            any_of(limits.c.answerer, "answerers"), limits.c.slots.is_not(None)
        )
        known = set((await connection.execute(query, {"answerers": wanted})).scalars())
        return [who for who in wanted if who not in known]

    async def work(connection: Connection) -> None:
        await make(connection, wanted)
        unknown = any_of(limits.c.answerer, "answerers") & limits.c.slots.is_(None)
        query = update(limits).where(unknown).values(slots=arithmetic.FIRST_SLOTS)
        await connection.execute(query, {"answerers": wanted})

    if wanted and await database.read(missing):
        await database.write(work)


@dataclass(frozen=True, slots=True)
class LimitSeen:
    """What is set and learned of an answerer, refilled, with its calls in flight and the slots of all workers.

    `ceiling`, the slots, is 0 where no worker reports.
    """

    answerer: str
    limit: Limit
    inflight: int
    ceiling: int


async def all_limits(connection: Connection, now: Millis) -> list[LimitSeen]:
    """Return every answerer of which anything is set or learned, by name."""
    rows = (await connection.execute(_ALL)).all()
    known = {who: _limit_of(who, values) for who, *values in rows}
    held = {who: limit for who, limit in known.items() if limit != _NONE}
    if not held:
        return []
    slots, inflight = await _slots_reported(connection, now), await _calls_in_flight(connection, list(held))
    return [
        LimitSeen(who, arithmetic.refilled(limit, now), inflight.get(who, 0), slots)
        for who, limit in held.items()
    ]


async def change(database: Database, answerer: str, values: Mapping[str, int | None]) -> Limit:
    """Set `rpm`, `tpm` or `concurrency` of an answerer, None to lift them, for all workers from now on."""
    buckets = {"rpm": "requests", "tpm": "tokens"}

    async def work(connection: Connection) -> Limit:
        await make(connection, [answerer])
        [(_, _, *stored)] = await _LOCKED.all(connection, {"answerers": [answerer]})
        before = _limit_of(answerer, stored)
        changed = {name: value for name, value in values.items() if getattr(before, name) != value}
        if changed:
            # A bucket of another size begins full: what was left of the old one says nothing.
            full: dict[str, Any] = {buckets[name]: None for name in changed if name in buckets}
            query = update(limits).where(limits.c.answerer == answerer).values(**changed, **full)
            await connection.execute(query)
            await database.wake(connection)
        return replace(before, **changed)

    return await database.write(work)
