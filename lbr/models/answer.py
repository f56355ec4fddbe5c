"""What a user's function returns, with the usage that it reports."""

from __future__ import annotations

import reprlib
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

from lbr.core.errors import MAX_NANOS, MAX_TOKENS, NO_USAGE, Permanent, Usage
from lbr.core.pricing import NANOS
from lbr.core.schema import is_base_model
from lbr.core.text import to_json
from lbr.core.types import Reply
from lbr.models.failures import ending_of

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Answer:
    """A function returns it instead of the answer alone, to report what the call took; None for what is not known.

    `text` is what a function may return without it: a string, a dict, a list or a pydantic model. `cached_tokens` are
    those of the input that the provider had in its cache. `model` is the model that answered. `finish_reason` "length"
    marks an answer that was cut off.
    """

    text: str | dict[str, Any] | list[Any] | BaseModel
    _: KW_ONLY
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | Decimal | None = None
    model: str | None = None
    finish_reason: str | None = None


def reply_of(returned: Any) -> Reply:
    """Return what a function returned as a reply. Raises Permanent for what is no answer, or no usage."""
    if isinstance(returned, Answer):
        return _reported(returned)
    if hasattr(returned, "output") and callable(getattr(returned, "new_messages", None)):
        return _of_agent(returned)
    return Reply(_text_of(returned))


def _text_of(result: Any) -> str:
    if isinstance(result, str):
        return str(result)
    try:
        if isinstance(result, dict | list):
            return to_json(result).decode()
        if is_base_model(result):
            return str(result.model_dump_json(by_alias=True))  # as the schema of a result type names the fields
    except (TypeError, ValueError) as error:
        name = type(result).__name__
        raise Permanent(f"expected the function's {name} to be JSON, got: {error}") from error
    shown = "None" if result is None else f"{type(result).__name__} {reprlib.repr(result)}"
    raise Permanent(f"expected the function to return str, dict, list or BaseModel, got: {shown}")


def _reported(answer: Answer) -> Reply:
    text, most = _text_of(answer.text), MAX_NANOS // NANOS
    counts = (_number(answer, name, MAX_TOKENS, text) for name in ("input_tokens", "output_tokens", "cached_tokens"))
    read, written, cached = (None if count is None else int(count) for count in counts)
    dollars = _number(answer, "cost_usd", most, text)
    for name in ("model", "finish_reason"):
        if not isinstance(found := getattr(answer, name), str | None):
            raise _refusal(name, "a string", found, text)
    usage = Usage(read, written, None if dollars is None else round(dollars * NANOS), cached)
    return Reply(text, usage, answer.model, ending_of(answer.finish_reason))


def _number(answer: Answer, name: str, most: int, text: str) -> Any:
    value, is_money = getattr(answer, name), name == "cost_usd"
    is_number = isinstance(value, Real | Decimal) and not isinstance(value, bool)
    with suppress(ArithmeticError):  # of a Decimal that is no number
        if value is None or (is_number and 0 <= value <= most and (is_money or value == int(value))):
            return value
    raise _refusal(name, f"{'US dollars' if is_money else 'a whole number'} from 0 to {most:,}", value, text)


def _refusal(name: str, expected: str, got: Any, text: str) -> Permanent:
    """Return an error with the answer's text, which may be paid for."""
    return Permanent(f"expected {name} of lbr.Answer to be {expected}, or None, got: {reprlib.repr(got)}", text=text)


# --- pydantic-ai's AgentRunResult, which is known by its attributes: the function has imported it, lbr has not -------


def _of_agent(result: Any) -> Reply:
    """Return the output of an agent's run, with the usage of all its requests."""
    responses = [one for one in result.new_messages() if getattr(one, "kind", None) == "response"]
    usage, last = result.usage, responses[-1] if responses else None
    counted = NO_USAGE
    if not usage.unmeasured_requests:  # else its sums are too low
        cached = usage.cache_read_tokens or None
        counted = Usage(usage.input_tokens, usage.output_tokens, _cost_of(responses, usage), cached)
    model, ending = getattr(last, "model_name", None), getattr(last, "finish_reason", None)
    return Reply(_text_of_output(result.output, counted), counted, model, ending_of(ending))


def _text_of_output(output: Any, usage: Usage) -> str:
    if isinstance(output, str):
        return str(getattr(output, "value", output))  # of an enum of strings
    from pydantic_core import to_json as dump  # noqa: PLC0415

    try:  # it is of any type that the agent may have
        return dump(output, by_alias=True, inf_nan_mode="null").decode()
    except ValueError as error:
        raise Permanent(f"expected the agent's output to be JSON, got: {error}", usage=usage) from error


def _cost_of(responses: list[Any], usage: Any) -> int | None:
    """Return what a run cost; None if the cost of one of its responses is not known.

    The run's own sum leaves such a response out, but it includes the agents that tools have called.
    """
    try:
        return round(max(sum(map(_cost_of_response, responses)), usage.cost or 0) * NANOS)
    except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
        return None


def _cost_of_response(response: Any) -> Decimal:
    reported = (response.provider_details or {}).get("cost", response.usage.cost)
    return Decimal(str(response.cost().total_price if reported is None else reported))
