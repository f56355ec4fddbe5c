"""A digest of a function's code and of what it closes over.

What is a value by nature is looked into; any other object counts by its class alone, for what is inside a client differs
from process to process.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
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

from lbr.core.errors import UsageError
from lbr.models.insides import (
    CONTAINERS,
    MUTABLE,
    PLAIN,
    attribute,
    fields_of,
    is_bound,
    is_one,
    keeps_more,
    module_name,
    parts_of,
    plain_text,
    program_of,
    wrapped_by,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

DIGEST_BYTES = 16
OF_CODE = (
    "co_code",
    "co_exceptiontable",
    "co_consts",
    "co_names",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
)
OF_PYTHON = 1 << 9
"""The flag of classes that a program made as it ran, Py_TPFLAGS_HEAPTYPE; nearly all of C's were there before."""
MOST_VALUES = 3_000_000
"""How many values a walk meets at the most: some seconds."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A digest of a function, the same in every process of one Python version.

    `partial` says that the function holds objects that count by their classes alone.
    """

    digest: str
    partial: bool


def fingerprint_of(function: Any) -> Fingerprint:
    """Return the fingerprint of a function. Raises UsageError where there is too much in it to be looked at."""
    walk = _Walk(_Tally(program_of(function), MOST_VALUES))
    try:
        digest = walk.digest(function).hex()
    except RecursionError as error:
        raise _too_much("values that are nested too deeply") from error
    except RuntimeError as error:  # a dict or a set of another thread's
        raise _too_much(f"one that changes while it is looked at ({error})") from error
    return Fingerprint(digest, walk.tally.partial)


def _too_much(got: str) -> UsageError:
    return UsageError(
        f"expected a function that closes over a few values, or has them as defaults, got: {got}; have it read them from "
        f"a global or an attribute of a module, and say with its `version` which they are"
    )


@dataclass(slots=True)
class _Tally:
    """What the walks of one function share: whose program it is of, how many values may come, and what was met."""

    program: str
    left: int
    partial: bool = False


class _Walk:
    """One walk through a function and all that it holds.

    What can hold itself is numbered in the order of meeting, and counts by its number from then on; ids never reach a
    fingerprint. A walk within another knows what was met around it.
    """

    def __init__(self, tally: _Tally, around: _Walk | None = None) -> None:
        self.tally = tally
        self.around = around
        # With the objects themselves, so that no id is given to another one meanwhile.
        self.met: dict[int, tuple[int, Any]] = {}
        self.before: int = 0 if around is None else around.before + len(around.met)

    def number_of(self, value: Any) -> int | None:
        """Return the number of what was met, in this walk or around it; None for what is new."""
        if id(value) in self.met:
            return self.met[id(value)][0]
        return None if self.around is None else self.around.number_of(value)

    def digest(self, value: Any) -> bytes:
        """Return a digest of a value that says the same in every process of this Python."""
        self.tally.left -= 1
        if self.tally.left < 0:
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
            return self._join("code", *(getattr(value, name) for name in OF_CODE))
        return self._numbered(value)

    def _numbered(self, value: Any) -> bytes:
        number = self.number_of(value)
        if number is not None:
            return _join("seen", str(number))
        self.met[id(value)] = self.before + len(self.met), value
        if is_one(value, *MUTABLE):
            return self._container(value)
        fields = fields_of(value, self.tally.program)
        if fields is not None:
            return self._join("fields", _class_name(value), self._code(value), *fields)
        return self._callable(value)

    def _join(self, *parts: Any) -> bytes:
        return _join(*(part if isinstance(part, str) else self.digest(part) for part in parts))

    def _container(self, value: Any) -> bytes:
        if is_one(value, set, frozenset):
            # They come in no certain order, so that none of them may be numbered for the others.
            members = (
                (self if is_one(one, *PLAIN) else _Walk(self.tally, self)).digest(one) for one in value
            )
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
        # A class of C may keep anything.
        self.tally.partial |= keeps_more(value, self.tally.program) or not type(value).__flags__ & OF_PYTHON
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
