"""Who is dead is known by a kernel lock on SQLite: real processes are killed, stopped and forked."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lbr.core.types import (
    JobState,
    RunId,
    WorkerId,
)
from lbr.store import files, leases, reads
from lbr.store.database import open_database
from lbr.store.leases import LOST_MS, RECLAIM_PAGE, Presence
from lbr.store.settle import settle
from lbr.worker.kept_answers import keep, reclaim
from tests.support import ROOT, Clock, Queue, answered, assert_counted, job_row, put, states

if TYPE_CHECKING:
    from lbr.store.database import Database
    from tests.support import Cli

HOUR = 3600.0
NOTES = """
import asyncio, os

async def slow(prompt):
    with open("calls.log", "ab", buffering=0) as file:
        file.write(f"{prompt}\\n".encode())
    await asyncio.sleep(60 if os.environ.get("WHO") == "first" else 0)
    return prompt

async def forking(prompt):
    import time
    if os.environ.get("WHO") == "first" and os.fork() == 0:
        # Outlives its parent, with all that it inherited.
        with open("children", "ab", buffering=0) as file:
            file.write(f"{os.getpid()}\\n".encode())
        time.sleep(60)
        os._exit(0)
    return await slow(prompt)
"""


on_a_file = pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
"""Only beside a file are there locks that show who is dead."""


def begin(cli: Cli, function: str = "answers:slow") -> subprocess.Popen[str]:
    """Enqueue five inputs, and start a worker that is in the middle of all of them, with leases of an hour."""
    (cli.folder / "answers.py").write_text(textwrap.dedent(NOTES))
    (cli.folder / "in.txt").write_text("a\nb\nc\nd\ne\n")
    cli("enqueue", "in.txt", "--function", function)
    cli.environment["WHO"] = "first"
    worker = cli.start("worker", "--function", function, "--lease", str(HOUR))
    deadline = time.monotonic() + 60
    while len(calls(cli)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cli.environment["WHO"] = "second"
    return worker


def calls(cli: Cli) -> list[str]:
    """Return the prompts that were called for, in order."""
    log = cli.folder / "calls.log"
    return log.read_text().split() if log.exists() else []


@pytest.mark.slow
@on_a_file
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["starts", "works"])
def test_a_killed_workers_jobs_are_taken_back_long_before_its_lease_ends(cli: Cli, kind: str) -> None:
    """By one that starts after the kill, and by one that was there before; each call is repeated once."""
    worker = begin(cli)
    other = cli.start("worker", "--function", "answers:slow", "--until", "done") if kind == "works" else None
    if other is not None:
        deadline = time.monotonic() + 60
        while cli.query("SELECT count(*) FROM workers") != [(2,)]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    worker.kill()
    worker.communicate()
    if other is None:
        other = cli.start("worker", "--function", "answers:slow")
    _, told = other.communicate(timeout=60)
    assert other.returncode == 0, told
    assert "reclaimed 5 jobs of worker 1, which died" in told
    assert [row["result"] for row in cli.collect("in")] == ["a", "b", "c", "d", "e"]
    assert sorted(calls(cli)) == sorted([*"abcde", *"abcde"])
    assert cli.query("SELECT count(*) FROM workers") == [(0,)]
    assert list(cli.folder.glob("*.worker-*.lock")) == []


@on_a_file
@pytest.mark.processes
def test_a_stopped_worker_is_not_taken_for_dead(cli: Cli) -> None:
    """One that the kernel has stopped lives; its lease goes on, and its answers are taken when it wakes."""
    worker = begin(cli)
    worker.send_signal(signal.SIGSTOP)
    done = cli("worker", "--function", "answers:slow", "--until", "empty")
    assert "reclaimed" not in done.stderr
    assert len(calls(cli)) == 5
    worker.kill()
    worker.communicate(timeout=60)


@on_a_file
@pytest.mark.processes
def test_a_forked_child_does_not_live_on_as_the_worker(cli: Cli) -> None:
    """A child that a function forked, and that outlives the killed worker, keeps nobody from its jobs."""
    worker = begin(cli, "answers:forking")
    try:
        worker.kill()
        worker.wait()
        done = cli("worker", "--function", "answers:forking")
        assert "which died" in done.stderr
    finally:
        for child in (cli.folder / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


async def reclaim_once(database: Database) -> tuple[int, int]:
    """Take back what dead workers left, as a running worker does."""
    return await reclaim(database, lambda _: None)


def dead_worker(db_url: str, jobs: int) -> WorkerId:
    """Return a worker that claimed so many jobs for an hour, and whose process has ended by a kill."""
    script = f"""
    import asyncio, os, signal
    from lbr.core.types import RunId
    from lbr.store.database import open_database
    from tests.support import Queue

    async def main():
        queue = Queue(await open_database({db_url!r}))
        worker = await queue.register(host="h", pid=os.getpid(), concurrency=5)
        assert len(await queue.claim(worker, [RunId(1)], {jobs}, lease=3600)) == {jobs}
        print(worker, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    assert found.returncode == -signal.SIGKILL, found.stderr
    return WorkerId(int(found.stdout))


@on_a_file
async def test_each_job_of_the_dead_is_charged_one_crash(db_url: str) -> None:
    """Also where two look, and where there are more than a page."""
    count = RECLAIM_PAGE + 7
    database = await open_database(db_url, create=True)
    run = await put(database, [f"p{n}" for n in range(count)])
    dead_workers = await asyncio.to_thread(dead_worker, db_url, count)
    other = await open_database(db_url)
    assert database.presence.dead_workers([dead_workers]) == [dead_workers]
    outlook = await Queue(database).check_due([RunId(1)])
    assert outlook.expired
    taken = [await reclaim_once(one) for one in (database, other)]
    assert sum(reclaimed for reclaimed, _ in taken) == count
    await assert_counted(database, run)
    claims = await Queue(database).claim(WorkerId(99), [RunId(1)], count, lease=HOUR)
    assert {claim.crashes for claim in claims} == {1}
    assert not (await Queue(database).check_due([RunId(1)])).expired
    assert list(Path(database.name).parent.glob("*.worker-*.lock")) == []
    await other.close()
    await database.close()


@on_a_file
async def test_kept_answers_of_the_dead_are_not_called_for_again(database: Database, db_url: str) -> None:
    """A worker that finds another one dead first settles the answers that it kept."""
    await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=os.getpid(), concurrency=2)
    claims = await queue.claim(worker, [RunId(1)], 2, lease=HOUR)
    keep(database, [answered(claims[0], "paid for")])
    queue.leave(worker)
    other = await open_database(db_url)
    assert await reclaim_once(other) == (1, 0)
    (again,) = await Queue(other).claim(WorkerId(99), [RunId(1)], 2, lease=HOUR)
    assert again.job_id == claims[1].job_id
    await other.close()


@on_a_file
@pytest.mark.parametrize("what", ["unreadable", "rubbish"])
async def test_kept_answers_that_cannot_be_read_hold_jobs_back_if_that_may_pass(
    database: Database, db_url: str, what: str
) -> None:
    """A file of nonsense holds back no job of a dead worker; one that cannot be opened leaves its jobs to the leases."""
    await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=os.getpid(), concurrency=2)
    claims = await queue.claim(worker, [RunId(1)], 2, lease=HOUR)
    path = keep(database, [answered(claims[0], "paid for")])
    words = path.read_text()
    queue.leave(worker)
    other = await open_database(db_url)
    path.unlink()
    if what == "rubbish":
        path.write_text("{}\n")
    else:
        path.mkdir()
        assert await reclaim_once(other) == (0, 0)
        path.rmdir()
    assert await reclaim_once(other) == (2, 0)
    assert not (await Queue(other).check_due([RunId(1)])).expired
    if what == "rubbish":
        path.write_text(words)
        assert await reclaim(other, lambda _: None, starting=True) == (0, 0)
        assert await states(other, await other.read(reads.find_run, "r")) == {"done": 1, "pending": 1}
    await other.close()


async def test_only_a_free_lock_says_that_a_worker_is_dead(tmp_path: Path) -> None:
    """No file, an empty one, a link and a held one say nothing; nor does another worker of the same process."""
    database = tmp_path / "queue.db"
    ours, theirs = Presence(database), Presence(database)
    ours.appear(WorkerId(1))
    path = files.lock_path(database, "worker-1")
    assert path.stat().st_mode & 0o777 == 0o600
    files.lock_path(database, "worker-2").touch()
    files.lock_path(database, "worker-3").symlink_to(path)
    everybody = [WorkerId(n) for n in range(5)]
    for presence in (ours, theirs):
        assert presence.dead_workers(everybody) == []
    ours.leave(WorkerId(1))
    ours.leave(WorkerId(1))
    assert theirs.dead_workers(everybody) == [1]
    theirs.forget(everybody)
    assert list(tmp_path.iterdir()) == []


async def test_a_lock_left_from_another_database_is_taken_over(tmp_path: Path) -> None:
    """Where an older copy was put back, numbers of workers come again, and with them their files."""
    database = tmp_path / "queue.db"
    files.lock_path(database, "worker-1").write_text("4711\n")
    ours, theirs = Presence(database), Presence(database)
    assert theirs.dead_workers([WorkerId(1)]) == [1]
    ours.appear(WorkerId(1))
    assert theirs.dead_workers([WorkerId(1)]) == []
    # One that somebody else holds says nothing about us.
    third = Presence(database)
    third.appear(WorkerId(1))
    ours.leave(WorkerId(1))
    assert theirs.dead_workers([WorkerId(1)]) == []


async def test_locks_of_a_network_file_system_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Insisting on one leaves the leases to decide: another machine may see a held lock as free."""
    monkeypatch.setattr(files, "file_system", lambda _: "nfs4")
    database = await open_database(str(tmp_path / "q.db"), create=True, allow_network_fs=True)
    await put(database, ["a"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=1)
    await queue.claim(worker, [RunId(1)], 1, lease=HOUR)
    queue.leave(worker)
    assert not database.presence.knows
    assert await queue.reclaim() == []
    assert list(tmp_path.glob("*.worker-*.lock")) == []
    await database.close()


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_renewed_lease_is_not_reclaimed(database: Database, clock: Clock) -> None:
    """A lease holds as long as it is renewed; the holder of a lost one is told."""
    run = await put(database, ["a", "b"])
    queue, worker, other = await two_workers(database)
    kept, silent = [await queue.claim(one, [run.id], 1, lease=60) for one in (worker, other)]
    clock.forward(50)
    assert await queue.renew(worker, kept, lease=60, settled=0, rate=0.0) == set()
    clock.forward(20)
    assert [one.job_id for one in await queue.reclaim()] == [silent[0].job_id]
    (again,) = await queue.claim(worker, [run.id], 5, lease=60)
    assert again.job_id == silent[0].job_id
    assert await queue.renew(other, silent, lease=60, settled=0, rate=0.0) == {silent[0].job_id}


async def test_claims_whose_reply_was_lost_go_back(database: Database, clock: Clock) -> None:
    """Jobs that are a worker's without its knowing are pending again when no reply can be on its way any more."""
    run = await put(database, ["a", "b", "c"])
    queue, worker, other = await two_workers(database)
    (held,) = await queue.claim(worker, [run.id], 1, lease=90)
    (lost,) = await queue.claim(worker, [run.id], 1, lease=90)
    (of_other,) = await queue.claim(other, [run.id], 1, lease=90)
    clock.forward(LOST_MS / 1000 - 1)
    assert await queue.renew(worker, [held], lease=90, settled=0, rate=0.0) == set()
    assert await states(database, run) == {"inflight": 3}
    clock.forward(2)
    assert await queue.renew(worker, [held], lease=90, settled=0, rate=0.0) == set()
    assert await states(database, run) == {"inflight": 2, "pending": 1}
    row = await job_row(database, lost.job_id)
    assert (row.state, row.attempts, row.crashes, row.worker_id) == ("pending", 0, 0, None)
    await assert_counted(database, run)
    # One that holds nothing renews, too.
    clock.forward(20)
    assert await queue.renew(other, [], lease=90, settled=0, rate=0.0) == set()
    assert (await job_row(database, of_other.job_id)).state == "pending"
    assert [claim.job_id for claim in await queue.claim(other, [run.id], 5, lease=90)] == [lost.job_id, of_other.job_id]
    await assert_counted(database, run)


async def test_a_short_lease_gives_lost_claims_back_before_it_ends(database: Database, clock: Clock) -> None:
    """They would be charged a crash if others had to reclaim them."""
    run = await put(database, ["a"])
    queue, worker, _ = await two_workers(database)
    await queue.claim(worker, [run.id], 1, lease=10)
    clock.forward(6)
    await queue.renew(worker, [], lease=10, settled=0, rate=0.0)
    assert await states(database, run) == {"pending": 1}


async def test_a_renewal_that_is_repeated_releases_no_later_claim(database: Database, clock: Clock) -> None:
    """What was claimed after the worker last knew all that it holds is not taken for lost."""
    run = await put(database, ["a"])
    worker = await Queue(database).register(host="h", pid=1, concurrency=1)
    await Queue(database).claim(worker, [run.id], 1, lease=60)
    clock.forward(LOST_MS / 1000 + 1)
    for seconds, state in ((30, "inflight"), (0, "pending")):
        seen = time.monotonic() - seconds
        await database.write(leases.renew, worker, [], lease=60.0, settled=0, rate=0.0, seen=seen)
        assert await states(database, run) == {state: 1}


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
    assert (await database.write(settle, [answered(claim)])).taken == {claim.job_id}
    await assert_counted(database, run)


async def test_a_worker_that_ends_gives_back_what_it_does_not_know_of(database: Database) -> None:
    """A job of a claim whose reply was lost is in flight for nobody: its worker ends, and it is pending, uncharged."""
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    claims = await queue.claim(worker, [run.id], 2, lease=3600)
    await queue.release(worker, claims[:1])
    await queue.unregister(worker)
    assert (await database.read(reads.overview)).workers == []
    assert await states(database, run) == {"pending": 2}
    row = await job_row(database, claims[1].job_id)
    assert (row.attempts, row.crashes, row.claim_seq) == (0, 0, 1)
    await assert_counted(database, run)


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
    await database.write(settle, [answered(beside[0])])
    clock.forward(61)
    (dead_workers,) = await queue.reclaim()
    assert dead_workers.state is JobState.FAILED
    story = await database.read(reads.story, run, 0)
    assert (story.row.status, story.row.error) == ("failed", "its worker died 3 times")
    assert story.attempts == 0
    await assert_counted(database, run)
