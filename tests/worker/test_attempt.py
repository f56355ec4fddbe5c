"""The one timer of all calls: it ends what takes too long, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from lbr.worker.attempt import DeadlineError, Deadlines, LateCalls


async def test_each_gets_its_own_time() -> None:
    """Calls that began later end later, by the same timer."""
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(0.1)

    async def late(after: float) -> float:
        await asyncio.sleep(after)
        began = loop.time()
        with pytest.raises(DeadlineError):
            await deadlines.wait_for(asyncio.sleep(60))
        return loop.time() - began

    for took in await asyncio.gather(*(late(0.03 * n) for n in range(5))):
        assert 0.1 <= took < 1


async def test_what_ends_in_time_is_left_alone() -> None:
    """A result and an error pass through; a task may wait again; the timer ends with the last call."""
    deadlines = Deadlines(0.05)

    async def fail() -> None:
        raise ValueError("its own")

    assert await deadlines.wait_for(asyncio.sleep(0, "answer")) == "answer"
    with pytest.raises(ValueError, match="its own"):
        await deadlines.wait_for(fail())
    for _ in range(3):
        assert await deadlines.wait_for(asyncio.sleep(0.03, "again")) == "again"
    await asyncio.sleep(0.1)
    assert deadlines._timer is None


async def test_cancellation_from_elsewhere_is_no_deadline() -> None:
    """A cancelled task is cancelled, also when its time is over at the same moment."""
    deadlines = Deadlines(0.05)
    for after in (0.0, 0.05):
        task = asyncio.create_task(deadlines.wait_for(asyncio.sleep(60)))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(after, task.cancel)
        with pytest.raises((asyncio.CancelledError, DeadlineError)) as ended:
            await task
        assert after or ended.type is asyncio.CancelledError
    both = asyncio.create_task(deadlines.wait_for(asyncio.sleep(60)))
    await asyncio.sleep(0)
    deadlines._expire(Later())  # type: ignore[arg-type]
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


class Later:
    """A loop's clock on which every deadline has passed."""

    def time(self) -> float:
        """Return a time far ahead."""
        return asyncio.get_running_loop().time() + 1_000

    def call_at(self, when: float, *_: object) -> None:
        """Set no timer."""


async def test_an_answer_in_spite_of_the_deadline_counts() -> None:
    """Work that ends well although it was cancelled has ended well, and its task can go on waiting for others."""
    deadlines = Deadlines(0.02)

    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "all the same"
        return "never"

    assert await deadlines.wait_for(stubborn()) == "all the same"
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    with pytest.raises(DeadlineError):
        await deadlines.wait_for(asyncio.sleep(60))


def test_one_late_call_is_no_overload() -> None:
    """A late call now and then says nothing; as soon as many are late, each says that there are too many."""
    late_calls = LateCalls()
    now_and_then = [late_calls.note(late=n % 10 == 0) for n in range(1000)]
    assert not any(now_and_then)
    assert [late_calls.note(late=True) for _ in range(5)] == [False, True, True, True, True]
    assert not any(late_calls.note(late=False) for _ in range(50))
    assert not late_calls.note(late=True)
