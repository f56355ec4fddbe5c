"""Counts and time spans in words, and text that is safe to show in a terminal."""

from __future__ import annotations

import re

# Control characters other than tab and newline, and characters that change the direction of writing.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


def pluralize(count: int, noun: str) -> str:
    """Return a count and its noun: `1 input`, `2 inputs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Return a time span: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def harmless(text: str) -> str:
    r"""Return text without terminal control: such characters are written as in JSON, `\u001b`. JSON keeps its value."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
