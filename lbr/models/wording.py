"""What a message of a provider looks like before anybody sees it: one short line without keys."""

from __future__ import annotations

import html
import os
import re

MAX_MESSAGE_CHARS = 500
MAX_PAGE_CHARS = 200
MAX_PAGE_READ = 20_000
MIN_SECRET_CHARS = 6

# What moves the cursor or the colours of a terminal that shows the message.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)S?\Z", re.IGNORECASE)
_PAGE = re.compile(r"\s*<(?:!doctype|!--|html|head|body|title|\?xml)\b", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]*)</title", re.IGNORECASE)
_UNSEEN = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)


def clean(text: str, api_key: str | None = None, *, most: int = MAX_MESSAGE_CHARS) -> str:
    """Return one short line without the keys that this process holds, of at most `most` characters."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    for secret in sorted([*secrets, api_key or ""], key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def page_words(text: str) -> str:
    """Return the title of an HTML page, else its text without tags, both short; any other text as it is."""
    if _PAGE.match(text) is None:
        return text
    text = text[:MAX_PAGE_READ]
    title = _TITLE.search(text)
    words = " ".join(html.unescape(title[1] if title else _UNSEEN.sub(" ", text)).split())
    if not words:
        return "an HTML page without text"
    return words if len(words) <= MAX_PAGE_CHARS else words[: MAX_PAGE_CHARS - 1] + "…"
