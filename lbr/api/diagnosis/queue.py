"""What there is to say of a queue's tables: leases, times, counters, limits, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.api.diagnosis.findings import Finding, Gravity
from lbr.api.status import describe_limit, limit_fields, way_on
from lbr.core.plurals import duration, pluralize
from lbr.core.types import PauseCause, RunState
from lbr.store.schema import SILENT_MS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lbr.core.types import Run
    from lbr.store.queue_health import QueueHealth
    from lbr.store.reads import Overview, RunCounts
    from lbr.store.recount import Drift

AHEAD_MS = 2_000
LONG_EXPIRED_MS = 60_000
LIVE_ENQUEUE_MS = 60_000
LEAST_SLOTS = 2


def of_queue(queue: QueueHealth, mended: Sequence[Drift]) -> Iterator[Finding]:
    """Say what there is to say of the tables; `mended` are the counters that were off."""
    if queue.leases is not None:
        yield _leases(queue.leases.expired, queue.leases.oldest_ms, _live_workers(queue.view))
    if queue.ahead is not None:
        yield _clock(queue.ahead)
    if queue.drifts is not None:
        yield from _counters(queue.drifts, mended)
    if queue.view is not None:
        yield from _limits(queue.view)
        yield from _runs(queue.view)


def _live_workers(view: Overview | None) -> int:
    if view is None:
        return 0
    return sum(abs(view.now - worker.seen_at) < SILENT_MS for worker in view.workers)


def _leases(expired: int, oldest_ms: int, workers: int) -> Finding:
    if not expired:
        return Finding("leases", Gravity.OK, "none has run out")
    words = (
        f"{expired} {'leases have' if expired > 1 else 'lease has'} run out, {duration(oldest_ms / 1000)} ago; "
        f"{workers or 'no'} worker{'s' * (workers != 1)} reported of late"
    )
    if workers and oldest_ms < LONG_EXPIRED_MS:
        return Finding("leases", Gravity.NOTE, words, "nothing: workers take such jobs back")
    if workers:
        way = "see whether the workers that report still do something: `lbr status`; start another"
    else:
        way = "`lbr worker` takes the jobs back and goes on with them"
    return Finding("leases", Gravity.WARNING, words, way)


def _clock(ahead: dict[str, int]) -> Finding:
    off = {what: by for what, by in ahead.items() if by >= AHEAD_MS}
    if not off:
        return Finding("clock", Gravity.OK, "nothing is written down from the future")
    shown = ", ".join(f"{what} by {duration(by / 1000)}" for what, by in off.items())
    return Finding(
        "clock",
        Gravity.WARNING,
        f"what is written down lies in the future: {shown}; the clock was set back, or was wrong before",
        "set the clock right, by a time server; leases and waits that were given meanwhile end by the clock, so late",
    )


def _counters(drifts: Sequence[Drift], mended: Sequence[Drift]) -> Iterator[Finding]:
    if mended:
        yield Finding("counters", Gravity.NOTE, f"were off and are mended: {_drift_words(mended)}")
    if drifts:
        yield Finding(
            "counters",
            Gravity.ERROR if any(one.of_jobs for one in drifts) else Gravity.WARNING,
            f"not what a recount says: {_drift_words(drifts)}",
            "`lbr doctor --fix` mends them, beside running workers",
        )
    elif not mended:
        yield Finding("counters", Gravity.OK, "what a recount says")


def _drift_words(drifts: Sequence[Drift]) -> str:
    shown = [f"run {one.run}: {one.counter} {one.kept}, counted {one.counted}" for one in drifts[:10]]
    more = len(drifts) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _limits(view: Overview) -> Iterator[Finding]:
    for cooldown in view.cooldowns:
        left = cooldown.until - view.now
        words = f"nobody calls {cooldown.answerer} for another {duration(left / 1000)}: {cooldown.reason}"
        yield Finding("cooldown", Gravity.NOTE, words, "nothing: it passes")
    for seen in view.limits:
        fields = limit_fields(seen)
        learned = seen.limit.concurrency is None and seen.limit.slots is not None
        if learned and fields["at_a_time"] < min(LEAST_SLOTS, seen.ceiling) and _live_workers(view):
            yield Finding(
                "limit",
                Gravity.NOTE,
                describe_limit(fields),
                f"the provider refuses more; `lbr limit {seen.answerer} --concurrency N` if you know better",
            )
        else:
            yield Finding("limit", Gravity.OK, describe_limit(fields))


def _runs(view: Overview) -> Iterator[Finding]:
    found = [finding for one in view.runs for finding in _run(one, view.now)]
    yield from found or [Finding("runs", Gravity.OK, "none is paused, or waits for the rest of its inputs")]


def _run(one: RunCounts, now: int) -> Iterator[Finding]:
    run = one.run
    if run.state is RunState.CANCELLED:
        return
    if run.sealed_at is None and not run.is_paused_by(PauseCause.MOVING_FROM):
        yield _unsealed(run, now)
    if run.state is RunState.PAUSED:
        yield _paused(run, one.open)


def _unsealed(run: Run, now: int) -> Finding:
    words = f"run {run.name}: its enqueue has not come to its end"
    since = now - run.enqueued_at
    if since < LIVE_ENQUEUE_MS:
        return Finding(
            "runs", Gravity.NOTE, f"{words}; its latest inputs came {duration(max(0, since) / 1000)} ago"
        )
    way = "run the same enqueue again: it adds what is missing; look first where it was one with --append"
    return Finding("runs", Gravity.WARNING, f"{words}; nothing has come for {duration(since / 1000)}", way)


def _paused(run: Run, left: int) -> Finding:
    reason = run.pause.message if run.pause is not None else "no reason is kept"
    words = f"run {run.name}: paused with {pluralize(left, 'job')} to do: {reason}"
    if run.is_paused_by(PauseCause.MOVED_TO):
        words = f"run {run.name}: {reason}, where it goes on; this is a copy that rests"
        return Finding("runs", Gravity.OK, words)
    if not left and not run.is_paused_by(PauseCause.MOVING_TO, PauseCause.MOVING_FROM):
        return Finding("runs", Gravity.OK, words)
    gravity = Gravity.NOTE if run.is_paused_by(PauseCause.USER) else Gravity.WARNING
    cause = PauseCause.USER if run.pause is None else run.pause.cause
    return Finding("runs", gravity, words, way_on(run.name, cause))
