"""What the public functions take: the types of arguments are checked before anything else, and errors name parameters.

A value that is only out of range is refused where it is used, as from the command line. Checked here is what would
otherwise be an AttributeError or a TypeError from the inside, perhaps after a call was paid for.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, ParamSpec, TypeVar

from lbr.core.errors import LbrError, UsageError
from lbr.io.records import shown
from lbr.io.sources import can_be_iterated

P = ParamSpec("P")
R = TypeVar("R")


def _is_path(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, PathLike) and isinstance(fspath(value), str))


def _is_list(value: object) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str | bytes | Mapping | type)
        and can_be_iterated(value)
    )


def _is_text_or_list(value: object) -> bool:
    return isinstance(value, str) or (_is_list(value) and all(isinstance(one, str) for one in value))  # type: ignore[attr-defined]


TYPES: Sequence[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (("str | Sequence",), "a string or a list of them", _is_text_or_list),
    (("str",), "a string", lambda value: isinstance(value, str)),
    (("bool",), "True or False", lambda value: isinstance(value, bool)),
    (("int",), "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    (("dict", "Mapping"), "a dict", lambda value: isinstance(value, Mapping)),
    (("Sequence",), "a list", _is_list),
    (("Callable[[str], None", "Callable[[int], None", "Callable[[Worker], None"), "a function", callable),
    (("PathOrUrl", "PathLike[str] | str"), "a string or a path", _is_path),
]
"""How an annotation begins, what it means in words, and what fits; arguments of other types are checked where used."""

PRIVATE = re.compile(r".*(_key|_url)|out")
"""Arguments whose value may hold a password, so that errors show its type alone."""

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
_annotations: dict[str, str] = {}
"""Of all parameters by name, for messages that name a flag of another command."""


def checked(
    function: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Let a coroutine function raise UsageError for arguments of another type than it is annotated with.

    Its errors name parameters, and keep the message that names flags.
    """
    signature = inspect.signature(function)
    annotations = {name: str(one.annotation) for name, one in signature.parameters.items()}
    _annotations.update(annotations)

    @functools.wraps(function)
    async def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(name, value, annotations[name])
        try:
            return await function(*args, **kwargs)
        except LbrError as error:
            if error.in_flags is None:
                error.in_flags = str(error)
                error.args = (_with_parameters(error.in_flags, annotations),)
            raise

    return checking


def _check(name: str, value: object, annotation: str) -> None:
    if value is None and annotation.endswith("| None"):
        return
    for begins, words, fits in TYPES:
        if annotation.startswith(begins):
            if fits(value):
                return
            got = type(value).__name__ if PRIVATE.fullmatch(name) else shown(value)
            raise UsageError(f"expected {name} to be {words}, got: {got}")


def _with_parameters(message: str, annotations: Mapping[str, str]) -> str:
    """Return a message with the names of parameters instead of flags; commands in backticks stay."""

    def parameter(found: re.Match[str]) -> str:
        flag = found[1] or ""
        names = (flag.replace("-", "_"), *OTHER_NAMES.get(flag, ()))
        name = next((one for known in (annotations, _annotations) for one in names if one in known), None)
        if name is None:
            return found[0]
        if found.start() < message.find(", got:"):  # what is expected, not what to set
            return name
        annotation, given = annotations.get(name) or _annotations[name], repr(found[2]) if found[2] else "…"
        value = (
            "True" if annotation == "bool" else f"[{given}]" if annotation.startswith("Sequence") else given
        )
        return f"{name}={value}"

    return _FLAG.sub(parameter, message)
