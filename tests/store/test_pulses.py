"""Pulses in the database: rates of single runs, what workers write, and hours made of old minutes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, update

import lbr
from lbr.api import status
from lbr.api.view import Watch
from lbr.core.errors import Family
from lbr.core.pulses import Pulse
from lbr.core.types import Failure, JobId, Millis, RunId, WorkerId
from lbr.store import counters, pulses, reads, runs, schema
from lbr.store.database import opened
from lbr.store.settle import settle
from tests.support import ECHO, Clock, Queue, answered, failed, put

if TYPE_CHECKING:
    from lbr.api.status import RunStatus
    from lbr.core.types import Run
    from lbr.store.database import Database

TRANSIENT = Failure(Family.TRANSIENT, "ServerError", "500")


def pulse(run: Run, clock: Clock, done: int, *, ago: float = 0, since: float = 3_600, **counts: Any) -> Pulse:
    """Return a pulse of some minutes `ago`, of a worker that began with the run `since` seconds."""
    minute = clock.now // 60_000 - round(ago)
    began, until = Millis(clock.now - round(since * 1000)), Millis(min(clock.now, minute * 60_000 + 59_999))
    return Pulse(run.id, minute, began, until, done=done, **counts)


async def looked(database: Database) -> dict[str, RunStatus]:
    """Return the status of every run by name."""
    return {one.run: one for one in status.status_of(await database.read(reads.overview)).runs}


async def test_rates_are_those_of_living_workers(database: Database, clock: Clock) -> None:
    """A run has the sum of the rates of its workers, each from when it began; the ended and the silent do not count."""
    run, other = await put(database, ["a", "b", "c"]), await put(database, ["a"], name="other", reuse=False)
    queue = Queue(database)
    one, two, silent, gone = [await queue.register(host="h", pid=pid, concurrency=4) for pid in range(4)]
    clock.now = clock.now // 60_000 * 60_000 + 30_000
    await database.write(pulses.write, silent, [pulse(run, clock, 500)])
    await database.write(pulses.write, gone, [pulse(run, clock, 500)])
    await queue.unregister(gone)
    clock.forward(20)
    for worker, taken in (
        (one, [pulse(run, clock, 120, ago=1), pulse(run, clock, 75, failed=25), pulse(run, clock, 9_000, ago=2)]),
        (two, [pulse(run, clock, 50, since=10)]),
    ):
        await database.write(pulses.write, worker, taken)
        await queue.renew(worker, [], lease=60, settled=0, rate=0.0)
    found = await database.read(pulses.rates, [run.id, other.id])
    assert found == {run.id: pytest.approx((120 + 75 + 25) / 110 + 50 / 10)}
    seen = await looked(database)
    rate = found[run.id]
    assert (seen["r"].rate, seen["r"].per_minute, seen["r"].eta_seconds) == (rate, 60 * rate, 3 / rate)
    assert (seen["other"].rate, seen["other"].per_minute, seen["other"].eta_seconds) == (None, None, None)
    assert f"{rate:.1f} jobs/s" in status.describe(status.status_of(await database.read(reads.overview)))


async def test_only_a_run_at_work_has_an_end_in_sight(database: Database, clock: Clock) -> None:
    """A paused or cancelled run has no rate, one whose model is waited for has none, and a slow one looks further back."""
    names = ("working", "unserved", "slow", "paused", "cancelled")
    runs_of = {name: await put(database, ["a", "b", "c"], name=name, reuse=False) for name in names}
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=4)
    clock.now = clock.now // 60_000 * 60_000
    taken = [pulse(run, clock, 120, ago=1) for name, run in runs_of.items() if name not in {"unserved", "slow"}]
    await database.write(pulses.write, worker, [*taken, pulse(runs_of["slow"], clock, 6, ago=9)])
    await queue.renew(worker, [], lease=60, settled=10, rate=500.0)
    await database.write(runs.pause, runs_of["paused"], "no credit")
    await runs.cancel(database, runs_of["cancelled"])
    found = await looked(database)
    nothing = dict.fromkeys(names, (None, None))
    rates = {"working": (2.0, 1.5), "slow": (6 / 540, 3 / (6 / 540))}
    assert {name: (one.rate, one.eta_seconds) for name, one in found.items()} == nothing | rates
    views = Watch().views(status.status_of(await database.read(reads.overview)))
    assert [one.rest for one in views] == ["2 s left", "", "4 min 30 s left", "", ""]
    assert "0.7 jobs/min, 1 h 00 min elapsed, 4 min 30 s left" in status.describe(
        status.status_of(await database.read(reads.overview, "slow"))
    )
    none = dict.fromkeys(("probe_at", "wait_ms", "waited_ms", "patience_ms", "done"), 0)
    away = schema.outages.insert().values(answerer=ECHO.answerer, since=1, reason="refused", **none)
    await database.write(lambda c, _: c.execute(away))
    assert {(one.rate, one.eta_seconds) for one in (await looked(database)).values()} == {(None, None)}


async def test_two_active_runs_with_a_worker_on_one(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that one has an ETA, from the first report on, and its time stands when the worker has ended."""
    monkeypatch.setattr("lbr.worker.worker.TICK_SECONDS", 0.05)
    for name in ("served", "other"):
        await lbr.enqueue(
            [f"p{n}" for n in range(400)], run=name, model="offline:echo", settings={"latency": 0.05}, db_url=db_url
        )
    working = asyncio.create_task(lbr.work(run="served", concurrency=4, db_url=db_url))
    seen: dict[str, RunStatus] = {}
    while not seen or seen["served"].eta_seconds is None:
        assert not working.done(), working
        seen = {one.run: one for one in (await lbr.status(db_url=db_url)).runs}
    assert (seen["other"].rate, seen["other"].eta_seconds, seen["other"].elapsed_seconds) == (None, None, None)
    served = seen["served"]
    assert served.per_minute is not None
    assert served.elapsed_seconds is not None
    assert 0 < served.per_minute <= 60 * served.done / 0.05
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    first, second = [(await lbr.status("served", db_url=db_url)).runs[0] for _ in range(2)]
    assert (first.rate, first.eta_seconds) == (None, None)
    assert first.elapsed_seconds == second.elapsed_seconds
    assert (first.elapsed_seconds or 0) > served.elapsed_seconds / 2


async def test_an_ended_worker_has_written_all(db_url: str) -> None:
    """Its pulses add up to the counters of each run: jobs, tokens and cost; there is a row for a run and minute."""
    flaky = {"failure_rate": 0.3, "seed": 3}
    for name, settings in (("one", None), ("two", flaky)):
        price, prompts = "in=1,out=2", [f"p{n}" for n in range(50)]
        await lbr.enqueue(
            prompts, run=name, model="offline:echo", settings=settings, price=price, max_attempts=1, db_url=db_url
        )
    report = await lbr.work(db_url=db_url)
    async with opened(db_url) as database:
        rows = await database.read(lambda c, _: c.execute(select(schema.pulses)).all())
        found = await database.read(lambda c, _: counters.of_runs(c, [RunId(1), RunId(2)]))
        for run_id, counts in found.items():
            series = await database.read(pulses.series, run_id, Millis(0))
            for name in ("done", "failed", "input_tokens", "output_tokens", "cost_nanos"):
                assert sum(getattr(one, name) for one in series) == counts[name]
            assert sum(sum(one.histogram) for one in series) == 50
    assert report.failed > 0
    assert len({(row.run_id, row.minute) for row in rows}) == len(rows)


async def test_pulses_are_written_as_they_stand(database: Database, clock: Clock) -> None:
    """To write one again, later or twice, leaves the last; workers have their own rows, and a series is their sum."""
    run = await put(database, ["a"])
    for worker, done in ((1, 3), (1, 3), (1, 5), (2, 4)):
        await database.write(
            pulses.write, WorkerId(worker), [pulse(run, clock, done, slots=done, slowest_job=JobId(7))]
        )
    (whole,) = await database.read(pulses.series, run.id, Millis(clock.now))
    assert (whole.done, whole.slots, whole.minutes, whole.slowest_job) == (9, 9, 1, 7)
    await database.write(lambda c, _: c.execute(update(schema.pulses).values(histogram="[1]")))
    assert sum((await database.read(pulses.series, run.id, Millis(clock.now)))[0].histogram) == 0


async def test_old_minutes_become_hours(database: Database, clock: Clock) -> None:
    """What is older than two days is one row for each hour, with the same sums; what is of no run is removed."""
    clock.now = clock.now // 3_600_000 * 3_600_000
    run, other = await put(database, ["a"]), await put(database, ["a"], name="other", reuse=False)
    await database.write(lambda c, _: c.execute(schema.runs.delete().where(schema.runs.c.id == other.id)))
    bins = [number for number, _ in enumerate(pulse(run, clock, 0).histogram)]
    ages = [*range(5), *range(48 * 60 - 2, 48 * 60 + 62)]
    for worker in (1, 2):
        taken = [pulse(one, clock, 1, ago=age, histogram=bins) for age in ages for one in (run, other)]
        await database.write(pulses.write, WorkerId(worker), taken)
    before = await database.read(pulses.series, run.id, Millis(0))
    folded = 0
    while await database.write(pulses.fold):
        folded += 1
    assert folded == 4  # two hours of each run
    await database.write(pulses.write, WorkerId(1), [pulse(run, clock, 1, ago=48 * 60 + 1, histogram=bins)])  # late
    await Queue(database).register(host="h", pid=1, concurrency=1)
    after = await database.read(pulses.series, run.id, Millis(0))
    assert [(one.minutes, one.done) for one in after] == [(60, 2), (60, 121), *[(1, 2)] * 8]
    late = [sum(each) for each in zip(*(one.histogram for one in before), strict=True)]
    assert [sum(each) for each in zip(*(one.histogram for one in after), strict=True)] == [
        was + more for was, more in zip(late, bins, strict=True)
    ]
    count = select(func.count()).select_from(schema.pulses)
    left = await database.read(lambda c, _: c.scalar(count.where(schema.pulses.c.run_id == other.id)))
    assert left == 2 * 8


async def test_a_removed_run_takes_its_pulses_along(database: Database, clock: Clock) -> None:
    """Those of the others stay."""
    run, other = await put(database, ["a"]), await put(database, ["a"], name="other", reuse=False)
    await database.write(pulses.write, WorkerId(1), [pulse(run, clock, 1), pulse(other, clock, 2)])
    await runs.cancel(database, run)
    await runs.remove(database, run)
    rows = await database.read(lambda c, _: c.execute(select(schema.pulses)).all())
    assert [row.done for row in rows] == [2]


async def test_retrying_jobs_are_those_that_were_tried(database: Database, clock: Clock) -> None:
    """Not the fresh, the held, or those that the user put back; a rate limit and a dead worker count as tries."""
    run = await put(database, ["a", "b", "c", "d", "e"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=4)
    one, two, three, four = await queue.claim(worker, [run.id], 4, lease=60)
    limited = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=10.0)
    settlements = [failed(one, TRANSIENT), failed(two, limited), answered(three)]
    await database.write(settle, settlements)
    await queue.release(worker, [four])
    assert (await looked(database))["r"].retrying == 2
    clock.forward(100)
    assert "pending 4 (2 of them tried before)" in status.describe(
        status.status_of(await database.read(reads.overview))
    )
    held = await queue.claim(worker, [run.id], 4, lease=60)
    assert (await looked(database))["r"].retrying == 0
    clock.forward(61)
    await queue.reclaim()
    assert (await looked(database))["r"].retrying == len(held) == 4
