"""What comes back: replies, and errors in the words of `lbr.errors`."""

from __future__ import annotations

import os
import re
import time
from decimal import Decimal
from typing import TYPE_CHECKING

import orjson

from lbr.errors import CallError, Family, Permanent, Usage
from lbr.jobs import Reply
from lbr.models.pydantic_ai.families import family_of, headers_of, is_overloaded, message_of, retry_delay_of
from lbr.models.pydantic_ai.waits import wait_of

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

ANSWER_TOOL = "answer"
MAX_MESSAGE_CHARS = 500
MIN_SECRET_CHARS = 6

# What moves the cursor or the colours of a terminal that shows the message.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)S?\Z", re.IGNORECASE)


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
        hint = "; raise max_tokens" if response.finish_reason == "length" else ""
        raise CallError(
            f"the answer is empty, finish reason: {response.finish_reason}{hint}",
            kind="EmptyAnswer",
            usage=_usage(response),
        )
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
    """Return what the provider says it took (OpenRouter does), else what the price table says; None if neither."""
    said = (response.provider_details or {}).get("cost")
    try:
        price = response.cost().total_price if said is None else Decimal(str(said))
        return round(price * 10**9)
    except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
        return None


def call_error(error: Exception, *, api_key: str | None = None, now: float | None = None) -> CallError:
    """Say in lbr's words how a call failed; no key gets into the message.

    `now`, in seconds since 1970, is what resets of rate limits are compared with; None asks the clock.
    """
    kind = type(error).__name__.lstrip("_").removeprefix("HTTP")
    family = family_of(error)
    return CallError(
        clean(_provider_words(error), api_key) or kind,
        family=family,
        retry_after=_retry_after(error, family, time.time() if now is None else now),
        kind=kind,
        overloaded=family is Family.TRANSIENT and is_overloaded(error),
    )


def _retry_after(error: Exception, family: Family, now: float) -> float | None:
    asked: float | None = getattr(error, "retry_after", None)
    if asked is not None or family is not Family.RATE_LIMITED:
        # Resets come with every answer, and say nothing about when a broken server will be well.
        return asked
    headers = headers_of(error)
    delay = retry_delay_of(error)
    return wait_of(headers if delay is None else headers | {"ratelimit-reset": delay}, now)


def _provider_words(error: Exception) -> str:
    said = message_of(error)
    if said is None:
        return str(error)
    status = getattr(error, "status_code", None)
    words = said if status is None else f"{said} (HTTP {status})"
    suggestion = getattr(error, "suggested_model_id", None)
    return f"{words}; did you mean {suggestion!r}?" if suggestion else words


def clean(text: str, api_key: str | None = None) -> str:
    """Return one short line without the keys that this process holds."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    for secret in sorted([*secrets, api_key or ""], key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
