"""Functions as their users give them: how they are found, named and told apart."""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import functools
import importlib
import io
import operator
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic_ai import Agent as TalkingAgent

from lbr.api.task import authorize, resolve_task
from lbr.core.errors import Family, UsageError
from lbr.models.identity import has_changed, has_other_code, identify, import_function, name_function
from tests.support import ROOT
from tests.support.callables import (
    AsyncCaller,
    Caller,
    cached,
    coroutine_maker,
    decorate,
    decorated,
    nested,
    shout,
    shout_later,
    two,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# --- import_function --------------------------------------------------------------------------------------------------


def test_a_function_is_found_in_the_working_directory(module: Any, tmp_path: Path) -> None:
    """Modules and packages of the working directory are importable, and so are attributes of attributes."""
    module("fn_pkg/fn_mod", "class Client:\n    def ask(self, t): return t * 2\nclient = Client()\n")
    assert str(tmp_path) not in sys.path
    assert import_function("fn_pkg.fn_mod:client.ask")("ab") == "abab"
    assert sys.path[-1] == str(tmp_path)
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
        (
            "offline:echo",
            "cannot import 'offline:echo': module 'offline' failed with ModuleNotFoundError: No module named 'offline'; if",
        ),
        ("fn_syntax:f", "cannot import 'fn_syntax:f': module 'fn_syntax' failed with SyntaxError: "),
        ("fn_exit:f", "cannot import 'fn_exit:f': module 'fn_exit' failed with SystemExit: 3"),
        (
            "fn_raise:f",
            "cannot import 'fn_raise:f': module 'fn_raise' failed with KeyError: 'no such setting'",
        ),
        ("fn_good:g", "cannot import 'fn_good:g': module 'fn_good' has no attribute 'g'"),
        ("fn_good:f.x.y", "cannot import 'fn_good:f.x.y': 'function' object has no attribute 'x'"),
        ("fn_good:number", "expected 'fn_good:number' to be a function, got: int"),
        ("fn_good:Class", "expected 'fn_good:Class' to be a function, got: the class Class"),
        ("..fn_good:f", "cannot import '..fn_good:f': module '..fn_good' failed with TypeError: "),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_step_that_failed(module: Any, spec: Any, message: Any) -> None:
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
    home = __name__ if name == "<lambda>" else shout.__module__
    assert (identity.name, identity.anonymous) == (f"{home}:{name}", anonymous)


@pytest.mark.parametrize(("function", "name"), [(len, "builtins:len"), (str.upper, "builtins:str.upper")])
def test_builtins_have_names_too(function: Any, name: Any) -> None:
    """Functions written in C are named by where they live, and have a fingerprint."""
    identity = identify(function)
    assert (identity.name, identity.anonymous) == (name, False)
    assert re.fullmatch(r"2py3\.\d+:[0-9a-f]{32}", identity.fingerprint)


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
    assert identify(functools.partial(versioned("2"), "a")).version == "2"
    assert identify(functools.wraps(versioned("2"))(lambda text: text)).version == "2"


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
        (lambda text: text, lambda *text: text),
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


class JobStatus:
    """A proxy: it says that it is whatever it stands for."""

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__wrapped__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return f"{self.__wrapped__(text)}!"


class Reserved(BaseModel):
    """A model that keeps something to itself."""

    _tone: str = PrivateAttr("")

    def ask(self, text: Any) -> Any:
        """Answer."""
        return f"{self._tone} {text}"


def private(tone: Any) -> Any:
    model = Reserved()
    model._tone = tone
    return model


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
        (str.upper, str.lower),
        (slice(1), slice(2)),
        (bytearray(b"a"), bytearray(b"b")),
        (Enum("E", {"A": 1}).A, Enum("E", {"A": 2}).A),  # type: ignore[attr-defined]
        (timezone(timedelta(hours=1)), timezone(timedelta(hours=2))),
        (ZoneInfo("Europe/Berlin"), ZoneInfo("Europe/Paris")),
        (
            datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Paris")),
        ),
        (SimpleNamespace(tone="polite"), SimpleNamespace(tone="rude")),
        (argparse.Namespace(tone="polite"), argparse.Namespace(tone="rude")),
        (re.ASCII | re.IGNORECASE, re.ASCII),
        (re.RegexFlag(0), re.ASCII),
        ([10**5000], [10**5000 + 1]),
        (private("polite"), private("rude")),
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
        (private("polite").ask, private("rude").ask),
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


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (functools.cache(functools.partial(two, "a")), functools.cache(functools.partial(two, "b"))),
        (functools.cache(functools.partial(two, "a")), functools.cache(functools.partial(shout))),
        (functools.cache(Voice("polite").ask), functools.cache(Voice("rude").ask)),
        (functools.lru_cache(Caller().now), functools.lru_cache(Caller().later)),
        (functools.partial(Voice.ask, Voice("polite")), functools.partial(Voice.ask, Voice("rude"))),
        (shout, JobStatus(shout)),
    ],
)
def test_what_stands_for_a_function_is_told_apart_by_it(left: Any, right: Any) -> None:
    """A cache of a partial or a method, and a proxy that says it is a function, are not the next one."""
    assert identify(left).fingerprint != identify(right).fingerprint
    assert identify(left).fingerprint == identify(left).fingerprint


def test_a_function_whose_values_changed_has_changed() -> None:
    """A run warns about it at its end, and whatever goes wrong with the values by then does no harm."""

    class Torn(dict[str, int]):
        broken = False

        def items(self) -> Any:
            if Torn.broken:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    words: list[str] = []
    torn = name_function(nested(Torn()))
    appended = name_function(nested(words))
    assert not has_changed(torn)
    assert not has_changed(appended)
    words.append("x")
    Torn.broken = True
    assert has_changed(torn)
    assert has_changed(appended)
    assert not has_changed(name_function(shout))
    with pytest.raises(UsageError, match="cannot compare: dictionary changed size during iteration"):
        identify(nested(Torn()))


def test_values_nested_too_deeply_are_refused() -> None:
    """The message names the way out."""
    deep: list[Any] = []
    for _ in range(3_000):
        deep = [deep]
    with pytest.raises(UsageError, match=r"cannot compare: maximum recursion depth .* read them from a global"):
        identify(nested(deep))


class Endless:
    """Has every attribute, as a proxy of a server has."""

    def __getattr__(self, name: str) -> Any:
        return Endless()

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return text


def test_what_is_closed_over_may_have_every_attribute() -> None:
    """It counts by its class."""
    assert identify(nested(Endless())).fingerprint == identify(nested(Endless())).fingerprint
    assert identify(Endless()).fingerprint == identify(Endless()).fingerprint


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


@dataclass
class Prepared(Voice):
    """A dataclass with more than its fields."""

    def __post_init__(self) -> None:
        self.greeting = f"Dear {self.tone}"


@dataclass
class Computing:
    """A dataclass that keeps what it computed."""

    tone: str

    @functools.cached_property
    def greeting(self) -> str:
        """Return the beginning of an answer."""
        return f"Dear {self.tone}"

    def ask(self, text: Any) -> Any:
        """Answer."""
        return f"{self.greeting} {text}"


@dataclass
class Counting:
    """A dataclass that counts, which is no part of what it is."""

    tone: str
    calls: int = dataclasses.field(default=0, compare=False)

    def ask(self, text: Any) -> Any:
        """Answer."""
        self.calls += 1
        return f"{self.tone} {text}"


def test_what_a_dataclass_does_not_compare_is_no_part_of_it() -> None:
    """So that a counter or a client may be in one."""
    voice = Counting("polite")
    before = identify(voice.ask), identify(nested(voice))
    voice.ask("x")
    assert (identify(voice.ask), identify(nested(voice))) == before
    assert identify(Counting("rude").ask) != before[0]
    assert resolve_task(function=voice.ask).task.version is None


PACKAGE = """
from dataclasses import dataclass
from pydantic import BaseModel

class Methods:
    def ask(self, text): return f"{self.tone} {text}"

@dataclass
class Client(Methods):
    tone: str

class Model(BaseModel):
    tone: str
    def ask(self, text): return f"{self.tone} {text}"

@dataclass(frozen=True)
class Settings(Methods):
    tone: str

class Frozen(Model, frozen=True): pass
"""


def test_of_a_package_only_frozen_objects_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed class may change its objects as they are used, and a change would ask everything again."""
    folder = tmp_path / "site-packages"
    (folder / "fn_installed").mkdir(parents=True)
    (folder / "fn_installed" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)
    package = importlib.import_module("fn_installed")
    for kind, looked_into in (
        (package.Client, False),
        (package.Model, False),
        (package.Settings, True),
        (package.Frozen, True),
    ):
        polite, rude = kind(tone="polite"), kind(tone="rude")
        assert (identify(nested(polite)) != identify(nested(rude))) is looked_into
        assert identify(nested(polite)).opaque == (None if looked_into else kind.__name__)
    del sys.modules["fn_installed"]


async def test_an_agent_is_the_same_before_and_after_its_use() -> None:
    """One of pydantic-ai is a dataclass that is given a name when it is first run."""
    agent = TalkingAgent("test")

    async def answer(prompt: str) -> str:
        return (await agent.run(prompt)).output

    before = identify(answer)
    assert await answer("x")
    assert agent.name == "agent"
    assert identify(answer) == before


def computed(tone: str) -> Computing:
    voice = Computing(tone)
    assert voice.greeting == f"Dear {tone}"
    return voice


class LessPlain(Voice):
    """A dataclass in its bases only."""

    def __init__(self, tone: Any, extra: Any) -> None:
        super().__init__(tone)
        self.extra = extra


class Secret(str):
    """Text with more to it."""

    __slots__ = ()


class Sub(Caller):
    """Inherits a class method."""


@Wrapping
def in_an_object(text: Any) -> Any:
    return text


def retry(policy: Any) -> Callable[[Any], Any]:
    """Decorate as packages do, with an object in the closure."""

    def decorator(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return policy and function(*args, **kwargs)

        return wrapper

    return decorator


@retry(Agent("patient"))
def retried(text: Any, more: Any = "") -> Any:
    return text + more


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
    functools.partial(Agent.ask, Agent("polite")),
    functools.cache(Agent("polite").ask),
    functools.cache(functools.partial(Agent("polite"))),
    Wrapping(shout),
    JobStatus(shout),
    nested(Agent("polite")),
    nested([Voice("x", {"a": Agent("polite")})]),
    functools.partial(two, Agent("polite")),
    nested(asyncio.Event()),
    nested(np.arange(3)),
    nested(Secret("polite")),
    nested(TalkingAgent("test")),
    nested(Caller()),
    Caller().now,
    Caller(),
]
TOLD = [
    shout,
    in_an_object,
    cached,
    functools.cache(shout),
    functools.cache(nested(1)),
    functools.partial(retried, more="x"),
    decorate(retried),
    Caller.of_class,
    Sub.of_class,
    Sub().of_class,
    Voice("polite").ask,
    Prepared("polite").ask,
    Manner(tone="polite").ask,
    computed("polite").ask,
    functools.partial(str.format, "polite {}"),
    functools.partial(Voice.ask, Voice("polite")),
    functools.cache(Voice("polite").ask),
    "{}".format,
    {"a": "b"}.get,
    re.compile("a").sub,
    len,
    str.upper,
    shout.__call__,  # type: ignore[operator]
]


@pytest.mark.parametrize("function", OPAQUE)
def test_an_object_known_by_its_class_alone_needs_a_version(function: Any) -> None:
    """Two functions with different objects of one class would share their answers, so lbr asks for a version."""
    with pytest.raises(UsageError, match=r"depends on an object of the class \w+, .* Pass `version=`"):
        resolve_task(function=function)
    asked = [resolve_task(function=function, version=version) for version in ("polite", "rude")]
    assert asked[0].task != asked[1].task
    assert asked[0].authority.functions[0].call is function


@pytest.mark.parametrize("function", TOLD)
def test_what_name_and_fingerprint_identify_needs_no_version(function: Any) -> None:
    """Named functions, values and methods of values are taken as they are."""
    assert resolve_task(function=function).task.version is None


def test_the_refusal_names_the_class_and_the_way_out() -> None:
    """The message names the function, the object's class and what to do."""
    with pytest.raises(UsageError) as caught:
        resolve_task(function=Agent("x").ask)
    assert str(caught.value) == (
        f"{__name__}:Agent.ask depends on an object of the class Agent, and lbr cannot compare such objects between "
        "runs. Pass `version=`, a different one for each object that gives other answers, or keep what decides the "
        "answers in a dataclass"
    )


def test_a_version_of_its_own_is_enough() -> None:
    """An object may say its version itself."""
    agent = Agent("polite")
    agent.version = "polite"  # type: ignore[attr-defined]
    assert resolve_task(function=agent).task.version == "polite"


def test_methods_of_two_objects_are_not_served_at_once() -> None:
    """A worker that could not tell which of two objects a run asks for refuses both; the same one twice is no matter."""
    agent = Agent("polite")
    assert len(authorize([agent.ask, agent.ask]).functions) == 1
    with pytest.raises(
        UsageError,
        match=r":Agent.ask is given twice, with different objects of the class Agent, which lbr cannot tell",
    ):
        authorize([agent.ask, Agent("rude").ask])


def test_a_name_that_leads_to_another_function_tells_nothing() -> None:
    """A decorator gives what it makes the name of what it was given; only one of the two is to be had by it."""
    loud = decorate(shout)
    assert (identify(loud).name, identify(loud).anonymous) == (f"{shout.__module__}:shout", True)
    assert not identify(decorated).anonymous
    assert identify(Sub.of_class).anonymous
    assert identify(Sub.of_class).fingerprint != identify(Caller.of_class).fingerprint


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
    asked = resolve_task(function=f"fn_objects:{spec}")
    assert (asked.task.function, asked.task.fingerprint, asked.task.version) == (name, None, None)
    assert [one.identity.name for one in authorize([f"fn_objects:{spec}"]).functions] == [name]


def test_objects_count_by_their_type() -> None:
    """An object's address is not part of a fingerprint."""
    assert identify(nested(Caller())).fingerprint == identify(nested(Caller())).fingerprint
    assert identify(Caller().now).fingerprint == identify(Caller().now).fingerprint


def test_cycles_of_functions_end() -> None:
    """Functions that hold each other have a fingerprint, and the same one each time; values that do are refused."""

    def cyclic(limit: Any) -> Any:
        def even(n: Any) -> Any:
            return limit if n == 0 else odd(n - 1)

        def odd(n: Any) -> Any:
            return limit if n == 0 else even(n - 1)

        return even

    assert identify(cyclic(1)).fingerprint == identify(cyclic(1)).fingerprint
    assert identify(cyclic(1)).fingerprint != identify(cyclic(2)).fingerprint
    voice = Voice("polite")
    voice.more = [voice]
    with pytest.raises(UsageError, match=r"cannot compare: maximum recursion depth"):
        identify(voice.ask)


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


def test_fingerprints_of_another_python_or_an_earlier_lbr_are_not_compared() -> None:
    """Their difference does not show that the code changed."""
    fingerprint = identify(shout).fingerprint
    assert has_other_code(fingerprint, identify(two).fingerprint)
    for stored in (fingerprint, None, "0" * 32, "py2.7:" + "0" * 32):
        assert not has_other_code(fingerprint, stored)


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
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Neither hash seed nor file nor line number reach a fingerprint."""
    first = run_program(tmp_path / "a", seed=1)
    again = run_program(tmp_path / "b", seed=2, padding="\n\n# moved down\n\n")
    imported = run_program(tmp_path / "c", seed=3, how="import")
    assert first == again == imported
    assert [anonymous for _, _, anonymous in first] == [
        "True",
        "True",
        "False",
        "True",
        "True",
        "True",
    ]


@pytest.mark.parametrize("how", ["file", "module", "import"])
def test_a_script_is_named_as_the_command_line_names_it(tmp_path: Path, how: Any) -> None:
    """A function of a script has the name that --function gives it, however the script is started."""
    assert run_program(tmp_path, seed=1, how=how)[2][::2] == ["prog:named", "False"]


def test_a_main_module_without_a_file_names_nothing(tmp_path: Path) -> None:
    """What was typed in has no name that another process could use."""
    assert run_program(tmp_path, seed=1, how="code")[2][::2] == ["__main__:named", "True"]
