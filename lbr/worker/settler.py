"""Group commit: ended calls gather for a moment and are written in one transaction."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lbr.core.types import Settlement
    from lbr.store.settle import Settled

MAX_ROWS = 500
MIN_ROWS = 25
LATEST_COMMITS = 4
MAX_LINGER_SECONDS = 0.05
MIN_LINGER_SECONDS = 0.002
"""The event loop rounds what it waits up to a millisecond."""
QUICK_SECONDS = 0.003
ROW_SECONDS = 0.000025
"""What a commit takes at most that nothing hinders, and what each of its rows takes, on a common machine."""


class Commit(NamedTuple):
    """How long one took, and how many rows it had."""

    seconds: float
    rows: int

    @property
    def hindered_seconds(self) -> float:
        """How much longer than its rows it took: on a slow disk, or for others who write."""
        return max(0.0, self.seconds - QUICK_SECONDS - self.rows * ROW_SECONDS)


def usual_of(latest: Sequence[Commit]) -> Commit:
    """Return the commit that tells what to expect of the next: the middle one by how much it was hindered.

    A single one says little: our own calls may have had the interpreter. But where they compute in threads, every
    other commit has to wait for them, with the database locked, and is better made for many rows.
    """
    return sorted(latest, key=lambda commit: commit.hindered_seconds)[len(latest) // 2]


def linger_seconds(usual: Commit, call_seconds: float) -> float:
    """Return how long to gather rows, given how commits have been of late and how long a call takes.

    Three times as long as they were hindered: so all who write get their turns, and each makes the most of its own.
    Where nothing hinders, a fiftieth of a call, which nobody misses: calls that end one by one would be a commit each.
    None at all for calls so quick that the event loop could not keep such an appointment. At most 50 ms.
    """
    unmissed = call_seconds / 50
    if unmissed < MIN_LINGER_SECONDS:
        unmissed = 0.0
    return min(MAX_LINGER_SECONDS, max(3 * usual.hindered_seconds, unmissed))


def most_rows(usual: Commit, call_seconds: float) -> int:
    """Return how many rows to write at once, given how commits have been of late and how long a call takes.

    Calls that begin together end together, and go on in step: all are made, and then all are written. Where a call
    takes longer than a commit, small batches have some written while others are made. What hinders a commit is worth
    as many rows more as take the same time.
    """
    if call_seconds <= usual.seconds:
        return MAX_ROWS
    return min(MAX_ROWS, MIN_ROWS + round(usual.hindered_seconds / ROW_SECONDS))


class Settler:
    """Takes settlements one by one and writes them in batches, in order, from one task."""

    def __init__(
        self,
        write: Callable[[Sequence[Settlement]], Awaitable[Settled]],
        written: Callable[[Sequence[Settlement], Settled], None],
    ) -> None:
        self._write = write
        self._written = written
        self._waiting: list[Settlement] = []
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._most = MAX_ROWS
        self._hurried = False
        self._closing = False
        self._commits = deque([Commit(0.0, 0)], maxlen=LATEST_COMMITS)

    @property
    def unwritten(self) -> list[Settlement]:
        """What was put and is not durable, once `run` has ended."""
        return self._waiting

    def put(self, settlement: Settlement) -> None:
        """Take one settlement; it is durable only when `written` names it."""
        self._waiting.append(settlement)
        self._some.set()
        if len(self._waiting) >= self._most:
            self._enough.set()

    def hurry(self) -> None:
        """Write all that was put, now: nothing more is to come that would be worth a wait."""
        self._hurried = bool(self._waiting)
        self._enough.set()

    def close(self) -> None:
        """Make `run` return once everything is written."""
        self._closing = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Write batches until closed. Raises DatabaseError, with nothing of the batch written, when that fails."""
        while True:
            await self._some.wait()
            if not self._waiting:
                return
            await self._gather(usual_of(self._commits))
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not self._waiting:
                self._hurried = False
                if not self._closing:
                    self._some.clear()
            started = time.perf_counter()
            try:
                settled = await self._write(batch)
            except BaseException:
                self._waiting = [*batch, *self._waiting]
                raise
            self._commits.append(Commit(time.perf_counter() - started, len(batch)))
            self._written(batch, settled)

    async def _gather(self, usual: Commit) -> None:
        """Wait for as many rows as are worth a commit, at least for those of the same turn of the event loop."""
        call_seconds = self._call_seconds()
        self._most = most_rows(usual, call_seconds)
        if self._closing or self._hurried or len(self._waiting) >= self._most:
            return
        linger = linger_seconds(usual, call_seconds)
        if linger:
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    await self._enough.wait()
        else:
            await asyncio.sleep(0)
        self._most = most_rows(usual, self._call_seconds())

    def _call_seconds(self) -> float:
        """Return how long a call takes: the quickest one tells, for another may have waited for the processor."""
        return min(settlement.outcome.latency_ms for settlement in self._waiting) / 1000
