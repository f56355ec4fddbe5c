"""Pulses: what is counted, in which minute, and what a histogram shows."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from lbr.core.errors import Family, Usage
from lbr.core.pulses import BIN_EDGES, Pulse, Pulses, percentile
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import Claim, Failure, JobId, JobState, Millis, Outcome, Prompt, Reply, RunId, Settlement

START = Millis(1_800_000_000_000)  # a whole minute
MINUTE = START // 60_000


def ended(job: int, latency_ms: int = 5, family: Family | None = None, run: int = 1) -> Settlement:
    """Return the settlement of a call that was answered, or failed in this way."""
    claim = Claim(JobId(job), RunId(run), 1, 0, 0, Prompt("p"), b"k")
    usage = Usage(3, 2, 7)
    reply = Reply("answer", usage) if family is None else None
    failure = None if family is None else Failure(family, "Error", "no", usage=usage)
    return decide(claim, Outcome(reply, failure, latency_ms), RetryPolicy(), Random(1))


def note(kept: Pulses, settlement: Settlement, at: float) -> None:
    """Count an answered call at a time."""
    kept.begin(at)
    kept.note(settlement, JobState.DONE)


def test_each_call_is_counted_once_by_what_became_of_its_job() -> None:
    """Done, failed, put back, and put back by a rate limit, whose quick refusals are no latencies; tokens count always."""
    pulse = Pulse(RunId(1), MINUTE, START, START)
    for number, (latency, family) in enumerate(
        (
            (5, None),
            (40, None),
            (90_000, None),
            (30, Family.PERMANENT),
            (20, Family.TRANSIENT),
            (1, Family.RATE_LIMITED),
        )
    ):
        settlement = ended(number, latency, family)
        pulse.note(settlement, settlement.state)
    assert (pulse.done, pulse.failed, pulse.retried, pulse.limited) == (3, 1, 1, 1)
    assert (pulse.input_tokens, pulse.output_tokens, pulse.cost_nanos) == (18, 12, 42)
    assert (pulse.slowest_ms, pulse.slowest_job, sum(pulse.histogram)) == (90_000, 2, 5)
    pulse.note(ended(6, 5), JobState.PENDING)  # given back
    assert (pulse.done, pulse.retried) == (3, 2)


def test_a_percentile_is_within_its_bin() -> None:
    """It lies between the edges of the bin that holds it, and grows with the share; beyond the last edge it is that."""
    pulse = Pulse(RunId(1), MINUTE, START, START)
    assert percentile(pulse.histogram, 0.5) is None
    latencies = [0, *(20 * number for number in range(1, 200)), 5_000_000]
    for latency in latencies:
        pulse.note(ended(1, latency), JobState.DONE)
    found = [percentile(pulse.histogram, share / 100) or 0.0 for share in range(101)]
    assert found == sorted(found)
    for share in (1, 50, 95, 99):
        true = latencies[share * len(latencies) // 100]
        assert true / 1.7 <= found[share] <= true * 1.7
    assert found[100] == BIN_EDGES[-1]


def test_minutes_are_those_of_the_database() -> None:
    """A pulse ends with the minute of the database's clock; what has changed is taken once, as it is then."""
    kept = Pulses()
    kept.sync(START, at=100.0)
    note(kept, ended(1, 5), at=100.5)
    (first,) = kept.take([], at=101)
    note(kept, ended(2, 5), at=159.9)
    note(kept, ended(3, 5), at=160.1)
    note(kept, ended(4, 5, run=2), at=160.1)
    assert (first.minute, first.done) == (MINUTE, 1)
    taken = kept.take([], at=161)
    assert [(one.run_id, one.minute, one.done) for one in taken] == [
        (1, MINUTE, 2),
        (1, MINUTE + 1, 1),
        (2, MINUTE + 1, 1),
    ]
    assert {one.since for one in taken if one.run_id == 1} == {START + 495}
    assert kept.take([], at=170) == []
    kept.sync(Millis(START + 50_000), at=170.0)  # the clock was set back a little
    note(kept, ended(5, 5), at=170.5)
    assert [(one.minute, one.done) for one in kept.take([], at=171)] == [(MINUTE + 1, 2)]
    kept.sync(Millis(START - 3_600_000), at=180.0)  # and a lot
    note(kept, ended(6, 5), at=180.5)
    assert [(one.minute, one.done) for one in kept.take([], at=181)] == [(MINUTE - 60, 1)]


def test_a_worker_begins_with_a_run_when_its_first_call_begins() -> None:
    """The slowest of the first calls shows when; after ten minutes without any it begins again. Held jobs are counted."""
    kept = Pulses()
    kept.sync(START, at=0.0)
    claims = [ended(number).claim for number in range(3)]
    (held,) = kept.take(claims, at=5.0)
    assert (held.slots, held.since, held.done) == (3, START + 5_000, 0)
    note(kept, ended(1, 6_000), at=7.0)
    (held,) = kept.take(claims[:2], at=10.0)
    assert (held.slots, held.since, held.until, held.done) == (3, START + 1_000, START + 10_000, 1)
    (later,) = kept.take(claims[:1], at=10 * 60.0)
    assert (later.slots, later.since) == (1, START + 1_000)
    note(kept, ended(2, 1_000), at=25 * 60.0)
    (later,) = kept.take([], at=25 * 60.0)
    assert (later.since, later.until) == (START + 25 * 60_000 - 1_000, START + 25 * 60_000)


@pytest.mark.parametrize("order", [1, -1])
def test_pulses_add_up(order: int) -> None:
    """The order does not matter: counts and slots of one minute are added, and the slowest call stays."""
    one = Pulse(RunId(1), MINUTE, START, Millis(START + 5), slots=3)
    one.note(ended(1, 70), JobState.DONE)
    two = Pulse(RunId(1), MINUTE, Millis(START - 9), START, slots=2)
    two.note(ended(2, 80), JobState.FAILED)
    first, second = [replace(each, histogram=[*each.histogram]) for each in (one, two)[::order]]
    first.add(second)
    assert (first.done, first.failed, first.cost_nanos, first.slots, sum(first.histogram)) == (1, 1, 14, 5, 2)
    assert (first.since, first.until, first.slowest_ms, first.slowest_job) == (START - 9, START + 5, 80, 2)
    first.add(Pulse(RunId(1), MINUTE + 1, START, START, slots=4))
    assert first.slots == 5
