"""What pydantic-ai's adapter makes of odd answers: for chat completions the same as the chat adapter, nothing is lost."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from lbr.core.errors import CallError, Family, Usage
from lbr.core.extras import Extra, Extras
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.pydantic_ai import PydanticAIModel
from tests.models.test_chat import completion
from tests.models.test_chat_answers import ENVELOPES, USAGES, event
from tests.support.http_server import Scripted

VLLM, AZURE, ANTHROPIC = "vllm:m", "azure:gpt-4o", "anthropic:claude-of-this-test"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
COUNTED = Usage(10, 5, None)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each provider of these tests a key, and no URL but the one of the test."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    for name in ("VLLM", "AZURE_OPENAI", "ANTHROPIC", "OPENAI"):
        monkeypatch.setenv(f"{name}_API_KEY", "a-key-of-this-test")
    monkeypatch.setenv("OPENAI_API_VERSION", "2024-10-21")


async def ask(
    monkeypatch: pytest.MonkeyPatch,
    body: Any,
    model: str = VLLM,
    *,
    status: int = 200,
    headers: Any = None,
    keep: tuple[Extra, ...] = (),
    asked: list[Any] | None = None,
) -> Any:
    """Ask a model at a server that answers so; return the reply, or the error."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    with Scripted(status, text, headers) as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        built = PydanticAIModel(model, task_settings={})
        try:
            request = Request(Prompt(text="hello"), Task(model=model), JobId(1), 1, timeout=30, keep=keep)
            return await built.answer(request)
        except CallError as error:
            return error
        finally:
            await built.aclose()
            if asked is not None:
                asked += server.asked


BYTES = ("a mark in front", "half of a surrogate pair", "no Unicode", "a line break in the text of a field")


@pytest.mark.parametrize("case", [case for case in ENVELOPES if case not in BYTES])
async def test_only_the_text_is_required(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Whatever is missing or odd beside the text, the text is the answer and its tokens are counted."""
    body = ENVELOPES[case]
    reply = await ask(monkeypatch, body.decode() if isinstance(body, bytes) else body)
    assert not isinstance(reply, CallError), str(reply)
    assert (reply.text, reply.usage) == ("fine", COUNTED)


@pytest.mark.parametrize(("usage", "counted"), USAGES)
async def test_usage_is_counted_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch, usage: Any, counted: Usage) -> None:
    """Floats, texts, negative counts, other names and half a usage are read as the chat adapter reads them."""
    reply = await ask(monkeypatch, completion(usage=usage))
    assert (reply.text, reply.usage) == ("fine", counted)


@pytest.mark.parametrize(
    "error", [{"message": "died", "code": "500"}, {"message": "died", "code": None}, "died"], ids=str
)
async def test_an_error_beside_half_an_answer_breaks_it_off(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """Without a finish reason the text is not whole; text and tokens are kept."""
    found = await ask(monkeypatch, completion("The half of", None, error=error))
    assert (found.family, found.text, found.usage) == (Family.TRANSIENT, "The half of", COUNTED)
    assert str(found).startswith("died")


async def test_half_a_body_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came of JSON that was cut off is in the error."""
    half = json.dumps(completion())[:80]
    found = await ask(monkeypatch, half)
    assert (found.family, found.text) == (Family.TRANSIENT, half)


CALL = {"id": "c", "type": "function", "function": {"name": "get", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [{"reasoning_content": "hm"}, {"tool_calls": [CALL]}, {}],
    ids=lambda message: str(list(message)),
)
async def test_an_answer_without_text_keeps_what_came(monkeypatch: pytest.MonkeyPatch, message: dict[str, Any]) -> None:
    """Reasoning or another tool's call alone is no answer; the body and the tokens are kept."""
    found = await ask(monkeypatch, completion(None, message=message))
    assert (found.family, found.kind, found.usage) == (Family.BAD_ANSWER, "EmptyAnswer", COUNTED)
    assert json.loads(found.text) == completion(None, message=message)


async def test_other_providers_keep_what_came_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of Anthropic's that is all thought is kept as it was read."""
    thought = {"type": "thinking", "thinking": "hm, what", "signature": "s"}
    body: dict[str, Any] = {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [thought],
    }
    body |= {"stop_reason": "end_turn", "usage": {"input_tokens": 10, "output_tokens": 5}}
    found = await ask(monkeypatch, body, ANTHROPIC)
    assert (found.family, found.kind) == (Family.BAD_ANSWER, "EmptyAnswer")
    assert "hm, what" in found.text


RESPONSE: dict[str, Any] = {
    "id": "r1",
    "object": "response",
    "created_at": 1_700_000_000,
    "model": "gpt-4.1",
    "status": "completed",
    "output": [
        {
            "type": "message",
            "id": "m1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {
                    "type": "output_text",
                    "text": "fine",
                    "annotations": [],
                    "logprobs": [{"token": "fine", "logprob": -0.5, "bytes": [102], "top_logprobs": []}],
                }
            ],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    },
}


async def test_what_came_beside_the_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anthropic's thoughts, the probabilities of OpenAI's responses, and each body as it came, if it is asked for."""
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "fine"}]
    thought: dict[str, Any] = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": content}
    thought |= {"stop_reason": "end_turn", "usage": {"input_tokens": 10, "output_tokens": 5}}
    reply = await ask(monkeypatch, thought, ANTHROPIC, keep=(Extra.REASONING,))
    assert (reply.text, reply.extras) == ("fine", Extras("hm", "", json.dumps(thought)))
    assert (await ask(monkeypatch, thought, ANTHROPIC)).extras is None
    asked: list[Any] = []
    reply = await ask(monkeypatch, RESPONSE, "openai:gpt-4.1", keep=(Extra.LOGPROBS,), asked=asked)
    assert (reply.text, reply.extras.raw) == ("fine", json.dumps(RESPONSE))
    assert [(one["token"], one["logprob"]) for one in json.loads(reply.extras.logprobs)] == [("fine", -0.5)]
    assert asked[0]["include"] == ["message.output_text.logprobs"]
    reply = await ask(monkeypatch, completion(message={"reasoning": "hm"}), VLLM, keep=(Extra.LOGPROBS,), asked=asked)
    assert (reply.extras.reasoning, asked[1]["logprobs"]) == ("hm", True)


RESULTS = {
    "hate": {"filtered": True, "severity": "high"},
    "jailbreak": {"filtered": False, "detected": False},
}


async def test_a_content_filter_of_azure_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Category and severity are in the message, also those of an answer that was filtered."""
    body = completion("As for", "content_filter", choice={"content_filter_results": RESULTS})
    found = await ask(monkeypatch, body, AZURE)
    assert (found.family, found.kind, found.text) == (Family.PERMANENT, "ContentFilterError", "As for")
    assert str(found) == "the provider refused to answer: As for; content filter: hate (high)"
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": RESULTS}
    error = {"message": "was filtered", "code": "content_filter", "status": 400, "innererror": inner}
    found = await ask(monkeypatch, {"error": error}, AZURE, status=400)
    assert (found.family, found.kind, found.text) == (Family.PERMANENT, "ContentFilterError", None)
    assert str(found) == "the provider refused the prompt; content filter: hate (high) (HTTP 400)"


@pytest.mark.parametrize("type_", ["text/event-stream", "application/json"])
async def test_events_that_were_not_requested_are_put_together(monkeypatch: pytest.MonkeyPatch, type_: str) -> None:
    """Server-sent events add up to one answer, whatever content type they have; half of them do not."""
    usage = completion()["usage"]
    stream = event("fi") + event("ne\u2028", "stop") + event(usage=usage) + "data: [DONE]\n\n"
    reply = await ask(monkeypatch, stream, headers={"content-type": type_})
    assert (reply.text, reply.usage, reply.finish_reason) == ("fine\u2028", COUNTED, "stop")
    found = await ask(monkeypatch, event("The half of"), headers={"content-type": type_})
    assert (found.family, found.text) == (Family.TRANSIENT, "The half of")
    ended = event("The half of") + 'data: {"error": {"message": "died"}}\n\n'
    found = await ask(monkeypatch, ended, headers={"content-type": type_})
    assert (found.family, found.text, str(found)) == (Family.TRANSIENT, "The half of", "died")
