"""What a worker brings to the limits that all share: what it was started with, and how it begins with a provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.core.config import nanos_of
from lbr.core.types import RunState
from lbr.store import budgets, limiting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lbr.core.config import WorkOptions
    from lbr.core.types import Run, RunId
    from lbr.store.database import Database
    from lbr.worker.runs import ServedRun


class Pacing:
    """Carries each limit over once: what a person changes later must stay."""

    def __init__(self, database: Database, options: WorkOptions) -> None:
        self._database = database
        self._budget = None if options.max_cost is None else nanos_of("max_cost", options.max_cost)
        wanted = {"rpm": options.rpm, "tpm": options.tpm}
        self._limits = {name: value for name, value in wanted.items() if value is not None}
        self._answerers: set[str] = set()
        self._runs: set[RunId] = set()
        self._stopped: dict[RunId, int | None] = {}

    async def begin(self, served: Iterable[ServedRun], found: Iterable[Run]) -> None:
        """Set what this worker was told for runs and answerers that are new to it; begin slowly with providers.

        `found` are all runs that have work, those that are paused among them.
        """
        for run in found:
            if run.state is not RunState.ACTIVE:
                self._stopped.setdefault(run.id, run.budget_nanos)
        new_runs = [one for one in served if one.run.id not in self._runs]
        new = {one.run.task.answerer: one for one in new_runs}
        slowly = []
        for answerer in sorted(new.keys() - self._answerers):
            if self._limits:
                await limiting.change(self._database, answerer, self._limits)
            if new[answerer].slow_start:
                slowly.append(answerer)
        await limiting.begin_slowly(self._database, slowly)
        for one in new_runs:
            if self._budget is not None and not self._was_told_since(one.run):
                await budgets.set_budget(self._database, one.run.id, self._budget)
        self._answerers |= set(new)
        self._runs |= {one.run.id for one in new_runs}

    def _was_told_since(self, run: Run) -> bool:
        """Tell whether somebody has changed what a run may cost since this worker saw it paused."""
        return run.id in self._stopped and run.budget_nanos != self._stopped[run.id]
