"""Group commit: gathering, order, bounds and failure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from lbr.errors import DatabaseError
from lbr.jobs import Claim, JobId, Prompt, RunId
from lbr.settler import Settler, linger_seconds
from lbr.store.settle import Settled
from tests.support import answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.jobs import Settlement


def settlement(number: int) -> Settlement:
    """Return the settlement of some answered job."""
    return answered(Claim(JobId(number), RunId(1), 1, 0, 0, Prompt(text="p"), b"k"))


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


async def test_everything_is_written_once_in_order() -> None:
    """Closing writes all that was put, in batches of at most 500, each row once."""
    disk = Disk()
    settler = Settler(disk.write, disk.written)
    running = asyncio.create_task(settler.run())
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


@pytest.mark.parametrize(("commit", "linger"), [(0.0, 0.002), (0.004, 0.008), (3.0, 0.05)])
def test_linger_follows_the_commit(commit: float, linger: float) -> None:
    """Gathering lasts twice a commit, from 2 to 50 ms."""
    assert linger_seconds(commit) == linger
