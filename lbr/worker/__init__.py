"""One process that claims jobs, makes the calls and settles."""
