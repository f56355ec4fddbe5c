"""Why an answer ended, in the words of all providers: whether it counts, and if not, which failure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbr.core.errors import CUT_OFF, CallError, Family, Permanent
from lbr.models.wording import clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.errors import Usage

MAX_DEPTH = 8
_AT_LIMIT = frozenset(
    {
        "length",
        "max_tokens",
        "max_output_tokens",
        "max_completion_tokens",
        "model_length",
        "model_context_window_exceeded",
    }
)
_FILTERED = frozenset(
    {
        "content_filter",
        "content_filtered",
        "guardrail_intervened",
        "safety",
        "recitation",
        "blocklist",
        "prohibited_content",
        "spii",
        "refusal",
        "sensitive",
    }
)
_BROKEN_OFF = frozenset(
    {
        "error",
        "abort",
        "aborted",
        "cancel",
        "cancelled",
        "canceled",
        "failed",
        "interrupted",
        "timeout",
        "network_error",
        "server_error",
        "insufficient_system_resource",
    }
)


def ending_of(finish_reason: object) -> str | None:
    """Return a finish reason as it is kept: one word for all token limits, others as they came, None if there is none."""
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
    """Raise CallError for an answer that is none: refused, broken off, or without text.

    `ending` is from `ending_of`, `raw` what came in place of a text, `refusal` the model's own words, `why` the reason
    that the provider gave.
    """
    kept: dict[str, Any] = {"text": text if text.strip() else raw, "usage": usage, "finish_reason": ending}
    word = (ending or "").lower()
    if word in _FILTERED or refusal:
        kept["text"] = text if text.strip() else refusal or raw
        words = refusal or " ".join(text.split()) or "no text"
        reason = f"; {why}" if why else ""
        raise Permanent(
            clean(f"the provider refused to answer: {words[:400]}{reason}"), kind="ContentFilterError", **kept
        )
    if word in _BROKEN_OFF:
        reason = f": {why}" if why else ""
        words = clean(f"the server broke off the answer, finish reason {ending}{reason}")
        raise CallError(words, kind="BrokenAnswer", **kept)
    if text.strip():
        return
    if ending == CUT_OFF:
        raise CallError("it has no text", family=Family.CUT_OFF, kind="EmptyAnswer", **kept)
    words = f"the answer has no text, finish reason {ending or 'not given'}"
    raise CallError(words, family=Family.BAD_ANSWER, kind="EmptyAnswer", **kept)


def filter_words(body: object) -> str | None:
    """Return what a content filter found, with its severity, as Azure, Google or OpenRouter report it; None if nothing."""
    found = list(dict.fromkeys(_filtered(body)))
    return f"content filter: {', '.join(found)}" if found else None


def _filtered(part: object, depth: int = 0) -> Iterator[str]:
    """Yield what filters found anywhere in a part of an envelope, which is never deeper than this looks."""
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in inner if depth < MAX_DEPTH else ():
        match name, value:
            case "content_filter_result" | "content_filter_results", dict():
                yield from filter(None, map(_category, value.items()))
            case "safetyRatings" | "safety_ratings", list():
                yield from filter(None, map(_rating, value))
            case "blockReason" | "block_reason", str():
                yield value
            case "metadata", {"reasons": [*reasons]}:
                yield from (one for one in reasons if isinstance(one, str))
            case _:
                yield from _filtered(value, depth + 1)


def _category(named: tuple[object, object]) -> str | None:
    """Return a category of Azure's with its severity; None for one that let the text pass."""
    match named[1]:
        case {"filtered": True, "severity": str(severity)}:
            return f"{named[0]} ({severity})"
        case {"filtered": True}:
            return str(named[0])
    return None


def _rating(rating: object) -> str | None:
    """Return a category of Google's that blocked, or is likely to have; None for one that did not."""
    if not isinstance(rating, dict):
        return None
    category, probability = (
        getattr(one, "value", one) for one in (rating.get("category"), rating.get("probability"))
    )
    if rating.get("blocked") or probability in {"MEDIUM", "HIGH"}:
        return f"{category} ({str(probability or 'blocked').lower()})"
    return None
