"""Moving a run to another database: paused where it is, copied, compared, and taken up there."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import DatabaseError, UsageError
from lbr.core.plurals import pluralize
from lbr.core.types import JobState
from lbr.store import contents, reads, transfer
from lbr.store.engines import opened, shown
from lbr.store.queue import Queue
from lbr.worker.reclaiming import Reclaiming
from lbr.worker.spool import waiting_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lbr.core.types import Json, PathOrUrl, Run
    from lbr.store.contents import Contents
    from lbr.store.database import Database

WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move copied, or what was `known` there already. `hash` is over all that both databases hold of the run."""

    run: str
    target: str
    inputs: int
    jobs: int
    answers: int
    hash: str
    known: bool

    def to_dict(self) -> dict[str, Json]:
        """Return the fields as JSON."""
        return asdict(self)


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
    """Copy a run with its answers into another database, compare the two, and let workers go on there.

    The run is paused here first, calls in flight are waited for (`notify` says so), and it stays here as a paused
    copy. Interrupted, the same call goes on where it stopped; with `restart`, what is there of it is copied anew.

    Raises RunNotFoundError; UsageError where the name is taken there, the run is not whole, both databases are one
    or kept answers cannot be taken up; DatabaseError where the two differ in the end: the copy there then stays paused.
    """
    origin, aim = shown(db_url), shown(to_url)
    if origin == aim:
        raise UsageError(f"expected another database to move to, got: {aim}, where the run is")
    async with opened(db_url, allow_network_fs=allow_network_fs) as source:
        found = await reads.find_run(source, run)
        transfer.check_may_leave(found, aim)
        transfer.check_whole(found)
        async with opened(to_url, create=True, allow_network_fs=allow_network_fs) as target:
            there = await transfer.find(target, run)
            if there is not None and not transfer.is_half_done(there, found):
                return await _known(found, target, there, aim)
            found = await _hold(source, run, aim, notify)
            copy = await transfer.open_copy(target, found, origin)
            if restart:
                await transfer.clear(target, copy)
            return await _complete(source, found, target, copy, aim)


async def _known(run: Run, target: Database, copy: Run, aim: str) -> Moved:
    """Return what was moved before; UsageError where the name is another run's."""
    if not transfer.is_copy(copy, run) or not transfer.has_left(run, aim):
        raise UsageError(
            f"expected the name {run.name!r} to be free in {aim}, or a half-done copy of this run, got: another run; "
            f"name another database"
        )
    return _moved(run, aim, await contents.contents_of(target, copy), known=True)


async def _hold(source: Database, name: str, aim: str, notify: Callable[[str], None]) -> Run:
    """Pause the run and wait until none of its jobs is in flight; what dead workers have left is taken back.

    Raises UsageError where kept answers stay outside of the database: they are paid for, and would be left behind.
    """
    run = await transfer.hold(source, name, aim)
    reclaiming = Reclaiming(source, Queue(source), notify)
    told = False
    while True:
        await reclaiming.take_back()
        held, seconds = await transfer.in_flight(source, run)
        if not held:
            _check_none_kept(source, run)
            return run
        if not told:
            told = True
            notify(
                f"run {name} is paused; waiting for {pluralize(held, 'job')} in flight, whose leases end in {seconds:.0f} s at "
                f"the latest if their workers are dead"
            )
        await asyncio.sleep(WAIT_SECONDS)


def _check_none_kept(source: Database, run: Run) -> None:
    if kept := waiting_of(source, run.id):
        raise UsageError(
            f"expected every finished answer of run {run.name!r} to be in {source.name} before it is moved, got: some "
            f"kept in {', '.join(map(str, kept))} that could not be taken up; mend what keeps them out, or remove the "
            f"file and pay for them again, then run the same command again"
        )


async def _complete(source: Database, run: Run, target: Database, copy: Run, aim: str) -> Moved:
    seen = await transfer.counts(source, run)
    try:
        await _copy(source, run, target, copy)
        place, held = await contents.first_difference(source, run, target, copy)
        if place is not None:
            raise DatabaseError(
                f"expected run {run.name!r} to be the same in both databases, got: a difference at input {place}; the "
                f"copy stays paused: copy it again with --restart"
            )
        # First there is no way back here, then the run begins there: never two of it at once.
        await transfer.depart(source, run, aim, seen=seen)
        await transfer.arrive(target, copy, run, held=held, seen=seen)
    except transfer.NotHalfDoneError:
        there, here = await transfer.find(target, run.name), await transfer.find(source, run.name)
        if (
            there is None
            or here is None
            or not transfer.is_copy(there, run)
            or not transfer.has_left(here, aim)
        ):
            raise
        # Another move of the same run was quicker.
        return _moved(run, aim, await contents.contents_of(target, there), known=True)
    return _moved(run, aim, held, known=False)


async def _copy(source: Database, run: Run, target: Database, copy: Run) -> None:
    page = await contents.read_page(source, run, 0)
    while page.places:
        place = await transfer.add_page(target, copy, page)
        page = await contents.read_page(source, run, place, page.next_limit)


def _moved(run: Run, aim: str, held: Contents, *, known: bool) -> Moved:
    jobs = sum(held.states.values())
    answers = held.states[JobState.DONE]
    return Moved(run.name, aim, held.inputs, jobs, answers, held.hash, known)
