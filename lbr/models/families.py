"""A failed call as pydantic-ai tells it, in the words of `lbr.models.refusals`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbr.models import refusals
from lbr.models.http import AnswerTooLarge, is_unreachable, lost_words, shown_url
from lbr.models.refusals import ProviderError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.errors import CallError, Family


def refusal_of(error: Exception) -> ProviderError:
    """Read an exception of a call."""
    status = getattr(error, "status_code", None)
    categories = frozenset(one.__name__ for one in type(error).__mro__)
    connecting = getattr(error, "phase", None) == "connect"
    lost = "ModelConnectionError" in categories and ("ModelTimeoutError" not in categories or connecting)
    return ProviderError(
        kind=type(error).__name__.lstrip("_").removeprefix("HTTP"),
        categories=categories,
        words=(_lost_words(error) if lost else None) or str(error),
        status=status if isinstance(status, int) else 0,
        body=getattr(error, "body", None),
        headers=dict(getattr(error, "headers", None) or {}),
        retry_after=getattr(error, "retry_after", None),
        suggestion=getattr(error, "suggested_model_id", None),
        connecting=connecting,
        url=next((shown_url(url) for cause in _causes(error) if (url := _url_of(cause))), None),
        unreachable=connecting or (lost and any(map(is_unreachable, _causes(error)))),
    )


def _lost_words(error: Exception) -> str | None:
    """Return what to say of a call whose connection failed; None where the client does not tell where it went."""
    from aiohttp import ClientError  # noqa: PLC0415

    causes = list(_causes(error))
    url = next(filter(None, map(_url_of, causes)), None)
    beneath = next(
        (cause for cause in causes if isinstance(cause, ClientError | OSError | AnswerTooLarge)), None
    )
    return None if url is None else lost_words(beneath, url)


def _url_of(error: Any) -> str | None:
    """Return where the call went whose error this is, None where it does not know: httpx's raise RuntimeError then."""
    try:
        return str(error.request.url)
    except (AttributeError, RuntimeError):
        return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def family_of(error: Exception) -> Family:
    """Sort an error of a call by pydantic-ai's classes, the HTTP status and the provider's code."""
    return refusals.family_of(refusal_of(error))


def call_error(error: Exception, *, api_key: str | None = None, now: float | None = None) -> CallError:
    """Say in lbr's words how a call failed; no key gets into the message. `now` is as in `refusals.call_error`."""
    return refusals.call_error(refusal_of(error), api_key=api_key, now=now)
