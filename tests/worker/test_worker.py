"""The worker's loop over a real queue: slots, leases, drains, retries, poison and what is left behind."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import Counter
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update

import lbr
from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.errors import (
    DatabaseError,
    NothingToServeError,
    Pause,
    Permanent,
    RetryLater,
    Usage,
    UsageError,
)
from lbr.core.retry import RetryPolicy
from lbr.core.types import Claim, Item, KeyMaker, PauseCause, Paused, Prompt, Shape, Task, Until
from lbr.models.identity import identify
from lbr.store import enqueue, reads, runs, schema
from lbr.store.database import open_database
from lbr.store.leases import Presence
from lbr.store.sqlite import SQLiteDatabase
from lbr.worker.worker import Worker
from tests.support import ECHO, Queue, assert_counted, eventually, locked_by_another, put, real_clock, states
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from lbr.core.types import Run
    from lbr.store.database import Database

QUICK = RetryPolicy(backoff_first=0.02, backoff_most=0.05)


@pytest.fixture
async def live(db_url: str) -> AsyncIterator[Database]:
    """Return a queue whose leases go by the real clock."""
    opened = await open_database(db_url, create=True)
    yield opened
    await opened.close()


def asks(function: Callable[..., Any]) -> Task:
    """Return the task that a test's function answers."""
    identity = identify(function)
    return Task(function=identity.name, version=identity.version, fingerprint=identity.fingerprint)


def worker_for(
    database: Database, *functions: Callable[..., Any], policy: RetryPolicy = QUICK, **options: Any
) -> Worker:
    """Return a worker that may call these functions."""
    lines: list[str] = []
    made = Worker(
        database,
        authorize(functions),
        WorkOptions(**options),
        policy=policy,
        notify=lines.append,
        rng=Random(1),
    )
    made.lines = lines  # type: ignore[attr-defined]
    return made


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a worker in the background for the length of the block."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.abort()
        await asyncio.gather(task, return_exceptions=True)


class Account:
    """What a function closes over; its values may change without making another function of it."""

    def __init__(self) -> None:
        self.credit = 5
        self.calls = 0


async def answers(database: Database, run: Run) -> list[str | None]:
    """Return a run's results in input order."""
    return [row.result async for page in reads.rows(database, run, Shape.ORIGINAL) for row in page]


async def test_every_job_is_called_once(live: Database) -> None:
    """Without failures each distinct prompt is called exactly once and every input gets its answer."""
    calls: Counter[str] = Counter()

    async def shout(prompt: str) -> str:
        calls[prompt] += 1
        return prompt.upper()

    prompts = [f"p{n % 300}" for n in range(500)]
    run = await put(live, prompts, task=asks(shout))
    report = await worker_for(live, shout, concurrency=20).run()
    assert (report.done, report.failed, report.retried) == (300, 0, 0)
    assert calls == Counter({f"p{n}": 1 for n in range(300)})
    assert await answers(live, run) == [prompt.upper() for prompt in prompts]
    await assert_counted(live, run)


async def test_concurrency_is_used_and_not_exceeded(live: Database) -> None:
    """As many calls run at a time as there are slots, and never more."""
    now = most = 0

    async def slow(prompt: str) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return prompt

    await put(live, [f"p{n}" for n in range(60)], task=asks(slow))
    await worker_for(live, slow, concurrency=7).run()
    assert most == 7


async def test_retries_hold_no_slot(live: Database) -> None:
    """A job that waits for its retry lets others run, and is charged each failed try."""
    calls: Counter[str] = Counter()

    async def flaky(prompt: str) -> str:
        calls[prompt] += 1
        if prompt == "bad" and calls["bad"] < 3:
            raise ConnectionError("reset")
        return prompt

    run = await put(live, ["bad", "a", "b"], task=asks(flaky))
    report = await worker_for(live, flaky, concurrency=1).run()
    assert (report.done, report.retried) == (3, 2)
    assert calls == Counter({"bad": 3, "a": 1, "b": 1})
    story = await live.read(reads.story, run, 0)
    assert (story.attempts, [t.error for t in story.tries]) == (3, ["ConnectionError"] * 2)
    await assert_counted(live, run)


async def test_families_from_a_function(live: Database) -> None:
    """A function tells permanent failures and waits apart from hiccups, and each ends as it should."""
    calls: Counter[str] = Counter()

    async def picky(prompt: str) -> str:
        calls[prompt] += 1
        if prompt == "never":
            raise Permanent("not this one")
        if prompt == "later" and calls["later"] < 3:
            raise RetryLater(0.05)
        if prompt == "hopeless":
            raise ValueError("always")
        return prompt

    run = await put(live, ["never", "later", "hopeless", "fine"], task=asks(picky))
    report = await worker_for(live, picky).run()
    assert (report.done, report.failed) == (2, 2)
    assert calls == Counter({"never": 1, "later": 3, "hopeless": 8, "fine": 1})
    assert (await live.read(reads.story, run, 1)).attempts == 1
    rows = [row async for page in reads.rows(live, run, Shape.ORIGINAL) for row in page]
    assert [(row.status, row.error) for row in rows[:3:2]] == [
        ("failed", "not this one"),
        ("failed", "always"),
    ]
    await assert_counted(live, run)


async def test_pause_stops_the_run_and_keeps_every_job(live: Database) -> None:
    """A function that pauses ends the worker with the reason; after resume the rest is done, once."""
    account = Account()

    async def paid(prompt: str) -> str:
        account.calls += 1
        if account.calls > account.credit:
            raise Pause("no credit")
        return prompt

    run = await put(live, [f"p{n}" for n in range(30)], task=asks(paid))
    report = await worker_for(live, paid, concurrency=2).run()
    assert report.paused == {"r": Paused(PauseCause.ACCOUNT, "Pause: no credit")}
    left = await states(live, run)
    assert (left["done"], left["pending"]) == (report.done, 30 - report.done)
    assert report.done < 30
    assert (await worker_for(live, paid).run()).paused == {}
    named = Worker(live, authorize([paid]), WorkOptions(), run_names=["r"])
    assert (await named.run()).paused == {"r": Paused(PauseCause.ACCOUNT, "Pause: no credit")}
    account.credit = 1_000
    await live.write(runs.resume, run)
    assert (await worker_for(live, paid).run()).done == 30 - report.done
    assert await answers(live, run) == [f"p{n}" for n in range(30)]
    await assert_counted(live, run)


async def test_drain_finishes_what_is_held(live: Database) -> None:
    """Told to stop, a worker claims no more, keeps what its calls answer, and charges nothing for the rest."""
    started = 0
    finish = asyncio.Event()

    async def slow(prompt: str) -> str:
        nonlocal started
        started += 1
        await finish.wait()
        return prompt

    run = await put(live, [f"p{n}" for n in range(20)], task=asks(slow))
    worker = worker_for(live, slow, concurrency=5)
    async with working(worker) as task:
        await eventually(lambda: started == 5)
        worker.drain()
        finish.set()
        report = await task
    assert (report.done, report.released, report.drained) == (5, 0, True)
    assert await states(live, run) == {"done": 5, "pending": 15}
    await assert_counted(live, run)


async def test_grace_ends_and_jobs_are_released(live: Database) -> None:
    """Calls that outlast the grace are given back: pending, nothing charged, the fence kept."""
    started = 0

    async def endless(prompt: str) -> str:
        nonlocal started
        started += 1
        await asyncio.Event().wait()
        return prompt

    run = await put(live, [f"p{n}" for n in range(8)], task=asks(endless))
    worker = worker_for(live, endless, concurrency=3, grace=0.1)
    async with working(worker) as task:
        await eventually(lambda: started == 3)
        worker.drain()
        report = await task
    assert report.released == 3
    assert await states(live, run) == {"pending": 8}
    story = await live.read(reads.story, run, 0)
    assert (story.attempts, story.crashes, story.claim_seq, story.tries) == (0, 0, 1, [])
    await assert_counted(live, run)


async def test_cancelled_worker_gives_everything_back(live: Database) -> None:
    """Cancelling the task that runs a worker, even impatiently, releases its jobs before it is passed on."""
    started = 0

    async def endless(prompt: str) -> str:
        nonlocal started
        started += 1
        await asyncio.Event().wait()
        return prompt

    run = await put(live, ["a", "b", "c"], task=asks(endless))
    task = asyncio.create_task(worker_for(live, endless, concurrency=2).run())
    await eventually(lambda: started == 2)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await states(live, run) == {"pending": 3}
    await assert_counted(live, run)


async def test_leases_are_renewed_while_calls_run(live: Database) -> None:
    """A call that takes several leases is not taken away from its living worker."""
    account = Account()

    async def long(prompt: str) -> str:
        account.calls += 1
        await asyncio.sleep(2.5)
        return prompt

    run = await put(live, ["a"], task=asks(long))
    first = worker_for(live, long, lease=0.6)
    second = worker_for(live, long, lease=0.6)
    reports = await asyncio.gather(first.run(), second.run())
    assert account.calls == 1
    assert sum(report.done for report in reports) == 1
    assert sum(report.reclaimed for report in reports) == 0
    assert (await live.read(reads.story, run, 0)).crashes == 0


async def test_dead_workers_jobs_are_reclaimed(live: Database) -> None:
    """Jobs of a worker that is gone are taken over when their leases run out, without charging an attempt."""

    async def echo(prompt: str) -> str:
        return prompt

    run = await put(live, [f"p{n}" for n in range(10)], task=asks(echo))
    queue = Queue(live)
    dead_workers = await queue.register(host="gone", pid=1, concurrency=4)
    assert len(await queue.claim(dead_workers, [run.id], 4, lease=0.5)) == 4
    report = await worker_for(live, echo, lease=0.5).run()
    assert (report.done, report.reclaimed) == (10, 4)
    assert (await live.read(reads.story, run, 0)).attempts == 1
    await assert_counted(live, run)


async def test_lost_job_is_dropped_and_its_answer_refused(live: Database, db_url: str) -> None:
    """A worker that learns from its renewal that a job is somebody else's stops that call."""
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def endless(prompt: str) -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return prompt

    run = await put(live, ["a"], task=asks(endless))
    worker = worker_for(live, endless, lease=0.9)
    async with working(worker):
        await started.wait()
        # Somebody with a faster clock takes the job back and claims it.
        ahead = await open_database(db_url, clock=real_clock(60))
        queue = Queue(ahead)
        thief = await queue.register(host="b", pid=2, concurrency=1)
        claims: list[Claim] = []
        while not claims:  # until the owner's renewal has not come in between
            await queue.reclaim()
            claims = await queue.claim(thief, [run.id], 1, lease=60)
        await ahead.close()
        await asyncio.wait_for(cancelled.wait(), 10)
    assert claims[0].claim_seq >= 2
    row = (await live.read(reads.story, run, 0)).row
    assert row.status == "inflight"


async def test_suspect_runs_alone(live: Database, db_url: str) -> None:
    """A job that has crashed its workers twice waits until nothing else is held, then runs by itself."""
    together: list[set[str]] = []
    now: set[str] = set()

    async def watch(prompt: str) -> str:
        now.add(prompt)
        together.append(set(now))
        await asyncio.sleep(0.01)
        now.discard(prompt)
        return prompt

    run = await put(live, ["suspect"], task=asks(watch))
    queue = Queue(live)
    ghost = await queue.register(host="gone", pid=1, concurrency=1)
    for _ in range(2):
        behind = await open_database(db_url, clock=real_clock(-60))
        assert len(await Queue(behind).claim(ghost, [run.id], 1, lease=1)) in {0, 1}
        await behind.close()
        if not await queue.reclaim():
            await queue.claim(ghost, [run.id], 1, lease=0.001)
            await asyncio.sleep(0.01)
            await queue.reclaim()
    assert (await live.read(reads.story, run, 0)).crashes == 2
    await put(live, [f"p{n}" for n in range(20)], name="innocent", task=asks(watch))
    report = await worker_for(live, watch, concurrency=8).run()
    assert report.done == 21
    assert [group for group in together if "suspect" in group] == [{"suspect"}]


async def test_until_empty_leaves_waiting_retries(live: Database) -> None:
    """`empty` goes home when nothing can be claimed now; `done` would wait for the retry."""

    async def fail(prompt: str) -> str:
        raise ConnectionError(prompt)

    run = await put(live, ["a"], task=asks(fail))
    slow = RetryPolicy(backoff_first=100, backoff_most=100)
    report = await worker_for(live, fail, policy=slow, until=Until.EMPTY).run()
    assert (report.retried, report.done) == (1, 0)
    assert await states(live, run) == {"pending": 1}


async def test_forever_waits_for_new_runs(live: Database) -> None:
    """A worker that runs for ever picks up runs that are enqueued after its start."""

    async def echo(prompt: str) -> str:
        return prompt

    worker = worker_for(live, echo, until=Until.FOREVER)
    async with working(worker) as task:
        run = await put(live, ["a", "b"], task=asks(echo))
        await eventually(lambda: worker.report.done == 2)
        worker.drain()
        await task
    assert await answers(live, run) == ["a", "b"]


async def test_worker_waits_for_an_enqueue_that_goes_on(live: Database) -> None:
    """With `done` a worker stays while inputs still arrive, and goes when they have all been answered."""

    async def echo(prompt: str) -> str:
        return prompt

    run = await live.write(runs.open_run, runs.RunSpec("r", asks(echo), 8))
    async with working(worker_for(live, echo)) as task:
        await asyncio.sleep(0.5)
        assert not task.done()
        await put(live, ["a"], task=asks(echo))
        assert (await asyncio.wait_for(task, 20)).done == 1
    assert await answers(live, run) == ["a"]


async def test_function_of_another_is_not_called(live: Database) -> None:
    """A worker never calls a function that only the database names; it says which flag would allow it."""
    await put(live, ["a"], task=Task(function="os:system"))
    with pytest.raises(NothingToServeError, match="--function os:system"):
        await worker_for(live).run()
    named = Worker(live, authorize(), WorkOptions(), run_names=["r"])
    with pytest.raises(UsageError, match="--function os:system"):
        await named.run()


async def test_servable_runs_are_served_beside_others(live: Database) -> None:
    """A worker answers what it can and tells what it leaves."""
    await put(live, ["a"], name="theirs", task=Task(function="their:function"))
    await put(live, ["b"], name="ours", task=ECHO)
    worker = worker_for(live)
    assert (await worker.run()).done == 1
    assert any("run theirs: not served" in line for line in worker.lines)  # type: ignore[attr-defined]


COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": '{"b": 1, "a": 1}'},
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


async def test_an_earlier_run_with_a_setting_that_is_not_sent_goes_on(
    live: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker warns once and answers; the same settings for a new run are refused."""
    task = Task(model="openai-chat:m", settings={"top_k": 20, "temperature": 0.5})
    run = await put(live, ["a", "b"], task=task)
    with Scripted(200, json.dumps(COMPLETION)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        worker = worker_for(live)
        assert (await worker.run()).done == 2
    assert [one["temperature"] for one in server.asked] == [0.5, 0.5]
    (warning,) = [line for line in worker.lines if "top_k" in line]  # type: ignore[attr-defined]
    assert warning.startswith(f"run {run.name} goes on, but the setting top_k is not sent to model 'openai-chat:m'")


async def test_a_worker_takes_over_the_order_of_a_schema(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An enqueue while a worker serves the run changes the order in which its next calls send the schema."""
    schema: Any = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
    turned = {**schema, "properties": dict(reversed(schema["properties"].items()))}
    with Scripted(200, json.dumps(COMPLETION)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        await put(live, ["x"], task=Task(model="openai-chat:m", schema=schema))
        async with working(worker_for(live, until=Until.FOREVER)):
            await eventually(lambda: len(server.asked) == 1)
            task = Task(model="openai-chat:m", schema=turned)
            run = await live.write(runs.open_run, runs.RunSpec("r", task, 8))
            key = KeyMaker(task).key(Prompt(text="y"))
            await live.write(enqueue.add_chunk, run, 1, [Item(Prompt(text="y"))], [key], reuse=True)
            await live.filled()
            await eventually(lambda: len(server.asked) == 2)
    found = [one["response_format"]["json_schema"]["schema"]["properties"] for one in server.asked]
    assert [list(one) for one in found] == [["b", "a"], ["a", "b"]]


async def test_hung_call_is_cut_off(live: Database) -> None:
    """A call without an answer frees its slot after the timeout, as a transient failure."""
    calls = 0

    async def hangs_once(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return prompt

    run = await put(live, ["a"], task=asks(hangs_once))
    assert (await worker_for(live, hangs_once, timeout=0.1).run()).done == 1
    tries = (await live.read(reads.story, run, 0)).tries
    assert [(t.error, t.message) for t in tries] == [("CallTimeout", "no answer within 0.1 s")]


async def test_database_that_goes_away_is_an_error(live: Database) -> None:
    """A settlement that cannot be written ends the worker with an error, not with silence."""

    async def spoil(prompt: str) -> str:
        await live.write(lambda connection, _: schema.results.drop(connection))
        return prompt

    await put(live, ["a"], task=asks(spoil))
    with pytest.raises(DatabaseError):
        await worker_for(live, spoil).run()


async def test_function_that_cancels_itself_is_retried(live: Database) -> None:
    """A CancelledError from inside a call is that call's failure, not the worker's end."""
    calls = 0

    async def confused(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise asyncio.CancelledError
        return prompt

    await put(live, ["a"], task=asks(confused))
    report = await worker_for(live, confused).run()
    assert (report.done, report.retried) == (1, 1)


async def test_function_that_cancels_its_own_task_is_retried(live: Database) -> None:
    """A call whose task ends cancelled, though nobody of ours cancelled it, frees its slot and is charged."""
    calls = 0

    async def stubborn(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        return prompt

    await put(live, ["a"], task=asks(stubborn))
    report = await worker_for(live, stubborn).run()
    assert (report.done, report.retried) == (1, 1)


class PanicError(BaseException):
    """What an extension may raise: no Exception."""


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        (PanicError("panic"), False),
        (GeneratorExit(), False),
        (SystemExit(3), False),
        (PanicError("panic"), True),
        (GeneratorExit(), True),
        (SystemExit(3), True),
        (KeyboardInterrupt(), True),
    ],
)
async def test_whatever_a_function_raises_belongs_to_its_job(live: Database, error: BaseException, plain: bool) -> None:
    """No exception of a user's function takes the worker or the other jobs along."""

    def panics(prompt: str) -> str:
        if prompt == "bad":
            raise error
        return prompt

    async def panics_later(prompt: str) -> str:
        return panics(prompt)

    function = panics if plain else panics_later
    run = await put(live, ["a", "bad", "b"], task=asks(function))
    report = await worker_for(live, function).run()
    assert (report.done, report.failed) == (2, 1)
    assert {t.error for t in (await live.read(reads.story, run, 1)).tries} == {type(error).__name__}


async def test_answers_that_no_database_holds_fail_alone(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure's text is made storable, an answer without measure is refused; the others are kept."""
    monkeypatch.setattr("lbr.worker.attempt.ANSWER_LIMIT", 1_000)

    async def odd(prompt: str) -> str:
        if prompt == "half":
            raise Permanent("bad", text="\ud800")
        return "x" * 1_001 if prompt == "huge" else prompt

    run = await put(live, ["a", "half", "huge"], task=asks(odd))
    report = await worker_for(live, odd).run()
    assert (report.done, report.failed) == (1, 2)
    assert (await live.read(reads.story, run, 1)).tries[0].text == "?"
    assert "at most 1,000 characters, got: 1,001" in ((await live.read(reads.story, run, 2)).row.error or "")


async def test_locked_database_does_not_make_a_worker_take_its_own_jobs(live: Database, db_url: str) -> None:
    """A worker that could not renew for longer than its lease keeps its calls; no crash, no second call."""
    calls = 0

    async def long(prompt: str) -> str:
        nonlocal calls
        calls += 1
        await asyncio.sleep(4)
        return prompt

    run = await put(live, ["a", "b"], task=asks(long))
    worker = worker_for(live, long, lease=0.6)
    async with working(worker) as task:
        await eventually(lambda: calls == 2)
        async with locked_by_another(db_url):
            await asyncio.sleep(1.5)
        report = await task
    assert (calls, report.done, report.stale) == (2, 2, 0)
    assert (await live.read(reads.story, run, 0)).crashes == 0


async def test_finished_runs_cost_a_worker_nothing(live: Database) -> None:
    """A worker knows only the runs that still have work, however many have finished before."""

    async def echo(prompt: str) -> str:
        return prompt

    for n in range(5):
        await put(live, [f"p{n}"], name=f"old {n}", task=asks(echo))
    await worker_for(live, echo).run()
    run = await put(live, ["new"], name="new", task=asks(echo))
    assert [one.id for one in await live.read(reads.open_runs)] == [run.id]
    assert (await worker_for(live, echo).run()).done == 1
    assert await live.read(reads.open_runs) == []


async def test_rubbish_counts_of_tokens_are_left_out(live: Database) -> None:
    """A provider's count that no database holds does not keep the answer, nor those beside it, from being written."""

    async def odd(prompt: str) -> str:
        raise Permanent("odd", usage=Usage(2**64, -1, 7))

    run = await put(live, ["a"], task=asks(odd))
    assert (await worker_for(live, odd).run()).failed == 1
    counts = (await live.read(reads.overview, "r")).runs[0].counts
    assert (counts["input_tokens"], counts["output_tokens"], counts["cost_nanos"]) == (0, 0, 7)
    await assert_counted(live, run)


async def test_counts_that_no_call_comes_to_do_not_stop_the_worker(live: Database) -> None:
    """Numbers that the database holds one by one, and not their sum, are left out as well."""

    async def odd(prompt: str) -> str:
        raise Permanent(prompt, usage=Usage(2**62, 5, 2**62))

    run = await put(live, ["a", "b", "c"], task=asks(odd))
    assert (await worker_for(live, odd).run()).failed == 3
    counts = (await live.read(reads.overview, "r")).runs[0].counts
    assert (counts["input_tokens"], counts["output_tokens"], counts["cost_nanos"]) == (0, 15, 0)
    await assert_counted(live, run)


async def upper(prompt: str) -> str:
    """Answer in capitals."""
    return prompt.upper()


@pytest.mark.parametrize("hours", [3, -3])
async def test_a_machine_whose_clock_was_set_starts_workers(
    live: Database, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Reports from before say nothing: neither of workers that live, but have not reported since, nor of dead ones."""
    monkeypatch.setattr("lbr.worker.clock.CLOCK_SECONDS", 0.3)
    run = await put(live, ["a", "b"], task=asks(upper))
    queue = Queue(live)
    for leaves in (False, True):
        other = await queue.register(host="h", pid=1, concurrency=1)
        if leaves:
            queue.leave(other)
    shift = update(schema.workers).values(seen_at=schema.workers.c.seen_at + hours * 3_600_000)
    await live.write(lambda connection, _: connection.execute(shift))
    report = await worker_for(live, upper).run()
    assert (report.done, await states(live, run)) == (2, {"done": 2})


@pytest.mark.parametrize("db_url", ["sqlite:///runs.db"])
async def test_without_locks_a_changed_report_stops_a_worker(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system no lock shows which workers live; a report that changes shows it too."""
    monkeypatch.setattr(live, "presence", Presence())
    monkeypatch.setattr("lbr.worker.worker.TICK_SECONDS", 0.2)

    async def slow(prompt: str) -> str:
        other = update(schema.workers).where(schema.workers.c.host == "h")
        later = other.values(seen_at=schema.workers.c.seen_at + 300)
        while True:
            await asyncio.sleep(0.1)
            await live.write(lambda connection, _: connection.execute(later))

    await put(live, ["a"], task=asks(slow))
    await Queue(live).register(host="h", pid=1, concurrency=1)
    ahead = update(schema.workers).values(seen_at=schema.workers.c.seen_at + 3_600_000)
    await live.write(lambda connection, _: connection.execute(ahead))
    with pytest.raises(DatabaseError, match="leases need one clock"):
        await asyncio.wait_for(worker_for(live, slow, grace=0.1).run(), 30)


async def test_a_report_by_another_clock_stops_a_worker_before_it_claims(live: Database) -> None:
    """A worker of a file that starts beside one whose clock is ahead ends as soon as that one reports."""
    run = await put(live, ["a", "b"], task=asks(upper))
    other = await Queue(live).register(host="h", pid=1, concurrency=1)
    ahead = update(schema.workers).where(schema.workers.c.id == other)
    ahead = ahead.values(seen_at=schema.workers.c.seen_at + 3_600_000)
    await live.write(lambda connection, _: connection.execute(ahead))

    async def report() -> None:
        later = update(schema.workers).values(seen_at=schema.workers.c.seen_at + 300)
        while True:
            await asyncio.sleep(0.3)
            await live.write(lambda connection, _: connection.execute(later))

    reporting = asyncio.create_task(report())
    try:
        if live.presence.knows:
            with pytest.raises(DatabaseError, match=f"but worker {other}, which works on .* leases need one clock"):
                await worker_for(live, upper).run()
        else:
            await worker_for(live, upper).run()
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
    assert await states(live, run) == ({"pending": 2} if live.presence.knows else {"done": 2})


async def patient(prompt: str) -> str:
    """Take a while."""
    await asyncio.sleep(0.05 + len(prompt) / 100)
    return prompt


def test_the_end_of_the_event_loop_fails_no_call(tmp_path: Path) -> None:
    """`asyncio.run` ends by cancelling every task, calls too: their jobs are called again, and no try is charged."""
    url = str(tmp_path / "queue.db")

    async def work_for_a_moment() -> None:
        await lbr.enqueue(["x" * n for n in range(1, 121)], run="r", function=patient, max_attempts=1, db_url=url)
        working = asyncio.create_task(lbr.work(functions=[patient], concurrency=32, db_url=url))
        await asyncio.sleep(0.6)
        assert not working.done()

    asyncio.run(work_for_a_moment())
    report = asyncio.run(lbr.work(functions=[patient], concurrency=120, db_url=url))
    assert report.failed == 0
    status = asyncio.run(lbr.status("r", db_url=url)).runs[0]
    assert (status.done, status.failed) == (120, 0)


async def test_answers_are_kept_whatever_the_error_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not the database's, as of a mount that went away, ends the worker and costs no answer."""

    async def lose_the_mount(prompt: str) -> str:
        def fail(_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(SQLiteDatabase, "_found", fail)
        return prompt

    file = await open_database(str(tmp_path / "queue.db"), create=True)
    await put(file, ["a"], task=asks(lose_the_mount))
    with pytest.raises(DatabaseError, match="1 finished answers are kept in"):
        await worker_for(file, lose_the_mount, concurrency=1).run()
    assert [path.suffixes[-2:] for path in tmp_path.glob("*.spool.jsonl")] == [[".spool", ".jsonl"]]
    monkeypatch.undo()
    await file.close()
