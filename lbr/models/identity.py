"""How a user's function is found, and the identity by which a run remembers it.

A function that its module has under its name is known by that name and its `version`; a digest of its code is kept only
to warn when the code changes. Any other function is known by its name, its `version` and a digest of its code and of the
plain values and dataclasses that it holds. An object of any other class counts by its class alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import reprlib
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from itertools import chain
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

from lbr.core.errors import UsageError
from lbr.core.schema import import_named, is_base_model

AnyFunction = Callable[..., Any]

MAIN_MODULES = ("__main__", "__mp_main__")
SCHEME = f"2py{sys.version_info.major}.{sys.version_info.minor}:"
"""The beginning of every fingerprint: each version of Python compiles the same code to different bytes."""


def import_function(spec: str) -> AnyFunction:
    """Import `pkg.mod:fn` (or `pkg.mod:object.method`), with the working directory importable.

    Raises UsageError with the step that failed, also for whatever the module raises when it is imported.
    """
    try:
        found = import_named(spec, example="pkg.module:function")
    except UsageError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == spec.partition(":")[0]:
            raise UsageError(f"{error}; if it is a model, name it as the model and not as the function") from error
        raise
    if isinstance(found, type) or not callable(found):
        shown = f"the class {found.__qualname__}" if isinstance(found, type) else type(found).__name__
        raise UsageError(f"expected {spec!r} to be a function, got: {shown}")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run keeps of a function.

    `name` is `module:qualname`, or the `pkg.mod:name` by which the function was found. `fingerprint` is the same in
    every process of one Python version. `anonymous` is True if the name alone does not identify the function. `opaque` is
    the class of an object in the function that the fingerprint knows by its class alone; None without one.
    """

    name: str
    version: str | None
    fingerprint: str
    anonymous: bool
    opaque: str | None = None

    @property
    def is_ambiguous(self) -> bool:
        """Whether other functions may have the same identity, because of an object that is known by its class alone."""
        return self.anonymous and self.opaque is not None and self.version is None


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """A function that this process may call, and its identity."""

    call: AnyFunction
    identity: Identity


def name_function(function: AnyFunction | str, *, version: str | None = None) -> NamedFunction:
    """Identify a function, or import and identify a `pkg.mod:name`, which is then its name if it has no other.

    Raises UsageError for anything that is not a function.
    """
    if not isinstance(function, str):
        if not callable(function):
            raise _no_function(function)
        return NamedFunction(function, identify(function, version=version))
    found = import_function(function)
    identity = identify(found, version=version)
    if identity.anonymous:
        identity = replace(identity, name=function, anonymous=False)
    return NamedFunction(found, identity)


def _no_function(value: object) -> UsageError:
    way_out = "; write a function that returns `await agent.run(prompt)`" if hasattr(value, "run_sync") else ""
    return UsageError(f"expected a function from str to str, got: {reprlib.repr(value)}{way_out}")


def identify(function: AnyFunction, *, version: str | None = None) -> Identity:
    """Return a function's identity; `version` overrides the function's own. UsageError for values nested too deeply."""
    name = _name_of(_inner(function))
    fingerprint, opaque = _fingerprint(function)
    anonymous = name.partition(":")[0] in MAIN_MODULES or not _is_found(function)
    return Identity(name, own_version(function) if version is None else version, fingerprint, anonymous, opaque)


def own_version(function: AnyFunction) -> str | None:
    """Return the `version` attribute, a str or an int, of a function or of what a partial or method calls."""
    for one in (function, _inner(function)):
        own = getattr(one, "version", None)
        if isinstance(own, str | int) and not isinstance(own, bool):
            return str(own)
    return None


def has_other_code(fingerprint: str, stored: str | None) -> bool:
    """Return whether a stored fingerprint is of other code; False if an earlier lbr or another Python made it."""
    return stored is not None and stored != fingerprint and stored.startswith(SCHEME)


def has_changed(named: NamedFunction) -> bool:
    """Return whether an anonymous function is a different one now, because a value that it holds changed."""
    try:
        return named.identity.anonymous and _fingerprint(named.call)[0] != named.identity.fingerprint
    except Exception:  # noqa: BLE001 - its calls are made by now, so that nothing may fail any more
        return True


# --- names ------------------------------------------------------------------------------------------------------------


def _inner(function: Any) -> Any:
    """Return what a partial or a method of an object calls: it has the name."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif type(function) is types.MethodType and not isinstance(function.__self__, type):
            function = function.__func__
        else:
            return function


def _home_of(value: Any) -> tuple[str, str]:
    """Return the module and the qualified name of a function or class, or of the class of another object."""
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return getattr(named, "__module__", None) or "builtins", named.__qualname__


def _is_found(function: Any) -> bool:
    """Return whether the module that defines a function has it under its name."""
    module, qualname = _home_of(function)
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    # Each access to a class method creates a new object.
    return found is function or (type(found) is types.MethodType and found == function)


def _name_of(value: Any) -> str:
    """Return the `module:qualname` of a function or class; the script has the name by which others import it."""
    module, qualname = _home_of(value)
    if module in MAIN_MODULES:
        main = sys.modules.get(module) or sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}:{qualname}"


# --- fingerprints -----------------------------------------------------------------------------------------------------


def _pickled(value: Any) -> Iterable[Any]:
    """Return what pickle would store of a value besides its class."""
    reduced = value.__reduce_ex__(4)
    return (value.__module__, reduced) if isinstance(reduced, str) else reduced[1:3]


def _held(cell: types.CellType) -> Any:
    return cell.cell_contents if cell != types.CellType() else NotImplemented  # for a variable that is not set yet


PLAIN = (type(None), bool, int, float, complex, str, bytes, types.EllipsisType, types.NotImplementedType)
PICKLED: tuple[type, ...] = (PurePath, date, time, timedelta, tzinfo, Decimal, UUID, range, slice, bytearray)
PICKLED += (types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType)
PICKLED += (types.WrapperDescriptorType, types.SimpleNamespace, Namespace)
CODE = ("co_code", "co_consts", "co_names", "co_argcount", "co_kwonlyargcount", "co_flags")

PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    **dict.fromkeys((list, tuple, set, frozenset), iter),
    **dict.fromkeys(PICKLED, _pickled),
    dict: lambda it: chain.from_iterable(it.items()),
    type: lambda it: [_name_of(it)],
    types.ModuleType: lambda it: [it.__name__],
    Enum: attrgetter("name", "value"),
    re.Pattern: attrgetter("pattern", "flags"),
    types.FunctionType: lambda it: [it.__code__, it.__defaults__, it.__kwdefaults__, *map(_held, it.__closure__ or ())],
    types.CodeType: attrgetter(*CODE),
    types.MethodType: attrgetter("__func__", "__self__"),
    functools.partial: attrgetter("func", "args", "keywords"),
    type(functools.cache(len)): lambda it: [it.__wrapped__],
}
"""How to take a value of a class apart."""


def _fingerprint(function: Any) -> tuple[str, str | None]:
    """Return a function's fingerprint, and the class of the first object in it that counts by its class alone."""
    walk = _Walk()
    call = inspect.getattr_static(type(function), "__call__", None)  # the code of an object that is called
    try:
        digest = walk.digest((function, call if type(call) is types.FunctionType else None))
    except RuntimeError as error:  # nested too deeply, or another thread changes them meanwhile
        raise UsageError(
            f"the function holds values that lbr cannot compare: {error}. Let it read them from a global, and give it a "
            f"`version` that says which they are"
        ) from error
    return f"{SCHEME}{digest}", walk.opaque


class _Walk:
    """A walk through all that a function holds. Neither an address nor the order of a set gets into a digest."""

    def __init__(self) -> None:
        self.opaque: str | None = None
        self._functions: dict[int, int] = {}  # numbered, because they may hold each other

    def digest(self, value: Any) -> str:
        """Return a digest of a value."""
        class_ = type(value)
        if class_ in PLAIN:
            return _hash(class_.__name__, hex(value) if class_ is int else repr(value))
        if class_ is types.FunctionType:
            if id(value) in self._functions:
                return _hash("met", str(self._functions[id(value)]))
            self._functions[id(value)] = len(self._functions)
        opaque, parts = self.opaque, _parts_of(value)
        if parts is None:
            self.opaque, parts = opaque or class_.__qualname__, ()
        digests = [self.digest(part) for part in parts]
        if class_ is types.FunctionType and _is_found(value):
            self.opaque = opaque  # its name says what is in it
        return _hash(_name_of(class_), *(sorted(digests) if issubclass(class_, set | frozenset) else digests))


def _parts_of(value: Any) -> Iterable[Any] | None:
    """Return what a value is made of besides its class; None if that is unknown, or changes as the value is used."""
    class_: Any = type(value)
    take = next((PARTS[base] for base in class_.__mro__ if base in PARTS), None)
    if take is not None:
        return take(value)
    options = vars(class_).get("__dataclass_params__")  # of its own: an undecorated subclass may hold more
    if options is None and not is_base_model(value):
        return None
    is_frozen = options.frozen if options else class_.model_config.get("frozen")
    file = getattr(sys.modules.get(class_.__module__), "__file__", None) or ""
    if not is_frozen and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts):
        return None  # of an installed package: such objects, for example agents, may change as they are used
    if options is None:
        return _pickled(value)
    return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value) if field.compare]


def _hash(*parts: str) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
