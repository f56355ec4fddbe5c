"""Redoing what a person chooses: what was paid for stays, nothing is counted twice, and whatever stops it, it goes on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, field_validator
from sqlalchemy import func, select

import lbr
from lbr.core.errors import (
    Family,
    Usage,
    UsageError,
)
from lbr.core.pricing import table_price
from lbr.core.types import (
    Failure,
    JobState,
    Outcome,
    Reply,
    Run,
    RunState,
    Settlement,
    Shape,
    WorkerId,
)
from lbr.store import counters, reads, redo, runs
from lbr.store.database import open_database
from lbr.store.schema import attempts, jobs, prompts, results
from lbr.store.settle import settle
from tests.models.test_pydantic_ai import completion
from tests.support import ECHO, Cli, Clock, Queue, answered, assert_counted, failed, job_row, put, states
from tests.support.http_server import Request, Script, Scripted, Server, http, prompt_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lbr.core.types import Claim
    from lbr.store.database import Database

USAGE = Usage(10, 5, 700)
SHAPE: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FAILURES = {
    "timeout": Failure(Family.TRANSIENT, "CallTimeout", "no answer within 1 s", usage=USAGE),
    "refused": Failure(Family.PERMANENT, "BadRequest", "400: Überlänge", usage=USAGE),
    "bad": Failure(Family.BAD_ANSWER, "BadAnswer", "no field n", text='{"m": 1}', usage=USAGE),
    "cut": Failure(Family.CUT_OFF, "BadAnswer", "cut", text='{"m": 1}', usage=USAGE, finish_reason="length"),
    "none": Failure(Family.CUT_OFF, "EmptyAnswer", "cut", text='{"m": 1}', usage=USAGE, finish_reason="length"),
}


class StoppedError(Exception):
    """What ends a call half way."""


class Strict(BaseModel):
    """A number; what is taken for one is mended in a test."""

    n: int

    @field_validator("n", mode="before")
    @classmethod
    def read(cls, value: object) -> object:
        """Take what the class takes at this time."""
        return READERS[-1](value)


def plain(value: object) -> object:
    """Take what pydantic takes as a number."""
    return value


def mended(value: object) -> object:
    """Take a number in words as well."""
    return {"one": 1, "two": 2}.get(str(value), value)


READERS = [plain]


def ended(claim: Claim, reason: str = "stop") -> Settlement:
    """Return the settlement of a call that was answered, and ended for this reason."""
    reply = Reply(f"answer to {claim.prompt.text}", USAGE, "m-1", reason)
    return Settlement(claim, JobState.DONE, Outcome(reply, None, 5), charge=1)


async def settled(database: Database, names: Sequence[str], **more: Any) -> tuple[Run, dict[str, Settlement]]:
    """Return a run in which each prompt has come to the end that its name says, and how each was settled."""
    run = await put(database, names, **more)
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=4)
    claims = await queue.claim(worker, [run.id], len(names), lease=60)
    batch = {}
    for claim in claims:
        word = (claim.prompt.text or "").split()[0]
        failure = FAILURES.get(word)
        one = ended(claim, word) if failure is None else replace(failed(claim, failure), state=JobState.FAILED)
        batch[claim.prompt.text or ""] = one
    await database.write(settle, list(batch.values()))
    return run, batch


async def answers(database: Database, run: Run) -> dict[str, tuple[str, str | None]]:
    """Return status and answer of each prompt."""
    pages = reads.rows(database, run, Shape.ORIGINAL)
    return {row.prompt.text or "": (row.status, row.result) async for page in pages for row in page}


async def assert_all_counted(database: Database, run: Run) -> None:
    """Check states, tokens, cost and reused answers against the rows: what was paid for is counted, once."""
    await assert_counted(database, run)
    names = ("input_tokens", "output_tokens", "cost_nanos")
    total: Counter[str] = Counter()
    for table, own in ((results, results.c.reused_from.is_(None)), (attempts, attempts.c.id > 0)):
        query = (
            select(*(func.coalesce(func.sum(table.c[name]), 0) for name in names))
            .join_from(table, jobs, table.c.job_id == jobs.c.id)
            .where(jobs.c.run_id == run.id, own)
        )
        row = await database.read(lambda connection, _, query: connection.execute(query).one(), query)
        total.update(dict(zip(names, map(int, row), strict=True)))
    reused = (
        select(func.count())
        .select_from(results)
        .join(jobs, jobs.c.id == results.c.job_id)
        .where(jobs.c.run_id == run.id, results.c.reused_from.is_not(None))
    )
    total["reused"] = (await database.read(lambda connection, _: connection.execute(reused))).scalar_one()
    kept = (await database.read(lambda connection, _: counters.of_runs(connection, [run.id])))[run.id]
    assert {name: kept[name] for name in (*names, "reused")} == {n: total[n] for n in (*names, "reused")}


async def choose(database: Database, run: Run, *conditions: str, settings: Any = None) -> int:
    """Redo by conditions as a user writes them."""
    return await redo.retry(database, run, redo.read_conditions(conditions), settings)


@pytest.mark.parametrize(
    ("conditions", "back"),
    [
        (["finish_reason=length"], ["cut", "length 1", "length 2"]),
        (["finish_reason=length", "status=failed"], ["cut"]),
        (["family=cut_off"], ["cut"]),
        (["family=transient"], ["timeout"]),
        (["family = bad_answer"], ["bad"]),
        (["error~überLÄNGE"], ["refused"]),
        (["error~calltimeout"], ["timeout"]),
        (["error~4", "family=permanent", "status=failed"], ["refused"]),
        (["family=permanent", "error~timeout"], []),
        (["status=done"], ["length 1", "length 2", "stop"]),
        (["status=done", "finish_reason=stop"], ["stop"]),
        (["status=failed"], ["bad", "cut", "refused", "timeout"]),
        (["family=account"], []),
        (["finish_reason=Length"], []),
    ],
)
async def test_conditions_choose(database: Database, conditions: list[str], back: list[str]) -> None:
    """Only the jobs that meet every condition go back; all other answers and failures stay as they are."""
    run, _ = await settled(database, ["length 1", "stop", "timeout", "refused", "bad", "length 2", "cut"])
    before = await answers(database, run)
    assert await choose(database, run, *conditions) == len(back)
    after = await answers(database, run)
    assert sorted(text for text, (status, _) in after.items() if status == "pending") == back
    assert {text: one for text, one in after.items() if text not in back} == {
        text: one for text, one in before.items() if text not in back
    }
    await assert_all_counted(database, run)


async def test_a_redone_answer_is_kept(database: Database) -> None:
    """It leaves the results with all its job's tries given back, and stays in the history with what it took."""
    run, _ = await settled(database, ["length"])
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=4)
    assert await choose(database, run, "finish_reason=length") == 1
    story = await database.read(reads.story, run, 0)
    assert (story.row.status, story.row.result, story.attempts, story.crashes) == ("pending", None, 0, 0)
    (kept,) = story.tries
    assert (kept.what, kept.family, kept.error, kept.text) == ("retried", None, "Redone", "answer to length")
    assert "redone on request" in kept.message
    row = (await database.read(lambda connection, _: connection.execute(select(attempts)))).one()
    assert (row.input_tokens, row.output_tokens, row.cost_nanos, row.latency_ms) == (10, 5, 700, 5)
    (again,) = await queue.claim(worker, [run.id], 5, lease=60)
    assert (again.claim_seq, again.attempts, again.history.bad_answers) == (2, 0, 0)
    await database.write(settle, [ended(again)])
    assert await answers(database, run) == {"length": ("done", "answer to length")}
    counts = (await database.read(reads.overview, "r")).runs[0].counts
    assert (counts["cost_nanos"], counts["try:transient"], counts["stale"]) == (1400, 0, 0)
    assert await choose(database, run, "finish_reason=length") == 0
    await assert_all_counted(database, run)


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_repeated_settlement_of_a_redone_answer_is_not_counted(database: Database, claimed: bool) -> None:
    """A settlement that comes once more, from a kept file say, neither brings the old answer back nor costs again."""
    run, batch = await settled(database, ["length"])
    await choose(database, run, "status=done")
    if claimed:
        queue = Queue(database)
        worker = await queue.register(host="a", pid=1, concurrency=4)
        await queue.claim(worker, [run.id], 5, lease=60)
    for _ in range(2):
        told = await database.write(settle, list(batch.values()))
        assert told.taken == {s.claim.job_id for s in batch.values()}
        assert told.stale == frozenset()
    assert await states(database, run) == {"inflight" if claimed else "pending": 1}
    assert (await database.read(reads.overview, "r")).runs[0].counts["stale"] == 0
    await assert_all_counted(database, run)


async def test_a_reused_answer_is_redone_here_only(database: Database) -> None:
    """Its text stays in the history, what it cost stays with the run that paid, and that run keeps its answer."""
    first, _ = await settled(database, ["stop"], name="first")
    second = await put(database, ["stop"], name="second")
    await assert_all_counted(database, second)
    assert await choose(database, second, "finish_reason=stop") == 1
    (kept,) = (await database.read(reads.story, second, 0)).tries
    assert (kept.text, "reused from another run" in kept.message) == ("answer to stop", True)
    assert await states(database, first) == {"done": 1}
    await assert_all_counted(database, first)
    await assert_all_counted(database, second)


async def test_killed_between_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever page it stopped behind, all counts are right, and the same call does the rest."""
    monkeypatch.setattr(redo, "LOOK", 5)
    monkeypatch.setattr(redo, "PAGE", 2)
    run, _ = await settled(database, [f"length {n}" for n in range(9)] + [f"stop {n}" for n in range(9)])
    before = await answers(database, run)
    real, left = runs.move_page, 3

    def stops(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        real(*arguments)
        if left < 0:
            raise StoppedError

    monkeypatch.setattr(runs, "move_page", stops)
    with pytest.raises(StoppedError):
        await choose(database, run, "finish_reason=length", settings={"seed": 3})
    assert await states(database, run) == {"pending": 5, "done": 13}
    await assert_all_counted(database, run)
    monkeypatch.setattr(runs, "move_page", real)
    assert await choose(database, run, "finish_reason=length", settings={"seed": 3}) == 4
    after = await answers(database, run)
    assert {text: one for text, one in after.items() if text.startswith("stop")} == {
        text: one for text, one in before.items() if text.startswith("stop")
    }
    assert await states(database, run) == {"pending": 9, "done": 9}
    await assert_all_counted(database, run)


@pytest.mark.slow
def test_a_killed_retry_has_done_whole_pages(cli: Cli) -> None:
    """Every job is either answered or pending with its answer in the history, and running it again does the rest."""
    (cli.folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(4_000)))
    cli("run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo")
    retrying = cli.start("retry", "in", "--where", "finish_reason=stop")
    cli.wait_for("in", "pending", 1)
    retrying.kill()
    retrying.wait()
    by_state = Counter(dict(cli.query("SELECT state, count(*) FROM jobs GROUP BY state")))
    ((kept,),) = cli.query("SELECT count(*) FROM attempts WHERE error = 'Redone'")
    ((left,),) = cli.query("SELECT count(*) FROM results")
    assert (by_state["pending"], by_state["done"]) == (kept, left) == (4_000 - left, 4_000 - kept)
    status = cli.status("in")
    assert (status["pending"], status["done"]) == (kept, left)
    assert cli("retry", "in", "--where", "finish_reason=stop").stdout == f"run in: {left} jobs back to pending\n"
    cli("worker")
    rows = cli.collect("in")
    assert [row["result"] for row in rows] == [f"p{n}" for n in range(4_000)]
    assert cli.status("in")["input_tokens"] == 8_000


async def test_two_at_once_redo_each_job_once(database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two people who redo the same answers do the work of one, also while another run takes these answers."""
    monkeypatch.setattr(redo, "PAGE", 3)
    run, _ = await settled(database, [f"length {n}" for n in range(30)])
    other, third = await open_database(db_url), await open_database(db_url)
    put_back = asyncio.gather(choose(database, run, "finish_reason=length"), choose(other, run, "finish_reason=length"))
    copy = await put(third, [f"length {n}" for n in range(30)], name="copy")
    assert sum(await put_back) == 30
    assert await states(database, run) == {"pending": 30}
    tries = await database.read(lambda connection, _: connection.scalar(select(func.count(attempts.c.id))))
    assert tries == 30
    await assert_all_counted(database, run)
    await assert_all_counted(database, copy)
    await other.close()
    await third.close()


async def test_a_cancelled_run_is_taken_up_for_those_that_are_chosen(database: Database) -> None:
    """The run is active again; its other cancelled jobs stay so."""
    run, _ = await settled(database, ["timeout", "stop"])
    run = await put(database, ["timeout", "stop", "new"])
    await runs.cancel(database, run)
    assert await choose(database, run, "family=transient") == 1
    assert (await database.read(reads.find_run, "r")).state == "active"
    assert await states(database, run) == {"pending": 1, "done": 1, "cancelled": 1}
    assert await choose(database, run, "status=cancelled") == 1
    await assert_all_counted(database, run)


async def test_a_run_that_was_moved_is_left_alone(
    database: Database, db_url: str, clock: Clock, tmp_path: Path
) -> None:
    """No job of the copy that stays behind is redone: the run goes on elsewhere, with its settings and history."""
    run, _ = await settled(database, ["length", "stop", "bad"])
    await choose(database, run, "finish_reason=length", settings={"seed": 3})
    target = f"sqlite:///{tmp_path / 'target.db'}"
    await lbr.pause("r", db_url=db_url)
    await lbr.move("r", db_url=db_url, to_url=target)
    run = await database.read(reads.find_run, "r")
    for redoing in (choose(database, run, "status=done"), redo.reparse(database, run, str)):
        with pytest.raises(UsageError, match=r"was moved to .* name that database with --db"):
            await redoing
    there = await open_database(target, clock=clock)
    moved = await there.write(runs.resume, await there.read(reads.find_run, "r"))
    (claim,) = await _claim(there, moved)
    assert (claim.settings, claim.claim_seq) == ({"seed": 3}, 2)
    assert [t.error for t in (await there.read(reads.story, moved, 0)).tries] == ["Redone"]
    await there.close()


async def _claim(database: Database, run: Run) -> list[Claim]:
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=4)
    return await queue.claim(worker, [run.id], 5, lease=60)


@pytest.mark.parametrize(
    "texts",
    [
        ["family=unknown"],
        ["family~transient"],
        ["error=x"],
        ["error~ "],
        ["finish_reason="],
        ["status=pending"],
        ["status=inflight"],
        ["key=1"],
        ["length"],
        [""],
        ["family=transient", "nonsense"],
    ],
)
def test_an_unknown_condition_is_refused(texts: list[str]) -> None:
    """The refusal names the forms and what came."""
    with pytest.raises(UsageError, match=r"family=transient\|rate_limited\|.*error~TEXT.*got: '"):
        redo.read_conditions(texts)


@pytest.mark.parametrize(
    "texts",
    [
        ["status=cancelled", "finish_reason=length"],
        ["status=done", "error~x"],
        ["status=done", "status=failed"],
    ],
)
def test_conditions_that_exclude_each_other_are_refused(texts: list[str]) -> None:
    """Nothing could ever meet them, so somebody means something else."""
    with pytest.raises(UsageError, match="no job can meet all of these conditions: "):
        redo.read_conditions(texts)


# --- settings of a job alone ------------------------------------------------------------------------------------------


async def test_settings_are_the_jobs_own(database: Database) -> None:
    """A claim carries them, a later retry without any keeps them, a later one with some replaces them."""
    run, _ = await settled(database, ["length", "stop"])
    await choose(database, run, "finish_reason=length", settings={"seed": 3, "latency": 0})
    (claim,) = await _claim(database, run)
    assert (claim.prompt.text, claim.settings) == ("length", {"seed": 3, "latency": 0})
    assert list(claim.settings or {}) == ["seed", "latency"], "they are sent in the order in which they were given"
    await database.write(settle, [replace(failed(claim, FAILURES["refused"]), state=JobState.FAILED)])
    assert await redo.retry(database, run) == 1
    (claim,) = await _claim(database, run)
    assert claim.settings == {"seed": 3, "latency": 0}
    await database.write(settle, [ended(claim)])
    await choose(database, run, "status=done", settings={"seed": 4})
    assert [claim.settings for claim in await _claim(database, run)] == [{"seed": 4}, {"seed": 4}]


async def test_an_answer_by_other_settings_is_not_reused(database: Database) -> None:
    """Its key says what the task asks for, and that is not what was asked."""
    run, _ = await settled(database, ["length", "stop"])
    await choose(database, run, "finish_reason=length", settings={"seed": 3})
    (claim,) = await _claim(database, run)
    await database.write(settle, [ended(claim)])
    other = await put(database, ["length", "stop"], name="other")
    assert await answers(database, other) == {"length": ("pending", None), "stop": ("done", "answer to stop")}
    again = await put(database, ["length", "stop"])
    assert await states(database, again) == {"done": 2}


async def test_settings_reach_the_offline_model(db_url: str) -> None:
    """They go over the task's, which hold for all other jobs."""
    await lbr.enqueue(
        ["a", "b"], run="r", model="offline:echo", settings={"failure_rate": 1}, max_attempts=1, db_url=db_url
    )
    assert (await lbr.work(db_url=db_url)).failed == 2
    own = {"failure_rate": 0, "latency": 0.001}
    assert await lbr.retry("r", where="error~failure_rate", settings=own, db_url=db_url) == 2
    await lbr.enqueue(
        ["c"],
        run="r",
        model="offline:echo",
        settings={"failure_rate": 1},
        append=True,
        max_attempts=1,
        db_url=db_url,
    )
    report = await lbr.work(db_url=db_url)
    assert (report.done, report.failed) == (2, 1)


async def test_settings_reach_the_provider(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model serves all jobs of the run, each with its own settings; the provider's client does not retry."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    model = "openai-chat:gpt-4o-mini"
    with Scripted(body=completion("cut", finish="length")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        settings = {"max_tokens": 5, "temperature": 0.5}
        await lbr.enqueue(["a"], run="r", model=model, settings=settings, db_url=db_url)
        assert (await lbr.work(db_url=db_url)).done == 1
        assert await lbr.retry("r", where=["finish_reason=length"], settings={"max_tokens": 900}, db_url=db_url) == 1
        await lbr.enqueue(["b"], run="r", model=model, settings=settings, append=True, db_url=db_url)
        assert (await lbr.work(db_url=db_url)).done == 2
        asked = {(one["messages"][-1]["content"], one["max_tokens"], one["temperature"]) for one in server.asked}
        assert asked == {("a", 5, 0.5), ("a", 900, 0.5), ("b", 5, 0.5)}
        assert len(server.asked) == 3
    with Scripted(status=408) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        await lbr.enqueue(["x"], run="down", model=model, max_attempts=1, db_url=db_url)
        await lbr.work(db_url=db_url)
        await lbr.retry("down", settings={"max_tokens": 900}, db_url=db_url)
        await lbr.work(db_url=db_url)
        assert len(server.asked) == 2


def _by(model: str, text: str) -> str:
    return json.dumps(json.loads(completion(text)) | {"model": model})


class _Models(Server):
    """A server that refuses the prompt "x" of the first model, and whose second model asks to wait once."""

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.asked: list[tuple[str, str, Any]] = []

    def _respond(self, request: Request) -> Script:
        body = request.json()
        self.asked.append((body["model"], prompt_of(request), body.get("max_tokens")))
        if body["model"] == "gpt-4o-mini":
            return http(400, "{}") if prompt_of(request) == "x" else http(200, completion("first"))
        is_first = sum(model == "gpt-4o" for model, *_ in self.asked) == 1
        return http(429, "{}", {"retry-after": "0"}) if is_first else http(200, _by("gpt-4o", "second"))


async def test_another_model_answers(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the chosen jobs go to it, at its price; no other run gets their answers; its limits are not the run's."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with _Models() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        how: dict[str, Any] = {"model": "openai-chat:gpt-4o-mini", "price": "in=1000,out=1000", "db_url": db_url}
        await lbr.enqueue(["x", "a"], run="r", settings={"max_tokens": 9}, **how)
        assert (await lbr.work(db_url=db_url)).failed == 1
        before, other = await lbr.status(db_url=db_url), "openai-chat:gpt-4o"
        assert await lbr.retry("r", where="family=permanent", model=other, db_url=db_url) == 1
        assert (await lbr.work(db_url=db_url)).done == 1
        calls = [("gpt-4o-mini", "a", 9), ("gpt-4o-mini", "x", 9)]
        assert sorted(server.asked[:2]) == calls
        assert server.asked[2:] == [("gpt-4o", "x", 9)] * 2
        seen = await lbr.show("r", 0, db_url=db_url)
        assert (seen.row.result, seen.settings) == ("second", {"model": other})
        price = table_price(other)
        assert price is not None
        assert (seen.model, seen.cost_nanos) == (
            "gpt-4o",
            price.cost_nanos(seen.input_tokens or 0, seen.output_tokens or 0),
        )
        now = await lbr.status(db_url=db_url)
        assert (now.limits, now.cooldowns) == (before.limits, [])
        assert (await lbr.enqueue(["x", "a"], run="again", settings={"max_tokens": 9}, **how)).counts.reused == 1


@pytest.mark.parametrize("name", ["anthropic:claude-sonnet-4-0", "openai-chat:gpt-4o"])
async def test_without_a_key_of_the_other_model_the_job_fails_uncalled(
    db_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The run's own jobs are answered, and the message names what is missing."""
    for key in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    await lbr.enqueue(["a"], run="r", model="offline:echo", db_url=db_url)
    await lbr.work(db_url=db_url)
    await lbr.retry("r", where="status=done", model=name, db_url=db_url)
    await lbr.enqueue(["b"], run="r", model="offline:echo", append=True, db_url=db_url)
    report = await lbr.work(db_url=db_url)
    assert (report.done, report.failed) == (1, 1)
    assert "API_KEY" in str((await lbr.show("r", 0, db_url=db_url)).row.error)


@pytest.mark.parametrize(
    ("model", "other", "says"),
    [
        ("offline:echo", "gpt-4o", "expected a model like"),
        ("offline:echo", "offline:parrot", "the only offline model"),
        ("offline:echo", "openai-chat:gpt-4o", "seed|latency"),
        (None, "openai-chat:gpt-4o", "--model is for runs of a model|model"),
    ],
)
async def test_a_model_is_checked_before_anything_is_written(
    db_url: str, model: str | None, other: str, says: str
) -> None:
    """What no worker could call is refused, and every answer is where it was."""
    settings = {"latency": 0.001} if model else None
    await lbr.enqueue(
        ["a"], run="r", model=model, function=None if model else str.upper, settings=settings, db_url=db_url
    )
    with pytest.raises(UsageError, match=says):
        await lbr.retry("r", where="status=done", model=other, db_url=db_url)
    with pytest.raises(UsageError, match="setting"):
        await lbr.retry("r", where="status=done", settings={"model": other}, db_url=db_url)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("offline:echo", {"max_tokens": 5}, "expected a setting of offline:echo"),
        ("offline:echo", {"failure_rate": 2}, "a number from 0 to 1"),
        ("openai-chat:gpt-4o-mini", {"max_token": 5}, "did you mean 'max_tokens'"),
        ("openai-chat:gpt-4o-mini", {"top_k": 5}, "the setting top_k is not sent"),
        ("openai-chat:gpt-4o-mini", {"max_retries": 5}, "lbr retries by itself"),
        ("openai-chat:gpt-4o-mini", {"temperature": "warm"}, "the setting temperature cannot be 'warm'"),
        ("openai-chat:gpt-4o-mini", {"max_tokens": -1}, "a whole number of at least 1, got: -1"),
        (None, {"temperature": 1}, "settings are for models, and a function takes none"),
        ("offline:echo", {"seed": 2**70}, "that JSON can hold"),
    ],
)
async def test_settings_are_checked_before_anything_is_written(
    db_url: str, model: str | None, settings: dict[str, Any], says: str
) -> None:
    """What no call could be made with is refused like at the enqueue, and every answer is where it was."""

    async def upper(prompt: str) -> str:
        return prompt.upper()

    await lbr.enqueue(["a"], run="r", model=model, function=None if model else upper, db_url=db_url)
    database = await open_database(db_url)
    run = await database.read(reads.find_run, "r")
    (claim,) = await _claim(database, run)
    await database.write(settle, [ended(claim)])
    with pytest.raises(UsageError, match=says):
        await lbr.retry("r", where="status=done", settings=settings, db_url=db_url)
    assert await states(database, run) == {"done": 1}
    own = await database.read(lambda connection, _: connection.scalar(select(prompts.c.settings)))
    assert own is None
    await database.close()


# --- bad answers, validated again -------------------------------------------------------------------------------------


async def test_reparse_takes_what_fits_a_mended_class(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept texts that fit now are answers, the others stay failed, and nobody is called."""
    calls: list[str] = []

    async def words(prompt: str) -> str:
        calls.append(prompt)
        return json.dumps({"n": int(prompt) if prompt.isdigit() else prompt})

    await lbr.enqueue(["one", "7", "many", "two"], run="r", function=words, result_type=Strict, db_url=db_url)
    await lbr.work(functions=[words], result_types=[Strict], db_url=db_url)
    database = await open_database(db_url)
    run = await database.read(reads.find_run, "r")
    assert await states(database, run) == {"done": 1, "failed": 3}
    made, history = len(calls), (await lbr.show("r", 0, db_url=db_url)).tries
    nothing = await lbr.reparse("r", result_types=[Strict], db_url=db_url)
    assert (nothing.taken, nothing.left) == (0, 3)
    monkeypatch.setattr("tests.store.test_redo.READERS", [plain, mended])
    told = await lbr.reparse("r", result_types=[Strict], db_url=db_url)
    assert (told.taken, told.left) == (2, 1)
    assert "$.n: " in (told.problem or "")
    assert await answers(database, run) == {
        "one": ("done", '{"n":1}'),
        "7": ("done", '{"n":7}'),
        "many": ("failed", None),
        "two": ("done", '{"n":2}'),
    }
    story = await lbr.show("r", 0, db_url=db_url)
    assert (story.row.error, story.attempts, story.tries) == (None, 3, history)
    again = await lbr.reparse("r", result_types=[Strict], db_url=db_url)
    assert (again.taken, again.left) == (0, 1)
    assert len(calls) == made
    assert await lbr.retry("r", db_url=db_url) == 1
    await assert_counted(database, run)
    await database.close()


async def test_reparse_counts_nothing_twice(database: Database) -> None:
    """The answer has its try's tokens for `show`; the run's counts, and a repeated settlement, add none."""
    task = replace(ECHO, schema=SHAPE)
    run, batch = await settled(database, ["bad 1", "bad 2", "refused", "timeout"], task=task)
    before = (await database.read(reads.overview, "r")).runs[0].counts
    told = await redo.reparse(database, run, lambda text: text.replace("m", "n"))
    assert told == redo.Reparsed(2, 0, None)
    story = await database.read(reads.story, run, 0)
    assert (story.row.result, story.cost_nanos, story.latency_ms) == ('{"n": 1}', 700, 5)
    assert (await database.write(settle, list(batch.values()))).stale == frozenset()
    counts = (await database.read(reads.overview, "r")).runs[0].counts
    assert counts == before + Counter(done=2) - Counter(failed=2)
    assert (await job_row(database, batch["bad 1"].claim.job_id)).finished_at is not None
    await assert_counted(database, run)
    assert await choose(database, run, "status=done") == 2
    await assert_all_counted(database, run)


async def test_reparse_takes_what_was_cut_off_but_no_envelope(database: Database) -> None:
    """An answer cut off at its token limit may fit a fixed class; what came in the place of an answer never does."""
    run, _ = await settled(database, ["cut", "none"], task=replace(ECHO, schema=SHAPE))
    told = await redo.reparse(database, run, lambda text: text.replace("m", "n"))
    assert told == redo.Reparsed(1, 0, None)
    assert await answers(database, run) == {"cut": ("done", '{"n": 1}'), "none": ("failed", None)}
    assert (await database.read(reads.story, run, 0)).finish_reason == "length"


async def test_cut_off_answers_are_counted_with_their_limit(database: Database) -> None:
    """Done or failed, they are counted; a limit that a retry set for one job is a limit of the run's settings."""
    run, _ = await settled(database, ["length", "stop", "cut", "refused"])
    pages = reads.rows(database, run, Shape.ORIGINAL)
    assert [row.cut_off for page in [page async for page in pages] for row in page] == [
        True,
        False,
        True,
        False,
    ]
    assert not await database.read(reads.limits_answers, run)
    await choose(database, run, "family=permanent", settings={"max_tokens": 5})
    assert await database.read(reads.limits_answers, run)


async def test_reparse_looks_at_the_last_try(database: Database) -> None:
    """A job that failed for another reason since is not answered by what it said before."""
    run, _ = await settled(database, ["bad", "stop"], task=replace(ECHO, schema=SHAPE))
    await redo.retry(database, run)
    (claim,) = await _claim(database, run)
    assert (await redo.reparse(database, run, str)).taken == 0
    await database.write(settle, [replace(failed(claim, FAILURES["refused"]), state=JobState.FAILED)])
    assert await redo.reparse(database, run, str) == redo.Reparsed()
    assert await states(database, run) == {"failed": 1, "done": 1}


async def test_reparse_killed_between_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were written stay, and the same call takes the rest."""
    monkeypatch.setattr(redo, "REPARSE_PAGE", 2)
    run, _ = await settled(database, [f"bad {n}" for n in range(7)], task=replace(ECHO, schema=SHAPE))
    real, left = redo._take, 1

    def stops(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        taken = real(*arguments)
        if left < 0:
            raise StoppedError
        return taken

    monkeypatch.setattr(redo, "_take", stops)
    with pytest.raises(StoppedError):
        await redo.reparse(database, run, str)
    monkeypatch.setattr(redo, "_take", real)
    assert await states(database, run) == {"done": 2, "failed": 5}
    await assert_counted(database, run)
    assert await redo.reparse(database, run, str) == redo.Reparsed(5, 0, None)
    assert await states(database, run) == {"done": 7}
    await assert_counted(database, run)


async def test_what_changed_since_the_look_is_left(database: Database) -> None:
    """Between look and page somebody else may have put a job back: it is not answered, nor put back twice."""
    run, _ = await settled(database, ["bad 1", "bad 2", "stop"], task=replace(ECHO, schema=SHAPE))
    failed_jobs = redo._pages(database, redo._LAST_TEXTS, run, frozenset({JobState.FAILED}), 10)
    (seen,) = [page async for page in failed_jobs]
    fitting = {one.id: redo._result(run, one, "{}") for one in seen}
    assert len(fitting) == 2
    await redo.retry(database, run)
    assert await database.write(redo._take, run, list(seen), fitting) == 0
    assert await database.write(redo._put_back, run, list(seen), None) == 0
    assert await states(database, run) == {"pending": 2, "done": 1}
    await assert_all_counted(database, run)


async def test_reparse_needs_a_schema_and_its_class(db_url: str) -> None:
    """A run of free text has no bad answers; a class with other fields is not what the run asked for."""

    class Other(BaseModel):
        m: int

    await lbr.enqueue(["a"], run="free", model="offline:echo", db_url=db_url)
    with pytest.raises(UsageError, match="expected a run with an output schema, got: run 'free'"):
        await lbr.reparse("free", db_url=db_url)
    await lbr.enqueue(["a"], run="shaped", model="offline:echo", result_type=Strict, db_url=db_url)
    with pytest.raises(UsageError, match=r"expected a result type with the schema .*got: .*Other"):
        await lbr.reparse("shaped", result_types=[Other], db_url=db_url)


PERMANENT = Failure(Family.PERMANENT, "BadRequest", "400: no")


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_cancel_and_retry_do_not_mix(database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of a cancel and a retry comes last has its way with every job."""
    monkeypatch.setattr(runs, "BATCH", 3)
    run = await put(database, [f"p{n}" for n in range(40)])
    other = await open_database(db_url)
    for _ in range(5):
        await asyncio.gather(runs.cancel(database, run), redo.retry(other, run))
        state = (await database.read(reads.find_run, "r")).state
        expected = "cancelled" if state is RunState.CANCELLED else "pending"
        if await states(database, run) != {expected: 40}:
            # The one that came first may have ended on a page that the other had already passed.
            await (runs.cancel if state is RunState.CANCELLED else redo.retry)(database, run)
        assert await states(database, run) == {expected: 40}
    await other.close()
    await assert_counted(database, run)


async def test_retry_gives_back_every_try(database: Database) -> None:
    """Retry puts failed jobs back with all their budgets, keeps their history, and leaves answers alone."""
    run = await put(database, ["a", "b"])
    queue, worker, _ = await two_workers(database)
    bad, good = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(settle, [failed(bad, PERMANENT), answered(good)])
    assert await redo.retry(database, run) == 1
    assert await states(database, run) == {"pending": 1, "done": 1}
    (again,) = await queue.claim(worker, [run.id], 2, lease=60)
    assert (again.attempts, again.crashes, again.claim_seq, again.history.bad_answers) == (0, 0, 2, 0)
    assert (await database.write(settle, [failed(bad, PERMANENT)])).taken == {bad.job_id}
    assert [t.what for t in (await database.read(reads.story, run, 0)).tries] == ["failed"]
    await assert_counted(database, run)
