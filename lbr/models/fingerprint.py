"""A digest of a function's code and of what it closes over."""

from __future__ import annotations

import enum
import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MAIN_MODULES = ("__main__", "__mp_main__")
DIGEST_BYTES = 16


def fingerprint_of(function: Any) -> str:
    """Return the fingerprint of a function: the same in every process of one Python version."""
    return _digest(function, _Seen({})).hex()


def module_name(function: Any) -> str:
    """Return the name by which other programs import the module that something was defined in."""
    owner = (
        function
        if getattr(function, "__module__", None)
        else getattr(function, "__objclass__", type(function))
    )
    name: str = owner.__module__
    if name not in MAIN_MODULES:
        return name
    main = sys.modules.get(name) or sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else name


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a walk has met, by id; ids never reach a fingerprint.

    Functions are numbered in the order of meeting, `around` are the containers that the walk is inside of.
    """

    functions: dict[int, int]
    around: frozenset[int] = frozenset()

    def inside(self, container: Any) -> _Seen:
        """Return what is seen from inside a container."""
        return _Seen(self.functions, self.around | {id(container)})

    def alone(self) -> _Seen:
        """Return a copy, for what comes in no certain order and so must not be numbered."""
        return _Seen(dict(self.functions), self.around)


def _digest(value: Any, seen: _Seen) -> bytes:
    """Return a digest of a value that says the same in every process of this Python."""
    if id(value) in seen.around:
        return _join("cycle")
    match value:
        case enum.Enum():
            return _join("enum", _type_name(type(value)), value.name)
        case None | bool() | int() | float() | complex() | str() | bytes():
            return _join("plain", type(value).__name__, repr(value))
        case tuple() | list() | set() | frozenset() | dict():
            return _digest_container(value, seen.inside(value))
        case type():
            return _join("type", _type_name(value))
        case ModuleType():
            return _join("module", value.__name__)
        case CodeType():
            parts = (_digest(part, seen) for part in (value.co_consts, value.co_names))
            return _join("code", value.co_code, value.co_exceptiontable, *parts)
    return _digest_callable(value, seen)


def _digest_container(value: Any, seen: _Seen) -> bytes:
    match value:
        case set() | frozenset():
            members = sorted(_digest(member, seen.alone()) for member in value)
            return _join("set", *members)
        case dict():
            return _join("dict", *(_digest(part, seen) for pair in value.items() for part in pair))
    return _join(type(value).__name__, *(_digest(member, seen) for member in value))


def _digest_callable(value: Any, seen: _Seen) -> bytes:
    if id(value) in seen.functions:
        return _join("seen", str(seen.functions[id(value)]))
    if isinstance(value, FunctionType | functools.partial | MethodType):
        seen.functions[id(value)] = len(seen.functions)
    match value:
        case FunctionType():
            cells = map(_cell_contents, value.__closure__ or ())
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, tuple(cells))
            return _join("function", *(_digest(part, seen) for part in parts))
        case functools.partial():
            return _join("partial", _digest((value.func, value.args, value.keywords), seen))
        case MethodType():
            return _join("method", _digest((value.__func__, value.__self__), seen))
        case BuiltinFunctionType():
            return _join("builtin", str(value.__module__), value.__qualname__)
    wrapped = getattr(value, "__wrapped__", None)
    call = getattr(type(value), "__call__", None)  # noqa: B004 - wanted is the function itself
    inner = wrapped if isinstance(wrapped, FunctionType) else call
    return _join(
        "object", _type_name(type(value)), _digest(inner, seen) if isinstance(inner, FunctionType) else ""
    )


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "<empty>"


def _type_name(type_: type) -> str:
    return f"{module_name(type_)}.{type_.__qualname__}"


def _join(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()
