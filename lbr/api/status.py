"""The state of runs, workers and limits, as numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lbr.core.batches import BatchState, Lane
from lbr.core.errors import Family
from lbr.core.pricing import NANOS, Price, dollars
from lbr.core.text import aligned, duration, pluralize
from lbr.core.tiers import FLEX
from lbr.core.types import JobState, PauseCause, Paused, Report, RunState
from lbr.store import counters
from lbr.store.pulses import NO_PACE

if TYPE_CHECKING:
    from collections.abc import Container

    from lbr.core.types import Json, Millis
    from lbr.store.limits import LimitStatus
    from lbr.store.pulses import Pace
    from lbr.store.reads import Overview, RunCounts


LISTED = ("run", "model or function", "inputs", "done", "failed", "state", "age", "cost")
NO_RUNS = "no runs yet; `lbr enqueue` creates one"
PLAIN_COUNTERS = ("reused", "stale", "crashed", "input_tokens", "cached_tokens", "output_tokens", "unpriced")
WAYS_ON = {
    PauseCause.MOVING_FROM: "finish that with the same `lbr move`",
    PauseCause.REMOVING: "`lbr rm {run}` finishes that",
    PauseCause.USER: "`lbr resume {run}` lets it go on",
    PauseCause.BUDGET: "`lbr resume {run} --max-cost DOLLARS` lets it cost more",
    PauseCause.UNPRICED: "then `lbr resume {run}`; or lift the limit with `lbr resume {run} --max-cost inf`",
}


@dataclass(frozen=True, slots=True)
class RunStatus(Report):
    """One run's numbers.

    `jobs` are distinct inputs, times `samples`, the answers per input; `duplicates` share another's job, `reused` are the
    jobs answered from another run. `pause_cause` is a fixed word, `pause_message` its explanation; both are None unless the run is paused.
    `cost_usd` is None if no price was known or nothing was spent. Of it, `wasted_usd` went to failed or late attempts, and
    `estimated_usd` is estimated, for calls that died with their worker. `unpriced` counts calls of unknown cost.
    `at_provider` is how many of the pending jobs are in a batch; `lane` is online, batch or auto.
    `price` is what the user set for a million tokens, None if the provider and the price table decide; `max_cost_usd` is
    None without a limit. `errors` counts failed attempts by family. `retrying` is how many of the pending jobs were tried
    before, of which 10,000 are counted. `tier` is None if it was never set. `cached_tokens` are those of the input tokens
    that the provider had in its cache. `rate` is how many jobs of this run were answered per second in the last minute or
    two, `per_minute` the same per minute, and `eta_seconds` the time left; they are None if no worker has answered any
    lately, during an outage, and if nothing is left. `elapsed_seconds` is how long workers have been working on it without
    a long pause, None before the first call. `age_seconds` counts from the first enqueue.
    """

    run: str
    state: str
    pause_cause: str | None
    pause_message: str | None
    answerer: str
    tier: str | None
    sealed: bool
    finished: bool
    inputs: int
    samples: int
    lane: str
    jobs: int
    duplicates: int
    reused: int
    pending: int
    retrying: int
    at_provider: int
    inflight: int
    done: int
    failed: int
    cancelled: int
    stale: int
    crashed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_usd: float | None
    wasted_usd: float | None
    estimated_usd: float | None
    unpriced: int
    price: dict[str, float] | None
    max_cost_usd: float | None
    errors: dict[str, int]
    rate: float | None
    per_minute: float | None
    elapsed_seconds: float | None
    eta_seconds: float | None
    age_seconds: float

    @property
    def word(self) -> str:
        """The run's state in a word: finished, active, paused or cancelled."""
        return "finished" if self.finished and self.state != RunState.CANCELLED else self.state

    @property
    def tokens(self) -> str:
        """The tokens in words."""
        cached = f" ({self.cached_tokens} of them cached)" if self.cached_tokens else ""
        return f"tokens {self.input_tokens} in{cached}, {self.output_tokens} out"

    @property
    def pause(self) -> Paused | None:
        """Why the run is paused; None if it is not."""
        cause = self.pause_cause
        return None if cause is None else Paused(PauseCause(cause), self.pause_message or "")


@dataclass(frozen=True, slots=True)
class Status(Report):
    """Runs, the workers that report, models that are not called for now, and the limits of models.

    `batches` are the open ones, as `lbr.batches` returns them. `cooldowns` have `answerer`, `seconds` (left) and `reason`; `outages` have `answerer`, `reason`, `seconds` (since
    it was last reached) and `probe_seconds` (until the next probe).
    """

    runs: list[RunStatus]
    workers: list[dict[str, Json]]
    cooldowns: list[dict[str, Json]]
    outages: list[dict[str, Json]]
    limits: list[dict[str, Json]]
    batches: list[dict[str, Json]] = field(default_factory=list)


def status_of(view: Overview) -> Status:
    """Return the state of everything that the store reports."""
    away = {one.answerer for one in view.outages}
    return Status(
        runs=[run_status(one, view.now, view.paces[one.run.id], away) for one in view.runs],
        workers=[one._asdict() for one in view.workers if one.is_live],
        cooldowns=[one._asdict() for one in view.cooldowns],
        outages=[one._asdict() for one in view.outages],
        limits=[limit_fields(one) for one in view.limits],
    )


def run_status(one: RunCounts, now: Millis, pace: Pace = NO_PACE, away: Container[str] = ()) -> RunStatus:
    """Return the numbers of a run; `away` are the models that all workers wait for."""
    goes = one.run.state is RunState.ACTIVE and one.open and one.run.task.answerer not in away
    rate = pace.rate if goes else None
    elapsed = None if pace.began is None or pace.ended is None else max(0, pace.ended - pace.began) / 1000
    run, counts, cost = one.run, one.counts, one.counts[counters.COST_NANOS]
    return RunStatus(
        run=run.name,
        state=run.state,
        pause_cause=None if run.pause is None else run.pause.cause,
        pause_message=None if run.pause is None else run.pause.message,
        answerer=run.task.answerer,
        tier=run.task.tier,
        sealed=run.sealed_at is not None,
        finished=one.finished,
        inputs=one.inputs,
        samples=run.samples,
        lane=run.lane or Lane.ONLINE,
        jobs=one.jobs,
        duplicates=one.inputs * run.samples - one.jobs,
        **{state.value: one.of(state) for state in JobState},
        **{name: counts[name] for name in PLAIN_COUNTERS},
        cost_usd=cost / NANOS if cost else None,
        wasted_usd=counts[counters.WASTED_NANOS] / NANOS if cost else None,
        estimated_usd=counts[counters.ESTIMATED_NANOS] / NANOS if cost else None,
        price=None if run.price is None else run.price.to_dict(),
        max_cost_usd=None if run.budget_nanos is None else run.budget_nanos / NANOS,
        errors={one.value: counts[counters.TRY + one] for one in Family if counts[counters.TRY + one]},
        retrying=pace.retrying,
        at_provider=counts[counters.PARKED],
        rate=rate,
        per_minute=None if rate is None else rate * 60,
        elapsed_seconds=elapsed,
        eta_seconds=None if rate is None or counts[counters.PARKED] else one.open / rate,
        age_seconds=max(0, now - run.created_at) / 1000,
    )


def limit_fields(seen: LimitStatus) -> dict[str, Json]:
    """Return the limits of a model or function, the calls at a time that it now gets, and the slots of all workers.

    None is unlimited. The learned number of calls at a time stays when no worker is left.
    """
    limit = seen.limit
    return {
        "answerer": seen.answerer,
        "rpm": limit.rpm,
        "tpm": limit.tpm,
        "concurrency": limit.concurrency,
        "at_a_time": limit.at_a_time,
        "slots": seen.ceiling,
        "inflight": seen.inflight,
    }


def describe_limit(fields: dict[str, Json]) -> str:
    """Return `limit_fields` in words."""
    words = (("rpm", "requests"), ("tpm", "tokens"))
    parts = [f"{fields[name]:,} {noun} a minute" for name, noun in words if fields[name] is not None]
    if fields["concurrency"] is not None:
        parts.append(f"{pluralize(fields['concurrency'], 'call')} at a time")
    elif _is_throttled(fields):
        parts.append(f"{fields['at_a_time']} of {fields['slots']} calls at a time, learned")
    elif fields["at_a_time"] is not None and not fields["slots"]:
        parts.append(f"{fields['at_a_time']} calls at a time were learned")
    text = f"{fields['answerer']}: {', '.join(parts) or 'no limits'}; {fields['inflight']} in flight"
    return printable(text)


def _is_throttled(fields: dict[str, Json]) -> bool:
    """Return whether fewer calls at a time are made than the workers have slots."""
    return fields["at_a_time"] is not None and bool(fields["at_a_time"] < fields["slots"])


def paused_words(run: str, pause: Paused) -> str:
    """Return why a run is paused, and what to do about it."""
    if pause.cause is PauseCause.MOVED_TO:
        return f"{pause.message}, where it goes on; this is a copy that rests"
    return f"{pause.message}; {way_on(run, pause.cause)}"


def way_on(run: str, cause: PauseCause) -> str:
    """Return what lets a paused run go on."""
    return WAYS_ON.get(cause, "fix it, then `lbr resume {run}`").format(run=run)


def resumed_words(run: str, pause: Paused | None) -> str:
    """Return a warning about a resumed run that was moved, given why it was paused; empty for any other."""
    if pause is None or pause.cause is not PauseCause.MOVED_TO:
        return ""
    return (
        f"run {run} was {pause.message} and goes on there: calls that workers make for it here are paid for again; "
        f"`lbr pause {run}` pauses it again"
    )


def unfinished_words(run: str, pause: Paused | None) -> str:
    """Return what to do about a run that `lbr run` could not finish; `pause` is None if it is not paused."""
    if pause is None:
        return "run the same command again to resume"
    words = f"paused: {paused_words(run, pause)}"
    if pause.cause.is_move:
        return words
    if pause.cause is PauseCause.BUDGET:  # the old --max-cost would pause it again at once
        return f"{words}, then run the command again with that --max-cost"
    if pause.cause is PauseCause.UNPRICED:
        return f"{words}; then run the command again with that --price, or without --max-cost"
    return f"{words}, then run the same command again"


def printable(text: str) -> str:
    """Return one line with all characters escaped that would control a terminal: anybody may have made the database."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def describe(status: Status) -> str:
    """Return the report that `lbr status` prints."""
    lines = [line for run in status.runs for line in _describe_run(run, batch_words(status, run))]
    if not status.runs:
        lines.append(NO_RUNS)
    lines += [
        f"cooling down: {one['answerer']} for another {duration(one['seconds'])}: {one['reason']}"
        for one in status.cooldowns
    ]
    lines += [
        f"waiting for {one['answerer']}, for {duration(one['seconds'])} now: {one['reason']}; the next probe is in "
        f"{duration(one['probe_seconds'])}"
        for one in status.outages
    ]
    limits = ("rpm", "tpm", "concurrency")
    lines += [
        f"limit {describe_limit(one)}"
        for one in status.limits
        if _is_throttled(one) or any(one[name] is not None for name in limits)
    ]
    lines += [
        f"worker {one['host']}:{one['pid']}: {one['settled']} settled, {one['rate']:.1f}/s, {one['concurrency']} slots, "
        f"up {duration(one['up_seconds'])}, seen {duration(one['seen_seconds_ago'])} ago"
        for one in status.workers
    ]
    return "\n".join(map(printable, lines))


def describe_list(runs: list[RunStatus]) -> str:
    """Return the table that `lbr list` prints, a line for each run."""
    if not runs:
        return NO_RUNS
    return aligned([LISTED, *map(_listed, runs)])


def _listed(run: RunStatus) -> tuple[str, ...]:
    cost = "-" if run.cost_usd is None else _dollars(run.cost_usd)
    counts = map(str, (run.inputs, run.done, run.failed))
    return (printable(run.run), printable(run.answerer), *counts, run.word, duration(run.age_seconds), cost)


def batch_words(status: Status, run: RunStatus) -> str:
    """Return how many jobs of a run wait for its batches, and when a worker asks; empty if none do."""
    mine = [one for one in status.batches if one["run"] == run.run]
    if not run.at_provider or not mine:
        return ""
    jobs, noun = f"{run.at_provider:,} job{'s' * (run.at_provider != 1)}", "batch" if len(mine) == 1 else "batches"
    sent = [one["seconds_since_sent"] for one in mine if one["seconds_since_sent"] is not None]
    place = f"at the provider, sent {duration(max(sent))} ago" if sent else "to be sent"
    unsure = sum(one["state"] in {BatchState.SENDING, BatchState.UNSURE} for one in mine)
    place += f", {unsure} not confirmed" if unsure else ""
    step = min(one["next_step_seconds"] for one in mine)
    then = (
        f"next look in {duration(step)}"
        if step
        else "a look is due"
        if status.workers
        else "a look is due; start `lbr worker`"
    )
    return f"{jobs} in {len(mine)} {noun} {place}; {then}"


def _describe_run(run: RunStatus, batched: str) -> list[str]:
    lines = [f"run {run.run} ({run.answerer}{', flex' * (run.tier == FLEX)}): {run.word}"]
    if run.pause is not None:
        lines.append(f"  paused: {paused_words(run.run, run.pause)}")
    if not run.sealed:
        lines.append("  its enqueue has not finished: if none is running, run the same command again")
    samples = f", {run.samples} samples each" if run.samples > 1 else ""
    lines.append(f"  inputs {run.inputs}{samples}, jobs {run.jobs}, duplicates {run.duplicates}, reused {run.reused}")
    counts = f"done {run.done}, failed {run.failed}, cancelled {run.cancelled}"
    retrying = f" ({run.retrying} of them tried before)" if run.retrying else ""
    lines += [
        f"  pending {run.pending}{retrying}, in flight {run.inflight}, {counts}",
        *[f"  {batched}"] * bool(batched),
    ]
    lines += _describe_cost(run)
    if run.errors:
        lines.append("  failed attempts: " + ", ".join(f"{n} {family}" for family, n in run.errors.items()))
    if run.crashed or run.stale:
        lines.append(f"  leases expired {run.crashed}, answers that came too late {run.stale}")
    if run.rate is not None and run.eta_seconds is not None:
        rate = f"{run.rate:.1f} jobs/s" if run.rate >= 1 else f"{run.rate * 60:.1f} jobs/min"
        lines.append(f"  {rate}, {duration(run.elapsed_seconds or 0)} elapsed, {duration(run.eta_seconds)} left")
    if run.failed:
        lines.append(f"  `lbr retry {run.run}` puts the failed jobs back")
    return lines


def _describe_cost(run: RunStatus) -> list[str]:
    cost = "" if run.cost_usd is None else f", cost {_dollars(run.cost_usd)}"
    if run.wasted_usd:
        cost += f", {_dollars(run.wasted_usd)} of it for failed attempts"
    if run.estimated_usd:
        cost += f", about {_dollars(run.estimated_usd)} of it estimated, for calls that died with their worker"
    if run.unpriced and (cost or run.price is not None):
        cost += f", and {pluralize(run.unpriced, 'call')} of unknown cost"
    lines = []
    if run.input_tokens or run.output_tokens or cost:
        lines.append(f"  {run.tokens}{cost}")
    if run.price is not None:
        price = Price(run.price["in"], run.price["out"], cached_per_million=run.price.get("cached"))
        lines.append(f"  price of calls {price.words()}, in dollars for a million tokens")
    if run.max_cost_usd is not None:
        lines.append(f"  may cost {_dollars(run.max_cost_usd)}")
    return lines


def _dollars(amount: float) -> str:
    return dollars(round(amount * NANOS))
