"""Text of models and users, as a terminal may show it."""

from __future__ import annotations

import re

# Control characters but for tabs and the ends of lines; and what turns the direction of writing.
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)"
)


def harmless(text: str) -> str:
    r"""Return text with all that would steer a terminal spelled as in JSON, `\u001b`; JSON stays the same value."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
