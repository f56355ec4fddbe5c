"""The same cases through both adapters for chat endpoints: what the server is asked, and what comes of its answer."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr.core.errors import CallError, Family, Symptom, UsageError
from lbr.core.types import BadTry, JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.build import Authority, build_model, check_task
from lbr.models.chat import ChatModel, _messages_of
from lbr.models.checks import check_environment
from lbr.models.pydantic_ai import PydanticAIModel
from lbr.worker.attempt import Deadlines, LateCalls, attempt
from tests.support.chat_wire import (
    KEY,
    MODELS,
    Script,
    Wire,
    chat_model,
    environment,
    http,
    outcome,
    reference_model,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PROVIDERS = sorted(MODELS)
DIFFERENCES: dict[str, str] = {}
"""What comes out otherwise through the chat adapter, each with the reason. While it is not empty for a provider, that
provider is not served by it."""


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    """Name a provider."""
    return str(request.param)


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Wire]:
    """Serve where all providers' calls go."""
    # Nobody is trusted where nothing is encrypted: each adapter takes 20 ms to read the system's certificates.
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    (tmp_path / "01234567.0").touch()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    found = Wire()
    async with found.open() as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        yield found


def asking(text: str = "hello", *, timeout: float | None = 30, **how: Any) -> Request:
    """Return a request."""
    messages, settings, last_bad = (how.pop(name, None) for name in ("messages", "settings", "last_bad"))
    prompt = Prompt(text=text) if messages is None else Prompt(messages=tuple(messages))
    task = Task(model="openai-chat:x", **how)
    return Request(prompt, task, JobId(1), 1, last_bad=last_bad, settings=settings, timeout=timeout)


async def both(
    wire: Wire, name: str, request: Request, *, settings: Any = None, alone: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make one call through each adapter, pydantic-ai's first; its outcome first."""
    ended = []
    for model in (
        reference_model(name, settings),
        chat_model(name, settings, request.task.schema, alone=alone),
    ):
        try:
            ended.append(await outcome(model, request))
        finally:
            await model.aclose()
    return ended[0], ended[1]


def completion(content: Any = "fine", finish: Any = "stop", **more: Any) -> dict[str, Any]:
    """Return a chat completion."""
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message, **more.pop("choice", {})}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        "provider": "Somebody",
        **more,
    }


# --- what is asked ----------------------------------------------------------------------------------------------------

PNG = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
USER = {"role": "user", "content": "u"}


def tool_call(call_id: str, arguments: str = '{"city":"Łódź"}') -> dict[str, Any]:
    """Return a tool call of an assistant's message."""
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


ASKED: dict[str, Request] = {
    "plain": asking("p"),
    "empty": asking(""),
    "unicode": asking('żółć 🦊 \u2028 \x00 " \\'),
    "instructions": asking("p", instructions="be brief"),
    "empty instructions": asking("p", instructions=""),
    "system first": asking(messages=[{"role": "system", "content": "s"}, USER], instructions="i"),
    "two systems": asking(
        messages=[{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, USER],
        instructions="i",
    ),
    "system later": asking(messages=[USER, {"role": "system", "content": "s"}, USER], instructions="i"),
    "only a system": asking(messages=[{"role": "system", "content": "s"}]),
    "system and assistant": asking(
        messages=[{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    ),
    "a talk": asking(messages=[USER, {"role": "assistant", "content": "a"}, USER, USER], instructions="i"),
    "assistant last": asking(messages=[USER, {"role": "assistant", "content": ""}]),
    "assistants": asking(messages=[USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
    "parts": asking(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": "low"}},
                    {"type": "image_url", "image_url": "https://example.com/y"},
                    {"type": "image_url", "image_url": {"url": PNG}},
                    {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
                ],
            }
        ]
    ),
    "no parts": asking(messages=[{"role": "user", "content": []}]),
    "text in parts": asking(
        messages=[USER, {"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]}]
    ),
    "tool calls": asking(
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [tool_call("a"), tool_call("b", "{}")]},
            {"role": "tool", "tool_call_id": "b", "content": "cold"},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "warm"}]},
            {"role": "assistant", "content": "warm, cold", "tool_calls": [tool_call("c")]},
            {"role": "tool", "tool_call_id": "c", "content": "", "name": "weather"},
            USER,
        ]
    ),
    "special tokens": asking("say <|im_start|>system and [INST] and <start_of_turn>"),
    "special tokens of a system": asking(
        messages=[{"role": "system", "content": "<|im_start|>"}, USER], instructions="[INST]"
    ),
    "special tokens of an assistant": asking(messages=[USER, {"role": "assistant", "content": "<|eot_id|>"}]),
    "special tokens of a bad try": asking("p", last_bad=BadTry(text="<|x|>", message="no <|y|>")),
    "special tokens in a part": asking(
        messages=[{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    ),
    "almost special": asking("a |> b, <b>, [x], ]~, <turn|>"),
    "a bad try": asking("p", last_bad=BadTry(text="x", message="not a number"), instructions="i"),
    "an empty bad try": asking("p", last_bad=BadTry(text=" ", message="not a number")),
    "a schema": asking("p", schema=SCHEMA),
    "a schema, a bad try": asking("p", schema=SCHEMA, last_bad=BadTry(text="{}", message="no"), instructions="i"),
    "a schema without type": asking("p", schema={"properties": {"a": {"minLength": 3, "type": "string"}}}),
    "a schema by reference": asking(
        "p", schema={"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {}}}}
    ),
}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.5, "max_tokens": 7, "seed": 1, "top_p": 1, "stop_sequences": ["a", "b"]},
    {"presence_penalty": 0.1, "frequency_penalty": -1, "timeout": 30},
    {"stop_sequences": [], "temperature": 0},
    {"extra_body": {"top_k": 5, "guided_json": {"type": "object"}, "temperature": 2}},
    {"logit_bias": {"5": 1}, "parallel_tool_calls": True},
    {"thinking": "low", "temperature": 0.2},
    {"service_tier": "flex"},
    {"request_timeout": 20},
]


PIECES = [*"<>|[]~/_ab!", "\uff5c", "INST", "SYSTEM_PROMPT", "TOOL_CALLS", "start_of_turn", "system", "e"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_no_special_token_is_overlooked(pieces: list[str]) -> None:
    """What pydantic-ai would break up in a prompt is left to it."""
    from pydantic_ai._special_tokens import break_special_tokens

    text = "".join(pieces)
    assert break_special_tokens(text) == text or _messages_of(asking(text)) is None


async def asked_by_both(wire: Wire, name: str, request: Request, settings: Any = None) -> None:
    """Check that both adapters ask the server for the same, with the same key, and end the same."""
    wire.script = http(200, json.dumps(completion('{"a": 1}')))
    theirs, ours = await both(wire, name, request, settings=settings)
    assert ours == theirs
    if "class" in ours:
        assert wire.asked == [], "nothing is sent that is refused"
        return
    (their_headers, their_body), (our_headers, our_body) = wire.asked
    assert our_body == their_body
    for header in ("path", "authorization", "content-type", "accept", "http-referer", "x-title"):
        assert our_headers.get(header) == their_headers.get(header), header
    assert KEY in our_headers["authorization"]
    assert "cookie" not in our_headers


@pytest.mark.parametrize("case", ASKED)
async def test_the_same_is_asked(wire: Wire, provider: str, case: str) -> None:
    """Every kind of prompt arrives at the server in the same words."""
    await asked_by_both(wire, MODELS[provider], ASKED[case])


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
@pytest.mark.parametrize("of_job", [False, True], ids=["task", "job"])
async def test_settings_arrive_the_same(wire: Wire, provider: str, settings: dict[str, Any], of_job: bool) -> None:
    """Settings of a task and those of one job, which go over them, arrive in the same words."""
    task = {"temperature": 1.0, "max_tokens": 3} if of_job else settings
    await asked_by_both(wire, MODELS[provider], asking(settings=settings if of_job else None), task)


@pytest.mark.parametrize("settings", [{"base_url": "http://x"}, {"extra_body": {"api_base": "http://x"}}])
async def test_settings_of_a_job_are_refused_the_same(wire: Wire, provider: str, settings: Any) -> None:
    """What no job may set fails it in the same words, and nothing is sent."""
    theirs, ours = await both(wire, MODELS[provider], asking(settings=settings))
    assert ours == theirs
    assert wire.asked == []


REFUSED_PROMPTS: list[Any] = [
    [],
    [{"role": "assistant", "content": "a"}],
    [USER, {"role": "tool", "content": "b"}],
    [{"content": "a"}],
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "input_audio"}]}],
    [{"role": "user", "content": ["a"]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}],
    [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO@w0K"}}],
        }
    ],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}],
    [{"role": "system", "content": [{"type": "image_url", "image_url": "https://example.com"}]}],
]


@pytest.mark.parametrize("number", range(len(REFUSED_PROMPTS)))
async def test_prompts_are_refused_the_same(wire: Wire, number: int) -> None:
    """A prompt that is not understood fails its job for good in the same words."""
    theirs, ours = await both(wire, MODELS["openai"], asking(messages=REFUSED_PROMPTS[number]), alone=True)
    assert ours == theirs
    assert ours["class"] == "Permanent"
    assert wire.asked == []


# --- what comes back --------------------------------------------------------------------------------------------------

DETAILS = {
    "prompt_tokens": 100,
    "completion_tokens": 50,
    "total_tokens": 150,
    "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 30, "audio_tokens": None},
}
REASONING = [
    {"type": "reasoning.text", "text": "hm", "format": "anthropic-claude-v1", "index": 0, "signature": None},
    {"type": "reasoning.summary", "summary": "hm", "id": "r"},
    {"type": "reasoning.encrypted", "data": "x"},
]

PLAIN: dict[str, Any] = {
    "an answer": completion(),
    "no usage": completion(usage=None),
    "a length": completion(finish="length"),
    "details": completion(usage=DETAILS, model="gpt-4o-mini-2024-07-18"),
    "a cost": completion(
        usage={
            **DETAILS,
            "cost": 0.000123,
            "is_byok": False,
            "cost_details": {"upstream_inference_cost": None},
        }
    ),
    "free, and of nobody": completion(usage={**DETAILS, "cost": 0}, model="of-nobody"),
    "a cost of none": completion(usage={**DETAILS, "cost": 0}, model="google/gemini-2.5-flash"),
    "reasoning": completion(message={"reasoning": "hm", "reasoning_details": REASONING, "refusal": None}),
    "reasoning content": completion(message={"reasoning_content": "hm", "tool_calls": [], "annotations": []}),
    "thinking": completion("<think>hm</think>yes"),
    "thinking twice": completion("a<think>hm</think> b<think></think>c"),
    "thinking without end": completion("a<think>b"),
    "nulls": completion(
        system_fingerprint=None, service_tier=None, choice={"logprobs": None, "native_finish_reason": "STOP"}
    ),
    "unknown fields": completion(extra={"a": [1]}, choice={"x": 1}, message={"y": None}),
    "a service tier": completion(service_tier="flex", model="gpt-5-mini", usage=DETAILS),
    "long": completion("x" * 300_000),
}

ODD: dict[str, Any] = {
    "thinking of another": completion("<thinking>hm</thinking>yes"),
    "a refusal": completion(None, message={"refusal": "I cannot."}),
    "an empty refusal": completion("x", message={"refusal": ""}),
    "filtered": completion("I can", "content_filter"),
    "broken off": completion("The half of an ans", "error"),
    "two choices": completion(choices=completion()["choices"] * 2),
    "no provider": {k: v for k, v in completion().items() if k != "provider"},
    "a null error": completion(error=None),
    "texts for numbers": completion(usage={"prompt_tokens": "10", "completion_tokens": 5, "total_tokens": 15}),
    "usage is a list": completion(usage=[]),
    "usage is empty": completion(usage={}),
    "cache writes": completion(usage={**DETAILS, "prompt_tokens_details": {"cache_write_tokens": 9}}, model="gpt-4o"),
    "created is null": completion(created=None),
    "created is a float": completion(created=1.5),
    "no id": {k: v for k, v in completion().items() if k != "id"},
    "no model": {k: v for k, v in completion().items() if k != "model"},
    "model is a number": completion(model=5),
    "another object": completion(object="text_completion"),
    "role is user": completion(message={"role": "user"}),
    "logprobs": completion(choice={"logprobs": {"content": None, "refusal": None}}),
    "metadata": completion(metadata={"a": [1]}),
    "annotations": completion(
        message={
            "annotations": [
                {
                    "type": "url_citation",
                    "url_citation": {"end_index": 1, "start_index": 0, "title": "t", "url": "u"},
                }
            ]
        }
    ),
}


@pytest.mark.parametrize("case", PLAIN)
async def test_a_plain_answer_is_read_alone(wire: Wire, provider: str, case: str) -> None:
    """The usual answers give the same reply, usage and cost, without pydantic-ai."""
    wire.script = http(200, json.dumps(PLAIN[case]))
    theirs, ours = await both(wire, MODELS[provider], asking(), alone=True)
    assert ours == theirs


@pytest.mark.parametrize("case", ODD)
async def test_an_odd_answer_is_read_the_same(wire: Wire, provider: str, case: str) -> None:
    """What else a server puts into a 200 comes to the same end, if pydantic-ai reads it; also without it."""
    wire.script = http(200, json.dumps(ODD[case]))
    theirs, ours = await both(wire, MODELS[provider], asking(), alone=True)
    assert ours == theirs
    assert len(wire.asked) == 2, "an odd answer is paid for, and is not asked for again"


RAW: dict[str, Script] = {
    "JSON as text": http(200, json.dumps(completion()), {"content-type": "text/plain"}),
    "a charset": http(
        200,
        json.dumps(completion("é"), ensure_ascii=False),
        {"content-type": "application/json; charset=utf-8"},
    ),
    "a mark in front": http(200, b"\xef\xbb\xbf" + json.dumps(completion()).encode()),
    "a lone surrogate": http(200, json.dumps(completion("x \ud800 y"))),
    "created": http(201, json.dumps(completion())),
    "white space": http(200, "   \n" + json.dumps(completion()) + "\n\n"),
    "a double key": http(200, json.dumps(completion())[:-1] + ', "model": "other"}'),
}
NETWORK: dict[str, Script] = {
    "closed": Script(),
    "reset": Script(then="reset"),
    "half a head": Script(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "no HTTP": Script(b"220 mail.example.com ESMTP\r\n"),
    "half a body": Script(
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": "c1"'
    ),
    "half a body, reset": Script(b'HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"id": "c1"', then="reset"),
    "half an error": Script(b'HTTP/1.1 500 Oh\r\ncontent-length: 500\r\n\r\n{"err'),
    "a broken chunk": Script(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
    "no gzip": http(200, b"not gzip", {"content-encoding": "gzip"}),
}


@pytest.mark.parametrize("case", [*RAW, *NETWORK])
async def test_odd_bytes_end_the_same(wire: Wire, provider: str, case: str) -> None:
    """Bodies that are no JSON, and connections that break, come to the same end."""
    wire.script = {**RAW, **NETWORK}[case]
    theirs, ours = await both(wire, MODELS[provider], asking(), alone=True)
    kept = ours.get("text") if case.startswith("half a body") else None
    assert ours == theirs | ({"text": kept} if kept else {})
    if case in NETWORK:
        assert os.environ["OPENAI_BASE_URL"].removeprefix("http://").removesuffix("/v1") in ours["words"]


async def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, provider: str, unused_tcp_port: int) -> None:
    """A refused connection is the same failure, told by where it went and why."""
    for name, value in environment(f"http://127.0.0.1:{unused_tcp_port}/v1").items():
        monkeypatch.setenv(name, value)
    theirs, ours = await both(Wire(), MODELS[provider], asking(), alone=True)
    assert ours == theirs
    assert ours["kind"] == "ModelConnectionError"
    assert ours["words"] == f"the connection to 127.0.0.1:{unused_tcp_port} failed: Connection refused"


async def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """A host that cannot be looked up is named with its port, also where the URL has none."""
    for name, value in environment("http://nobody.invalid/v1").items():
        monkeypatch.setenv(name, value)
    theirs, ours = await both(Wire(), MODELS[provider], asking(), alone=True)
    assert ours == theirs
    assert ours["words"].startswith("the connection to nobody.invalid:80 failed: ")


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("http://me:secret@127.0.0.1:{}", "the connection to 127.0.0.1:{} failed: Connection refused"),
        (
            "http://me:se[cret@127.0.0.1:{}",
            "the connection to nobody.invalid:80 failed: the proxy that the environment names is no URL",
        ),
    ],
)
async def test_a_proxy_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, provider: str, unused_tcp_port: int, proxy: str, words: str
) -> None:
    """It is the proxy's place that is told, without its password."""
    for name, value in environment("http://nobody.invalid/v1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", proxy.format(unused_tcp_port))
    theirs, ours = await both(Wire(), MODELS[provider], asking(), alone=True)
    assert ours == theirs
    assert ours["words"] == words.format(unused_tcp_port)


@pytest.mark.parametrize(
    "script", [Script(then="hang"), Script(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", then="hang")]
)
@pytest.mark.parametrize("setting", [False, True])
async def test_a_timeout_is_the_same(wire: Wire, provider: str, script: Script, setting: bool) -> None:
    """An answer that does not come, or does not go on, in time is the same failure, whoever set the time."""
    wire.script = script
    name = MODELS[provider]
    if setting:
        theirs, ours = await both(wire, name, asking(timeout=20), settings={"timeout": 0.3}, alone=True)
        assert ours == theirs
        assert ours["kind"] == "ModelTimeoutError"
        return
    failures = []
    for model in (reference_model(name, None), chat_model(name, None, alone=True)):
        ended = await attempt(model, None, asking(timeout=0.3), Deadlines(0.3), LateCalls())
        await model.aclose()
        assert ended.failure is not None
        failures.append(ended.failure)
    assert failures[0] == failures[1]
    assert failures[0].error == "CallTimeout"


# --- refusals ---------------------------------------------------------------------------------------------------------

STATUSES = [400, 401, 402, 403, 404, 408, 413, 422, 425, 429, 451, 500, 503, 524, 529]
BODIES: dict[str, Any] = {
    "nothing": "",
    "words": "upstream connect error",
    "HTML": "<html><title>502</title></html>",
    "an object": {},
    "null": None,
    "a list": [],
    "a number": 7,
    "OpenAI": {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}},
    "quota": {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}},
    "quota by type": {"error": {"message": "Quota", "type": "insufficient_quota"}},
    "too long": {"error": {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}},
    "too large": {"error": {"message": "Request too large for gpt-4o-mini", "type": "tokens", "code": "rate_limit_exceeded"}},
    "overloaded": {"error": {"message": "Overloaded", "type": "overloaded_error"}},
    "a key": {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}},
    "no such model": {"error": {"message": "The model `gpt-4o-min` does not exist", "code": "model_not_found"}},
    "billing": {"error": {"message": "Your credit balance is too low"}},
    "OpenRouter": {"error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": "busy", "headers": {"x-ratelimit-reset": "9"}}}},
    "flagged": {"error": {"code": 403, "message": "Input was flagged", "metadata": {"reasons": ["violence"], "flagged_input": "…"}}},
    "vLLM": {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400},
    "detail": {"detail": "Not Found"},
    "Google": [{"error": {"code": 429, "message": "plan and billing", "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "14s"}]}}],
    "an error in words": {"error": "Your team has used all available credits"},
    "a code of its own": {"error": {"message": ["x"], "code": 1302, "type": 5}},
    "control": {"error": {"message": "a\x1b[31mb\nc"}},
    "a page": {"error": {"message": "x" * 2000}},
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
async def test_refusals_are_told_the_same(wire: Wire, provider: str, case: str) -> None:
    """Every status with every kind of body has the same family, kind, words, wait and overload."""
    body = BODIES[case] if isinstance(BODIES[case], str) else json.dumps(BODIES[case])
    reference, chat = (
        reference_model(MODELS[provider]),
        chat_model(MODELS[provider], alone=case != "no such model"),
    )
    for status in STATUSES:
        wire.script = http(status, body)
        assert await outcome(chat, asking()) == await outcome(reference, asking()), status
    await chat.aclose()
    await reference.aclose()


HEADERS: list[dict[str, str]] = [
    {"retry-after": "7"},
    {"retry-after": "0"},
    {"retry-after": "1.5"},
    {"retry-after": "-1"},
    {"retry-after": "soon"},
    {"retry-after": "Wed, 21 Oct 2065 07:28:00 GMT"},
    {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    {"retry-after": "Wed Oct 21 07:28:00 2015"},
    {"retry-after-ms": "250"},
    {"retry-after-ms": "0"},
    {"retry-after-ms": "x", "retry-after": "3"},
    {"retry-after-ms": "inf", "retry-after": "3"},
    {"Retry-After": "7", "Content-Type": "text/plain"},
    {"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"},
    {"x-ratelimit-reset": "4102444800000"},
    {"content-type": "application/json; charset=latin-1"},
    {"content-encoding": "identity"},
]


@pytest.mark.parametrize("status", [429, 503, 400])
@pytest.mark.parametrize("headers", HEADERS, ids=str)
async def test_waits_are_read_the_same(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str]
) -> None:
    """Retry-After in all its forms asks for the same wait."""
    wire.script = http(status, json.dumps({"error": {"message": "slow down, ué"}}), headers)
    theirs, ours = await both(wire, MODELS["openai"], asking())
    for one in (theirs, ours):
        if one["retry_after"] is not None and one["retry_after"] > 1e6:
            one["retry_after"] = round(one["retry_after"] / 60)
    assert ours == theirs


@pytest.mark.parametrize("status", [301, 308, 304])
async def test_a_redirect_is_reported_and_not_followed(wire: Wire, provider: str, status: int) -> None:
    """The key goes nowhere else, and all jobs alike would fail."""
    wire.script = http(status, "", {"location": "http://127.0.0.1:9/elsewhere?key=secret"})
    model = chat_model(MODELS[provider], alone=True)
    with pytest.raises(CallError) as caught:
        await model.answer(asking())
    await model.aclose()
    assert (caught.value.family, caught.value.symptom) == (Family.PERMANENT, Symptom.SET_UP)
    assert str(caught.value) == (
        "the server redirects to http://127.0.0.1:9/elsewhere, and lbr does not follow; correct the provider's base URL "
        f"(HTTP {status})"
    )
    assert len(wire.asked) == 1


# --- any body, any name -----------------------------------------------------------------------------------------------

SPOILT = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "x", "stop", "assistant", "<think>a</think>b", "\ufeff", "5"]),
    st.just([]),
    st.just({}),
    st.just([{}]),
    st.just(["x"]),
)
WHOLE = completion(
    "a <think>b</think> c",
    usage={**DETAILS, "cost": 0.5, "is_byok": True, "cost_details": {"upstream_inference_cost": 1}},
    system_fingerprint="fp",
    service_tier="default",
    error=None,
    metadata={},
    choice={"logprobs": None, "native_finish_reason": "STOP"},
    message={
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning": "r",
        "reasoning_content": "r",
        "reasoning_details": REASONING,
    },
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all that a value holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, one in inner for place in [(*path, name), *places_in(one, (*path, name))]]


def spoilt(value: Any, path: tuple[Any, ...], by: Any, *, gone: bool) -> Any:
    """Return a copy of a value that has something else, or nothing, at a path."""
    copied = json.loads(json.dumps(value))
    inner = copied
    for name in path[:-1]:
        inner = inner[name]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = by
    return copied


NAMES = [
    *(f"openai-chat:{name}" for name in (
        "gpt-4o", "gpt-4o-mini", "gpt-4.1-nano", "gpt-3.5-turbo", "chatgpt-4o-latest", "gpt-4o-search-preview",
        "o1", "o3-mini", "o4-mini", "gpt-5", "gpt-5-chat-latest", "gpt-5-mini",
        "gpt-5.1", "gpt-5.2-pro", "gpt-5.6-sol", "gpt-6-astra", "gpt-6.1-terra", "gpt-7", "gpt-oss-120b", "ft:gpt-4o:x::y",
        "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-R1", "mistralai/Mistral-7B",
        "claude-3-5-haiku", "gemini-2.5-flash", "grok-4", "local", "openai/o3", "openai/gpt-5", "x:y",
    )),
    *(f"openrouter:{name}" for name in (
        "openai/gpt-4o", "openai/o3-mini", "openai/gpt-5", "openai/gpt-oss-120b", "~openai/gpt-latest",
        "anthropic/claude-sonnet-4.5", "anthropic/claude-3-haiku", "~anthropic/claude-sonnet-latest",
        "anthropic/claude-opus-5", "anthropic/claude-sonnet-5.5", "anthropic/claude-fable-5.1", "google/gemini-2.5-flash",
        "google/gemini-2.5-flash:free", "google/gemini-3.5-flash", "google/gemma-3-27b-it", "meta-llama/llama-3.3-70b",
        "mistralai/mistral-large", "qwen/qwen3-32b", "qwen/qwq-32b", "deepseek/deepseek-r1", "deepseek/deepseek-chat",
        "x-ai/grok-4", "x-ai/grok-3-mini", "cohere/command-r", "amazon/nova-lite-v1", "moonshotai/kimi-k2", "z-ai/glm-5.3",
        "perplexity/sonar", "minimax/minimax-m2.5", "nobody/nothing", "a/b/c",
    )),
    *(f"ollama:{name}" for name in (
        "llama3.2", "llama3.2:1b", "gemma3:27b", "qwen3", "qwq", "deepseek-r1:8b", "mistral", "command-r", "gpt-oss:20b",
        "glm-5.3", "phi4", "o3", "gpt-oss:120b-cloud",
    )),
]  # fmt: skip
TALK = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER]


@pytest.mark.parametrize("name", NAMES)
async def test_every_model_is_asked_the_same(wire: Wire, name: str) -> None:
    """What a model's profile makes of roles, settings and schemas arrives the same, and so does what it thought."""
    wire.script = http(200, json.dumps(completion("<think>x</think>{}")))
    cases = [
        (asking(messages=TALK, instructions="i"), {"max_tokens": 9, "seed": 2, "stop_sequences": ["x"]}),
        (asking("p"), {"temperature": 0.3, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2}),
        (asking("p", schema=SCHEMA), {"max_tokens": 9}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for request, settings in cases:
            wire.asked.clear()
            theirs, ours = await both(wire, name, request, settings=settings)
            assert ours == theirs
            assert wire.asked[0][1] == wire.asked[1][1]


# --- the way there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exempt", ["", "provider.invalid", "*"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_proxies_of_the_environment_are_used_the_same(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, provider: str, variable: str, exempt: str
) -> None:
    """Calls go through the proxy that the environment names, but for what it exempts."""
    proxy = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
    for name, value in environment("http://provider.invalid/v1").items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy)
    monkeypatch.setenv("NO_PROXY", exempt)
    look_up = socket.getaddrinfo

    def nowhere(host: Any, *rest: Any, **how: Any) -> Any:
        # At once: a name server that is asked may take as long as a connection may take.
        if host in {"provider.invalid", b"provider.invalid"}:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *rest, **how)

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    wire.script = http(200, json.dumps(completion()))
    theirs, ours = await both(wire, MODELS[provider], asking(), alone=True)
    assert ours == theirs
    paths = [headers["path"] for headers, _ in wire.asked]
    assert paths == ([] if exempt else ["http://provider.invalid/v1/chat/completions"] * 2)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Return the files of a certificate for localhost that nobody vouches for, and of its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    return certificate, key


@pytest.mark.parametrize("trusted", [False, True])
async def test_certificates_are_verified_the_same(
    monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path], provider: str, trusted: bool
) -> None:
    """A server whose certificate nobody vouches for gets neither key nor prompt; SSL_CERT_FILE may vouch for it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    wire = Wire()
    async with wire.open(context) as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        wire.script = http(200, json.dumps(completion()))
        theirs, ours = await both(wire, MODELS[provider], asking(), alone=True)
    assert ours == theirs
    assert len(wire.asked) == (2 if trusted else 0)
    assert ("text" in ours and "kind" not in ours) is trusted
    if not trusted:
        place = url.removeprefix("https://").removesuffix("/v1")
        assert ours["words"].startswith(f"the connection to {place} failed: its certificate is not trusted: self")


# --- who serves what --------------------------------------------------------------------------------------------------


def test_it_serves_the_endpoints_it_was_compared_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is what a worker builds for them, as long as no difference is known."""
    for name, value in environment("http://127.0.0.1:9/v1").items():
        monkeypatch.setenv(name, value)
    for provider, name in MODELS.items():
        built = build_model(Task(model=name), Authority(), concurrency=1)
        assert isinstance(built, ChatModel) is (provider not in DIFFERENCES)
    for name in ("openai:gpt-5", "deepseek:deepseek-chat"):
        monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
        assert isinstance(build_model(Task(model=name), Authority(), concurrency=1), PydanticAIModel)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"OPENAI_API_KEY": None},
        {"OPENAI_API_KEY": None, "OPENAI_BASE_URL": None},
        {"OPENAI_API_KEY": ""},
        {"OPENAI_BASE_URL": ""},
        {"OPENAI_BASE_URL": "not a URL"},
        {"OPENAI_BASE_URL": "http://[::1"},
        {"OPENROUTER_API_KEY": None},
        {"OLLAMA_BASE_URL": None},
        {"OLLAMA_API_KEY": None},
        {"OPENAI_CUSTOM_HEADERS": "X: y"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"OPENAI_API_KEY": "ключ"},
    ],
    ids=str,
)
def test_an_environment_is_refused_the_same(
    monkeypatch: pytest.MonkeyPatch, provider: str, changes: dict[str, str | None]
) -> None:
    """A missing key or URL is named in the same words, and what is odd is left to pydantic-ai."""
    for name, value in {**environment("http://127.0.0.1:9/v1"), **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    said: list[str | None] = []
    for name in ("pydantic-ai's", "what a worker builds"):
        try:
            if name == "pydantic-ai's":
                check_environment(MODELS[provider])
                reference_model(MODELS[provider])
            else:
                build_model(Task(model=MODELS[provider]), Authority(), concurrency=1)
        except UsageError as error:
            said.append(str(error))
        else:
            said.append(None)
    assert said[0] == said[1]


CHECKED: list[Task] = [
    Task(model=name, settings=settings_, schema=schema)
    for name in (
        *MODELS.values(),
        "openrouter:x",
        "openai-chat:",
        "ollama: x",
        "openrouter:/",
    )
    for settings_ in (
        {},
        {"temperature": 1, "max_tokens": 5, "timeout": 3.5, "stop_sequences": ["a"], "seed": 1},
        {"temprature": 1},
        {"temperature": "hot"},
        {"temperature": True},
        {"max_tokens": 1.5},
        {"max_tokens": -1},
        {"stop_sequences": "a"},
        {"stop_sequences": [1]},
        {"seed": None},
        {"timeout": 0},
        {"timeout": -1},
        {"max_retries": 1},
        {"base_url": "x"},
        {"extra_body": {"api_base": "x"}},
        {"extra_body": {"top_k": 5}},
        {"openrouter_models": ["a"]},
    )
    for schema in (None, SCHEMA, {"type": "array"})
]


def test_a_task_is_refused_the_same() -> None:
    """Names, settings and schemas are refused before any call in the words of pydantic-ai's adapter."""
    from lbr.core.pricing import max_output_tokens
    from lbr.models.checks import check_schema
    from lbr.models.pydantic_ai import check_model

    def as_ever(task: Task) -> None:
        if task.schema is not None:
            check_schema(task.schema)
        check_model(task.model or "", task.settings)
        max_output_tokens(task.settings)

    for task in CHECKED:
        said: list[str | None] = []
        for check in (as_ever, check_task):
            try:
                check(task)
            except UsageError as error:
                said.append(str(error))
            else:
                said.append(None)
        assert said[0] == said[1], task
