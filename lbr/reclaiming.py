"""What dead workers left behind: answers that they kept in files, and jobs that they held."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lbr.jobs import JobState
from lbr.spool import settle_kept
from lbr.store.queue import RECLAIM_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from lbr.store.database import Database
    from lbr.store.queue import Queue, Reclaimed


class Reclaiming:
    """Takes back what the dead left, again and again; `notify` is told about each worker, of each trouble once."""

    def __init__(self, database: Database, queue: Queue, notify: Callable[[str], None]) -> None:
        self._database = database
        self._queue = queue
        self._notify = notify
        self._told: set[str] = set()

    async def take_back(self) -> int:
        """Settle what was kept, which is paid for, then reclaim the jobs of the dead; return how many these were.

        Safe to repeat, and for many at once.
        """
        # First who is dead: what one has kept was written before. Where its answers are not settled yet, its leases
        # decide, for a job that is claimed again is called again.
        dead = await self._queue.dead()
        if not await settle_kept(self._database, self._notify_once):
            dead = []
        taken: list[Reclaimed] = []
        while page := await self._queue.reclaim(dead):
            taken += page
            if len(page) < RECLAIM_PAGE:
                break
        for (worker, died), count in sorted(Counter((one.worker_id, one.died) for one in taken).items()):
            why = "which died" if died else "whose lease ran out"
            self._notify(f"reclaimed {count} jobs of worker {worker}, {why}")
        for one in taken:
            if one.state is JobState.FAILED:
                self._notify(f"job {one.job_id} failed: its worker died 3 times")
        return len(taken)

    def _notify_once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._notify(words)
