"""Providers through pydantic-ai, against real HTTP servers on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from pydantic_ai.providers import infer_provider_class

from lbr.core.errors import CallError, Family, UsageError
from lbr.core.types import BadTry, JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.build import Authority, build_model, check_task, unsent
from lbr.models.failures import from_exception
from lbr.models.pydantic_ai import PydanticAIModel, check_model, output_mode
from tests.support.http_server import Scripted
from tests.support.llmock_server import free_port, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MODEL = "openai-chat:gpt-4o-mini"
KEY = "sk-very-secret-key"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without keys and base URLs but the one of the test."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def echo_url() -> Iterator[Any]:
    """Serve llmock's echo for all tests of this module."""
    with serve() as url:
        yield url


def request(text: Any = "hello", *, messages: Any = None, last_bad: Any = None, **task: Any) -> Any:
    """Make a request for a provider's model."""
    prompt = Prompt(text=text) if messages is None else Prompt(messages=tuple(messages))
    return Request(prompt=prompt, task=Task(model=MODEL, **task), job_id=JobId(1), seq=1, last_bad=last_bad)


@contextlib.asynccontextmanager
async def opened(name: Any = MODEL, settings: Any = None, api_key: Any = None) -> AsyncIterator[Any]:
    """Build a model and close it."""
    model = PydanticAIModel(name, task_settings=settings or {}, api_key=api_key)
    try:
        yield model
    finally:
        await model.aclose()


def completion(content: Any = "fine", *, finish: Any = "stop", usage: Any = True, **message: Any) -> Any:
    """Return a chat completion as a provider sends it."""
    body = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
    return json.dumps(body)


async def ask(
    url: Any, monkeypatch: pytest.MonkeyPatch, asked: Any = None, *, name: Any = MODEL, settings: Any = None
) -> Any:
    """Ask the model at a URL once."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    async with opened(name, settings) as model:
        return await model.answer(asked or request())


# --- against llmock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, "openai:gpt-4o-mini"])
async def test_an_answer_comes_with_tokens_and_cost(echo_url: str, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    """Text, usage, cost, the provider's model and its finish reason arrive."""
    reply = await ask(echo_url, monkeypatch, request("say it"), name=name)
    assert (reply.text, reply.model, reply.finish_reason) == (
        "Hello! You said: say it",
        "gpt-4o-mini",
        "stop",
    )
    usage = reply.usage
    assert usage.input_tokens is not None
    assert usage.output_tokens is not None
    assert usage.cost_nanos == usage.input_tokens * 150 + usage.output_tokens * 600


@pytest.mark.parametrize("schema", [SCHEMA, {"$ref": "#/$defs/s", "$defs": {"s": SCHEMA}}])
async def test_native_structured_output_is_filled(echo_url: str, monkeypatch: pytest.MonkeyPatch, schema: Any) -> None:
    """A model that takes a JSON schema is given it, and answers in JSON."""
    reply = await ask(echo_url, monkeypatch, request(schema=schema))
    assert sorted(json.loads(reply.text)) == ["a", "b"]


async def test_openrouter_answers_by_tool_from_its_own_base_url(echo_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENROUTER_BASE_URL moves OpenRouter; a model without schema support answers by calling a tool."""
    monkeypatch.setenv("OPENROUTER_BASE_URL", echo_url)
    async with opened("openrouter:some/model", api_key="sk-or-key") as model:
        assert output_mode(model._model.profile) == "tool"
        reply = await model.answer(request(schema=SCHEMA))
    assert sorted(json.loads(reply.text)) == ["a", "b"]


async def test_an_unavailable_provider_is_waited_for_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 503 is waited for like a rate limit; the SDK does not retry."""
    with serve("--error-rate", "503=1.0") as url, pytest.raises(CallError) as caught:
        await ask(url, monkeypatch)
    assert (caught.value.family, caught.value.kind) == (Family.RATE_LIMITED, "ModelUnavailableError")


async def test_a_spent_quota_of_requests_is_a_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request beyond llmock's quota is rate limited, with the wait it names."""
    with serve("--rpm", "1") as url:
        await ask(url, monkeypatch)
        with pytest.raises(CallError) as caught:
            await ask(url, monkeypatch)
    assert (caught.value.family, caught.value.kind) == (Family.RATE_LIMITED, "ModelRateLimitError")
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 60


async def test_a_prompt_beyond_the_context_window_is_permanent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is too long fails at once."""
    with serve("--context-window", "20") as url, pytest.raises(CallError) as caught:
        await ask(url, monkeypatch, request("word " * 500))
    assert (caught.value.family, caught.value.kind) == (Family.PERMANENT, "ModelContextWindowExceededError")


# --- errors -----------------------------------------------------------------------------------------------------------


def error_body(message: Any = "said so", **more: Any) -> Any:
    """Return an error as OpenAI words it."""
    return json.dumps({"error": {"message": message, "type": "t", **more}})


@pytest.mark.parametrize(
    ("status", "body", "family", "kind"),
    [
        (400, error_body(), Family.PERMANENT, "ModelRequestRejectedError"),
        (
            400,
            error_body(code="context_length_exceeded"),
            Family.PERMANENT,
            "ModelContextWindowExceededError",
        ),
        (401, error_body(), Family.PERMANENT, "ModelAuthenticationError"),
        (402, error_body(), Family.ACCOUNT, "ModelQuotaExceededError"),
        (403, error_body(), Family.PERMANENT, "ModelAuthenticationError"),
        (404, error_body(), Family.PERMANENT, "ModelNotFoundError"),
        (408, error_body(), Family.TRANSIENT, "ModelHTTPError"),
        (409, error_body(), Family.TRANSIENT, "ModelHTTPError"),
        (413, error_body(), Family.PERMANENT, "ModelHTTPError"),
        (422, error_body(), Family.PERMANENT, "ModelRequestRejectedError"),
        (429, error_body(), Family.RATE_LIMITED, "ModelRateLimitError"),
        (429, error_body(code="insufficient_quota"), Family.ACCOUNT, "ModelQuotaExceededError"),
        (500, error_body(), Family.TRANSIENT, "ModelServerError"),
        (502, error_body(), Family.TRANSIENT, "ModelServerError"),
        (503, error_body(), Family.RATE_LIMITED, "ModelUnavailableError"),
        (529, error_body(), Family.RATE_LIMITED, "ModelOverloadedError"),
    ],
)
async def test_every_status_has_its_family(
    monkeypatch: pytest.MonkeyPatch, status: Any, body: Any, family: Any, kind: Any
) -> None:
    """A status and its code decide the family; the message is the provider's, and there is one call."""
    with Scripted(status, body) as server:
        with pytest.raises(CallError) as caught:
            await ask(server.url, monkeypatch)
        assert len(server.asked) == 1
    error = caught.value
    where = f" from {server.url}/chat/completions" if status == 404 else ""
    assert (error.family, error.kind, str(error)) == (family, kind, f"said so (HTTP {status}{where})")


@pytest.mark.parametrize(
    ("headers", "retry_after"), [({"Retry-After": "7"}, 7.0), ({"retry-after-ms": "1500"}, 1.5), ({}, None)]
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_kept(
    monkeypatch: pytest.MonkeyPatch, headers: Any, retry_after: Any, status: Any
) -> None:
    """The wait that a provider asks for is in seconds, None where it names none."""
    with Scripted(status, error_body(), headers) as server, pytest.raises(CallError) as caught:
        await ask(server.url, monkeypatch)
    assert caught.value.retry_after == retry_after


@pytest.mark.parametrize(
    ("body", "headers", "family"),
    [
        (completion()[:40], {}, Family.TRANSIENT),
        ("", {}, Family.TRANSIENT),
        ("null", {}, Family.BAD_ANSWER),
        ("{}", {}, Family.BAD_ANSWER),
        ("<html>busy</html>", {"content-type": "text/html"}, Family.TRANSIENT),
        ('{"choices": []}', {}, Family.BAD_ANSWER),
    ],
)
async def test_a_broken_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, body: Any, headers: Any, family: Family
) -> None:
    """An answer that cannot be read may be well the next time; a whole one without text has a smaller budget."""
    with Scripted(200, body, headers) as server, pytest.raises(CallError) as caught:
        await ask(server.url, monkeypatch)
    assert caught.value.family is family
    assert str(caught.value)


async def test_a_refused_connection_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: try again later."""
    with pytest.raises(CallError) as caught:
        await ask(f"http://127.0.0.1:{free_port()}/v1", monkeypatch)
    assert (caught.value.family, caught.value.kind) == (Family.TRANSIENT, "ModelConnectionError")


async def test_a_timeout_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that does not answer within the timeout may answer the next time."""
    with serve("--latency-ms", "60000") as url, pytest.raises(CallError) as caught:
        await ask(url, monkeypatch, settings={"timeout": 0.05})
    assert (caught.value.family, caught.value.kind) == (Family.TRANSIENT, "ModelTimeoutError")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (error_body(f"bad key {KEY}!"), "bad key ***! (HTTP 400)"),
        (error_body("line\n  two"), "line two (HTTP 400)"),
        (error_body("x" * 2000), "x" * 488 + "… (HTTP 400)"),
        (
            error_body("Provider returned error", metadata={"raw": "too hot"}),
            "Provider returned error: too hot (HTTP 400)",
        ),
        ('{"detail": "no such thing"}', "no such thing (HTTP 400)"),
        ("plain words", "plain words (HTTP 400)"),
        ("", "status_code: 400, model_name: gpt-4o-mini, body:"),
    ],
)
async def test_the_message_is_the_providers_short_and_without_keys(
    monkeypatch: pytest.MonkeyPatch, body: Any, message: Any
) -> None:
    """What the provider says is one short line in which no key is left."""
    with Scripted(400, body) as server, pytest.raises(CallError) as caught:
        await ask(server.url, monkeypatch)
    assert str(caught.value)[: len(message)] == message
    assert len(str(caught.value)) <= 500


def test_a_key_that_was_given_is_hidden_too() -> None:
    """A key that is not in the environment does not get into a message either."""
    error = from_exception(ValueError("no: sk-or-given-key and sk-or-given"), api_key="sk-or-given-key")
    assert (str(error), error.kind, error.family) == (
        "no: *** and sk-or-given",
        "ValueError",
        Family.TRANSIENT,
    )


def test_an_error_without_words_is_named() -> None:
    """An error that says nothing is told by its class."""
    assert str(from_exception(TimeoutError())) == "TimeoutError"


@pytest.mark.parametrize(
    ("name", "arguments", "family"),
    [
        ("UserError", ("x",), Family.PERMANENT),
        ("ContentFilterError", ("x",), Family.PERMANENT),
        ("UnexpectedModelBehavior", ("x",), Family.TRANSIENT),
        ("ModelAPIError", ("m", "x"), Family.TRANSIENT),
        ("ModelConnectionError", ("m", "x"), Family.TRANSIENT),
        ("ModelRequestTimeout", ("m", 3.0), Family.TRANSIENT),
        ("ModelQuotaExceededError", ("m", "x"), Family.ACCOUNT),
        ("ModelAuthenticationError", ("m", "x"), Family.PERMANENT),
        ("ModelRateLimitError", ("m", "x"), Family.RATE_LIMITED),
        ("ModelNotFoundError", ("m", "x"), Family.PERMANENT),
    ],
)
def test_errors_without_a_status_have_a_family_too(name: Any, arguments: Any, family: Any) -> None:
    """pydantic-ai's classes decide where there is no HTTP status."""
    from pydantic_ai import exceptions

    error = getattr(exceptions, name)(*arguments)
    assert (from_exception(error).family, from_exception(error).kind) == (family, name)


def test_a_moderated_prompt_does_not_pause_the_run() -> None:
    """A 403 that rejects the prompt, and not the key, fails one job."""
    from pydantic_ai.exceptions import ModelHTTPError, ModelRequestRejectedError

    moderated = ModelHTTPError.for_category(ModelRequestRejectedError, status_code=403, model_name="m")
    assert from_exception(moderated).family is Family.PERMANENT


# --- replies ----------------------------------------------------------------------------------------------------------


async def test_a_reply_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are the provider's, and the cost comes from the price of the model it names."""
    with Scripted(200, completion()) as server:
        reply = await ask(server.url, monkeypatch)
    assert (reply.text, reply.model, reply.finish_reason) == ("fine", "gpt-4o-mini-2024-07-18", "stop")
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.cost_nanos) == (
        1000,
        500,
        450_000,
    )


async def test_usage_and_cost_may_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the provider does not count and the model has no price, there is None and no warning."""
    body = json.loads(completion(usage=False)) | {"model": "house-model"}
    with Scripted(200, json.dumps(body)) as server:
        reply = await ask(server.url, monkeypatch, name="openai-chat:house-model")
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.cost_nanos) == (None, None, None)


async def test_openrouters_own_cost_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenRouter says a call took goes before the price table."""
    body = json.loads(completion()) | {"provider": "Somebody"}
    body["usage"]["cost"] = 0.000123
    with Scripted(200, json.dumps(body)) as server:
        monkeypatch.setenv("OPENROUTER_BASE_URL", server.url)
        monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-env")
        async with opened("openrouter:some/model") as model:
            reply = await model.answer(request())
    assert reply.usage.cost_nanos == 123_000
    path, headers = server.headers_seen[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer sk-or-env")


async def test_a_key_that_was_given_goes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the call's author is the one that is sent."""
    with Scripted(200, completion()) as server:
        monkeypatch.setenv("OPENROUTER_BASE_URL", server.url)
        monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-env")
        task = Task(model="openrouter:some/model")
        model = build_model(task, Authority(openrouter_api_key="sk-or-given"), concurrency=1)
        with contextlib.suppress(CallError):
            await model.answer(request())
        await model.aclose()
    assert server.headers_seen[0][1]["authorization"] == "Bearer sk-or-given"


@pytest.mark.parametrize(
    ("body", "family", "message"),
    [
        (completion("", finish="stop"), Family.BAD_ANSWER, "the answer has no text, finish reason stop"),
        (completion(None, finish="length"), Family.CUT_OFF, "it has no text"),
        (completion("", finish="content_filter"), Family.PERMANENT, ""),
        (completion(None, refusal="not that"), Family.PERMANENT, "the provider refused to answer: not that"),
    ],
)
async def test_an_empty_answer_is_none(monkeypatch: pytest.MonkeyPatch, body: Any, family: Any, message: Any) -> None:
    """An answer without text fails: for good if it was filtered or cut off, else for now."""
    with Scripted(200, body) as server, pytest.raises(CallError) as caught:
        await ask(server.url, monkeypatch)
    assert (caught.value.family, str(caught.value)[: len(message)]) == (family, message)


async def test_a_tools_arguments_are_the_answer_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """The raw arguments of the answer tool are the text, valid or not: the validator judges."""
    call = {"id": "t1", "type": "function", "function": {"name": "answer", "arguments": '{"a": 1, '}}
    with Scripted(200, completion(None, finish="tool_calls", tool_calls=[call])) as server:
        monkeypatch.setenv("OPENROUTER_BASE_URL", server.url)
        async with opened("openrouter:some/model", api_key="sk-or-key") as model:
            reply = await model.answer(request(schema=SCHEMA))
    assert reply.text == '{"a": 1, '


# --- what is asked ----------------------------------------------------------------------------------------------------


async def asked_for(monkeypatch: pytest.MonkeyPatch, asked: Any, **how: Any) -> Any:
    """Return the JSON that a request sends."""
    with Scripted(200, completion()) as server:
        await ask(server.url, monkeypatch, asked, **how)
    return server.asked[0]


async def test_instructions_and_settings_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions come before the prompt, and settings beside it."""
    sent = await asked_for(
        monkeypatch,
        request("p", instructions="be brief"),
        settings={"temperature": 0.5, "max_tokens": 7, "seed": 1},
    )
    assert sent["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p"}]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.5, 7, 1)
    assert "max_completion_tokens" not in sent


async def test_chat_messages_are_sent_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every role and part that is known arrives as it is."""
    png = "data:image/png;base64,iVBORw0KGgo="
    sent = await asked_for(
        monkeypatch,
        request(
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {
                            "type": "image_url",
                            "image_url": {"url": "https://example.com/x.png", "detail": "low"},
                        },
                        {"type": "image_url", "image_url": {"url": png}},
                    ],
                },
            ]
        ),
    )
    assert sent["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": png}},
            ],
        },
    ]


async def test_instructions_go_with_chat_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat's own messages follow the instructions."""
    sent = await asked_for(
        monkeypatch,
        request(
            messages=[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
            instructions="i",
        ),
    )
    assert sent["messages"] == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected messages to be a list of at least one, got: "),
        ([{"role": "assistant", "content": "a"}], "no message is of the user; add one"),
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
            "the tool_call_id or name of message 2 is not of an earlier tool call: ",
        ),
        (
            [{"content": "a"}],
            "expected message 1 to have the role system or developer or user or assistant or tool, got: ",
        ),
        (
            [{"role": "user"}],
            "expected the content of message 1 to be text or a list of parts, got: None",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            "expected the parts of message 1 to be text, or images like ",
        ),
        (
            [{"role": "user", "content": ["a"]}],
            "expected the parts of message 1 to be text, or images like ",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}],
            "expected a base64 data: URL in message 1, got: ",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO@w0K"}}],
                }
            ],
            "expected a base64 data: URL in message 1, got: ",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,"}]}],
            "expected a base64 data: URL in message 1, got: ",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}],
            "expected the parts of message 1 to be text, or images like ",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": "https://example.com"}]}],
            "message 1 has an image; only messages of the user",
        ),
        (
            [{"role": "user", "content": "a", "name": "bob"}],
            "lbr does not send these fields of message 1: 'name'; remove them",
        ),
    ],
)
async def test_messages_that_cannot_be_sent_fail_for_good(
    monkeypatch: pytest.MonkeyPatch, messages: Any, message: Any
) -> None:
    """A message that is not understood fails its job, and nothing is sent."""
    with Scripted(200, completion()) as server:
        with pytest.raises(CallError) as caught:
            await ask(server.url, monkeypatch, request(messages=messages))
        assert server.asked == []
    assert (caught.value.family, str(caught.value)[: len(message)]) == (Family.PERMANENT, message)


async def test_a_bad_answer_is_shown_with_the_validators_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider sees its answer that did not fit and why."""
    bad = BadTry(text='{"a": 1}', message="$: 'b' is a required property")
    sent = await asked_for(monkeypatch, request("p", schema=SCHEMA, last_bad=bad, instructions="i"))
    assert sent["messages"] == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": '{"a": 1}'},
        {
            "role": "user",
            "content": "That answer does not fit what was asked for: $: 'b' is a required property\n"
            "Give a corrected answer.",
        },
    ]


@pytest.mark.parametrize(
    ("name", "mode"), [(MODEL, "native"), ("deepseek:deepseek-chat", "tool"), ("snowflake:x", "prompted")]
)
def test_the_output_mode_follows_the_models_profile(name: Any, mode: Any) -> None:
    """A provider's own schema support goes first, then a tool, then words."""
    provider, _, model = name.partition(":")
    profile = infer_provider_class(provider).model_profile(model)
    assert output_mode(profile or {}) == mode


async def test_a_schema_is_sent_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider gets the schema as its response format."""
    sent = await asked_for(monkeypatch, request(schema={"properties": {"a": {"type": "integer"}}}))
    assert sent["response_format"]["type"] == "json_schema"
    assert sent["response_format"]["json_schema"]["name"] == "answer"
    assert sent["response_format"]["json_schema"]["schema"]["type"] == "object"


ORDERED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "answer": {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "string"}}},
    },
    "required": ["reasoning", "answer"],
}


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (MODEL, "OPENAI"),
        ("openai:gpt-4o", "OPENAI"),
        ("openrouter:meta/ok", "OPENROUTER"),
        ("ollama:x", "OLLAMA"),
        ("anthropic:claude-sonnet-4-0", "ANTHROPIC"),
        ("google:gemini-2.5-flash", "GOOGLE"),
    ],
)
async def test_a_schema_keeps_its_order(monkeypatch: pytest.MonkeyPatch, name: str, variable: str) -> None:
    """Every provider gets the fields in the order of the class or file."""
    with Scripted(200, "{}") as server:
        url = "GOOGLE_GEMINI_BASE_URL" if variable == "GOOGLE" else f"{variable}_BASE_URL"
        monkeypatch.setenv(f"{variable}_API_KEY", KEY)
        monkeypatch.setenv(url, server.url)
        task = Task.from_json(Task(model=name, schema=ORDERED).to_json())
        model = build_model(task, Authority(), concurrency=1)
        with pytest.raises(CallError):
            await model.answer(Request(prompt=Prompt(text="p"), task=task, job_id=JobId(1), seq=1))
        await model.aclose()
    text = json.dumps(server.asked[0])
    places = [text.index(f'"{field}": {{') for field in ("reasoning", "answer", "z", "a")]
    assert places == sorted(places)


async def test_a_body_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into the body as it is, such as a schema of vLLM's, keeps its order."""
    sent = await asked_for(monkeypatch, None, settings={"extra_body": {"guided_json": ORDERED, "a": 1}})
    assert json.dumps(sent["guided_json"]) == json.dumps(ORDERED)


@pytest.mark.parametrize("schema", [None, SCHEMA])
@pytest.mark.parametrize("name", [MODEL, "ollama:x", "openrouter:a/b"])
async def test_max_tokens_has_the_name_that_other_servers_know(
    monkeypatch: pytest.MonkeyPatch, name: str, schema: Any
) -> None:
    """Whatever adapter words the request; a limit in the body goes before the setting."""
    for settings, limit in (({"max_tokens": 7}, 7), ({"max_tokens": 7, "extra_body": {"max_tokens": 9}}, 9)):
        with Scripted(200, completion('{"a": 1, "b": ""}')) as server:
            for variable in ("OPENAI", "OLLAMA", "OPENROUTER"):
                monkeypatch.setenv(f"{variable}_BASE_URL", server.url)
                monkeypatch.setenv(f"{variable}_API_KEY", KEY)
            task = Task(model=name, settings=settings, schema=schema)
            model = build_model(task, Authority(), concurrency=1)
            await model.answer(Request(prompt=Prompt(text="p"), task=task, job_id=JobId(1), seq=1))
            await model.aclose()
        (sent,) = server.asked
        assert (sent.get("max_tokens"), sent.get("max_completion_tokens")) == (limit, None)


# --- before any call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        MODEL,
        "openai:gpt-5",
        "openrouter:google/gemini-2.5-flash",
        "deepseek:x",
        "ollama:x",
        "gateway/openai:gpt-5",
    ],
)
def test_known_models_pass_without_a_key(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    """A model can be enqueued where there is no key."""
    monkeypatch.delenv("OPENAI_API_KEY")
    check_task(Task(model=name, settings={"temperature": 0.5, "max_tokens": 10}, schema=SCHEMA))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "openai-chta:gpt-4o",
            "cannot use model 'openai-chta:gpt-4o': Unknown model: openai-chta:gpt-4o. Did you mean '",
        ),
        ("nobody:x", "cannot use model 'nobody:x': Unknown model: nobody:x"),
        (
            "openrouter:x",
            "cannot use model 'openrouter:x': OpenRouter model names must be prefixed with the upstream",
        ),
    ],
)
def test_unknown_models_are_refused(name: Any, message: Any) -> None:
    """A model that does not exist is refused, with pydantic-ai's suggestion where it has one."""
    for refuse in (lambda: check_model(name, {}), lambda: PydanticAIModel(name, task_settings={})):
        with pytest.raises(UsageError) as caught:
            refuse()
        assert str(caught.value)[: len(message)] == message


def test_a_provider_without_language_models_is_refused() -> None:
    """A provider that pydantic-ai knows for other things than text is refused when it is enqueued."""
    with pytest.raises(UsageError, match="Unknown model: elevenlabs:x"):
        check_model("elevenlabs:x", {})


@pytest.mark.parametrize(
    ("provider", "package", "extra"),
    [("anthropic", "anthropic", "pydantic-ai-slim[anthropic]"), ("xai", "xai_sdk", "pydantic-ai-slim[xai]")],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, provider: Any, package: Any, extra: Any
) -> None:
    """A provider whose package is missing says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"pydantic_ai.providers.{provider}", raising=False)
    with pytest.raises(UsageError) as caught:
        check_model(f"{provider}:x", {})
    assert str(caught.value).startswith(f"cannot use model '{provider}:x': ImportError: Please install")
    assert f'pip install "{extra}"' in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, "the setting temperature cannot be 'hot': Input should be a valid number"),
        ({"max_tokens": 1.5}, "the setting max_tokens cannot be 1.5: Input should be a valid integer"),
        *(
            ({"timeout": seconds}, f"the setting timeout cannot be {seconds}: expected seconds above 0")
            for seconds in (0, -5, -0.5)
        ),
        ({"max_retries": 1}, "the setting max_retries cannot be set: lbr retries by itself"),
        (
            {"extra_headers": {"X": "y"}},
            "the setting extra_headers cannot be set: settings are stored in the database",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, message: Any) -> None:
    """A setting that pydantic-ai does not know, and one that lbr keeps for itself, is refused."""
    with pytest.raises(UsageError) as caught:
        check_model(MODEL, settings)
    assert str(caught.value)[: len(message)] == message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            MODEL,
            {
                "timeout": 30,
                "stop_sequences": ["x"],
                "extra_body": {"a": 1},
                "openai_reasoning_effort": "low",
            },
        ),
        ("openai:gpt-5", {"openai_reasoning_summary": "auto", "service_tier": "flex", "thinking": "high"}),
        ("openrouter:a/b", {"openrouter_models": ["c/d"], "top_p": 1}),
        ("system-one:x", {"anything": "goes where the model cannot be asked"}),
    ],
)
def test_a_models_own_settings_pass(name: Any, settings: Any) -> None:
    """The settings of a provider are known beside those of all."""
    check_model(name, settings)


IN_BODY = """send it with --set 'extra_body={"%s": %s}' if the server takes it"""


@pytest.mark.parametrize(
    ("name", "setting", "value", "hint"),
    [
        (MODEL, "top_k", 20, IN_BODY % ("top_k", 20)),
        ("openrouter:meta/ok", "top_k", 20, IN_BODY % ("top_k", 20)),
        (
            MODEL,
            "thinking",
            False,
            "use openai_reasoning_effort, or what the server knows, for example --set",
        ),
        ("openai-chat:gpt-5", "temperature", 0.2, IN_BODY % ("temperature", 0.2)),
        (MODEL, "tool_choice", "none", "leave it out"),
        ("vllm:x", "temprature", 1, "did you mean 'temperature'?"),
        ("azure:gpt-4o", "temprature", 1, "did you mean 'temperature'?"),
        (MODEL, "first_event_timeout", 3, "leave it out"),
        (MODEL, "openai_continuous_usage_stats", True, "leave it out"),
        (MODEL, "citations", True, "leave it out"),
        (MODEL, "cache", True, "leave it out"),
        (MODEL, "openai_include_raw_annotations", True, "leave it out"),
        (MODEL, "openai_include_unmapped_response_data", True, "leave it out"),
        ("openai:gpt-4o", "cache", True, "leave it out"),
        ("openai:gpt-4o", "openai_prediction", {"type": "content", "content": "x"}, "leave it out"),
        ("anthropic:claude-sonnet-4-0", "citations", True, "leave it out"),
        ("anthropic:claude-sonnet-4-0", "service_tier", "flex", "leave it out"),
        ("openai:gpt-4o", "stop_sequences", ["#"], "leave it out"),
        ("anthropic:claude-sonnet-4-0", "seed", 1, "leave it out"),
        ("anthropic:claude-sonnet-4-0", "frequency_penalty", 1.0, "leave it out"),
        ("anthropic:claude-sonnet-4-0", "presence_penalty", 1.0, "leave it out"),
        ("anthropic:claude-sonnet-4-0", "logit_bias", {"1": 1}, "leave it out"),
        ("anthropic:claude-opus-4-8", "temperature", 0.2, "leave it out"),
        ("google:gemini-2.5-flash", "logit_bias", {"1": 1}, "leave it out"),
        ("google:gemini-2.5-flash", "extra_body", {"a": 1}, "leave it out"),
    ],
)
def test_settings_that_are_not_sent_are_named(name: str, setting: str, value: Any, hint: str) -> None:
    """What a model's adapter drops in silence is found before any call, with the way to send it if there is one."""
    (problem,) = unsent(Task(model=name, settings={setting: value}))
    assert problem.startswith(f"the setting {setting} is not sent to model {name!r}; {hint}")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            MODEL,
            {"temperature": 0.2, "seed": 1, "max_tokens": 5, "stop_sequences": ["#"], "logit_bias": {"1": 1}},
        ),
        (MODEL, {"extra_body": {"top_k": 20, "n": 1, "logprobs": False}, "openai_logprobs": False}),
        ("openrouter:meta/ok", {"thinking": "low", "seed": 1}),
        ("openai-chat:gpt-5", {"openai_reasoning_effort": "low"}),
        ("anthropic:claude-sonnet-4-0", {"thinking": False}),
        ("openai-chat:gpt-5.1", {"temperature": 0.2}),
        ("openai-chat:gpt-5.6", {"temperature": 0.2, "openai_reasoning_effort": "none"}),
        ("anthropic:claude-sonnet-4-0", {"top_k": 20, "thinking": True, "extra_body": {"a": 1}}),
        ("google:gemini-2.5-flash", {"top_k": 20, "seed": 1, "presence_penalty": 0.1, "thinking": True}),
        (MODEL, {"openai_prediction": {"type": "content", "content": "x"}, "service_tier": "flex"}),
        ("anthropic:claude-sonnet-4-0", {"cache": True, "service_tier": "auto"}),
        ("offline:echo", {"seed": 1}),
    ],
)
def test_settings_that_are_sent_pass(name: str, settings: Any) -> None:
    """What reaches the provider is not refused."""
    assert unsent(Task(model=name, settings=settings)) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            MODEL,
            {"openai_logprobs": True},
            "the setting openai_logprobs cannot be set: lbr does not keep log",
        ),
        (
            MODEL,
            {"openai_top_logprobs": 3},
            "the setting openai_top_logprobs cannot be set: lbr does not keep",
        ),
        (
            MODEL,
            {"extra_body": {"logprobs": True}},
            "the setting logprobs cannot be set: lbr does not keep log",
        ),
        ("google:gemini-2.5-flash", {"google_logprobs": True}, "the setting google_logprobs cannot be set"),
        (MODEL, {"extra_body": {"n": 3}}, "the setting n cannot be set: lbr keeps one answer per call"),
    ],
)
def test_what_lbr_would_drop_is_refused(name: str, settings: Any, message: str) -> None:
    """Nothing is paid for that no answer would show."""
    (problem,) = unsent(Task(model=name, settings=settings))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        (
            "temprature",
            1,
            "the setting temprature is not sent to model 'openai-chat:gpt-4o-mini'; did you mean 'temperature'?",
        ),
        ("openrouter_models", ["a"], "the setting openrouter_models is not sent"),
        ("stop", ["#"], "did you mean 'stop_sequences'?"),
        ("max_completion_tokens", 5, "did you mean 'max_tokens'?"),
        ("reasoning_effort", "low", "did you mean 'openai_reasoning_effort'?"),
        ("min_p", 0.05, IN_BODY % ("min_p", 0.05)),
        ("repetition_penalty", 1.1, IN_BODY % ("repetition_penalty", 1.1)),
        ("logprobs", True, "the setting logprobs cannot be set"),
        ("n", 2, "the setting n cannot be set"),
    ],
)
def test_settings_have_the_right_name_beside_them(setting: str, value: Any, hint: str) -> None:
    """A misspelled name, another API's, and one that only some servers know are refused with what to do instead."""
    (problem,) = unsent(Task(model=MODEL, settings={setting: value}))
    assert hint in problem


@pytest.mark.parametrize(
    ("schema", "passes"),
    [
        (SCHEMA, True),
        ({"properties": {"a": {}}}, True),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object"}}}, True),
        ({"$ref": "#/$defs/b", "$defs": {"b": {"$ref": "#/$defs/n"}, "n": {"type": "object"}}}, True),
        ({"$ref": "#/allOf/0", "allOf": [{"type": "object"}]}, False),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}, False),
        ({"type": "array"}, False),
        ({"type": ["object", "null"]}, False),
        ({"anyOf": [{"type": "object"}]}, False),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "string"}}}, False),
    ],
)
def test_a_schema_has_an_object_at_its_top(schema: Any, passes: Any) -> None:
    """Providers want an object; anything else is refused before it costs a call."""
    with contextlib.nullcontext() if passes else pytest.raises(UsageError, match="with an object at its top"):
        check_task(Task(model=MODEL, schema=schema))


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (MODEL, "OPENAI_API_KEY"),
        ("openai:gpt-5", "OPENAI_API_KEY"),
        ("openrouter:a/b", "OPENROUTER_API_KEY"),
        ("deepseek:x", "DEEPSEEK_API_KEY"),
    ],
)
def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch, name: Any, variable: Any) -> None:
    """A worker without the key says which environment variable to set."""
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError) as caught:
        build_model(Task(model=name), Authority(), concurrency=1)
    assert str(caught.value) == f"model {name!r} needs a key: set the environment variable {variable}"


async def test_one_client_serves_all_calls_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of a model go through one HTTP client, which closing closes, used or not."""
    with Scripted(200, completion()) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        async with opened() as model:
            client = model._model.client._client
            for _ in range(3):
                await model.answer(request())
            assert model._model.client._client is client
            assert not client.is_closed
        assert client.is_closed
        async with opened():
            pass
    assert len(server.asked) == 3
