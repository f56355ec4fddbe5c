"""Failed calls: one table from HTTP status, error code and kind to family, wait and message; no other module decides.

Kinds have the names of pydantic-ai's exceptions, whichever adapter made the call.
"""

from __future__ import annotations

import html
import math
import os
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from lbr.core.errors import CUT_OFF, CallError, Family, Permanent, Symptom

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.core.errors import Usage

# --- kinds ------------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """A kind of failure, the statuses that mean it, and what it has as an error's `code` or `type`, which decides first."""

    family: Family
    symptom: Symptom | None = None
    statuses: tuple[int, ...] = ()
    codes: str = ""


_KINDS = {
    "ModelQuotaExceededError": _Kind(
        Family.ACCOUNT,
        None,
        (402,),
        "insufficient_quota billing_hard_limit_reached credit_balance_exhausted organization_spend_limit_exceeded "
        "project_spend_limit_exceeded organization_usage_limit_exceeded",
    ),
    "ModelRateLimitError": _Kind(Family.RATE_LIMITED, None, (429,)),
    # OpenAI and Azure: 429; Groq: 498. Nothing is charged, and fewer calls at a time would not help.
    "FlexUnavailable": _Kind(Family.RATE_LIMITED, Symptom.NO_CAPACITY, (498,), "resource_unavailable"),
    "ModelOverloadedError": _Kind(
        Family.RATE_LIMITED,
        Symptom.SERVER_ERROR,
        (529,),
        "overloaded overloaded_error engine_overloaded engine_overloaded_error over_capacity server_is_overloaded",
    ),
    "ModelUnavailableError": _Kind(Family.RATE_LIMITED, Symptom.SERVER_ERROR, (503,)),
    "ModelServerError": _Kind(Family.TRANSIENT, Symptom.SERVER_ERROR),
    # One job alone fails; if all calls are denied, or all are refused alike, the run is paused instead.
    "ModelAuthenticationError": _Kind(Family.PERMANENT, Symptom.DENIED, (401, 403), "invalid_api_key"),
    "ModelRequestRejectedError": _Kind(Family.PERMANENT, Symptom.SET_UP, (400, 422)),
    "ModelNotFoundError": _Kind(Family.PERMANENT, Symptom.SET_UP, (404,), "model_not_found"),
    "ModelContextWindowExceededError": _Kind(
        Family.PERMANENT, codes="context_length_exceeded exceed_context_size_error"
    ),
    **dict.fromkeys(("ModelTimeoutError", "ModelConnectionError"), _Kind(Family.TRANSIENT)),
    **dict.fromkeys(("ContentFilterError", "OutputTokenLimitExceeded", "UserError"), _Kind(Family.PERMANENT)),
}
_STATUSES = {status: name for name, kind in _KINDS.items() for status in kind.statuses}
_CODES = {code: name for name, kind in _KINDS.items() for code in kind.codes.split()}
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 499})
_OVERLOAD_STATUSES = frozenset({408, 504, 524})

_NO_CREDIT = (
    "insufficient[ _](?:quota|balance|credit|fund)|plan and billing|billing[ _]hard[ _]limit|spending limit|"
    "credit balance|used all available credits|free-models-per-day"
)
_TEXTS = [
    # Anthropic: of type invalid_request_error. Only the beginning is its own text; the prompt may be quoted after it.
    (
        {400},
        "ModelQuotaExceededError",
        r"^your credit balance|^you have reached your specified (\w+ )?api usage limits",
    ),
    # OpenAI: the code is rate_limit_exceeded, but no wait is long enough.
    ({429}, "ModelRequestRejectedError", "^request too large"),
    # OpenAI's documentation names only these words, and relays drop its code.
    ({429}, "FlexUnavailable", r"^resource unavailable\b"),
    # xAI, OpenRouter's free models, and relays that drop OpenAI's code. Google words every limit so, but names a wait.
    ({401, 403, 429}, "ModelQuotaExceededError", _NO_CREDIT),
    # vLLM and OpenRouter: the code is the status.
    ({400, 413, 422}, "ModelContextWindowExceededError", "maximum context length|reduce the length of the messages"),
]
"""Kinds by status and message, of the few providers whose errors have no code of their own."""


def kind_of(status: int, body: object, known: str | None = None, *, waits: bool = False) -> str:
    """Name a failure by its status and body. `known` is what the client calls it; `waits` if the provider names a wait."""
    for part in _parts(body):
        for code in (part.get("code"), part.get("type")):
            if isinstance(code, str) and code in _CODES:
                return _CODES[code]
        metadata = part.get("metadata")
        if status == 403 and isinstance(metadata, dict) and {"flagged_input", "reasons"} & metadata.keys():
            return "ModelRequestRejectedError"  # OpenRouter's moderation refuses the prompt, not the key
    message = message_in(body) or ""
    for statuses, kind, pattern in _TEXTS:
        is_limit = waits and status == 429 and kind == "ModelQuotaExceededError"
        if status in statuses and not is_limit and re.search(pattern, message, re.IGNORECASE):
            return kind
    if known is not None and (status not in {429, 498} or known == "ModelQuotaExceededError"):
        return known
    return _STATUSES.get(status) or ("ModelServerError" if 500 <= status < 600 else "ModelHTTPError")


def call_error(
    words: str,
    *,
    status: int = 0,
    body: object = None,
    headers: Mapping[str, object] | None = None,
    kind: str | None = None,
    url: str | None = None,
    unreachable: bool = False,
    api_key: str | None = None,
    now: float | None = None,
) -> CallError:
    """Return the error for a call that failed; no key gets into its message.

    `words` are the message if the body has none. `status` is 0 and `body` None if no answer came. `kind` is what the
    client calls it, `unreachable` means that the connection was refused, reset or not made in time. `now`, seconds since
    1970, is what resets are compared with; None for the clock.
    """
    now = time.time() if now is None else now
    all_headers = _all_headers(headers or {}, body)
    millis = _seconds(all_headers.get("retry-after-ms", ""), now)
    wait = _seconds(all_headers.get("retry-after", ""), now) if millis is None else millis / 1000
    kind = kind_of(status, body, kind, waits=wait is not None)
    is_final = 300 <= status < 500 and status not in _TRANSIENT_STATUSES
    other = _Kind(Family.PERMANENT, Symptom.SET_UP) if is_final else _Kind(Family.TRANSIENT)
    family, symptom = _KINDS.get(kind, other)[:2]
    found = filter_words(body) if family is Family.PERMANENT else None
    if found:
        kind, symptom = "ContentFilterError", None
    elif status >= 500:
        symptom = Symptom.SERVER_ERROR
    elif kind == "ModelAuthenticationError" and status == 403:
        symptom = Symptom.FORBIDDEN
    elif status == 413 or (symptom is Symptom.SET_UP and not status):
        symptom = None
    if wait is None and family is Family.RATE_LIMITED and symptom is not Symptom.NO_CAPACITY:
        # Resets come with every answer, and do not say when a broken server will recover.
        wait = _reset_wait(all_headers, now)
    is_late = unreachable and kind == "ModelTimeoutError"
    return CallError(
        _message(words, status, body, found, url, api_key) or kind,
        family=family,
        retry_after=wait,
        kind=kind,
        overloaded=is_late or (family is Family.TRANSIENT and status in _OVERLOAD_STATUSES),
        symptom=Symptom.UNREACHABLE if unreachable else symptom,
    )


def from_exception(error: Exception, *, url: str | None = None, api_key: str | None = None) -> CallError:
    """Return the error for an exception of pydantic-ai or of a provider's client; `url` is where the call went."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CallError):  # of the connection beneath the client
            return cause
        cause = cause.__cause__
    names = [one.__name__ for one in type(error).__mro__]
    status = getattr(error, "status_code", None)
    return call_error(
        str(error),
        status=status if isinstance(status, int) else 0,
        body=getattr(error, "body", None),
        headers=getattr(error, "headers", None),
        kind=next((name for name in names if name in _KINDS), names[0]),
        url=url,
        unreachable=getattr(error, "phase", None) == "connect",
        api_key=api_key,
    )


# --- waits ------------------------------------------------------------------------------------------------------------

_UNIT_SECONDS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6, "µs": 1e-6}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|[dhms])")
_RESET = re.compile(r"(?:(?:x-)?ratelimit-reset(?:-[\w-]+)?|anthropic-(?:[\w-]+-)?ratelimit-[\w-]+-reset)\Z")
_EPOCH_SECONDS_FROM, _EPOCH_MILLIS_FROM = 1e9, 1e11
"""A smaller number is a wait in seconds; from the second on it cannot be seconds since 1970."""


def _all_headers(headers: Mapping[str, object], body: object) -> dict[str, str]:
    """Return headers by lower-case names, with those that OpenRouter and Google put into the body."""
    found = dict(headers)
    for part in _parts(body):
        match part:
            case {"metadata": {"headers": dict(inner)}}:
                found |= inner
            case {"details": [*details]}:
                for detail in details:
                    if isinstance(detail, dict) and "retryDelay" in detail:
                        found.setdefault("retry-after", detail["retryDelay"])
    return {str(name).lower(): str(value).strip() for name, value in found.items()}


def _reset_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until the last reset of a used-up limit (`…-remaining` is 0), else until the last of all."""
    resets = {
        name: wait
        for name, value in headers.items()
        if _RESET.match(name) and (wait := _seconds(value, now)) is not None
    }
    used_up = [wait for name, wait in resets.items() if headers.get(name.replace("reset", "remaining")) == "0"]
    return max(used_up or resets.values(), default=None)


def _seconds(text: str, now: float) -> float | None:
    """Read seconds (`7`), a duration (`6m0s`), a date or a point in time since 1970; None for nonsense and the past."""
    parts = _DURATION.findall(text)
    try:
        wait = float(text)
        if wait >= _EPOCH_SECONDS_FROM:
            wait = (wait / 1000 if wait >= _EPOCH_MILLIS_FROM else wait) - now
    except ValueError:
        if parts and "".join(map("".join, parts)) == text:
            wait = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
        else:
            wait = _until(text, now)
    return wait if 0 <= wait < math.inf else None


def _until(text: str, now: float) -> float:
    """Read an ISO date (Anthropic) or one of HTTP; a date without a zone is in UTC. NaN for nonsense."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, OverflowError):
            then = read(text)
            return (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - now
    return math.nan


# --- messages ---------------------------------------------------------------------------------------------------------

MAX_MESSAGE_CHARS = 500
_MAX_PAGE_CHARS = 200
_MIN_SECRET_CHARS = 6

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)S?\Z", re.IGNORECASE)
_PAGE = re.compile(r"\s*<(?:!doctype|!--|html|head|body|title|\?xml)\b", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]*)</title", re.IGNORECASE)
_MARKUP = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)


def clean(text: str, api_key: str | None = None, *, most: int = MAX_MESSAGE_CHARS) -> str:
    """Return one line of at most `most` characters, without the keys of this process and without control characters."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    for secret in sorted([*secrets, api_key or ""], key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def page_words(text: str) -> str | None:
    """Return the title of an HTML page, else the beginning of its text; None if the text is no HTML page."""
    if _PAGE.match(text) is None:
        return None
    text = text[:20_000]
    title = _TITLE.search(text)
    words = " ".join(html.unescape(title[1] if title else _MARKUP.sub(" ", text)).split())
    return clean(words, most=_MAX_PAGE_CHARS) or "an HTML page without text"


def message_in(body: object) -> str | None:
    """Return the provider's message in an error's body, with that of the provider behind OpenRouter; None without one."""
    match body:
        case str() if body.strip():
            return body
        case {"message": str(message), "metadata": {"raw": str(raw)}}:
            return f"{message}: {raw}"
        case {"message": str(message)} | {"detail": str(message)}:
            return message
        case {"error": inner} | [{"error": inner}, *_]:  # Google sends a list to OpenAI's clients
            return message_in(inner)
    return None


def _message(words: str, status: int, body: object, found: str | None, url: str | None, api_key: str | None) -> str:
    """Return the provider's message, cut so that what a filter found and the status stay visible after it."""
    text = message_in(body)
    ending = f"; {found}" if found else ""
    if text is None:
        return clean(words + ending, api_key)
    where = f" from {url}" if url and status in {404, 405} else ""
    ending += f" (HTTP {status}{where})" if status else ""
    ending = clean(ending, api_key, most=MAX_MESSAGE_CHARS // 2)
    gap = "" if ending.startswith(";") or not ending else " "
    return clean(page_words(text) or text, api_key, most=MAX_MESSAGE_CHARS - len(gap + ending)) + gap + ending


def status_in(error: object) -> int | None:
    """Return the HTTP status that an error has as its code; None if it has another code, or none."""
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if re.fullmatch(r"[45]\d\d", code, re.ASCII) else None


def _parts(body: object) -> Iterator[dict[Any, Any]]:
    """Yield an error's body and what is in it, or in its first element, as `error`."""
    if isinstance(body, list) and body:
        yield from _parts(body[0])
    elif isinstance(body, dict):
        yield body
        yield from _parts(body.get("error"))


# --- content filters ---------------------------------------------------------------------------------------------------


def filter_words(body: object) -> str | None:
    """Return what a content filter of Azure, Google or OpenRouter found, with its severity; None if nothing."""
    found = list(dict.fromkeys(_findings(body)))
    return f"content filter: {', '.join(found)}" if found else None


def _findings(part: object, name: object = "", depth: int = 0) -> Iterator[str]:
    match part:
        case {"filtered": True, "severity": str(severity)}:  # Azure, by category
            yield f"{name} ({severity})"
        case {"filtered": True}:
            yield str(name)
        case {"category": category, "probability": probability, **rest}:  # Google, whose SDK has enums there
            category, probability = (getattr(one, "value", one) for one in (category, probability))
            if rest.get("blocked") or probability in {"MEDIUM", "HIGH"}:
                yield f"{category} ({str(probability).lower()})"
        case str() if name in {"blockReason", "block_reason"}:
            yield part
        case {"reasons": [*reasons]} if name == "metadata":  # OpenRouter
            yield from (one for one in reasons if isinstance(one, str))
        case dict() | list() if depth < 8:
            for inner_name, inner in part.items() if isinstance(part, dict) else ((name, one) for one in part):
                yield from _findings(inner, inner_name, depth + 1)


_AT_LIMIT = frozenset({
    "length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length",
    "model_context_window_exceeded",
})  # fmt: skip
_REFUSED = frozenset({
    "content_filter", "content_filtered", "guardrail_intervened", "safety", "recitation", "blocklist",
    "prohibited_content", "spii", "refusal", "sensitive",
})  # fmt: skip
_BROKEN_OFF = frozenset({
    "error", "abort", "aborted", "cancel", "cancelled", "canceled", "failed", "interrupted", "timeout",
    "network_error", "server_error", "insufficient_system_resource",
})  # fmt: skip


def ending_of(finish_reason: object) -> str | None:
    """Return a finish reason as it is kept: `length` for all token limits, others as they came; None without one."""
    if not isinstance(finish_reason, str) or not finish_reason.strip():
        return None
    return CUT_OFF if finish_reason.lower() in _AT_LIMIT else finish_reason


def check_answer(
    text: str,
    ending: str | None,
    usage: Usage,
    *,
    raw: str | None = None,
    refusal: str | None = None,
    why: str | None = None,
) -> None:
    """Raise CallError for an answer that was refused, was broken off, or has no text.

    `ending` is from `ending_of`, `raw` what came instead of a text, `refusal` the model's own words, `why` the
    provider's reason.
    """
    has_text, word, because = bool(text.strip()), (ending or "").lower(), f"; {why}" if why else ""
    kept: dict[str, Any] = {"text": text if has_text else refusal or raw, "usage": usage, "finish_reason": ending}
    if word in _REFUSED or refusal:
        words = f"the provider refused to answer: {(refusal or ' '.join(text.split()) or 'no text')[:400]}"
        raise Permanent(clean(words + because), kind="ContentFilterError", **kept)
    if word in _BROKEN_OFF:
        words = f"the server broke off the answer, finish reason {ending}{because}"
        raise CallError(clean(words), kind="BrokenAnswer", **kept)
    if has_text:
        return
    family = Family.CUT_OFF if ending == CUT_OFF else Family.BAD_ANSWER
    words = "it has no text" if ending == CUT_OFF else f"the answer has no text, finish reason {ending or 'not given'}"
    raise CallError(words, family=family, kind="EmptyAnswer", **kept)
