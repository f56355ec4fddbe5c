"""What comes back: an answer, or one that is none."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.errors import CallError, Family, Usage
from lbr.core.types import Reply
from lbr.models.endings import check_answer, ending_of, filter_words
from lbr.models.wording import clean

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

ANSWER_TOOL = "answer"
FREE = "lbr_free"
"""Among a response's details: its provider said that it cost nothing."""


def reply_of(response: ModelResponse) -> Reply:
    """Read a response; CallError when it holds no answer."""
    text, usage = _answer_text(response), _usage(response)
    details = response.provider_details or {}
    # One that pydantic-ai has no word for is kept as it came.
    ending = ending_of(response.finish_reason or details.get("finish_reason"))
    said = details.get("finish_reason")
    reasons = (said if said not in {None, ending} else None, filter_words(details))
    why = "; ".join(filter(None, reasons)) or None
    check_answer(text, ending, usage, refusal=details.get("refusal"), why=why)
    return Reply(text=text, usage=usage, model=response.model_name, finish_reason=ending)


def fill_in(response: Any, model_name: str) -> None:
    """Give a chat completion what its server left out or wrote in an odd way, if no answer depends on it."""
    response.id = response.id if isinstance(response.id, str) else ""
    response.object = "chat.completion"
    response.model = response.model if isinstance(response.model, str) else model_name
    response.created = int(response.created) if isinstance(response.created, int | float) else 0
    if usage_of(response) is None:
        response.usage = None
    for index, choice in enumerate(response.choices if isinstance(response.choices, list) else ()):
        if getattr(choice, "message", None) is None:
            continue
        choice.index = index
        choice.finish_reason = choice.finish_reason or "stop"
        choice.message.role = "assistant"


def usage_of(response: Any) -> Usage | None:
    """Return the tokens that a chat completion reports; None if both are not there as numbers."""
    counts = [getattr(response.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if any(type(count) is not int or count < 0 for count in counts):
        return None
    if type(getattr(response.usage, "total_tokens", None)) is not int:
        response.usage.total_tokens = sum(counts)
    return Usage(*counts)


def unread(response: Any, words: str, family: Family) -> CallError:
    """Return the error for a chat completion that cannot be used, with all that came of it."""
    return CallError(
        clean(words),
        family=family,
        kind="UnreadAnswer",
        text=response.to_json(indent=None, warnings=False),
        usage=usage_of(response),
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
