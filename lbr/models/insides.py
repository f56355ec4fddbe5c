"""What is inside of values, and of what else a user's function may hold.

A class is asked for, never an object: a proxy says that it is of the class of what it stands for.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
import sys
import sysconfig
from collections import deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    GenericAlias,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
    UnionType,
)
from typing import TYPE_CHECKING, Any
from uuid import UUID

from lbr.core.schema import is_base_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PLAIN = (type(None), bool, int, float, complex, str, bytes)
MUTABLE = (list, set, dict, deque, MappingProxyType)
CONTAINERS = (tuple, frozenset, *MUTABLE)
MAIN_MODULES = ("__main__", "__mp_main__")


def is_one(value: Any, *classes: type) -> bool:
    """Tell whether a value is an instance of one of these classes, whatever it says of itself."""
    return issubclass(type(value), classes)


def attribute(value: Any, name: str, default: Any = None) -> Any:
    """Return an attribute, the default where there is none or where asking for it fails."""
    try:
        return getattr(value, name, default)
    except Exception:  # noqa: BLE001 - an object of the user's own may raise anything
        return default


def plain_text(value: Any) -> str:
    """Return what tells a plain value from others of its class, in words of its base class."""
    base: Any = next(one for one in PLAIN if issubclass(type(value), one))
    if base is int:  # Python writes none of thousands of digits in decimals
        return int.__format__(value, "x")
    head, dot, rest = str(value).partition(".") if base is str else ("", "", "")
    if dot and head in MAIN_MODULES:  # the name of a function, as some decorators keep it
        value = f"{main_name()}.{rest}"
    text: str = base.__repr__(value)
    return text


def _of_array(array: Any) -> tuple[Any, ...]:
    return repr(array.dtype), array.shape, array.tolist() if array.dtype.hasobject else array.tobytes()


# By name those that take their time to import, or are of packages that need not be there.
_PARTS: dict[type | str, Callable[[Any], tuple[Any, ...] | None]] = {
    enum.Enum: lambda it: (it.name, it.value),
    datetime: lambda it: (it.isoformat(), it.fold, it.tzinfo),
    date: lambda it: (it.isoformat(),),
    time: lambda it: (it.isoformat(), it.fold, it.tzinfo),
    timedelta: lambda it: (it.days, it.seconds, it.microseconds),
    timezone: lambda it: (repr(it),),
    "zoneinfo.ZoneInfo": lambda it: (it.key,),
    Decimal: lambda it: (str(it),),
    Fraction: lambda it: (str(it),),
    UUID: lambda it: (str(it),),
    PurePath: lambda it: (str(it),),
    range: lambda it: (it.start, it.stop, it.step),
    slice: lambda it: (it.start, it.stop, it.step),
    bytearray: lambda it: (bytes(it),),
    memoryview: lambda it: (it.format, it.shape, it.tobytes()),
    re.Pattern: lambda it: (it.pattern, it.flags),
    GenericAlias: lambda it: (repr(it),),
    UnionType: lambda it: (repr(it),),
    "typing._GenericAlias": lambda it: (repr(it),),
    "array.array": lambda it: (it.typecode, it.tobytes()),
    "collections.UserDict": lambda it: (it.data,),
    "collections.UserList": lambda it: (it.data,),
    "collections.ChainMap": lambda it: (it.maps,),
    "string.Template": lambda it: (it.template,),
    "numpy.generic": _of_array,
    # Its subclasses may keep more, such as what of it is masked.
    "numpy.ndarray": lambda it: _of_array(it) if type(it).__name__ == "ndarray" else None,
}


def parts_of(value: Any) -> tuple[Any, ...] | None:
    """Return what a value that is no container is made of, besides its class; None for any other object."""
    class_: Any = type(value)
    take = _taking(class_)
    try:
        return None if take is None else take(value)
    except Exception:  # noqa: BLE001 - a memory view that was released, a time zone of the user's own
        return None


@functools.lru_cache(maxsize=256)
def _taking(class_: type) -> Callable[[Any], tuple[Any, ...] | None] | None:
    for one in class_.__mro__:
        found = _PARTS.get(one) or _PARTS.get(_full_name(one))
        if found is not None:
            return found
    return None


def fields_of(value: Any, program: str) -> list[tuple[str, Any]] | None:
    """Return the fields of an object that is a value by nature, in order; None for anything else.

    That is a dataclass or a class of attrs with the fields that it compares, a pydantic model with what is private in it,
    or a namespace.
    Not one of a package's that may change, such as an agent, which does so as it is used; `program` is the package, or
    the module outside of any, that is no other's.
    """
    names: Iterable[str]
    if is_one(value, SimpleNamespace) or "argparse.Namespace" in map(_full_name, type(value).__mro__):
        names = vars(value)
    elif not (_is_frozen(value) or _is_of_the_program(type(value), program)):
        return None
    elif dataclasses.is_dataclass(type(value)):
        names = [field.name for field in dataclasses.fields(value) if field.compare]
    elif attribute(type(value), "__attrs_attrs__") is not None:
        names = [field.name for field in type(value).__attrs_attrs__ if field.eq]
    elif is_base_model(value) and hasattr(type(value), "model_fields"):
        extra, private = value.model_extra or (), attribute(value, "__pydantic_private__") or ()
        names = [*type(value).model_fields, *extra, *private]
    else:
        return None
    return [(name, attribute(value, name, "<unset>")) for name in names]


def _is_frozen(value: Any) -> bool:
    if dataclasses.is_dataclass(type(value)):
        return bool(type(value).__dataclass_params__.frozen)
    config = attribute(type(value), "model_config") if is_base_model(value) else None
    return bool(config and config.get("frozen"))


def _is_of_the_program(class_: type, program: str) -> bool:
    """Tell whether a class is of the program that runs, neither Python's own nor another package's."""
    module = module_name(class_)
    file = attribute(sys.modules.get(class_.__module__), "__file__")
    return file is None or module.partition(".")[0] == program or not _was_installed(file, module.count("."))


@functools.lru_cache(maxsize=256)
def _was_installed(file: str, depth: int) -> bool:
    """Tell whether a file is Python's own, or in a folder that packages were installed to, so many folders below it."""
    path = Path(file)
    depth += path.stem == "__init__"
    folder = path.parents[min(depth, len(path.parents) - 1)]
    installed = folder.name in {"site-packages", "dist-packages"} or any(folder.glob("*.dist-info"))
    return installed or path.is_relative_to(sysconfig.get_path("stdlib"))


def _full_name(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"


# --- functions --------------------------------------------------------------------------------------------------------


def home_of(function: Any) -> str:
    """Return the module that something was defined in, by its name in `sys.modules`."""
    owner = (
        function
        if attribute(function, "__module__")
        else attribute(function, "__objclass__") or type(function)
    )
    return str(owner.__module__)


def module_name(function: Any) -> str:
    """Return the name by which other programs import the module that something was defined in."""
    name = home_of(function)
    return main_name(name) if name in MAIN_MODULES else name


def main_name(name: str = "__main__") -> str:
    """Return the name by which other programs import the script that runs."""
    main = sys.modules.get(name) or sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else name


def program_of(function: Any) -> str:
    """Name the package, or the module outside of any, that a function is of, behind partials and decorators."""
    *_, last = chain(function)
    return module_name(last).partition(".")[0]


def is_bound(function: Any) -> bool:
    """Tell whether a callable is a method of an instance, of a Python class or of one that is written in C."""
    if not is_one(function, MethodType, BuiltinFunctionType, MethodWrapperType):
        return False
    return function.__self__ is not None and not isinstance(function.__self__, type | ModuleType)


def wrapped_by(function: Any) -> Any:
    """Return what a decorator's product stands for, None where it stands for nothing else."""
    # Looked for before it is asked for: there are clients that have an attribute of any name.
    if inspect.getattr_static(function, "__wrapped__", None) is None:
        return None
    return attribute(function, "__wrapped__")


def chain(function: Any) -> Iterator[Any]:
    """Yield a function and what it calls, where it is a partial, a method of an instance or a decorator's product."""
    met: list[Any] = []
    while function is not None and all(one is not function for one in met):
        yield function
        met.append(function)
        if is_one(function, functools.partial):
            function = function.func
        elif is_one(function, MethodType) and not isinstance(function.__self__, type):
            function = function.__func__
        else:
            function = wrapped_by(function)


def attributes_of(value: Any) -> set[str]:
    """Name what is set in an object, in its `__dict__` or in slots.

    Without what a cached property keeps there, and the fields that a dataclass says are no part of its value.
    """
    members = {name: member for class_ in type(value).__mro__ for name, member in vars(class_).items()}
    slots = {
        name
        for name, member in members.items()
        if isinstance(member, MemberDescriptorType) and hasattr(value, name)
    }
    kept = {name for name, member in members.items() if isinstance(member, functools.cached_property)}
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(type(value)) else ()
    kept |= {field.name for field in fields if not field.compare}
    return {*(attribute(value, "__dict__") or ()), *slots} - kept


def is_of_functools(value: Any) -> bool:
    """Tell whether something was made by functools: it keeps a cache at the most."""
    return type(value).__module__ == "functools"


def keeps_more(value: Any, program: str) -> bool:
    """Tell whether an object has attributes that its digest leaves out."""
    # A class and a member of an enum are told by their names.
    if is_one(value, type, enum.Enum) or is_of_functools(value):
        return False
    fields = fields_of(value, program)
    if fields is not None and is_base_model(value):
        return False
    if fields is None and (is_one(value, *PLAIN, *CONTAINERS) or parts_of(value) is not None):
        return bool(attribute(value, "__dict__"))
    told = {name for name, _ in fields or ()}
    return not told.union(functools.WRAPPER_ASSIGNMENTS, {"__wrapped__"}).issuperset(attributes_of(value))
