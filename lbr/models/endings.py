"""Finish reasons: which answers count, and which failure the others are, for all providers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbr.core.errors import CUT_OFF, CallError, Family, Permanent
from lbr.models.failures import clean

if TYPE_CHECKING:
    from lbr.core.errors import Usage

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
    has_text = bool(text.strip())
    kept: dict[str, Any] = {"text": text if has_text else raw, "usage": usage, "finish_reason": ending}
    word = (ending or "").lower()
    if word in _REFUSED or refusal:
        kept["text"] = text if has_text else refusal or raw
        words = refusal or " ".join(text.split()) or "no text"
        reason = f"; {why}" if why else ""
        raise Permanent(
            clean(f"the provider refused to answer: {words[:400]}{reason}"), kind="ContentFilterError", **kept
        )
    if word in _BROKEN_OFF:
        words = f"the server broke off the answer, finish reason {ending}" + (f": {why}" if why else "")
        raise CallError(clean(words), kind="BrokenAnswer", **kept)
    if has_text:
        return
    family = Family.CUT_OFF if ending == CUT_OFF else Family.BAD_ANSWER
    words = "it has no text" if ending == CUT_OFF else f"the answer has no text, finish reason {ending or 'not given'}"
    raise CallError(words, family=family, kind="EmptyAnswer", **kept)
