"""Counts as people say them."""


def counted(count: int, noun: str) -> str:
    """Return a count before its noun: `1 input`, `2 inputs`."""
    return f"{count} {noun}{'s' * (count != 1)}"
