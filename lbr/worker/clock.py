"""Whether this worker's clock agrees with those of others on the same file: leases need one clock."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from lbr.store import leases
from lbr.store.database import local_clock
from lbr.store.leases import MAX_SKEW_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lbr.core.types import Millis, WorkerId
    from lbr.store.database import Database

POLL_SECONDS = 0.1
CLOCK_SECONDS = 10.0
"""How long to wait for the next report of a living worker whose latest one is far from our time: two of its reports."""


class ClockCheck:
    """Compares clocks; `stopping` ends a wait."""

    def __init__(self, database: Database, notify: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        self._database = database
        self._notify = notify
        self._stopping = stopping
        # How far our clock was ahead of the machine's monotonic one, and reports that were far from it.
        self._lead = _lead_ms()
        self._far_off: Mapping[WorkerId, Millis] = {}
        self._comparing = asyncio.Lock()

    @property
    def has_jumped(self) -> bool:
        """Whether our clock was set since the last check."""
        return abs(_lead_ms() - self._lead) > MAX_SKEW_MS

    async def check(self, ours: WorkerId, *, starting: bool = False) -> None:
        """Raise DatabaseError if another worker of the file uses a clock that is far from ours.

        An old report does not count: its worker may stand still, or the machine's clock was set. A new one does, so at
        the start and after our clock has jumped this waits for one.
        """
        if not self._database.one_writer:  # a server has one clock for all
            self._lead = _lead_ms()
            return
        async with self._comparing:
            lead, jumped, deadline = _lead_ms(), self.has_jumped, 0.0
            if jumped:
                self._far_off = {}
            while True:
                now, reports = await self._database.quick_read(leases.far_reports, self._database.presence, ours)
                for worker, seen_at in reports.items():
                    if self._far_off.get(worker, seen_at) != seen_at:
                        raise leases.clock_error(now, worker, seen_at, self._database.name)
                waits = (starting or jumped) and self._database.presence.knows and not deadline
                if waits and reports.keys() - self._far_off.keys():
                    deadline = time.monotonic() + CLOCK_SECONDS
                    others = ", ".join(map(str, reports))
                    self._notify(
                        f"comparing clocks with worker {others}, which has not reported lately; this may take "
                        f"{CLOCK_SECONDS:.0f} s"
                    )
                self._far_off = reports
                if not reports or time.monotonic() >= deadline or self._stopping():
                    break
                await asyncio.sleep(POLL_SECONDS)
            self._lead = lead


def _lead_ms() -> float:
    return local_clock() - time.monotonic() * 1000
