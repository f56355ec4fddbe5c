"""Move a run to another database: copy it page by page, compare, hand over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.types import JobState, Report
from lbr.store import enqueue, runs, transfer
from lbr.store.database import opened, shown
from lbr.worker.kept_answers import kept_files, reclaim

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from lbr.core.types import PathOrUrl, Run
    from lbr.store.database import Database


@dataclass(frozen=True, slots=True)
class Moved(Report):
    """What was moved, now or, if `known`, earlier. `hash` covers everything that both databases hold of the run."""

    run: str
    target: str
    inputs: int
    jobs: int
    answers: int
    hash: str
    known: bool


@checked
async def move(
    run: str,
    *,
    to_url: PathOrUrl,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    restart: bool = False,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> Moved:
    """Copy a run with its answers into another database, compare the two, and let it go on there in its current state.

    It must be paused, finished or cancelled, and no worker may hold a job of it. Here it stays as a paused copy. The same
    call again continues after an interruption; with `restart`, it copies everything again.

    Raises RunNotFoundError; UsageError if the run is not at rest or incomplete, the name is taken there, both databases
    are the same, or kept answers cannot be written; DatabaseError if the two differ in the end: the copy then stays paused.
    """
    origin, aim = shown(db_url), shown(to_url)
    if origin == aim:
        raise UsageError(f"run {run!r} is in {aim} already; name a different database to move it to")
    async with opened(db_url, allow_network_fs=allow_network_fs) as source:
        found, counts = await _prepare(source, run, aim, notify)
        jobs, answers = sum(counts[state] for state in JobState), counts[JobState.DONE]
        async with opened(to_url, create=True, allow_network_fs=allow_network_fs) as target:
            copy = await target.write(transfer.open_copy, found, origin)
            if restart and transfer.is_half_done(copy, found):
                await transfer.clear(target, copy)
                copy = await target.write(transfer.open_copy, found, origin)
            if known := not transfer.is_half_done(copy, found):
                runs.check_not_removing(copy)
                if not transfer.is_copy(copy, found) or not transfer.has_left(found, aim):
                    raise UsageError(f"{aim} already has a different run named {run!r}; name another database")
                inputs, digest = await transfer.digest(source, found)
            else:
                inputs, digest = await _copy(source, found, target, copy)
                # First it ends here, then it begins there: it never runs in both.
                columns = await source.write(transfer.depart, found, counts, aim, name=source.name)
                await target.write(transfer.arrive, copy, columns, counts)
                await target.filled()
            return Moved(run, aim, inputs, jobs, answers, digest, known)


async def _prepare(source: Database, name: str, aim: str, notify: Callable[[str], None]) -> tuple[Run, Counter[str]]:
    """Return the run, at rest, with its counts, after reclaiming what dead workers left.

    Raises UsageError if kept answers stay outside of the database: they are paid for, and would be left behind.
    """
    await reclaim(source, notify, starting=True)
    run, counts = await source.read(transfer.prepare, name, aim)
    kept = [str(path) for path in kept_files(source.spool_places)]
    if kept and not transfer.has_left(run, aim):
        raise UsageError(
            f"finished answers are still kept in {', '.join(kept)} and cannot be written to {source.name}; fix what "
            f"prevents it, or remove the file and pay for them again, then run the same command again"
        )
    return run, counts


async def _copy(source: Database, run: Run, target: Database, copy: Run) -> tuple[int, str]:
    """Copy what is missing, and compare; return the number of inputs and the hash of everything."""
    async for page in transfer.pages(source, run, await target.read(enqueue.last_place, copy)):
        await target.write(transfer.add_page, copy, page)
    here, there = await transfer.digest(source, run), await transfer.digest(target, copy)
    if here != there:
        raise DatabaseError(
            f"run {run.name!r} differs: {here[0]} inputs with hash {here[1]} in {source.name}, {there[0]} with hash "
            f"{there[1]} in {target.name}; the copy there stays paused: copy it again with --restart"
        )
    return here
