"""What a batch would take: the arithmetic, `lbr.estimate` and `lbr estimate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lbr
from lbr.api.estimate import answer_length, count_inputs, rounded, time_at_limits
from lbr.core.errors import InputError, UsageError
from lbr.core.pricing import tokens_of
from lbr.core.types import Item, Prompt, Task
from tests.support import ECHO, Cli

MODEL = "openai-chat:gpt-4o-mini"


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, without a model or key."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "OPENROUTER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_distinct_prompts_are_counted_once() -> None:
    """Duplicates are inputs without tokens."""
    items = [Item(Prompt(text=text)) for text in ("12345678", "1234", "12345678")]
    assert count_inputs(items, ECHO) == (3, 2, 3, ["12345678", "1234"])


def test_the_length_of_an_answer_and_its_source() -> None:
    """A given length goes before max_tokens, max_tokens before the assumption."""
    bounded = Task(model=MODEL, settings={"max_tokens": 50})
    assert answer_length(ECHO, None) == (256, "assumed")
    assert answer_length(bounded, None) == (50, "max_tokens")
    assert answer_length(bounded, 20) == (20, "given")
    assert answer_length(ECHO, 1000) == (1000, "given")
    with pytest.raises(UsageError, match="at most max_tokens, 50, got: 51"):
        answer_length(bounded, 51)


@pytest.mark.parametrize(
    ("rpm", "tpm", "concurrency", "seconds", "bound_by"),
    [
        (None, None, 10, 20.0, "concurrency"),
        (60, None, 10, 100.0, "rpm"),
        (60, 600, 10, 500.0, "tpm"),
        (6000, 1e9, 1000, 2.0, "concurrency"),
    ],
)
def test_time_is_the_longest_of_the_limits(
    rpm: float | None, tpm: float | None, concurrency: int, seconds: float, bound_by: str
) -> None:
    """100 calls of 5,000 tokens in all; no batch is faster than one call."""
    limits = {"rpm": rpm, "tpm": tpm, "concurrency": concurrency, "seconds_per_call": 2}
    assert time_at_limits(100, 5_000, limits) == (seconds, bound_by)


@pytest.mark.parametrize(("nanos", "few"), [(0, 0), (123, 123), (123_456, 123_500), (98_765_432_100, 98_770_000_000)])
def test_an_estimate_has_four_digits(nanos: int, few: int) -> None:
    """More would look like knowledge."""
    assert rounded(nanos) == few


@pytest.mark.parametrize(
    "limits",
    [{"rpm": 0}, {"rpm": -1}, {"tpm": float("nan")}, {"seconds_per_call": float("inf")}, {"concurrency": 0}],
)
async def test_limits_out_of_range_are_refused(limits: dict[str, Any], in_folder: Path) -> None:
    """The error names the parameter."""
    with pytest.raises(UsageError, match=f"expected {next(iter(limits))}"):
        await lbr.estimate(["a"], model=MODEL, **limits)


async def test_money_is_tokens_at_the_price(in_folder: Path) -> None:
    """Input and output each have their own; without a price there is none."""
    how: dict[str, Any] = {"output_tokens": 50, "price": "in=0.15,out=0.60"}
    known = await lbr.estimate(["a" * 2_000, "b" * 2_000, "b" * 2_000], model=MODEL, **how)
    assert (known.input_tokens, known.output_tokens, known.duplicates) == (1_000, 100, 1)
    assert (round(known.cost_usd or 0, 9), known.price_from) == (0.00021, "given")
    unknown = await lbr.estimate(["a"], model="openai-chat:house-model")
    assert (unknown.cost_usd, unknown.price, unknown.price_from) == (None, None, None)


async def test_nobody_named(cli: Cli) -> None:
    """Where no model is named, only what an estimate takes is: no function."""
    words = "no model given. Use --model (e.g. openai-chat:gpt-4o-mini), or set MODEL"
    with pytest.raises(UsageError, match=re.escape(words.replace("--model", "model=…"))):
        await lbr.estimate(["a"])
    done = cli("estimate", "-", stdin="a\n", check=False)
    assert (done.returncode, words in done.stderr) == (2, True)


async def test_neither_key_nor_database_is_needed(in_folder: Path) -> None:
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


async def test_it_counts_what_enqueue_counts(in_folder: Path) -> None:
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


async def test_bad_input_is_told_with_file_and_line(in_folder: Path) -> None:
    """As by enqueue."""
    (in_folder / "in.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(InputError, match=r"in\.jsonl, line 2"):
        await lbr.estimate(Path("in.jsonl"), model=MODEL)
    with pytest.raises(InputError, match="there is no input"):
        await lbr.estimate([], model=MODEL)


async def test_bad_rows_are_counted_and_prompts_shown_on_request(in_folder: Path) -> None:
    """A dry run from Python: the first distinct prompts, and what an enqueue would say about the bad rows."""
    lines = ['{"prompt": "a"}', '{"prompt": ""}', '{"promt": "b"}', '{"messages": [{"role": "user", "content": "c"}]}']
    (in_folder / "in.jsonl").write_text("\n".join([*lines, *lines[3:], '{"prompt": "d"}', '{"prompt": "e"}']))
    found = await lbr.estimate(Path("in.jsonl"), model=MODEL, count_bad=True)
    assert (found.inputs, found.prompts, found.duplicates, found.empty, found.bad) == (5, 4, 1, 1, 1)
    assert found.examples == ["a", [{"role": "user", "content": "c"}], "d"]
    assert (found.refusal or "").startswith("in.jsonl, line 2: prompt is empty (and 1 more bad row)")
    some = await lbr.estimate(["a", "b", "c"], model=MODEL, limit=2)
    assert (some.examples, some.refusal) == (["a", "b"], None)


async def test_a_functions_prompts_are_counted(in_folder: Path) -> None:
    """What it will answer, and what that costs, nobody knows; unless its author does."""

    def answer(text: str) -> str:
        raise AssertionError(text)

    found = await lbr.estimate(["a", "b", "a"], function=answer, price="in=1,out=1")
    assert (found.prompts, found.output_tokens_from, found.cost_usd) == (2, "unknown", None)
    assert (await lbr.estimate(["a"], function=answer, price="in=1,out=1", output_tokens=9)).cost_usd == 10e-6


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
async def test_rubbish_is_refused(in_folder: Path, bad: dict[str, Any]) -> None:
    """Before an input is read."""
    with pytest.raises(UsageError, match="expected|no model given|the JSON schema is not valid"):
        await lbr.estimate(Path("none.txt") if "price" in bad else ["a"], **{"model": MODEL} | bad)


@pytest.mark.processes
def test_json_and_words_tell_the_same(tmp_path: Path) -> None:
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
    assert "cost: about $0.000043 at in=1,out=2 per million tokens\n" in cli(*flags).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.processes
def test_stdin_is_read_once(tmp_path: Path) -> None:
    """A stream is counted as it comes."""
    found = Cli(tmp_path)("estimate", "-", "--model", MODEL, "--json", stdin="a\nb\na\n")
    assert json.loads(found.stdout)["prompts"] == 2


@pytest.mark.processes
@pytest.mark.parametrize("command", ["estimate in.txt", "enqueue in.txt", "run in.txt -o out.jsonl"])
def test_a_bad_price_leaves_nothing_behind(tmp_path: Path, command: str) -> None:
    """Exit code 2, the form, and no queue."""
    (tmp_path / "in.txt").write_text("a\n")
    done = Cli(tmp_path)(*command.split(), "--model", "offline:echo", "--price", "in=1,out=-1", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a price like in=0.15,out=0.60" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
