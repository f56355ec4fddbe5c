"""A digest of a function's code and of what it closes over.

What is a value by nature is looked into; any other object counts by its type alone, for what is inside a client differs
from process to process.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import re
import sys
from collections import deque
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any
from uuid import UUID

from lbr.structured import is_base_model

PLAIN = (type(None), bool, int, float, complex, str, bytes)
CONTAINERS = (tuple, list, set, frozenset, dict, deque, MappingProxyType)
ROUTINES = (
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
MAIN_MODULES = ("__main__", "__mp_main__")
DIGEST_BYTES = 16


def fingerprint_of(function: Any) -> str:
    """Return the fingerprint of a function: the same in every process of one Python version."""
    return _digest(function, _Seen({})).hex()


def home_of(function: Any) -> str:
    """Return the module that something was defined in, by its name in `sys.modules`."""
    owner = (
        function
        if getattr(function, "__module__", None)
        else getattr(function, "__objclass__", type(function))
    )
    return str(owner.__module__)


def module_name(function: Any) -> str:
    """Return the name by which other programs import the module that something was defined in."""
    name = home_of(function)
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
        case _ if isinstance(value, PLAIN):
            return _join("plain", type(value).__name__, repr(value))
        case _ if isinstance(value, CONTAINERS):
            return _digest_container(value, seen.inside(value))
        case type():
            return _join("type", _type_name(value))
        case ModuleType():
            return _join("module", value.__name__)
        case CodeType():
            parts = (_digest(part, seen) for part in (value.co_consts, value.co_names))
            return _join("code", value.co_code, value.co_exceptiontable, *parts)
    words = _words_of(value)
    return _digest_callable(value, seen) if words is None else _join(_type_name(type(value)), *words)


def _words_of(value: Any) -> tuple[str, ...] | None:
    """Return what tells a value of the standard library from others of its type, None for anything else."""
    match value:
        case datetime() | date() | time():
            return value.isoformat(), str(getattr(value, "fold", 0))
        case timedelta():
            return (str(value // timedelta.resolution),)
        case Decimal() | Fraction() | UUID() | PurePath() | range() | bytearray():
            return (str(value),)
        case re.Pattern():
            return repr(value.pattern), str(value.flags)
    return None


def _digest_container(value: Any, seen: _Seen) -> bytes:
    match value:
        case set() | frozenset():
            members = sorted(_digest(member, seen.alone()) for member in value)
            return _join("set", *members)
        case dict() | MappingProxyType():
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
        case BuiltinFunctionType() | MethodWrapperType():
            names = ("builtin", str(getattr(value, "__module__", None)), value.__qualname__)
            bound = is_bound(value)
            return _join(*names, _digest(value.__self__, seen)) if bound else _join(*names)
        case MethodDescriptorType() | WrapperDescriptorType():
            return _join("builtin", _type_name(value.__objclass__), value.__qualname__)
    return _digest_object(value, seen)


def _digest_object(value: Any, seen: _Seen) -> bytes:
    wrapped = getattr(value, "__wrapped__", None)
    call = getattr(type(value), "__call__", None)  # noqa: B004 - wanted is the function itself
    inner = wrapped if isinstance(wrapped, FunctionType) else call
    code = _digest(inner, seen) if isinstance(inner, FunctionType) else b""
    names = field_names(value)
    if names is None:
        return _join("object", _type_name(type(value)), code)
    inside = seen.inside(value)
    fields = (_digest((name, getattr(value, name, "<unset>")), inside) for name in names)
    return _join("fields", _type_name(type(value)), code, *fields)


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


# --- what no digest tells ---------------------------------------------------------------------------------------------


def field_names(value: Any) -> list[str] | None:
    """Name the fields of a dataclass instance or a pydantic model, in order; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value)]
    if is_base_model(value):
        return [*type(value).model_fields, *(value.model_extra or ())]
    return None


def is_bound(function: Any) -> bool:
    """Tell whether a callable is a method of an instance, of a Python class or of one that is written in C."""
    if not isinstance(function, MethodType | BuiltinFunctionType | MethodWrapperType):
        return False
    return function.__self__ is not None and not isinstance(function.__self__, type | ModuleType)


def hides_state(function: Any) -> bool:
    """Tell whether a function goes by the state of an object that no fingerprint tells.

    The object is the one whose method it is, or itself, behind partials and decorators too; one that it closes over is
    not meant.
    """
    met: set[int] = set()
    while id(function) not in met:
        met.add(id(function))
        if isinstance(function, functools.partial):
            function = function.func
        elif is_bound(function):
            if not isinstance(function, MethodType):
                return not isinstance(function.__self__, FunctionType) and _is_opaque(function.__self__)
            if _keeps_more(function.__self__):
                return True
            function = function.__func__
        elif not isinstance(function, ROUTINES) and (_keeps_more(function) or _is_called_in_c(function)):
            return True
        else:
            function = getattr(function, "__wrapped__", function)
    return False


def _is_opaque(value: Any) -> bool:
    """Tell whether an object of a class written in C may be in any state, for nobody can look into it."""
    known = isinstance(value, PLAIN + CONTAINERS) or _words_of(value) is not None
    return not known or bool(getattr(value, "__dict__", None))


def _is_called_in_c(value: Any) -> bool:
    """Tell whether an object is called by code in C, like those of `operator.methodcaller`: its state is not seen."""
    if isinstance(value, type) or hasattr(value, "__qualname__") or type(value).__module__ == "functools":
        return False
    return isinstance(type(value).__call__, WrapperDescriptorType)


def _keeps_more(value: Any) -> bool:
    """Tell whether an object has attributes that its digest leaves out."""
    # What functools makes keeps a cache at most; a class and a member of an enum are told by their names.
    if isinstance(value, type | enum.Enum) or type(value).__module__ == "functools":
        return False
    if isinstance(value, PLAIN + CONTAINERS) or _words_of(value) is not None:
        return bool(getattr(value, "__dict__", None))
    fields = field_names(value)
    if is_base_model(value) or "__dataclass_fields__" in vars(type(value)):
        return False
    told = {*(fields or ()), *functools.WRAPPER_ASSIGNMENTS, "__wrapped__"}
    return not told.issuperset(_attributes(value))


def _attributes(value: Any) -> list[str]:
    """Name what is set in an object, in its `__dict__` or in slots."""
    slots = [
        name
        for class_ in type(value).__mro__
        for name, member in vars(class_).items()
        if isinstance(member, MemberDescriptorType) and hasattr(value, name)
    ]
    return [*getattr(value, "__dict__", ()), *slots]
