"""Whose fault an error of a call is: from pydantic-ai's classes, HTTP statuses and codes to families."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lbr.errors import Family

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSIENT_STATUSES = frozenset({408, 409, 425, 499})
"""Of the 4xx those that may pass: too slow, in the way of another, too early, cut off."""

OVERLOAD_STATUSES = frozenset({408, 503, 504, 524, 529})

# Some providers have no code for an account that must be looked after, only words, and the status of another trouble.
_BILLING_429 = re.compile(
    r"insufficient[ _](?:quota|balance|credit|fund)|plan and billing|billing[ _]hard[ _]limit|spending limit"
    r"|credit balance|used all available credits|free-models-per-day",
    re.IGNORECASE,
)
# A refused request may be quoted in the message, so that only how it begins is the provider's own word.
_BILLING_400 = re.compile(
    r"your credit balance|you have reached your specified (?:\w+ )?api usage limits", re.IGNORECASE
)
_NEVER_FITS = re.compile(r"request too large", re.IGNORECASE)


def family_of(error: Exception) -> Family:
    """Sort an error of a call by pydantic-ai's classes, the HTTP status and the provider's code."""
    from pydantic_ai import exceptions  # noqa: PLC0415

    status = status_of(error)
    if isinstance(error, exceptions.ModelQuotaExceededError):
        return Family.ACCOUNT
    if isinstance(error, exceptions.ModelRateLimitError) or status == 429:
        return _family_of_429(error)
    if isinstance(error, exceptions.ModelAuthenticationError):
        return Family.ACCOUNT
    if status in TRANSIENT_STATUSES:
        return Family.TRANSIENT
    if status == 400 and _BILLING_400.match(message_of(error) or ""):
        return Family.ACCOUNT
    if isinstance(
        error,
        exceptions.ModelRequestRejectedError
        | exceptions.ContentFilterError
        | exceptions.OutputTokenLimitExceeded
        | exceptions.UserError,
    ):
        # Also a 403 that is about the prompt (OpenRouter's moderation), which must not pause the whole run.
        return Family.PERMANENT
    if status in {401, 402, 403}:
        return Family.ACCOUNT
    return Family.PERMANENT if 400 <= status < 500 else Family.TRANSIENT


def _family_of_429(error: Exception) -> Family:
    """Tell a rate limit, which passes, from an empty account, which does not, and from what exceeds any limit."""
    said = message_of(error) or ""
    if _NEVER_FITS.match(said):
        return Family.PERMANENT
    if (
        getattr(error, "retry_after", None) is None
        and retry_delay_of(error) is None
        and _BILLING_429.search(said)
    ):
        # Gemini speaks of plan and billing at every limit, but says when to come again where waiting helps.
        return Family.ACCOUNT
    return Family.RATE_LIMITED


def is_overloaded(error: Exception) -> bool:
    """Tell whether an error says that the provider has too much to do: fewer calls at a time may help."""
    from pydantic_ai import exceptions  # noqa: PLC0415

    if isinstance(error, exceptions.ModelTimeoutError):
        return error.phase == "connect"  # an answer that does not come may just be a long one
    return isinstance(error, exceptions.ModelUnavailableError) or status_of(error) in OVERLOAD_STATUSES


def status_of(error: Exception) -> int:
    """Return the HTTP status, 0 where there was none."""
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else 0


def status_in(body: object) -> int | None:
    """Return the HTTP status that an error's body names as its code, None where it names none."""
    code = body.get("code") if isinstance(body, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else None


def message_of(error: Exception) -> str | None:
    """Return the provider's own words, None where the error's body has none."""
    return _message_in(getattr(error, "body", None))


def _message_in(body: object) -> str | None:
    """Find the message in an error's body, with what OpenRouter passes on from the provider behind it."""
    match body:
        case str() if body.strip():
            return body
        case {"message": str(message), "metadata": {"raw": str(raw)}}:
            return f"{message}: {raw}"
        case {"message": str(message)} | {"detail": str(message)}:
            return message
        case {"error": inner} | [
            {"error": inner},
            *_,
        ]:  # Gemini sends a list where it speaks OpenAI's language
            return _message_in(inner)
    return None


def headers_of(error: Exception) -> dict[str, object]:
    """Return the answer's headers, with those that OpenRouter passes on in the body."""
    found = dict(getattr(error, "headers", None) or {})
    for part in _parts(getattr(error, "body", None)):
        match part:
            case {"metadata": {"headers": dict(headers)}}:
                found |= headers
    return found


def retry_delay_of(error: Exception) -> str | None:
    """Return the wait in the body of Google's errors, such as `14s`; None where there is none."""
    for part in _parts(getattr(error, "body", None)):
        details = part.get("details")
        for detail in details if isinstance(details, list) else ():
            match detail:
                case {"retryDelay": str(delay)}:
                    return delay
    return None


def _parts(body: object) -> Iterator[dict[object, object]]:
    match body:
        case [first, *_]:
            yield from _parts(first)
        case dict():
            yield body
            yield from _parts(body.get("error"))
