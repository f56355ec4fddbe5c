"""What pydantic-ai's adapter makes of odd answers: for chat completions the same as the chat adapter, nothing is lost."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from lbr.core.errors import CallError, Family, Usage
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
    monkeypatch: pytest.MonkeyPatch, body: Any, model: str = VLLM, *, status: int = 200, headers: Any = None
) -> Any:
    """Ask a model at a server that answers so; return the reply, or the error."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    with Scripted(status, text, headers) as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
        built = PydanticAIModel(model, task_settings={})
        try:
            return await built.answer(Request(Prompt(text="hello"), Task(model=model), JobId(1), 1, timeout=30))
        except CallError as error:
            return error
        finally:
            await built.aclose()


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
