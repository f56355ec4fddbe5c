"""Settings and their defaults: a flag overrides the environment (with `.env`), which overrides the config file."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from lbr.core.batches import Lane
from lbr.core.errors import UsageError
from lbr.core.pricing import NANOS
from lbr.core.types import Until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DB_URL_DEFAULT = "sqlite+aiosqlite:///runs.db"
MAX_ATTEMPTS = 8
CONCURRENCY = 32
LEASE = 60.0
GRACE = 30.0
CALL_TIMEOUT = 120.0
PATIENCE = 120.0
OUTAGE_PATIENCE = 3600.0
MAX_SLOTS = 10_000
"""The calls that one worker makes at a time; a limit that all workers share may be higher."""
MAX_PROCESSES = 1_000
MAX_PER_MINUTE = 2_000_000_000
MAX_DOLLARS = 1_000_000_000

_URL_NAME = re.compile(r"(\w+)_(?:BASE_URL|ENDPOINT)")
_OTHER_KEYS = {"GOOGLE_GEMINI": ("GOOGLE_API_KEY", "GEMINI_API_KEY"), "CO": ("CO_API_KEY", "COHERE_API_KEY")}


def load_environment(folder: Path) -> Mapping[str, str]:
    """Add the variables of the folder's `.env` to the environment, unless they are set there, and return it.

    Warns on stderr if the file sends a key that is set outside it to a URL of its own.
    """
    path = folder / ".env"
    if path.is_file():
        from dotenv import dotenv_values, load_dotenv  # noqa: PLC0415 - only if there is a file to read

        try:
            values = dotenv_values(path)
            for warning in _diverted_keys(values, os.environ):
                print(f"lbr: {path}: {warning}", file=sys.stderr)
            load_dotenv(path)  # providers read their keys from the environment themselves
        except (OSError, ValueError) as error:
            raise UsageError(f"expected {path} to be a readable UTF-8 file of NAME=value lines: {error}") from error
    return os.environ


def _diverted_keys(values: Mapping[str, str | None], env: Mapping[str, str]) -> list[str]:
    """Return a warning for each key of the environment that a base URL in `.env` would receive."""
    return [
        f"{name} sends {key}, which is set outside this file, to {hide_user(value)!r}; remove it if you do not know that server"
        for name, value in values.items()
        if value and name not in env and (matched := _URL_NAME.fullmatch(name))
        for key in _OTHER_KEYS.get(matched[1], (f"{matched[1]}_API_KEY", f"{matched[1]}_AUTH_TOKEN"))
        if env.get(key) and values.get(key) != env[key]
    ]


def hide_user(url: str) -> str:
    """Return a URL without the part before an @, which may be a password."""
    return re.sub(r"[^/@\s]*@", "…@", url)


def positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """Return the value. Raises UsageError if it is no finite number above zero."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and (0 < value <= sys.float_info.max or (or_zero and value == 0))):
        raise UsageError(f"expected {name} to be a number {'of at least' if or_zero else 'above'} 0, got: {value!r}")
    return float(value)


def at_least_one(name: str, value: int, *, most: int = 1_000_000) -> int:
    """Return the value. Raises UsageError if it is no whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise UsageError(f"expected {name} to be a whole number from 1 to {most}, got: {value!r}")
    return value


def a_minute(name: str, value: int) -> int:
    """Return a number of requests or tokens a minute. Raises UsageError."""
    return at_least_one(name, value, most=MAX_PER_MINUTE)


def nanos_of(name: str, dollars: float) -> int:
    """Return an amount of US dollars in billionths. Raises UsageError if it is not above zero or too large."""
    if not 0 < positive(name, dollars) <= MAX_DOLLARS:
        raise UsageError(f"expected {name} to be at most {MAX_DOLLARS:,} US dollars, got: {dollars:g}")
    return max(1, round(dollars * NANOS))


def a_name(name: str, value: str) -> str:
    """Return the value. Raises UsageError if no file can have that name."""
    try:
        if b"\0" not in os.fsencode(value):
            return value
    except UnicodeEncodeError:
        pass
    raise UsageError(f"expected {name} to be a name that a file can have, got: {value!a}")


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    """Return the value. Raises UsageError if it is not one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(f"expected {name} to be one of {', '.join(allowed)}, got: {value!r}")
    return value


def some_of(name: str, value: str | Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the words of texts that may have several, separated by commas, in the order of those allowed.

    Raises UsageError for another word.
    """
    texts = [value] if isinstance(value, str) else value
    words = {one_of(name, word.strip(), allowed) for text in texts for word in text.split(",") if word.strip()}
    return tuple(word for word in allowed if word in words)


@dataclass(frozen=True, slots=True)
class WorkOptions:
    """How one worker process works. Times are in seconds. Raises UsageError for a value out of range.

    `concurrency` is the number of slots, `lease` how long a claim holds without renewal, `timeout` the longest that
    one call may take (None by the run's tier), `grace` how long a drain waits for the calls in flight, `patience` how long to wait for a
    database that is busy or away, `outage_patience` how long to wait for an unreachable model before its runs are
    paused. `rpm` and `tpm` limit the requests and tokens a minute of all workers together, for each model that this one
    serves; `max_cost` limits the whole cost of each run that it serves, in US dollars. None keeps what is set.
    With `verbose`, it reports every failed attempt, not only the first of each kind. `lane` is which lanes it serves.
    """

    concurrency: int = CONCURRENCY
    lease: float = LEASE
    until: Until = Until.DONE
    grace: float = GRACE
    timeout: float | None = None
    patience: float = PATIENCE
    rpm: int | None = None
    tpm: int | None = None
    max_cost: float | None = None
    outage_patience: float = OUTAGE_PATIENCE
    verbose: bool = False
    lane: Lane = Lane.ALL

    def __post_init__(self) -> None:
        at_least_one("concurrency", self.concurrency, most=MAX_SLOTS)
        for name in ("lease", "patience", "outage_patience"):
            positive(name, getattr(self, name))
        if self.timeout is not None:
            positive("timeout", self.timeout)
        if not 0.5 <= self.lease <= 86_400:
            raise UsageError(f"expected lease to be from 0.5 to 86400 seconds, got: {self.lease:g}")
        positive("grace", self.grace, or_zero=True)
        for name in ("rpm", "tpm"):
            if getattr(self, name) is not None:
                a_minute(name, getattr(self, name))
        if self.max_cost is not None:
            nanos_of("max_cost", self.max_cost)
