"""JSON whose whole numbers keep all their digits: orjson reads those of more than 64 bits as floats, and writes none."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

LONG = re.compile(r"\d{19}")
"""Occurs in every JSON text that has a whole number of more than 64 bits."""


def loads(text: str) -> Any:
    """Return what a JSON text says. Raises orjson.JSONDecodeError, RecursionError if it is nested too deeply."""
    value = orjson.loads(text)  # the stricter of the two: json also reads NaN, and 1e999 as infinity
    return json.loads(text) if LONG.search(text) else value


def dumps(value: Any) -> bytes:
    """Return a value as compact JSON. Raises TypeError for what JSON cannot hold."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError):
            raise error from None
