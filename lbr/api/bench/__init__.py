"""How fast lbr is on this machine, beside what nobody can beat on it: the same work written by hand."""

PARTS = ("queue", "naps", "chat")
"""What can be measured alone."""
