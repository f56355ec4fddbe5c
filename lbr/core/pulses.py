"""Pulses: what one worker did for one run in one minute, counted in memory and written every few seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lbr.core.errors import NO_USAGE, Family
from lbr.core.types import JobState, Millis

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lbr.core.types import Claim, JobId, RunId, Settlement

MINUTE_MS = 60_000
BIN_EDGES = tuple(round(10 * 1.7**power) for power in range(23))
"""The milliseconds between the bins of latencies: from 10 ms to 20 minutes, each 1.7 times the one before."""
BINS = len(BIN_EDGES) + 1
MAX_GAP_MINUTES = 10
"""A worker that does nothing for a run for longer begins again with it; see `Pulse.since`."""
COUNTS = ("done", "failed", "retried", "limited", "input_tokens", "output_tokens", "cost_nanos")


@dataclass(slots=True)
class Pulse:
    """What a worker did for a run in a minute of the database's clock, or in as many `minutes` from that one on.

    `since` is when the worker began with the run, in this minute or before, `until` when it last did something for it.
    `limited` counts the jobs put back because of a rate limit, `retried` the others put back. `histogram` counts calls
    by latency (see `BIN_EDGES`), without those that a rate limit refused. `slots` is the most jobs held at a time.
    """

    run_id: RunId
    minute: int
    since: Millis
    until: Millis
    done: int = 0
    failed: int = 0
    retried: int = 0
    limited: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nanos: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    slowest_ms: int = 0
    slowest_job: JobId | None = None
    slots: int = 0
    minutes: int = 1

    def note(self, settlement: Settlement, state: JobState) -> None:
        """Count a call that ended with its job in this state."""
        outcome = settlement.outcome
        usage, latency, failure = outcome.usage, outcome.latency_ms, outcome.failure
        limited = failure is not None and failure.family is Family.RATE_LIMITED
        if state is JobState.DONE:
            self.done += 1
        elif state is JobState.FAILED:
            self.failed += 1
        elif limited:
            self.limited += 1
        else:
            self.retried += 1
        if usage is not NO_USAGE:
            self.input_tokens += usage.input_tokens or 0
            self.output_tokens += usage.output_tokens or 0
            self.cost_nanos += usage.cost_nanos or 0
        if not limited:
            self.histogram[bisect_right(BIN_EDGES, latency)] += 1
            if latency >= self.slowest_ms:
                self.slowest_ms, self.slowest_job = latency, settlement.claim.job_id

    def add(self, other: Pulse) -> None:
        """Add what other workers did in the same minute, or what was done in other minutes of the same hour."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.since, self.until = min(self.since, other.since), max(self.until, other.until)
        self.histogram = [sum(both) for both in zip(self.histogram, other.histogram, strict=True)]
        if other.slowest_ms >= self.slowest_ms and other.slowest_job is not None:
            self.slowest_ms, self.slowest_job = other.slowest_ms, other.slowest_job
        same = self.minute == other.minute
        self.slots = self.slots + other.slots if same else max(self.slots, other.slots)


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Return about how many milliseconds this share of the calls took at most; None without a call."""
    left = share * sum(histogram)
    for place, count in enumerate(histogram):
        if count and left <= count:
            low, high = (1, *BIN_EDGES)[place], (*BIN_EDGES, BIN_EDGES[-1])[place]
            return float(low * (high / low) ** (left / count))
        left -= count
    return None


class Pulses:
    """The pulses of one worker, until they are written. `at` is always the time of `time.monotonic`.

    Minutes are those of the database's clock, which `sync` learns from each transaction that writes.
    """

    def __init__(self) -> None:
        self._latest: dict[RunId, Pulse] = {}
        self._changed: dict[RunId, Pulse] = {}
        self._closed: list[Pulse] = []
        self._lead_ms = 0.0
        self._now, self._minute = Millis(0), 0

    def sync(self, now: Millis, at: float) -> None:
        """Note that the database's clock shows `now`."""
        self._lead_ms = now - at * 1000

    def begin(self, at: float) -> None:
        """Note the time of what is counted from now on."""
        now = Millis(round(at * 1000 + self._lead_ms))
        minute = now // MINUTE_MS
        # The minute before is written, and would be replaced: it stays closed if the clock is set back a little.
        if minute > self._minute or minute < self._minute - 1:
            self._close()
            self._minute = minute
        self._now = now

    def note(self, settlement: Settlement, state: JobState) -> None:
        """Count a call that ended with its job in this state."""
        run_id = settlement.claim.run_id
        pulse = self._changed.get(run_id) or self._change(run_id, settlement.outcome.latency_ms)
        pulse.note(settlement, state)

    def take(self, claims: Iterable[Claim], at: float) -> list[Pulse]:
        """Return copies of the pulses that have changed since the last call, to be written; `claims` are held now."""
        self.begin(at)
        for run_id, held in Counter(claim.run_id for claim in claims).items():
            pulse = self._changed.get(run_id) or self._change(run_id)
            pulse.slots = max(pulse.slots, held)
        self._close()
        taken, self._closed = self._closed, []
        return [replace(one, histogram=[*one.histogram]) for one in taken]

    def _change(self, run_id: RunId, latency_ms: int = 0) -> Pulse:
        """Return the pulse of this minute for a call that took so long."""
        pulse, since = self._latest.get(run_id), Millis(self._now - latency_ms)
        if pulse is None or abs(self._minute - pulse.minute) > MAX_GAP_MINUTES:
            pulse = Pulse(run_id, self._minute, since, self._now)
        elif pulse.minute != self._minute:
            pulse = Pulse(run_id, self._minute, pulse.since, self._now)
        pulse.since = min(pulse.since, since)
        self._latest[run_id] = self._changed[run_id] = pulse
        return pulse

    def _close(self) -> None:
        for pulse in self._changed.values():
            pulse.until = self._now
        self._closed += self._changed.values()
        self._changed = {}
