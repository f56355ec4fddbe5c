"""Text files, counts and time spans in words, text that a terminal may show, and JSON that keeps all digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

# Control characters other than tab and newline, and characters that change the direction of writing.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raises UsageError; `what` names it in messages."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} as byte {error.start + 1}"
        raise UsageError(f"{path} is not UTF-8: it has {byte}; convert it") from error
    except OSError as error:
        raise UsageError(f"cannot read {what} from {path!s:.300}: {error.strerror}; check the path") from error


def pluralize(count: int, noun: str) -> str:
    """Return a count and its noun: `1 input`, `2 inputs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def duration(seconds: float) -> str:
    """Return a time span: `4.2 s`, `3 min 05 s`, `2 h 10 min`, `30 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def seconds_of(name: str, text: str) -> int:
    """Return the seconds of a time span with its unit: `90s`, `45m`, `12h`, `30d` or `2w`. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip(), re.ASCII)
    if found is None:
        raise UsageError(
            f"expected {name} to be a number with a unit (s, m, h, d, w), for example 30d, got: {text!r:.50}"
        )
    return int(found[1]) * UNITS[found[2]]


def harmless(text: str) -> str:
    r"""Return text without terminal control: such characters are written as in JSON, `\u001b`. JSON keeps its value."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


LONG = re.compile(r"\d{19}")
"""Occurs in every JSON text that has an integer of more than 64 bits."""


def parse_json(text: str) -> Any:
    """Parse JSON; orjson alone reads integers of more than 64 bits as floats. Raises orjson.JSONDecodeError, RecursionError if it is nested too deeply."""
    value = orjson.loads(text)  # the stricter of the two: json also reads NaN, and 1e999 as infinity
    return json.loads(text) if LONG.search(text) else value


def to_json(value: Any) -> bytes:
    """Return a value, also one of numpy, as compact JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
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
