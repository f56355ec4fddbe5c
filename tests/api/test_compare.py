"""Runs side by side: which answers are equal, what they took, and inputs that are not the same."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

import lbr
from lbr.core.errors import Usage
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import Outcome, Reply
from lbr.store.database import opened
from lbr.store.settle import settle
from tests.support import Cli, Queue, put

SCHEMA = {"type": "object", "properties": {"mood": {"type": "string"}, "score": {"type": "number"}}}


async def answer(db_url: str, run: str, answers: dict[str, Any], **options: Any) -> None:
    """Make a run with these answers by prompt; None fails."""

    def say(prompt: str) -> Any:
        if answers[prompt] is None:
            raise lbr.Permanent
        return answers[prompt]

    await lbr.enqueue(list(answers), run=run, function=say, db_url=db_url, **options)
    await lbr.work(run=run, functions=[say], db_url=db_url)


async def test_answers_are_compared_as_values(db_url: str) -> None:
    """JSON by its values, text without the space around it, and only inputs that all have answered."""
    same = {"a": (" yes\n", "yes"), "b": ('{"x": 1, "y": [1.0]}', '{"y":[1],"x":1.0}'), "c": ("{no json", "{no json ")}
    differ = {"d": ("yes", "Yes"), "e": ("[1]", "[true]"), "f": ("1", "1.0"), "g": ('{"x":null}', "{}")}
    other: dict[str, tuple[Any, Any]] = {"h": ("yes", None), "i": (None, None), "j": (None, "yes")}
    for place, name in enumerate(("one", "two")):
        await answer(db_url, name, {prompt: pair[place] for prompt, pair in (same | differ | other).items()})
    found = await lbr.compare(["one", "two"], rows=3, db_url=db_url)
    assert (found.inputs, found.answered, found.equal, found.agreement) == (10, 7, 3, 3 / 7)
    assert [(run["answered"], run["failed"], run["unfinished"]) for run in found.runs] == [(8, 2, 0), (8, 2, 0)]
    assert (found.fields, found.pairs) == ({}, [])
    expected = [
        {"idx": 3 + n, "prompt": prompt, "answers": dict(zip(("one", "two"), differ[prompt], strict=True))}
        for n, prompt in enumerate("def")
    ]
    assert found.differing == expected
    assert json.loads(json.dumps(found.to_dict()))["differing"] == expected


async def test_three_runs_agree_by_pair_and_by_field(db_url: str) -> None:
    """Each pair over the inputs that both have answered, each field over those that all have."""
    moods = {"one": "ggb", "two": "gbb", "three": "gg-"}
    for name, found in moods.items():
        answers = {str(n): None if mood == "-" else {"mood": mood, "score": 1.0} for n, mood in enumerate(found)}
        await answer(db_url, name, answers, schema=SCHEMA)
    compared = await lbr.compare(["one", "two", "three"], db_url=db_url)
    assert (compared.answered, compared.equal) == (2, 1)
    assert compared.fields == {"mood": 0.5, "score": 1.0}
    assert [(*pair["runs"], pair["answered"], pair["agreement"]) for pair in compared.pairs] == [
        ("one", "two", 3, 2 / 3),
        ("one", "three", 2, 1.0),
        ("two", "three", 2, 0.5),
    ]
    await answer(db_url, "text", {"0": "x", "1": "y", "2": None})
    assert (await lbr.compare(["one", "text"], db_url=db_url)).fields == {}


async def test_what_runs_took_is_counted_once_for_each_distinct_input(db_url: str) -> None:
    """Means of what is known, the cost of all, the latencies; a run that has not finished is compared as far as it is."""
    async with opened(db_url, create=True) as database:
        run = await put(database, [*map(str, range(100)), *["0"] * 50], reuse=False)
        await put(database, [*map(str, range(100)), *["0"] * 50], name="waiting", reuse=False)
        queue = Queue(database)
        worker = await queue.register(host="h", pid=1, concurrency=100)
        claims = await queue.claim(worker, [run.id], 100, lease=60)
        for claim in claims:
            n = int(claim.prompt.text or "")
            usage = Usage(10 * n, None if n else 7, 10**6 if n < 90 else None)
            outcome = Outcome(Reply("x", usage), None, n + 1)
            await database.write(settle, [decide(claim, outcome, RetryPolicy(), Random(1))])
    found = await lbr.compare(["r", "waiting"], db_url=db_url)
    assert (found.inputs, found.answered, found.agreement, found.differing) == (150, 0, None, [])
    assert found.runs[0] == {
        "run": "r",
        "answerer": "offline:echo",
        "answered": 150,
        "failed": 0,
        "unfinished": 0,
        "input_tokens": 495.0,
        "output_tokens": 7.0,
        "cost_usd": 0.09,
        "unpriced": 10,
        "p50_ms": 50,
        "p95_ms": 95,
    }
    assert list(found.runs[1].values())[2:] == [0, 0, 150, None, None, None, 0, None, None]


async def test_samples_are_compared_one_by_one(db_url: str) -> None:
    """The first answer of an input with the first, the second with the second; rows name the sample."""
    for name, last in (("one", "x"), ("two", "y")):
        count = iter(["same", last])

        def say(prompt: str, answers: Any = count) -> str:
            return str(next(answers))

        await lbr.enqueue(["a"], run=name, function=say, version=name, samples=2, db_url=db_url)
        await lbr.work(run=name, functions=[say], concurrency=1, db_url=db_url)
    found = await lbr.compare(["one", "two"], db_url=db_url)
    assert (found.inputs, found.equal) == (2, 1)
    assert found.differing == [{"idx": 0, "sample": 1, "prompt": "a", "answers": {"one": "x", "two": "y"}}]


@pytest.mark.parametrize(
    ("prompts", "difference"),
    [
        ([f"p{n}" for n in range(399)], "input 399 is 'p399' in the first and missing in the second"),
        ([f"p{n}" for n in range(401)], "input 400 is missing in the first and 'p400' in the second"),
        ([f"p{n}" for n in (*range(300), 301, 300)], "input 300 is 'p300' in the first and 'p301' in the second"),
        ([{"messages": [{"role": "user", "content": "p0"}]}], "input 0 is 'p0' in the first and '[{"),
    ],
)
async def test_other_inputs_are_refused_with_the_first_difference(
    db_url: str, prompts: list[Any], difference: str
) -> None:
    """They are found wherever pages end."""
    await lbr.enqueue([f"p{n}" for n in range(400)], run="one", model="offline:echo", db_url=db_url)
    await lbr.enqueue([f"p{n}" for n in range(400)], run="same", model="offline:echo", db_url=db_url)
    await lbr.enqueue(prompts, run="two", model="offline:echo", db_url=db_url)
    with pytest.raises(lbr.UsageError, match="runs one and two have different inputs: ") as refused:
        await lbr.compare(["one", "same", "two"], db_url=db_url)
    assert difference in str(refused.value)


async def test_what_cannot_be_compared_is_refused(db_url: str) -> None:
    """One run, or one that is not there, or a number of rows below zero."""
    await lbr.enqueue(["a"], run="one", model="offline:echo", db_url=db_url)
    for runs in ([], ["one"], ["one", "one"]):
        with pytest.raises(lbr.UsageError, match="expected two or more runs to compare, got: "):
            await lbr.compare(runs, db_url=db_url)
    with pytest.raises(lbr.UsageError, match="expected runs to be a list, got: 'one'"):
        await lbr.compare("one", db_url=db_url)
    with pytest.raises(lbr.UsageError, match="expected rows to be at least 0, got: -1"):
        await lbr.compare(["one", "two"], rows=-1, db_url=db_url)
    with pytest.raises(lbr.RunNotFoundError, match="two"):
        await lbr.compare(["one", "two"], db_url=db_url)


def test_the_command_prints_a_table(cli: Cli) -> None:
    """Then the shares and the rows, on single lines without control characters; with --json the numbers."""
    (cli.folder / "in.jsonl").write_text('{"prompt": "a\\u001b[31m\\nb"}\n{"prompt": "c"}\n')
    (cli.folder / "say.py").write_text(
        "import lbr\n"
        "def one(prompt): return lbr.Answer(prompt[0] * 100, input_tokens=1500, cost_usd=0.5)\n"
        "def two(prompt): return lbr.Answer(prompt[0], cost_usd=0.25 if prompt == 'c' else None)\n"
    )
    for name in ("one", "two"):
        cli("run", "in.jsonl", "--run", name, "-o", f"{name}.csv", "--function", f"say:{name}")
    cli("enqueue", "in.jsonl", "--run", "idle", "--model", "offline:echo")
    done = cli("compare", "one", "two", "--rows", "1")
    lines = done.stdout.splitlines()
    assert done.stderr == "lbr: run two: the cost of 1 answer is not known, and not counted\n"
    assert lines[0].split() == [
        "run",
        "model",
        "or",
        "function",
        "answered",
        "failed",
        "tokens",
        "in",
        "tokens",
        "out",
        "cost",
        "p50",
        "p95",
    ]
    assert lines[1].split()[:-4] == ["one", "function:say:one", "2", "0", "1,500.0", "-", "$1.00"]
    assert lines[2].split()[:-4] == ["two", "function:say:two", "2", "0", "-", "-", "$0.25"]
    assert lines[3:] == [
        "inputs 2, answered by all 2, equal answers 0: agreement 0.0%",
        r"input 0: a\x1b[31m\nb",
        f"  one: {'a' * 80}…",
        "  two: a",
    ]
    assert "input" not in cli("compare", "one", "two", "--rows", "0").stdout.split("agreement")[1]
    done = cli("compare", "one", "idle", "two", "--json")
    found = json.loads(done.stdout)
    assert (found["answered"], found["agreement"], len(found["pairs"])) == (0, None, 3)
    assert "lbr: run idle has not finished: 2 inputs may still be answered\n" in done.stderr
    assert cli("compare", "one", check=False).returncode == 2
