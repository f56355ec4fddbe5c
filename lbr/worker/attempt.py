"""One call under its timeout, from request to outcome. It knows no database and never retries."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from lbr.core import open_files
from lbr.core.errors import CUT_OFF, NO_USAGE, BadAnswer, CallError, Family, Permanent
from lbr.core.pricing import output_limit
from lbr.core.retry import failure_of, storable, storable_usage
from lbr.core.types import Failure, Outcome, Reply
from lbr.models.base import Kind, kind_of
from lbr.worker.deadlines import DeadlineError

if TYPE_CHECKING:
    from lbr.core.pricing import Price
    from lbr.core.schema import Validator
    from lbr.models.base import Model, Request
    from lbr.worker.deadlines import Deadlines, Lateness

ANSWER_LIMIT = 50_000_000


class OutOfFilesError(Exception):
    """A call to a provider was not made because no file handle was left: not the fault of the job or the provider."""


async def attempt(
    model: Model, validator: Validator | None, request: Request, deadlines: Deadlines, lateness: Lateness
) -> Outcome:
    """Make one call and return how it ended; only a cancellation from outside and OutOfFilesError are raised.

    `deadlines` end it after as many seconds as `request.timeout` says.
    """
    started = time.perf_counter()
    reply: Reply | None = None
    failure: Failure | None = None
    try:
        reply, failure = await _answer(model, validator, request, deadlines, lateness)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled the call from outside: the answerer gave up on its own account.
        failure = failure_of(CallError("the call cancelled itself", kind="CancelledError"))
    except (KeyboardInterrupt, OutOfFilesError):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it was belongs to the job, not to the worker
        failure = failure_of(error)
    if failure is not None and failure.family is Family.CUT_OFF:
        failure = replace(failure, message=f"{_limit_words(request)}: {failure.message}")
    return Outcome(reply, failure, latency_ms=round((time.perf_counter() - started) * 1000))


async def _answer(
    model: Model, validator: Validator | None, request: Request, deadlines: Deadlines, lateness: Lateness
) -> tuple[Reply | None, Failure | None]:
    try:
        reply = _storable(await deadlines.wait_for(model.answer(request)))
    except DeadlineError:
        words = f"no answer within {deadlines.seconds:g} s"
        return None, Failure(Family.TRANSIENT, "CallTimeout", words, overloaded=lateness.note(late=True))
    except Exception as error:
        if _was_not_made(request, error):
            raise OutOfFilesError from error
        raise
    lateness.note(late=False)
    if validator is None:
        return reply, None
    try:
        return replace(reply, text=validator.check(reply.text)), None
    except BadAnswer as error:
        # The answer does not fit, but it was paid for.
        failure = replace(failure_of(error), usage=reply.usage, finish_reason=reply.finish_reason)
        if reply.finish_reason == CUT_OFF:  # asked again, it would end in the same place
            failure = replace(failure, family=Family.CUT_OFF)
        return None, failure


def _limit_words(request: Request) -> str:
    """Return where an answer was cut off: at a limit of the user's settings, or of the model."""
    limit = output_limit({**request.task.settings, **(request.settings or {})})
    return f"the answer was cut off at {limit or 'the token limit of the model'}"


def _was_not_made(request: Request, error: Exception) -> bool:
    """Return whether a call to a provider found no file handle. The connections of functions are their own affair."""
    if isinstance(error, CallError) and (error.text is not None or error.usage != NO_USAGE):
        return False  # an answer came, and is paid for
    return kind_of(request.task) is Kind.PROVIDER and open_files.are_exhausted(error)


def _storable(reply: Reply) -> Reply:
    """Return the reply as a database can hold it. Raises Permanent for one that is too long for any."""
    if len(reply.text) > ANSWER_LIMIT:
        raise Permanent(
            f"expected an answer of at most {ANSWER_LIMIT:,} characters, got: {len(reply.text):,}",
            usage=reply.usage,
        )
    usage = storable_usage(reply.usage)
    text = storable(reply.text)
    model = reply.model and storable(reply.model)
    finish_reason = reply.finish_reason and storable(reply.finish_reason)
    if (
        usage is reply.usage
        and text is reply.text
        and model is reply.model
        and finish_reason is reply.finish_reason
    ):
        return reply
    return replace(reply, usage=usage, text=text, model=model, finish_reason=finish_reason)


def priced(outcome: Outcome, price: Price) -> Outcome:
    """Return the outcome with the cost of its tokens at this price, in the place of what the answerer said."""
    reply, failure = outcome.reply, outcome.failure
    if not outcome.is_paid:
        return outcome
    if reply is not None:
        return replace(outcome, reply=replace(reply, usage=price.apply(reply.usage)))
    if failure is not None:
        return replace(outcome, failure=replace(failure, usage=price.apply(failure.usage)))
    return outcome
