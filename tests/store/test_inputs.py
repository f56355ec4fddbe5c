"""Inputs found by their id, and failed jobs in input order, on both databases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lbr.core.errors import Family, UsageError
from lbr.core.types import Failure, Item, JobState, KeyMaker, Prompt
from lbr.store import enqueue, inputs, runs
from lbr.store.settle import settle
from tests.support import ECHO, Queue, answered, failed, put

if TYPE_CHECKING:
    from lbr.core.types import Run
    from lbr.store.database import Database
    from lbr.store.inputs import FailedJob

REFUSED = Failure(Family.PERMANENT, "BadRequest", "x" * 1_000)


async def fail(database: Database, run: Run, *words: str) -> None:
    """Answer a run's jobs; those whose prompts are among the words fail."""
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=100)
    claims = await queue.claim(worker, [run.id], 100, lease=60)
    batch = [failed(one, REFUSED) if one.prompt.text in words else answered(one) for one in claims]
    await database.write(settle, [replace(one, state=JobState.FAILED) if one.outcome.failure else one for one in batch])


async def found(database: Database, run: Run) -> list[FailedJob]:
    """Return the failed jobs of a run."""
    return [one async for page in inputs.failed_jobs(database, run) for one in page]


async def test_failed_jobs_come_once_in_input_order(database: Database) -> None:
    """Equal inputs are one job; other runs and answers are left out; a long message is cut."""
    run = await put(database, ["a", "b", "c", "b", "d", "a"])
    await fail(database, run, "d", "b")
    other = await put(database, ["z"], name="other")
    await fail(database, other, "z")
    rows = await found(database, run)
    assert [(one.idx, one.sample, one.id) for one in rows] == [(1, 0, None), (4, 0, None)]
    assert {(one.family, one.error, one.message) for one in rows} == {("permanent", "BadRequest", "x" * inputs.SHOWN)}


async def test_an_input_is_found_by_its_id(database: Database) -> None:
    """A number is found by its text; an id that no input has, or several, is refused."""
    run = await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8))
    given = [Item(Prompt(text=text), custom_id=own) for text, own in (("a", "x"), ("b", 7), ("c", "x"), ("d", "7.0"))]
    keys = [KeyMaker(ECHO).key(one.prompt) for one in given]
    await database.write(enqueue.add_chunk, run, 0, given, keys, reuse=True)
    await database.write(runs.seal, run)
    await fail(database, run, "b")
    assert [(one.idx, one.id) for one in await found(database, run)] == [(1, "7")]
    assert await database.read(inputs.idx_of, run, "7") == 1
    for wrong, words in (
        ("x", "inputs 0, 2 and perhaps more have the id 'x'"),
        ("y", "no input has the id 'y' in run 'r'"),
    ):
        with pytest.raises(UsageError, match=words):
            await database.read(inputs.idx_of, run, wrong)
