"""From what was seen of a queue to findings: what it is, how grave, what to do. Plain functions over values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.api.diagnosis.findings import Finding, Gravity, split
from lbr.api.diagnosis.place import of_file, of_server, of_writers
from lbr.api.diagnosis.queue import of_queue
from lbr.models.base import OFFLINE
from lbr.store.health import LATEST, OPENING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lbr.store.health import Health
    from lbr.store.queue_health import Problem
    from lbr.store.recount import Drift
    from lbr.worker.spool import Waiting

FIXING = "fix"
"""The check whose problem is that nothing could be mended."""

__all__ = ["FIXING", "Finding", "Gravity", "Served", "findings"]


@dataclass(frozen=True, slots=True)
class Served:
    """A run with jobs or inputs to come: what keeps a worker with this environment from serving it, None for nothing.

    `function` is what a worker has to be given for it, None for a model.
    """

    run: str
    answerer: str
    refusal: str | None
    function: str | None = None


def findings(
    health: Health,
    *,
    kept: Iterable[Waiting] = (),
    served: Iterable[Served] = (),
    mended: Sequence[Drift] = (),
) -> list[Finding]:
    """Return all that is to be said, in the order of what was looked at. `mended` are the counters that were off."""
    return [
        *(_unread(one) for one in health.problems if one.check == OPENING),
        *(of_file(health.file, health) if health.file is not None else ()),
        *(of_server(health.server) if health.server is not None else ()),
        *of_writers(health),
        *_schema(health),
        *_integrity(health),
        *(_unread(one) for one in health.problems if one.check != OPENING),
        *(of_queue(health.queue, mended) if health.queue is not None else ()),
        *map(_served, served),
        *map(_kept, kept),
    ]


def _unread(problem: Problem) -> Finding:
    found, do = split(problem.words)
    if problem.check == OPENING:
        return Finding(OPENING, Gravity.ERROR, found, do)
    if problem.check == FIXING:
        return Finding(FIXING, Gravity.ERROR, found, do)
    way = do or "look at the other findings; if none explains it, restore a copy"
    if problem.check == "counters":
        way += ". A queue of many millions of jobs may take a server too long to recount"
    return Finding(problem.check, Gravity.ERROR, f"cannot be told: {found}", way)


def _schema(health: Health) -> Iterator[Finding]:
    version = health.version
    if version is None:
        return
    if version == 0:
        yield Finding("schema", Gravity.WARNING, "no lbr queue is here yet", "`lbr enqueue` makes one")
    elif version > LATEST:
        yield Finding(
            "schema",
            Gravity.ERROR,
            f"version {version}, of a newer lbr; this one knows {LATEST} and cannot tell more",
            "use the lbr that wrote it",
        )
    elif version < LATEST:
        yield Finding(
            "schema",
            Gravity.NOTE,
            f"version {version}, of an older lbr; this one cannot tell more before it is brought up to {LATEST}",
            "any other lbr command does so, `lbr status` for one; then look again",
        )
    else:
        yield Finding("schema", Gravity.OK, f"version {version}")


def _integrity(health: Health) -> Iterator[Finding]:
    if health.damages is None:
        return
    if not health.damages:
        yield Finding("integrity", Gravity.OK, "SQLite finds no damage")
    else:
        shown = "; ".join(" ".join(line.split()) for line in health.damages)
        yield Finding(
            "integrity",
            Gravity.ERROR,
            f"the file is damaged: {shown}",
            "stop all workers, keep a copy of all its files, and collect what can be; then restore a copy, or let "
            f"`sqlite3 {health.name} .recover` make a new file",
        )


def _served(one: Served) -> Finding:
    if one.function is not None:
        return Finding("keys", Gravity.OK, f"run {one.run} needs no key, and a worker with {one.function}")
    if one.answerer.startswith(OFFLINE):
        return Finding("keys", Gravity.OK, f"run {one.run} needs none, for {one.answerer}")
    if one.refusal is None:
        return Finding("keys", Gravity.OK, f"run {one.run}: what calls of {one.answerer} need is set here")
    found, do = split(one.refusal)
    return Finding(
        "keys",
        Gravity.WARNING,
        f"run {one.run}: a worker started here could not serve it: {found}",
        do or "set it where the workers run, in the environment or .env",
    )


def _kept(one: Waiting) -> Finding:
    if one.left:
        return Finding(
            "kept answers",
            Gravity.WARNING,
            f"{one.path} has answers to jobs that are not in this database",
            "settle them where they belong, or remove the file when you do not need it",
        )
    count = "answers that cannot be read" if one.answers is None else f"{one.answers} finished answers"
    return Finding(
        "kept answers",
        Gravity.WARNING,
        f"{count} wait in {one.path}",
        "`lbr worker` on this machine writes them into the database",
    )
