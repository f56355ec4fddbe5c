"""Whose fault a failed call is: from the error's kind, the HTTP status and the body to families, waits and words.

Every adapter says in `ProviderError` what came; what follows from it is decided here alone.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lbr.core.errors import CallError, Family, Symptom
from lbr.models.endings import filter_words
from lbr.models.waits import wait_of
from lbr.models.wording import MAX_MESSAGE_CHARS, clean, page_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TRANSIENT_STATUSES = frozenset({408, 409, 425, 499})
"""Of the 4xx those that may pass: too slow, in the way of another, too early, cut off."""

BUSY_STATUSES = frozenset({503, 529})
"""The provider has too much to do for now: like a rate limit, it is no fault of the job."""

OVERLOAD_STATUSES = frozenset({408, 503, 504, 524, 529})

_REJECTED = frozenset(
    {"ModelRequestRejectedError", "ContentFilterError", "OutputTokenLimitExceeded", "UserError"}
)

_ABOUT_THE_PROMPT = frozenset({"ModelContextWindowExceededError", "ContentFilterError"})

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


@dataclass(frozen=True, slots=True)
class ProviderError:
    """How a call failed, in no client's own classes.

    `kind` is what the error is called, `categories` the names of that and of all that it is a case of. `status` is 0
    where none came, `body` what came with it, None for nothing. `retry_after` is the wait in seconds that the client
    read out of the headers, `words` what to say where the body says nothing. `connecting` tells that no connection
    was made, `unreachable` that the connection was refused, reset or never made. `url` is where the call went, without
    what may be secret in it; None if that is not known.
    """

    kind: str
    categories: frozenset[str]
    words: str
    status: int = 0
    body: object = None
    headers: Mapping[str, object] = field(default_factory=dict)
    retry_after: float | None = None
    suggestion: str | None = None
    connecting: bool = False
    unreachable: bool = False
    url: str | None = None


def family_of(refusal: ProviderError) -> Family:
    """Sort a refusal by its categories, the HTTP status and the provider's words."""
    categories, status = refusal.categories, refusal.status
    if "ModelQuotaExceededError" in categories:
        return Family.ACCOUNT
    if "ModelRateLimitError" in categories or status == 429:
        return _family_of_429(refusal)
    if _is_denied(refusal):
        # Of a key that lets no call in the other calls tell; of an empty account the provider.
        return Family.ACCOUNT if _BILLING_429.search(message_in(refusal.body) or "") else Family.PERMANENT
    if status in TRANSIENT_STATUSES:
        return Family.TRANSIENT
    if status in BUSY_STATUSES or "ModelUnavailableError" in categories:
        return Family.RATE_LIMITED
    if status == 400 and _BILLING_400.match(message_in(refusal.body) or ""):
        return Family.ACCOUNT
    if categories & _REJECTED:
        # Also a 403 that is about the prompt (OpenRouter's moderation), which must not pause the whole run.
        return Family.PERMANENT
    if status == 402:
        return Family.ACCOUNT
    return Family.PERMANENT if 400 <= status < 500 else Family.TRANSIENT


def _family_of_429(refusal: ProviderError) -> Family:
    """Tell a rate limit, which passes, from an empty account, which does not, and from what exceeds any limit."""
    said = message_in(refusal.body) or ""
    if _NEVER_FITS.match(said):
        return Family.PERMANENT
    if refusal.retry_after is None and retry_delay_in(refusal.body) is None and _BILLING_429.search(said):
        # Gemini speaks of plan and billing at every limit, but says when to come again where waiting helps.
        return Family.ACCOUNT
    return Family.RATE_LIMITED


def symptom_of(refusal: ProviderError, family: Family) -> Symptom | None:
    """Return what a refusal may say about other calls, None if it is about this one alone."""
    if refusal.unreachable:
        return Symptom.UNREACHABLE
    if family is Family.PERMANENT and _is_denied(refusal):
        return Symptom.FORBIDDEN if refusal.status == 403 else Symptom.DENIED
    if refusal.status >= 500 or "ModelUnavailableError" in refusal.categories:
        return Symptom.SERVER_ERROR
    about_the_prompt = refusal.categories & _ABOUT_THE_PROMPT or refusal.status == 413
    return Symptom.SET_UP if family is Family.PERMANENT and refusal.status and not about_the_prompt else None


def _is_denied(refusal: ProviderError) -> bool:
    # A 403 may be about the prompt (OpenRouter's moderation): then its kind is another.
    return "ModelAuthenticationError" in refusal.categories or (
        refusal.status in {401, 403} and not refusal.categories & _REJECTED
    )


def is_overloaded(refusal: ProviderError) -> bool:
    """Tell whether a refusal says that the provider has too much to do: fewer calls at a time may help."""
    if "ModelTimeoutError" in refusal.categories:
        return refusal.connecting  # an answer that does not come may just be a long one
    return "ModelUnavailableError" in refusal.categories or refusal.status in OVERLOAD_STATUSES


def call_error(refusal: ProviderError, *, api_key: str | None = None, now: float | None = None) -> CallError:
    """Say in lbr's words how a call failed; no key gets into the message.

    `now`, in seconds since 1970, is what resets of rate limits are compared with; None asks the clock.
    """
    family = family_of(refusal)
    filtered = filter_words(refusal.body) if family is Family.PERMANENT else None
    kind = refusal.kind if filtered is None else "ContentFilterError"
    return CallError(
        _words(refusal, filtered, api_key) or kind,
        family=family,
        retry_after=_retry_after(refusal, family, time.time() if now is None else now),
        kind=kind,
        overloaded=family is Family.TRANSIENT and is_overloaded(refusal),
        symptom=symptom_of(refusal, family) if filtered is None else None,
    )


def _retry_after(refusal: ProviderError, family: Family, now: float) -> float | None:
    if refusal.retry_after is not None or family is not Family.RATE_LIMITED:
        # Resets come with every answer, and say nothing about when a broken server will be well.
        return refusal.retry_after
    headers = _all_headers(refusal)
    delay = retry_delay_in(refusal.body)
    return wait_of(headers if delay is None else headers | {"ratelimit-reset": delay}, now)


def _words(refusal: ProviderError, filtered: str | None, api_key: str | None) -> str:
    """Return the provider's words, shortened so that what follows them is seen: what was filtered, and the status."""
    said = message_in(refusal.body)
    ending = "" if filtered is None else f"; {filtered}"
    if said is None:
        return clean(refusal.words + ending, api_key)
    where = f" from {refusal.url}" if refusal.url and refusal.status in {404, 405} else ""
    ending += "" if refusal.status == 0 else f" (HTTP {refusal.status}{where})"
    ending += f"; did you mean {refusal.suggestion!r}?" if refusal.suggestion else ""
    ending = clean(ending, api_key, most=MAX_MESSAGE_CHARS // 2)
    gap = "" if ending.startswith(";") or not ending else " "
    return clean(page_words(said), api_key, most=MAX_MESSAGE_CHARS - len(gap + ending)) + gap + ending


def status_in(body: object) -> int | None:
    """Return the HTTP status that an error's body names as its code, None where it names none."""
    code = body.get("code") if isinstance(body, dict) else None
    if isinstance(code, str) and re.fullmatch(r"[45]\d\d", code, re.ASCII):
        return int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def message_in(body: object) -> str | None:
    """Find the provider's own words in an error's body, with what OpenRouter passes on from the provider behind it.

    None where the body has none.
    """
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
            return message_in(inner)
    return None


def _all_headers(refusal: ProviderError) -> dict[str, object]:
    """Return the answer's headers, with those that OpenRouter passes on in the body."""
    found = dict(refusal.headers)
    for part in _parts(refusal.body):
        match part:
            case {"metadata": {"headers": dict(headers)}}:
                found |= headers
    return found


def retry_delay_in(body: object) -> str | None:
    """Return the wait in the body of Google's errors, such as `14s`; None where there is none."""
    for part in _parts(body):
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
