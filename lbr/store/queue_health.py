"""How the tables of a queue stand, in either database, as a doctor asks. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from lbr.core.errors import LbrError
from lbr.core.retry import FARTHEST_MS
from lbr.store import reads, recount
from lbr.store.schema import INFLIGHT, jobs, limits, runs, workers

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.reads import Overview
    from lbr.store.recount import Drift

LONGEST_LEASE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Problem:
    """A look that failed: at what, and why, in words."""

    check: str
    words: str


@dataclass(frozen=True, slots=True)
class Leases:
    """Leases that ran out and were not taken back: how many, and for how long the oldest. Milliseconds."""

    expired: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class QueueHealth:
    """What the tables say; None where they could not be read, which is among the problems.

    `ahead` is by how many milliseconds the latest times of what has happened lie in the future, by what they are of;
    only those that do.
    """

    view: Overview | None
    leases: Leases | None
    ahead: dict[str, int] | None
    drifts: list[Drift] | None


@dataclass(slots=True)
class Looker:
    """Looks, and keeps what went wrong: a part that is damaged must not hide the others."""

    problems: list[Problem]

    async def look(self, check: str, at: Awaitable[Any]) -> Any:
        """Return what there is to see, None where that cannot be seen."""
        try:
            return await at
        except LbrError as error:
            self.problems.append(Problem(check, str(error)))
        except Exception as error:  # noqa: BLE001 - a database may hold anything
            words = f"the tables hold what lbr has not written ({type(error).__name__}: {error})"
            self.problems.append(Problem(check, words))
        return None


async def look_at(database: Database, looker: Looker) -> QueueHealth:
    """Look at the tables of an open queue whose schema is ours."""
    return QueueHealth(
        view=await looker.look("runs", reads.overview(database)),
        leases=await looker.look("leases", _leases(database)),
        ahead=await looker.look("clock", _ahead(database)),
        drifts=await looker.look("counters", recount.drifts(database)),
    )


async def _leases(database: Database) -> Leases:
    async def work(connection: Connection) -> Leases:
        now = await database.now(connection)
        query = select(func.count(), func.min(jobs.c.lease_until)).where(INFLIGHT, jobs.c.lease_until < now)
        count, oldest = (await connection.execute(query)).one()
        return Leases(count, now - oldest if count else 0)

    return await database.read(work)


async def _ahead(database: Database) -> dict[str, int]:
    """Return which times lie in the future that cannot: a clock was set back, or another machine's is ahead."""
    latest = {
        "a worker's report": func.max(workers.c.seen_at),
        "the making of a run": func.max(runs.c.created_at),
        "an enqueue": func.max(runs.c.enqueued_at),
        "a job's end": func.max(jobs.c.finished_at),
        "a limit's balance": func.max(limits.c.balanced_at),
    }

    async def work(connection: Connection) -> dict[str, int]:
        now = await database.now(connection)
        found = {what: await connection.scalar(select(when)) for what, when in latest.items()}
        lease = await connection.scalar(select(func.max(jobs.c.lease_until)).where(INFLIGHT))
        found["the taking of a lease"] = None if lease is None else lease - LONGEST_LEASE_MS
        cooldown = await connection.scalar(select(func.max(limits.c.cooldown_until)))
        found["the setting of a cooldown"] = None if cooldown is None else cooldown - FARTHEST_MS
        return {what: when - now for what, when in found.items() if when is not None and when > now}

    return await database.read(work)
