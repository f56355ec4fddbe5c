"""Group commit: ended calls gather for a moment and are written in one transaction."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lbr.jobs import Settlement
    from lbr.store.settle import Settled

MAX_ROWS = 500
LEAST_ROWS = 25
LATEST_COMMITS = 4
MAX_LINGER_SECONDS = 0.05
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


def linger_seconds(usual: Commit) -> float:
    """Return how long to gather rows, given how commits have been of late.

    Three times as long as they were hindered, up to 50 ms: so all who write get their turns, and each makes the most of
    its own. Where nothing hinders, what ends during one commit is enough for the next.
    """
    return min(MAX_LINGER_SECONDS, 3 * usual.hindered_seconds)


def most_rows(usual: Commit, call_seconds: float) -> int:
    """Return how many rows to write at once, given how commits have been of late and how long a call takes.

    Calls that begin together end together, and go on in step: all are made, and then all are written. Where a call
    takes longer than a commit, small batches have some written while others are made. What hinders a commit is worth
    as many rows more as take the same time.
    """
    if call_seconds <= usual.seconds:
        return MAX_ROWS
    return min(MAX_ROWS, LEAST_ROWS + round(usual.hindered_seconds / ROW_SECONDS))


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
        if len(self._waiting) >= MAX_ROWS:
            self._enough.set()

    def hurry(self) -> None:
        """Write now: nothing more is to come that would be worth a wait."""
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
            usual = usual_of(self._commits)
            await self._gather(linger_seconds(usual))
            # The quickest call tells: another one may have waited for the processor.
            quickest = min(settlement.outcome.latency_ms for settlement in self._waiting)
            most = most_rows(usual, quickest / 1000)
            batch, self._waiting = self._waiting[:most], self._waiting[most:]
            self._reset_signals()
            started = time.perf_counter()
            try:
                settled = await self._write(batch)
            except BaseException:
                self._waiting = [*batch, *self._waiting]
                raise
            self._commits.append(Commit(time.perf_counter() - started, len(batch)))
            self._written(batch, settled)

    async def _gather(self, linger: float) -> None:
        """Wait for more rows, at least for those whose calls end in the same turn of the event loop."""
        if self._enough.is_set():
            return
        if not linger:
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(linger):
                await self._enough.wait()

    def _reset_signals(self) -> None:
        if self._closing:
            return
        if len(self._waiting) < MAX_ROWS:
            self._enough.clear()
        if not self._waiting:
            self._some.clear()
