"""Tokens and money: prices as they are written, what calls cost by them, and what a batch would take."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lbr
from lbr import Permanent, prompt_map
from lbr.api.estimate import Counted, Pace, answer_length, count, estimate_of, rounded, time_at_limits
from lbr.api.task import authorize
from lbr.core.config import WorkOptions
from lbr.core.errors import DatabaseError, Family, InputError, Usage, UsageError
from lbr.core.pricing import (
    Price,
    characters_of,
    dollars,
    estimate_tokens,
    max_output_tokens,
    read_price,
    table_price,
    task_characters,
    tokens_of,
)
from lbr.core.types import Failure, Item, KeyMaker, Outcome, Prompt, Reply, Task
from lbr.models.identity import identify
from lbr.store import reads, runs, transfer
from lbr.store.database import open_database, shown
from lbr.store.queue import Queue
from lbr.store.settle import settle
from lbr.worker.attempt import priced
from lbr.worker.worker import Worker
from tests.support import ECHO, Cli, answered, eventually, failed, put
from tests.support.llmock_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from lbr.core.types import Run
    from lbr.store.database import Database
    from tests.support import Clock

MINI = Price(0.15, 0.6)
MODEL = "openai-chat:gpt-4o-mini"
PATTERN = {"type": "object", "properties": {"n": {"type": "string", "pattern": "^never$"}}, "required": ["n"]}
BAD_PRICES = (
    "",
    "1",
    "in=1",
    "in=1,out=",
    "in=1,out=x",
    "in=1,in=2",
    "in=1,out=2,out=3",
    "in=-1,out=2",
    "in=nan,out=1",
    "in=1,out=inf",
    "in=1,out=1000001",
    "in=1;out=2",
    "input=1,output=2",
)


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
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, without anybody's model or key."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "OPENROUTER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
async def live(db_url: str) -> AsyncIterator[Database]:
    """Return a queue whose leases go by the real clock."""
    opened = await open_database(db_url, create=True)
    yield opened
    await opened.close()


async def enqueue_for(
    database: Database, function: Callable[..., Any], prompts: list[str], price: Price
) -> Run:
    """Put prompts into a run `r` that a test's function answers at a price."""
    identity = identify(function)
    task = Task(function=identity.name, version=identity.version, fingerprint=identity.fingerprint)
    await runs.open_run(database, runs.RunSpec("r", task, 8, price=price))
    return await put(database, prompts, task=task)


def worker_for(database: Database, function: Callable[..., Any], **options: Any) -> Worker:
    """Return a worker that may call the function."""
    return Worker(database, authorize([function]), WorkOptions(**options))


class TestPrices:
    """Prices as people write them, and the money that comes of them."""

    @pytest.mark.parametrize("text", ["in=0.15,out=0.60", "out=.6,in=0.150", " in = 0.15 , out = 6e-1 "])
    def test_a_price_is_read(self, text: str) -> None:
        """Both parts, in any order and with spaces."""
        assert read_price(text) == MINI

    @pytest.mark.parametrize("text", BAD_PRICES)
    def test_rubbish_is_refused_with_the_form(self, text: str) -> None:
        """What is no price is a usage error that shows one."""
        with pytest.raises(UsageError, match=r"expected a price like in=0\.15,out=0\.60"):
            read_price(text)

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_a_price_is_read_as_it_was_written(self, given_in: float, given_out: float) -> None:
        """Neither the words nor the store lose a digit."""
        price = Price(given_in, given_out)
        assert read_price(price.words()) == price
        assert Price.from_json(price.to_json()) == price

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"in": 1}', '{"in": -1, "out": 2}', '{"in": "x", "out": 2}']
    )
    def test_a_stored_price_that_is_none_is_a_database_error(self, text: str) -> None:
        """What another program has written there is not taken for a price."""
        with pytest.raises(DatabaseError, match="expected a stored price"):
            Price.from_json(text)

    def test_cost_is_exact(self) -> None:
        """A million tokens cost the price, one token a millionth of it, in whole nanos."""
        assert MINI.cost_nanos(1_000_000, 0) == 150_000_000
        assert MINI.cost_nanos(0, 1_000_000) == 600_000_000
        assert MINI.cost_nanos(7, 3) == 7 * 150 + 3 * 600
        assert Price(0, 0).cost_nanos(7, 3) == 0
        assert Price(0.0001, 0).cost_nanos(7, 3) == 1

    def test_a_run_price_overrides_what_the_provider_says(self) -> None:
        """Known tokens are priced anew; where they are not known, the provider's word stays."""
        assert MINI.apply(Usage(10, 20, 5)) == Usage(10, 20, 10 * 150 + 20 * 600)
        assert MINI.apply(Usage(10, None, 5)) == Usage(10, None, 5)
        assert MINI.apply(Usage(cost_nanos=5)) == Usage(cost_nanos=5)

    def test_a_cost_that_no_database_holds_is_left_out(self) -> None:
        """The counts stay."""
        assert Price(1e6, 1e6).apply(Usage(2**62, 1, 5)) == Usage(2**62, 1, None)

    def test_outcomes_are_priced_failed_ones_too(self) -> None:
        """The usage of a reply or of a failure gets its cost; all else stays."""
        reply = Outcome(Reply("a", Usage(1, 1), "m"), None, 5)
        failure = Outcome(None, Failure(Family.BAD_ANSWER, "BadAnswer", "no", usage=Usage(2, 1)), 5)
        assert priced(reply, MINI) == Outcome(Reply("a", Usage(1, 1, 750), "m"), None, 5)
        assert priced(failure, MINI).failure == Failure(
            Family.BAD_ANSWER, "BadAnswer", "no", usage=Usage(2, 1, 900)
        )

    @pytest.mark.parametrize(
        "model", [MODEL, "openrouter:google/gemini-2.5-flash", "anthropic:claude-sonnet-4-5"]
    )
    def test_the_table_knows_models_by_our_names(self, model: str) -> None:
        """A well-known model of each kind of name has a price, output above input."""
        found = table_price(model)
        assert found is not None
        assert 0 < found.input_per_million < found.output_per_million

    def test_the_table_says_dollars_for_a_million(self) -> None:
        """A model whose price is known for certain has that price."""
        assert table_price(MODEL) == MINI

    @pytest.mark.parametrize(
        "model", ["offline:echo", "function:m:f", f"{MODEL}-nobodys", "nobody:x", "x", ""]
    )
    def test_what_the_table_does_not_know_has_no_price(self, model: str) -> None:
        """Offline models, functions and strangers have none."""
        assert table_price(model) is None

    @pytest.mark.parametrize(
        ("nanos", "text"),
        [
            (0, "$0.00"),
            (1, "$0.000000001"),
            (1_500_000_000, "$1.50"),
            (12_345_600_000, "$12.3456"),
            (-5, "-$0.000000005"),
        ],
    )
    def test_money_is_written_with_every_digit(self, nanos: int, text: str) -> None:
        """Nothing is rounded away, and there are cents at least."""
        assert dollars(nanos) == text


class TestTokens:
    """How many tokens a call takes, as far as that can be said."""

    @pytest.mark.parametrize(("characters", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4_000, 1_000)])
    def test_four_characters_are_a_token(self, characters: int, tokens: int) -> None:
        """Rounded up, so that no text is free."""
        assert tokens_of(characters) == tokens

    def test_messages_count_their_texts(self) -> None:
        """Roles and images are left out."""
        parts = [{"type": "text", "text": "12345"}, {"type": "image_url", "image_url": {"url": "x" * 999}}]
        chat = Prompt(messages=({"role": "system", "content": "123"}, {"role": "user", "content": parts}))
        assert characters_of(chat) == 8
        assert characters_of(Prompt(text="1234")) == 4

    def test_instructions_and_schema_come_on_top_of_each_prompt(self) -> None:
        """They are sent with every call."""
        task = Task(model=MODEL, instructions="12345", schema={"type": "object"})
        assert task_characters(task) == 5 + len('{"type":"object"}')
        assert estimate_tokens(Prompt(text="12"), task) == 6
        assert estimate_tokens(Prompt(text="12"), ECHO) == 1

    @pytest.mark.parametrize("rubbish", [0, -1, 1.5, "10", True])
    def test_rubbish_max_tokens_is_refused(self, rubbish: Any) -> None:
        """Only a whole number bounds an answer."""
        assert max_output_tokens({}) is None
        assert max_output_tokens({"max_tokens": 7}) == 7
        with pytest.raises(UsageError, match="expected max_tokens"):
            max_output_tokens({"max_tokens": rubbish})

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_a_limit_in_the_body_is_one(self, name: str) -> None:
        """Under either name, above the setting; what means no limit to a server is none."""
        assert max_output_tokens({"extra_body": {name: 100}}) == 100
        assert max_output_tokens({"extra_body": {name: 100}, "max_tokens": 7}) == 100
        assert max_output_tokens({"extra_body": {name: -1}}) is None
        assert max_output_tokens({"extra_body": "x", "max_tokens": 7}) == 7


class TestArithmetic:
    """What an estimate is made of."""

    def test_distinct_prompts_are_counted_once(self) -> None:
        """Duplicates are inputs without tokens."""
        items = [Item(Prompt(text=text)) for text in ("12345678", "1234", "12345678")]
        assert count(items, ECHO) == Counted(inputs=3, prompts=2, input_tokens=3)

    def test_the_length_of_an_answer_and_whence(self) -> None:
        """Given goes before max_tokens, max_tokens before the assumption."""
        bounded = Task(model=MODEL, settings={"max_tokens": 50})
        assert answer_length(ECHO, None) == (256, "assumed")
        assert answer_length(bounded, None) == (50, "max_tokens")
        assert answer_length(bounded, 20) == (20, "given")
        assert answer_length(ECHO, 1000) == (1000, "given")
        with pytest.raises(UsageError, match="at most max_tokens, 50, got: 51"):
            answer_length(bounded, 51)

    @pytest.mark.parametrize(
        ("pace", "seconds", "bound_by"),
        [
            (Pace(concurrency=10, seconds_per_call=2), 20.0, "concurrency"),
            (Pace(rpm=60, concurrency=10, seconds_per_call=2), 100.0, "rpm"),
            (Pace(rpm=60, tpm=600, concurrency=10, seconds_per_call=2), 500.0, "tpm"),
            (Pace(rpm=6000, tpm=1e9, concurrency=1000, seconds_per_call=2), 2.0, "concurrency"),
        ],
    )
    def test_time_is_the_longest_of_the_limits(self, pace: Pace, seconds: float, bound_by: str) -> None:
        """100 calls of 5,000 tokens in all; no batch is faster than one call."""
        assert time_at_limits(100, 5_000, pace) == (seconds, bound_by)

    @pytest.mark.parametrize(
        "limits",
        [
            {"rpm": 0},
            {"rpm": -1},
            {"tpm": float("nan")},
            {"seconds_per_call": float("inf")},
            {"concurrency": 0},
        ],
    )
    def test_rubbish_limits_are_refused(self, limits: dict[str, Any]) -> None:
        """Each names what it expected."""
        with pytest.raises(UsageError, match=f"expected {next(iter(limits))}"):
            Pace(**limits)

    def test_money_is_tokens_at_the_price(self) -> None:
        """Input and output each at their own; without a price there is none."""
        counted = Counted(inputs=5, prompts=4, input_tokens=1_000)
        known = estimate_of(MODEL, counted, Pace(), length=(50, "given"), price=MINI, price_from="given")
        assert (known.output_tokens, known.duplicates) == (200, 1)
        assert known.cost_usd == pytest.approx(0.00027)
        assert estimate_of(MODEL, counted, Pace(), length=(50, "given"), price=None).cost_usd is None

    @pytest.mark.parametrize(
        ("nanos", "few"), [(0, 0), (123, 123), (123_456, 123_500), (98_765_432_100, 98_770_000_000)]
    )
    def test_an_estimate_has_four_digits(self, nanos: int, few: int) -> None:
        """More would look like knowledge."""
        assert rounded(nanos) == few


class TestEstimate:
    """`lbr.estimate` and `lbr estimate`."""

    async def test_nobody_named(self, cli: Cli) -> None:
        """Where no model is named, only what an estimate takes is: no function."""
        words = "got: nobody; name one of a model (--model), such as offline:echo, or MODEL"
        with pytest.raises(UsageError, match=re.escape(words.replace("--model", "model=…"))):
            await lbr.estimate(["a"])
        done = cli("estimate", "-", stdin="a\n", check=False)
        assert (done.returncode, words in done.stderr) == (2, True)

    async def test_neither_key_nor_database_is_needed(self, in_folder: Path) -> None:
        """OpenRouter's models and those of packages that are not installed are estimated all the same."""
        for model in (
            "google/gemini-2.5-flash",
            "anthropic:claude-sonnet-4-5",
            "mistral:mistral-large-latest",
        ):
            found = await lbr.estimate(["a", "b", "a"], model=model)
            assert (found.inputs, found.prompts, found.duplicates) == (3, 2, 1)
            assert found.price_from == "table"
            assert found.cost_usd is not None
        assert list(in_folder.iterdir()) == []

    async def test_it_counts_what_enqueue_counts(self, in_folder: Path) -> None:
        """Files, templates, ids and duplicates are read in the same way."""
        (in_folder / "in.jsonl").write_text(
            '{"id": 1, "city": "Oslo"}\n{"id": 2, "city": "Rome"}\n{"id": 3, "city": "Oslo"}\n'
        )
        how: dict[str, Any] = {"model": "offline:echo", "template": "Where is {{ city }}?"}
        found = await lbr.estimate(Path("in.jsonl"), **how)
        counts = (await lbr.enqueue(Path("in.jsonl"), **how)).counts
        assert (found.inputs, found.prompts, found.duplicates) == (
            counts.inputs,
            counts.new,
            counts.duplicate,
        )
        assert found.input_tokens == 2 * tokens_of(len("Where is Oslo?"))

    async def test_bad_input_is_told_with_file_and_line(self, in_folder: Path) -> None:
        """As by enqueue."""
        (in_folder / "in.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
        with pytest.raises(InputError, match=r"in\.jsonl, line 2"):
            await lbr.estimate(Path("in.jsonl"), model=MODEL)
        with pytest.raises(InputError, match="at least one input"):
            await lbr.estimate([], model=MODEL)

    @pytest.mark.parametrize(
        "bad",
        [
            {"price": "free"},
            {"output_tokens": 0},
            {"rpm": 0},
            {"model": "gpt"},
            {"model": None},
            {"settings": {"max_tokens": 0}},
            {"schema": {"type": "nonsense"}},
        ],
    )
    async def test_rubbish_is_refused(self, in_folder: Path, bad: dict[str, Any]) -> None:
        """Before an input is read."""
        with pytest.raises(UsageError, match="expected"):
            await lbr.estimate(Path("none.txt") if "price" in bad else ["a"], **{"model": MODEL} | bad)

    @pytest.mark.processes
    def test_json_and_words_tell_the_same(self, tmp_path: Path) -> None:
        """Every number is in the JSON; nothing is written beside the input."""
        (tmp_path / "in.txt").write_text("12345678\n1234\n12345678\n")
        cli = Cli(tmp_path)
        flags = ["estimate", "in.txt", "--model", MODEL, "--price", "in=1,out=2", "--output-tokens", "10"]
        found = json.loads(cli(*flags, "--tpm", "23", "--json").stdout)
        assert (found["inputs"], found["prompts"], found["input_tokens"], found["output_tokens"]) == (
            3,
            2,
            3,
            20,
        )
        assert (found["cost_usd"], found["price"], found["price_from"]) == (
            43e-6,
            {"in": 1.0, "out": 2.0},
            "given",
        )
        assert (found["seconds"], found["bound_by"]) == (60.0, "tpm")
        assert "money: about $0.000043 at in=1,out=2 a million tokens\n" in cli(*flags).stdout
        assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]

    @pytest.mark.processes
    def test_stdin_is_read_once(self, tmp_path: Path) -> None:
        """A stream is counted as it comes."""
        found = Cli(tmp_path)("estimate", "-", "--model", MODEL, "--json", stdin="a\nb\na\n")
        assert json.loads(found.stdout)["prompts"] == 2

    @pytest.mark.processes
    @pytest.mark.parametrize("command", ["estimate in.txt", "enqueue in.txt", "run in.txt -o out.jsonl"])
    def test_a_bad_price_leaves_nothing_behind(self, tmp_path: Path, command: str) -> None:
        """Exit code 2, the form, and no queue."""
        (tmp_path / "in.txt").write_text("a\n")
        done = Cli(tmp_path)(
            *command.split(), "--model", "offline:echo", "--price", "in=1,out=-1", check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "expected a price like in=0.15,out=0.60" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


class TestRuns:
    """A price that is kept with its run, on both databases."""

    async def test_a_price_is_no_part_of_the_task(self, database: Database) -> None:
        """Runs with and without one have the same keys; the later enqueue's price holds, none leaves it."""
        run = await put(database, ["a"])
        assert run.price is None
        again = await runs.open_run(database, runs.RunSpec("r", ECHO, 8, price=MINI))
        assert (again.id, again.price) == (run.id, MINI)
        assert (await reads.find_run(database, "r")).price == MINI
        assert (await runs.open_run(database, runs.RunSpec("r", ECHO, 8))).price == MINI
        dearer = Price(1, 2)
        await runs.open_run(database, runs.RunSpec("r", ECHO, 8, price=dearer))
        assert await reads.prices(database, [run.id]) == {run.id: dearer}
        fresh = await runs.open_run(database, runs.RunSpec("new", ECHO, 8, price=MINI))
        assert (await reads.find_run(database, "new")).price == fresh.price == MINI
        assert KeyMaker(fresh.task).key(Prompt(text="a")) == KeyMaker(run.task).key(Prompt(text="a"))

    async def test_a_cancelled_run_keeps_its_price(self, database: Database) -> None:
        """An enqueue that is refused changes nothing."""
        run = await put(database, ["a"])
        await runs.cancel(database, run)
        with pytest.raises(UsageError, match="cancelled"):
            await runs.open_run(database, runs.RunSpec("r", ECHO, 8, price=MINI))
        assert (await reads.find_run(database, "r")).price is None

    async def test_the_part_of_the_cost_without_answers_is_counted(
        self, database: Database, clock: Clock
    ) -> None:
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
        await settle(database, [good])
        clock.forward(61)
        await queue.reclaim()
        (again,) = await queue.claim(worker, [run.id], 1, lease=60)
        await settle(database, [late])
        await settle(database, [failed(again, paid)])
        counts = (await reads.overview(database, "r")).runs[0].counts
        assert (counts["cost_nanos"], counts["wasted_nanos"]) == (1_034, 1_030)
        tries = (await reads.story(database, run, 0)).tries
        told = [(one.what, one.input_tokens, one.output_tokens, one.cost_nanos) for one in tries]
        assert told == [("crashed", None, None, None), ("stale", 1, 1, 30), ("retried", 7, 3, 1_000)]

    @pytest.mark.parametrize("new", [False, True])
    async def test_a_move_takes_the_price_along(self, db_url: str, tmp_path: Path, new: bool) -> None:
        """Also one that was set after the copy was begun."""
        target_url = f"sqlite:///{tmp_path / 'target.db'}"
        await lbr.enqueue(["a"], run="r", model="offline:echo", price="in=1,out=2", db_url=db_url)
        if new:
            source, target = await open_database(db_url), await open_database(target_url, create=True)
            run = await reads.find_run(source, "r")
            await transfer.open_copy(target, replace(run, price=MINI), shown(db_url))
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
        counts = (await reads.overview(live, "r")).runs[0].counts
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
        await runs.open_run(live, runs.RunSpec("r", run.task, 8, run.fingerprint, dearer))
        await eventually(lambda: worker._runs.served[run.id].price == dearer)
        gate.open = True
        await working
        counts = (await reads.overview(live, "r")).runs[0].counts
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
        line = f"  tokens {story['input_tokens']} in, {story['output_tokens']} out, cost {dollars(story['cost_nanos'])}\n"
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
        assert f"{dollars(sum(costs))} of it for tries that were no answers" in cli("status", "r").stdout
        assert cli("show", "r", "0").stdout.count("cost $") == 3

    async def test_prompt_map_takes_a_price(self, in_folder: Path) -> None:
        """As the command line does; rubbish is refused before anything is written."""
        with pytest.raises(UsageError, match="expected a price"):
            await prompt_map(["a b"], model_name="offline:echo", price="cheap")
        assert list(in_folder.iterdir()) == []
        await prompt_map(["a b"], model_name="offline:echo", price="in=1,out=2")
        (run,) = (await lbr.status()).runs
        assert run.cost_usd == 6_000 / 1e9
