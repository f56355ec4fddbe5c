"""Functions as answerers: how they are found, named, told apart and called."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import importlib
import io
import operator
import os
import random
import re
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field

from lbr.asking import ask, authorize
from lbr.errors import CallError, Family, Pause, Permanent, Usage, UsageError
from lbr.jobs import JobId, Prompt, Task, canonical_json
from lbr.models.base import Request
from lbr.models.function import FunctionModel
from lbr.models.identity import identify, import_function, name_function
from lbr.models.resolve import Authority, build_model, build_validator, check_task

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = __name__
CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("CONTEXT", default="none")


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


def shout(text: Any) -> Any:
    return text.upper()


async def shout_later(text: Any) -> Any:
    return text.upper()


def two(left: Any, text: Any) -> Any:
    return left + text


class Caller:
    """Callable, and with every kind of method."""

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    async def later(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    def now(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    @classmethod
    def of_class(cls, text: Any) -> Any:
        """Answer."""
        return text.upper()

    @staticmethod
    def static(text: Any) -> Any:
        """Answer."""
        return text.upper()


class AsyncCaller:
    """Callable, and asynchronous."""

    async def __call__(self, text: Any) -> Any:
        """Answer."""
        return text.upper()


def coroutine_maker(text: Any) -> Any:
    return shout_later(text)


# --- import_function --------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write modules into the working directory and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def write(name: Any, text: Any) -> None:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_found_in_the_working_directory(module: Any, tmp_path: Path) -> None:
    """Modules and packages of the working directory are importable, and so are attributes of attributes."""
    module("fn_pkg/fn_mod", "class Client:\n    def ask(self, t): return t * 2\nclient = Client()\n")
    assert str(tmp_path) not in sys.path
    assert import_function("fn_pkg.fn_mod:client.ask")("ab") == "abab"
    assert sys.path[0] == str(tmp_path)
    import_function("fn_pkg.fn_mod:Client.ask")
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fn_good", "expected a name like 'pkg.module:function', got: 'fn_good'"),
        ("fn_good:", "expected a name like 'pkg.module:function', got: 'fn_good:'"),
        ("fn_good.py:f", "expected a module, got: the file in 'fn_good.py:f'; write fn_good:f"),
        (
            "fn_none:f",
            "cannot import 'fn_none:f': module 'fn_none' failed with ModuleNotFoundError: No module named",
        ),
        (
            "fn_needs:f",
            "cannot import 'fn_needs:f': module 'fn_needs' failed with ModuleNotFoundError: No module named 'x_y",
        ),
        ("fn_syntax:f", "cannot import 'fn_syntax:f': module 'fn_syntax' failed with SyntaxError: "),
        ("fn_exit:f", "cannot import 'fn_exit:f': module 'fn_exit' failed with SystemExit: 3"),
        (
            "fn_raise:f",
            "cannot import 'fn_raise:f': module 'fn_raise' failed with KeyError: 'no such setting'",
        ),
        ("fn_good:g", "cannot import 'fn_good:g': 'fn_good' has no attribute 'g'"),
        ("fn_good:f.x.y", "cannot import 'fn_good:f.x.y': 'f' has no attribute 'x'"),
        ("fn_good:number", "expected 'fn_good:number' to be a function, got: int"),
        ("fn_good:Class", "expected 'fn_good:Class' to be a function, got: the class Class"),
        ("..fn_good:f", "cannot import '..fn_good:f': module '..fn_good' failed with TypeError: "),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_step_that_failed(
    module: Any, spec: Any, message: Any
) -> None:
    """Every way in which a function cannot be had is a usage error that names the cause."""
    module("fn_good", "def f(t): return t\nnumber = 3\nclass Class: ...\n")
    module("fn_needs", "import x_y_z")
    module("fn_syntax", "def f(:")
    module("fn_exit", "raise SystemExit(3)")
    module("fn_raise", "raise KeyError('no such setting')")
    with pytest.raises(UsageError) as caught:
        import_function(spec)
    assert str(caught.value).startswith(message)


# --- identify ---------------------------------------------------------------------------------------------------------


def nested(bound: Any) -> Any:
    def inner(text: Any) -> Any:
        return text + str(bound)

    return inner


def decorate(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(text: Any) -> Any:
        return function(text)

    return wrapper


@decorate
def decorated(text: Any) -> Any:
    return text


@functools.cache
def cached(text: Any) -> Any:
    return text


@pytest.mark.parametrize(
    ("function", "name", "anonymous"),
    [
        (shout, "shout", False),
        (shout_later, "shout_later", False),
        (decorated, "decorated", False),
        (cached, "cached", False),
        (Caller.of_class, "Caller.of_class", False),
        (Caller.static, "Caller.static", False),
        (Caller().now, "Caller.now", True),
        (Caller(), "Caller", True),
        (nested(1), "nested.<locals>.inner", True),
        (lambda text: text, "<lambda>", True),
        (functools.partial(two, "a"), "two", True),
        (functools.partial(functools.partial(two), "a"), "two", True),
        (functools.partial(Caller()), "Caller", True),
    ],
)
def test_the_name_is_module_and_qualified_name(function: Any, name: Any, anonymous: Any) -> None:
    """A function is named by its module and qualified name; where these do not tell, it is anonymous."""
    identity = identify(function)
    assert (identity.name, identity.anonymous) == (f"{HERE}:{name}", anonymous)


@pytest.mark.parametrize(("function", "name"), [(len, "builtins:len"), (str.upper, "builtins:str.upper")])
def test_builtins_have_names_too(function: Any, name: Any) -> None:
    """Functions written in C are named by where they live, and have a fingerprint."""
    identity = identify(function)
    assert (identity.name, identity.anonymous, len(identity.fingerprint)) == (name, False, 32)


def test_the_argument_goes_before_the_functions_own_version() -> None:
    """A version is a str or an int on the function, or is given beside it; anything else is none."""

    def versioned(version: Any) -> Any:
        def function(text: Any) -> Any:
            return text

        function.version = version  # type: ignore[attr-defined]
        return function

    assert identify(shout).version is None
    assert identify(shout, version="3").version == "3"
    assert [identify(versioned(v)).version for v in ("2", 2, None, True, [1])] == ["2", "2", None, None, None]
    assert identify(versioned("2"), version="3").version == "3"


def make_lambdas() -> Any:
    return [lambda text: text + "a", lambda text: text + "b", lambda text: text.upper()]


def test_a_fingerprint_tells_code_apart() -> None:
    """Other constants and other names are other functions; the same code is the same one."""
    first, second = make_lambdas(), make_lambdas()
    assert [identify(f).fingerprint for f in first] == [identify(f).fingerprint for f in second]
    assert len({identify(f).fingerprint for f in first}) == 3


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (nested(1), nested(2)),
        (nested("1"), nested(1)),
        (nested(True), nested(1)),
        (nested((1, [2])), nested((1, [3]))),
        (nested({"a": 1}), nested({"a": 2})),
        (nested({1, 2}), nested({1, 3})),
        (nested(shout), nested(coroutine_maker)),
        (nested(nested(1)), nested(nested(2))),
        (nested(Caller()), nested(AsyncCaller())),
        (nested(Caller), nested(AsyncCaller)),
        (nested(os), nested(sys)),
        (nested(Family.PERMANENT), nested(Family.ACCOUNT)),
        (functools.partial(two, "a"), functools.partial(two, "b")),
        (functools.partial(two, left="a"), functools.partial(two, left="b")),
        (lambda text, x=1: text, lambda text, x=2: text),
        (lambda text, *, x=1: text, lambda text, *, x=2: text),
        (Caller().now, Caller().later),
        (Caller(), AsyncCaller()),
        (decorated, decorate(shout)),
    ],
)
def test_a_fingerprint_covers_what_is_closed_over(left: Any, right: Any) -> None:
    """Closed-over values, defaults and bound arguments count."""
    assert identify(left).fingerprint != identify(right).fingerprint


@dataclass
class Voice:
    """A value by nature, with methods that answer."""

    tone: Any
    more: Any = None

    def ask(self, text: Any) -> Any:
        """Answer."""
        return f"{self.tone} {text}"


class Manner(BaseModel):
    """A value by nature, too."""

    model_config = ConfigDict(extra="allow")

    tone: str

    def ask(self, text: Any) -> Any:
        """Answer."""
        return f"{self.tone} {text}"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Voice("polite"), Voice("rude")),
        (Voice(Voice("polite")), Voice(Voice("rude"))),
        (Manner(tone="polite"), Manner(tone="rude")),
        (Manner(tone="rude", more=1), Manner(tone="rude", more=2)),  # type: ignore[call-arg]
        (Path("a"), Path("b")),
        (re.compile("a"), re.compile("b")),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (re.compile("a"), re.compile(b"a")),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)),
        (date(2026, 1, 1), date(2026, 1, 2)),
        (time(1), time(2)),
        (timedelta(1), timedelta(2)),
        (Decimal("1.0"), Decimal("1.00")),
        (UUID(int=1), UUID(int=2)),
        (range(2), range(3)),
        (deque([1]), deque([2])),
        (str.upper, str.lower),
    ],
)
def test_values_are_looked_into(left: Any, right: Any) -> None:
    """What is a value by nature tells apart what closes over it, at any depth; a copy of it does not."""
    for inside in (lambda one: one, lambda one: [{"a": one}], lambda one: Voice("x", one)):
        one, other = nested(inside(left)), nested(inside(right))
        assert identify(one).fingerprint != identify(other).fingerprint
        assert identify(one).fingerprint == identify(nested(inside(copy.deepcopy(left)))).fingerprint


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Voice("polite").ask, Voice("rude").ask),
        (Manner(tone="polite").ask, Manner(tone="rude").ask),
        ("polite {}".format, "rude {}".format),
        ({"a": "polite"}.get, {"a": "rude"}.get),
        (("polite",).__getitem__, ("rude",).__getitem__),
        (shout.__call__, coroutine_maker.__call__),  # type: ignore[operator]
    ],
)
def test_methods_are_told_apart_by_the_value_that_they_are_bound_to(left: Any, right: Any) -> None:
    """The same method of another value is another function, and its name does not say which."""
    assert identify(left).fingerprint != identify(right).fingerprint
    assert identify(left).name == identify(right).name
    assert identify(left).anonymous
    assert identify(right).anonymous


def test_a_value_that_holds_itself_has_a_fingerprint() -> None:
    """Fields that lead back end."""
    voice = Voice("polite")
    voice.more = [voice, voice.ask]
    assert identify(voice.ask).fingerprint == identify(voice.ask).fingerprint


class Agent:
    """Answers as its state has it."""

    def __init__(self, tone: Any) -> None:
        self.tone = tone

    def ask(self, text: Any) -> Any:
        """Answer."""
        return f"{self.tone} {text}"

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return self.ask(text)


class Slotted(Agent):
    """Keeps its state in a slot."""

    __slots__ = ("tone",)


class Wrapping:
    """A decorator that is an object."""

    def __init__(self, function: Any, tone: Any = None) -> None:
        functools.update_wrapper(self, function)
        if tone is not None:
            self.tone = tone

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return self.__wrapped__(text)  # type: ignore[attr-defined]


class LessPlain(Voice):
    """A dataclass in its bases only."""

    def __init__(self, tone: Any, extra: Any) -> None:
        super().__init__(tone)
        self.extra = extra


class Sub(Caller):
    """Inherits a class method."""


@Wrapping
def in_an_object(text: Any) -> Any:
    return text


OPAQUE = [
    Agent("polite").ask,
    Agent("polite"),
    Slotted("polite").ask,
    functools.partial(Agent("polite").ask),
    functools.partial(Agent("polite")),
    functools.partial(functools.partial(Agent("polite").ask)),
    decorate(Agent("polite").ask),
    Wrapping(shout, "polite"),
    LessPlain("polite", 1).ask,
    random.Random(1).choice,
    io.StringIO("a").write,
    operator.methodcaller("upper"),
]
TOLD = [
    shout,
    in_an_object,
    cached,
    functools.cache(shout),
    functools.cache(nested(1)),
    Wrapping(shout),
    Caller().now,
    Caller(),
    Caller.of_class,
    Sub.of_class,
    Sub().of_class,
    functools.partial(two, Agent("polite")),
    nested(Agent("polite")),
    Voice("polite").ask,
    Manner(tone="polite").ask,
    "{}".format,
    {"a": "b"}.get,
    re.compile("a").sub,
    len,
    str.upper,
    shout.__call__,  # type: ignore[operator]
]


@pytest.mark.parametrize("function", OPAQUE)
def test_a_state_that_no_fingerprint_tells_needs_a_version(function: Any) -> None:
    """What goes by the state of an object is asked for a version, for two of them could not be told apart."""
    with pytest.raises(
        UsageError, match=r"^expected a function whose answers are known again, got: .*version"
    ):
        ask(function=function)
    asked = [ask(function=function, version=version) for version in ("polite", "rude")]
    assert asked[0].task != asked[1].task
    assert next(iter(asked[0].authority.functions.values())).call is function


@pytest.mark.parametrize("function", TOLD)
def test_what_name_and_fingerprint_tell_needs_no_version(function: Any) -> None:
    """Functions, methods of values and of objects without a state, and what is closed over, are taken as they are."""
    assert ask(function=function).task.version is None


def test_the_refusal_names_the_method_and_the_way_out() -> None:
    """The message tells what was given and what to do."""
    way_out = "that has a state; give `version`, another one for each state, or make it a dataclass"
    for function, shown in (
        (Agent("x").ask, "`Agent.ask` of an object"),
        (Agent("x"), "an object of `Agent`"),
    ):
        with pytest.raises(UsageError) as caught:
            ask(function=function)
        expected = f"expected a function whose answers are known again, got: {shown} {way_out}"
        assert str(caught.value) == expected


def test_a_version_of_its_own_is_enough() -> None:
    """An object may say its version itself."""
    agent = Agent("polite")
    agent.version = "polite"  # type: ignore[attr-defined]
    assert ask(function=agent).task.version == "polite"


def test_methods_of_two_objects_are_not_served_at_once() -> None:
    """A worker that could not tell which of two objects a run asks for refuses both; the same one twice is no matter."""
    agent = Agent("polite")
    assert len(authorize([agent.ask, agent.ask]).functions) == 1
    with pytest.raises(
        UsageError, match=r"expected functions that can be told apart, got: .*:Agent.ask of two"
    ):
        authorize([agent.ask, Agent("rude").ask])


def test_a_name_that_leads_to_another_function_tells_nothing() -> None:
    """A decorator gives what it makes the name of what it was given; only one of the two is to be had by it."""
    loud = decorate(shout)
    assert (identify(loud).name, identify(loud).anonymous) == (f"{HERE}:shout", True)
    assert not identify(decorated).anonymous
    assert identify(Sub.of_class).anonymous
    assert identify(Sub.of_class).fingerprint != identify(Caller.of_class).fingerprint


def test_a_function_of_a_module_that_was_loaded_again_keeps_its_name(module: Any) -> None:
    """As long as the code is the same; after that the name leads to another function."""
    module("fn_again", "def f(text): return text")
    old = import_function("fn_again:f")
    importlib.reload(sys.modules["fn_again"])
    assert not identify(old).anonymous
    module("fn_again", "def f(text): return text + text")
    importlib.reload(sys.modules["fn_again"])
    assert identify(old).anonymous


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("polite", "fn_objects:polite"),
        ("rude", "fn_objects:rude"),
        ("agent", "fn_objects:agent"),
        ("agent.ask", "fn_objects:agent.ask"),
        ("part", "fn_objects:part"),
        ("made", "fn_objects:made"),
        ("alias", "fn_objects:f"),
        ("f", "fn_objects:f"),
        ("Agent.ask", "fn_objects:Agent.ask"),
    ],
)
def test_what_was_found_by_a_name_is_known_by_it(module: Any, spec: Any, name: Any) -> None:
    """What has no name of its own has the one it was found by, and needs no version; a function keeps its own."""
    module(
        "fn_objects",
        """
import functools
class Agent:
    def __init__(self, tone): self.tone = tone
    def ask(self, text): return self.tone + text
    def __call__(self, text): return self.tone + text
def f(text): return text
def make(tone): return lambda text: tone + text
agent, polite, rude = Agent("x"), Agent("polite").ask, Agent("rude").ask
part, made, alias = functools.partial(Agent("x").ask), make("x"), f
""",
    )
    asked = ask(function=f"fn_objects:{spec}")
    assert (asked.task.function, asked.task.fingerprint, asked.task.version) == (name, None, None)
    assert list(authorize([f"fn_objects:{spec}"]).functions) == [name]


def test_objects_count_by_their_type() -> None:
    """An object's address is not part of a fingerprint."""
    assert identify(nested(Caller())).fingerprint == identify(nested(Caller())).fingerprint
    assert identify(Caller().now).fingerprint == identify(Caller().now).fingerprint


def test_cycles_end() -> None:
    """Functions and values that hold themselves have a fingerprint, and the same one each time."""

    def cyclic(limit: Any) -> Any:
        values = [limit]
        values += [values, {"again": values}, values]

        def even(n: Any) -> Any:
            return values if n == 0 else odd(n - 1)

        def odd(n: Any) -> Any:
            return values if n == 0 else even(n - 1)

        return even

    assert identify(cyclic(1)).fingerprint == identify(cyclic(1)).fingerprint
    assert identify(cyclic(1)).fingerprint != identify(cyclic(2)).fingerprint


def test_an_empty_cell_is_no_obstacle() -> None:
    """A variable that is bound later does not hinder."""

    def maker() -> Any:
        def inner(text: Any) -> Any:
            return text + late

        fingerprint = identify(inner).fingerprint
        late = "x"
        return fingerprint, identify(inner).fingerprint

    before, after = maker()
    assert before != after


PROGRAM = """
import datetime, functools, pathlib, re, sys
from dataclasses import dataclass
{padding}
def make(words, extra):
    def fn(text):
        if text in {{"red", "green", "blue", "cyan", "pink", "grey"}}:
            return [x for x in words if x != extra]
        return (lambda y: y + text)(extra)
    return fn
class Thing: pass
@dataclass
class Voice: tone: object
def named(text): return text
from lbr.models.identity import identify
for f in (make({{"one", "two", "three"}}, "e"), make((Thing(), named), {{1.5: b"x"}}), named,
          functools.partial(named, text=frozenset("abc")), lambda t: t,
          make(Voice({{"one", "two"}}), (re.compile("a"), pathlib.Path("b"), datetime.timedelta(1)))):
    i = identify(f)
    print(i.name, i.fingerprint, i.anonymous)
"""


def run_program(tmp_path: Path, *, seed: Any, padding: Any = "", how: Any = "file") -> Any:
    """Run the program under a hash seed, and return what it prints."""
    tmp_path.mkdir(exist_ok=True)
    code = PROGRAM.format(padding=padding)
    (tmp_path / "prog.py").write_text(code)
    command = {
        "file": ["prog.py"],
        "module": ["-m", "prog"],
        "code": ["-c", code],
        "import": ["-c", "import prog"],
    }[how]
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_a_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Neither hash seed nor file nor line number reach a fingerprint."""
    first = run_program(tmp_path / "a", seed=1)
    again = run_program(tmp_path / "b", seed=2, padding="\n\n# moved down\n\n")
    imported = run_program(tmp_path / "c", seed=3, how="import")
    assert first == again == imported
    assert [anonymous for _, _, anonymous in first] == ["True", "True", "False", "True", "True", "True"]


@pytest.mark.parametrize("how", ["file", "module", "import"])
def test_a_script_is_named_as_the_command_line_names_it(tmp_path: Path, how: Any) -> None:
    """A function of a script has the name that --function gives it, however the script is started."""
    assert run_program(tmp_path, seed=1, how=how)[2][::2] == ["prog:named", "False"]


def test_a_main_module_without_a_file_names_nothing(tmp_path: Path) -> None:
    """What was typed in has no name that another process could use."""
    assert run_program(tmp_path, seed=1, how="code")[2][::2] == ["__main__:named", "True"]


# --- FunctionModel ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(RuntimeError, match=r"the function raised StopIteration\(\)"):
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
from lbr.jobs import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.function import FunctionModel

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
    return Authority(functions={one.identity.name: one for one in map(name_function, functions)})


async def test_a_named_function_is_served() -> None:
    """A worker that names the function serves its run."""
    model = build_model(Task(function=f"{HERE}:shout"), authority(shout), concurrency=1)
    assert (await model.answer(request())).text == "HELLO"
    await model.aclose()


def test_a_function_that_was_not_named_is_refused() -> None:
    """A database alone makes nobody import a function; the message says how to allow it."""
    with pytest.raises(UsageError) as caught:
        build_model(Task(function="os:system"), authority(shout), concurrency=1)
    assert str(caught.value) == (
        "the run asks for function os:system; start the worker with --function os:system"
    )


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
    with pytest.raises(
        UsageError, match=rf"with fingerprint ab, but here it has {fingerprint}: its code or what"
    ):
        build_model(Task(function=name, version="2", fingerprint="ab"), allowed, concurrency=1)


def test_a_version_given_beside_the_function_does_not_shut_workers_out() -> None:
    """A function that says no version serves a run whose version was given when it was enqueued."""
    model = build_model(Task(function=f"{HERE}:shout", version="1"), authority(shout), concurrency=1)
    assert isinstance(model, FunctionModel)


def test_functions_take_no_settings() -> None:
    """Settings beside a function are refused when they are enqueued."""
    check_task(Task(function="m:f"))
    with pytest.raises(UsageError, match=r"expected no settings beside a function, got: seed, temperature;"):
        check_task(Task(function="m:f", settings={"temperature": 1, "seed": 2}))


def test_a_schema_that_is_none_is_refused_for_everyone() -> None:
    """A broken schema is refused when it is enqueued."""
    with pytest.raises(UsageError, match="expected a JSON schema, but at"):
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
