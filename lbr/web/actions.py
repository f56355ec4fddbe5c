"""What a user of the dashboard can do to a run: what the commands of the same names do.

`queue` are the arguments of `lbr.api` that say which one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lbr.api import operate
from lbr.core.errors import UsageError
from lbr.web.data import conditions_in

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from lbr.core.types import Json


async def pause(run: str, given: Mapping[str, Json], queue: Mapping[str, Any]) -> dict[str, Json]:
    """Stop claiming a run's jobs."""
    _check(given)
    await operate.pause(run, **queue)
    return {}


async def resume(run: str, given: Mapping[str, Json], queue: Mapping[str, Any]) -> dict[str, Json]:
    """Let a run go on, with a new limit of its total cost if `max_cost` is given."""
    _check(given, "max_cost")
    most = given.get("max_cost")
    if most is not None and (type(most) not in {int, float} or not math.isfinite(most)):
        raise UsageError(f"expected max_cost to be a number of dollars, got: {most!r}")
    await operate.resume(run, max_cost=most, **queue)
    return {}


async def cancel(run: str, given: Mapping[str, Json], queue: Mapping[str, Any]) -> dict[str, Json]:
    """Cancel a run and its pending jobs."""
    _check(given)
    return {"count": await operate.cancel(run, **queue)}


async def retry(run: str, given: Mapping[str, Json], queue: Mapping[str, Any]) -> dict[str, Json]:
    """Put the jobs that match a filter back; without one, those that failed or were cancelled."""
    _check(given, "state", "family", "error", "finish_reason")
    if any(not isinstance(value, str) for value in given.values()):
        raise UsageError("expected the values of a filter to be texts")
    return {"count": await operate.retry(run, where=conditions_in(given), **queue)}


def _check(given: Mapping[str, Json], *known: str) -> None:
    if unknown := sorted(given.keys() - set(known)):
        raise UsageError(f"expected nothing but {', '.join(known) or 'an empty object'}, got: {', '.join(unknown)}")


ACTIONS: dict[str, Callable[[str, Mapping[str, Json], Mapping[str, Any]], Awaitable[dict[str, Json]]]] = {
    "pause": pause,
    "resume": resume,
    "cancel": cancel,
    "retry": retry,
}
