"""Limits that all workers keep together, on every database: in the claims' transactions, and by real processes."""

from __future__ import annotations

import asyncio
import json
import math
import textwrap
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.core.errors import (
    Family,
    Usage,
    UsageError,
)
from lbr.core.limits import CallBound
from lbr.core.pricing import Price
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import (
    Failure,
    Item,
    JobState,
    KeyMaker,
    Outcome,
    PauseCause,
    Paused,
    Prompt,
    Reply,
    Task,
    WorkerId,
)
from lbr.store import enqueue, limits, reads, redo, runs
from lbr.store.database import open_database
from lbr.store.settle import settle
from tests.support import Clock, Queue, answered, assert_counted, failed, put
from tests.support.http_server import Scripted
from tests.support.llmock_server import serve

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Awaitable, Callable, Sequence

    from lbr.core.limits import Limit
    from lbr.core.types import Claim, Run, Settlement
    from lbr.store.database import Database
    from tests.support import Cli

WHO = "offline:echo"
LIMITED = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=1.0)


async def workers(database: Database, *slots: int) -> list[tuple[Queue, int]]:
    """Register workers with so many slots each."""
    queue = Queue(database)
    return [(queue, await queue.register(host="h", pid=n, concurrency=count)) for n, count in enumerate(slots)]


async def limit_of(database: Database, who: str = WHO) -> Limit:
    """Return what is set and learned of an answerer."""
    view = await database.read(reads.overview)
    return next(one.limit for one in view.limits if one.answerer == who)


def used(claim: Claim, tokens: int) -> Settlement:
    """Return the settlement of a call that took so many tokens."""
    reply = Reply("answer", Usage(tokens, 0, None))
    return decide(claim, Outcome(reply, None, 5), RetryPolicy(), None)  # type: ignore[arg-type]


async def claim(database: Database, worker: int, run: Run, most: int = 1_000, extra: int = 0) -> list[Claim]:
    """Claim as a worker does."""
    return await Queue(database).claim(worker, [run.id], most, lease=60, extra={run.id: extra})  # type: ignore[arg-type]


async def test_workers_share_the_requests_of_a_minute(database: Database, clock: Clock) -> None:
    """What one worker takes another does not get, in all runs of the answerer; what comes in goes to who asks first."""
    run, same = (
        await put(database, [f"a{n}" for n in range(90)], name="1"),
        await put(database, ["b"], name="2"),
    )
    (queue, one), (_, two) = await workers(database, 500, 500)
    await database.write(limits.set_limits, WHO, {"rpm": 600})
    assert len(await claim(database, one, run)) == 10
    assert await claim(database, two, same) == []
    outlook = await queue.check_due([run.id, same.id])
    assert (outlook.due, outlook.next_ms) == (False, 100)
    clock.forward(0.3)
    assert len(await claim(database, two, same)) == 1
    assert len(await claim(database, one, run)) == 2
    clock.forward(3600)
    assert len(await claim(database, one, run)) == 10
    await database.write(limits.set_limits, WHO, {"rpm": None})
    assert len(await claim(database, one, run)) == 68
    await assert_counted(database, run)


async def test_tokens_are_debited_by_estimate_and_settled_by_use(database: Database, clock: Clock) -> None:
    """A claim takes what its prompt and its answer will probably need; the rest, or all of it, is given back."""
    run = await put(database, ["x" * 400 + str(n) for n in range(20)])
    ((_, one),) = await workers(database, 500)
    await database.write(limits.set_limits, WHO, {"tpm": 60_000})
    claims = await claim(database, one, run, extra=299)
    assert [c.tokens for c in claims] == [400, 400, 400]
    assert (await limit_of(database)).tokens == -200
    assert await claim(database, one, run) == []
    await database.write(settle, [used(claims[0], 100), failed(claims[1], LIMITED), answered(claims[2])])
    assert (await limit_of(database)).tokens == -200 + 300 + 400
    await assert_counted(database, run)


async def test_an_image_is_no_text(database: Database, clock: Clock) -> None:
    """Of messages the texts are debited: the letters of an image would hold everybody back for minutes."""
    run = await database.write(runs.open_run, runs.RunSpec("r", Task(model=WHO), 8))
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    prompt = Prompt(messages=({"role": "user", "content": [{"type": "text", "text": "x" * 40}, image]},))
    await database.write(enqueue.add_chunk, run, 0, [Item(prompt)], [KeyMaker(run.task).key(prompt)], reuse=True)
    ((_, one),) = await workers(database, 5)
    await database.write(limits.set_limits, WHO, {"tpm": 60_000})
    (taken,) = await claim(database, one, run, extra=5)
    assert taken.tokens == 15


async def test_what_is_released_without_a_call_is_given_back(database: Database, clock: Clock) -> None:
    """A worker that stops between claim and call has used nothing; one that gives up a call has."""
    run = await put(database, [f"{n:0400}" for n in range(40)])
    ((queue, one),) = await workers(database, 500)
    await database.write(limits.set_limits, WHO, {"rpm": 600, "tpm": 60_000})
    claims = await claim(database, one, run, 4)
    limit = await limit_of(database)
    assert (limit.requests, limit.tokens) == (6, 600)
    await queue.release(one, claims[:2], unused=True)  # type: ignore[arg-type]
    await queue.release(one, claims[2:])  # type: ignore[arg-type]
    limit = await limit_of(database)
    assert (limit.requests, limit.tokens) == (8, 800)


async def test_calls_at_a_time_are_counted_over_all_workers(db_url: str) -> None:
    """However many workers claim at once, no more is in flight than was fixed, and none of it is lost."""
    databases = [await open_database(db_url, create=True) for _ in range(4)]
    run = await put(databases[0], [f"p{n}" for n in range(60)])
    ids = [(await workers(database, 20))[0][1] for database in databases]
    await databases[0].write(limits.set_limits, WHO, {"concurrency": 7})
    done = 0
    while done < 60:
        found = await asyncio.gather(*(claim(d, w, run) for d, w in zip(databases, ids, strict=True)))
        held = [c for claims in found for c in claims]
        assert len(held) == min(7, 60 - done)
        await databases[0].write(settle, [answered(c) for c in held])
        done += len(held)
    await assert_counted(databases[0], run)
    for database in databases:
        await database.close()


async def test_refusals_cut_and_successes_widen(database: Database, clock: Clock) -> None:
    """Many refusals cut the calls at a time, by half at most, once for all that began before; then they grow."""
    run = await put(database, [f"p{n}" for n in range(300)])
    (_, one), (_, two) = await workers(database, 20, 20)
    claims = [*await claim(database, one, run, 20), *await claim(database, two, run, 20)]
    assert not any(c.throttled for c in claims)
    clock.forward(1)
    await database.write(settle, [failed(c, LIMITED) for c in claims[:10]])
    cut = (await limit_of(database)).slots or 0
    assert 30 < cut < 32
    await database.write(settle, [failed(c, LIMITED) for c in claims[10:20]] + [answered(c) for c in claims[20:]])
    assert (await limit_of(database)).slots == cut
    clock.forward(5)
    for grown in (0, 1):  # a round of answers calms the share refused, and the next one widens
        again = await claim(database, one, run)
        assert len(again) == 31
        assert all(c.throttled for c in again)
        await database.write(settle, [answered(c) for c in again])
        assert (await limit_of(database)).slots == pytest.approx(cut + grown, abs=0.1)
    overloaded = Failure(Family.TRANSIENT, "Overloaded", "529", overloaded=True)
    again = await claim(database, two, run)
    clock.forward(1)
    await database.write(settle, [failed(c, overloaded) for c in again])
    assert (await limit_of(database)).slots == pytest.approx((cut + 1) / 2, abs=0.6)
    await assert_counted(database, run)


async def test_unknown_provider_is_begun_slowly(database: Database, clock: Clock) -> None:
    """Few calls at first, twice as many after each round, until the workers' slots are all in use."""
    run = await put(database, [f"p{n}" for n in range(900)])
    (_, one), _ = await workers(database, 125, 125)
    for _ in range(2):
        await database.write(limits.slow_start, [WHO])
    for expected in (100, 200, 250):
        claims = await claim(database, one, run, 250)
        assert len(claims) == expected
        await database.write(settle, [answered(c) for c in claims])
    assert not any(c.throttled for c in await claim(database, one, run, 250))


FUNCTION = """
    import os, time

    async def stamp(prompt):
        with open("calls", "a") as file:
            file.write(f"{time.time()}\\n")
        return prompt
"""


def called(cli: Cli) -> Sequence[float]:
    """Return when calls were made, in order."""
    file = cli.folder / "calls"
    return sorted(map(float, file.read_text().split())) if file.exists() else []


@pytest.mark.slow
def test_four_workers_under_one_limit(cli: Cli) -> None:
    """Four processes make the requests of a minute together, within 5 %, and not more in any stretch of it."""
    (cli.folder / "stamps.py").write_text(textwrap.dedent(FUNCTION))
    (cli.folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(130)))
    cli("enqueue", "in.txt", "--function", "stamps:stamp")
    flags = ("--function", "stamps:stamp", "--rpm", "600", "--concurrency", "8")
    started = [cli.start("worker", *flags) for _ in range(4)]
    for worker in started:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    times = called(cli)
    assert len(times) == 130
    seconds = times[-1] - times[0]
    # The first second's worth was there at once.
    assert 120 / 10 * 0.95 <= seconds <= 120 / 10 * 1.05
    for first, last in ((0, 60), (35, 95), (60, 129)):
        assert times[last] - times[first] >= (last - first - 20) / 10
    assert {row["status"] for row in cli.collect("in")} == {"done"}


def cost(claim: Claim, nanos: int) -> Settlement:
    """Return the settlement of a call that cost so much."""
    reply = Reply("answer", Usage(1, 1, nanos))
    return decide(claim, Outcome(reply, None, 5), RetryPolicy(), None)  # type: ignore[arg-type]


async def test_budget_holds_for_all_workers_together(database: Database, clock: Clock) -> None:
    """The first call goes alone, then as many as what is left will pay for; then the run is paused and says so."""
    run = await put(database, [f"p{n}" for n in range(300)])
    (queue, one), (_, two) = await workers(database, 100, 100)
    await database.write(limits.set_budget, run.id, 1_000_000)
    spent, calls, flights = 0, 0, []
    while True:
        claims = [*await claim(database, one, run, 60), *await claim(database, two, run, 60)]
        if not claims:
            break
        flights.append(len(claims))
        await database.write(settle, [cost(c, 10_000) for c in claims])
        calls, spent = calls + len(claims), spent + 10_000 * len(claims)
    assert flights == [1, 2, 6, 18, 54, 19]
    assert (calls, spent) == (100, 1_000_000)
    found = await database.read(reads.find_run, "r")
    assert found.state == "paused"
    words = "it may cost $0.001, with $0.001 spent there is no room for a call"
    assert found.pause == Paused(PauseCause.BUDGET, words)
    await database.write(limits.set_budget, run.id, 1_050_000)
    await database.write(runs.resume, found)
    assert len(await claim(database, one, run, 60)) == 5
    assert not (await queue.check_due([run.id])).due
    await assert_counted(database, run)


async def test_dear_calls_after_cheap_ones(database: Database, clock: Clock) -> None:
    """Four workers of 16 slots pass the limit by one call at most, if it is known what a call may cost at most."""
    run = await put(database, [f"p{n}" for n in range(400)])
    crew = await workers(database, 16, 16, 16, 16)
    await database.write(limits.set_budget, run.id, 1_000_000)
    bound = {run.id: CallBound(Price(0, 1), input_tokens=0, output_tokens=100)}
    spent, calls, most = 0, 0, 0
    while True:
        claims = [
            claim
            for queue, worker in crew
            for claim in await queue.claim(worker, [run.id], 16, lease=60, bounds=bound)  # type: ignore[arg-type]
        ]
        if not claims:
            break
        most = max(most, len(claims))
        await database.write(settle, [cost(c, 10 if c.job_id <= 100 else 100_000) for c in claims])
        calls, spent = calls + len(claims), spent + sum(10 if c.job_id <= 100 else 100_000 for c in claims)
    assert most == 10  # at 100 tokens of $1 for a million, also while calls are cheap
    assert 900_000 < spent <= 1_000_000 + 100_000
    assert (await database.read(reads.find_run, "r")).state == "paused"
    await assert_counted(database, run)


async def test_a_call_that_died_with_its_worker_is_estimated(database: Database, clock: Clock) -> None:
    """It counts as spent at what calls cost so far, and no longer once its answer comes after all."""
    run = await put(database, [f"p{n}" for n in range(4)])
    (queue, one), (_, two) = await workers(database, 9, 9)
    await database.write(
        settle,
        [cost(c, nanos) for c, nanos in zip(await claim(database, one, run, 2), (10, 21), strict=True)],
    )
    lost, late = await claim(database, one, run, 2)
    clock.forward(61)
    assert len(await queue.reclaim()) == 2

    async def counted() -> tuple[int, int, int]:
        counts = (await database.read(reads.overview, "r")).runs[0].counts
        return counts["cost_nanos"], counts["wasted_nanos"], counts["estimated_nanos"]

    assert await counted() == (31 + 2 * 16, 32, 32)
    tries = (await database.read(reads.story, run, 2)).tries
    assert [(one.what, one.cost_nanos) for one in tries] == [("crashed", 16)]
    await assert_counted(database, run)
    await database.write(settle, [cost(late, 12)])
    assert await counted() == (31 + 16 + 12, 16, 16)
    await assert_counted(database, run)
    (again,) = await claim(database, two, run, 1)
    assert again.job_id == lost.job_id
    await database.write(settle, [cost(lost, 7)])
    assert await counted() == (31 + 12 + 7, 7, 0)
    await database.write(settle, [cost(lost, 7)])  # safe to repeat
    assert await counted() == (31 + 12 + 7, 7, 0)
    await assert_counted(database, run)


async def test_a_lease_that_is_taken_up_again_has_no_estimate(database: Database, clock: Clock) -> None:
    """A worker that stood still, but lives, goes on with its call, which is charged when it ends."""
    run = await put(database, ["a", "b"])
    ((queue, one),) = await workers(database, 9)
    (first,) = await claim(database, one, run, 1)
    await database.write(settle, [cost(first, 10)])
    held = await claim(database, one, run, 1)
    clock.forward(61)
    await queue.reclaim()
    counts = (await database.read(reads.overview, "r")).runs[0].counts
    assert (counts["cost_nanos"], counts["estimated_nanos"]) == (20, 10)
    assert await queue.renew(one, held, lease=60, settled=1, rate=1.0) == set()  # type: ignore[arg-type]
    counts = (await database.read(reads.overview, "r")).runs[0].counts
    assert (counts["cost_nanos"], counts["wasted_nanos"], counts["estimated_nanos"]) == (10, 0, 0)


async def test_free_calls_need_no_budget(database: Database, clock: Clock) -> None:
    """A run whose calls cost nothing is held to few at a time only until that is known."""
    run = await put(database, [f"p{n}" for n in range(300)])
    ((_, one),) = await workers(database, 100)
    await database.write(limits.set_budget, run.id, 1)
    for expected in (1, 2, 6, 18, 54, 100):
        claims = await claim(database, one, run, 100)
        assert len(claims) == expected
        await database.write(settle, [cost(c, 0) for c in claims])


async def test_what_is_done_is_not_paused(database: Database, clock: Clock) -> None:
    """A run that has come to its end with its last cent is finished, whatever else its worker does."""
    run, other = await put(database, ["a"], name="a"), await put(database, ["b"], name="b", reuse=False)
    ((queue, one),) = await workers(database, 5)
    await database.write(limits.set_budget, run.id, 10)
    await database.write(settle, [cost(c, 10) for c in await claim(database, one, run)])
    assert len(await queue.claim(one, [run.id, other.id], 5, lease=60)) == 1  # type: ignore[arg-type]
    assert (await database.read(reads.find_run, "a")).state == "active"


async def _until(look: Callable[[], Awaitable[Any]], holds: Callable[[Any], Any]) -> Any:
    async with asyncio.timeout(60):
        while True:
            if holds(seen := await look()):
                return seen
            await asyncio.sleep(0.01)


async def test_a_resume_outlives_the_budget_of_a_worker_that_waits(db_url: str) -> None:
    """A worker that was started while a run was paused does not take back what the run may cost since; a new one does."""
    await lbr.enqueue(["a", "b"], run="r", model="offline:echo", db_url=db_url)
    await lbr.pause("r", db_url=db_url)
    working = asyncio.create_task(lbr.work(max_cost=1, until="forever", db_url=db_url))
    database = await open_database(db_url)
    # It looks at the runs first, and registers then.
    await _until(lambda: database.read(reads.overview), lambda view: view.workers)
    await lbr.resume("r", max_cost=7, db_url=db_url)
    seen = await _until(lambda: lbr.status("r", db_url=db_url), lambda status: status.runs[0].done == 2)
    assert seen.runs[0].max_cost_usd == 7
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await lbr.enqueue(["a", "b", "c"], run="r", model="offline:echo", append=True, db_url=db_url)
    await lbr.work(max_cost=1, db_url=db_url)
    assert (await lbr.status("r", db_url=db_url)).runs[0].max_cost_usd == 1
    await database.close()


async def test_a_refused_resume_sets_no_budget(db_url: str) -> None:
    """What a cancelled run may cost stays as it was."""
    await lbr.enqueue(["a"], run="r", model="openai-chat:gpt-4o-mini", db_url=db_url)
    await lbr.cancel("r", db_url=db_url)
    with pytest.raises(UsageError, match="was cancelled"):
        await lbr.resume("r", max_cost=5, db_url=db_url)
    assert (await lbr.status("r", db_url=db_url)).runs[0].max_cost_usd is None


@pytest.mark.parametrize("scope", ["function:", "function: f", "function:a\nb", "a:\x00", "a:" + "x" * 3_000, " "])
async def test_a_scope_that_nobody_can_have_is_refused(db_url: str, scope: str) -> None:
    """What no answerer is called gets no row."""
    with pytest.raises(UsageError, match="expected a name as in `lbr status`"):
        await lbr.limit(scope, {"rpm": 5}, db_url=db_url)


async def test_a_budget_knows_what_calls_cost_that_are_no_answers_now(database: Database, clock: Clock) -> None:
    """Answers that are redone, and calls that failed but cost something, count among the calls that were paid."""
    run = await put(database, [f"p{n}" for n in range(60)])
    ((_, one),) = await workers(database, 100)
    refused = Failure(Family.PERMANENT, "ContentFilter", "no", usage=Usage(1, 1, 10_000))
    first, *_ = await claim(database, one, run, 1)
    await database.write(settle, [failed(first, refused)])
    await database.write(limits.set_budget, run.id, 1_000_000)
    for expected in (2, 6, 18, 33):
        claims = await claim(database, one, run, 100)
        assert len(claims) == expected
        await database.write(settle, [cost(c, 10_000) for c in claims])
    assert await redo.retry(database, run, redo.read_conditions(["status=done"])) == 59
    assert len(await claim(database, one, run, 100)) == (1_000_000 - 600_000) // 10_000
    await assert_counted(database, run)


def verdict(url: str) -> dict[str, Any]:
    """Return what the mock server says of its clients."""
    with urllib.request.urlopen(url.replace("/v1", "/_llmock/verdict"), timeout=10) as answer:  # noqa: S310
        return dict(json.load(answer))


def provided(cli: Cli, url: str, count: int) -> None:
    """Enqueue so many prompts for a model at that URL, whose price is known."""
    cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-test"}
    (cli.folder / "in.txt").write_text("".join(f"prompt {n}\n" for n in range(count)))
    cli("enqueue", "in.txt", "--model", "openai-chat:gpt-4o-mini")


def finished(started: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for workers and return what they said."""
    return [worker.communicate(timeout=120)[1] for worker in started]


@pytest.mark.slow
def test_no_refusal_from_a_server_whose_limit_is_kept(cli: Cli) -> None:
    """Four workers that keep the server's own limit together are refused nothing."""
    with serve("--rpm", "600") as url:
        provided(cli, url, 50)
        started = [cli.start("worker", "--rpm", "600", "--concurrency", "8") for _ in range(4)]
        finished(started)
        seen = verdict(url)
    assert [worker.returncode for worker in started] == [0] * 4
    assert (seen["calls"], seen["attempts"], seen["faults_injected"]) == (50, 50, 0)
    assert cli.status("in")["done"] == 50


@pytest.mark.slow
def test_refusals_cool_every_worker_down(cli: Cli) -> None:
    """Nobody calls before the wait that the server asked one of them for is over, and no attempt is charged."""
    with serve("--rpm", "120") as url:
        provided(cli, url, 130)
        started = [cli.start("worker", "--concurrency", "8") for _ in range(3)]
        finished(started)
        seen = verdict(url)
    assert seen["passed"], seen
    assert seen["faults_injected"] > 0
    found = json.loads(cli("status", "in", "--json").stdout)
    assert (found["runs"][0]["done"], found["runs"][0]["failed"]) == (130, 0)
    assert found["runs"][0]["errors"]["rate_limited"] == seen["faults_injected"]
    assert found["limits"][0]["at_a_time"] < 24
    # A connection that the server closed for its long rest while it was used again is charged; a refusal is not.
    tries = "SELECT count(*) FROM attempts WHERE job_id = jobs.id AND family = 'transient'"
    assert cli.query(f"SELECT count(*) FROM jobs WHERE attempts != 1 + ({tries})") == [(0,)]


@pytest.mark.slow
def test_budget_stops_every_worker(cli: Cli) -> None:
    """Three workers together spend what the run may cost and not more; more money lets it go on."""
    with serve() as url:
        provided(cli, url, 300)
        started = [cli.start("worker", "--max-cost", "0.0001", "--concurrency", "8") for _ in range(3)]
        told = finished(started)
        assert {worker.returncode for worker in started} == {3}, told
        assert "it may cost $0.0001, with $" in "".join(told)
        found = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
        assert 0.000085 < found["cost_usd"] <= 0.000115
        assert (found["inflight"], found["failed"]) == (0, 0)
        assert found["state"] == "paused"
        cli("resume", "in", "--max-cost", "inf")
        cli("worker")
        assert cli.status("in")["done"] == 300
        assert verdict(url)["calls"] == 300


@pytest.mark.slow
def test_the_way_out_of_a_spent_budget_leads_out(cli: Cli) -> None:
    """`lbr run` says how to go on, and doing so ends the run; what was learned is told without a worker too."""
    with serve() as url:
        cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-of-this-test"}
        (cli.folder / "in.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
        command = (
            "run",
            "in.txt",
            "-o",
            "out.jsonl",
            "--model",
            "openai-chat:gpt-4o-mini",
            "--price",
            "in=1,out=1",
        )
        stopped = cli(*command, "--max-cost", "1e-9", check=False)
        assert stopped.returncode == 3
        assert "`lbr resume in --max-cost DOLLARS` lets it cost more" in stopped.stderr
        assert stopped.stderr.rstrip().endswith(", then run the command again with that --max-cost")
        for more in ((), ("--max-cost", "1e-9")):
            refused = cli("resume", "in", *more, check=False)
            assert (refused.returncode, refused.stdout) == (2, "")
            assert "there is no room for a call; give it more with --max-cost" in refused.stderr
        assert cli.query("SELECT state FROM runs") == [("paused",)]
        cli("resume", "in", "--max-cost", "1")
        cli(*command, "--max-cost", "1")
        assert cli.status("in")["done"] == 3
    (found,) = [json.loads(line) for line in cli("limit", "--json").stdout.splitlines()]
    assert (found["slots"], found["at_a_time"] >= 8) == (0, True)


@pytest.mark.processes
def test_a_limit_of_an_answerer_that_no_run_has_is_told_to_be_one(cli: Cli) -> None:
    """A scope with a slip of the pen in it is set, for runs that may come, but not without a word."""
    (cli.folder / "in.txt").write_text("one\n", encoding="utf-8")
    cli("enqueue", "in.txt", "--model", "offline:echo")
    missed = cli("limit", "offline:ecko", "--rpm", "100", "--json")
    assert "no run of this queue uses offline:ecko; the limit is kept for later runs" in missed.stderr
    met = cli("limit", "offline:echo", "--rpm", "100", "--json")
    assert met.stderr == ""
    assert [json.loads(done.stdout)["runs"] for done in (missed, met)] == [0, 1]
    assert cli("limit", "offline:ecko").stderr == ""


async def held(prompt: str) -> str:
    """Answer without a word about what it cost."""
    return prompt


@pytest.mark.slow
def test_a_cost_that_nobody_knows_cannot_be_limited(cli: Cli) -> None:
    """A budget without a price is refused before a call, and nothing is set; with a price it holds."""
    with serve() as url:
        cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-of-this-test"}
        (cli.folder / "in.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
        cli("enqueue", "in.txt", "--model", "openai-chat:house-model")
        refused = [
            cli("worker", "--max-cost", "1", check=False),
            cli("worker", "--run", "in", "--max-cost", "1", check=False),
            cli("resume", "in", "--max-cost", "1", check=False),
        ]
        assert [done.returncode for done in refused] == [1, 2, 2]
        for done in refused:
            assert "no price is known for openai-chat:house-model, which the price table does not have" in done.stderr
            assert "--price in=…,out=…" in done.stderr
        found = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
        assert (found["pending"], found["max_cost_usd"]) == (3, None)
        assert verdict(url)["calls"] == 0
        cli("enqueue", "in.txt", "--model", "openai-chat:house-model", "--price", "in=1,out=1")
        cli("worker", "--max-cost", "1")
        found = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
        assert (found["done"], found["max_cost_usd"]) == (3, 1.0)
        assert "may cost $1.00" in cli("status", "in").stdout


async def test_a_function_that_reports_no_cost_is_called_once(db_url: str) -> None:
    """Nothing would hold its run back under a budget, so the run pauses after the first call."""
    await lbr.enqueue(["one", "two", "three"], run="f", function=held, db_url=db_url)
    report = await lbr.work(run="f", functions=[held], max_cost=1, db_url=db_url)
    assert (report.done, report.paused["f"].cause) == (1, PauseCause.UNPRICED)
    await lbr.resume("f", max_cost=math.inf, db_url=db_url)
    assert (await lbr.work(run="f", functions=[held], db_url=db_url)).done == 2


def counted_limits(cli: Cli) -> tuple[Any, ...]:
    """Return what was learned of the one model: calls at a time, the share refused, and until when all wait."""
    [found] = cli.query("SELECT slots, refused, cooldown_until FROM limits")
    return tuple(found)


@pytest.mark.slow
def test_a_few_refusals_at_random_cut_nothing(cli: Cli) -> None:
    """Of 400 calls 3 % are refused: two workers keep all their slots, wait for no other's refusal, and obey each wait."""
    with serve("--error-rate", "429=0.03", "--latency-ms", "100") as url:
        provided(cli, url, 400)
        started = [cli.start("worker", "--concurrency", "16") for _ in range(2)]
        finished(started)
        seen = verdict(url)
    assert [worker.returncode for worker in started] == [0, 0]
    assert seen["passed"], seen
    assert seen["faults_injected"] > 0
    assert cli.status("in")["done"] == 400
    slots, refused, cooldown_until = counted_limits(cli)
    assert slots >= 32
    assert 0 < refused < 0.2
    assert cooldown_until == 0


@pytest.mark.slow
def test_four_workers_learn_a_quota(cli: Cli) -> None:
    """A server that takes few requests a minute is waited for by all: it refuses little, and each wait is obeyed."""
    with serve("--rpm", "60") as url:
        provided(cli, url, 75)
        started = [cli.start("worker", "--concurrency", "8") for _ in range(4)]
        finished(started)
        seen = verdict(url)
    assert [worker.returncode for worker in started] == [0] * 4
    assert seen["passed"], seen
    assert seen["calls"] == 75
    assert 0 < seen["faults_injected"] < 200
    slots, *_ = counted_limits(cli)
    assert slots < 32


@pytest.mark.slow
def test_workers_use_the_tokens_of_a_minute(cli: Cli) -> None:
    """Four workers use at least nine tenths of the tokens, though each call is debited five times what it takes."""
    with serve("--latency-ms", "100") as url:
        provided(cli, url, 1)
        (cli.folder / "in.txt").write_text("".join(f"{n:0100}\n" for n in range(60)))
        cli("enqueue", "in.txt", "--run", "r", "--model", "openai-chat:gpt-4o-mini")
        finished([cli.start("worker", "--run", "r", "--tpm", "12000", "--concurrency", "8") for _ in range(4)])
    ended = "FROM jobs JOIN results ON results.job_id = jobs.id WHERE run_id = 2"
    [(tokens, begun, first, last)] = cli.query(
        "SELECT sum(input_tokens + output_tokens), min(finished_at - latency_ms), min(finished_at), "
        f"max(finished_at) {ended}"
    )
    assert cli.status("r")["done"] == 60
    assert int(tokens) * 59 / 60 >= 0.9 * 12_000 * (last - first) / 60_000
    allowed = 12_000 * (last - begun) / 60_000
    # What the bucket holds at first, and the call that overdraws it last.
    assert int(tokens) <= allowed + 200 + 300


@pytest.mark.slow
def test_four_workers_pass_a_budget_by_one_call_at_most(cli: Cli) -> None:
    """Dear calls after cheap ones: with max_tokens set, what is in flight is covered by what is left."""
    with serve("--latency-ms", "50") as url:
        provided(cli, url, 1)
        cheap = "".join(f"{n}\n" for n in range(100))
        (cli.folder / "in.txt").write_text(cheap + "".join(f"{n:02000}\n" for n in range(200)))
        flags = ("--price", "in=1,out=1000", "--set", "max_tokens=100")
        cli("enqueue", "in.txt", "--run", "r", "--model", "openai-chat:gpt-4o-mini", *flags)
        limited = ("worker", "--run", "r", "--max-cost", "2", "--concurrency", "16")
        told = finished([cli.start(*limited) for _ in range(4)])
    found = json.loads(cli("status", "r", "--json").stdout)["runs"][0]
    [(dearest,)] = cli.query("SELECT max(cost_nanos) FROM results")
    assert dearest > 20_000_000
    assert 1.9 < found["cost_usd"] <= 2 + dearest / 1e9
    assert found["state"] == "paused", told
    assert "nothing bounds" not in "".join(told)


@pytest.mark.slow
def test_a_killed_worker_leaves_an_estimate(cli: Cli) -> None:
    """What its calls probably cost counts, and `status` and `show` report it as an estimate."""
    (cli.folder / "in.txt").write_text("".join(f"prompt {n}\n" for n in range(12)))
    flags = ("--price", "in=1,out=1", "--set", "latency=0.4")
    cli("enqueue", "in.txt", "--model", "offline:echo", *flags)
    holder = cli.start("worker", "--concurrency", "4", "--lease", "3")
    cli.wait_for("in", "done", 4)
    cli.wait_for("in", "inflight", 4)
    holder.kill()
    holder.communicate()
    told = cli("worker", "--max-cost", "1").stderr
    assert "nothing bounds what a call may cost" in told
    found = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
    assert found["done"] == 12
    assert found["crashed"] in range(1, 5)
    assert found["wasted_usd"] == found["estimated_usd"] > 0
    assert "of it estimated, for calls that died with their worker" in cli("status", "in").stdout
    [(idx,)] = cli.query(
        "SELECT min(idx) FROM items JOIN attempts ON attempts.job_id = items.job_id WHERE what = 'crashed'"
    )
    assert ", estimated" in cli("show", "in", str(idx)).stdout


@pytest.mark.slow
def test_a_wait_of_hours_is_reported_at_once(cli: Cli) -> None:
    """One line says for how long and until when, however many calls are refused."""
    with Scripted(429, '{"error": {"message": "quota"}}', {"Retry-After": "7200"}) as server:
        provided(cli, server.url, 6)
        worker = cli.start("worker", "--concurrency", "6")
        cli.wait_for("in", "try:rate_limited", 6)
        worker.terminate()
        _, told = worker.communicate(timeout=60)
    lines = [line for line in told.splitlines() if "asks to wait for 2:00:00" in line]
    assert len(lines) == 1, told
    assert ", until 20" in lines[0]
    assert "tried again after 0:10:00" in lines[0]


LONG_LIMITED = Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=10.0)


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_rate_limit_cools_every_run_of_the_answerer(database: Database, clock: Clock) -> None:
    """After a 429 for most calls no job of that model is claimed until the wait is over, and no attempt is charged."""
    other = Task(function="m:f")
    run, same, free = (
        await put(database, ["a", "a2", "a3", "b"], name="1"),
        await put(database, ["c"], name="2"),
        await put(database, ["d"], name="3", task=other),
    )
    queue, worker, second = await two_workers(database)
    await database.write(limits.set_limits, "offline:echo", {"concurrency": 9})
    refused = [failed(claim, LONG_LIMITED) for claim in await queue.claim(worker, [run.id], 3, lease=60)]
    settlement = refused[0]
    await database.write(settle, refused)
    everything = [run.id, same.id, free.id]
    assert [c.prompt.text for c in await queue.claim(second, everything, 9, lease=60)] == ["d"]
    view = await database.read(reads.overview)
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
    settlement = failed(claims[0], LONG_LIMITED)
    await database.write(settle, [settlement, *(answered(claim) for claim in claims[1:])])
    view = await database.read(reads.overview)
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
    await database.write(settle, [failed(claim, LONG_LIMITED) for claim in refused])
    clock.forward(-2 * 86_400)
    assert (await database.read(reads.overview)).cooldowns == []
    (claim,) = await queue.claim(worker, [run.id], 1, lease=60)
    settlement = failed(claim, LONG_LIMITED)
    await database.write(settle, [settlement])
    (cooldown,) = (await database.read(reads.overview)).cooldowns
    assert cooldown.seconds == settlement.wait_ms / 1000
    assert await queue.claim(worker, [run.id], 1, lease=60) == []


async def test_a_refusal_that_fails_its_job_cools_the_others(database: Database, clock: Clock) -> None:
    """Where the patience with a job's refusals is over it fails, and still nobody calls before the wait is over."""
    hasty = RetryPolicy(max_attempts=1, limited_patience=5)
    run, same = await put(database, ["a", "a2", "a3"], name="1"), await put(database, ["b"], name="2")
    queue, worker, second = await two_workers(database)
    for _ in range(2):
        refused = await queue.claim(worker, [run.id], 3, lease=60)
        settlement, *others = [failed(claim, LONG_LIMITED, hasty) for claim in refused]
        await database.write(settle, [settlement, *others])
        assert await queue.claim(second, [same.id], 1, lease=60) == []
        clock.forward(settlement.wait_ms / 1000)
    assert (settlement.state, settlement.charge) == (JobState.FAILED, 1)
    assert len(await queue.claim(second, [same.id], 1, lease=60)) == 1
    await assert_counted(database, run)
