"""How many tokens a call will take, before anybody knows."""

from __future__ import annotations

CHARACTERS_PER_TOKEN = 4
ASSUMED_OUTPUT = 500
"""Tokens of an answer where no `max_tokens` is set."""


def tokens_of(characters: int) -> int:
    """Estimate the tokens of a text of so many characters: four to a token, as is usual for English."""
    return -(-characters // CHARACTERS_PER_TOKEN)
