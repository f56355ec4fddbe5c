"""What the public functions take: the type of each argument, looked at before anything else is done.

A value that is only out of range is told by whoever uses it, as from the command line; here stands what would else
be an AttributeError or a TypeError from the inside, perhaps after a call was paid for.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, ParamSpec, TypeVar

from lbr.core.errors import LbrError, UsageError
from lbr.io.records import shown
from lbr.io.sources import can_be_iterated

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of arguments: what it is called, what fits, and how to write it (`{name}` is the argument's name).

    A `private` value, which may hold a password, is told by its type alone.
    """

    words: str
    fits: Callable[[Any], bool]
    way_out: str = ""
    private: bool = False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_path(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, PathLike) and isinstance(fspath(value), str))


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (_is_list(value) and all(map(_is_text, value)))  # type: ignore[call-overload]


def _is_list(value: object) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str | bytes | Mapping | type)
        and can_be_iterated(value)
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = Kind("a string", _is_text)
RUN = Kind("a string", _is_text, "give the run's name")
NAMES = Kind("a string or a list of them", _are_names)
MODEL = Kind("a string", _is_text, "give its name, such as 'openai-chat:gpt-4o-mini'")
PRICE = Kind("a string", _is_text, "write it as 'in=0.15,out=0.60', US dollars for a million tokens")
SECRET = Kind("a string", _is_text, private=True)
FILE = Kind("a string or a path", _is_path, private=True)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
SETTINGS = Kind("a dict", lambda value: isinstance(value, Mapping), "write it as {{'temperature': 0.2}}")
SCHEMA = Kind("a dict", lambda value: isinstance(value, Mapping), "give the JSON schema as Python has it")
LIMITS = Kind("a dict", lambda value: isinstance(value, Mapping), "write it as {{'rpm': 500}}")
LIST = Kind("a list", _is_list, "write {name}=[…]")
FUNCTION = Kind("a function", callable)
PLACE = Kind("a whole number", _is_whole, "give the place of the input, counted from 0")
EVERY = Kind(
    "a whole number of at least 0",
    lambda value: value is None or (_is_whole(value) and value >= 0),
    "None never prints a line",
)

KINDS: Mapping[str, Kind] = {
    "run": RUN,
    "idx": PLACE,
    "model": MODEL,
    "model_name": MODEL,
    "openrouter_api_key": SECRET,
    "price": PRICE,
    "settings": SETTINGS,
    "schema": SCHEMA,
    "values": LIMITS,
    "where": NAMES,
    "functions": LIST,
    "result_types": LIST,
    "progress_every": EVERY,
    **dict.fromkeys(("version", "instructions", "template", "prompt_column", "reason", "scope"), TEXT),
    **dict.fromkeys(("delimiter", "encoding"), TEXT),
    **dict.fromkeys(("append", "fresh", "servable", "wait", "fix", "restart", "skip_empty"), FLAG),
    **dict.fromkeys(("spreadsheet_safe", "bom"), FLAG),
    **dict.fromkeys(("teardown", "retry_failed", "allow_network_fs"), FLAG),
    **dict.fromkeys(("db_url", "results_db_url", "to_url", "out", "skip_bad"), FILE),
    **dict.fromkeys(("notify", "on_start", "on_kept"), FUNCTION),
}
"""By the argument's name, which means the same in every function. Numbers and words of a list are not here:
`lbr.core.config` tells what they may be."""


OTHER_NAMES: Mapping[str, Sequence[str]] = {
    "db": ["db_url"],
    "format": ["input_format"],
    "function": ["worker", "functions"],
    "model": ["model_name"],
    "result-type": ["result_types"],
    "set": ["settings"],
}
"""What parameters are called that do not have the name of their flag."""
_FLAG = re.compile(r"`[^`]*`|--([a-z][a-z-]*)(?: (in=…,out=…|[\w.-]+:[\w.-]*\w|[A-Z]{2,}|csv|cp1252|tab))?")


def checked(
    **kinds: Kind,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Have a coroutine function raise UsageError for arguments of another type; `kinds` go before those of KINDS.

    None fits where it is the default. Errors name parameters, and keep the message that names flags.
    """

    def decorate(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        signature = inspect.signature(function)
        wanted = {name: kind for name in signature.parameters if (kind := kinds.get(name) or KINDS.get(name))}

        @functools.wraps(function)
        async def checking(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # Python's own words name the function
                return await function(*args, **kwargs)
            for name, kind in wanted.items():
                if name in given and not (given[name] is None and signature.parameters[name].default is None):
                    _check(name, given[name], kind)
            try:
                return await function(*args, **kwargs)
            except LbrError as error:
                if error.in_flags is None:
                    error.in_flags = str(error)
                    error.args = (_with_parameters(error.in_flags, signature.parameters),)
                raise

        return checking

    return decorate


def _with_parameters(message: str, parameters: Collection[str]) -> str:
    """Return a message with the names of parameters for those of flags; commands in backticks stay."""

    def parameter(found: re.Match[str]) -> str:
        flag = found[1] or ""
        names = (flag.replace("-", "_"), *OTHER_NAMES.get(flag, ()))
        known = [name for names_there in (parameters, KINDS) for name in names if name in names_there]
        if not known:
            return found[0]
        if found.start() < message.find(", got:"):  # what is expected, not what to set
            return known[0]
        kind, given = KINDS.get(known[0]), repr(found[2]) if found[2] else "…"
        value = "True" if kind is FLAG else f"[{given}]" if kind is LIST else given
        return f"{known[0]}={value}"

    return _FLAG.sub(parameter, message)


def _check(name: str, value: object, kind: Kind) -> None:
    if not kind.fits(value):
        way_out = f"; {kind.way_out.format(name=name)}" if kind.way_out else ""
        got = type(value).__name__ if kind.private else _words_of(value)
        raise UsageError(f"expected {name} to be {kind.words}, got: {got}{way_out}")


def _words_of(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if inspect.isroutine(value):
        return f"the function {value.__qualname__}"
    return shown(value)
