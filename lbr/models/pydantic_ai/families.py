"""A failed call as pydantic-ai tells it, in the words of `lbr.models.refusals`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.models import refusals
from lbr.models.refusals import Refusal

if TYPE_CHECKING:
    from lbr.errors import CallError, Family


def refusal_of(error: Exception) -> Refusal:
    """Read an exception of a call."""
    status = getattr(error, "status_code", None)
    return Refusal(
        kind=type(error).__name__.lstrip("_").removeprefix("HTTP"),
        categories=frozenset(one.__name__ for one in type(error).__mro__),
        words=str(error),
        status=status if isinstance(status, int) else 0,
        body=getattr(error, "body", None),
        headers=dict(getattr(error, "headers", None) or {}),
        retry_after=getattr(error, "retry_after", None),
        suggestion=getattr(error, "suggested_model_id", None),
        connecting=getattr(error, "phase", None) == "connect",
    )


def family_of(error: Exception) -> Family:
    """Sort an error of a call by pydantic-ai's classes, the HTTP status and the provider's code."""
    return refusals.family_of(refusal_of(error))


def call_error(error: Exception, *, api_key: str | None = None, now: float | None = None) -> CallError:
    """Say in lbr's words how a call failed; no key gets into the message. `now` is as in `refusals.call_error`."""
    return refusals.call_error(refusal_of(error), api_key=api_key, now=now)
