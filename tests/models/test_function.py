"""Functions as answerers: how they are called, and which of them a process may serve."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import BaseModel, Field
from sqlalchemy import update

import lbr
from lbr.core.errors import CallError, Family, Pause, Permanent, Usage, UsageError
from lbr.core.types import JobId, Prompt, Task, canonical_json
from lbr.models.base import Request
from lbr.models.build import Authority, build_model, build_validator, check_task
from lbr.models.function import FunctionModel
from lbr.models.identity import SCHEME, identify, name_function
from lbr.store import enqueue as queueing
from lbr.store import reads, runs, schema
from lbr.store.database import opened
from tests.support import Cli
from tests.support.callables import AsyncCaller, Caller, coroutine_maker, shout, shout_later, two

if TYPE_CHECKING:
    from pathlib import Path

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
        ({"a": np.float32(0.5), "b": np.array([1, 2]), "c": np.nan}, '{"a":0.5,"b":[1,2],"c":null}'),
        ({"a": [2**70, -(2**70)], "b": float("nan")}, f'{{"a":[{2**70},{-(2**70)}],"b":null}}'),
    ],
)
async def test_results_become_text(result: Any, text: Any) -> None:
    """Text stays as it is, and what has structure becomes compact JSON."""
    assert (await answer(lambda _: result)).text == text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "expected the function to return str, dict, list or BaseModel, got: None"),
        (b"x", "expected the function to return str, dict, list or BaseModel, got: bytes b'x'"),
        (3, "expected the function to return str, dict, list or BaseModel, got: int 3"),
        ((1,), "expected the function to return str, dict, list or BaseModel, got: tuple (1,)"),
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
            "expected the function to return str, dict, list or BaseModel, got: builtin_function_or_method <built-in",
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


pytestmark = pytest.mark.processes

OBJECTS = """
    import functools, re
    from dataclasses import dataclass
    from pathlib import Path


    class Agent:
        def __init__(self, tone):
            self.tone = tone

        def ask(self, prompt):
            return f"{self.tone}: {prompt}"

        def __call__(self, prompt):
            return f"{self.tone}! {prompt}"

        def __str__(self):
            return self.tone


    @dataclass
    class Voice:
        tone: str

        def ask(self, prompt):
            return f"{self.tone}: {prompt}"


    def close_over(value):
        def answer(prompt):
            return f"{value}: {prompt}"

        return answer


    def in_tone(tone):
        def wrap(function):
            @functools.wraps(function)
            def answer(prompt):
                return tone + function(prompt)

            return answer

        return wrap


    def plain(prompt):
        return prompt


    polite, rude = Agent("polite").ask, Agent("rude").ask
    kind, harsh = Agent("kind"), Agent("harsh")
    part_a, part_b = functools.partial(Agent("a").ask), functools.partial(Agent("b").ask)
    made_a, made_b = close_over(Agent("a")), close_over(Agent("b"))
    deco_a, deco_b = in_tone("a")(plain), in_tone("b")(plain)
"""


@pytest.fixture
def folder(cli: Cli) -> Path:
    """Return the command line's folder, with a prompt and objects that answer."""
    (cli.folder / "in.txt").write_text("hello\n")
    (cli.folder / "obj.py").write_text(textwrap.dedent(OBJECTS))
    return cli.folder


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a driver with a queue in a file: who answers is decided before the database is asked."""
    return Cli(tmp_path, db_url=f"sqlite:///{tmp_path / 'queue.db'}")


def python(cli: Cli, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has `call`, which asks one function one prompt and prints the answer or what was wrong."""
    head = f"""
        import asyncio
        import lbr
        from obj import *

        URL = {cli.outside_url!r}

        def call(worker, **how):
            try:
                print(*asyncio.run(lbr.prompt_map(["hello"], worker, db_url=URL, results_db_url="sqlite:///answers.db",
                                                  return_dtype="list[str]", progress_every=None, **how)))
            except lbr.LbrError as error:
                print("refused:", error)
    """
    return cli.python(textwrap.dedent(head) + textwrap.dedent(program))


def runs_of(cli: Cli) -> list[str]:
    """Return the names of the queue's runs."""
    return [run["run"] for run in json.loads(cli("status", "--json").stdout)["runs"]]


PAIRS = ["polite rude", "kind harsh", "part_a part_b", "made_a made_b", "deco_a deco_b"]


@pytest.mark.parametrize("pair", PAIRS)
def test_two_objects_of_one_module_are_two(cli: Cli, folder: Path, pair: str) -> None:
    """What is named like pkg.module:function has answers of its own, and a worker elsewhere serves it by that name."""
    answers = []
    for name in pair.split():
        cli("enqueue", "in.txt", "--run", name, "--function", f"obj:{name}")
        cli("worker", "--run", name, "--function", f"obj:{name}")
        answers.append(json.loads(cli("collect", name).stdout)["result"])
    assert len(set(answers)) == 2


def test_a_worker_that_was_named_another_object_does_not_serve_it(cli: Cli, folder: Path) -> None:
    """Two objects of one class are two names."""
    cli("enqueue", "in.txt", "--run", "p", "--function", "obj:polite")
    done = cli("worker", "--run", "p", "--function", "obj:rude", check=False)
    assert done.returncode != 0
    assert "the run asks for function obj:polite; start the worker with --function obj:polite" in done.stderr


def test_objects_with_a_state_need_a_version(cli: Cli, folder: Path) -> None:
    """Without one nothing is enqueued; with one each has its own answers, which are known again."""
    asked = """
        for how in ({}, {"version": "1"}, {"version": "1"}):
            call(Agent("polite").ask, **how)
        call(Agent("rude").ask)
        call(Agent("rude").ask, version="2")
        call(functools.partial(Agent("rude")))
        call(Agent("rude"), version="3")
    """
    told = python(cli, asked).stdout.splitlines()
    refused = "depends on an object of the class Agent, and lbr cannot compare such objects"
    assert [refused in line for line in told] == [True, False, False, True, False, True, False]
    assert told[1:3] == ["polite: hello"] * 2
    assert (told[4], told[6]) == ("rude: hello", "rude! hello")
    assert told[0].startswith("refused: obj:Agent.ask depends on")
    assert "Pass `version=`" in told[0]
    assert len(runs_of(cli)) == 3


def test_a_function_that_changes_as_it_is_called_is_told(cli: Cli, folder: Path) -> None:
    """The next call would ask everything again, and be paid for again; what is no part of a value may change."""
    asked = """
        from dataclasses import field

        @dataclass
        class Client:
            calls: int = 0
            cache: dict = field(default_factory=dict, compare=False)

            def ask(self, prompt):
                self.calls += 1
                return "Hi"

            def look_up(self, prompt):
                return self.cache.setdefault(prompt, "Ho")

        seen = []

        def main():
            client, other = Client(), Client()

            def ask(prompt):
                return client.ask(prompt)

            def note(prompt):
                seen.append(prompt)
                return seen[0] if seen is heard else ""

            heard = seen
            for function in (ask, other.look_up, other.look_up, note, Client().ask):
                call(function)

        main()
    """
    done = python(cli, asked)
    assert done.stdout.split() == ["Hi", "Ho", "Ho", "hello", "Hi"]
    told = [line for line in done.stderr.splitlines() if "has become another function while it was called" in line]
    assert [line.split()[0] for line in told] == [
        "program:main.<locals>.ask",
        "program:main.<locals>.note",
        "program:Client.ask",
    ]


def test_an_object_answers_no_run_of_another(cli: Cli, folder: Path) -> None:
    """Nothing but its caller's word says which runs are of an object with a state, so that they have to be named."""
    asked = """
        polite, rude = Agent("polite").ask, Agent("rude").ask
        for agent, name in (polite, "p"), (rude, "r"):
            asyncio.run(lbr.enqueue(["hello"], run=name, function=agent, version=name, db_url=URL))
        try:
            asyncio.run(lbr.work(functions=[polite], db_url=URL))
        except lbr.LbrError as error:
            print(error)
        print(asyncio.run(lbr.work(run="p", functions=[polite], db_url=URL)).done)
        print(asyncio.run(lbr.work(run=["r"], functions=[rude], db_url=URL)).done)
    """
    told, *done = python(cli, asked).stdout.splitlines()
    assert told.startswith("no run that this worker can serve: p: the run asks for function obj:Agent")
    assert (
        "here it has none, and lbr knows the Agent in it only by its class; name the function's runs with run=…" in told
    )
    assert done == ["1", "1"]
    answers = [json.loads(cli("collect", name).stdout)["result"] for name in ("p", "r")]
    assert answers == ["polite: hello", "rude: hello"]


def test_closures_over_objects_answer_no_run_of_another(cli: Cli, folder: Path) -> None:
    """Versions told them apart when they were enqueued; a worker that is given both cannot tell which is which."""
    asked = """
        def hold(agent):
            def answer(prompt):
                return agent.ask(prompt)

            return answer

        polite, rude = hold(Agent("polite")), hold(Agent("rude"))
        for function, name in (polite, "p"), (rude, "r"):
            asyncio.run(lbr.enqueue(["hello"], run=name, function=function, version=name, db_url=URL))
        for how in {"functions": [polite, rude]}, {"functions": [polite]}:
            try:
                asyncio.run(lbr.work(db_url=URL, **how))
            except lbr.LbrError as error:
                print(error)
        for function, name in (polite, "p"), (rude, "r"):
            print(asyncio.run(lbr.work(run=name, functions=[function], db_url=URL)).done)
    """
    both, one, *done = python(cli, asked).stdout.splitlines()
    assert both.startswith("program:hold.<locals>.answer is given twice, with different objects of the class Agent")
    assert "name the function's runs with run=…" in one
    assert done == ["1", "1"]
    answers = [json.loads(cli("collect", name).stdout)["result"] for name in ("p", "r")]
    assert answers == ["polite: hello", "rude: hello"]


def test_one_worker_serves_what_came_of_one_definition(cli: Cli, folder: Path) -> None:
    """Functions of one name that differ by what they close over, or by their versions, are all there."""
    asked = """
        def versioned(tone):
            agent = Agent(tone)
            agent.version = tone
            return agent

        made = [close_over("polite"), close_over("rude"), versioned("kind"), versioned("harsh")]
        for number, function in enumerate(made):
            asyncio.run(lbr.enqueue(["hello"], run=f"run{number}", function=function, db_url=URL))
        print(asyncio.run(lbr.work(functions=made, db_url=URL)).done)
    """
    assert python(cli, asked).stdout.split() == ["4"]
    answers = [json.loads(cli("collect", f"run{n}").stdout)["result"] for n in range(4)]
    assert answers == ["polite: hello", "rude: hello", "kind! hello", "harsh! hello"]


@pytest.mark.slow
def test_values_tell_their_methods_apart(cli: Cli, folder: Path) -> None:
    """Methods of dataclasses, and what closes over a value, have answers of their own without a version."""
    asked = """
        for value in "polite", "rude", Path("a"), Path("b"), re.compile("a"), re.compile("b"), Voice("a"), Voice("b"):
            call(Voice(value).ask)
            call(close_over(value))
        call("polite {}".format)
        call("rude {}".format)
        call(in_tone("a")(plain))
        call(in_tone("b")(plain))
        call(plain)
    """
    first = python(cli, asked).stdout.splitlines()
    assert len(first) == len(set(first[::2])) + len(set(first[1::2])) == 21
    assert first[-5:] == ["polite hello", "rude hello", "ahello", "bhello", "hello"]
    runs = runs_of(cli)
    assert python(cli, asked).stdout.splitlines() == first
    assert runs_of(cli) == runs


def test_a_changed_value_is_other_work(cli: Cli, folder: Path) -> None:
    """The same lambda is found again by another process, and one that holds another value is answered for itself."""
    asked = """
        def make(tone):
            return lambda prompt: f"{tone}: {prompt}"

        call(make({"tone": "TONE"}))
    """
    answers = [python(cli, asked.replace("TONE", tone)).stdout for tone in ("a", "b", "a")]
    assert answers == ["{'tone': 'a'}: hello\n", "{'tone': 'b'}: hello\n", "{'tone': 'a'}: hello\n"]
    assert len(runs_of(cli)) == 2


def test_a_function_of_a_script_is_served_by_its_name(cli: Cli, folder: Path) -> None:
    """The script's file names it, so that a worker elsewhere takes it up."""
    script = f"""
        import asyncio
        import lbr

        def shout(prompt):
            return prompt.upper()

        if __name__ == "__main__":
            asyncio.run(lbr.enqueue(["hello"], run="s", function=shout, db_url={cli.outside_url!r}))
    """
    cli.python(script)
    cli("worker", "--function", "program:shout")
    assert '"result":"HELLO"' in cli("collect", "s").stdout


# --- code that changed ------------------------------------------------------------------------------------------------

CHANGED = "the code of answering:answer has changed since run {} was created"
KEPT, REUSED = f"{CHANGED}; its answers are kept", f"{CHANGED}, whose answers run {{}} reuses"


def write_code(cli: Cli, answer: str) -> None:
    """Write a module with a function that always gives one answer."""
    (cli.folder / "answering.py").write_text(f"def answer(prompt):\n    return {answer!r}\n")
    (cli.folder / "in.txt").write_text("hello\n")


def enqueue(cli: Cli, run: str, *flags: str) -> str:
    """Enqueue the function's run, and return what is said of code."""
    said = cli("enqueue", "in.txt", "--run", run, "--function", "answering:answer", *flags).stderr
    return "".join(line for line in said.splitlines() if "the code of" in line)


def answer_all(cli: Cli, run: str) -> str:
    """Work on a run; return its answer."""
    cli("worker", "--run", run, "--function", "answering:answer")
    return str(json.loads(cli("collect", run).stdout)["result"])


@pytest.mark.slow
def test_changed_code_is_told_each_time(cli: Cli) -> None:
    """As long as a run has answers that other code may have given, its own or reused ones, every enqueue says so."""
    write_code(cli, "first")
    assert enqueue(cli, "a") == ""
    assert answer_all(cli, "a") == "first"
    assert enqueue(cli, "a") == ""
    write_code(cli, "second")
    for _ in range(2):
        assert KEPT.format("a") in enqueue(cli, "a")
    for _ in range(2):
        assert REUSED.format("a", "b") in enqueue(cli, "b")
    assert answer_all(cli, "b") == "first"
    for _ in range(2):
        assert enqueue(cli, "c", "--fresh") == ""
    assert answer_all(cli, "c") == "second"
    assert enqueue(cli, "c") == ""
    assert enqueue(cli, "d", "--version", "2") == ""
    assert answer_all(cli, "d") == "second"


def test_code_that_gave_no_answer_yet_is_no_matter(cli: Cli) -> None:
    """A run whose function was mended before the first answer has answers of the mended code only."""
    write_code(cli, "first")
    enqueue(cli, "a")
    write_code(cli, "second")
    assert enqueue(cli, "a") == ""
    done = cli("worker", "--run", "a", "--function", "answering:answer")
    assert "the code of" not in done.stderr
    assert enqueue(cli, "a") == ""
    write_code(cli, "first")
    assert KEPT.format("a") in enqueue(cli, "a")


@pytest.mark.slow
def test_prompt_map_tells_it_each_time(cli: Cli, folder: Path) -> None:
    """A call says that it returns answers of other code, also where it found them in another run."""
    asked = "import answering; call(answering.answer); call(answering.answer, run='b'); call(answering.answer, run='c', fresh=True)"
    (folder / "answering.py").write_text("def answer(prompt):\n    return 'first'\n")
    assert python(cli, asked).stderr == ""
    (folder / "answering.py").write_text("def answer(prompt):\n    return 'second'\n")
    for _ in range(2):
        done = python(cli, asked)
        kept = [line for line in done.stderr.splitlines() if "; its answers are kept. To redo them" in line]
        assert len(kept) == 3, done.stderr
        assert done.stdout.split() == ["first"] * 3
    asked = "import answering; call(answering.answer, run='d'); call(answering.answer, run='d')"
    told = python(cli, asked).stderr.splitlines()
    assert [line.partition(", whose answers run d reuses")[1] != "" for line in told] == [True, True]


async def test_a_function_that_an_earlier_lbr_identified_is_answered_again(db_url: str) -> None:
    """An enqueue that adds prompts reports that the answers of the earlier run are not reused."""

    def answer(prompt: str) -> str:
        return prompt

    earlier = Task(function=identify(answer).name, fingerprint="0" * 32)
    async with opened(db_url, create=True) as database:
        await database.write(runs.open_run, runs.RunSpec("old", earlier, 8, earlier.fingerprint))
    for inputs, added in (["a"], True), (["a"], False), (["a", "b"], True):
        notices = (await lbr.enqueue(inputs, run="new", function=answer, db_url=db_url)).notices
        assert [notice.startswith("run old was created with") for notice in notices] == [True] * added
    assert (await lbr.enqueue(["c"], run="other", function=str.lower, db_url=db_url)).notices == []


async def test_code_that_an_earlier_lbr_digested_did_not_change(db_url: str) -> None:
    """Digests of two kinds are not compared: the answers are kept without a warning, and the new digest is stored."""

    async def enqueue(run: str) -> list[str]:
        return (await lbr.enqueue(["a"], run=run, function=shout, db_url=db_url)).notices

    async def store(fingerprint: str) -> None:
        async with opened(db_url) as database:
            await database.write(
                lambda connection, _: connection.execute(update(schema.runs).values(fingerprint=fingerprint))
            )

    assert await enqueue("r") == []
    assert (await lbr.work(functions=[shout], db_url=db_url)).done == 1
    await store("0" * 32)
    assert (await lbr.work(functions=[shout], db_url=db_url)).done == 0
    assert await enqueue("reusing") == []
    assert await enqueue("r") == []
    async with opened(db_url) as database:
        assert (await database.read(reads.find_run, "r")).fingerprint == identify(shout).fingerprint
    await store(f"{SCHEME}{'0' * 32}")
    assert "the code of" in (await enqueue("r"))[0]


@pytest.mark.parametrize(("how", "looks"), [({"model": "offline:echo"}, 0), ({"function": str.upper}, 1)])
async def test_only_functions_are_looked_at_and_once(
    db_url: str, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], looks: int
) -> None:
    """An enqueue asks one question more for a function, however many chunks it has, and none for a model."""
    asked: list[object] = []
    real = queueing.lender_with_other_code

    def look(*args: Any) -> str | None:
        asked.append(args)
        return real(*args)

    monkeypatch.setattr(queueing, "lender_with_other_code", look)
    monkeypatch.setattr(queueing, "CHUNK", 2)
    await lbr.enqueue(["a", "b", "c", "d", "e"], run="r", db_url=db_url, **how)
    assert len(asked) == looks
