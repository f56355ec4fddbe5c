"""What comes back: the answers that need no second look.

A server that speaks OpenAI's language may put anything into an answer. What is read here is what nearly all of them
send; everything else is left to pydantic-ai, which reads the same bytes.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.types import Reply
from lbr.models.refusals import empty_answer

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lbr.models.chat.costs import Costs
    from lbr.models.chat.endpoints import Endpoint

ENDINGS = frozenset({"stop", "length"})

_JOINER = re.compile("[<\\[\\]][\u200b\u200c\u200d\u2060\ufeff]")
"""Left in a special token that was broken up; pydantic-ai takes it out again."""

Types = frozenset[type]
_TEXT: Types = frozenset({str})
_INT: Types = frozenset({int})
_TEXT_OR_NONE: Types = frozenset({str, NoneType})
_INT_OR_NONE: Types = frozenset({int, NoneType})
_NUMBER_OR_NONE: Types = frozenset({int, float, NoneType})
_OBJECT_OR_NONE: Types = frozenset({dict, NoneType})
_NONE: Types = frozenset({NoneType})

_BODY = {"id": _TEXT, "model": _TEXT, "created": _INT}
_BODY_MAY = {
    "error": _NONE,
    "moderation": _NONE,
    "system_fingerprint": _TEXT_OR_NONE,
    "service_tier": _TEXT_OR_NONE,
    "metadata": _OBJECT_OR_NONE,
    "usage": _OBJECT_OR_NONE,
}
_CHOICE = {"index": _INT}
_CHOICE_MAY = {"logprobs": _NONE, "native_finish_reason": _TEXT_OR_NONE}
_MESSAGE = {"content": _TEXT_OR_NONE}
_MESSAGE_MAY = {
    "refusal": _NONE,
    "function_call": _NONE,
    "audio": _NONE,
    "reasoning": _TEXT_OR_NONE,
    "reasoning_content": _TEXT_OR_NONE,
}
_COUNTS = {"prompt_tokens": _INT, "completion_tokens": _INT, "total_tokens": _INT}
_COUNTS_MAY: dict[str, Types] = {
    "prompt_tokens_details": _OBJECT_OR_NONE,
    "completion_tokens_details": _OBJECT_OR_NONE,
    "cost": _NUMBER_OR_NONE,
    "cost_details": _OBJECT_OR_NONE,
    "is_byok": frozenset({bool, NoneType}),
    "server_tool_use_details": _OBJECT_OR_NONE,
}
_REASONING: dict[str, Mapping[str, Types]] = {
    "reasoning.text": {"text": _TEXT, "signature": _TEXT_OR_NONE},
    "reasoning.summary": {"summary": _TEXT},
    "reasoning.encrypted": {"data": _TEXT},
}
_REASONING_MAY = {"id": _TEXT_OR_NONE, "format": _TEXT_OR_NONE, "index": _INT_OR_NONE}


class OddAnswer(Exception):  # noqa: N818 - it is no error, only out of the ordinary
    """An answer that is not read here."""


class Reader:
    """Reads the answers of one endpoint."""

    def __init__(self, endpoint: Endpoint, costs: Costs) -> None:
        self._tags = endpoint.thinking_tags
        self._openrouter = endpoint.provider == "openrouter"
        self._relayed = endpoint.relayed
        self._costs = costs

    def read(self, content: bytes) -> Reply:
        """Read the body of an answer with status 200.

        Raises OddAnswer for one that is not read here, CallError for one that is empty.
        """
        try:
            body = orjson.loads(content)
            (choice,) = body["choices"]
            message = choice["message"]
            ending = choice["finish_reason"]
            if ending not in ENDINGS or not self._is_plain(body, choice, message):
                raise OddAnswer
        except (orjson.JSONDecodeError, LookupError, TypeError, ValueError) as error:
            raise OddAnswer from error
        text = _answer_in(message["content"] or "", self._tags)
        usage = self._costs.usage(body)
        if usage is None:
            raise OddAnswer
        if not text.strip():
            raise empty_answer(ending, usage)
        return Reply(text=text, usage=usage, model=body["model"], finish_reason=ending)

    def _is_plain(self, body: Any, choice: Any, message: Any) -> bool:
        content = message["content"]
        usage = body.get("usage")
        return (
            _fits(body, _BODY, _BODY_MAY)
            and _fits(choice, _CHOICE, _CHOICE_MAY)
            and _fits(message, _MESSAGE, _MESSAGE_MAY)
            and body["object"] == "chat.completion"
            and message["role"] == "assistant"
            and message.get("tool_calls") in ([], None)
            and message.get("annotations") in ([], None)
            and (not content or content.isascii() or _JOINER.search(content) is None)
            and (usage is None or _is_plain_usage(usage))
            and (not self._openrouter or self._is_plain_openrouter(body, message))
        )

    def _is_plain_openrouter(self, body: Any, message: Any) -> bool:
        provider = body.get("provider")
        details = message.get("reasoning_details")
        return (type(provider) is str or (provider is None and self._relayed)) and (
            details is None or (type(details) is list and all(map(_is_plain_reasoning, details)))
        )


def _answer_in(text: str, tags: tuple[str, str]) -> str:
    """Return an answer without what the model thought aloud in it."""
    start_tag, end_tag = tags
    if start_tag not in text:
        return text
    said: list[str] = []
    while (start := text.find(start_tag)) >= 0:
        said.append(text[:start])
        text = text[start + len(start_tag) :]
        end = text.find(end_tag)
        if end < 0:
            break  # the tag is lost, but not what follows it
        text = text[end + len(end_tag) :]
    return "".join([*said, text])


def _fits(part: Any, must: Mapping[str, Types], may: Mapping[str, Types]) -> bool:
    for name, types in must.items():
        if type(part[name]) not in types:
            return False
    for name in may.keys() & part.keys():  # noqa: SIM110 - a third of the time of all()
        if type(part[name]) not in may[name]:
            return False
    return True


def _is_plain_usage(usage: Any) -> bool:
    if not _fits(usage, _COUNTS, _COUNTS_MAY) or min(usage[name] for name in _COUNTS) < 0:
        return False
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        details = usage.get(name)
        if details and not _are_counts(details.values()):
            return False
    costs, tools = usage.get("cost_details"), usage.get("server_tool_use_details")
    return all(type(one) in _NUMBER_OR_NONE for one in (costs or {}).values()) and all(
        type(one) in _INT_OR_NONE for one in (tools or {}).values()
    )


def _are_counts(values: Collection[Any]) -> bool:
    return _INT_OR_NONE.issuperset(map(type, values)) and min(filter(None, values), default=0) >= 0


def _is_plain_reasoning(detail: Any) -> bool:
    told = _REASONING[detail["type"]]
    return _fits(detail, {}, {**told, **_REASONING_MAY})
