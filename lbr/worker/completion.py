"""When a worker has come to its end by itself: nothing is left to do, and what it says of what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.core.errors import NothingToServeError
from lbr.core.text import pluralize
from lbr.core.types import JobState, PauseCause, RunState, Until
from lbr.store import reads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lbr.core.types import Millis, Paused, Run
    from lbr.store.database import Database
    from lbr.store.queue import DueWork
    from lbr.worker.runs import ServableRuns

ABANDONED_MS = 30_000
"""An enqueue that added nothing for so long, and did not come to its end, is taken for interrupted."""


class Ending:
    """Looks whether one worker is through; `named` tells that it was given the names of its runs.

    `look` tells what there is to claim and to reclaim for it.

    Afterwards `paused` maps runs to what stopped them, `interrupted` names runs whose enqueue did not come
    to its end. A pause that was there before this worker is nothing to tell, unless the run was named; nor is a move,
    for what left goes on elsewhere.
    """

    def __init__(
        self,
        database: Database,
        look: Callable[[], Awaitable[DueWork]],
        servings: ServableRuns,
        until: Until,
        *,
        named: bool,
        notify: Callable[[str], None],
    ) -> None:
        self._database = database
        self._look = look
        self._servings = servings
        self._until = until
        self._named = named
        self._notify = notify
        self._told_held = False
        self.paused: dict[str, Paused] = {}
        self.interrupted: list[str] = []

    async def is_done(self, wanted: Sequence[Run]) -> bool:
        """Tell whether nothing is left of the runs that are wanted.

        Raises NothingToServeError where there was work, and none of it for this process.
        """
        if self._until is Until.EMPTY:
            outlook = await self._look()
            if outlook.due or outlook.suspects or outlook.expired:
                return False
        view = await reads.counts(self._database, [run.id for run in wanted])
        if self._until is Until.DONE and not self._all_done(view, await reads.now(self._database)):
            return False
        self._check_served(view)
        self._note_pauses(view)
        return True

    def _all_done(self, view: list[reads.RunCounts], now: Millis) -> bool:
        interrupted = []
        for one in view:
            if one.run.id not in self._servings.served or one.run.state is not RunState.ACTIVE:
                continue
            if one.open:
                self._tell_held(one)
                return False
            if one.run.sealed_at is None:
                if now - one.run.enqueued_at < ABANDONED_MS:
                    return False
                interrupted.append(one.run.name)
        self.interrupted = interrupted
        return True

    def _tell_held(self, one: reads.RunCounts) -> None:
        """Say once what an idle worker waits for."""
        held = one.of(JobState.INFLIGHT)
        if held and not one.of(JobState.PENDING) and not self._told_held:
            self._told_held = True
            self._notify(
                f"run {one.run.name}: waiting for {pluralize(held, 'job')} that other workers hold; a dead worker's are taken back, "
                f"at the latest when their leases run out"
            )

    def _check_served(self, view: list[reads.RunCounts]) -> None:
        refused = self._servings.refused
        waiting = [one for one in view if one.run.id in refused and one.open]
        if waiting and not self._servings.served:
            reasons = "; ".join(f"{one.run.name}: {refused[one.run.id]}" for one in waiting)
            raise NothingToServeError(f"expected a run that this worker can serve, got: none. {reasons}")

    def _note_pauses(self, view: list[reads.RunCounts]) -> None:
        self.paused = {}
        for one in view:
            run, pause = one.run, one.run.pause
            if run.state is not RunState.PAUSED or pause is None:
                continue
            if pause.cause is PauseCause.MOVED_TO:
                if self._named:
                    self._notify(
                        f"run {run.name} was {pause.message} and goes on there; name that database with --db"
                    )
            elif one.open and (self._named or (run.id in self._servings.served and not pause.cause.is_move)):
                self.paused[run.name] = pause
