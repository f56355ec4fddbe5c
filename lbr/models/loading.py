"""What is loaded beside the calls, because it takes long: once, and again after a while where that failed."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

RETRY_SECONDS = 5.0


class Loading(Generic[T]):
    """Something that `load` makes in a thread when it is first wanted.

    Where that fails, for want of descriptors or memory say, it is not made for each call anew, nor never again: for
    `AGAIN_SECONDS` by `clock` the failure stands, and whoever wants it after that lets it be made once more.
    """

    def __init__(self, load: Callable[[], T], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._failed_at: float | None = None

    def begin(self) -> asyncio.Task[T]:
        """Start to load, where that was not done or is due once more; return what is loading or was loaded."""
        due = self._failed_at is not None and self._clock() >= self._failed_at + RETRY_SECONDS
        if self._task is None or due:
            self._failed_at = None
            self._task = asyncio.create_task(asyncio.to_thread(self._load))
            self._task.add_done_callback(self._ended)
        return self._task

    def _ended(self, task: asyncio.Task[T]) -> None:
        # To ask for the error is also what keeps asyncio from telling of one that nobody waited for.
        if task.cancelled() or task.exception() is not None:
            self._failed_at = self._clock()

    async def get(self) -> T:
        """Wait until it is there. Raises what `load` raised the last time."""
        return await asyncio.shield(self.begin())  # one caller may give up; the others wait for the same

    async def settled(self, seconds: float) -> None:
        """Wait until it is there or failed, for so many seconds at most; raises neither."""
        await asyncio.wait([self.begin()], timeout=seconds)

    async def made(self) -> T | None:
        """Return what there is, or will be when the load that goes on has ended; None where that is nothing."""
        if self._task is None:
            return None
        await asyncio.wait([self._task])
        return None if self._task.cancelled() or self._task.exception() is not None else self._task.result()
