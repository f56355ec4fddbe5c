"""Whether a worker has nothing left to do, and what it then reports of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.core.errors import NothingToServeError
from lbr.core.text import pluralize
from lbr.core.types import JobState, PauseCause, RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lbr.core.types import Millis, Paused
    from lbr.store.reads import RunCounts
    from lbr.worker.runs import ServableRuns

ABANDONED_MS = 30_000
"""An unfinished enqueue that has added nothing for this long counts as interrupted."""


class Completion:
    """Judges whether the runs of one worker are done; with `named`, the user named them.

    Afterwards `interrupted` names the runs whose enqueue did not finish.
    """

    def __init__(self, runs: ServableRuns, *, named: bool, notify: Callable[[str], None]) -> None:
        self._runs = runs
        self._named = named
        self._notify = notify
        self._warned = False
        self.interrupted: list[str] = []

    def all_done(self, found: Sequence[RunCounts], now: Millis) -> bool:
        """Return whether no active run that this worker serves has an unfinished job or enqueue."""
        self.interrupted = []
        for one in found:
            if one.run.id not in self._runs.served or one.run.state is not RunState.ACTIVE:
                continue
            if one.open:
                self._report_waiting(one)
                return False
            if one.run.sealed_at is None:
                if now - one.run.enqueued_at < ABANDONED_MS:
                    return False
                self.interrupted.append(one.run.name)
        return True

    def _report_waiting(self, one: RunCounts) -> None:
        held = one.of(JobState.INFLIGHT)
        if held and not one.of(JobState.PENDING) and not self._warned:
            self._warned = True
            self._notify(
                f"run {one.run.name}: waiting for {pluralize(held, 'job')} that other workers hold; a dead worker's are "
                f"reclaimed when their leases run out, or before"
            )

    def check_served(self, found: Sequence[RunCounts]) -> None:
        """Raise NothingToServeError if there is work, and none that this worker can do."""
        refused = self._runs.refused
        waiting = [one for one in found if one.run.id in refused and one.open]
        if waiting and not self._runs.served:
            reasons = "; ".join(f"{one.run.name}: {refused[one.run.id]}" for one in waiting)
            raise NothingToServeError(f"no run that this worker can serve: {reasons}")

    def pauses(self, found: Sequence[RunCounts]) -> dict[str, Paused]:
        """Return what paused the runs that the user named or that this worker served, by name; report moved ones."""
        paused = {}
        for one in found:
            run, pause = one.run, one.run.pause
            if run.state is not RunState.PAUSED or pause is None:
                continue
            if pause.cause is PauseCause.MOVED_TO:
                if self._named:
                    self._notify(f"run {run.name} was {pause.message} and goes on there; name that database with --db")
            elif one.open and (self._named or (run.id in self._runs.served and not pause.cause.is_move)):
                paused[run.name] = pause
        return paused
