"""How long a call may take: one timer for all calls of a worker, where `asyncio.timeout` would set one for each.

And what to make of calls that took too long.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")


class Deadlines:
    """Ends awaits that take longer than `seconds`. All have the same time, so they are due in the order they began."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: dict[asyncio.Task[object], float] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Await `work` in the task of the caller, of which each has one such await at a time.

        Raises DeadlineError when it has been cancelled for taking too long; a cancellation from elsewhere
        passes through, as does whatever the work makes of its own.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected to be awaited in a task, got: none")
        loop = task.get_loop()
        self._due[task] = loop.time() + self.seconds
        if self._timer is None:
            self._arm(loop)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._late and task.cancelling() <= 1:
                raise DeadlineError from None
            raise
        finally:
            if task in self._late:
                self._late.discard(task)
                task.uncancel()
            else:
                del self._due[task]

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        first = next(iter(self._due.values()), None)
        self._timer = None if first is None else loop.call_at(first, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task in [task for task, due in self._due.items() if due <= now]:
            del self._due[task]
            self._late.add(task)
            task.cancel()
        self._arm(loop)


class DeadlineError(Exception):
    """The time was over."""


class Lateness:
    """Whether an answerer is late so often that it must have too much to do.

    One late call may just have asked for a long answer, and is no reason to make fewer at a time. `share` is a moving
    average of the calls that were late, in which each call weighs an eighth.
    """

    WEIGHT = 1 / 8
    TOO_OFTEN = 1 / 4

    def __init__(self) -> None:
        self.share = 0.0

    def note(self, *, late: bool) -> bool:
        """Take note of a call; return whether it says that the answerer has too much to do."""
        self.share += self.WEIGHT * ((1.0 if late else 0.0) - self.share)
        return late and self.share > self.TOO_OFTEN
