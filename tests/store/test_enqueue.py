"""Enqueuing, on every database: what is written once, what may be repeated, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update

from lbr.api.enqueue import put as put_items
from lbr.core.errors import (
    RunChangedError,
    RunMismatchError,
    RunNotFoundError,
)
from lbr.core.types import (
    Item,
    KeyMaker,
    Prompt,
    Shape,
    Task,
    WorkerId,
)
from lbr.store import enqueue, reads, runs, schema
from lbr.store.database import open_database
from lbr.store.runs import differences
from lbr.store.settle import settle
from tests.support import ECHO, Queue, answered, assert_counted, put, states

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from lbr.core.types import Millis
    from lbr.store.database import Database


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_equal_inputs_share_a_job(database: Database) -> None:
    """Duplicates become items of one job, in input order."""
    run = await put(database, ["a", "b", "a", "c", "b"])
    assert await states(database, run) == {"pending": 3}
    rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert [row.prompt.text for row in rows] == ["a", "b", "a", "c", "b"]
    unique = [row async for page in reads.rows(database, run, Shape.UNIQUE) for row in page]
    assert [(row.idx, row.prompt.text) for row in unique] == [(0, "a"), (1, "b"), (3, "c")]
    await assert_counted(database, run)


async def test_enqueue_again_adds_nothing(database: Database) -> None:
    """The same chunk a second time is known, whole."""
    run = await put(database, ["a", "b", "a"])
    items = [Item(Prompt(text=text)) for text in ("a", "b", "a", "c")]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    again = await database.write(enqueue.add_chunk, run, 0, items, keys, reuse=True)
    assert again == enqueue.EnqueueCounts(inputs=4, known=3, new=1)
    assert (await database.write(enqueue.add_chunk, run, 0, items, keys, reuse=True)).new == 0
    await assert_counted(database, run)


async def test_changed_line_changes_nothing(database: Database) -> None:
    """An input that differs from what the run holds is refused with its file and line, and the chunk with it."""
    run = await put(database, ["a", "b"])
    items = [
        Item(Prompt(text="a")),
        Item(Prompt(text="B"), source="in.txt", line=2),
        Item(Prompt(text="c")),
    ]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    with pytest.raises(RunChangedError, match=r"in\.txt, line 2: .*--run.*--append"):
        await database.write(enqueue.add_chunk, run, 0, items, keys, reuse=True)
    assert await states(database, run) == {"pending": 2}


async def test_changed_metadata_is_a_changed_line(database: Database) -> None:
    """A line that keeps its prompt but changes its id or metadata is not the same line."""
    run = await put(database, ["a"])
    item = Item(Prompt(text="a"), custom_id="x", metadata={"n": 1}, source="in.jsonl", line=1)
    with pytest.raises(RunChangedError, match="line 1"):
        await database.write(enqueue.add_chunk, run, 0, [item], [KeyMaker(ECHO).key(item.prompt)], reuse=True)


async def test_racing_enqueues_add_every_input_once(database: Database, db_url: str) -> None:
    """Two enqueues of the same inputs, interleaved chunk by chunk, leave what one would have left."""
    other = await open_database(db_url, create=True)
    run = await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8))
    items = [Item(Prompt(text=f"p{n % 70}")) for n in range(100)]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]

    async def one(store: Database) -> int:
        new = 0
        for start in range(0, 100, 10):
            chunk = slice(start, start + 10)
            new += (await store.write(enqueue.add_chunk, run, start, items[chunk], keys[chunk], reuse=True)).new
        return new

    added = await asyncio.gather(one(database), one(other))
    await other.close()
    assert sum(added) == 70
    assert await states(database, run) == {"pending": 70}
    rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert [row.prompt.text for row in rows] == [f"p{n % 70}" for n in range(100)]
    unique = [row async for page in reads.rows(database, run, Shape.UNIQUE) for row in page]
    assert [row.idx for row in unique] == list(range(70))
    await assert_counted(database, run)


async def test_answers_of_other_runs_are_reused(database: Database) -> None:
    """A job that another run has answered is done at once; `fresh` asks again; another task is other work."""
    queue, worker, _ = await two_workers(database)
    first = await put(database, ["a"], name="first")
    (claim,) = await queue.claim(worker, [first.id], 5, lease=60)
    await database.write(settle, [answered(claim, "A")])
    second = await put(database, ["a", "b"], name="second")
    assert await states(database, second) == {"done": 1, "pending": 1}
    rows = [row async for page in reads.rows(database, second, Shape.ORIGINAL) for row in page]
    assert [(row.status, row.result) for row in rows] == [("done", "A"), ("pending", None)]
    assert await states(database, await put(database, ["a"], name="fresh", reuse=False)) == {"pending": 1}
    warmer = Task(model="offline:echo", settings={"seed": 2})
    assert await states(database, await put(database, ["a"], name="warmer", task=warmer)) == {"pending": 1}
    await assert_counted(database, second)


async def test_run_of_another_task_is_refused(database: Database) -> None:
    """A run's name stands for one task; the refusal says what differs."""
    await put(database, ["a"])
    other = runs.RunSpec("r", Task(model="offline:echo", instructions="Be brief."), 8)
    with pytest.raises(RunMismatchError, match=r'\(instructions: none there, "Be brief\." here\).*--run'):
        await database.write(runs.open_run, other)


SCHEMA = {"type": "object", "properties": {"reasoning": {}, "answer": {}}, "required": ["answer"]}

JUDGED = Task(model="offline:echo", settings={"seed": 1, "latency": 0}, schema=SCHEMA)


async def test_the_order_of_a_schema_is_that_of_the_last_enqueue(database: Database) -> None:
    """A run that an earlier version stored in sorted order, and any other, takes over the order that is given."""
    run = await put(database, ["a"], task=JUDGED)

    def sort(connection: Connection, _now: Millis) -> None:
        stored = JUDGED.canonical().decode()
        connection.execute(update(schema.runs).values(task=stored, price='{"in": 1, "out": 1}'))

    await database.write(sort)
    before = await database.read(reads.find_run, "r")
    assert before.task.to_json() != JUDGED.to_json()
    again = await put(database, ["a"], task=JUDGED)
    assert (again.id, again.task.to_json(), again.price) == (run.id, JUDGED.to_json(), before.price)
    assert (await database.read(reads.find_run, "r")).task.to_json() == JUDGED.to_json()
    assert await states(database, run) == {"pending": 1}


async def test_racing_enqueues_leave_one_of_their_orders(database: Database, db_url: str) -> None:
    """Enqueues that give one task in two orders at once are all accepted; the run has one of the orders."""
    other = await open_database(db_url, create=True)
    turned = replace(JUDGED, schema=dict(reversed(SCHEMA.items())))
    specs = [runs.RunSpec("r", task, 8) for task in (JUDGED, turned)]
    stores = (database, other)
    found = await asyncio.gather(*(stores[n % 2].write(runs.open_run, specs[n // 2 % 2]) for n in range(16)))
    await other.close()
    assert len({run.id for run in found}) == 1
    stored = (await database.read(reads.find_run, "r")).task.to_json()
    assert stored in {JUDGED.to_json(), turned.to_json()}


async def test_a_number_of_another_kind_is_another_task(database: Database) -> None:
    """1 and 1.0 are equal in Python but have different keys, so that the run is refused as a whole."""
    await put(database, ["a"], task=JUDGED)
    other = replace(JUDGED, settings={"seed": 1, "latency": 0.0})
    with pytest.raises(RunMismatchError, match="settings: "):
        await database.write(runs.open_run, runs.RunSpec("r", other, 8))


LONG = "You are a helpful assistant. " * 5


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (
            {"template": f"{LONG}Be kind.{LONG}"},
            {"template": f"{LONG}Be brief.{LONG}"},
            (
                "template: …lpful assistant. Be kind.You are a helpful assistant. You ar… there, "
                "…lpful assistant. Be brief.You are a helpful assistant. You a… here"
            ),
        ),
        (
            {"instructions": LONG},
            {"instructions": LONG + "\n"},
            'instructions: … helpful assistant. " there, … helpful assistant. \\n" here',
        ),
        ({"instructions": LONG}, {}, f'instructions: "{LONG[:59]}… there, none here'),
        ({"settings": {"n": 1}}, {}, 'settings: {"n":1} there, {} here'),
        (
            {"schema": {"title": "t" * 60, "type": "object"}},
            {"schema": {"type": "array", "title": "t" * 60}},
            'schema: …tttttttttt","type":"object"} there, …tttttttttt","type":"array"} here',
        ),
    ],
)
def test_of_long_texts_the_place_is_shown_where_they_differ(there: Any, here: Any, told: str) -> None:
    """A long template that was mended in the middle looks another one in the refusal, too."""
    old, new = Task(model="m", **there), Task(model="m", **here)
    assert differences(old, new) == [told]


async def test_unknown_run_names_the_known(database: Database) -> None:
    """Whoever mistypes a run's name is told the names there are."""
    await put(database, ["a"], name="cities")
    with pytest.raises(RunNotFoundError, match="no run named 'citis'; runs here: cities"):
        await database.read(reads.find_run, "citis")


async def test_appends_at_once_lose_nothing(database: Database, db_url: str) -> None:
    """Two enqueues that append different inputs at the same time both find their place."""
    run = await put(database, ["first"])
    other = await open_database(db_url)

    async def append(store: Database, word: str) -> None:
        for n in range(10):
            await put_items(store, runs.RunSpec("r", ECHO, 8), [Item(Prompt(text=f"{word} {n}"))], append=True)

    await asyncio.gather(append(database, "x"), append(other, "y"))
    await other.close()
    rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert [row.idx for row in rows] == list(range(21))
    for word in "xy":
        found = [row.prompt.text for row in rows if (row.prompt.text or "").startswith(word)]
        assert found == [f"{word} {n}" for n in range(10)]
    await assert_counted(database, run)
