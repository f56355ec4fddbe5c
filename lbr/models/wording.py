"""What a message of a provider looks like before anybody sees it: one short line without keys."""

from __future__ import annotations

import os
import re

MAX_MESSAGE_CHARS = 500
MIN_SECRET_CHARS = 6

# What moves the cursor or the colours of a terminal that shows the message.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)S?\Z", re.IGNORECASE)


def clean(text: str, api_key: str | None = None) -> str:
    """Return one short line without the keys that this process holds."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    for secret in sorted([*secrets, api_key or ""], key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
