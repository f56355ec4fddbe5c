"""A digest of a function's code and of what it closes over.

What is a value by nature is looked into; any other object counts by its class alone, for what is inside a client differs
from process to process.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any

from lbr.errors import UsageError
from lbr.models.insides import (
    CONTAINERS,
    MUTABLE,
    PLAIN,
    attribute,
    fields_of,
    is_bound,
    is_one,
    parts_of,
    plain_text,
    wrapped_by,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

MAIN_MODULES = ("__main__", "__mp_main__")
DIGEST_BYTES = 16
MOST_VALUES = 3_000_000
"""How many values a walk meets at the most: some seconds."""


def fingerprint_of(function: Any) -> str:
    """Return the fingerprint of a function: the same in every process of one Python version.

    Raises UsageError where there is too much in it to be looked at.
    """
    try:
        return _Walk().digest(function).hex()
    except RecursionError as error:
        raise _too_much("values that are nested too deeply") from error


def _too_much(got: str) -> UsageError:
    return UsageError(
        f"expected a function that closes over a few values, or has them as defaults, got: {got}; have it read them from "
        f"a global or an attribute of a module, and say with its `version` which they are"
    )


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
    if name not in MAIN_MODULES:
        return name
    main = sys.modules.get(name) or sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else name


class _Walk:
    """One walk through a function and all that it holds.

    What can hold itself is numbered in the order of meeting, and counts by its number from then on; ids never reach a
    fingerprint.
    """

    def __init__(self) -> None:
        # With the objects themselves, so that no id is given to another one meanwhile.
        self._met: dict[int, tuple[int, Any]] = {}
        self._left = [MOST_VALUES]

    def _fork(self) -> _Walk:
        """Return a walk that knows what was met, for what comes in no certain order and so must not be numbered."""
        fork = _Walk()
        fork._met, fork._left = dict(self._met), self._left
        return fork

    def digest(self, value: Any) -> bytes:
        """Return a digest of a value that says the same in every process of this Python."""
        self._left[0] -= 1
        if self._left[0] < 0:
            raise _too_much(f"more than {MOST_VALUES:,}")
        if type(value) not in PLAIN and (parts := parts_of(value)) is not None:
            return self._join("parts", _class_name(value), *parts)
        if is_one(value, *PLAIN):
            return _join("plain", type(value).__name__, plain_text(value))
        if is_one(value, *CONTAINERS) and not is_one(value, *MUTABLE):
            return self._container(value)
        if is_one(value, type):
            return _join("type", _type_name(value))
        if is_one(value, ModuleType):
            return _join("module", value.__name__)
        if is_one(value, CodeType):
            return self._join("code", value.co_code, value.co_exceptiontable, value.co_consts, value.co_names)
        return self._numbered(value)

    def _numbered(self, value: Any) -> bytes:
        if id(value) in self._met:
            return _join("seen", str(self._met[id(value)][0]))
        self._met[id(value)] = len(self._met), value
        if is_one(value, *MUTABLE):
            return self._container(value)
        fields = fields_of(value)
        if fields is not None:
            return self._join("fields", _class_name(value), self._code(value), *fields)
        return self._callable(value)

    def _join(self, *parts: Any) -> bytes:
        return _join(*(part if isinstance(part, str) else self.digest(part) for part in parts))

    def _container(self, value: Any) -> bytes:
        if is_one(value, set, frozenset):
            members = ((self if is_one(one, *PLAIN) else self._fork()).digest(one) for one in value)
            return _join("set", *sorted(members))
        if is_one(value, dict, MappingProxyType):
            return _join("dict", *map(self.digest, _flat(value.items())))
        return _join(type(value).__name__, *map(self.digest, value))

    def _callable(self, value: Any) -> bytes:
        if is_one(value, FunctionType):
            cells = tuple(map(_cell_contents, value.__closure__ or ()))
            return self._join("function", value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        if is_one(value, functools.partial):
            return self._join("partial", value.func, value.args, value.keywords)
        if is_one(value, MethodType):
            return self._join("method", value.__func__, value.__self__)
        if is_one(value, BuiltinFunctionType, MethodWrapperType):
            owner = value.__self__ if is_bound(value) else None
            return self._join("builtin", str(attribute(value, "__module__")), value.__qualname__, owner)
        if is_one(value, MethodDescriptorType, WrapperDescriptorType):
            return _join("builtin", _type_name(value.__objclass__), value.__qualname__)
        return self._join("object", _class_name(value), self._code(value))

    def _code(self, value: Any) -> Any:
        """Return the function that an object calls where it is called, None where it shows none."""
        wrapped, call = wrapped_by(value), attribute(type(value), "__call__")
        return wrapped if wrapped is not None else call if is_one(call, FunctionType) else None


def _flat(pairs: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
    return (part for pair in pairs for part in pair)


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "<empty>"


def _class_name(value: Any) -> str:
    return _type_name(type(value))


def _type_name(type_: type) -> str:
    return f"{module_name(type_)}.{type_.__qualname__}"


def _join(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()
