"""How many tokens a call takes, as far as that can be said before it is made: estimates, and named as such.

Every model cuts text in its own way; four characters a token is what English comes to with most of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.core.errors import UsageError
from lbr.core.types import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.types import Json, Prompt, Task

CHARACTERS_PER_TOKEN = 4
ASSUMED_OUTPUT_TOKENS = 256
"""Tokens of an answer where nothing bounds it and nobody said."""


def tokens_of(characters: int) -> int:
    """Return how many tokens so many characters are, at least one where there is any."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def characters_of(prompt: Prompt) -> int:
    """Return how many characters of a prompt the model reads: of chat messages their texts, images left out."""
    if prompt.messages is None:
        return len(prompt.text or "")
    return sum(
        _content_characters(message.get("content")) + len(str(message.get("tool_calls") or ""))
        for message in prompt.messages
    )


def _content_characters(content: Json) -> int:
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def task_characters(task: Task) -> int:
    """Return how many characters a task adds to each prompt: its instructions and its schema."""
    schema = 0 if task.schema is None else len(canonical_json(task.schema).decode())
    return len(task.instructions or "") + schema


def estimate_tokens(prompt: Prompt, task: Task) -> int:
    """Return how many tokens of input one call takes: prompt, instructions and schema."""
    return tokens_of(characters_of(prompt) + task_characters(task))


def most_output_tokens(settings: Mapping[str, Json]) -> int | None:
    """Return how long an answer may be by its settings, None where nothing bounds it; UsageError for rubbish."""
    body = settings.get("extra_body")
    for name in ("max_completion_tokens", "max_tokens"):
        most = body.get(name) if isinstance(body, dict) else None
        if type(most) is int and most >= 1:  # another value means what the server says
            return most
    most = settings.get("max_tokens")
    if most is None:
        return None
    if type(most) is not int or most < 1:
        raise UsageError(f"expected max_tokens to be a whole number of at least 1, got: {most!r}")
    return most


def output_limit(settings: Mapping[str, Json]) -> str | None:
    """Return the setting that limits an answer, such as `max_tokens=500`; None if only the model limits it."""
    extra = settings.get("extra_body")
    for where in (settings, extra if isinstance(extra, dict) else {}):
        for name in ("max_tokens", "max_completion_tokens"):
            if where.get(name) is not None:
                return f"{name}={where[name]}"
    return None
