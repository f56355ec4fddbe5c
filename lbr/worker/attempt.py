"""One call under its timeout, from request to outcome. It knows no database and never retries."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lbr.core import open_files
from lbr.core.errors import CUT_OFF, NO_USAGE, BadAnswer, CallError, Family, Permanent
from lbr.core.extras import Extras
from lbr.core.pricing import output_limit
from lbr.core.retry import failure_of, storable, storable_usage
from lbr.core.types import Failure, Outcome, Reply
from lbr.models.base import Kind, kind_of

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from lbr.core.extras import Extra
    from lbr.core.pricing import Price
    from lbr.core.schema import Validator
    from lbr.core.types import Json, Task
    from lbr.models.base import Model, Request

T = TypeVar("T")
ANSWER_LIMIT = 50_000_000
LATE_WEIGHT = 1 / 8
MAX_LATE_SHARE = 1 / 4


class OutOfFilesError(Exception):
    """No file handle was left to call a provider: neither the job nor the provider has failed."""


class DeadlineError(Exception):
    """A call took too long."""


class Deadlines:
    """Ends awaits that take longer than `seconds`, with one timer for all: they are due in the order they began."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: dict[asyncio.Task[object], float] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Await `work` in the current task, once at a time. Raises DeadlineError if it was cancelled for its time."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected to be awaited in a task, got: none")
        loop = task.get_loop()
        self._due[task] = loop.time() + self.seconds
        if self._timer is None:
            self._arm(loop)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._late and task.cancelling() <= 1:
                raise DeadlineError from None
            raise
        finally:
            if task in self._late:
                self._late.discard(task)
                task.uncancel()
            else:
                del self._due[task]

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        first = next(iter(self._due.values()), None)
        self._timer = None if first is None else loop.call_at(first, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task in [task for task, due in self._due.items() if due <= now]:
            del self._due[task]
            self._late.add(task)
            task.cancel()
        self._arm(loop)


class LateCalls:
    """The share of a model's calls that were late, as a moving average.

    One late call may have asked for a long answer; many mean that the model is overloaded.
    """

    def __init__(self) -> None:
        self._share = 0.0

    def note(self, *, late: bool) -> bool:
        """Count a call; return whether it was late and so many are that the model is overloaded."""
        self._share += LATE_WEIGHT * (late - self._share)
        return late and self._share > MAX_LATE_SHARE


async def attempt(
    model: Model, validator: Validator | None, request: Request, deadlines: Deadlines, late_calls: LateCalls
) -> Outcome:
    """Make one call and return how it ended. Only OutOfFilesError and cancellations are raised."""
    started = time.perf_counter()
    reply: Reply | None = None
    failure: Failure | None = None
    try:
        reply, failure = await _answer(model, validator, request, deadlines, late_calls)
    except (asyncio.CancelledError, KeyboardInterrupt, OutOfFilesError):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is fails the job, not the worker
        failure = failure_of(error)
    failure = _with_limit(failure, {**request.task.settings, **(request.settings or {})})
    return Outcome(reply, failure, latency_ms=round((time.perf_counter() - started) * 1000))


def _with_limit(failure: Failure | None, settings: dict[str, Json]) -> Failure | None:
    """Return a failure that names the limit which has cut its answer off."""
    if failure is None or failure.family is not Family.CUT_OFF:
        return failure
    place = output_limit(settings) or "the token limit of the model"
    return replace(failure, message=f"the answer was cut off at {place}: {failure.message}")


def checked(outcome: Outcome, validator: Validator | None, task: Task, keep: tuple[Extra, ...]) -> Outcome:
    """Return the outcome of a batch's request as that of a call: storable, and with an answer that fits the schema."""
    if outcome.reply is None:
        return replace(outcome, failure=_with_limit(outcome.failure, task.settings), latency_ms=0)
    try:
        reply, failure = _validated(_storable(outcome.reply, keep), validator)
    except Permanent as error:
        reply, failure = None, failure_of(error)
    return Outcome(reply, _with_limit(failure, task.settings), latency_ms=0)


async def _answer(
    model: Model, validator: Validator | None, request: Request, deadlines: Deadlines, late_calls: LateCalls
) -> tuple[Reply | None, Failure | None]:
    try:
        reply = _storable(await deadlines.wait_for(model.answer(request)), request.keep)
    except DeadlineError:
        message = f"no answer within {deadlines.seconds:g} s"
        overloaded = late_calls.note(late=True)
        return None, Failure(Family.TRANSIENT, "CallTimeout", message, overloaded=overloaded)
    except Exception as error:
        if _was_not_made(request, error):
            raise OutOfFilesError from error
        raise
    late_calls.note(late=False)
    return _validated(reply, validator)


def _validated(reply: Reply, validator: Validator | None) -> tuple[Reply | None, Failure | None]:
    if validator is None:
        return reply, None
    try:
        return replace(reply, text=validator.check(reply.text)), None
    except BadAnswer as error:  # it is paid for all the same
        failure = replace(failure_of(error), usage=reply.usage, finish_reason=reply.finish_reason)
        if reply.finish_reason == CUT_OFF:  # another try would end in the same place
            failure = replace(failure, family=Family.CUT_OFF)
        return None, failure


def _was_not_made(request: Request, error: Exception) -> bool:
    """Return whether a call to a provider found no file handle. A function's own connections are not checked."""
    if isinstance(error, CallError) and (error.text is not None or error.usage != NO_USAGE):
        return False  # an answer came, and is paid for
    return kind_of(request.task) is Kind.PROVIDER and open_files.are_exhausted(error)


def _storable(reply: Reply, keep: tuple[Extra, ...]) -> Reply:
    """Return the reply as a database can hold it, with the extras to keep. Raises Permanent if it is too long."""
    if len(reply.text) > ANSWER_LIMIT:
        message = f"expected an answer of at most {ANSWER_LIMIT:,} characters, got: {len(reply.text):,}"
        raise Permanent(message, usage=reply.usage)
    extras = None
    if keep:
        extras = Extras(**{kind: storable(getattr(reply.extras, kind, None) or "") for kind in keep})
    return Reply(
        storable(reply.text),
        storable_usage(reply.usage),
        reply.model and storable(reply.model),
        reply.finish_reason and storable(reply.finish_reason),
        extras,
    )


def seeded(own: dict[str, Json] | None, task: Task, sample: int) -> dict[str, Json] | None:
    """Return a job's own settings with a seed of this sample; without a seed there, or in the task's, as they are."""
    seed = {**task.settings, **(own or {})}.get("seed")
    return own if type(seed) is not int else {**(own or {}), "seed": seed + sample}


def priced(outcome: Outcome, price: Price) -> Outcome:
    """Return the outcome with the cost of its tokens at this price, instead of what the provider reported."""
    reply, failure = outcome.reply, outcome.failure
    if reply is not None:
        return replace(outcome, reply=replace(reply, usage=price.apply(reply.usage)))
    if failure is not None and outcome.is_paid:
        return replace(outcome, failure=replace(failure, usage=price.apply(failure.usage)))
    return outcome
