"""Whether a function goes by the state of an object that its fingerprint does not tell."""

from __future__ import annotations

import functools
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

from lbr.models.insides import (
    CONTAINERS,
    PLAIN,
    attribute,
    chain,
    is_bound,
    is_of_functools,
    is_one,
    keeps_more,
    parts_of,
    program_of,
)

ROUTINES = (
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)


def hides_state(function: Any) -> bool:
    """Tell whether a function goes by the state of an object that no fingerprint tells.

    The object is the one whose method it is, or itself, behind partials and decorators too; one that it closes over is
    not meant.
    """
    program = program_of(function)
    for one in chain(function):
        owner = _owner_of(one)
        if owner is not None:
            if not is_one(one, MethodType, functools.partial):
                return not is_one(owner, FunctionType) and _is_opaque(owner)
            if keeps_more(owner, program):
                return True
        elif not is_one(one, *ROUTINES) and (keeps_more(one, program) or _is_called_in_c(one)):
            return True
    return False


def _owner_of(function: Any) -> Any:
    """Return the object whose method a function is, None where it is none; a partial may give a method its object."""
    if is_bound(function):
        return function.__self__
    if is_one(function, functools.partial) and function.args:
        name = attribute(function.func, "__name__")
        owner = function.args[0]
        if isinstance(name, str) and attribute(type(owner), name) is function.func:
            return owner
    return None


def _is_opaque(value: Any) -> bool:
    """Tell whether an object of a class written in C may be in any state, for nobody can look into it."""
    known = is_one(value, *PLAIN, *CONTAINERS) or parts_of(value) is not None
    return not known or bool(attribute(value, "__dict__"))


def _is_called_in_c(value: Any) -> bool:
    """Tell whether an object is called by code in C, like those of `operator.methodcaller`: its state is not seen."""
    if is_one(value, type) or is_of_functools(value):
        return False
    return is_one(attribute(type(value), "__call__"), WrapperDescriptorType)
