"""The ends of runs: each is reported by one worker, and a run that goes on has another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lbr.core.errors import Family
from lbr.core.types import Failure, Item, KeyMaker, Prompt
from lbr.store import endings, enqueue, redo, runs, transfer
from lbr.store.database import open_database
from lbr.store.settle import settle
from tests.support import ECHO, Queue, answered, assert_counted, failed, put

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lbr.core.types import Run, WorkerId
    from lbr.store.database import Database
    from tests.support import Clock

PERMANENT = Failure(Family.PERMANENT, "BadRequest", "400")


async def ends(database: Database, run: Run) -> list[tuple[str, bool]]:
    """Take the end of a run; return its name and whether it had finished, and check that nothing is left to take."""
    seen = await database.read(endings.unreported, [run.id])
    _, taken = await database.write(endings.take, [run.id])
    assert seen == [one.run.id for one in taken]
    assert await database.read(endings.unreported, [run.id]) == []
    assert (await database.write(endings.take, [run.id]))[1] == []
    return [(one.run.name, one.finished) for one in taken]


async def finish(database: Database, worker: WorkerId, run: Run, *, fail: Iterable[int] = ()) -> None:
    """Answer all of a run's jobs; those in these places fail."""
    claims = await Queue(database).claim(worker, [run.id], 10, lease=60)
    batch = [failed(one, PERMANENT) if n in set(fail) else answered(one) for n, one in enumerate(claims)]
    await database.write(settle, batch)


async def test_an_end_is_taken_once_and_again_after_more_work(database: Database, clock: Clock) -> None:
    """A retry that ends as before, and inputs that are added, make an end; the same command again makes none."""
    run = await put(database, ["a", "b"])
    worker = await Queue(database).register(host="a", pid=1, concurrency=4)
    assert await ends(database, run) == []
    await finish(database, worker, run, fail=[1])
    assert await ends(database, run) == [("r", True)]
    await put(database, ["a", "b"])
    assert await ends(database, run) == []
    assert await redo.retry(database, run) == 1
    assert await ends(database, run) == []
    await finish(database, worker, run, fail=[0])
    assert await ends(database, run) == [("r", True)]
    items = [Item(Prompt(text=prompt)) for prompt in ("a", "b", "c")]
    keys = [KeyMaker(ECHO).key(one.prompt) for one in items]
    await database.write(enqueue.add_chunk, run, 0, items, keys, reuse=True)
    await finish(database, worker, run)
    assert await ends(database, run) == []  # more inputs may come
    await database.write(runs.seal, run)
    assert await ends(database, run) == [("r", True)]
    await assert_counted(database, run)


async def test_every_pause_is_an_end(database: Database, clock: Clock) -> None:
    """Another pause is another end, and so are the last answers of a paused run; a move is none."""
    run = await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=4)
    for _ in range(2):
        await database.write(runs.pause, run, "by the user")
        assert await ends(database, run) == [("r", False)]
        await database.write(runs.resume, run)
        await database.write(runs.resume, run)
        assert await ends(database, run) == []
    (held,) = await queue.claim(worker, [run.id], 1, lease=60)
    await database.write(runs.pause, run, "again")
    assert await ends(database, run) == [("r", False)]
    await database.write(settle, [answered(held)])
    assert await ends(database, run) == [("r", True)]
    other = await put(database, ["b"], name="moved")
    await database.write(runs.pause, other, "to move it")
    other, counts = await database.read(transfer.prepare, "moved", "there")
    await database.write(transfer.depart, other, counts, "there", name="here")
    assert await ends(database, other) == []


async def test_of_several_workers_one_takes_an_end(database: Database, db_url: str, clock: Clock) -> None:
    """Eight ask at the same time for the ends of two runs, through connections of their own."""
    found = [await put(database, ["a"], name=name, reuse=False) for name in ("r", "s")]
    worker = await Queue(database).register(host="a", pid=1, concurrency=4)
    for run in found:
        await finish(database, worker, run)
    others = [await open_database(db_url, clock=clock) for _ in range(3)]
    asked = [one.write(endings.take, [run.id for run in found]) for one in (database, *others) for _ in range(2)]
    taken = [run.run.name for _, runs_of in await asyncio.gather(*asked) for run in runs_of]
    assert sorted(taken) == ["r", "s"]
    for one in others:
        await one.close()
