"""The runs that a worker can serve, with their models, and the limits that it was started with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lbr.core import open_files
from lbr.core.config import nanos_of
from lbr.core.errors import NothingToServeError, UsageError
from lbr.core.limits import BOUND_ADVICE, UNBOUNDED, CallBound
from lbr.core.pricing import (
    ASSUMED_OUTPUT_TOKENS,
    max_output_tokens,
    processing_of,
    table_price,
    table_problem,
    task_characters,
    tokens_of,
)
from lbr.core.text import pluralize
from lbr.core.tiers import sent_settings
from lbr.core.types import JobState, PauseCause, RunState
from lbr.models.base import Kind, kind_of, tells_cost
from lbr.models.build import build_model, build_validator, unsent
from lbr.models.http import Connections
from lbr.models.identity import has_other_code
from lbr.store import limits
from lbr.store.counters import PARKED
from lbr.worker.attempt import LateCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lbr.core.batches import BatchProvider
    from lbr.core.config import WorkOptions
    from lbr.core.pricing import Price
    from lbr.core.schema import Validator
    from lbr.core.types import Millis, Paused, Run, RunId, Task
    from lbr.models.base import Model
    from lbr.models.build import Authority
    from lbr.store.database import Database
    from lbr.store.reads import RunCounts


@dataclass(slots=True)
class ServedRun:
    """A run with its model and, for structured output, its validator.

    `price` is the user's, None to use what the provider reports. `extra_tokens` is what a call probably takes besides
    its prompt: instructions, schema and answer. `table_price` is looked up if the run's cost `is_limited`. `runs` builds the models of
    jobs that have their own.
    """

    run: Run
    model: Model
    validator: Validator | None
    price: Price | None
    extra_tokens: int
    is_limited: bool
    table_price: Price | None
    runs: ServableRuns = field(repr=False)
    late_calls: LateCalls = field(default_factory=LateCalls)

    @property
    def bound(self) -> CallBound | None:
        """The most that a call may cost besides its prompt; None without a price or a limit of the answer."""
        price, most = self.price or self.table_price, max_output_tokens(self.run.task.settings)
        if price is None or most is None:
            return None
        return CallBound(price, self.extra_tokens - most, most)

    @property
    def is_provider(self) -> bool:
        """Whether a provider answers, which needs a connection for each call and may not take all calls at once."""
        return kind_of(self.run.task) is Kind.PROVIDER


class ServableRuns:
    """Builds the model of each run once; runs with the same task share it, and all share their connections.

    A run whose cost is limited, by its budget or by `limits_cost`, is not served if the cost of its calls will not be
    known. `room` is how many calls to providers the limit of open files allows at a time.
    """

    def __init__(self, authority: Authority, *, concurrency: int, room: int, limits_cost: bool) -> None:
        self._authority = authority
        self._limits_cost = limits_cost
        self._concurrency = concurrency
        self._room = room
        self._warned_room = False
        self._connections = Connections()
        self._models: dict[str, Model] = {}
        self._others: dict[tuple[RunId, str], ServedRun] = {}
        self.served: dict[RunId, ServedRun] = {}
        self.refused: dict[RunId, UsageError] = {}
        # A refused run may be served with a different price or budget than these.
        self._refused_at: dict[RunId, tuple[Price | None, int | None]] = {}

    def update(self, runs: Iterable[Run]) -> list[str]:
        """Serve the new runs that can be served; return notices for the user."""
        notices = []
        for run in runs:
            if run.id in self.served:  # for the calls that end from now on
                self.served[run.id].price = _own_price(run)
            if run.state is RunState.ACTIVE and not self._is_served(run) and not self._is_refused(run):
                notices += self._try_to_serve(run)
        if self.slots < self._concurrency and not self._warned_room:
            self._warned_room = True
            notices.append(
                f"the limit of open files ({open_files.limit()}) allows {self.slots} calls at a time, not "
                f"{self._concurrency}; raise it with `ulimit -n`, or start more workers"
            )
        return notices

    @property
    def slots(self) -> int:
        """How many calls may run at a time."""
        connects = any(one.is_provider for one in self.served.values())
        return min(self._concurrency, self._room) if connects else self._concurrency

    def _is_served(self, run: Run) -> bool:
        served = self.served.get(run.id)
        if served is None or served.is_limited != self._is_limited(run):
            return False
        return served.run.task.to_json() == run.task.to_json()  # another enqueue may have changed the schema's order

    def _is_refused(self, run: Run) -> bool:
        return self._refused_at.get(run.id) == (run.price, run.budget_nanos)

    def _try_to_serve(self, run: Run) -> list[str]:
        try:
            served = self.served[run.id] = self._serve(run)
        except (UsageError, OSError) as error:
            return self._refuse(run, error)
        self._refused_at.pop(run.id, None)
        self.refused.pop(run.id, None)
        notices = [f"run {run.name} goes on, but {problem}" for problem in unsent(run.task, run.keep)]
        if served.is_limited and served.bound is None:
            notices.append(f"run {run.name}: {UNBOUNDED}{f'; {BOUND_ADVICE}' * (run.task.function is None)}")
        function = self._authority.function_for(run.task)
        if function is not None and has_other_code(function.identity.fingerprint, run.fingerprint):
            notices.append(
                f"run {run.name}: the code of {run.task.function} has changed since its jobs were enqueued; its answers "
                f"are kept, new calls use the new code"
            )
        return notices

    def _serve(self, run: Run) -> ServedRun:
        is_limited = self._is_limited(run)
        if is_limited:
            check_tells_cost(run)
        identity = run.task.to_json()
        validator = build_validator(run.task, self._authority)
        if identity not in self._models:
            self._models[identity] = build_model(
                run.task, self._authority, concurrency=self._concurrency, connections=self._connections
            )
        price = table_price(run.task.answerer, processing_of(sent_settings(run.task))) if is_limited else None
        extra = _extra_tokens(run.task)
        return ServedRun(run, self._models[identity], validator, _own_price(run), extra, is_limited, price, self)

    def batches_of(self, run: Run) -> tuple[BatchProvider, Validator | None]:
        """Build what sends a run's batches and checks their answers. Raises UsageError if this process may not."""
        from lbr.models.batches import batch_provider  # noqa: PLC0415 - only runs with batches need it

        return batch_provider(run.task, self._authority, run.keep), build_validator(run.task, self._authority)

    def by_other_model(self, served: ServedRun, model: str) -> ServedRun:
        """Return a served run for jobs with a model of their own, at that model's price.

        Raises UsageError if this process cannot call the model, and OSError without a free file handle.
        """
        place = served.run.id, model
        if place not in self._others:
            task = replace(served.run.task, model=model)
            self._others[place] = self._serve(replace(served.run, task=task, price=None))
        return self._others[place]

    def _is_limited(self, run: Run) -> bool:
        return self._limits_cost or run.budget_nanos is not None

    def _refuse(self, run: Run, error: UsageError | OSError) -> list[str]:
        """Refuse a run, for now if no file handle was left; return a notice the first time."""
        warned = False
        if open_files.are_exhausted(error):
            warned = run.id in self.refused
            error = UsageError(open_files.exhausted_message())
        elif isinstance(error, UsageError):
            self._refused_at[run.id] = run.price, run.budget_nanos
        else:
            raise error
        self.refused[run.id] = error
        return [] if warned else [f"run {run.name}: not served: {error}"]

    async def aclose(self) -> None:
        """Close every model, and the connections."""
        for model in self._models.values():
            await model.aclose()
        self._models.clear()
        await self._connections.aclose()


def check_tells_cost(run: Run) -> None:
    """Raise UsageError if the cost of a run cannot be limited, because the cost of its calls will not be known."""
    if not tells_cost(run.task, run.price):
        problem = table_problem()
        why = f"and the price table cannot be loaded ({problem})" if problem else "which the price table does not have"
        raise UsageError(
            f"cannot limit the cost of run {run.name!r}: no price is known for {run.task.answerer}, {why}; repeat the "
            f"enqueue with --price in=…,out=…"
        )


def check_tells_other_cost(run: Run, model: str) -> None:
    """Raise UsageError if a run's cost is limited, and the cost of calls of another model will not be known."""
    if run.budget_nanos is not None and not tells_cost(replace(run.task, model=model), None):
        raise UsageError(
            f"the cost of run {run.name!r} is limited, and no price is known for {model}; use another model, or remove "
            f"the limit: `lbr resume {run.name} --max-cost inf`"
        )


def _own_price(run: Run) -> Price | None:
    return None if run.price is None else run.price.at(processing_of(sent_settings(run.task)))


def _extra_tokens(task: Task) -> int:
    most = max_output_tokens(task.settings)
    return tokens_of(task_characters(task)) + (ASSUMED_OUTPUT_TOKENS if most is None else most)


class StartLimits:
    """Sets the limits that a worker was started with, once for each run and model: later changes of the user stay."""

    def __init__(self, database: Database, options: WorkOptions) -> None:
        self._database = database
        self._budget = None if options.max_cost is None else nanos_of("max_cost", options.max_cost)
        wanted = {"rpm": options.rpm, "tpm": options.tpm}
        self._limits = {name: value for name, value in wanted.items() if value is not None}
        self._models: set[str] = set()
        self._runs: set[RunId] = set()
        self._first_budgets: dict[RunId, int | None] = {}

    async def apply(self, served: Iterable[ServedRun], found: Iterable[Run]) -> None:
        """Set them for new runs and models, and start slowly with new providers.

        `found` are all runs that have work: a budget that was changed since a run was first found stays.
        """
        for run in found:
            self._first_budgets.setdefault(run.id, run.budget_nanos)
        new_runs = [one for one in served if one.run.id not in self._runs]
        new = {one.run.task.answerer: one for one in new_runs if one.run.task.answerer not in self._models}
        for model in sorted(new) if self._limits else ():
            await self._database.write(limits.set_limits, model, self._limits)
        if unknown := sorted(model for model, one in new.items() if one.is_provider):
            await self._database.write(limits.slow_start, unknown)
        for run in (one.run for one in new_runs):
            if self._budget is not None and run.budget_nanos == self._first_budgets[run.id]:
                await self._database.write(limits.set_budget, run.id, self._budget)
        self._models |= new.keys()
        self._runs |= {one.run.id for one in new_runs}


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
        served = [one for one in found if one.run.id in self._runs.served and one.run.state is RunState.ACTIVE]
        for one in served:
            if one.open:
                self._report_waiting(one)
                return False
            if one.run.sealed_at is None and now - one.run.enqueued_at < ABANDONED_MS:
                return False
        self.interrupted = [one.run.name for one in served if one.run.sealed_at is None]
        return True

    def _report_waiting(self, one: RunCounts) -> None:
        held, parked = one.of(JobState.INFLIGHT), one.counts[PARKED]
        if parked and parked == one.open and not self._warned:
            self._warned = True
            self._notify(
                f"run {one.run.name}: waiting for {pluralize(parked, 'job')} that the provider answers in batches, which "
                f"may take a day; you may stop this worker, and any other continues"
            )
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
