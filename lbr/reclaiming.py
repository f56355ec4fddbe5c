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


async def take_back(database: Database, queue: Queue, notify: Callable[[str], None]) -> int:
    """Settle what was kept, which is paid for, then reclaim the jobs of the dead; return how many these were.

    `notify` is told about each worker. Safe to repeat, and for many at once.
    """
    await settle_kept(database, notify)
    taken: list[Reclaimed] = []
    while page := await queue.reclaim():
        taken += page
        if len(page) < RECLAIM_PAGE:
            break
    for (worker, died), count in sorted(Counter((one.worker_id, one.died) for one in taken).items()):
        why = "which died" if died else "whose lease ran out"
        notify(f"reclaimed {count} jobs of worker {worker}, {why}")
    for one in taken:
        if one.state is JobState.FAILED:
            notify(f"job {one.job_id} failed: its worker died 3 times")
    return len(taken)
