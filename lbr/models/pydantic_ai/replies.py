"""What comes back: an answer, or one that is none."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import orjson

from lbr.core.errors import CallError, Permanent, Usage
from lbr.core.types import Reply
from lbr.models.refusals import empty_answer
from lbr.models.wording import clean

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

ANSWER_TOOL = "answer"
FREE = "lbr_free"
"""Among a response's details: its provider said that it cost nothing."""


def reply_of(response: ModelResponse) -> Reply:
    """Read a response; CallError when it holds no answer."""
    text = _answer_text(response)
    if response.finish_reason == "content_filter":
        raise _refusal(response, text)
    if response.finish_reason == "error":
        # OpenRouter passes a failure behind it on like this, with as much of the answer as had come.
        raise CallError(
            "the provider broke off in the answer", kind="BrokenAnswer", text=text, usage=_usage(response)
        )
    if not text.strip():
        raise empty_answer(response.finish_reason, _usage(response))
    return Reply(
        text=text, usage=_usage(response), model=response.model_name, finish_reason=response.finish_reason
    )


def _refusal(response: ModelResponse, text: str) -> Permanent:
    """Say that the answer was filtered, and keep what had come of it."""
    said = (response.provider_details or {}).get("refusal")
    words = said or " ".join(text.split()) or "no reason given"
    return Permanent(
        clean(f"the provider refused to answer: {words}"),
        kind="ContentFilterError",
        text=text if text.strip() else said,
        usage=_usage(response),
    )


def _answer_text(response: ModelResponse) -> str:
    """Return the arguments of the answer tool, where it was called, else all text."""
    from pydantic_ai.messages import TextPart, ToolCallPart  # noqa: PLC0415

    for part in response.parts:
        if isinstance(part, ToolCallPart) and part.tool_name == ANSWER_TOOL:
            return part.args if isinstance(part.args, str) else orjson.dumps(part.args or {}).decode()
    return "".join(part.content for part in response.parts if isinstance(part, TextPart))


def _usage(response: ModelResponse) -> Usage:
    usage = response.usage
    if usage.unmeasured_requests:
        return Usage(cost_nanos=_cost_nanos(response))
    return Usage(usage.input_tokens, usage.output_tokens, _cost_nanos(response))


def _cost_nanos(response: ModelResponse) -> int | None:
    """Return what the provider says it took (OpenRouter does), else what the price table says; None if neither.

    What is free by the provider's word is so where the table does not know better.
    """
    details = response.provider_details or {}
    said = details.get("cost")
    try:
        price = response.cost().total_price if said is None else Decimal(str(said))
        return round(price * 10**9)
    except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
        return 0 if details.get(FREE) else None
