"""Group commit: gathering, order, bounds and failure."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lbr.core.errors import DatabaseError
from lbr.core.types import Claim, JobId, Prompt, RunId
from lbr.store.settle import Settled
from lbr.worker.turns import Commit, Settler, batch_size, linger_seconds, usual_commit
from tests.support import answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.core.types import Settlement


def settlement(number: int, latency_ms: int = 0) -> Settlement:
    """Return the settlement of some job, answered by a call that took so long."""
    done = answered(Claim(JobId(number), RunId(1), 1, 0, 0, Prompt(text="p"), b"k"))
    return replace(done, outcome=replace(done.outcome, latency_ms=latency_ms))


class Disk:
    """Stands where the store is: takes batches, and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.told: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def write(self, batch: Sequence[Settlement]) -> Settled:
        """Take a batch."""
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.batches.append([s.claim.job_id for s in batch])
        return Settled(frozenset(s.claim.job_id for s in batch), frozenset(), {})

    def written(self, batch: Sequence[Settlement], settled: Settled) -> None:
        """Hear what became durable."""
        self.told += [s.claim.job_id for s in batch if s.claim.job_id in settled.taken]


def begun() -> tuple[Disk, Settler, asyncio.Task[None]]:
    """Return a settler that runs, with where it writes."""
    disk = Disk()
    settler = Settler(disk.write, disk.written)
    return disk, settler, asyncio.create_task(settler.run())


async def test_everything_is_written_once_in_order() -> None:
    """Closing writes all that was put, in batches of at most 500, each row once."""
    disk, settler, running = begun()
    for number in range(1_100):
        settler.put(settlement(number))
    settler.close()
    await running
    assert [len(batch) for batch in disk.batches] == [500, 500, 100]
    assert disk.told == list(range(1_100))


async def test_what_comes_during_a_commit_goes_into_the_next() -> None:
    """While one commit is under way the next batch gathers."""
    disk = Disk()
    disk.open.clear()
    settler = Settler(disk.write, disk.written)
    running = asyncio.create_task(settler.run())
    settler.put(settlement(0))
    settler.hurry()
    await asyncio.sleep(0.01)
    for number in range(1, 40):
        settler.put(settlement(number))
    disk.open.set()
    settler.close()
    await running
    assert disk.batches == [[0], list(range(1, 40))]


async def test_failed_commit_is_raised_and_nothing_is_called_written() -> None:
    """A settlement that could not be written is never reported as durable."""
    disk = Disk()
    disk.error = DatabaseError("disk full")
    settler = Settler(disk.write, disk.written)
    settler.put(settlement(1))
    with pytest.raises(DatabaseError, match="disk full"):
        await settler.run()
    assert disk.told == []


async def test_calls_do_not_go_on_in_step() -> None:
    """Where calls take longer than a commit, those that end together are written in parts; else all at once."""
    sizes = {}
    for latency in (0, 60_000):
        disk, settler, running = begun()
        for number in range(120):
            settler.put(settlement(number, latency))
        settler.close()
        await running
        sizes[latency] = [len(batch) for batch in disk.batches]
        assert disk.told == list(range(120))
    assert sizes == {0: [120], 60_000: [25, 25, 25, 25, 20]}


async def test_one_call_that_was_slow_makes_no_parts() -> None:
    """A call that only waited for the processor does not tell how long calls take."""
    disk, settler, running = begun()
    for number in range(120):
        settler.put(settlement(number, 0 if number else 60_000))
    settler.close()
    await running
    assert [len(batch) for batch in disk.batches] == [120]


async def turns(count: int) -> None:
    """Let the event loop go round so often, which takes no time."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_calls_that_end_one_by_one_are_committed_together() -> None:
    """Where calls are long, a row waits for others, until there are as many as are worth a commit."""
    disk, settler, running = begun()
    for number in range(30):
        settler.put(settlement(number, 60_000))
        await turns(3)
    settler.close()
    await running
    assert disk.batches == [list(range(25)), list(range(25, 30))]


async def test_who_hurries_waits_for_no_part() -> None:
    """When no call goes on, all that waits is written, however many parts it makes."""
    disk, settler, running = begun()
    for number in range(60):
        settler.put(settlement(number, 60_000))
    settler.hurry()
    await turns(30)
    assert [len(batch) for batch in disk.batches] == [25, 25, 10]
    # And the next is waited for again.
    settler.put(settlement(60, 60_000))
    await turns(30)
    assert disk.told == list(range(60))
    settler.close()
    await running
    assert disk.told == list(range(61))


@pytest.mark.parametrize(
    ("seconds", "usual"),
    [
        ([0.002], 0.002),
        ([0.002, 0.002, 0.06, 0.002], 0.002),
        ([0.06, 0.005, 0.04, 0.002], 0.04),
        ([0.06, 0.002], 0.06),
    ],
)
def test_every_other_commit_tells_and_a_single_one_does_not(seconds: list[float], usual: float) -> None:
    """One commit that was hindered is no reason to gather; half of them are."""
    assert usual_commit([Commit(one, 1) for one in seconds]) == Commit(usual, 1)


@pytest.mark.parametrize(
    ("commit", "call", "linger"),
    [
        (Commit(0.0, 0), 0.0, 0.0),
        (Commit(0.003, 0), 0.0, 0.0),
        (Commit(0.0155, 500), 0.0, 0.0),
        (Commit(0.013, 0), 0.0, 0.03),
        (Commit(3.0, 1), 0.0, 0.05),
        (Commit(0.003, 0), 0.09, 0.0),
        (Commit(0.003, 0), 1.0, 0.02),
        (Commit(0.013, 0), 1.0, 0.03),
        (Commit(0.003, 0), 60.0, 0.05),
    ],
)
def test_linger_follows_what_hinders_commits_and_how_long_calls_are(commit: Commit, call: float, linger: float) -> None:
    """Gathering lasts three times as long as a commit was hindered or a fiftieth of a call; rows are no hindrance."""
    assert linger_seconds(commit, call) == pytest.approx(linger)


@pytest.mark.parametrize(
    ("commit", "call", "rows"),
    [
        (Commit(0.002, 10), 0.001, 500),
        (Commit(0.002, 10), 0.05, 25),
        (Commit(0.008, 0), 0.05, 225),
        (Commit(0.5, 0), 10.0, 500),
    ],
)
def test_batches_are_small_where_calls_take_longer(commit: Commit, call: float, rows: int) -> None:
    """A slow commit is worth more rows, and calls that take no time have all of them."""
    assert batch_size(commit, call) == rows
