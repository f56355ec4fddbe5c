"""How a user's function is found, and the name by which a run remembers it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from lbr.errors import UsageError
from lbr.models.fingerprint import MAIN_MODULES, fingerprint_of, module_name
from lbr.structured import import_named

AnyFunction = Callable[..., Any]


def import_function(spec: str) -> AnyFunction:
    """Import `pkg.mod:fn` (or `pkg.mod:object.method`), with the working directory importable.

    Raises UsageError that says which step failed, also for whatever the module raises when it is imported.
    """
    found = import_named(spec, example="pkg.module:function")
    if isinstance(found, type):
        raise UsageError(f"expected {spec!r} to be a function, got: the class {found.__qualname__}")
    if not callable(found):
        raise UsageError(f"expected {spec!r} to be a function, got: {type(found).__name__}")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run keeps of a function.

    `name` is `module:qualname`, `version` its author's, None where none was set. `fingerprint` is the same in every
    process of one Python version. `anonymous` says that the name alone does not tell which function it is.
    """

    name: str
    version: str | None
    fingerprint: str
    anonymous: bool


def identify(function: AnyFunction, *, version: str | None = None) -> Identity:
    """Name a function; `version` goes before the function's own `version` attribute (a str or an int)."""
    if version is None:
        own = getattr(function, "version", None)
        version = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else None
    named = _named(function)
    module = module_name(named)
    qualname: str = getattr(named, "__qualname__", type(named).__qualname__)
    anonymous = (
        named is not function
        or "<" in qualname
        or not hasattr(named, "__qualname__")
        or module in MAIN_MODULES
    )
    return Identity(f"{module}:{qualname}", version, fingerprint_of(function), anonymous)


def _named(function: Any) -> Any:
    """Return what carries the name; a class method is named by itself, for its class is part of its name."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType) and not isinstance(function.__self__, type):
            function = function.__func__
        else:
            return function
