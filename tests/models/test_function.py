"""Functions as answerers: how they are called, and which of them a process may serve."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import subprocess
import sys
import threading
from typing import Any

import pytest
from pydantic import BaseModel, Field

from lbr.core.errors import CallError, Family, Pause, Permanent, Usage, UsageError
from lbr.core.types import JobId, Prompt, Task, canonical_json
from lbr.models.base import Request
from lbr.models.build import Authority, build_model, build_validator, check_task
from lbr.models.function import FunctionModel
from lbr.models.identity import identify, name_function
from tests.support.callables import AsyncCaller, Caller, coroutine_maker, shout, shout_later, two

CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("CONTEXT", default="none")
ITSELF: list[Any] = []
ITSELF.append(ITSELF)


def request(text: Any = "hello", messages: Any = None) -> Any:
    """Make a request for a function."""
    prompt = Prompt(text=text) if messages is None else Prompt(messages=messages)
    return Request(prompt=prompt, task=Task(function="m:f"), job_id=JobId(1), seq=1)


async def answer(function: Any, text: Any = "hello", messages: Any = None) -> Any:
    """Ask a function once, and leave no thread behind."""
    model = FunctionModel(function, concurrency=2)
    try:
        return await model.answer(request(text, messages))
    finally:
        await model.aclose()


class Box(BaseModel):
    """An answer with an alias."""

    in_it: int = Field(alias="inIt")


@pytest.mark.parametrize(
    "function",
    [
        shout,
        shout_later,
        coroutine_maker,
        Caller(),
        AsyncCaller(),
        Caller().later,
        Caller().now,
        Caller.of_class,
        functools.partial(shout_later),
        functools.partial(two, ""),
        str.upper,
    ],
)
async def test_every_kind_of_callable_answers(function: Any) -> None:
    """Async or plain, bound, partial or an object: whatever can be called answers, with its text alone."""
    reply = await answer(function)
    assert (reply.text.upper(), reply.usage, reply.model) == ("HELLO", Usage(), None)


async def test_a_chat_prompt_arrives_as_messages() -> None:
    """A chat prompt is given as the list of its messages."""
    messages = ({"role": "user", "content": "hi"},)
    reply = await answer(lambda given: [type(given).__name__, *given], messages=messages)
    assert reply.text == '["list",{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("", ""),
        ("a", "a"),
        ({"b": 1, "a": [None]}, '{"b":1,"a":[null]}'),
        ([], "[]"),
        (Box(inIt=3), '{"inIt":3}'),
        ({"a": [2**70, -(2**70)], "b": float("nan")}, f'{{"a":[{2**70},{-(2**70)}],"b":null}}'),
    ],
)
async def test_results_become_text(result: Any, text: Any) -> None:
    """Text stays as it is, and what has structure becomes compact JSON."""
    assert (await answer(lambda _: result)).text == text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "expected the function to return str, dict or BaseModel, got: None"),
        (b"x", "expected the function to return str, dict or BaseModel, got: bytes b'x'"),
        (3, "expected the function to return str, dict or BaseModel, got: int 3"),
        ((1,), "expected the function to return str, dict or BaseModel, got: tuple (1,)"),
        ("\ud800", "expected the function to return text, got: surrogates not allowed at character 0"),
        (
            {"a": 2**70, "b": object},
            "expected the function's dict to be JSON, got: Type is not JSON serializable: type",
        ),
        (ITSELF, "expected the function's list to be JSON, got: Recursion limit reached"),
        ({"a": object}, "expected the function's dict to be JSON, got: Type is not JSON serializable: type"),
        (
            {"a": "\ud800"},
            "expected the function's dict to be JSON, got: str is not valid UTF-8: surrogates not allowed",
        ),
        (
            "x".encode,
            "expected the function to return str, dict or BaseModel, got: builtin_function_or_method <built-in",
        ),
    ],
)
async def test_other_results_fail_for_good(result: Any, message: Any) -> None:
    """What is no answer fails the job at once, for the next call would give the same."""
    with pytest.raises(Permanent) as caught:
        await answer(lambda _: result)
    assert str(caught.value)[: len(message)] == message
    assert caught.value.family is Family.PERMANENT


@pytest.mark.parametrize("error", [ValueError("x"), Permanent("never"), Pause("wait"), TimeoutError()])
@pytest.mark.parametrize("is_async", [True, False])
async def test_errors_pass_through(error: Any, is_async: Any) -> None:
    """What the function raises arrives as it was raised."""

    def plain(_: Any) -> None:
        raise error

    async def later(_: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await answer(later if is_async else plain)
    assert caught.value is error


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_function_cannot_end_the_worker(is_async: Any) -> None:
    """`sys.exit` in a function fails the call and nothing else."""

    async def later(_: Any) -> None:
        sys.exit("enough")

    with pytest.raises(CallError, match="the function called exit: enough") as caught:
        await answer(later if is_async else lambda _: sys.exit("enough"))
    assert (caught.value.family, caught.value.kind) == (Family.TRANSIENT, "SystemExit")


async def test_stop_iteration_is_an_error_like_others() -> None:
    """A plain function that runs out of an iterator fails its call; it does not hang."""
    with pytest.raises(CallError, match=r"the function raised StopIteration\(\)"):
        await answer(lambda _: next(iter(())))


async def test_plain_functions_see_the_callers_context() -> None:
    """Context variables reach the thread, and what it sets there stays there."""
    CONTEXT.set("outer")

    def function(_: Any) -> Any:
        seen = CONTEXT.get()
        CONTEXT.set("inner")
        return seen

    assert ((await answer(function)).text, CONTEXT.get()) == ("outer", "outer")


async def test_plain_functions_run_beside_each_other_in_daemon_threads() -> None:
    """As many plain calls as the worker makes run at once, none in the event loop's thread."""
    barrier = threading.Barrier(5)

    def function(_: Any) -> Any:
        barrier.wait(timeout=60)
        return [threading.current_thread().daemon, threading.current_thread() is threading.main_thread()]

    model = FunctionModel(function, concurrency=5)
    replies = await asyncio.gather(*(model.answer(request()) for _ in range(5)))
    assert {reply.text for reply in replies} == {"[true,false]"}
    await model.aclose()


async def test_threads_are_kept_for_the_next_call_and_sent_home() -> None:
    """A thread serves one call after the other, and ends when the model is closed."""
    threads: list[threading.Thread] = []

    def function(_: Any) -> str:
        threads.append(threading.current_thread())
        return ""

    model = FunctionModel(function, concurrency=1)
    for _ in range(20):
        await model.answer(request())
    await model.aclose()
    for thread in set(threads):
        thread.join(timeout=60)
    assert ([thread.is_alive() for thread in set(threads)], len(threads)) == ([False] * len(set(threads)), 20)


async def test_a_thread_that_cannot_be_had_costs_one_call_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call for which no thread could be started is not made later, and those after it find their threads."""
    calls = []
    start = threading.Thread.start
    refusals = iter([True])

    def begun(self: threading.Thread) -> None:
        if next(refusals, False):
            raise RuntimeError("can't start new thread")
        start(self)

    def note(text: Any) -> Any:
        calls.append(text)
        return text

    monkeypatch.setattr(threading.Thread, "start", begun)
    model = FunctionModel(note, concurrency=2)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await model.answer(request("one"))
        for text in ("two", "three", "four"):
            assert (await asyncio.wait_for(model.answer(request(text)), 30)).text == text
    finally:
        await model.aclose()
    assert calls == ["two", "three", "four"]


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    """A call that is cancelled while its thread runs is forgotten, also when a coroutine comes of it late."""
    started, go_on = threading.Event(), threading.Event()

    def function(_: Any) -> Any:
        started.set()
        go_on.wait(timeout=60)
        return shout_later("x")

    model = FunctionModel(function, concurrency=1)
    task = asyncio.create_task(model.answer(request()))
    await asyncio.to_thread(started.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    model._function = shout
    assert (await model.answer(request())).text == "HELLO"
    await model.aclose()


HANGING = """
import asyncio, sys, threading, time
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.function import FunctionModel
from tests.support.callables import AsyncCaller, Caller, coroutine_maker, shout, shout_later, two

started, loop_closed, called = threading.Event(), threading.Event(), threading.Event()
def function(text):
    started.set()
    if text == "late":
        loop_closed.wait()
        return "late"
    time.sleep(3600)

async def main():
    model = FunctionModel(function, concurrency=2)
    for text in ("late", "never"):
        task = asyncio.ensure_future(
            model.answer(Request(prompt=Prompt(text=text), task=Task(function="m:f"), job_id=JobId(1), seq=1)))
        await asyncio.to_thread(started.wait)
        started.clear()
        task.cancel()
        await asyncio.wait([task])
    await model.aclose()

asyncio.run(main())
threads = [t for t in threading.enumerate() if t.name == "lbr-function"]
loop_closed.set()
threads[0].join(30)
print(len(threads), [t.is_alive() for t in threads])
"""


def test_a_hanging_function_does_not_keep_the_process() -> None:
    """A process exits while a function hangs, and one that comes back after the loop is closed is no trouble."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HANGING],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 [False, True]\n", "")


# --- what a process may serve -----------------------------------------------------------------------------------------


def authority(*functions: Any) -> Any:
    """Allow functions, as a worker's flags do."""
    return Authority(functions=tuple(map(name_function, functions)))


async def test_a_named_function_is_served() -> None:
    """A worker that names the function serves its run."""
    model = build_model(Task(function=f"{shout.__module__}:shout"), authority(shout), concurrency=1)
    assert (await model.answer(request())).text == "HELLO"
    await model.aclose()


def test_a_function_that_was_not_named_is_refused() -> None:
    """A database alone makes nobody import a function; the message says how to allow it."""
    with pytest.raises(UsageError) as caught:
        build_model(Task(function="os:system"), authority(shout), concurrency=1)
    assert str(caught.value) == ("the run asks for function os:system; start the worker with --function os:system")


def test_a_lambda_of_another_program_cannot_be_named() -> None:
    """For a function without a name of its own the way out is its program."""
    with pytest.raises(UsageError, match=r"only the program that defines it can serve it: start that again"):
        build_model(Task(function="m:<lambda>", fingerprint="ab"), Authority(), concurrency=1)


def test_another_version_or_fingerprint_is_refused() -> None:
    """A function that is not the one the run asks for is refused, and the message says in what it differs."""

    def versioned(text: Any) -> Any:
        return text

    versioned.version = 2  # type: ignore[attr-defined]
    allowed = authority(versioned)
    name = identify(versioned).name
    fingerprint = identify(versioned).fingerprint
    build_model(Task(function=name, version="2", fingerprint=fingerprint), allowed, concurrency=1)
    with pytest.raises(UsageError, match=r"with version 1, but here it has version 2"):
        build_model(Task(function=name, version="1"), allowed, concurrency=1)
    with pytest.raises(UsageError, match=r"with no version, but here it has version 2"):
        build_model(Task(function=name), allowed, concurrency=1)
    with pytest.raises(UsageError, match=rf"with fingerprint ab, but here it has {fingerprint}: its code or a value"):
        build_model(Task(function=name, version="2", fingerprint="ab"), allowed, concurrency=1)


def test_a_version_given_beside_the_function_does_not_shut_workers_out() -> None:
    """A function that says no version serves a run whose version was given when it was enqueued."""
    model = build_model(Task(function=f"{shout.__module__}:shout", version="1"), authority(shout), concurrency=1)
    assert isinstance(model, FunctionModel)


def test_functions_take_no_settings() -> None:
    """Settings beside a function are refused when they are enqueued."""
    check_task(Task(function="m:f"))
    with pytest.raises(
        UsageError, match=r"settings are for models, and a function takes none; remove seed, temperature"
    ):
        check_task(Task(function="m:f", settings={"temperature": 1, "seed": 2}))


def test_a_schema_that_is_none_is_refused_for_everyone() -> None:
    """A broken schema is refused when it is enqueued."""
    with pytest.raises(UsageError, match="the JSON schema is not valid at"):
        check_task(Task(function="m:f", schema={"type": "strnig"}))


def test_the_validator_knows_the_result_type_of_the_schema() -> None:
    """A process that was given the result type validates with it, others by the schema alone."""
    schema = {"type": "object", "properties": {"inIt": {"type": "integer"}}, "required": ["inIt"]}
    task = Task(function="m:f", schema=schema)
    typed = build_validator(task, Authority(result_types={canonical_json(schema).decode(): Box}))
    plain = build_validator(task, Authority())
    assert typed is not None
    assert plain is not None
    assert (typed.check('{"inIt": "3"}'), plain.check('{"inIt": 3}')) == ('{"inIt":3}', '{"inIt":3}')
    assert build_validator(Task(function="m:f"), Authority()) is None


def test_an_authority_does_not_show_its_key() -> None:
    """A key does not get into logs by way of a repr."""
    assert "sk-or" not in repr(Authority(openrouter_api_key="sk-or-secret"))
