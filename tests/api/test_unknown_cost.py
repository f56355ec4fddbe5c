"""What a run may cost, where nobody knows what its calls cost: on every database, and by real processes."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from bench_chat import chat_server

from lbr.api.status import describe, status_of
from lbr.core.errors import Family, Usage
from lbr.core.pricing import Price
from lbr.core.types import Failure, Outcome, PauseCause, Paused, Reply
from lbr.store import budgets, reads, runs
from lbr.store.queue import Queue
from lbr.store.settle import settle
from lbr.worker.attempt import priced
from tests.support import Cli, answered, assert_counted, failed, put, states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbr.core.types import Claim, Run, Settlement
    from lbr.store.database import Database
    from tests.support import Clock

MINI = "openai-chat:gpt-4o-mini"
RELAYED = "openrouter:openai/gpt-4o-mini"
UNREAD = Failure(Family.TRANSIENT, "UnreadAnswer", "no reader", text="{}")
LATE = Failure(Family.TRANSIENT, "CallTimeout", "no answer within 5 s")


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


class TestPause:
    """A run that may cost so much only is paused when nobody knows what a call cost."""

    async def test_an_answer_without_a_cost_pauses_the_run_and_is_kept(
        self, database: Database, clock: Clock
    ) -> None:
        """So are those that are in flight; then nothing is claimed until somebody resumes."""
        run, worker = await put(database, [f"p{n}" for n in range(20)]), await worker_of(database)
        await budgets.set_budget(database, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        await settle(database, [took(first, Usage(1, 1, 1000))])
        one, two = await claim(database, worker, run)
        settled = await settle(database, [took(one, Usage(40, 40, None))])
        words = "its calls report no cost and no price is known for offline:echo; repeat the enqueue with --price in=…,out=…"
        assert settled.paused == {"r": Paused(PauseCause.UNPRICED, words)}
        assert await claim(database, worker, run) == []
        assert (await settle(database, [took(two, Usage(40, 40, None))])).paused == {}
        found = await reads.find_run(database, "r")
        assert (found.state, found.pause) == ("paused", Paused(PauseCause.UNPRICED, words))
        assert await states(database, run) == {"done": 3, "pending": 17}
        await assert_counted(database, run)
        await runs.resume(database, found)
        assert len(await claim(database, worker, run)) == 2

    async def test_tokens_that_nobody_counted_are_a_cost_that_nobody_knows(
        self, database: Database, clock: Clock
    ) -> None:
        """The words say so, for a price would not help."""
        run, worker = await put(database, ["a", "b"]), await worker_of(database)
        await budgets.set_budget(database, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        (reason,) = (await settle(database, [answered(first)])).paused.values()
        assert reason.message.startswith(
            "its calls report no cost, because offline:echo does not count their tokens"
        )

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
        await budgets.set_budget(database, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        assert bool((await settle(database, [failed(first, failure)])).paused) is pauses
        clock.forward(3600)
        # Of one that is known to have cost something, the mean is known: two may go.
        known = failure.usage.cost_nanos is not None
        assert len(await claim(database, worker, run)) == (0 if pauses else 1 + known)

    async def test_an_answer_that_came_too_late_is_paid_for(self, database: Database, clock: Clock) -> None:
        """It is nobody's answer, but it took tokens."""
        run, worker = await put(database, ["a"]), await worker_of(database)
        await budgets.set_budget(database, run.id, 10**9)
        (first,) = await claim(database, worker, run)
        clock.forward(120)
        await Queue(database).reclaim()
        (again,) = await claim(database, worker, run)
        settled = await settle(database, [took(first, Usage(1, 1, None))])
        assert (len(settled.stale), list(settled.paused)) == (1, ["r"])
        await settle(database, [took(again, Usage(1, 1, 1))])
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
            await settle(database, [taken])
            status = status_of(await reads.overview(database, "r"))
            assert status.runs[0].unpriced == unpriced
            assert told in f"{describe(status)}\n"

    async def test_without_a_limit_nothing_is_held_back(self, database: Database, clock: Clock) -> None:
        """And what came then does not thin out the mean of those whose cost is known, once there is a limit."""
        run, worker = await put(database, [f"p{n}" for n in range(200)]), await worker_of(database)
        claims = await claim(database, worker, run, 60)
        assert (await settle(database, [took(c, Usage(40, 40, None)) for c in claims])).paused == {}
        await budgets.set_budget(database, run.id, 100_000)
        flights = []
        while claims := await claim(database, worker, run):
            flights.append(len(claims))
            await settle(database, [took(c, Usage(1, 1, 10_000)) for c in claims])
        assert flights == [1, 2, 6, 1]
        await assert_counted(database, run)


def test_what_is_free_costs_nothing_however_many_tokens() -> None:
    """But a call that brought nothing is no call that was paid for."""
    free = Price(0, 0)
    assert priced(Outcome(Reply("a"), None, 5), free).usage == Usage(None, None, 0)
    assert priced(Outcome(None, UNREAD, 5), free).usage == Usage(None, None, 0)
    assert priced(Outcome(None, LATE, 5), free) == Outcome(None, LATE, 5)
    assert priced(Outcome(Reply("a"), None, 5), Price(0, 1)).is_unpriced


class Bench:
    """Commands in a folder, a chat server that counts its calls, and a price table that can be taken away."""

    def __init__(self, cli: Cli, url: str) -> None:
        self._url = url
        self.cli = cli
        broken = cli.folder / "broken" / "genai_prices"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise OSError(24, 'Too many open files')\n")
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
        assert "and the price table cannot be loaded (OSError: [Errno 24] Too many open files)" in done.stderr
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
        told = "OSError: [Errno 24] Too many open files"
        for model in (MINI, "anthropic:claude-sonnet-4-5"):
            bench.cli("enqueue", "in.txt", "--run", model[:5], "--model", model)
        bench.without_table()
        limited = bench.cli("worker", "--run", "opena", "--max-cost", "1", check=False)
        resumed = bench.cli("resume", "opena", "--max-cost", "1", check=False)
        served = bench.cli("worker", "--run", "anthr", check=False)
        added = bench.cli(
            "enqueue", "in.txt", "--run", "x", "--model", "anthropic:claude-sonnet-4-5", check=False
        )
        for done in (limited, resumed, served, added):
            assert (done.returncode, told in done.stderr) == (2, True), done.stderr
        estimated = bench.cli("estimate", "in.txt", "--model", MINI)
        assert (
            f"price unknown, for the price table cannot be loaded ({told}): give --price" in estimated.stdout
        )
        assert bench.calls == 0
