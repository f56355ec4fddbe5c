"""JSON whose whole numbers keep all their digits: orjson reads those of more than 64 bits as floats, and writes none."""

from __future__ import annotations

import json
from typing import Any

import orjson

LEAST_WHOLE, MOST_WHOLE = -(2**63), 2**64 - 1
"""The whole numbers that orjson reads and writes as such."""


def loads(text: str) -> Any:
    """Return what a JSON text says. Raises orjson.JSONDecodeError, RecursionError where it is nested too deeply."""
    value = orjson.loads(text)
    return json.loads(text) if may_be_lost(value) else value


def dumps(value: Any) -> bytes:
    """Return a value as compact JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        try:
            return orjson.dumps(_with_digits(value))
        except RecursionError:
            raise error from None


def may_be_lost(value: Any) -> bool:
    """Tell whether there is a float within that orjson read, and that may have been a whole number of more than 64 bits."""
    kind = type(value)
    if kind is dict:
        return any(map(may_be_lost, value.values()))
    if kind is list:
        return any(map(may_be_lost, value))
    return kind is float and not LEAST_WHOLE < value < -LEAST_WHOLE


def _with_digits(value: Any) -> Any:
    """Return a value with its long whole numbers as they are to be written."""
    if isinstance(value, dict):
        return {key: _with_digits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_digits(one) for one in value]
    if isinstance(value, int) and not LEAST_WHOLE <= value <= MOST_WHOLE:
        return orjson.Fragment(str(int(value)))
    return value
