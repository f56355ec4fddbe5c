"""What providers send when a call fails, over HTTP, with the family, wait and message of each."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr.core.errors import CallError, Family, Symptom
from lbr.core.retry import failure_of, is_overload
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.failures import call_error
from lbr.models.pydantic_ai import PydanticAIModel
from tests.support.http_server import Scripted

OPENAI = "openai-chat:gpt-4o-mini"
RESPONSES = "openai:gpt-4o-mini"
OPENROUTER = "openrouter:google/gemini-2.5-flash"
ANTHROPIC = "anthropic:claude-of-this-test"
GOOGLE = "google:gemini-2.5-flash"
OLLAMA = "ollama:llama3.2"

ACCOUNT, LIMITED = Family.ACCOUNT, Family.RATE_LIMITED
DENIED = Symptom.DENIED
"""Permanent for one job, unless the other calls are denied too."""
PERMANENT, TRANSIENT = Family.PERMANENT, Family.TRANSIENT
BAD, CUT_OFF = Family.BAD_ANSWER, Family.CUT_OFF


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every provider a key, and no URL but the one of the test."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    for provider in ("OPENAI", "OPENROUTER", "ANTHROPIC", "GOOGLE"):
        monkeypatch.setenv(f"{provider}_API_KEY", "a-key-of-this-test")


async def fail(monkeypatch: pytest.MonkeyPatch, model: str, server: Any) -> CallError:
    """Ask a model at a server that does not answer well; return how it failed."""
    root = server.url.removesuffix("/v1")
    for name, url in {
        "OPENAI_BASE_URL": server.url,
        "OPENROUTER_BASE_URL": server.url,
        "OLLAMA_BASE_URL": server.url,
        "ANTHROPIC_BASE_URL": root,
        "GOOGLE_GEMINI_BASE_URL": root,
    }.items():
        monkeypatch.setenv(name, url)
    asked = Request(prompt=Prompt(text="hello"), task=Task(model=model), job_id=JobId(1), seq=1, timeout=30)
    built = PydanticAIModel(model, task_settings={})
    try:
        with pytest.raises(CallError) as caught:
            await built.answer(asked)
    finally:
        await built.aclose()
    assert len(server.asked) == 1, "one call is one request"
    return caught.value


def openai(message: str, type_: Any = None, code: Any = None) -> dict[str, Any]:
    """Return an error as OpenAI words it."""
    return {"error": {"message": message, "type": type_, "param": None, "code": code}}


def anthropic(type_: str, message: str) -> dict[str, Any]:
    """Return an error as Anthropic words it."""
    return {"type": "error", "error": {"type": type_, "message": message}, "request_id": "req_011"}


def google(code: int, status: str, message: str, *details: Any) -> dict[str, Any]:
    """Return an error as Google words it."""
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def openrouter(code: int, message: str, **metadata: Any) -> dict[str, Any]:
    """Return an error as OpenRouter words it."""
    error: dict[str, Any] = {"code": code, "message": message}
    return {"error": error | ({"metadata": metadata} if metadata else {}), "user_id": "user_1"}


PLAN = "You exceeded your current quota, please check your plan and billing details."
MINUTE = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
}
DAY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
}
DELAY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "14s"}
NO_DELAY = DELAY | {"retryDelay": "0s"}
KEY_INVALID = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
TOO_LONG = "This model's maximum context length is 8192 tokens. However, you requested 9001 tokens."

REFUSALS = [
    # OpenAI
    (OPENAI, 400, openai(TOO_LONG, "invalid_request_error", "context_length_exceeded"), PERMANENT),
    (RESPONSES, 400, openai(TOO_LONG, "invalid_request_error", "context_length_exceeded"), PERMANENT),
    (OPENAI, 400, openai("Invalid prompt: flagged", "invalid_request_error", "invalid_prompt"), PERMANENT),
    (OPENAI, 400, openai("Billing hard limit has been reached", "x", "billing_hard_limit_reached"), ACCOUNT),
    (OPENAI, 401, openai("Incorrect API key provided", "invalid_request_error", "invalid_api_key"), DENIED),
    (OPENAI, 403, openai("Country not supported", "request_forbidden", "unsupported_country"), DENIED),
    (
        OPENAI,
        404,
        openai("The model `x` does not exist", "invalid_request_error", "model_not_found"),
        PERMANENT,
    ),
    (OPENAI, 429, openai("Rate limit reached for gpt-4o-mini", "requests", "rate_limit_exceeded"), LIMITED),
    (OPENAI, 429, openai("Request too large for gpt-4o-mini", "tokens", "rate_limit_exceeded"), PERMANENT),
    (OPENAI, 429, openai(PLAN, "insufficient_quota", "insufficient_quota"), ACCOUNT),
    (RESPONSES, 429, openai(PLAN, "insufficient_quota", "insufficient_quota"), ACCOUNT),
    (OPENAI, 429, openai(PLAN), ACCOUNT),
    (OPENAI, 500, openai("The server had an error", "server_error"), TRANSIENT),
    (OPENAI, 503, openai("The engine is currently overloaded", "server_error"), LIMITED),
    (OPENAI, 500, openai("Overloaded", "engine_overloaded_error"), LIMITED),
    # Anthropic
    (
        ANTHROPIC,
        400,
        anthropic("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"),
        PERMANENT,
    ),
    (ANTHROPIC, 400, anthropic("invalid_request_error", "Your credit balance is too low"), ACCOUNT),
    (
        ANTHROPIC,
        400,
        anthropic("invalid_request_error", "You have reached your specified API usage limits."),
        ACCOUNT,
    ),
    (ANTHROPIC, 401, anthropic("authentication_error", "invalid x-api-key"), DENIED),
    (ANTHROPIC, 402, anthropic("billing_error", "There is an issue with your billing"), ACCOUNT),
    (ANTHROPIC, 403, anthropic("permission_error", "Your key may not use this"), DENIED),
    (ANTHROPIC, 404, anthropic("not_found_error", "model: claude-none"), PERMANENT),
    (ANTHROPIC, 413, anthropic("request_too_large", "Request exceeds the maximum size"), PERMANENT),
    (ANTHROPIC, 429, anthropic("rate_limit_error", "This would exceed your rate limit"), LIMITED),
    (ANTHROPIC, 500, anthropic("api_error", "Internal server error"), TRANSIENT),
    (ANTHROPIC, 529, anthropic("overloaded_error", "Overloaded"), LIMITED),
    # Google
    (GOOGLE, 400, google(400, "INVALID_ARGUMENT", "API key not valid.", KEY_INVALID), DENIED),
    (
        GOOGLE,
        400,
        google(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum"),
        PERMANENT,
    ),
    (GOOGLE, 400, google(400, "FAILED_PRECONDITION", "Please enable billing on your project"), ACCOUNT),
    (GOOGLE, 403, google(403, "PERMISSION_DENIED", "Your key was reported as leaked"), DENIED),
    (GOOGLE, 404, google(404, "NOT_FOUND", "models/x is not found for API version v1beta"), PERMANENT),
    (GOOGLE, 429, google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, DELAY), LIMITED),
    (GOOGLE, 429, google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, NO_DELAY), LIMITED),
    (OPENAI, 429, [google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, NO_DELAY)], LIMITED),
    (GOOGLE, 429, google(429, "RESOURCE_EXHAUSTED", PLAN, DAY, DELAY), ACCOUNT),
    (OPENAI, 429, [google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, DELAY)], LIMITED),
    (GOOGLE, 500, google(500, "INTERNAL", "An internal error has occurred"), TRANSIENT),
    (GOOGLE, 503, google(503, "UNAVAILABLE", "The model is overloaded"), LIMITED),
    (GOOGLE, 504, google(504, "DEADLINE_EXCEEDED", "Deadline expired"), TRANSIENT),
    # OpenRouter, and what it says in a 200
    (OPENROUTER, 400, openrouter(400, "This endpoint's maximum context length is 8192 tokens"), PERMANENT),
    (OPENROUTER, 401, openrouter(401, "No auth credentials found"), DENIED),
    (OPENROUTER, 402, openrouter(402, "Insufficient credits"), ACCOUNT),
    (
        OPENROUTER,
        403,
        openrouter(403, "Input was flagged", reasons=["violence"], flagged_input="…", provider_name="OpenAI"),
        PERMANENT,
    ),
    (OPENROUTER, 404, openrouter(404, "No endpoints found for x/y"), PERMANENT),
    (OPENROUTER, 408, openrouter(408, "Timed out"), TRANSIENT),
    (OPENROUTER, 429, openrouter(429, "Rate limit exceeded: free-models-per-min."), LIMITED),
    (OPENROUTER, 429, openrouter(429, "Rate limit exceeded: free-models-per-day. Add 10 credits"), ACCOUNT),
    (OPENROUTER, 429, openrouter(429, "Provider returned error", raw="busy upstream"), LIMITED),
    (OPENROUTER, 502, openrouter(502, "Provider returned error", raw="upstream"), TRANSIENT),
    (OPENROUTER, 503, openrouter(503, "No available model provider"), LIMITED),
    (OPENROUTER, 200, openrouter(429, "Rate limited upstream"), LIMITED),
    (OPENROUTER, 200, openrouter(402, "Insufficient credits"), ACCOUNT),
    (OPENROUTER, 200, openrouter(502, "Provider returned error"), TRANSIENT),
    # vLLM, llama.cpp and Ollama
    (
        OPENAI,
        400,
        {"object": "error", "message": TOO_LONG, "type": "BadRequestError", "code": 400},
        PERMANENT,
    ),
    (
        OPENAI,
        404,
        {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404},
        PERMANENT,
    ),
    (
        OPENAI,
        500,
        {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}},
        TRANSIENT,
    ),
    (
        OPENAI,
        503,
        {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
        LIMITED,
    ),
    (
        OPENAI,
        400,
        {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 4096}},
        PERMANENT,
    ),
    (OLLAMA, 404, openai('model "llama9" not found, try pulling it first', "not_found_error"), PERMANENT),
    (OLLAMA, 500, openai("llama runner process has terminated", "api_error"), TRANSIENT),
    (OLLAMA, 503, openai("server busy, please try again. maximum pending requests exceeded"), LIMITED),
    # Others that speak OpenAI's language
    (OPENAI, 402, openai("Insufficient Balance", "unknown_error", "invalid_request_error"), ACCOUNT),
    (
        OPENAI,
        413,
        openai("Request too large for model on tokens per minute", "tokens", "rate_limit_exceeded"),
        PERMANENT,
    ),
    (
        OPENAI,
        429,
        {"error": "Your team has either used all available credits or reached its limit."},
        ACCOUNT,
    ),
    (OPENAI, 425, openai("Too early"), TRANSIENT),
    (OPENAI, 524, "error code: 524", TRANSIENT),
]


@pytest.mark.parametrize(
    ("model", "status", "body", "family"),
    REFUSALS,
    ids=[f"{m.split(':')[0]}-{s}-{f}-{n}" for n, (m, s, _, f) in enumerate(REFUSALS)],
)
async def test_what_providers_really_say(
    monkeypatch: pytest.MonkeyPatch, model: str, status: int, body: Any, family: Family | Symptom
) -> None:
    """Each real refusal is in its family, and says about other calls what it may; overload is told apart."""
    with Scripted(status, json.dumps(body)) as server:
        error = await fail(monkeypatch, model, server)
    assert error.family is (PERMANENT if family is DENIED else family), str(error)
    denied = Symptom.FORBIDDEN if status == 403 else DENIED
    assert (error.symptom is denied) is (family is DENIED)
    assert error.symptom is Symptom.SERVER_ERROR or status < 500
    overloaded = family is LIMITED or status in {408, 503, 504, 524, 529}
    assert is_overload(failure_of(error)) is overloaded
    assert str(error)


@pytest.mark.parametrize(
    ("model", "status", "body"),
    [
        (OPENAI, 429, openai("No capacity", "resource_unavailable", "resource_unavailable")),
        (RESPONSES, 429, openai("No capacity", "invalid_request_error", "resource_unavailable")),
        (
            OPENAI,
            429,
            openai("Resource unavailable. Please try again.", "requests", "rate_limit_exceeded"),
        ),  # of a relay
        (OPENAI, 498, openai("Flex tier capacity exceeded", "capacity_exceeded", None)),  # Groq
    ],
)
async def test_a_lack_of_flex_capacity_is_no_overload(
    monkeypatch: pytest.MonkeyPatch, model: str, status: int, body: Any
) -> None:
    """It is waited out, but it is no reason to make fewer calls, and resets of limits do not end it."""
    with Scripted(status, json.dumps(body), {"x-ratelimit-reset-tokens": "6m0s"}) as server:
        error = await fail(monkeypatch, model, server)
    assert (error.family, error.symptom, error.retry_after) == (LIMITED, Symptom.NO_CAPACITY, None)
    assert error.kind == "FlexUnavailable"
    assert not is_overload(failure_of(error))


def chat(content: Any, finish: str, **message: Any) -> dict[str, Any]:
    """Return a chat completion."""
    message = {"role": "assistant", "content": content, **message}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


NO_CHOICES = chat("x", "stop") | {"choices": []}


def candidate(reason: str, *texts: str) -> dict[str, Any]:
    """Return an answer of Google."""
    parts = [{"text": text} for text in texts]
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": reason, "index": 0}]}


def message(reason: str, *texts: str) -> dict[str, Any]:
    """Return an answer of Anthropic."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": text} for text in texts],
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }


BROKEN = [
    (OPENAI, chat("I can", "content_filter"), PERMANENT, "I can"),
    (OPENAI, chat(None, "stop", refusal="I cannot help with that."), PERMANENT, "I cannot help with that."),
    (OPENAI, chat("", "stop"), BAD, None),
    (OPENAI, chat("", "length"), CUT_OFF, None),
    (OPENAI, chat("The half of an ans", "abort"), TRANSIENT, "The half of an ans"),
    (ANTHROPIC, message("max_tokens"), CUT_OFF, None),
    (GOOGLE, candidate("MAX_TOKENS"), CUT_OFF, None),
    (OPENROUTER, chat("The half of an ans", "error"), TRANSIENT, "The half of an ans"),
    (ANTHROPIC, message("refusal"), PERMANENT, None),
    (ANTHROPIC, message("refusal", "As for"), PERMANENT, "As for"),
    (ANTHROPIC, message("end_turn"), BAD, None),
    (GOOGLE, candidate("SAFETY"), PERMANENT, None),
    (GOOGLE, candidate("RECITATION", "It was the"), PERMANENT, "It was the"),
    (GOOGLE, {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, PERMANENT, None),
    (GOOGLE, candidate("STOP"), BAD, None),
    (GOOGLE, {}, BAD, None),
    (OPENAI, {"error": {"message": "upstream", "code": 502}}, TRANSIENT, None),
]


@pytest.mark.parametrize(("model", "body", "family", "text"), BROKEN)
async def test_an_answer_that_is_none(
    monkeypatch: pytest.MonkeyPatch, model: str, body: Any, family: Family, text: Any
) -> None:
    """A filtered answer fails for good with what it said, an empty or broken one for now."""
    with Scripted(200, json.dumps(body)) as server:
        error = await fail(monkeypatch, model, server)
    assert error.family is family, str(error)
    if text is None and "error" not in body:  # what came in its place
        assert isinstance(json.loads(error.text or ""), dict | list)
    else:
        assert error.text == text
    assert not is_overload(failure_of(error))


@pytest.mark.parametrize(
    ("model", "body", "family", "said"),
    [
        (OPENAI, openrouter(402, "Insufficient credits"), ACCOUNT, "Insufficient credits (HTTP 402)"),
        (OPENAI, openrouter(429, "Rate limited upstream"), LIMITED, "Rate limited upstream (HTTP 429)"),
        (OPENAI, openrouter(400, "Too long"), PERMANENT, "Too long (HTTP 400)"),
        (OPENAI, openai("Out of memory", "x", "oom"), TRANSIENT, "Out of memory"),
        (OPENAI, {"error": "out of order"}, TRANSIENT, "out of order"),
        (OPENAI, NO_CHOICES, BAD, "expected an answer, got: JSON without one"),
        (OPENROUTER, NO_CHOICES | {"provider": "Google"}, BAD, "expected an answer, got: JSON without one"),
    ],
)
async def test_an_error_inside_a_200_keeps_its_words(
    monkeypatch: pytest.MonkeyPatch, model: str, body: Any, family: Family, said: str
) -> None:
    """Relays send errors so, each with its own code; an answer without choices is none."""
    with Scripted(200, json.dumps(body)) as server:
        error = await fail(monkeypatch, model, server)
    assert error.family is family
    assert said in str(error)


async def test_words_of_a_server_cannot_move_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters become spaces: messages are shown by workers and by lbr status."""
    with Scripted(400, json.dumps(openai("no \x1b[2J\x9b1m\x00\x7f this"))) as server:
        error = await fail(monkeypatch, OPENAI, server)
    assert str(error) == "no [2J 1m this (HTTP 400)"


async def test_odd_counts_are_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's rubbish is not answered with a line of a library's code on the terminal."""
    usage = {"prompt_tokens": -10, "completion_tokens": 1, "total_tokens": 1}
    with Scripted(200, json.dumps(chat("fine", "stop") | {"usage": usage})) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        asked = Request(prompt=Prompt(text="hello"), task=Task(model=OPENAI), job_id=JobId(1), seq=1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PydanticAIModel(OPENAI, task_settings={})
            assert (await model.answer(asked)).text == "fine"
        await model.aclose()
    assert told == []


@pytest.mark.parametrize("model", [OPENAI, RESPONSES, OPENROUTER, ANTHROPIC, GOOGLE])
@pytest.mark.parametrize("body", ["", "<html>", '{"id": "c1", "cho', "null", "[]"])
async def test_a_body_that_is_no_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, model: str, body: str
) -> None:
    """Truncated JSON, HTML and nothing at all may be well the next time."""
    with Scripted(200, body) as server:
        error = await fail(monkeypatch, model, server)
    is_empty = model == GOOGLE or (model in {OPENAI, OPENROUTER} and body in {"null", "[]"})
    assert error.family is TRANSIENT or (is_empty and error.family is BAD), str(error)


AZURE = {
    "innererror": {
        "code": "ResponsibleAIPolicyViolation",
        "content_filter_result": {
            "hate": {"filtered": False, "severity": "safe"},
            "violence": {"filtered": True, "severity": "medium"},
        },
    }
}
RATINGS = [
    {"category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH", "blocked": True},
    {"category": "HARM_CATEGORY_HATE_SPEECH", "probability": "NEGLIGIBLE"},
]
FILTERED: list[tuple[str, int, Any, str]] = [
    (
        OPENAI,
        400,
        {"error": openai("The response was filtered", None, "content_filter")["error"] | AZURE},
        "The response was filtered; content filter: violence (medium) (HTTP 400)",
    ),
    (
        OPENROUTER,
        403,
        openrouter(403, "Input was flagged", reasons=["violence"], flagged_input="x"),
        "Input was flagged; content filter: violence (HTTP 403)",
    ),
    (
        GOOGLE,
        200,
        {"promptFeedback": {"blockReason": "SAFETY", "safetyRatings": RATINGS}},
        "the provider refused to answer: no text; content filter: SAFETY, HARM_CATEGORY_HARASSMENT (high)",
    ),
    (
        GOOGLE,
        200,
        {"candidates": [candidate("SAFETY")["candidates"][0] | {"safetyRatings": RATINGS}]},
        "the provider refused to answer: no text; SAFETY; content filter: HARM_CATEGORY_HARASSMENT (high)",
    ),
]


@pytest.mark.parametrize(("model", "status", "body", "words"), FILTERED)
async def test_a_content_filter_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch, model: str, status: int, body: Any, words: str
) -> None:
    """The message names the category and the severity, wherever the provider puts them."""
    with Scripted(status, json.dumps(body)) as server:
        error = await fail(monkeypatch, model, server)
    assert (error.family, error.kind, str(error)) == (PERMANENT, "ContentFilterError", words)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<html><head><title>502 Bad\nGateway</title></head>" + "<p>" * 900 + "</html>", "502 Bad Gateway (HTTP 502)"),
        ("<!DOCTYPE html>\n<html>" + "<div class='x'>\n" * 200 + "Out &amp; about</html>", "Out & about (HTTP 502)"),
        ("<html><style>p {}</style><script>x</script></html>", "an HTML page without text (HTTP 502)"),
        ("x" * 2000, "x" * 488 + "… (HTTP 502)"),
    ],
)  # fmt: skip
async def test_a_page_does_not_hide_the_status(monkeypatch: pytest.MonkeyPatch, page: str, words: str) -> None:
    """Of an HTML page the title or the text is in the message, and the status is seen behind however much."""
    with Scripted(502, page) as server:
        error = await fail(monkeypatch, OPENAI, server)
    assert (error.family, str(error)) == (TRANSIENT, words)


LENIENT: dict[str, Any] = {
    "no id": {k: v for k, v in chat("fine", "stop").items() if k != "id"},
    "no object, no model": {k: v for k, v in chat("fine", "stop").items() if k not in {"object", "model"}},
    "a fraction in created": chat("fine", "stop") | {"created": 1.5},
    "no role": chat("fine", "stop", role=None),
    "no index": chat("fine", "stop")
    | {"choices": [{"finish_reason": "", "message": {"content": [{"type": "text", "text": "fine"}]}}]},
    "half a usage": chat("fine", "stop") | {"usage": {"total_tokens": 5}},
}


@pytest.mark.parametrize("case", LENIENT)
async def test_only_the_text_of_a_chat_completion_is_required(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """pydantic-ai's adapter too reads an answer whose envelope is odd."""
    with Scripted(200, json.dumps(LENIENT[case])) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        asked = Request(prompt=Prompt(text="hello"), task=Task(model=OPENAI), job_id=JobId(1), seq=1)
        model = PydanticAIModel(OPENAI, task_settings={})
        reply = await model.answer(asked)
        await model.aclose()
    assert reply.text == "fine"
    assert reply.usage.input_tokens == (5 if case == "half a usage" else 3)


async def test_a_chat_completion_that_cannot_be_read_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came and its tokens are in the error."""
    with Scripted(200, json.dumps(chat(5, "stop"))) as server:
        error = await fail(monkeypatch, OPENAI, server)
    assert (error.family, error.kind) == (BAD, "EmptyAnswer")
    assert json.loads(error.text or "") == chat(5, "stop") | {"choices": json.loads(error.text or "")["choices"]}
    assert (error.usage.input_tokens, error.usage.output_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("model", "headers", "body", "least", "most"),
    [
        (
            OPENAI,
            {
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            openai("Rate limit reached", "tokens", "rate_limit_exceeded"),
            360,
            360,
        ),
        (
            ANTHROPIC,
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2999-01-01T00:00:00Z",
            },
            anthropic("rate_limit_error", "slow down"),
            1e9,
            4e10,
        ),
        (ANTHROPIC, {"retry-after": "12"}, anthropic("rate_limit_error", "slow down"), 12, 12),
        (
            OPENROUTER,
            {},
            openrouter(429, "free-models-per-min", headers={"X-RateLimit-Reset": "32503680000000"}),
            1e9,
            4e10,
        ),
        (GOOGLE, {}, google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, DELAY), 14, 14),
        (OPENAI, {}, [google(429, "RESOURCE_EXHAUSTED", PLAN, MINUTE, DELAY)], 14, 14),
    ],
)
async def test_the_wait_of_a_429(
    monkeypatch: pytest.MonkeyPatch, model: str, headers: Any, body: Any, least: float, most: float
) -> None:
    """The wait comes from where each provider puts it."""
    with Scripted(429, json.dumps(body), headers) as server:
        error = await fail(monkeypatch, model, server)
    assert error.family is LIMITED
    assert error.retry_after is not None
    assert least <= error.retry_after <= most


async def test_resets_of_a_broken_server_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a 429 waits for the limit's reset: that header comes with every answer."""
    with Scripted(500, json.dumps(openai("oh")), {"x-ratelimit-reset-requests": "6m0s"}) as server:
        error = await fail(monkeypatch, OPENAI, server)
    assert (error.family, error.retry_after) == (TRANSIENT, None)


# --- waits -------------------------------------------------------------------------------------------------------------

NOW = 1_800_000_000.0
"""2027-01-15 08:00:00 UTC."""


def wait_of(headers: Any) -> float | None:
    """Return the wait of a 429 with these headers."""
    return call_error("", status=429, headers=headers, now=NOW).retry_after


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0),
        ({"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2),
        ({"retry-after": "2", "x-ratelimit-reset-requests": "6m0s"}, 2),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-requests": "1d2h"}, 93_600),
        ({"x-ratelimit-reset-tokens": "12"}, 12),
        ({"anthropic-ratelimit-requests-reset": "2027-01-15T08:00:12Z"}, 12),
        ({"anthropic-ratelimit-input-tokens-reset": "2027-01-15T09:00:12+01:00"}, 12),
        ({"anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:12"}, 12),
        ({"X-RateLimit-Reset": "1800000060000"}, 60),
        ({"X-RateLimit-Reset": "1800000060"}, 60),
        ({"RateLimit-Reset": "45"}, 45),
    ],
)
def test_every_way_to_name_a_wait(headers: Any, wait: Any) -> None:
    """Seconds, milliseconds, durations, dates and points in time are read, by any spelling of the header's name."""
    assert wait_of(headers) == pytest.approx(wait)


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"content-type": "application/json"},
        {"retry-after": ""},
        {"retry-after": "later"},
        {"retry-after": "-3"},
        {"retry-after": "inf"},
        {"retry-after": "nan"},
        {"retry-after": "Fri, 15 Jan 2027 07:59:30 GMT"},
        {"retry-after": "Fri, 99 Jan 2027 07:59:30 GMT"},
        {"retry-after-ms": "-1"},
        {"x-ratelimit-reset-requests": "6 minutes"},
        {"x-ratelimit-reset-requests": "6m0"},
        {"X-RateLimit-Reset": "1700000000000"},
        {"X-RateLimit-Reset": "1700000000"},
        {"anthropic-ratelimit-requests-reset": "2027-01-15T07:00:00Z"},
        {"anthropic-ratelimit-requests-reset": "0001-01-01T00:00:00+23:00"},
        {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"},
    ],
)
def test_nonsense_and_the_past_say_nothing(headers: Any) -> None:
    """What cannot be read, and what is over, is as if it were not there."""
    assert wait_of(headers) is None


def limits(**left: Any) -> dict[str, str]:
    """Return OpenAI's headers: requests are back in 2 minutes, tokens in 3 seconds."""
    resets = {"requests": "2m0s", "tokens": "3s"}
    return {f"x-ratelimit-reset-{what}": reset for what, reset in resets.items()} | {
        f"x-ratelimit-remaining-{what}": str(count) for what, count in left.items()
    }


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        (limits(), 120),
        (limits(requests=59, tokens=0), 3),
        (limits(requests=0, tokens=100), 120),
        (limits(requests=0, tokens=0), 120),
        (limits(requests=7, tokens=12), 120),
        (limits(requests="many", tokens=0), 3),
        (limits(tokens=0) | {"x-ratelimit-reset-tokens": "nonsense"}, 120),
        (
            {
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:10:00Z",
                "anthropic-ratelimit-output-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2027-01-15T08:00:04Z",
            },
            4,
        ),
        (
            {
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": "1800000009000",
                "RateLimit-Remaining": "3",
                "RateLimit-Reset": "50",
            },
            9,
        ),
    ],
)
def test_what_is_used_up_decides(headers: Any, wait: Any) -> None:
    """Only the resets of what is used up count where that is told; else the latest of all."""
    assert wait_of(headers) == pytest.approx(wait)


@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset", "anthropic-ratelimit-tokens-reset"]),
        st.one_of(
            st.text("0123456789.:-+TZmshd eE", max_size=30),
            st.floats().map(str),
            st.integers().map(str),
            st.datetimes().map(str),
        ),
    )
)
def test_no_header_can_break_it(headers: Any) -> None:
    """Whatever a server sends, the wait is a time in the future or none."""
    wait = wait_of(headers)
    assert wait is None or wait >= 0
