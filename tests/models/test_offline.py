"""The offline model: its echo, its seeded misbehaviour and the instances it makes of schemas."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, Field

from lbr.core.errors import CallError, Family, Usage, UsageError
from lbr.core.schema import Validator, schema_of
from lbr.core.types import BadTry, JobId, Prompt, Reply, Task
from lbr.models.base import Request
from lbr.models.build import Authority, build_model, check_task
from lbr.models.offline import Behaviour, OfflineModel, check_settings, fill


def request(
    text: Any = "two words", *, messages: Any = None, schema: Any = None, seq: Any = 1, last_bad: Any = None
) -> Any:
    """Make a request for the offline model."""
    prompt = Prompt(text=text) if messages is None else Prompt(messages=messages)
    task = Task(model="offline:echo", schema=schema)
    return Request(prompt=prompt, task=task, job_id=JobId(1), seq=seq, last_bad=last_bad)


def answer_at_once(model: Any, asked: Any) -> Any:
    """Run an answer that never waits; an await would leave it unfinished."""
    coroutine = model.answer(asked)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    finally:
        coroutine.close()
    raise AssertionError("it waited")


def test_it_echoes_at_once() -> None:
    """Without latency the text comes back without a single wait, with its words counted and no cost."""
    assert answer_at_once(OfflineModel("offline:echo", {}), request()) == Reply(
        text="two words",
        usage=Usage(input_tokens=2, output_tokens=2, cost_nanos=0),
        model="offline:echo",
        finish_reason="stop",
    )


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "b"),
        ([{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "b"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "b"),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image_url"},
                        {"type": "text", "text": "b"},
                    ],
                }
            ],
            "a b",
        ),
        ([{"role": "system", "content": "a"}], ""),
        ([], ""),
    ],
)
def test_it_echoes_the_last_user_message(messages: Any, text: Any) -> None:
    """A chat is answered with the text of its last user message."""
    assert answer_at_once(OfflineModel("offline:echo", {}), request(messages=tuple(messages))).text == text


async def test_latency_is_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latency is the time that every call sleeps."""
    slept = []

    async def sleep(seconds: Any) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    model = OfflineModel("offline:echo", {"latency": 0.25})
    await model.answer(request())
    await model.aclose()
    assert slept == [0.25]


@pytest.mark.parametrize(
    ("settings", "family", "retry_after", "kind"),
    [
        ({"failure_rate": 1}, Family.TRANSIENT, None, "OfflineFailure"),
        ({"rate_limit_rate": 1}, Family.RATE_LIMITED, 0.1, "OfflineRateLimit"),
        ({"rate_limit_rate": 1.0, "retry_after": 7}, Family.RATE_LIMITED, 7, "OfflineRateLimit"),
    ],
)
def test_it_fails_as_told(settings: Any, family: Any, retry_after: Any, kind: Any) -> None:
    """Failures and rate limits have their family and their wait."""
    with pytest.raises(CallError) as caught:
        answer_at_once(OfflineModel("offline:echo", settings), request())
    assert (caught.value.family, caught.value.retry_after, caught.value.kind) == (family, retry_after, kind)


async def test_a_hanging_call_never_ends() -> None:
    """A hang lasts until it is cancelled."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(OfflineModel("offline:echo", {"hang_rate": 1}).answer(request()), timeout=0.01)


def outcomes(settings: Any) -> Any:
    """Tell for 200 prompts and two tries each whether they fail."""
    model = OfflineModel("offline:echo", settings)
    told = ""
    for number in range(200):
        for seq in (1, 2):
            try:
                answer_at_once(model, request(f"p{number}", seq=seq))
                told += "."
            except CallError as error:
                told += error.family[0]
    return told


def test_draws_depend_on_seed_prompt_and_try_alone() -> None:
    """The same seed draws the same in every process; another seed and another try draw anew."""
    settings = {"failure_rate": 0.2, "rate_limit_rate": 0.2}
    first = outcomes(settings)
    code = "import tests.models.test_offline as t; print(t.outcomes({'failure_rate': 0.2, 'rate_limit_rate': 0.2}))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == first == outcomes({**settings, "seed": 0})
    assert first != outcomes({**settings, "seed": 1})
    assert first[::2] != first[1::2]
    assert (first.count("t"), first.count("r")) == (70, 69)


@pytest.mark.parametrize("name", ["offline:", "offline:ech", "offline:gpt", "offline:echo:x"])
def test_other_offline_models_do_not_exist(name: Any) -> None:
    """A name that is not offline:echo is refused, when it is enqueued and when it is served."""
    for refuse in (check_task, lambda task: build_model(task, Authority(), concurrency=1)):
        with pytest.raises(UsageError, match=f"expected 'offline:echo', the only offline model, got: '{name}'"):
            refuse(Task(model=name))


def test_settings_are_read() -> None:
    """Settings that fit are taken over, the others keep their defaults."""
    assert check_settings({"latency": 1, "seed": -3}) == Behaviour(
        latency=1, failure_rate=0.0, rate_limit_rate=0.0, hang_rate=0.0, seed=-3, retry_after=0.1
    )
    check_task(Task(model="offline:echo", settings={"hang_rate": 0.5}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temperature": 1},
            "expected a setting of offline:echo, one of latency, failure_rate, rate_limit_rate, hang_",
        ),
        (
            {"latency": -1},
            "expected the setting latency of offline:echo to be a number of seconds, 0 or more, got: -1",
        ),
        (
            {"latency": "1"},
            "expected the setting latency of offline:echo to be a number of seconds, 0 or more, got: '1'",
        ),
        (
            {"latency": float("nan")},
            "expected the setting latency of offline:echo to be a number of seconds, 0 or more",
        ),
        (
            {"latency": float("inf")},
            "expected the setting latency of offline:echo to be a number of seconds, 0 or more",
        ),
        (
            {"retry_after": None},
            "expected the setting retry_after of offline:echo to be a number of seconds, 0 or more",
        ),
        (
            {"failure_rate": 1.1},
            "expected the setting failure_rate of offline:echo to be a number from 0 to 1, got: 1.1",
        ),
        (
            {"hang_rate": True},
            "expected the setting hang_rate of offline:echo to be a number from 0 to 1, got: True",
        ),
        ({"seed": 0.5}, "expected the setting seed of offline:echo to be a whole number, got: 0.5"),
        ({"seed": "x"}, "expected the setting seed of offline:echo to be a whole number, got: 'x'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, message: Any) -> None:
    """An unknown setting and a value out of range are refused with what was expected."""
    with pytest.raises(UsageError) as caught:
        check_task(Task(model="offline:echo", settings=settings))
    assert str(caught.value)[: len(message)] == message


# --- schemas ----------------------------------------------------------------------------------------------------------


class Leaf(BaseModel):
    """The end of a tree."""

    label: str = Field(max_length=3)


class Tree(BaseModel):
    """A type that contains itself in every way."""

    name: str
    parent: Tree | None
    children: list[Tree]
    by_name: dict[str, Tree] = {}
    leaf: Leaf


RECURSIVE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "integer"}}}},
}

SCHEMAS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "string", "minLength": 50},
    {"type": "string", "maxLength": 2},
    {"type": "integer"},
    {"type": "integer", "minimum": 7, "maximum": 7},
    {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9},
    {"type": "integer", "maximum": -5},
    {"type": "integer", "minimum": 10, "multipleOf": 7},
    {"type": "integer", "minimum": 0.5, "maximum": 1.5},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": 3, "maximum": 3},
    {"type": "number", "multipleOf": 5},
    {"type": "number", "multipleOf": 0.5},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["null", "integer"]},
    {"type": ["null"]},
    {"const": {"a": [1]}},
    {"enum": ["red", "green", None, 3]},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"type": "null"},
        ]
    },
    {
        "allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"type": "integer"}}}],
        "required": ["b"],
    },
    {
        "type": "object",
        "required": ["a", "b"],
        "properties": {"a": {"type": "number"}, "c": {"type": "boolean"}},
    },
    {"properties": {"a": {"items": {"minimum": 3}}}, "additionalProperties": False},
    {"type": "array"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 4},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "array", "items": RECURSIVE["$defs"]["node"], "$defs": RECURSIVE["$defs"]},
    {"$ref": "#/$defs/b", "$defs": {"b": {"$ref": "#/$defs/c"}, "c": {"type": "integer"}}},
    {"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}},
    RECURSIVE,
    schema_of(Tree),
    schema_of(Leaf),
]


@pytest.mark.parametrize("text", ["", "hello world", "an answer that goes on for quite a while"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: orjson.dumps(schema).decode()[:60])
def test_an_instance_fits_its_schema(schema: Any, text: Any) -> None:
    """What is made of a schema validates against it, and is the same each time."""
    reply = answer_at_once(OfflineModel("offline:echo", {}), request(text, schema=schema))
    assert Validator(schema).check(reply.text) == reply.text
    assert answer_at_once(OfflineModel("offline:echo", {}), request(text, schema=schema, seq=2)) == reply


@pytest.mark.parametrize(
    ("format_", "type_"),
    [
        ("date", "date"),
        ("time", "time"),
        ("date-time", "datetime"),
        ("duration", "timedelta"),
        ("uuid", "UUID"),
        ("uri", "AnyUrl"),
        ("ipv4", "IPv4Address"),
        ("ipv6", "IPv6Address"),
    ],
)
def test_formats_are_kept(format_: Any, type_: Any) -> None:
    """Strings with a format are read by the types that stand for it."""
    import datetime as dt
    import ipaddress
    import uuid

    import pydantic

    found = next(getattr(place, type_) for place in (dt, ipaddress, uuid, pydantic) if hasattr(place, type_))
    adapter = pydantic.TypeAdapter(found)
    assert adapter.json_schema()["format"] == format_
    for text in ("a", "b", "c"):
        adapter.validate_python(fill({"type": "string", "format": format_}, text))


def test_values_follow_the_text() -> None:
    """Text goes into strings, and other values differ from text to text."""
    schema = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}
    assert fill(schema, "hello") == {"s": "hello", "n": 669}
    assert fill(schema, "other") != fill(schema, "hello")


def test_a_schema_that_requires_itself_for_ever_ends() -> None:
    """No finite instance exists, and the attempt ends anyhow."""
    endless = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}
    assert orjson.dumps(fill(endless, "x")).count(b'{"a":') == 41


def test_an_earlier_bad_answer_changes_nothing() -> None:
    """The offline model has nothing to correct."""
    model = OfflineModel("offline:echo", {})
    bad = BadTry(text="no", message="expected JSON")
    assert answer_at_once(model, request(last_bad=bad)) == answer_at_once(model, request())


async def test_resolve_builds_it() -> None:
    """A task names the offline model and its settings."""
    model = build_model(Task(model="offline:echo", settings={"rate_limit_rate": 1}), Authority(), concurrency=1)
    with pytest.raises(CallError, match="too many requests, by the setting rate_limit_rate"):
        await model.answer(request())
    await model.aclose()
