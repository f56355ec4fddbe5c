"""Which runs this process can serve, and with whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lbr.core import open_files
from lbr.core.errors import UsageError
from lbr.core.limits import UNBOUNDED, CallBound
from lbr.core.pricing import (
    ASSUMED_OUTPUT_TOKENS,
    max_output_tokens,
    table_price,
    table_problem,
    task_characters,
    tokens_of,
)
from lbr.core.types import RunState
from lbr.models.base import Kind, kind_of, tells_cost
from lbr.models.build import build_model, build_validator, unsent
from lbr.models.http import Connections
from lbr.models.identity import has_other_code
from lbr.worker.deadlines import Lateness

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lbr.core.pricing import Price
    from lbr.core.schema import Validator
    from lbr.core.types import Run, RunId, Task
    from lbr.models.base import Model
    from lbr.models.build import Authority


@dataclass(slots=True)
class ServedRun:
    """A run with the one who answers it and, for structured output, who checks the answers.

    `price` is what its calls cost now by its user's word, None where the answerer's own word counts.
    `extra_tokens` is what a call probably takes besides its prompt: what always goes with it, and the answer.
    `table_price` is what the price table knows, for a run whose cost is limited.
    """

    run: Run
    model: Model
    validator: Validator | None
    price: Price | None
    extra_tokens: int
    lateness: Lateness = field(default_factory=Lateness)
    table_price: Price | None = None

    @property
    def bound(self) -> CallBound | None:
        """What a call may cost at most besides its prompt; None if no price is known or nothing bounds the answer."""
        price, most = self.price or self.table_price, max_output_tokens(self.run.task.settings)
        if price is None or most is None:
            return None
        return CallBound(price, self.extra_tokens - most, most)

    @property
    def slow_start(self) -> bool:
        """Whether a provider answers, who may not be able to take all calls at once."""
        return kind_of(self.run.task) is Kind.PROVIDER


class ServableRuns:
    """Builds each run's answerer once; runs that ask for the same task share it, and all share their connections.

    With `limits_cost`, and for a run that may cost so much only, one of whose calls nobody will know the cost is not
    served. `room` is how many calls to providers can run at a time by the limit of open files.
    """

    def __init__(self, authority: Authority, *, concurrency: int, room: int, limits_cost: bool) -> None:
        self._authority = authority
        self._limits_cost = limits_cost
        self._concurrency = concurrency
        self._room = room
        self._warned_room = False
        self._connections = Connections()
        self.slots = concurrency
        """How many calls may run at a time."""
        self._models: dict[str, Model] = {}
        self.served: dict[RunId, ServedRun] = {}
        self.refused: dict[RunId, UsageError] = {}
        self.withdrawn: set[RunId] = set()
        """Runs that were served until their model was found to answer other workers alone."""
        self._bounded: set[RunId] = set()
        # What a run cost when it was refused, and what it might: with another price or limit it may be served.
        self._refused_at: dict[RunId, tuple[Price | None, int | None]] = {}

    def learn(self, runs: Iterable[Run]) -> list[str]:
        """Take note of runs; return what a user should hear about those that are new."""
        notices = []
        runs = list(runs)
        for run in runs:
            self.reprice({run.id: run.price})
            notices += self._bound_calls(run)
            if run.state is not RunState.ACTIVE or self._is_served(run) or self._is_refused(run):
                continue
            try:
                self.served[run.id] = self._serve(run)
                self._bounded.discard(run.id)
            except (UsageError, OSError) as error:
                notices += self._note_not_served(run, error)
                continue
            notices += [f"run {run.name} goes on, but {problem}" for problem in unsent(run.task)]
            for notes in (self._refused_at, self.refused):
                notes.pop(run.id, None)
            notices += self._bound_calls(run)
            if self._function_changed(run):
                notices.append(
                    f"run {run.name}: the code of {run.task.function} has changed since its jobs were enqueued; "
                    f"its answers are kept, new calls use the new code"
                )
        return notices + self._count_slots()

    def _note_not_served(self, run: Run, error: UsageError | OSError) -> list[str]:
        """Refuse a run, for now if no file handle was left; return what to log."""
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

    def refuse(self, answerer: str, error: UsageError) -> bool:
        """Serve the runs of a model no longer; return whether any was served."""
        found = [one.run for one in self.served.values() if one.run.task.answerer == answerer]
        for run in found:
            del self.served[run.id]
            self.withdrawn.add(run.id)
            self.refused[run.id] = error
            self._refused_at[run.id] = run.price, run.budget_nanos
        return bool(found)

    def _is_served(self, run: Run) -> bool:
        """Return whether a run is served as it is stored now: an enqueue may have changed the order of its schema."""
        served = self.served.get(run.id)
        return served is not None and served.run.task.to_json() == run.task.to_json()

    def _is_refused(self, run: Run) -> bool:
        return self._refused_at.get(run.id) == (run.price, run.budget_nanos)

    def _count_slots(self) -> list[str]:
        """Cap the slots while a provider is served; return a warning the first time. Functions may need no connection."""
        connects = any(one.slow_start for one in self.served.values())
        self.slots = min(self._concurrency, self._room) if connects else self._concurrency
        if self._warned_room or self.slots == self._concurrency:
            return []
        self._warned_room = True
        notice = (
            f"the limit of open files ({open_files.limit()}) allows {self.slots} calls at a time, not "
            f"{self._concurrency}; raise it with `ulimit -n`, or start more workers"
        )
        return [notice]

    def _serve(self, run: Run) -> ServedRun:
        if self._limits_cost or run.budget_nanos is not None:
            check_tells_cost(run)
        identity = run.task.to_json()
        validator = build_validator(run.task, self._authority)
        if identity not in self._models:
            self._models[identity] = build_model(
                run.task, self._authority, concurrency=self._concurrency, connections=self._connections
            )
        return ServedRun(run, self._models[identity], validator, run.price, _extra_tokens(run.task))

    def _bound_calls(self, run: Run) -> list[str]:
        """Look up what a call may cost if the run's cost is limited; return what a user should hear if it is not known."""
        served = self.served.get(run.id)
        if (
            served is None
            or run.id in self._bounded
            or not (self._limits_cost or run.budget_nanos is not None)
        ):
            return []
        self._bounded.add(run.id)
        served.table_price = table_price(run.task.answerer)
        return [] if served.bound is not None else [f"run {run.name}: {UNBOUNDED}"]

    def reprice(self, prices: Mapping[RunId, Price | None]) -> None:
        """Take note of what the calls of runs cost from now on, those in flight among them."""
        for run_id, price in prices.items():
            if run_id in self.served:
                self.served[run_id].price = price

    def _function_changed(self, run: Run) -> bool:
        function = self._authority.function_for(run.task)
        return function is not None and has_other_code(function.identity.fingerprint, run.fingerprint)

    async def aclose(self) -> None:
        """Close every answerer, and the connections."""
        for model in self._models.values():
            await model.aclose()
        self._models.clear()
        await self._connections.aclose()


def check_tells_cost(run: Run) -> None:
    """Raise UsageError where what a run costs cannot be limited, for nobody will know what its calls cost."""
    if run.task.function is not None:
        raise UsageError(
            f"expected a run of a model to limit the cost of, got: run {run.name!r} of {run.task.answerer}, whose calls "
            f"tell no cost; serve it without --max-cost"
        )
    if not tells_cost(run.task, run.price):
        problem = table_problem()
        why = ", which the price table does not have"
        why = why if problem is None else f", and the price table cannot be loaded ({problem})"
        raise UsageError(
            f"expected a known price to limit the cost of run {run.name!r} by, got: none for {run.task.answerer}{why}; "
            f"give it with --price in=…,out=… at the enqueue, which may be repeated"
        )


def _extra_tokens(task: Task) -> int:
    most = max_output_tokens(task.settings)
    return tokens_of(task_characters(task)) + (ASSUMED_OUTPUT_TOKENS if most is None else most)
