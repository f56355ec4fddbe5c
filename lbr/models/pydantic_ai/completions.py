"""Chat completions of any server: repaired as `lbr.models.chat` reads them, before pydantic-ai reads them.

Only the text or the tool call is required. pydantic-ai would reject an answer for an odd envelope, and report an error
with status 200 as a list of missing fields.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError, Family, Permanent
from lbr.models.chat.answers import Reader, envelope_of, text_in
from lbr.models.chat.costs import Costs, counted
from lbr.models.chat.endpoints import Endpoint
from lbr.models.endings import filter_words
from lbr.models.pydantic_ai.replies import BODY, RAW, USAGE
from lbr.models.wording import clean

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelResponse

    from lbr.core.errors import Usage
    from lbr.models.chat.answers import Envelope


class Completions:
    """Stands between one model of pydantic-ai's and its server; `api_key` is kept out of messages."""

    def __init__(self, model: Any, api_key: str | None) -> None:
        self._name = model.model_name
        self._create = model._completions_create  # noqa: SLF001
        self._process = model._process_response  # noqa: SLF001
        tags = model.profile.get("thinking_tags", ("<think>", "</think>"))
        endpoint = Endpoint(model.system, self._name, str(model.base_url), "", {}, tags)
        self._costs = Costs(endpoint)
        self._reader = Reader(endpoint, self._costs, api_key)

    async def create(self, *asked: Any) -> Any:
        """Make the call; a body that is no JSON comes back as text, as the SDK returns one of another type."""
        from pydantic_ai.exceptions import ModelAPIError  # noqa: PLC0415
        from pydantic_ai.messages import ModelResponse  # noqa: PLC0415

        try:
            response = await self._create(*asked)
        except ModelAPIError as error:
            if isinstance(error.__cause__, json.JSONDecodeError):
                return error.__cause__.doc
            raise
        if isinstance(response, ModelResponse):  # made of a 400 of Azure's, whose words are lost
            reason = filter_words(response.provider_details) or "content filter"
            raise Permanent(
                f"the provider refused the prompt; {reason} (HTTP 400)", kind="ContentFilterError"
            )
        return response

    def read(self, response: Any, **how: Any) -> ModelResponse:
        """Read what the OpenAI SDK made of an answer: text if its type was not JSON. CallError if it cannot be used."""
        from openai.types.chat import ChatCompletion  # noqa: PLC0415
        from pydantic_ai.exceptions import UnexpectedModelBehavior  # noqa: PLC0415

        self._costs.begin()
        whole, raw = True, None
        if isinstance(response, str):
            raw = response
            parsed, whole = self._reader.read_otherwise(response.encode(errors="replace"), "")
        elif isinstance(response, ChatCompletion):
            parsed = response.to_dict(warnings=False)
        else:
            found: ModelResponse = self._process(response, **how)
            return found
        envelope = envelope_of(parsed)
        text = text_in(envelope.message.get("content"))
        usage = self._reader.check(envelope, text or _arguments(envelope.message), whole=whole)
        raw = raw or json.dumps(parsed, ensure_ascii=False, default=str).encode(errors="replace").decode()
        body, problem = _filled(envelope, text, self._name), "no choices"
        for odd in (body, _bare(body, text)) if envelope.choice else ():
            try:
                found = self._process(ChatCompletion.construct(**odd), **how)
            except UnexpectedModelBehavior as error:
                problem = str(error.__cause__ or error)
                continue
            return _with_details(found, envelope, raw, usage)
        raise CallError(
            clean(f"expected an answer, got: {problem}"),
            family=Family.BAD_ANSWER,
            kind="UnreadAnswer",
            text=raw,
            usage=usage,
        )


def _with_details(found: ModelResponse, envelope: Envelope, raw: str, usage: Usage) -> ModelResponse:
    details = {**(found.provider_details or {})}
    if found.finish_reason not in {"stop", "length"}:
        details[BODY] = envelope.body
    details[RAW] = raw
    if usage.input_tokens is None or usage.output_tokens is None:
        details[USAGE] = usage
    found.provider_details = details
    return found


def _arguments(message: dict[str, Any]) -> str:
    """Return the arguments of a message's first tool call, empty if there are none."""
    match message.get("tool_calls"):
        case [{"function": {"arguments": str(arguments)}}, *_]:
            return arguments
    return ""


def _filled(envelope: Envelope, text: str, model_name: str) -> dict[str, Any]:
    """Return a chat completion with what its server left out or wrote in an odd way, if no answer depends on it."""
    body, choice, message = envelope
    usage = counted(body)
    model, finish = body.get("model"), choice.get("finish_reason")
    message = {**message, "content": text or message.get("content"), "role": "assistant"}
    return {
        **{name: value for name, value in body.items() if name != "error"},
        "id": "",
        "object": "chat.completion",
        "model": model if isinstance(model, str) else model_name,
        "created": 0,
        "usage": usage if usage and {"prompt_tokens", "completion_tokens"} <= usage.keys() else None,
        "choices": [
            {
                **choice,
                "index": 0,
                "finish_reason": finish if isinstance(finish, str) and finish else None,
                "message": message,
            }
        ],
    }


def _bare(body: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a chat completion without all that is not required; as it is if it has no text."""
    if not text.strip():
        return body
    (choice,) = body["choices"]
    refusal = choice["message"].get("refusal")
    message = {"role": "assistant", "content": text, "refusal": refusal if isinstance(refusal, str) else None}
    required = ("id", "object", "model", "created", "usage", "provider")
    return {
        **{name: body[name] for name in required if name in body},
        "choices": [{"index": 0, "finish_reason": choice["finish_reason"], "message": message}],
    }
