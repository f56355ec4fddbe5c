"""How a run stands, as numbers and as words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lbr.core.errors import Family
from lbr.core.pricing import NANOS, Price, dollars
from lbr.core.text import duration, pluralize
from lbr.core.types import JobState, PauseCause, Paused, RunState
from lbr.store import counters
from lbr.store.schema import SILENT_MS

if TYPE_CHECKING:
    from lbr.core.types import Json
    from lbr.store.limiting import LimitSeen
    from lbr.store.reads import Overview, RunCounts, WorkerSeen


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run's numbers.

    `jobs` are distinct inputs, `duplicates` the inputs that share another's job, `reused` the jobs answered
    from another run. `rate` is jobs per second of the workers that hold jobs of the run; it and `eta_seconds` are None
    if no worker does, before the first answer, while the model is waited for, and if nothing is left. `cost_usd` is None where no price was known, or nothing was spent; `wasted_usd` is the part of
    it that went to tries that were no answers, or came too late, `estimated_usd` the part of it that is estimated, for calls that died with their
    worker, and `unpriced` counts the calls of models whose cost
    is unknown. `pause_cause` is what paused the run, a word that stays, and `pause_message` says it to people; both
    are None where it is not paused. `price` is what the run's user says that a million
    tokens cost, None where the provider and the price table are asked; `max_cost_usd` what the run may cost, None
    without a limit. `errors` counts tries by family.
    """

    run: str
    state: str
    pause_cause: str | None
    pause_message: str | None
    answerer: str
    sealed: bool
    finished: bool
    inputs: int
    jobs: int
    duplicates: int
    reused: int
    pending: int
    inflight: int
    done: int
    failed: int
    cancelled: int
    stale: int
    crashed: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    wasted_usd: float | None
    estimated_usd: float | None
    unpriced: int
    price: dict[str, float] | None
    max_cost_usd: float | None
    errors: dict[str, int]
    rate: float | None
    eta_seconds: float | None

    @property
    def pause(self) -> Paused | None:
        """Why the run is paused; None where it is not."""
        if self.pause_cause is None:
            return None
        return Paused(PauseCause(self.pause_cause), self.pause_message or "")

    def to_dict(self) -> dict[str, Json]:
        """Return the numbers as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Status:
    """Runs, the workers that report, models that are not called for now, and what is set or learned of them.

    `cooldowns` have `answerer`, `seconds` and `reason`; `outages` have `answerer`, `reason`, for how many `seconds` the
    model has not been reached, and in how many `probe_seconds` the next probe comes.
    """

    runs: list[RunStatus]
    workers: list[dict[str, Json]]
    cooldowns: list[dict[str, Json]]
    outages: list[dict[str, Json]]
    limits: list[dict[str, Json]]

    def to_dict(self) -> dict[str, Json]:
        """Return everything as JSON."""
        return asdict(self)


def status_of(view: Overview) -> Status:
    """Turn what the store holds into what people ask for."""
    live = [worker for worker in view.workers if view.now - worker.seen_at < SILENT_MS]
    away = {one.answerer for one in view.outages}
    return Status(
        runs=[_run_status(one, _rate(one, live, away)) for one in view.runs],
        workers=[_worker(worker, view.now) for worker in live],
        cooldowns=[
            {"answerer": c.answerer, "seconds": (c.until - view.now) / 1000, "reason": c.reason}
            for c in view.cooldowns
        ],
        outages=[
            {
                "answerer": one.answerer,
                "reason": one.reason,
                "seconds": (view.now - one.since) / 1000,
                "probe_seconds": max(0, one.probe_at - view.now) / 1000,
            }
            for one in view.outages
        ],
        limits=[limit_fields(one) for one in view.limits],
    )


def limit_fields(seen: LimitSeen) -> dict[str, Json]:
    """Return one answerer's limits: what is set, how many calls at a time it is held to, and the slots of all workers.

    None is unlimited. What was learned of the calls at a time stays where no worker is left.
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
    """Return one answerer's limits in words."""
    parts = [
        f"{fields[name]:,} {words} a minute"
        for name, words in (("rpm", "requests"), ("tpm", "tokens"))
        if fields[name] is not None
    ]
    if fields["concurrency"] is not None:
        parts.append(f"{pluralize(fields['concurrency'], 'call')} at a time")
    elif _is_narrow(fields):
        parts.append(f"{fields['at_a_time']} of {fields['slots']} calls at a time, learned")
    elif fields["at_a_time"] is not None and not fields["slots"]:
        parts.append(f"{fields['at_a_time']} calls at a time were learned")
    return printable(
        f"{fields['answerer']}: {', '.join(parts) or 'no limits'}; {fields['inflight']} in flight"
    )


def _worker(worker: WorkerSeen, now: int) -> dict[str, Json]:
    return {
        "host": worker.host,
        "pid": worker.pid,
        "concurrency": worker.concurrency,
        "settled": worker.settled,
        "rate": worker.rate,
        "up_seconds": (now - worker.started_at) / 1000,
        "seen_seconds_ago": (now - worker.seen_at) / 1000,
    }


def _rate(one: RunCounts, live: list[WorkerSeen], away: set[str]) -> float | None:
    answered = one.of(JobState.DONE) > one.counts[counters.REUSED]
    if one.run.state is not RunState.ACTIVE or not one.open or not answered or one.run.task.answerer in away:
        return None
    return sum(worker.rate for worker in live if one.run.id in worker.runs) or None


def _run_status(one: RunCounts, rate: float | None) -> RunStatus:
    counts = one.counts
    errors = {
        family.value: counts[counters.TRY + family] for family in Family if counts[counters.TRY + family]
    }
    cost = counts[counters.COST_NANOS]
    return RunStatus(
        run=one.run.name,
        state=one.run.state,
        pause_cause=None if one.run.pause is None else one.run.pause.cause,
        pause_message=None if one.run.pause is None else one.run.pause.message,
        answerer=one.run.task.answerer,
        sealed=one.run.sealed_at is not None,
        finished=one.finished,
        inputs=one.inputs,
        jobs=one.jobs,
        duplicates=one.inputs - one.jobs,
        reused=counts[counters.REUSED],
        pending=one.of(JobState.PENDING),
        inflight=one.of(JobState.INFLIGHT),
        done=one.of(JobState.DONE),
        failed=one.of(JobState.FAILED),
        cancelled=one.of(JobState.CANCELLED),
        stale=counts[counters.STALE],
        crashed=counts[counters.CRASHED],
        input_tokens=counts[counters.INPUT_TOKENS],
        output_tokens=counts[counters.OUTPUT_TOKENS],
        cost_usd=cost / NANOS if cost else None,
        wasted_usd=counts[counters.WASTED_NANOS] / NANOS if cost else None,
        estimated_usd=counts[counters.ESTIMATED_NANOS] / NANOS if cost else None,
        unpriced=counts[counters.UNPRICED],
        price=None if one.run.price is None else one.run.price.to_dict(),
        max_cost_usd=None if one.run.budget_nanos is None else one.run.budget_nanos / NANOS,
        errors=errors,
        rate=rate,
        eta_seconds=None if rate is None else one.open / rate,
    )


def one_line(status: RunStatus, *, rate: float | None = None) -> str:
    """Return the line that a progress report prints; `rate` replaces the workers' own figure."""
    ended = status.done + status.failed + status.cancelled
    parts = [f"{status.run}: {ended}/{status.jobs} jobs", f"{status.done} done"]
    if status.failed:
        parts.append(f"{status.failed} failed")
    if status.inflight:
        parts.append(f"{status.inflight} in flight")
    now = status.rate if rate is None else rate
    left = status.pending + status.inflight
    if now and left:
        parts += [f"{now:.1f}/s", f"{duration(left / now)} left"]
    return ", ".join(parts)


def paused_words(run: str, pause: Paused) -> str:
    """Return why a run is paused, and what to do about it."""
    if pause.cause is PauseCause.MOVED_TO:
        return f"{pause.message}, where it goes on; this is a copy that rests"
    return f"{pause.message}; {way_on(run, pause.cause)}"


def way_on(run: str, cause: PauseCause) -> str:
    """Return how a run that is paused goes on."""
    match cause:
        case PauseCause.MOVING_FROM:
            return "finish that with the same `lbr move`"
        case PauseCause.REMOVING:
            return f"`lbr rm {run}` finishes that"
        case PauseCause.USER:
            return f"`lbr resume {run}` lets it go on"
        case PauseCause.BUDGET:
            return f"`lbr resume {run} --max-cost DOLLARS` lets it cost more"
        case PauseCause.UNPRICED:
            return f"then `lbr resume {run}`; or lift the limit with `lbr resume {run} --max-cost inf`"
    return f"fix it, then `lbr resume {run}`"


def resumed_words(run: str, pause: Paused | None) -> str:
    """Return what to report of a run that was resumed, given why it was paused; empty where that is nothing."""
    if pause is None or pause.cause is not PauseCause.MOVED_TO:
        return ""
    return (
        f"run {run} was {pause.message} and goes on there: what workers call for here is paid for once "
        f"more; `lbr pause {run}` lets it rest again"
    )


def unfinished_words(run: str, pause: Paused | None) -> str:
    """Return what to do about a run that `lbr run` could not finish; `pause` is None where it is not paused."""
    if pause is None:
        return "run the same command again to resume"
    words = f"paused: {paused_words(run, pause)}"
    if pause.cause.is_move:
        return words
    if pause.cause is PauseCause.BUDGET:
        # The old --max-cost would be set again, and the run be paused again at once.
        return f"{words}, then run the command again with that --max-cost"
    if pause.cause is PauseCause.UNPRICED:
        return f"{words}; then run the command again with that --price, or without --max-cost"
    return f"{words}, then run the same command again"


def printable(text: str) -> str:
    """Return one line with all spelled out that would steer a terminal, or begin another line.

    Names and reasons come out of a database that anybody may have made.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def describe(status: Status) -> str:
    """Return the report that `lbr status` prints."""
    lines: list[str] = []
    for run in status.runs:
        lines += _describe_run(run)
    if not status.runs:
        lines.append("no runs yet; `lbr enqueue` makes one")
    lines += [
        f"cooling down: {c['answerer']} for another {duration(c['seconds'])}: {c['reason']}"
        for c in status.cooldowns
    ]
    lines += [
        f"waiting for {o['answerer']}, for {duration(o['seconds'])} now: {o['reason']}; the next probe is in "
        f"{duration(o['probe_seconds'])}"
        for o in status.outages
    ]
    lines += [f"limit {describe_limit(one)}" for one in status.limits if _holds_back(one)]
    lines += [
        f"worker {w['host']}:{w['pid']}: {w['settled']} settled, {w['rate']:.1f}/s, {w['concurrency']} slots, "
        f"up {duration(w['up_seconds'])}, seen {duration(w['seen_seconds_ago'])} ago"
        for w in status.workers
    ]
    return "\n".join(map(printable, lines))


def _holds_back(fields: dict[str, Json]) -> bool:
    """Tell whether a limit holds anything back now."""
    return any(fields[name] is not None for name in ("rpm", "tpm", "concurrency")) or _is_narrow(fields)


def _is_narrow(fields: dict[str, Json]) -> bool:
    """Tell whether fewer calls at a time are made than the workers have slots: what was learned may be all of them."""
    return fields["at_a_time"] is not None and bool(fields["at_a_time"] < fields["slots"])


def _cost_words(run: RunStatus) -> str:
    """Return what is to be said of a run's cost behind its tokens."""
    words = "" if run.cost_usd is None else f", cost {dollars(round(run.cost_usd * NANOS))}"
    if run.wasted_usd:
        words += f", {dollars(round(run.wasted_usd * NANOS))} of it for tries that were no answers"
    if run.estimated_usd:
        words += f", about {dollars(round(run.estimated_usd * NANOS))} of it estimated, for calls that died with their worker"
    if run.unpriced and (words or run.price is not None):
        words += f", and {pluralize(run.unpriced, 'call')} of unknown cost"
    return words


def _describe_run(run: RunStatus) -> list[str]:
    word = "finished" if run.finished and run.state != RunState.CANCELLED else run.state
    lines = [f"run {run.run} ({run.answerer}): {word}"]
    if run.pause is not None:
        lines.append(f"  paused: {paused_words(run.run, run.pause)}")
    if not run.sealed:
        lines.append("  its enqueue has not come to its end: if none is running, run the same command again")
    lines.append(f"  inputs {run.inputs}, jobs {run.jobs}, duplicates {run.duplicates}, reused {run.reused}")
    lines.append(
        f"  pending {run.pending}, in flight {run.inflight}, done {run.done}, failed {run.failed}, "
        f"cancelled {run.cancelled}"
    )
    cost = _cost_words(run)
    if run.input_tokens or run.output_tokens or cost:
        lines.append(f"  tokens {run.input_tokens} in, {run.output_tokens} out{cost}")
    if run.price is not None:
        price = Price(run.price["in"], run.price["out"])
        lines.append(f"  price of calls {price.words()}, in dollars for a million tokens")
    if run.max_cost_usd is not None:
        lines.append(f"  may cost {dollars(round(run.max_cost_usd * NANOS))}")
    if run.errors:
        lines.append("  tries that failed: " + ", ".join(f"{n} {family}" for family, n in run.errors.items()))
    if run.crashed or run.stale:
        lines.append(f"  leases that ran out {run.crashed}, answers that came too late {run.stale}")
    if run.rate is not None and run.eta_seconds is not None:
        lines.append(f"  {run.rate:.1f} jobs/s, {duration(run.eta_seconds)} left")
    if run.failed:
        lines.append(f"  `lbr retry {run.run}` puts the failed jobs back")
    return lines
