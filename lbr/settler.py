"""Group commit: ended calls gather for a moment and are written in one transaction."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lbr.jobs import Settlement
    from lbr.store.settle import Settled

MAX_ROWS = 500
MAX_LINGER_SECONDS = 0.05
MIN_LINGER_SECONDS = 0.002


def linger_seconds(commit_seconds: float) -> float:
    """Return how long to gather, given how long the last commit took.

    Twice a commit, so that at most a third of the time is spent committing: short on a quiet disk, up to
    50 ms where commits are slow or contended.
    """
    return min(MAX_LINGER_SECONDS, max(MIN_LINGER_SECONDS, 2 * commit_seconds))


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
        self._linger = MIN_LINGER_SECONDS

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
            if not self._enough.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._linger):
                        await self._enough.wait()
            batch, self._waiting = self._waiting[:MAX_ROWS], self._waiting[MAX_ROWS:]
            self._reset_signals()
            started = time.perf_counter()
            try:
                settled = await self._write(batch)
            except BaseException:
                self._waiting = [*batch, *self._waiting]
                raise
            self._linger = linger_seconds(time.perf_counter() - started)
            self._written(batch, settled)

    def _reset_signals(self) -> None:
        if self._closing:
            return
        if len(self._waiting) < MAX_ROWS:
            self._enough.clear()
        if not self._waiting:
            self._some.clear()
