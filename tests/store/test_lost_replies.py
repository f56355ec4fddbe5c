"""Commits on PostgreSQL whose reply is lost: whatever became of them, everything is done once and counted once."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr import Gravity, Permanent
from tests.support import Cli, eventually, postgres
from tests.support.proxy import Lost, Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lbr import RunStatus, Worker, WorkReport

pytestmark = pytest.mark.slow

LOST: tuple[Lost, ...] = ("reply", "commit", "late")
WRITTEN: tuple[Lost, ...] = ("reply", "late")

# A statement of each transaction whose commit is lost. A test fails if none was sent.
CLAIM = r"UPDATE lbr\.jobs SET .*claim_seq=\(lbr\.jobs\.claim_seq \+"
ANSWERS = r"INSERT INTO lbr\.results"
FAILURES = r"INSERT INTO lbr\.attempts"
NEW_RUN = r"INSERT INTO lbr\.runs"
INPUTS = r"INSERT INTO lbr\.items"
SEAL = r"UPDATE lbr\.runs SET .*sealed_at="

LEASE = 3.0
"""Seconds; a worker renews its leases three times as often."""


class Log:
    """What `answer` was called for, and how it behaves: it fails for a prompt once if `error` is set."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.running = 0
        self.most_running = 0
        self.error: Exception | None = None
        self.seconds = 0.0


log = Log()


async def answer(prompt: str) -> str:
    """Answer in capitals."""
    log.calls[prompt] += 1
    log.running += 1
    log.most_running = max(log.most_running, log.running)
    await asyncio.sleep(log.seconds)
    log.running -= 1
    if log.error is not None and log.calls[prompt] == 1:
        raise log.error
    return prompt.upper()


class Far:
    """A queue beyond a network that loses commits, with a run `r` that `answer` serves."""

    def __init__(self, proxy: Proxy, outside: Cli) -> None:
        self.proxy = proxy
        self.query = outside.query
        self.prompts: list[str] = []

    async def enqueue(self, *prompts: str, **options: Any) -> lbr.EnqueueReport:
        """Put prompts into the run."""
        self.prompts += prompts
        return await lbr.enqueue(prompts, run="r", function=answer, db_url=self.proxy.url, **options)

    async def work(self, **options: Any) -> WorkReport:
        """Be a worker until the run is done."""
        options = {"lease": LEASE, "concurrency": 8} | options
        async with asyncio.timeout(50):
            return await lbr.work(run="r", functions=[answer], db_url=self.proxy.url, **options)

    async def status(self) -> RunStatus:
        """Return the run's numbers, after a check that they agree with a recount and that no lease is left."""
        findings = {one.check: one.gravity for one in await lbr.doctor(db_url=self.proxy.server_url)}
        assert (findings["counters"], findings["leases"]) == (Gravity.OK, Gravity.OK)
        [run] = (await lbr.status("r", db_url=self.proxy.server_url)).runs
        return run

    async def assert_done(self, report: WorkReport, *, calls: int = 1) -> None:
        """Check that a commit was lost, and that each input was called for, answered and counted once."""
        assert self.proxy.unlost == []
        distinct = len(set(self.prompts))
        assert log.calls == Counter(dict.fromkeys(self.prompts, calls))
        assert (report.done, report.failed, report.stale, report.reclaimed) == (distinct, 0, 0, 0)
        run = await self.status()
        assert (run.inputs, run.jobs, run.done) == (len(self.prompts), distinct, distinct)
        assert (run.pending, run.inflight, run.stale, run.crashed) == (0, 0, 0, 0)
        rows = self.query(
            "SELECT prompts.body, results.text FROM items JOIN prompts ON prompts.job_id = items.job_id "
            "LEFT JOIN results ON results.job_id = items.job_id ORDER BY items.idx"
        )
        assert rows == [(prompt, prompt.upper()) for prompt in self.prompts]
        assert self.query("SELECT count(*) FROM results") == [(distinct,)]
        assert self.query("SELECT DISTINCT crashes FROM jobs") == [(0,)]


@pytest.fixture
def far(new_queue: Callable[[], str], tmp_path: Path) -> Iterator[Far]:
    """Return an empty queue."""
    vars(log).update(vars(Log()))
    with Proxy(postgres.over_tcp(new_queue())) as proxy:
        outside = Cli(tmp_path, db_url=proxy.server_url)
        yield Far(proxy, outside)
        outside.stop_all()


@pytest.mark.parametrize("lost", LOST)
async def test_answers_are_written_and_charged_once(far: Far, lost: Lost) -> None:
    """A settlement whose commit took place is not taken for one that came too late, nor is anything called again."""
    await far.enqueue(*(f"p{n}" for n in range(5)))
    far.proxy.lose(lost, ANSWERS)
    await far.assert_done(await far.work())
    assert far.query("SELECT DISTINCT attempts, claim_seq FROM jobs") == [(1, 1)]
    assert far.query("SELECT count(*) FROM attempts") == [(0,)]


@pytest.mark.parametrize("lost", LOST)
async def test_a_failure_is_charged_and_recorded_once(far: Far, lost: Lost) -> None:
    """A failed try costs one attempt, and the job is tried again."""
    log.error = ConnectionError("the line went dead")
    await far.enqueue("a", "b")
    far.proxy.lose(lost, FAILURES)
    report = await far.work()
    await far.assert_done(report, calls=2)
    assert report.retried == 2
    assert far.query("SELECT DISTINCT attempts, claim_seq FROM jobs") == [(2, 2)]
    recorded = far.query("SELECT job_id, claim_seq, what, family FROM attempts ORDER BY 1")
    assert recorded == [(1, 1, "retried", "transient"), (2, 1, "retried", "transient")]
    assert (await far.status()).errors == {"transient": 2}


@pytest.mark.parametrize("lost", WRITTEN)
async def test_the_end_of_a_job_that_fails_is_counted_once(far: Far, lost: Lost) -> None:
    """A job that no further try can help is failed once."""
    log.error = Permanent("no")
    await far.enqueue("a", "b")
    far.proxy.lose(lost, FAILURES)
    report = await far.work()
    assert far.proxy.unlost == []
    assert (report.done, report.failed, report.retried, report.stale) == (0, 2, 0, 0)
    run = await far.status()
    assert (run.failed, run.stale, run.errors) == (2, 0, {"permanent": 2})
    assert far.query("SELECT job_id, what FROM attempts ORDER BY 1") == [(1, "failed"), (2, "failed")]
    assert far.query("SELECT DISTINCT attempts FROM jobs") == [(1,)]


@pytest.mark.parametrize("lost", LOST)
async def test_claimed_jobs_are_answered_long_before_their_lease_ends(far: Far, lost: Lost) -> None:
    """Whether the worker learns what it holds or gives it back, no crash is charged and no call is made twice."""
    await far.enqueue(*(f"p{n}" for n in range(20)))
    far.proxy.lose(lost, CLAIM)
    await far.assert_done(await far.work())
    assert far.query("SELECT DISTINCT attempts FROM jobs") == [(1,)]


@pytest.mark.parametrize("lost", WRITTEN)
@pytest.mark.parametrize(("limit", "count"), [({"rpm": 1}, 1), ({"concurrency": 2}, 6)])
async def test_a_lost_claim_uses_up_no_limit(far: Far, lost: Lost, limit: dict[str, int | None], count: int) -> None:
    """A call that was not made takes none of the calls a minute, the next of which would come a minute later."""
    await far.enqueue(*(f"p{n}" for n in range(count)))
    await lbr.limit((await far.status()).answerer, limit, db_url=far.proxy.url)
    far.proxy.lose(lost, CLAIM)
    await far.assert_done(await far.work())
    assert log.most_running <= 2
    [found] = await lbr.limit((await far.status()).answerer, db_url=far.proxy.url)
    assert found["inflight"] == 0


@pytest.mark.parametrize("lost", WRITTEN)
async def test_a_lost_claim_of_a_suspect_is_no_crash(far: Far, lost: Lost) -> None:
    """A job that has crashed its workers twice would fail at a third crash."""
    await far.enqueue("a", "b")
    far.query("UPDATE jobs SET crashes = 2 WHERE id = 1 RETURNING id")
    far.proxy.lose(lost, CLAIM)
    report = await far.work()
    far.query("UPDATE jobs SET crashes = 0 WHERE crashes = 2 RETURNING id")
    await far.assert_done(report)


@pytest.mark.parametrize("end", ["drained", "empty"])
async def test_a_worker_that_ends_leaves_no_lost_claim_behind(far: Far, end: str) -> None:
    """Asked to stop, or with nothing left to claim, it gives back what it may hold without knowing."""
    await far.enqueue(*(f"p{n}" for n in range(4)))
    far.proxy.lose("reply", CLAIM)
    started: list[Worker] = []
    until = "empty" if end == "empty" else "done"
    working = asyncio.create_task(far.work(until=until, on_start=started.append))
    await eventually(lambda: not far.proxy.unlost)
    if end == "drained":
        started[0].drain()
    report = await working
    run = await far.status()
    assert (run.inflight, run.crashed, run.done + run.pending, run.done) == (0, 0, 4, report.done)
    await far.work()
    assert log.calls == Counter(dict.fromkeys(far.prompts, 1))
    assert (await far.status()).done == 4


@pytest.mark.slow
@pytest.mark.parametrize("lost", WRITTEN)
async def test_a_lost_claim_with_the_usual_lease_is_answered_before_it_ends(far: Far, lost: Lost) -> None:
    """With the lease of a minute, its jobs are answered once no reply can come any more, after half of that time."""
    await far.enqueue(*(f"p{n}" for n in range(20)))
    far.proxy.lose(lost, CLAIM)
    report = await far.work(lease=60.0)
    await far.assert_done(report)


@pytest.mark.slow
async def test_slow_replies_are_not_taken_for_lost(far: Far) -> None:
    """Claims whose reply is on its way while leases are renewed are not given back: each job is claimed once."""
    log.seconds = 0.1
    await far.enqueue(*(f"p{n}" for n in range(200)))
    far.proxy.delay = 0.02
    await far.assert_done(await far.work(lease=1.5, concurrency=16))
    assert far.query("SELECT DISTINCT attempts, claim_seq FROM jobs") == [(1, 1)]


@pytest.mark.slow
async def test_many_lost_commits_of_one_run(far: Far) -> None:
    """Claims, answers and failures that are lost one after the other, in every way, change nothing in the end."""
    log.error, log.seconds = ConnectionError("the line went dead"), 0.05
    await far.enqueue(*(f"p{n}" for n in range(100)))
    for _ in range(3):
        for lost in LOST:
            for statement in (CLAIM, ANSWERS, FAILURES):
                far.proxy.lose(lost, statement)
    await far.assert_done(await far.work(lease=6.0), calls=2)
    assert far.query("SELECT DISTINCT attempts FROM jobs") == [(2,)]
    assert far.query("SELECT count(*), count(DISTINCT (job_id, claim_seq)) FROM attempts") == [(100, 100)]


@pytest.mark.parametrize("lost", WRITTEN)
@pytest.mark.parametrize("statement", [NEW_RUN, INPUTS, SEAL])
async def test_an_enqueue_puts_each_input_once(far: Far, lost: Lost, statement: str) -> None:
    """Whichever of its commits is lost, the run holds every input in order, and is sealed."""
    far.proxy.lose(lost, statement)
    report = await far.enqueue("a", "b", "a", "c")
    assert (report.counts.inputs, far.proxy.unlost) == (4, [])
    run = await far.status()
    assert (run.sealed, run.inputs, run.jobs, run.duplicates, run.pending) == (True, 4, 3, 1, 3)
    await far.assert_done(await far.work())


@pytest.mark.parametrize("lost", LOST)
async def test_an_append_puts_each_input_once(far: Far, lost: Lost) -> None:
    """What goes behind the inputs of a run is there once, although it may equal what the run holds already."""
    await far.enqueue("a", "b")
    far.proxy.lose(lost, INPUTS)
    await far.enqueue("a", "c", "c", append=True)
    assert far.proxy.unlost == []
    await far.assert_done(await far.work())
