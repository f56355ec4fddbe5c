"""How long a provider that refused a call asks to wait, by the headers of its answer."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UNIT_SECONDS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6, "µs": 1e-6}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|[dhms])")
_RESET = re.compile(r"(?:(?:x-)?ratelimit-reset(?:-[\w-]+)?|anthropic-(?:[\w-]+-)?ratelimit-[\w-]+-reset)\Z")

EPOCH_SECONDS_FROM = 1e9
EPOCH_MILLIS_FROM = 1e11
"""A number of seconds to wait is below the first; one from the second on cannot be seconds since 1970."""


def wait_of(headers: Mapping[str, object] | None, now: float) -> float | None:
    """Return the seconds to wait from `now`, seconds since 1970; None where the headers do not say.

    `retry-after-ms` and `Retry-After` go first. Else the resets of rate limits decide: of those that are used up
    (`…-remaining` is 0) the latest, where none says so the latest of all. Nonsense and the past are ignored.
    """
    lowered = {name.lower(): str(value).strip() for name, value in (headers or {}).items()}
    asked = _milliseconds(lowered.get("retry-after-ms", "")) or _seconds(lowered.get("retry-after", ""), now)
    if asked is not None:
        return asked
    resets = list(_resets(lowered, now))
    used_up = [wait for wait, remaining in resets if remaining is not None and remaining <= 0]
    return max(used_up or [wait for wait, _ in resets], default=None)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer of any status asks to wait, by the headers that mean nothing else.

    It takes `retry-after-ms`, and `retry-after` in whole seconds or as a date; names are in small letters. None where
    neither says so.
    """
    asked = _number(headers.get("retry-after-ms", ""))
    if asked is not None and asked >= 0:
        return asked / 1000
    text = headers.get("retry-after", "")
    try:
        seconds = int(text)
    except ValueError:
        seconds = None
    if seconds is not None:
        return float(seconds) if seconds >= 0 else None
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    wait = (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return max(0.0, wait)


def _resets(headers: Mapping[str, str], now: float) -> Iterator[tuple[float, float | None]]:
    """Yield the wait until each reset, with how much is left until then, None where that is not told."""
    for name, value in headers.items():
        if _RESET.match(name) and (wait := _seconds(value, now)) is not None:
            yield wait, _number(headers.get(name.replace("reset", "remaining"), ""))


def _milliseconds(text: str) -> float | None:
    number = _number(text)
    return number / 1000 if number is not None and number > 0 else None


def _seconds(text: str, now: float) -> float | None:
    """Read seconds (`7`), a duration (`6m0s`), a date or a point in time since 1970; None for nonsense and the past."""
    number = _number(text)
    if number is None:
        wait = _duration(text)
        if wait is None:
            wait = _until(text, now)
    elif number >= EPOCH_MILLIS_FROM:
        wait = number / 1000 - now
    else:
        wait = number - now if number >= EPOCH_SECONDS_FROM else number
    return wait if wait is not None and wait > 0 else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _duration(text: str) -> float | None:
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


def _until(text: str, now: float) -> float | None:
    """Read an ISO date, as Anthropic sends it, or one of HTTP; a date without a zone is in UTC."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            then = read(text)
            return (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError):
            continue
    return None
