"""What comes back: replies, and errors in the words of `lbr.errors`."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import TYPE_CHECKING

import orjson

from lbr.errors import CallError, Family, Permanent, Usage
from lbr.jobs import Reply

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

ANSWER_TOOL = "answer"
MAX_MESSAGE_CHARS = 500
MIN_SECRET_CHARS = 6

_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)S?\Z", re.IGNORECASE)


def reply_of(response: ModelResponse) -> Reply:
    """Read a response; CallError when it holds no answer."""
    text = _answer_text(response)
    if not text.strip():
        details = response.provider_details or {}
        if response.finish_reason == "content_filter":
            said = details.get("refusal") or "no reason given"
            raise Permanent(
                clean(f"the provider refused to answer: {said}"),
                kind="ContentFilterError",
                usage=_usage(response),
            )
        hint = "; raise max_tokens" if response.finish_reason == "length" else ""
        raise CallError(
            f"the answer is empty, finish reason: {response.finish_reason}{hint}",
            kind="EmptyAnswer",
            usage=_usage(response),
        )
    return Reply(
        text=text, usage=_usage(response), model=response.model_name, finish_reason=response.finish_reason
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


def call_error(error: Exception, *, api_key: str | None = None) -> CallError:
    """Say in lbr's words how a call failed; no key gets into the message."""
    kind = type(error).__name__.lstrip("_").removeprefix("HTTP")
    return CallError(
        clean(_provider_words(error), api_key) or kind,
        family=family_of(error),
        retry_after=getattr(error, "retry_after", None),
        kind=kind,
    )


def family_of(error: Exception) -> Family:
    """Sort an error of a call by pydantic-ai's classes and the HTTP status."""
    from pydantic_ai import exceptions  # noqa: PLC0415

    status = getattr(error, "status_code", None) or 0
    if isinstance(error, exceptions.ModelQuotaExceededError | exceptions.ModelAuthenticationError):
        return Family.ACCOUNT
    if isinstance(error, exceptions.ModelRateLimitError) or status == 429:
        return Family.RATE_LIMITED
    if status in {408, 409}:
        return Family.TRANSIENT
    if isinstance(
        error, exceptions.ModelRequestRejectedError | exceptions.ContentFilterError | exceptions.UserError
    ):
        # Also a 403 that is about the prompt (OpenRouter's moderation), which must not pause the whole run.
        return Family.PERMANENT
    if status in {401, 402, 403}:
        return Family.ACCOUNT
    return Family.PERMANENT if 400 <= status < 500 else Family.TRANSIENT


def _provider_words(error: Exception) -> str:
    said = _message_in(getattr(error, "body", None))
    if said is None:
        return str(error)
    status = getattr(error, "status_code", None)
    words = said if status is None else f"{said} (HTTP {status})"
    suggestion = getattr(error, "suggested_model_id", None)
    return f"{words}; did you mean {suggestion!r}?" if suggestion else words


def _message_in(body: object) -> str | None:
    """Find the message in an error's body, with what OpenRouter passes on from the provider behind it."""
    match body:
        case str() if body.strip():
            return body
        case {"message": str(message), "metadata": {"raw": str(raw)}}:
            return f"{message}: {raw}"
        case {"message": str(message)} | {"detail": str(message)}:
            return message
        case {"error": inner}:
            return _message_in(inner)
    return None


def clean(text: str, api_key: str | None = None) -> str:
    """Return one short line without the keys that this process holds."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    for secret in sorted([*secrets, api_key or ""], key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
