"""Runs that cost money: their price, their limit, what their calls cost, and what is done if nobody knows it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from bench_chat import chat_server

import lbr
from lbr import Permanent
from lbr.api.status import describe, status_of
from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.errors import Family, Usage, UsageError
from lbr.core.pricing import Price, dollars
from lbr.core.types import Failure, KeyMaker, Outcome, PauseCause, Paused, Prompt, Reply, Task
from lbr.models.identity import identify
from lbr.store import limits, reads, runs, transfer
from lbr.store.database import open_database, shown
from lbr.store.settle import settle
from lbr.worker.worker import Worker
from tests.support import ECHO, Cli, Queue, answered, assert_counted, eventually, failed, put, states
from tests.support.llmock_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from lbr.core.types import Claim, Run, Settlement
    from lbr.store.database import Database
    from tests.support import Clock

PRICE = Price(0.15, 0.6)
MINI = "openai-chat:gpt-4o-mini"
RELAYED = "openrouter:openai/gpt-4o-mini"
UNREAD = Failure(Family.TRANSIENT, "UnreadAnswer", "no reader", text="{}")
LATE = Failure(Family.TRANSIENT, "CallTimeout", "no answer within 5 s")
PATTERN = {"type": "object", "properties": {"n": {"type": "string", "pattern": "^never$"}}, "required": ["n"]}


class Capacity:
    """What a function looks at while it runs; its values do not change who the function is."""

    def __init__(self) -> None:
        self.calls = 0
        self.open = False


@pytest.fixture(scope="module")
def llmock() -> Iterator[str]:
    """Start a chat server that others wrote."""
    with serve() as url:
        yield url


@pytest.fixture
async def live(db_url: str) -> AsyncIterator[Database]:
    """Return a queue whose leases go by the real clock."""
    opened = await open_database(db_url, create=True)
    yield opened
    await opened.close()


async def enqueue_for(database: Database, function: Callable[..., Any], prompts: list[str], price: Price) -> Run:
    """Put prompts into a run `r` that a test's function answers at a price."""
    identity = identify(function)
    task = Task(function=identity.name, version=identity.version, fingerprint=identity.fingerprint)
    await database.write(runs.open_run, runs.RunSpec("r", task, 8, price=price))
    return await put(database, prompts, task=task)


def worker_for(database: Database, function: Callable[..., Any], **options: Any) -> Worker:
    """Return a worker that may call the function."""
    return Worker(database, authorize([function]), WorkOptions(**options))


def took(claim: Claim, usage: Usage) -> Settlement:
    """Return the settlement of a call that was answered, and took so much."""
    settlement = answered(claim)
    return replace(settlement, outcome=Outcome(Reply("answer", usage), None, 5))


async def worker_of(database: Database) -> Any:
    """Register a worker with a hundred slots."""
    return await Queue(database).register(host="h", pid=1, concurrency=100)


async def claim(database: Database, worker: Any, run: Run, most: int = 100) -> list[Claim]:
    """Claim as a worker does."""
    return await Queue(database).claim(worker, [run.id], most, lease=60)


class TestRuns:
    """A price that is kept with its run, on both databases."""

    async def test_a_price_is_no_part_of_the_task(self, database: Database) -> None:
        """Runs with and without one have the same keys; the later enqueue's price holds, none leaves it."""
        run = await put(database, ["a"])
        assert run.price is None
        again = await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8, price=PRICE))
        assert (again.id, again.price) == (run.id, PRICE)
        assert (await database.read(reads.find_run, "r")).price == PRICE
        assert (await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8))).price == PRICE
        dearer = Price(1, 2)
        await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8, price=dearer))
        assert (await database.read(reads.find_run, "r")).price == dearer
        fresh = await database.write(runs.open_run, runs.RunSpec("new", ECHO, 8, price=PRICE))
        assert (await database.read(reads.find_run, "new")).price == fresh.price == PRICE
        assert KeyMaker(fresh.task).key(Prompt(text="a")) == KeyMaker(run.task).key(Prompt(text="a"))

    async def test_a_cancelled_run_keeps_its_price(self, database: Database) -> None:
        """An enqueue that is refused changes nothing."""
        run = await put(database, ["a"])
        await runs.cancel(database, run)
        with pytest.raises(UsageError, match="cancelled"):
            await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8, price=PRICE))
        assert (await database.read(reads.find_run, "r")).price is None

    async def test_the_part_of_the_cost_without_answers_is_counted(self, database: Database, clock: Clock) -> None:
        """Failed tries and late answers count as wasted, answers do not; the counts are those of the rows."""
        run = await put(database, ["a", "b"])
        queue = Queue(database)
        worker = await queue.register(host="h", pid=1, concurrency=2)
        one, two = await queue.claim(worker, [run.id], 2, lease=60)
        paid = Failure(Family.BAD_ANSWER, "BadAnswer", "no", text="{}", usage=Usage(7, 3, 1_000))
        late, good = (
            replace(answered(claim), outcome=Outcome(Reply("answer", Usage(1, 1, nanos)), None, 1))
            for claim, nanos in ((one, 30), (two, 4))
        )
        await database.write(settle, [good])
        clock.forward(61)
        await queue.reclaim()
        (again,) = await queue.claim(worker, [run.id], 1, lease=60)
        await database.write(settle, [late])
        await database.write(settle, [failed(again, paid)])
        counts = (await database.read(reads.overview, "r")).runs[0].counts
        assert (counts["cost_nanos"], counts["wasted_nanos"]) == (1_034, 1_030)
        tries = (await database.read(reads.story, run, 0)).tries
        told = [(one.what, one.input_tokens, one.output_tokens, one.cost_nanos) for one in tries]
        assert told == [("crashed", None, None, None), ("stale", 1, 1, 30), ("retried", 7, 3, 1_000)]

    @pytest.mark.parametrize("new", [False, True])
    async def test_a_move_takes_the_price_along(self, db_url: str, tmp_path: Path, new: bool) -> None:
        """Also one that was set after the copy was begun."""
        target_url = f"sqlite:///{tmp_path / 'target.db'}"
        await lbr.enqueue(["a"], run="r", model="offline:echo", price="in=1,out=2", db_url=db_url)
        if new:
            source, target = await open_database(db_url), await open_database(target_url, create=True)
            run = await source.read(reads.find_run, "r")
            await target.write(transfer.open_copy, replace(run, price=PRICE), shown(db_url))
            await source.close()
            await target.close()
        await lbr.pause("r", db_url=db_url)
        await lbr.move("r", db_url=db_url, to_url=target_url)
        (there,) = (await lbr.status("r", db_url=target_url)).runs
        assert there.price == {"in": 1.0, "out": 2.0}


class TestWorkers:
    """What calls cost, as workers write it down."""

    async def test_failed_tries_are_priced_by_the_run(self, live: Database) -> None:
        """What a function says that its failed call took is priced; what it says that it cost is overridden."""

        async def refuses(prompt: str) -> str:
            raise Permanent("no", usage=Usage(100, 10, 7))

        await enqueue_for(live, refuses, ["a"], Price(1, 2))
        await worker_for(live, refuses).run()
        counts = (await live.read(reads.overview, "r")).runs[0].counts
        assert (counts["cost_nanos"], counts["wasted_nanos"]) == (120_000, 120_000)

    async def test_a_busy_worker_takes_note_of_another_price(self, live: Database) -> None:
        """The calls that end after that are priced anew, though the worker had no slot to look for others."""
        gate = Capacity()

        async def waits(prompt: str) -> str:
            gate.calls += 1
            await eventually(lambda: gate.open)
            raise Permanent("no", usage=Usage(1_000, 0))

        run = await enqueue_for(live, waits, ["a", "b"], Price(1, 2))
        worker = worker_for(live, waits, concurrency=1, lease=3)
        working = asyncio.create_task(worker.run())
        await eventually(lambda: gate.calls)
        dearer = Price(3, 0)
        await live.write(runs.open_run, runs.RunSpec("r", run.task, 8, run.fingerprint, dearer))
        await eventually(lambda: worker._runs.served[run.id].price == dearer)
        gate.open = True
        await working
        counts = (await live.read(reads.overview, "r")).runs[0].counts
        assert counts["cost_nanos"] == 2 * 3_000_000

    @pytest.mark.processes
    def test_status_and_show_tell_the_exact_cost(self, cli: Cli, llmock: str) -> None:
        """With a price of its own, a model that no table knows costs its tokens times that, to the nano."""
        cli.environment |= {"OPENAI_BASE_URL": llmock, "OPENAI_API_KEY": "sk-test"}
        (cli.folder / "in.txt").write_text("".join(f"question {n}\n" for n in range(5)))
        flags = ["--model", "openai-chat:house-model", "--price", "in=0.15,out=0.60"]
        cli("run", "in.txt", "-o", "out.jsonl", "--run", "r", *flags)
        status = json.loads(cli("status", "r", "--json").stdout)["runs"][0]
        cost = status["input_tokens"] * 150 + status["output_tokens"] * 600
        assert cost > 0
        assert status["cost_usd"] == cost / 1e9
        assert (status["wasted_usd"], status["price"]) == (0.0, {"in": 0.15, "out": 0.6})
        words = cli("status", "r").stdout
        assert f"cost {dollars(cost)}\n  price of calls in=0.15,out=0.6," in words
        story = json.loads(cli("show", "r", "0", "--json").stdout)
        assert story["cost_nanos"] == story["input_tokens"] * 150 + story["output_tokens"] * 600
        line = (
            f", tokens {story['input_tokens']} in, {story['output_tokens']} out, cost {dollars(story['cost_nanos'])}\n"
        )
        assert line in cli("show", "r", "0").stdout

    @pytest.mark.processes
    def test_without_a_price_an_unknown_model_has_tokens_only(self, cli: Cli, llmock: str) -> None:
        """Nothing is made up; the price that an enqueue names later holds for later calls alone."""
        cli.environment |= {"OPENAI_BASE_URL": llmock, "OPENAI_API_KEY": "sk-test"}
        (cli.folder / "in.txt").write_text("one\n")
        flags = ["--run", "r", "--model", "openai-chat:house-model"]
        cli("run", "in.txt", "-o", "out.jsonl", *flags)
        status = json.loads(cli("status", "r", "--json").stdout)["runs"][0]
        assert (status["cost_usd"], status["wasted_usd"], status["price"]) == (None, None, None)
        (cli.folder / "in.txt").write_text("one\ntwo\n")
        cli("enqueue", "in.txt", *flags, "--price", "in=1,out=1")
        cli("worker")
        story = json.loads(cli("show", "r", "1", "--json").stdout)
        status = json.loads(cli("status", "r", "--json").stdout)["runs"][0]
        assert status["cost_usd"] == story["cost_nanos"] / 1e9
        assert story["cost_nanos"] == 1_000 * (story["input_tokens"] + story["output_tokens"])

    @pytest.mark.processes
    def test_a_refused_run_is_served_once_it_has_a_price(self, cli: Cli, llmock: str) -> None:
        """A worker that limits the cost and runs on need not be started again."""
        cli.environment |= {"OPENAI_BASE_URL": llmock, "OPENAI_API_KEY": "sk-test"}
        for name in ("priced", "r"):
            (cli.folder / f"{name}.txt").write_text(f"{name}\n")
        model = ["--model", "openai-chat:house-model"]
        cli("enqueue", "priced.txt", *model, "--price", "in=1,out=1")
        cli("enqueue", "r.txt", *model)
        cli.start("worker", "--until", "forever", "--max-cost", "1")
        cli.wait_for("priced", "done", 1)
        assert cli.status("r")["done"] == 0
        cli("enqueue", "r.txt", *model, "--price", "in=1,out=1")
        cli.wait_for("r", "done", 1)

    @pytest.mark.processes
    def test_answers_that_do_not_fit_are_priced_and_told_apart(self, cli: Cli, llmock: str) -> None:
        """Each bad answer has its tokens and its cost, and all of the run's cost went to them."""
        cli.environment |= {"OPENAI_BASE_URL": llmock, "OPENAI_API_KEY": "sk-test"}
        (cli.folder / "in.txt").write_text("one\n")
        (cli.folder / "schema.json").write_text(json.dumps(PATTERN))
        flags = ["--run", "r", "--model", "openai-chat:house-model", "--schema", "schema.json"]
        cli("enqueue", "in.txt", *flags, "--price", "in=2,out=3")
        assert cli("worker", check=False).returncode == 4
        story = json.loads(cli("show", "r", "0", "--json").stdout)
        costs = [one["cost_nanos"] for one in story["tries"]]
        assert costs == [2_000 * one["input_tokens"] + 3_000 * one["output_tokens"] for one in story["tries"]]
        assert len(costs) == 3
        status = json.loads(cli("status", "r", "--json").stdout)["runs"][0]
        assert status["cost_usd"] == status["wasted_usd"] == sum(costs) / 1e9
        assert f"{dollars(sum(costs))} of it for failed attempts" in cli("status", "r").stdout
        assert cli("show", "r", "0").stdout.count("cost $") == 3


class TestPause:
    """A run that may cost so much only is paused when nobody knows what a call cost."""

    async def test_an_answer_without_a_cost_pauses_the_run_and_is_kept(self, database: Database, clock: Clock) -> None:
        """So are those that are in flight; then nothing is claimed until somebody resumes."""
        run, worker = await put(database, [f"p{n}" for n in range(20)]), await worker_of(database)
        await database.write(limits.set_budget, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        await database.write(settle, [took(first, Usage(1, 1, 1000))])
        one, two = await claim(database, worker, run)
        settled = await database.write(settle, [took(one, Usage(40, 40, None))])
        words = "its calls report no cost and no price is known for offline:echo; repeat the enqueue with --price in=…,out=…"
        assert settled.paused == {"r": Paused(PauseCause.UNPRICED, words)}
        assert await claim(database, worker, run) == []
        assert (await database.write(settle, [took(two, Usage(40, 40, None))])).paused == {}
        found = await database.read(reads.find_run, "r")
        assert (found.state, found.pause) == ("paused", Paused(PauseCause.UNPRICED, words))
        assert await states(database, run) == {"done": 3, "pending": 17}
        await assert_counted(database, run)
        await database.write(runs.resume, found)
        assert len(await claim(database, worker, run)) == 2

    async def test_tokens_that_nobody_counted_are_a_cost_that_nobody_knows(
        self, database: Database, clock: Clock
    ) -> None:
        """The words say so, for a price would not help."""
        run, worker = await put(database, ["a", "b"]), await worker_of(database)
        await database.write(limits.set_budget, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        (reason,) = (await database.write(settle, [answered(first)])).paused.values()
        assert reason.message.startswith("its calls report no cost, because offline:echo does not count their tokens")

    @pytest.mark.parametrize(
        ("failure", "pauses"),
        [
            (UNREAD, True),
            (replace(UNREAD, usage=Usage(5, 5, None)), True),
            (replace(UNREAD, usage=Usage(5, 5, 100)), False),
            (LATE, False),
        ],
    )
    async def test_what_stayed_unread_is_paid_for(
        self, database: Database, clock: Clock, failure: Failure, pauses: bool
    ) -> None:
        """An answer that nobody could read counts like one; a call that ended without a word does not."""
        run, worker = await put(database, ["a", "b"]), await worker_of(database)
        await database.write(limits.set_budget, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        assert bool((await database.write(settle, [failed(first, failure)])).paused) is pauses
        clock.forward(3600)
        # Of one that is known to have cost something, the mean is known: two may go.
        known = failure.usage.cost_nanos is not None
        assert len(await claim(database, worker, run)) == (0 if pauses else 1 + known)

    async def test_an_answer_that_came_too_late_is_paid_for(self, database: Database, clock: Clock) -> None:
        """It is nobody's answer, but it took tokens."""
        run, worker = await put(database, ["a"]), await worker_of(database)
        await database.write(limits.set_budget, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        clock.forward(120)
        await Queue(database).reclaim()
        (again,) = await claim(database, worker, run)
        settled = await database.write(settle, [took(first, Usage(1, 1, None))])
        assert (len(settled.stale), list(settled.paused)) == (1, ["r"])
        await database.write(settle, [took(again, Usage(1, 1, 1))])
        assert await states(database, run) == {"done": 1}

    async def test_it_is_told_beside_the_cost_that_is_known(self, database: Database) -> None:
        """Else a part of the cost is read as the whole."""
        run, worker = await put(database, ["a", "b"]), await worker_of(database)
        (first, second) = await claim(database, worker, run, 2)
        for taken, unpriced, told in (
            (took(first, Usage(1, 1, None)), 1, "tokens 1 in, 1 out\n"),
            (
                took(second, Usage(1, 1, 3_000_000)),
                1,
                "tokens 2 in, 2 out, cost $0.003, and 1 call of unknown cost\n",
            ),
        ):
            await database.write(settle, [taken])
            status = status_of(await database.read(reads.overview, "r"))
            assert status.runs[0].unpriced == unpriced
            assert told in f"{describe(status)}\n"

    async def test_without_a_limit_nothing_is_held_back(self, database: Database, clock: Clock) -> None:
        """And what came then does not thin out the mean of those whose cost is known, once there is a limit."""
        run, worker = await put(database, [f"p{n}" for n in range(200)]), await worker_of(database)
        claims = await claim(database, worker, run, 60)
        assert (await database.write(settle, [took(c, Usage(40, 40, None)) for c in claims])).paused == {}
        await database.write(limits.set_budget, run.id, 100_000)
        flights = []
        while claims := await claim(database, worker, run):
            flights.append(len(claims))
            await database.write(settle, [took(c, Usage(1, 1, 10_000)) for c in claims])
        assert flights == [1, 2, 6, 1]
        await assert_counted(database, run)


class Bench:
    """Commands in a folder, a chat server that counts its calls, and a price table that can be taken away."""

    def __init__(self, cli: Cli, url: str) -> None:
        self._url = url
        self.cli = cli
        broken = cli.folder / "broken" / "genai_prices"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise OSError(5, 'Input/output error')\n")
        (cli.folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(100)))
        for name in ("OPENAI", "OPENROUTER", "ANTHROPIC"):
            cli.environment |= {f"{name}_BASE_URL": url, f"{name}_API_KEY": "sk-of-this-test"}

    def without_table(self) -> None:
        """Let the commands from now on find a price table that cannot be imported."""
        self.cli.environment["PYTHONPATH"] = str(self.cli.folder / "broken")

    @property
    def calls(self) -> int:
        """How many calls there were."""
        with urllib.request.urlopen(self._url, timeout=10) as told:  # noqa: S310
            return int(json.load(told)["calls"])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Return commands, with a chat server that runs meanwhile."""
    with chat_server(0.02) as url:
        yield Bench(Cli(tmp_path), url)


@pytest.mark.slow
class TestBrokenTable:
    """Commands whose price table cannot be imported."""

    def test_a_limit_holds_where_the_provider_was_to_tell_the_cost(self, bench: Bench) -> None:
        """The first call that tells none pauses the run; with a price it goes on to its end."""
        bench.without_table()
        bench.cli("enqueue", "in.txt", "--model", RELAYED)
        done = bench.cli("worker", "--max-cost", "0.0005", check=False)
        assert (done.returncode, bench.calls) == (3, 1)
        assert done.stderr.count("cannot load the price table (package genai-prices): OSError") == 1
        assert (
            f"its calls report no cost and no price is known for {RELAYED}; repeat the enqueue with --price"
            in done.stderr
        )
        assert "then `lbr resume in`; or lift the limit with `lbr resume in --max-cost inf`" in done.stderr
        assert bench.cli.status("in")["done"] == 1
        assert "then `lbr resume in`" in bench.cli("doctor", check=False).stdout
        bench.cli("enqueue", "in.txt", "--model", RELAYED, "--price", "in=0,out=0")
        bench.cli("resume", "in")
        done = bench.cli("worker")
        assert "price table" not in done.stderr
        assert (bench.cli.status("in")["done"], bench.calls) == (100, 100)

    def test_a_limit_that_a_run_has_holds_for_the_next_worker(self, bench: Bench) -> None:
        """One that cannot know the cost makes no call, and says why; without the limit it works, and says it once."""
        bench.cli("enqueue", "in.txt", "--model", MINI)
        assert bench.cli("worker", "--max-cost", "0.0005", check=False).returncode == 3
        bench.cli("resume", "in", "--max-cost", "0.001")
        calls = bench.calls
        bench.without_table()
        done = bench.cli("worker", check=False)
        assert (done.returncode, bench.calls) == (1, calls)
        assert "and the price table cannot be loaded (OSError: [Errno 5] Input/output error)" in done.stderr
        bench.cli("resume", "in", "--max-cost", "inf")
        done = bench.cli("worker")
        assert done.stderr.count("cannot load the price table") == 1
        assert (bench.cli.status("in")["done"], bench.calls) == (100, 100)

    def test_a_limit_that_is_set_while_a_worker_calls_holds(self, bench: Bench) -> None:
        """A worker that served the run before there was a limit ends no more than what it has in flight."""
        bench.without_table()
        (bench.cli.folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(20_000)))
        bench.cli("enqueue", "in.txt", "--model", RELAYED)
        worker = bench.cli.start("worker", "--concurrency", "4")
        give_up = time.monotonic() + 60
        while bench.calls < 20 and time.monotonic() < give_up:
            time.sleep(0.05)
        bench.cli("resume", "in", "--max-cost", "1")
        _, said = worker.communicate(timeout=60)
        assert worker.returncode == 3, said
        assert "run in is paused now: its calls report no cost" in said
        bench.cli.stop_all()
        assert bench.cli.status("in")["done"] == bench.calls < 20_000

    def test_no_command_ends_in_a_traceback(self, bench: Bench) -> None:
        """Whatever the table is asked for, what is wrong with it is told in words."""
        told = "OSError: [Errno 5] Input/output error"
        for model in (MINI, "anthropic:claude-sonnet-4-5"):
            bench.cli("enqueue", "in.txt", "--run", model[:5], "--model", model)
        bench.without_table()
        limited = bench.cli("worker", "--run", "opena", "--max-cost", "1", check=False)
        resumed = bench.cli("resume", "opena", "--max-cost", "1", check=False)
        served = bench.cli("worker", "--run", "anthr", check=False)
        added = bench.cli("enqueue", "in.txt", "--run", "x", "--model", "anthropic:claude-sonnet-4-5", check=False)
        for done in (limited, resumed, served, added):
            assert (done.returncode, told in done.stderr) == (2, True), done.stderr
        estimated = bench.cli("estimate", "in.txt", "--model", MINI)
        assert f"because the price table cannot be loaded ({told}): set --price in=…,out=…" in estimated.stdout
        assert bench.calls == 0
