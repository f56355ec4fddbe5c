"""Models and functions that answer."""
