"""How a user's function is found, and the name by which a run remembers it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from lbr.core.errors import UsageError
from lbr.core.schema import import_named
from lbr.models.fingerprint import fingerprint_of
from lbr.models.insides import MAIN_MODULES, attribute, chain, home_of, is_bound, is_one, module_name
from lbr.models.states import hides_state

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

    `name` is `module:qualname`, or the `pkg.mod:name` that it was found by; `version` its author's, None where none was
    set. `fingerprint` is the same in every process of one Python version; `partial` says that it leaves out what is
    inside of objects. `anonymous` says that the name alone does not tell which function it is.
    """

    name: str
    version: str | None
    fingerprint: str
    anonymous: bool
    partial: bool = False


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """A function that this process may call, and who it is."""

    call: AnyFunction
    identity: Identity


def name_function(function: AnyFunction | str, *, version: str | None = None) -> NamedFunction:
    """Find a function that is given as such or as `pkg.mod:name`, and name it; see `identify`.

    What has no telling name of its own, such as a method of an object, has the one that it was found by.

    Raises UsageError for what is no function.
    """
    if not isinstance(function, str):
        if not callable(function):
            raise UsageError(f"expected a function from str to str, got: {function!r}")
        return NamedFunction(function, identify(function, version=version))
    found = import_function(function)
    identity = identify(found, version=version)
    if identity.anonymous:
        identity = replace(identity, name=function, anonymous=False)
    return NamedFunction(found, identity)


def identify(function: AnyFunction, *, version: str | None = None) -> Identity:
    """Name a function; `version` goes before the function's own.

    Raises UsageError where it closes over too much for a fingerprint.
    """
    named = _named(function)
    module = module_name(named)
    own_name = attribute(named, "__qualname__")
    qualname: str = own_name or type(named).__qualname__
    fingerprint = fingerprint_of(function)
    anonymous = (
        named is not function
        or is_bound(function)
        or own_name is None
        or module in MAIN_MODULES
        or not _leads_back(function, qualname, fingerprint.digest)
    )
    if version is None:
        version = own_version(function)
    return Identity(f"{module}:{qualname}", version, fingerprint.digest, anonymous, fingerprint.partial)


def own_version(function: AnyFunction) -> str | None:
    """Return the `version` attribute, a str or an int, of the function or of what it calls; None where there is none."""
    for one in chain(function):
        own = attribute(one, "version")
        if isinstance(own, str | int) and not isinstance(own, bool):
            return str(own)
    return None


def may_be_another(identity: Identity) -> bool:
    """Tell whether name and fingerprint fit other functions as well, and nothing says which of them it is."""
    return identity.anonymous and identity.partial and identity.version is None


def check_known_again(named: NamedFunction) -> None:
    """Raise UsageError for a function without a version that goes by the state of an object.

    To digest whatever is in an object would have a counter in there make other work of everything.
    """
    identity = named.identity
    if not identity.anonymous or identity.version is not None or not hides_state(named.call):
        return
    qualname = named.identity.name.partition(":")[2]
    bound = attribute(_named(named.call), "__qualname__") is not None
    shown = f"`{qualname}` of an object" if bound else f"an object of `{qualname}`"
    raise UsageError(
        f"expected a function whose answers are known again, got: {shown} that has a state; give `version`, another "
        f"one for each state, or make it a dataclass that has all it goes by in its fields"
    )


def has_changed(named: NamedFunction) -> bool:
    """Tell whether a function that is known by its fingerprint has another one by now, for a value in it changed."""
    if not named.identity.anonymous:
        return False
    try:
        return fingerprint_of(named.call).digest != named.identity.fingerprint
    except Exception:  # noqa: BLE001 - more than can be looked at by now, or a dict that another thread fills
        return True


def _named(function: Any) -> Any:
    """Return what carries the name; a class method is named by itself, for its class is part of its name."""
    while True:
        if is_one(function, functools.partial):
            function = function.func
        elif is_one(function, MethodType) and not isinstance(function.__self__, type):
            function = function.__func__
        else:
            return function


def _leads_back(function: Any, qualname: str, fingerprint: str) -> bool:
    """Tell whether a function is what its module has under its name; a decorator may have given it another's.

    One that was imported before its module was loaded again is the same as long as the code is.
    """
    found: Any = sys.modules.get(home_of(function))
    if found is None:
        return "<" not in qualname
    for name in qualname.split("."):
        found = attribute(found, name)
    if found is None or found is function:
        return found is not None
    try:
        return fingerprint_of(found).digest == fingerprint
    except UsageError:  # another one, which is not asked for
        return False
