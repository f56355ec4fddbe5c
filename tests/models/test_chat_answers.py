"""What the chat adapter makes of an answer's body: only the text is required, and nothing that came is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr.core.errors import CallError, Family, Usage
from lbr.core.extras import Extras
from lbr.core.types import Reply
from lbr.models.chat import Reader
from tests.models.test_chat import SPOILT, WHOLE, completion, places_in, spoilt

COUNTED = Usage(10, 5, None)
TRANSIENT, BAD, PERMANENT = Family.TRANSIENT, Family.BAD_ANSWER, Family.PERMANENT
ACCOUNT, LIMITED, CUT_OFF = Family.ACCOUNT, Family.RATE_LIMITED, Family.CUT_OFF


def reader(provider: str = "openai") -> Reader:
    """Return a reader whose price table is not loaded."""
    return Reader(provider, "asked", "http://x/v1/")


def read(body: Any, provider: str = "openai") -> Reply:
    """Read an answer with this body, JSON unless it is bytes."""
    return reader(provider).read(body if isinstance(body, bytes) else json.dumps(body).encode(), keep=True)


def failure(body: Any) -> CallError:
    """Return the error for an answer that cannot be used."""
    with pytest.raises(CallError) as caught:
        read(body)
    return caught.value


def without(name: str, **more: Any) -> dict[str, Any]:
    """Return an answer that lacks a field of its body."""
    return {key: value for key, value in completion(**more).items() if key != name}


def event(content: str | None = None, finish: str | None = None, **more: Any) -> str:
    """Return one server-sent event."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice], **more})}\n\n"


ENVELOPES: dict[str, Any] = {
    "no id": without("id"),
    "no model": without("model"),
    "no created": without("created"),
    "no object": without("object"),
    "a fraction in created": completion(created=1.5),
    "another object": completion(object="text_completion"),
    "a number for a model": completion(model=5),
    "no role": completion(message={"role": None}),
    "another role": completion(message={"role": "user"}),
    "an empty finish reason": completion(finish=""),
    "no finish reason": completion(finish=None),
    "a finish reason that is no text": completion(finish=7),
    "content in parts": completion([{"type": "text", "text": "fi"}, "ne", {"type": "image_url"}, {"text": ""}]),
    "a thought among the parts": completion([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "fine"}]),
    "more choices": completion(choices=[*completion()["choices"], *completion("other")["choices"]]),
    "an empty error": completion(error={}),
    "an error without a status": completion(error={"code": 0, "message": "success"}),
    "odd neighbours": completion(
        service_tier=5, metadata=[], choice={"index": "x", "logprobs": 5}, message={"tool_calls": 5, "reasoning": []}
    ),
    "thoughts that are no text": completion(message={"reasoning": True, "reasoning_content": {}}),
    "not a number": b'{"created": NaN, ' + json.dumps(completion()).encode()[1:],
    "a line break in the text of a field": b'{"x": "a\nb", ' + json.dumps(completion()).encode()[1:],
    "a mark in front": b"\xef\xbb\xbf" + json.dumps(completion()).encode(),
    "half of a surrogate pair": b'{"x": "\\ud800", ' + json.dumps(completion()).encode()[1:],
    "no Unicode": b'{"x": "\xff", ' + json.dumps(completion()).encode()[1:],
}  # fmt: skip


@pytest.mark.parametrize("case", ENVELOPES)
def test_only_the_text_is_required(case: str) -> None:
    """Whatever is missing or odd beside the text, the text is the answer and its tokens are counted."""
    reply = read(ENVELOPES[case])
    assert (reply.text, reply.usage) == ("fine", COUNTED)


PROBABLE: Any = {"content": [{"token": "fine", "logprob": -0.5}]}
THOUGHTS: dict[str, tuple[Any, str]] = {
    "in a field": (completion(message={"reasoning": "hm"}), "hm"),
    "in DeepSeek's field": (completion(message={"reasoning_content": "hm", "reasoning": " "}), "hm"),
    "in the text": (completion("<think>h</think>fine<think>m</think>"), "h\n\nm"),
    "in events": (
        (event("fi", reasoning=1) + event("ne", "stop", usage=completion()["usage"]) + "data: [DONE]\n\n")
        .replace('"content": "fi"', '"content": "fi", "reasoning_content": "h"')
        .replace('"content": "ne"', '"content": "ne", "reasoning_content": "m"')
        .encode(),
        "hm",
    ),
    "nowhere": (completion(), ""),
}


@pytest.mark.parametrize("case", THOUGHTS)
def test_thoughts_are_kept_wherever_they_are(case: str) -> None:
    """They are no part of the text, and the body is kept as it came."""
    body, thoughts = THOUGHTS[case]
    reply = read(body)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert (reply.text, reply.extras) == ("fine", Extras(thoughts, "", raw.decode()))
    assert reader().read(raw).extras is None


@pytest.mark.parametrize(
    ("logprobs", "kept"),
    [(PROBABLE, json.dumps(PROBABLE, separators=(",", ":"))), (None, ""), ({"token": "\ud800"}, ""), (5, "5")],
)
def test_probabilities_are_kept_as_json(logprobs: Any, kept: str) -> None:
    """What no output could hold loses no answer."""
    reply = read(completion(choice={"logprobs": logprobs}))
    assert reply.extras is not None
    assert (reply.text, reply.extras.logprobs) == ("fine", kept)


@given(st.data())
def test_nothing_in_a_body_can_break_the_reader(data: st.DataObject) -> None:
    """Whatever stands at any place, or is missing there, is an answer or a failure that keeps what came."""
    place = data.draw(st.sampled_from(places_in(WHOLE)))
    body = spoilt(WHOLE, place, data.draw(SPOILT), gone=data.draw(st.booleans()))
    try:
        kept: Any = read(body, provider="openrouter")
    except CallError as error:
        kept = error
    assert kept.text or kept.usage != Usage()


@pytest.mark.parametrize(
    ("finish", "kept"),
    [("stop", "stop"), ("eos", "eos"), ("STOP", "STOP"), ("MAX_TOKENS", "length"), ("max_tokens", "length")],
)
def test_an_unknown_finish_reason_is_kept_as_it_came(finish: str, kept: str) -> None:
    """Only the words for a token limit become one word."""
    assert read(completion(finish=finish)).finish_reason == kept


USAGES: list[tuple[Any, Usage]] = [
    (None, Usage()),
    ([], Usage()),
    ({}, Usage()),
    ({"total_tokens": 25}, Usage(25, None, None)),
    ({"prompt_tokens": 20, "total_tokens": 25}, Usage(20, 5, None)),
    ({"completion_tokens": 5, "total_tokens": 25}, Usage(20, 5, None)),
    ({"prompt_tokens": 20}, Usage(20, None, None)),
    ({"completion_tokens": 5}, Usage(None, 5, None)),
    ({"prompt_tokens": "20", "completion_tokens": 5.0}, Usage(20, 5, None)),
    ({"input_tokens": 20, "output_tokens": 5}, Usage(20, 5, None)),
    ({"prompt_tokens": -20, "completion_tokens": 5, "total_tokens": 5}, Usage(0, 5, None)),
    ({"prompt_tokens": True, "completion_tokens": None, "total_tokens": "x"}, Usage()),
    ({"prompt_tokens": 10**30, "completion_tokens": 5}, Usage(None, 5, None)),
    ({"prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": [1]}, Usage(20, 5, None)),
]


@pytest.mark.parametrize(("usage", "counted"), USAGES)
def test_usage_is_counted_as_far_as_it_goes(usage: Any, counted: Usage) -> None:
    """A partial or nonsensical usage loses no answer, and what can be known of it is."""
    reply = read(completion(usage=usage))
    assert (reply.text, reply.usage) == ("fine", counted)


def test_the_cost_that_a_provider_reports_is_kept_without_tokens() -> None:
    """OpenRouter's cost counts whatever its tokens are."""
    reply = read(completion(usage={"cost": 0.5, "total_tokens": "x"}), provider="openrouter")
    assert reply.usage == Usage(None, None, 500_000_000)


BAD_BODIES = [{}, [], "hello", 5, None, {"choices": []}, {"choices": None}, {"choices": [None]}, {"id": "c1"}]


@pytest.mark.parametrize("body", BAD_BODIES)
def test_a_whole_body_without_an_answer_is_a_bad_answer(body: Any) -> None:
    """It is kept as it came, and asked for again on a budget of its own."""
    error = failure(body)
    assert (error.family, error.kind, error.text) == (BAD, "UnreadAnswer", json.dumps(body))


@pytest.mark.parametrize("content", ["", " \n", None, [], 5, "<think>hm</think>"])
def test_an_answer_without_text_keeps_what_came(content: Any) -> None:
    """Ended by itself it is a bad answer, at its token limit it is cut off; both have the body and the tokens."""
    for finish, family in (("stop", BAD), ("length", CUT_OFF)):
        error = failure(completion(content, finish))
        assert (error.family, error.kind, error.finish_reason) == (family, "EmptyAnswer", finish)
        assert json.loads(error.text or "") == completion(content, finish)
        assert error.usage == COUNTED


@pytest.mark.parametrize("finish", ["error", "abort", "ABORTED", "cancelled", "insufficient_system_resource"])
def test_an_answer_that_the_server_broke_off_is_no_answer(finish: str) -> None:
    """It is asked for again, and its text and tokens are kept."""
    error = failure(completion("The half of", finish, choice={"error": {"message": "out of memory"}}))
    assert (error.family, error.kind, error.text) == (TRANSIENT, "BrokenAnswer", "The half of")
    assert (error.usage, error.finish_reason) == (COUNTED, finish)


@pytest.mark.parametrize(
    ("error", "family", "words"),
    [
        ({"message": "upstream", "code": 502}, TRANSIENT, "upstream (HTTP 502)"),
        ({"message": "slow down", "code": 429}, LIMITED, "slow down (HTTP 429)"),
        ({"message": "Insufficient credits", "code": 402}, ACCOUNT, "Insufficient credits (HTTP 402)"),
        ({"message": "no", "code": "insufficient_quota"}, ACCOUNT, "no"),
        ("out of order", TRANSIENT, "out of order"),
        ({"x": 1}, TRANSIENT, 'expected an answer, got: the error {"x":1}'),
    ],
)
def test_an_error_in_the_place_of_an_answer(error: Any, family: Family, words: str) -> None:
    """An error with status 200 is in the family of its code, in the server's words, and its tokens count."""
    for body in ({"error": error}, {"error": error, "choices": []}, completion("", error=error)):
        found = failure(body)
        assert (found.family, str(found), found.text) == (family, words, None)
        assert found.usage == (COUNTED if "usage" in body else Usage())


def test_a_late_error_beside_a_text_is_not_an_answer() -> None:
    """An error with a status says that the text is not whole; it is kept."""
    error = failure(completion("The half of", error={"message": "late", "code": 503}))
    assert (error.family, error.text, error.usage) == (Family.RATE_LIMITED, "The half of", COUNTED)


@pytest.mark.parametrize("content", [b'{"id": "c1", "choi', b'{"choices": [{"message": {"content": "A'])
def test_a_body_that_was_cut_off_is_kept(content: bytes) -> None:
    """Half of a body is asked for again, with what came of it."""
    error = failure(content)
    assert (error.family, error.kind, error.text) == (TRANSIENT, "UnreadAnswer", content.decode())


def test_a_page_in_the_place_of_an_answer() -> None:
    """A proxy's page is no answer of a model: its title is in the message, and nothing counts as paid."""
    error = failure(b"<!DOCTYPE html><html><head><title>Sign in &amp; go</title></head></html>")
    assert (error.family, error.text) == (TRANSIENT, None)
    assert str(error) == "expected JSON, got: the page 'Sign in & go'"


AZURE = {
    "hate": {"filtered": False, "severity": "safe"},
    "violence": {"filtered": True, "severity": "medium"},
}


def test_a_filtered_answer_names_category_and_severity() -> None:
    """What a content filter found is in the message, and what came before it is kept."""
    error = failure(completion("As for", "content_filter", choice={"content_filter_results": AZURE}))
    assert (error.family, error.kind, error.text) == (PERMANENT, "ContentFilterError", "As for")
    assert str(error) == "the provider refused to answer: As for; content filter: violence (medium)"
    error = failure(completion(None, message={"refusal": "I cannot."}))
    assert (error.family, error.text, error.usage) == (PERMANENT, "I cannot.", COUNTED)


@pytest.mark.parametrize(
    "error", [{"message": "upstream died", "code": None}, "upstream died", {"message": "upstream died"}]
)
def test_an_error_beside_half_an_answer_breaks_it_off(error: Any) -> None:
    """Without a finish reason the text is not whole, whatever code the error has; text and tokens are kept."""
    for body in (
        completion("The half of", None, error=error),
        event("The half of", usage=completion()["usage"]) + f"data: {json.dumps({'error': error})}\n\n",
    ):
        found = failure(body.encode() if isinstance(body, str) else body)
        assert (found.family, found.text, found.usage) == (TRANSIENT, "The half of", COUNTED)
        assert str(found) == "upstream died"


def test_a_status_may_be_written_as_text() -> None:
    """A code of digits is a status like a number."""
    for code, family in (("500", TRANSIENT), ("429", LIMITED), ("402", ACCOUNT)):
        found = failure(completion("The half of", error={"message": "late", "code": code}))
        assert (found.family, found.text, str(found)) == (family, "The half of", f"late (HTTP {code})")


def test_events_that_were_not_requested_are_put_together() -> None:
    """Server-sent events add up to one answer, with its usage and why it ended."""
    usage: dict[str, Any] = {
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        "model": "m",
    }
    stream = ": PROCESSING\n\n" + event("fi") + "event: message\r\n" + event("ne", "stop") + event(**usage)
    for end in ("data: [DONE]\n\n", ""):
        assert reader().read((stream + end).encode()) == Reply("fine", COUNTED, "m", "stop")
    whole = f"data: {json.dumps(completion())}\n\n"
    assert read(whole.encode()).text == "fine"


def test_events_that_were_cut_off_are_no_answer() -> None:
    """A stream that ends in the middle is asked for again, and what came of it is kept."""
    for end in ("", 'data: {"choi'):
        error = failure((event("The half") + event(" of") + end).encode())
        assert (error.family, error.kind, error.text) == (TRANSIENT, "UnreadAnswer", "The half of")
    error = failure((event("The half") + 'data: {"error": {"message": "busy", "code": 429}}\n\n').encode())
    assert (error.family, error.text, str(error)) == (LIMITED, "The half", "busy (HTTP 429)")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_line_breaks_end_the_line_of_an_event(character: str) -> None:
    """Other separators may stand unescaped in the text of an answer."""
    chunk = {"choices": [{"delta": {"content": f"a{character}b"}, "finish_reason": "stop"}]}
    for end in ("\n", "\r\n", "\r"):
        assert read(f"data: {json.dumps(chunk, ensure_ascii=False)}{end * 2}".encode()).text == f"a{character}b"
