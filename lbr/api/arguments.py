"""The arguments of the public functions: their types are checked first, and errors name parameters, not flags."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager
from os import PathLike
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

from lbr.core.errors import LbrError, UsageError
from lbr.core.types import Json
from lbr.io.records import shown

P = ParamSpec("P")
R = TypeVar("R")

Function: TypeAlias = Callable[..., Any] | str | None
Inputs: TypeAlias = PathLike[str] | Iterable[PathLike[str] | str | dict[str, Json]]


class Frame(Protocol):
    """A DataFrame of pandas or polars."""

    @property
    def columns(self) -> Any:
        """Its columns."""

    @property
    def shape(self) -> Any:
        """The numbers of its rows and columns."""


TYPES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    (r"str \| Sequence", "a string or a list of them", (str, list, tuple)),
    (r"str\b", "a string", (str,)),
    (r"bool", "True or False", (bool,)),
    (r"int\b", "a whole number", (int,)),
    (r"dict|Mapping", "a dict", (Mapping,)),
    (r"Sequence", "a list", (list, tuple)),
    (r"Callable\[\[\w+\], None\]", "a function", (Callable,)),
    (r"PathOrUrl|PathLike\[str\] \| str", "a string or a path", (str, PathLike)),
)
"""The start of an annotation, its name in messages, and its types. Other arguments are checked where they are used."""

SECRET = re.compile(r".*(_key|_url)|out")
"""Arguments that may hold a password: errors show only their type."""

PARAMETERS = {
    "db": ("db_url",),
    "format": ("format", "input_format"),
    "function": ("worker", "function", "functions"),
    "notify": ("notify_url",),
    "model": ("model_name", "model"),
    "result_type": ("result_type", "result_types"),
    "set": ("settings",),
    "with": ("include",),
}
"""The parameters of flags that have a different name."""

_FLAG = re.compile(r"`[^`]*`|--([a-z][a-z-]*)(?: (in=…,out=…|[\w.-]+:[\w.-]*\w|[A-Z]{2,}|csv|cp1252|tab))?")


def checked(
    function: Callable[P, Coroutine[Any, Any, R]], options: Callable[..., Any] | None = None
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Check the types of a coroutine function's arguments against its annotations, and name parameters in errors.

    The function's `**options` are the keyword parameters of `options`. The message with flags stays in the error's
    `in_flags`, for the command line.
    """
    signature = _signature(function, options)
    checking = _checking(signature)

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with checking(*args, **kwargs):
            return await function(*args, **kwargs)

    vars(call)["__signature__"] = signature
    return call


def checked_stream(
    function: Callable[P, AsyncGenerator[R, None]], options: Callable[..., Any] | None = None
) -> Callable[P, AsyncGenerator[R, None]]:
    """Do the same for an asynchronous generator, when it starts."""
    signature = _signature(function, options)
    checking = _checking(signature)

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[R, None]:
        with checking(*args, **kwargs):
            async with aclosing(function(*args, **kwargs)) as found:
                async for one in found:
                    yield one

    vars(call)["__signature__"] = signature
    return call


def _signature(function: Callable[..., Any], options: Callable[..., Any] | None) -> inspect.Signature:
    """Return a function's signature with the keyword parameters of `options` in the place of its `**options`."""
    own = inspect.signature(function)
    if options is None:
        return own
    named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    more = [one for one in inspect.signature(options).parameters.values() if one.kind is one.KEYWORD_ONLY]
    return own.replace(parameters=[*named, *(one for one in more if one.name not in own.parameters)])


def _checking(signature: inspect.Signature) -> Callable[..., AbstractContextManager[None]]:
    """Return what checks the arguments of a call, and names parameters in the errors of its block."""
    annotations = {name: str(one.annotation) for name, one in signature.parameters.items()}

    @contextmanager
    def checking(*args: Any, **kwargs: Any) -> Iterator[None]:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if value is not None or not annotations[name].endswith("| None"):
                _check(name, value, annotations[name])
        try:
            yield
        except LbrError as error:
            if error.in_flags is None:
                error.in_flags = str(error)
                error.args = (_with_parameters(error.in_flags, annotations),)
            raise

    return checking


def either(name: str, value: Any, other_name: str, other: Any) -> Any:
    """Return the value of a parameter that has two names. Raises UsageError if both are given."""
    if value is not None and other is not None:
        raise UsageError(f"expected {name} or {other_name}, got: both")
    return other if value is None else value


def _check(name: str, value: Any, annotation: str) -> None:
    for start, expected, types in TYPES:
        if re.match(start, annotation):
            texts = value if isinstance(value, list | tuple) and str in types else ()
            if not isinstance(value, types) or not all(isinstance(one, str) for one in texts):
                got = type(value).__name__ if SECRET.fullmatch(name) else shown(value)
                raise UsageError(f"expected {name} to be {expected}, got: {got}")
            return


def _with_parameters(message: str, annotations: Mapping[str, str]) -> str:
    """Return a message with parameters in place of flags; commands in backticks stay."""

    def parameter(found: re.Match[str]) -> str:
        if found[1] is None:
            return str(found[0])
        flag: str = found[1].replace("-", "_")
        if flag.startswith("no_"):
            return f"{flag[3:]}=False"
        names = PARAMETERS.get(flag, (flag,))
        name = next((one for one in names if one in annotations), names[0])
        if found.start() < message.find(", got:"):  # what is expected, not what to set
            return name
        value = repr(found[2]) if found[2] else "True" if annotations.get(name) == "bool" else "…"
        return f"{name}={value}"

    return _FLAG.sub(parameter, message)
