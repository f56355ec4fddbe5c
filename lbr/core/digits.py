"""JSON whose long integers keep all their digits: orjson reads those of more than 64 bits as floats, and writes none."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

LONG = re.compile(r"\d{19}")
"""Occurs in every JSON text that has an integer of more than 64 bits."""


def loads(text: str) -> Any:
    """Parse JSON. Raises orjson.JSONDecodeError, RecursionError if it is nested too deeply."""
    value = orjson.loads(text)  # the stricter of the two: json also reads NaN, and 1e999 as infinity
    return json.loads(text) if LONG.search(text) else value


def dumps(value: Any) -> bytes:
    """Return a value as compact JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        try:
            return orjson.dumps(_with_digits(value))
        except RecursionError:
            raise error from None


def _with_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_digits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_digits(one) for one in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return orjson.Fragment(str(int(value)))
    return value
