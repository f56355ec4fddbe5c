"""What comes back: an answer, or one that is none."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import orjson

from lbr.core.errors import Usage
from lbr.core.types import Reply
from lbr.models.endings import check_answer, ending_of, filter_words

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

ANSWER_TOOL = "answer"
FREE = "lbr_free"
"""Among a response's details: its provider said that it cost nothing."""
BODY = "lbr_body"
"""Among a response's details: the body of an answer that is not a plain success, in which a filter's reasons are."""
RAW = "lbr_raw"
"""Among a response's details: what came, if no text did."""
USAGE = "lbr_usage"
"""Among a response's details: its usage, if that is not known in full."""


def reply_of(response: ModelResponse) -> Reply:
    """Read a response; CallError when it holds no answer."""
    text, usage = _answer_text(response), _usage(response)
    details = response.provider_details or {}
    # One that pydantic-ai has no word for is kept as it came.
    ending = ending_of(response.finish_reason or details.get("finish_reason"))
    said = details.get("finish_reason")
    reasons = (said if said not in {None, ending} else None, filter_words(details))
    why = "; ".join(filter(None, reasons)) or None
    raw = None if text.strip() else details.get(RAW) or _dumped(response)
    check_answer(text, ending, usage, raw=raw, refusal=details.get("refusal"), why=why)
    return Reply(text=text, usage=usage, model=response.model_name, finish_reason=ending)


def _dumped(response: ModelResponse) -> str:
    """Return a response as pydantic-ai has it, with what the model thought and the tools that it called."""
    from pydantic_ai.messages import ModelMessagesTypeAdapter  # noqa: PLC0415

    return ModelMessagesTypeAdapter.dump_json([response], fallback=str).decode(errors="replace")


def _answer_text(response: ModelResponse) -> str:
    """Return the arguments of the answer tool, where it was called, else all text."""
    from pydantic_ai.messages import TextPart, ToolCallPart  # noqa: PLC0415

    for part in response.parts:
        if isinstance(part, ToolCallPart) and part.tool_name == ANSWER_TOOL:
            return part.args if isinstance(part.args, str) else orjson.dumps(part.args or {}).decode()
    return "".join(part.content for part in response.parts if isinstance(part, TextPart))


def _usage(response: ModelResponse) -> Usage:
    kept: Usage | None = (response.provider_details or {}).get(USAGE)
    if kept is not None:
        return kept
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
