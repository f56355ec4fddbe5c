"""What dead workers left behind: answers that they kept in files, and jobs that they held."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from lbr.core.plurals import pluralize
from lbr.core.types import JobState
from lbr.store.queue import RECLAIM_PAGE
from lbr.worker.spool import settle_kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from lbr.core.types import WorkerId
    from lbr.store.database import Database
    from lbr.store.queue import Queue, Reclaimed

AGAIN_SECONDS = 4.0


class Reclaiming:
    """Takes back what the dead left, again and again; `notify` is told about each worker, of each trouble once."""

    def __init__(self, database: Database, queue: Queue, notify: Callable[[str], None]) -> None:
        self._database = database
        self._queue = queue
        self._notify = notify
        self._told: set[str] = set()
        self._held_back: list[WorkerId] = []
        self._looked = 0.0

    async def take_back(self) -> tuple[int, int]:
        """Settle what was kept, which is paid for, then reclaim the jobs of the dead.

        Return how many these were, and how many of them failed, because it was their third crash.

        Safe to repeat, and for many at once.
        """
        # First who is dead: what one has kept was written before. Where its answers are not settled yet, its leases
        # decide, for a job that is claimed again is called again.
        ended = await self._queue.dead()
        waiting = await settle_kept(self._database, self._notify_once)
        dead = [worker for worker, pid in ended.items() if pid not in waiting]
        self._held_back, self._looked = [worker for worker in ended if worker not in dead], time.monotonic()
        taken: list[Reclaimed] = []
        while page := await self._queue.reclaim(dead):
            taken += page
            if len(page) < RECLAIM_PAGE:
                break
        for (worker, died), count in sorted(Counter((one.worker_id, one.died) for one in taken).items()):
            why = "which died" if died else "whose lease ran out"
            self._notify(f"reclaimed {pluralize(count, 'job')} of worker {worker}, {why}")
        failed = [one for one in taken if one.state is JobState.FAILED]
        for one in failed:
            self._notify(f"job {one.job_id} failed: its worker died 3 times")
        return len(taken), len(failed)

    def spared(self) -> list[WorkerId]:
        """Return the dead whose answers were not taken a moment ago, so that it is no use to look at once again."""
        return self._held_back if time.monotonic() < self._looked + AGAIN_SECONDS else []

    def _notify_once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._notify(words)
