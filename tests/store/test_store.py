"""The store's promises, on every database: claims, fences, leases, counts, and what an enqueue may repeat."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, select, text, update

import lbr
from lbr.api import status
from lbr.core.errors import (
    DatabaseError,
    Family,
    RunChangedError,
    RunMismatchError,
    RunNotFoundError,
    Usage,
    UsageError,
)
from lbr.core.retry import RetryPolicy
from lbr.core.types import (
    Failure,
    Item,
    JobState,
    KeyMaker,
    Move,
    Part,
    PauseCause,
    Paused,
    Prompt,
    RunState,
    Shape,
    Task,
    WorkerId,
    differences,
)
from lbr.store import enqueue, limits, reads, redo, runs, schema
from lbr.store.database import open_database
from lbr.store.leases import Queue
from lbr.store.settle import settle
from tests.support import ECHO, Clock, answered, assert_counted, failed, is_postgresql, job_row, put, states

if TYPE_CHECKING:
    from lbr.store.database import Connection, Database

TRANSIENT = Failure(Family.TRANSIENT, "ServerError", "503")
PERMANENT = Failure(Family.PERMANENT, "BadRequest", "400: no")
LIMITED = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=10.0)
BROKE = Failure(Family.ACCOUNT, "Quota", "no credit")
BAD = Failure(Family.BAD_ANSWER, "BadAnswer", "no field x", text="{}")


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
    again = await enqueue.add_chunk(database, run, 0, items, keys, reuse=True)
    assert again == enqueue.EnqueueCounts(inputs=4, known=3, new=1)
    assert (await enqueue.add_chunk(database, run, 0, items, keys, reuse=True)).new == 0
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
        await enqueue.add_chunk(database, run, 0, items, keys, reuse=True)
    assert await states(database, run) == {"pending": 2}


async def test_changed_metadata_is_a_changed_line(database: Database) -> None:
    """A line that keeps its prompt but changes its id or metadata is not the same line."""
    run = await put(database, ["a"])
    item = Item(Prompt(text="a"), custom_id="x", metadata={"n": 1}, source="in.jsonl", line=1)
    with pytest.raises(RunChangedError, match="line 1"):
        await enqueue.add_chunk(database, run, 0, [item], [KeyMaker(ECHO).key(item.prompt)], reuse=True)


async def test_racing_enqueues_add_every_input_once(database: Database, db_url: str) -> None:
    """Two enqueues of the same inputs, interleaved chunk by chunk, leave what one would have left."""
    other = await open_database(db_url, create=True)
    run = await runs.open_run(database, runs.RunSpec("r", ECHO, 8))
    items = [Item(Prompt(text=f"p{n % 70}")) for n in range(100)]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]

    async def one(store: Database) -> int:
        new = 0
        for start in range(0, 100, 10):
            chunk = slice(start, start + 10)
            new += (await enqueue.add_chunk(store, run, start, items[chunk], keys[chunk], reuse=True)).new
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
    await settle(database, [answered(claim, "A")])
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
        await runs.open_run(database, other)


SCHEMA = {"type": "object", "properties": {"reasoning": {}, "answer": {}}, "required": ["answer"]}
JUDGED = Task(model="offline:echo", settings={"seed": 1, "latency": 0}, schema=SCHEMA)


async def test_the_order_of_a_schema_is_that_of_the_last_enqueue(database: Database) -> None:
    """A run that an earlier version stored in sorted order, and any other, takes over the order that is given."""
    run = await put(database, ["a"], task=JUDGED)

    async def sort(connection: Connection) -> None:
        stored = JUDGED.canonical().decode()
        await connection.execute(update(schema.runs).values(task=stored, price='{"in": 1, "out": 1}'))

    await database.write(sort)
    before = await reads.find_run(database, "r")
    assert before.task.to_json() != JUDGED.to_json()
    again = await put(database, ["a"], task=JUDGED)
    assert (again.id, again.task.to_json(), again.price) == (run.id, JUDGED.to_json(), before.price)
    assert (await reads.find_run(database, "r")).task.to_json() == JUDGED.to_json()
    assert await states(database, run) == {"pending": 1}


async def test_racing_enqueues_leave_one_of_their_orders(database: Database, db_url: str) -> None:
    """Enqueues that give one task in two orders at once are all accepted; the run has one of the orders."""
    other = await open_database(db_url, create=True)
    turned = replace(JUDGED, schema=dict(reversed(SCHEMA.items())))
    specs = [runs.RunSpec("r", task, 8) for task in (JUDGED, turned)]
    stores = (database, other)
    found = await asyncio.gather(*(runs.open_run(stores[n % 2], specs[n // 2 % 2]) for n in range(16)))
    await other.close()
    assert len({run.id for run in found}) == 1
    stored = (await reads.find_run(database, "r")).task.to_json()
    assert stored in {JUDGED.to_json(), turned.to_json()}


async def test_a_number_of_another_kind_is_another_task(database: Database) -> None:
    """1 and 1.0 are equal in Python but have different keys, so that the run is refused as a whole."""
    await put(database, ["a"], task=JUDGED)
    other = replace(JUDGED, settings={"seed": 1, "latency": 0.0})
    with pytest.raises(RunMismatchError, match="settings: "):
        await runs.open_run(database, runs.RunSpec("r", other, 8))


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
        await reads.find_run(database, "citis")


async def test_no_job_is_claimed_twice(database: Database, db_url: str) -> None:
    """Concurrent claims from two connections divide the jobs between them."""
    run = await put(database, [f"p{n}" for n in range(200)])
    other = await open_database(db_url)
    queue, one, two = await two_workers(database)

    async def take(store: Database, worker: WorkerId) -> list[int]:
        taken: list[int] = []
        while claims := await Queue(store).claim(worker, [run.id], 7, lease=60):
            taken += [claim.job_id for claim in claims]
        return taken

    taken = await asyncio.gather(take(database, one), take(other, two))
    await other.close()
    assert len(taken[0]) + len(taken[1]) == 200
    assert len(set(taken[0]) | set(taken[1])) == 200
    assert await queue.claim(one, [run.id], 1, lease=60) == []
    await assert_counted(database, run)


async def test_claim_takes_no_more_than_asked(database: Database) -> None:
    """A claim fills free slots and no more, the longest due first, across runs in the order given."""
    first, second = await put(database, ["a", "b"], name="1"), await put(database, ["c", "d"], name="2")
    queue, worker, _ = await two_workers(database)
    claims = await queue.claim(worker, [second.id, first.id], 3, lease=60)
    assert sorted(claim.prompt.text or "" for claim in claims) == ["a", "c", "d"]
    assert {claim.claim_seq for claim in claims} == {1}


async def test_zombie_cannot_overwrite(database: Database, clock: Clock) -> None:
    """An answer whose job was claimed again since is refused and recorded as stale, with its text."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    assert [one.job_id for one in await queue.reclaim()] == [old.job_id]
    (new,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (new.claim_seq, new.crashes) == (2, 1)
    late = await settle(database, [answered(old, "late")])
    assert late.taken == set()
    assert late.stale == {old.job_id}
    await settle(database, [answered(new, "good")])
    again = await settle(database, [answered(old, "late")])
    assert (again.taken, again.stale) == (frozenset(), frozenset())
    story = await reads.story(database, run, 0)
    assert (story.row.result, [t.what for t in story.tries]) == ("good", ["crashed", "stale"])
    assert [t.text for t in story.tries] == [None, "late"]
    await assert_counted(database, run)


async def test_late_answer_is_kept_until_claimed_again(database: Database, clock: Clock) -> None:
    """An answer that comes after its lease, but before anyone took the job again, is paid for and kept."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    assert (await settle(database, [answered(claim)])).taken == {claim.job_id}
    assert await states(database, run) == {"done": 1}
    assert await queue.claim(worker, [run.id], 1, lease=60) == []
    await assert_counted(database, run)


async def test_settling_an_answer_twice_changes_nothing(database: Database) -> None:
    """A settlement that is repeated, for its commit's fate was unknown, is neither doubled nor called stale."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await settle(database, [answered(claim)])
    again = await settle(database, [answered(claim, "other")])
    assert (again.taken, again.stale) == (frozenset(), frozenset())
    story = await reads.story(database, run, 0)
    assert (story.row.result, story.attempts, story.tries) == ("answer", 1, [])
    await assert_counted(database, run)


async def test_renewed_lease_is_not_reclaimed(database: Database, clock: Clock) -> None:
    """A lease holds as long as it is renewed; the holder of a lost one is told."""
    run = await put(database, ["a", "b"])
    queue, worker, other = await two_workers(database)
    claims = await queue.claim(worker, [run.id], 2, lease=60)
    clock.forward(50)
    assert await queue.renew(worker, claims[:1], lease=60, settled=0, rate=0.0) == set()
    clock.forward(20)
    assert [one.job_id for one in await queue.reclaim()] == [claims[1].job_id]
    (again,) = await queue.claim(other, [run.id], 5, lease=60)
    assert again.job_id == claims[1].job_id
    assert await queue.renew(worker, claims, lease=60, settled=0, rate=0.0) == {claims[1].job_id}


async def test_lapsed_lease_is_taken_up_again_by_the_living(database: Database, clock: Clock) -> None:
    """A job that was taken back, but not claimed since, stays with its worker when that proves to be alive."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    assert await queue.renew(worker, [claim], lease=60, settled=0, rate=0.0) == set()
    row = await job_row(database, claim.job_id)
    assert (row.state, row.crashes, row.claim_seq) == ("inflight", 0, 1)
    await assert_counted(database, run)
    assert (await settle(database, [answered(claim)])).taken == {claim.job_id}
    await assert_counted(database, run)


async def test_appends_at_once_lose_nothing(database: Database, db_url: str) -> None:
    """Two enqueues that append different inputs at the same time both find their place."""
    run = await put(database, ["first"])
    other = await open_database(db_url)

    async def append(store: Database, word: str) -> None:
        for n in range(10):
            items = [Item(Prompt(text=f"{word} {n}"))]
            await enqueue.add_chunk(store, run, None, items, [KeyMaker(ECHO).key(items[0].prompt)], reuse=True)

    await asyncio.gather(append(database, "x"), append(other, "y"))
    await other.close()
    rows = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert [row.idx for row in rows] == list(range(21))
    for word in "xy":
        found = [row.prompt.text for row in rows if (row.prompt.text or "").startswith(word)]
        assert found == [f"{word} {n}" for n in range(10)]
    await assert_counted(database, run)


async def test_cancel_and_retry_do_not_mix(database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of a cancel and a retry comes last has its way with every job."""
    monkeypatch.setattr(runs, "BATCH", 3)
    run = await put(database, [f"p{n}" for n in range(40)])
    other = await open_database(db_url)
    for _ in range(5):
        await asyncio.gather(runs.cancel(database, run), redo.retry(other, run))
        state = (await reads.find_run(database, "r")).state
        expected = "cancelled" if state is RunState.CANCELLED else "pending"
        if await states(database, run) != {expected: 40}:
            # The one that came first may have ended on a page that the other had already passed.
            await (runs.cancel if state is RunState.CANCELLED else redo.retry)(database, run)
        assert await states(database, run) == {expected: 40}
    await other.close()
    await assert_counted(database, run)


async def test_a_worker_that_ends_with_jobs_is_not_forgotten(database: Database) -> None:
    """Whoever holds jobs as it ends stays on record, so that they are taken back by its lock and not by their leases."""
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    claims = await queue.claim(worker, [run.id], 2, lease=3600)
    await queue.release(worker, claims[:1])
    await queue.unregister(worker)
    queue.leave(worker)
    assert [one.pid for one in (await reads.overview(database)).workers] == [1]
    if database.presence.knows:
        taken = await queue.reclaim(await queue.dead_workers())
        assert [(one.job_id, one.died) for one in taken] == [(claims[1].job_id, True)]
    else:
        await queue.release(worker, claims[1:])
        await queue.unregister(worker)
    assert (await reads.overview(database)).workers == []
    assert await states(database, run) == {"pending": 2}


@pytest.mark.parametrize("reason", ["", " ", "a\x00b", "a\ud800b", "a\nb", "x" * 1_001])
async def test_a_reason_that_cannot_be_kept_is_refused(database: Database, db_url: str, reason: str) -> None:
    """What one database would not take, and what would pass for a move, is refused by both in the same words."""
    run = await put(database, ["a"])
    with pytest.raises(UsageError, match="expected a reason"):
        await lbr.pause("r", reason=reason, db_url=db_url)
    assert (await reads.find_run(database, run.name)).state == "active"


async def test_release_charges_nothing(database: Database) -> None:
    """A released job is pending at once, with its fence kept and nothing charged; others' jobs stay."""
    run = await put(database, ["a", "b"])
    queue, worker, other = await two_workers(database)
    claims = await queue.claim(worker, [run.id], 1, lease=60)
    (theirs,) = await queue.claim(other, [run.id], 1, lease=60)
    assert await queue.release(worker, [*claims, theirs]) == 1
    row = await job_row(database, claims[0].job_id)
    assert (row.state, row.claim_seq, row.attempts, row.crashes) == ("pending", 1, 0, 0)
    assert (await job_row(database, theirs.job_id)).state == "inflight"
    assert await queue.release(worker, claims) == 0
    await assert_counted(database, run)


async def test_third_crash_fails_the_job(database: Database, clock: Clock) -> None:
    """A job that kills its workers runs alone from the second crash on, and fails at the third."""
    run = await put(database, ["poison"])
    queue, worker, _ = await two_workers(database)
    for crashes in (0, 1):
        claims = await queue.claim(worker, [run.id], 1, lease=60)
        assert [claim.crashes for claim in claims] == [crashes]
        clock.forward(61)
        await queue.reclaim()
    innocent = await put(database, ["innocent"], name="innocent")
    outlook = await queue.check_due([run.id])
    assert (outlook.due, outlook.suspects) == (False, True)
    beside = await queue.claim(worker, [run.id, innocent.id], 5, lease=60)
    assert [claim.prompt.text for claim in beside] == ["innocent"]
    (alone,) = await queue.claim(worker, [run.id], 5, lease=60, suspects=True)
    assert (alone.prompt.text, alone.crashes) == ("poison", 2)
    await settle(database, [answered(beside[0])])
    clock.forward(61)
    (dead_workers,) = await queue.reclaim()
    assert dead_workers.state is JobState.FAILED
    story = await reads.story(database, run, 0)
    assert (story.row.status, story.row.error) == ("failed", "its worker died 3 times")
    assert story.attempts == 0
    await assert_counted(database, run)


async def test_transient_failure_waits_in_the_database(database: Database, clock: Clock) -> None:
    """A retry is a pending job with a later time; nobody claims it before, and the look knows when."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    settlement = failed(claim, TRANSIENT)
    await settle(database, [settlement])
    assert await queue.claim(worker, [run.id], 1, lease=60) == []
    outlook = await queue.check_due([run.id])
    assert (outlook.due, outlook.next_ms) == (False, settlement.wait_ms)
    clock.forward(settlement.wait_ms / 1000)
    assert (await queue.check_due([run.id])).due
    (again,) = await queue.claim(worker, [run.id], 1, lease=60)
    assert (again.attempts, again.claim_seq) == (1, 2)
    await assert_counted(database, run)


async def test_rate_limit_cools_every_run_of_the_answerer(database: Database, clock: Clock) -> None:
    """After a 429 for most calls no job of that model is claimed until the wait is over, and no attempt is charged."""
    other = Task(function="m:f")
    run, same, free = (
        await put(database, ["a", "a2", "a3", "b"], name="1"),
        await put(database, ["c"], name="2"),
        await put(database, ["d"], name="3", task=other),
    )
    queue, worker, second = await two_workers(database)
    await limits.set_limits(database, "offline:echo", {"concurrency": 9})
    refused = [failed(claim, LIMITED) for claim in await queue.claim(worker, [run.id], 3, lease=60)]
    settlement = refused[0]
    await settle(database, refused)
    everything = [run.id, same.id, free.id]
    assert [c.prompt.text for c in await queue.claim(second, everything, 9, lease=60)] == ["d"]
    view = await reads.overview(database)
    assert [(c.answerer, c.reason) for c in view.cooldowns] == [("offline:echo", "429")]
    assert 10_000 <= settlement.wait_ms <= 11_000
    clock.forward(settlement.wait_ms / 1000)
    claims = await queue.claim(second, everything, 9, lease=60)
    expected = [("a", 0), ("a2", 0), ("a3", 0), ("b", 0), ("c", 0)]
    assert sorted((c.prompt.text or "", c.attempts) for c in claims) == expected


async def test_a_scattered_refusal_makes_only_its_job_wait(database: Database, clock: Clock) -> None:
    """One 429 among many answers stops no other call, and its job waits for as long as was asked."""
    run = await put(database, [f"p{n}" for n in range(60)])
    queue, worker, second = await two_workers(database)
    claims = await queue.claim(worker, [run.id], 30, lease=60)
    settlement = failed(claims[0], LIMITED)
    await settle(database, [settlement, *(answered(claim) for claim in claims[1:])])
    view = await reads.overview(database)
    assert (view.cooldowns, view.limits[0].limit.slots) == ([], None)
    assert len(await queue.claim(second, [run.id], 60, lease=60)) == 30
    clock.forward(settlement.wait_ms / 1000)
    (again,) = await queue.claim(second, [run.id], 60, lease=60)
    assert (again.job_id, again.attempts) == (claims[0].job_id, 0)
    await assert_counted(database, run)


async def test_a_cooldown_of_a_clock_that_was_ahead_hides_no_other(database: Database, clock: Clock) -> None:
    """Once the clock is right, what it had set far ahead holds nobody back, and gives way to the next wait."""
    run = await put(database, ["a", "a2", "a3", "b"])
    queue, worker, _ = await two_workers(database)
    clock.forward(2 * 86_400)
    refused = await queue.claim(worker, [run.id], 3, lease=60)
    await settle(database, [failed(claim, LIMITED) for claim in refused])
    clock.forward(-2 * 86_400)
    assert (await reads.overview(database)).cooldowns == []
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    settlement = failed(claim, LIMITED)
    await settle(database, [settlement])
    (cooldown,) = (await reads.overview(database)).cooldowns
    assert cooldown.until == clock() + settlement.wait_ms
    assert await queue.claim(worker, [run.id], 1, lease=60) == []


async def test_only_a_run_at_work_has_an_end_in_sight(database: Database) -> None:
    """A run has a rate once it has an answer, while a worker holds jobs of it, and its model is not waited for."""
    names = ("working", "unanswered", "unserved", "paused", "cancelled")
    runs_of = {name: await put(database, ["a", "b", "c"], name=name, reuse=False) for name in names}
    queue, worker, other = await two_workers(database)
    held = []
    for name, run in runs_of.items():
        first, second = await queue.claim(worker, [run.id], 2, lease=60)
        held.append(second)
        if name != "unanswered":
            await settle(database, [answered(first)])
    await queue.release(worker, [held[2]])
    await queue.renew(worker, held, lease=60, settled=10, rate=2.0)
    await queue.renew(other, [], lease=60, settled=10, rate=500.0)
    await runs.pause(database, runs_of["paused"], "no credit")
    await runs.cancel(database, runs_of["cancelled"])
    found = status.status_of(await reads.overview(database))
    nothing = dict.fromkeys(names, (None, None))
    assert {one.run: (one.rate, one.eta_seconds) for one in found.runs} == nothing | {"working": (2.0, 1.0)}
    assert "2.0/s, 1.0 s left" in status.one_line(found.runs[0])
    assert ["left" in status.one_line(one) for one in found.runs] == [True, False, False, False, False]
    none = dict.fromkeys(("probe_at", "wait_ms", "waited_ms", "patience_ms", "done"), 0)
    away = schema.outages.insert().values(answerer=ECHO.answerer, since=1, reason="refused", **none)
    await database.write(lambda c: c.execute(away))
    found = status.status_of(await reads.overview(database))
    assert {one.run: (one.rate, one.eta_seconds) for one in found.runs} == nothing


async def test_a_refusal_that_fails_its_job_cools_the_others(database: Database, clock: Clock) -> None:
    """Where the patience with a job's refusals is over it fails, and still nobody calls before the wait is over."""
    hasty = RetryPolicy(max_attempts=1, limited_patience=5)
    run, same = await put(database, ["a", "a2", "a3"], name="1"), await put(database, ["b"], name="2")
    queue, worker, second = await two_workers(database)
    for _ in range(2):
        refused = await queue.claim(worker, [run.id], 3, lease=60)
        settlement, *others = [failed(claim, LIMITED, hasty) for claim in refused]
        await settle(database, [settlement, *others])
        assert await queue.claim(second, [same.id], 1, lease=60) == []
        clock.forward(settlement.wait_ms / 1000)
    assert (settlement.state, settlement.charge) == (JobState.FAILED, 1)
    assert len(await queue.claim(second, [same.id], 1, lease=60)) == 1
    await assert_counted(database, run)


async def test_account_failure_pauses_the_run(database: Database) -> None:
    """No credit: the run is paused with the reason, the job is kept uncharged, and resume goes on."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    broke = Paused(PauseCause.ACCOUNT, "Quota: no credit")
    assert (await settle(database, [failed(claim, BROKE)])).paused == {"r": broke}
    assert await queue.claim(worker, [run.id], 9, lease=60) == []
    found = await reads.find_run(database, "r")
    assert (found.state, found.pause) == (RunState.PAUSED, broke)
    await runs.resume(database, found)
    assert [c.attempts for c in await queue.claim(worker, [run.id], 9, lease=60)] == [0, 0]
    await assert_counted(database, run)


async def test_bad_answer_comes_back_with_its_words(database: Database) -> None:
    """The next claim of a job whose answer did not validate carries that answer and the validator's words."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await settle(database, [failed(claim, BAD)])
    (second,) = await queue.claim(worker, [run.id], 1, lease=60)
    assert second.history.bad_answers == 1
    assert second.history.last_bad is not None
    assert (second.history.last_bad.text, second.history.last_bad.message) == ("{}", "no field x")
    await settle(database, [failed(second, BAD)])
    (third,) = await queue.claim(worker, [run.id], 1, lease=60)
    await settle(database, [failed(third, BAD)])
    assert await states(database, run) == {"failed": 1}


async def test_an_envelope_without_an_answer_is_not_shown_to_the_model(database: Database) -> None:
    """It uses up the budget of bad answers, but there is nothing in it that a model could correct."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    for count, error in enumerate(("EmptyAnswer", "UnreadAnswer"), start=1):
        (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
        await settle(database, [failed(claim, replace(BAD, error=error, finish_reason="stop"))])
        (again,) = await queue.claim(worker, [run.id], 1, lease=60)
        assert (again.history.bad_answers, again.history.last_bad) == (count, None)
        await queue.release(worker, [again])
    assert [t.finish_reason for t in (await reads.story(database, run, 0)).tries] == ["stop", "stop"]


async def test_a_late_bad_answer_uses_up_no_budget(database: Database, clock: Clock) -> None:
    """What a zombie's call came to is recorded as stale, and is no part of what its successors go by."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    (new,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (await settle(database, [failed(old, BAD)])).stale == {old.job_id}
    await settle(database, [failed(new, TRANSIENT)])
    clock.forward(3600)
    (last,) = await queue.claim(heir, [run.id], 1, lease=60)
    assert (last.attempts, last.history.bad_answers, last.history.last_bad) == (1, 0, None)


async def test_retry_gives_back_every_try(database: Database) -> None:
    """Retry puts failed jobs back with all their budgets, keeps their history, and leaves answers alone."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    bad, good = await queue.claim(worker, [run.id], 2, lease=60)
    await settle(database, [failed(bad, PERMANENT), answered(good)])
    assert await redo.retry(database, run) == 1
    assert await states(database, run) == {"pending": 1, "done": 1}
    (again,) = await queue.claim(worker, [run.id], 2, lease=60)
    assert (again.attempts, again.crashes, again.claim_seq, again.history.bad_answers) == (0, 0, 2, 0)
    assert (await settle(database, [failed(bad, PERMANENT)])).taken == frozenset()
    assert [t.what for t in (await reads.story(database, run, 0)).tries] == ["failed"]
    await assert_counted(database, run)


async def test_cancel_keeps_answers_on_their_way(database: Database, clock: Clock) -> None:
    """Cancelling stops what is pending; what is in flight may still be answered, but is not taken up again."""
    run = await put(database, ["a", "b", "c", "d"])
    queue, worker, _ = await two_workers(database)
    one, two, three = await queue.claim(worker, [run.id], 3, lease=60)
    assert await runs.cancel(database, run) == 1
    await settle(database, [answered(one), failed(two, TRANSIENT)])
    assert await states(database, run) == {"done": 1, "cancelled": 2, "inflight": 1}
    assert await queue.release(worker, [three]) == 1
    assert await states(database, run) == {"done": 1, "cancelled": 3}
    await assert_counted(database, run)
    with pytest.raises(UsageError, match="lbr retry r"):
        await runs.resume(database, run)
    assert await redo.retry(database, run) == 3
    (claim, *_rest) = await queue.claim(worker, [run.id], 3, lease=60)
    clock.forward(61)
    await runs.cancel(database, run)
    await queue.reclaim()
    assert await states(database, run) == {"done": 1, "cancelled": 3}
    assert (await settle(database, [answered(claim)])).stale == {claim.job_id}
    await assert_counted(database, run)


async def test_tokens_and_cost_are_counted_for_failed_tries_too(database: Database) -> None:
    """A try that failed after it was paid for counts in the run's tokens and cost."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    paid = Failure(Family.BAD_ANSWER, "BadAnswer", "no", text="{}", usage=Usage(7, 3, 1_000))
    await settle(database, [failed(claim, paid)])
    view = await reads.overview(database, "r")
    counts = view.runs[0].counts
    assert (counts["input_tokens"], counts["output_tokens"], counts["cost_nanos"]) == (7, 3, 1_000)
    assert counts["try:bad_answer"] == 1


async def test_settle_is_all_or_nothing(database: Database) -> None:
    """A batch that fails half way leaves no trace of its first half."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    one, two = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(
        lambda c: c.execute(insert(schema.results).values(job_id=two.job_id, text="planted", latency_ms=0))
    )
    with pytest.raises(DatabaseError):
        await settle(database, [answered(one), answered(two)])
    assert await states(database, run) == {"inflight": 2}
    await assert_counted(database, run)


async def test_cancelled_caller_does_not_break_a_transaction(database: Database) -> None:
    """A write whose caller is cancelled ends whole, and the next one works."""
    run = await put(database, [f"p{n}" for n in range(50)])
    queue, worker, _ = await two_workers(database)
    for _ in range(20):
        claiming = asyncio.create_task(queue.claim(worker, [run.id], 1, lease=60))
        await asyncio.sleep(0)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
    await assert_counted(database, run)
    assert (await states(database, run)).get("inflight", 0) + len(
        await queue.claim(worker, [run.id], 50, lease=60)
    ) == 50


async def test_changed_sees_other_connections(database: Database, db_url: str) -> None:
    """A poll tells a commit of another process from silence."""
    await database.changed()
    assert not await database.changed()
    other = await open_database(db_url)
    await put(other, ["a"])
    await other.close()
    assert await database.changed()
    assert not await database.changed()


async def test_schema_migrates_once(database: Database, db_url: str) -> None:
    """Opening an up-to-date database applies nothing; every migration is recorded by version and name."""
    other = await open_database(db_url, create=True)
    await other.close()
    rows = (await database.read(lambda c: c.execute(select(schema.schema_version)))).all()
    assert [(row.version, row.name) for row in rows] == [
        (1, "create the tables"),
        (2, "index the suspects"),
        (3, "keep keys beside prompts"),
        (4, "share limits, price runs, set jobs apart"),
        (5, "keep why answers of failed tries ended"),
        (6, "add the share of refused calls and the highest cost of a call"),
        (7, "note outages of models"),
        (8, "keep the order of columns, and which ids are numbers"),
        (9, "keep the cause of a pause apart from its message"),
        (10, "let runs rest that were being moved away"),
    ]


async def _run(sql: str, connection: Connection) -> None:
    await connection.execute(text(sql))


async def test_older_schema_is_brought_up(db_url: str) -> None:
    """A queue whose jobs hold the keys, as they did at version 2, keeps all that is in it."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await settle(database, [answered(claim, "kept")])
    before = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    items = [Item(Prompt(text=prompt)) for prompt in ("b", "c")]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    where, binary = ("lbr.", "bytea") if is_postgresql(db_url) else ("", "BLOB")
    for statement in (
        f"ALTER TABLE {where}jobs ADD COLUMN key {binary}",
        f"UPDATE {where}jobs SET key = (SELECT key FROM {where}prompts WHERE job_id = jobs.id)",
        f"CREATE UNIQUE INDEX jobs_run_key ON {where}jobs (run_id, key)",
        f"CREATE INDEX jobs_done_key ON {where}jobs (key) WHERE state = 'done'",
        f"DROP INDEX {where}prompts_key",
        f"ALTER TABLE {where}prompts DROP COLUMN key",
        f"ALTER TABLE {where}prompts DROP COLUMN run_id",
        f"ALTER TABLE {where}prompts DROP COLUMN settings",
        f"ALTER TABLE {where}runs DROP COLUMN price",
        f"ALTER TABLE {where}limits DROP COLUMN rpm",
        f"ALTER TABLE {where}attempts DROP COLUMN finish_reason",
        f"ALTER TABLE {where}limits DROP COLUMN refused",
        f"DELETE FROM {where}workers",
        f"DELETE FROM {where}schema_version WHERE version > 2",
    ):
        await database.write(partial(_run, statement))
    await database.close()
    database = await open_database(db_url)
    assert [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page] == before
    assert [row.status for row in before] == ["done", "pending"]
    counts = await enqueue.add_chunk(database, run, None, items, keys, reuse=False)
    assert (counts.new, counts.duplicate) == (1, 1)
    reused = await put(database, ["a"], name="again")
    assert await states(database, reused) == {"done": 1}
    queue, worker, _ = await two_workers(database)
    (claim, *_) = await queue.claim(worker, [run.id], 5, lease=60)
    await settle(database, [failed(claim, replace(PERMANENT, finish_reason="length"))])
    assert (await reads.story(database, run, 1)).tries[0].finish_reason == "length"
    await database.close()


async def test_a_run_of_the_version_before_is_not_changed(db_url: str) -> None:
    """Metadata that were stored in alphabetical order, and an id as text, are the same line as before."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a"])
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in (
        rf"""UPDATE {where}items SET custom_id = '7', metadata = '{{"a"\:1,"b"\:{{"x"\:2,"y"\:3}}}}'""",
        f"ALTER TABLE {where}items DROP COLUMN id_is_number",
        f"ALTER TABLE {where}runs DROP COLUMN input_columns",
        f"DELETE FROM {where}schema_version WHERE version > 7",
    ):
        await database.write(partial(_run, statement))
    await database.close()
    database = await open_database(db_url)
    assert await reads.columns(database, run) == [
        (Part.ID, "id"),
        (Part.PROMPT, "prompt"),
        (Part.METADATA, "a"),
        (Part.METADATA, "b"),
    ]
    metadata = {"b": {"y": 3, "x": 2}, "a": 1}
    columns = {"b": Part.METADATA, "prompt": Part.PROMPT, "a": Part.METADATA, "id": Part.ID}
    items = [Item(Prompt(text), 7, metadata, columns=columns) for text in ("a", "b")]
    keys = [KeyMaker(ECHO).key(item.prompt) for item in items]
    counts = await enqueue.add_chunk(database, run, 0, items, keys, reuse=False)
    assert (counts.known, counts.new) == (1, 1)
    first, second = [row async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]
    assert (first.custom_id, list(first.metadata or {})) == ("7", ["a", "b"])
    assert (second.custom_id, list(second.metadata or {})) == (7, ["b", "a"])
    run = await reads.find_run(database, run.name)
    assert await reads.columns(database, run) == [(part, name) for name, part in columns.items()]
    changed = [replace(items[0], metadata={"b": {"y": 4, "x": 2}, "a": 1})]
    with pytest.raises(RunChangedError):
        await enqueue.add_chunk(database, run, 0, changed, keys[:1], reuse=False)
    await database.close()


REASONS = {
    "it may cost $1, with $0.99 spent there is no room for a call": PauseCause.BUDGET,
    "its calls tell no cost: expected a price for m, got: none; give it with --price": PauseCause.UNPRICED,
    "m could not be reached in 60 min of waits: Connection refused": PauseCause.OUTAGE,
    "all 3 jobs that were called failed alike: no such model": PauseCause.SET_UP,
    "insufficient_quota: You exceeded\nyour quota": PauseCause.ACCOUNT,
    "by hand": PauseCause.USER,
    "it may cost too much": PauseCause.USER,
}
MOVES = {
    "moving to /b.db": ("paused", Paused(PauseCause.USER, "moving to /b.db"), None),
    "moving to /b.db (was cancelled)": ("cancelled", None, None),
    "moving to /b.db (was paused: it was slow)": ("paused", Paused(PauseCause.USER, "it was slow"), None),
    "moved to postgresql://h/d (was cancelled)": (
        "paused",
        Paused(PauseCause.MOVED_TO, "moved to postgresql://h/d"),
        Move("postgresql://h/d", RunState.CANCELLED),
    ),
    "moving from /a.db": ("paused", Paused(PauseCause.MOVING_FROM, "moving from /a.db"), Move("/a.db")),
}


def to_reasons(where: str) -> list[str]:
    """Return what makes a queue one of the version that kept the cause of a pause in its words."""
    columns = [f"DROP COLUMN {name}" for name in ("pause_cause", "pause_message", "move")]
    changes = [f"ALTER TABLE {where}runs {change}" for change in (*columns, "ADD COLUMN pause_reason text")]
    return [*changes, f"DELETE FROM {where}schema_version WHERE version > 8"]


async def test_the_causes_of_old_pauses_are_read_once(db_url: str) -> None:
    """A queue that kept the cause of a pause in its words has it in a column, and runs that were moving away rest."""
    database = await open_database(db_url, create=True)
    words = [*REASONS, *MOVES, "being removed", None]
    for number, _ in enumerate(words):
        await put(database, ["a"], name=f"r{number}")
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in to_reasons(where):
        await database.write(partial(_run, statement))
    update = text(f"UPDATE {where}runs SET state = :state, pause_reason = :reason WHERE name = :name")
    for number, reason in enumerate(words):
        state = {"being removed": "cancelled", None: "active"}.get(reason, "paused")
        bound = {"state": state, "reason": reason, "name": f"r{number}"}
        await database.write(lambda c, bound=bound: c.execute(update, bound))  # type: ignore[misc]
    await database.close()
    database = await open_database(db_url)
    found = await reads.all_runs(database)
    await database.close()
    paused = [(run.pause, run.move) for run in found]
    moved = [(run.state, run.pause, run.move) for run in found[len(REASONS) : -2]]
    assert moved == list(MOVES.values())
    assert paused[: len(REASONS)] == [(Paused(cause, reason), None) for reason, cause in REASONS.items()]
    assert paused[-2:] == [(Paused(PauseCause.REMOVING, "being removed"), None), (None, None)]


async def test_no_migration_under_workers_of_an_older_version(db_url: str, clock: Clock) -> None:
    """While they report, the queue stays as it is; a dead one counts for a minute at most, on a file not at all."""
    database = await open_database(db_url, create=True, clock=clock)
    await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=17, concurrency=1)
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in to_reasons(where):
        await database.write(partial(_run, statement))
    clock.forward(20)
    with pytest.raises(DatabaseError, match=r"workers of an older version .*\(h:17\).*stop them first.* in 40 s"):
        await open_database(db_url, clock=clock)
    await database.read(lambda c: c.execute(text(f"SELECT pause_reason FROM {where}runs")))
    if is_postgresql(db_url):
        clock.forward(41)
    else:
        queue.leave(worker)
    newer = await open_database(db_url, clock=clock)
    assert [run.pause for run in await reads.all_runs(newer)] == [None]
    await newer.close()
    await database.close()


async def test_shares_and_highest_costs_are_added(db_url: str) -> None:
    """A queue of the version before that has a budget and limits goes on with them."""
    database = await open_database(db_url, create=True)
    run = await put(database, ["a", "b"])
    where = "lbr." if is_postgresql(db_url) else ""
    for statement in (
        f"INSERT INTO {where}limits (answerer, cooldown_until, reason, slots) VALUES ('offline:echo', 0, '', 7.5)",
        f"UPDATE {where}runs SET budget_nanos = 1000",
        f"ALTER TABLE {where}limits DROP COLUMN refused",
        f"ALTER TABLE {where}limits DROP COLUMN answered",
        f"ALTER TABLE {where}runs DROP COLUMN highest_nanos",
        f"DROP TABLE {where}outages",
        f"DELETE FROM {where}schema_version WHERE version > 5",
    ):
        await database.write(partial(_run, statement))
    await database.close()
    database = await open_database(db_url)
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 2, lease=60)
    await settle(database, [failed(claim, LIMITED)])
    (seen,) = (await reads.overview(database)).limits
    assert seen.limit.slots == 7.5
    assert seen.limit.refused == pytest.approx(0.1)
    await database.close()


async def test_late_failure_does_not_undo_a_retry(database: Database, clock: Clock) -> None:
    """A failure from before somebody put the job back by hand is of the past; an answer is still welcome."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    await runs.cancel(database, run)
    clock.forward(61)
    await queue.reclaim()
    assert await redo.retry(database, run) == 1
    assert (await settle(database, [failed(claim, PERMANENT)])).stale == {claim.job_id}
    assert await states(database, run) == {"pending": 1}
    assert await queue.renew(worker, [claim], lease=60, settled=0, rate=0.0) == {claim.job_id}
    assert (await job_row(database, claim.job_id)).crashes == 0
    await assert_counted(database, run)


async def test_stale_answer_is_counted_once(database: Database, clock: Clock) -> None:
    """However often a late answer is brought, its cost and its record are written once."""
    run = await put(database, ["a"])
    queue, zombie, heir = await two_workers(database)
    (old,) = await queue.claim(zombie, [run.id], 1, lease=60)
    clock.forward(61)
    await queue.reclaim()
    await queue.claim(heir, [run.id], 1, lease=60)
    for _ in range(3):
        await settle(database, [answered(old, "late")])
    counts = (await reads.overview(database, "r")).runs[0].counts
    assert counts["stale"] == 1
    assert [t.what for t in (await reads.story(database, run, 0)).tries] == ["crashed", "stale"]


async def test_cancel_is_not_undone_by_a_pause(database: Database, db_url: str) -> None:
    """Whatever comes at the same moment, a cancelled run stays cancelled, and its jobs with it."""
    other = await open_database(db_url)
    for n in range(15):
        run = await put(database, [f"p{m}" for m in range(5)], name=f"r{n}", reuse=False)
        await asyncio.gather(
            runs.pause(other, run, "x"),
            runs.cancel(database, run),
            runs.resume(other, run),
            return_exceptions=True,
        )
        assert (await reads.find_run(database, f"r{n}")).state is RunState.CANCELLED
        assert await states(database, run) == {"cancelled": 5}
    await other.close()
