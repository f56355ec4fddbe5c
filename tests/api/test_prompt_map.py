"""prompt_map, as the design's section on Python describes it: against a function, offline:echo and an HTTP server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from pydantic import BaseModel

import lbr
from lbr import DB_URL_DEFAULT, LbrError, Pause, Permanent, export_jsonl, prompt_map, prompt_map_sync
from lbr.core.errors import InputError, OutputError, UsageError
from lbr.store import results_db
from tests.support import is_postgresql
from tests.support.hearing import Hearing
from tests.support.llmock_server import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

CITIES = ["Oslo", "Bergen", "Oslo", "Narvik", "Bergen"]


class City(BaseModel):
    """A structured answer."""

    name: str
    people: int


@dataclass
class Calls:
    """Counts calls; its values are not part of a function's identity."""

    made: Counter[str] = field(default_factory=Counter, compare=False)
    broken: set[str] = field(default_factory=set, compare=False)


@pytest.fixture
def calls() -> Calls:
    """Return a fresh counter."""
    return Calls()


@pytest.fixture(scope="module")
def llmock() -> Iterator[str]:
    """Start a chat server that others wrote."""
    with serve("--response-style", "echo") as url:
        yield url


def rows_of(path: str, query: str = "SELECT idx, prompt, status, result FROM results ORDER BY idx") -> list[Any]:
    """Read a results database as anybody would."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def shout(prompt: str) -> str:
    """Answer in capitals."""
    return prompt.upper()


async def test_unique_rows_by_first_occurrence() -> None:
    """By default there is a row for each distinct prompt, in order of first occurrence, with these fields."""
    rows = await prompt_map(CITIES, shout)
    assert [list(row) for row in rows] == [["idx", "key", "prompt", "status", "result", "error"]] * 3
    assert [(r["idx"], r["prompt"], r["status"], r["result"], r["error"]) for r in rows] == [
        (0, "Oslo", "done", "OSLO", None),
        (1, "Bergen", "done", "BERGEN", None),
        (3, "Narvik", "done", "NARVIK", None),
    ]
    assert DB_URL_DEFAULT == "sqlite+aiosqlite:///runs.db"
    assert Path("runs.db").exists()


async def test_a_price_is_that_of_the_run() -> None:
    """What a million tokens cost, as for `enqueue`."""
    await prompt_map(["a b"], model_name="offline:echo", price="in=1,out=2")
    assert (await lbr.status()).runs[0].cost_usd == 6_000 / 1e9


async def test_original_rows_in_order() -> None:
    """The original shape has a row for every prompt; equal ones share their answer and key."""
    rows = await prompt_map(CITIES, shout, output_shape="original")
    assert [row["result"] for row in rows] == [city.upper() for city in CITIES]
    assert len({row["key"] for row in rows}) == 3


async def test_what_did_not_finish_is_missing() -> None:
    """A prompt without an answer has status missing, result None and the error beside it."""

    async def picky(prompt: str) -> str:
        if prompt == "Bergen":
            raise Permanent("it rains")
        return prompt

    rows = await prompt_map(CITIES, picky, output_shape="original")
    assert [(r["status"], r["result"], r["error"]) for r in rows] == [
        ("done", "Oslo", None),
        ("missing", None, "it rains"),
        ("done", "Oslo", None),
        ("done", "Narvik", None),
        ("missing", None, "it rains"),
    ]


async def test_dtypes() -> None:
    """Every return_dtype carries the same answers in its own form."""
    assert await prompt_map(CITIES, shout, return_dtype="list[str]") == ["OSLO", "BERGEN", "NARVIK"]
    pairs = await prompt_map(CITIES, shout, return_dtype="list[tuple[str,str]]", output_shape="original")
    assert pairs == [(city, city.upper()) for city in CITIES]
    frame = await prompt_map(CITIES, shout, return_dtype="polars")
    assert isinstance(frame, pl.DataFrame)
    assert frame.columns == ["prompt", "result", "status", "error"]
    assert frame["result"].to_list() == ["OSLO", "BERGEN", "NARVIK"]
    assert frame.schema["error"] == pl.String


async def test_frame_has_the_columns_of_the_prompts() -> None:
    """The prompts' own columns come first, each of its type; ids are text unless all are numbers."""
    records: list[Any] = [
        {"id": 7, "prompt": "a", "topic": "x", "score": 1.5, "n": 1, "ok": True},
        {"messages": [{"role": "user", "content": "b"}], "tags": [None, "ä"], "score": 2},
        "c",
    ]
    frame = await prompt_map(records, model_name="offline:echo", return_dtype="polars")
    plain = await prompt_map([{"prompt": "c", "id": "x"}, *records], model_name="offline:echo", return_dtype="polars")
    types = {"id": pl.Int64, "prompt": pl.String, "topic": pl.String, "score": pl.Float64, "n": pl.Int64}
    types |= {"ok": pl.Boolean, **dict.fromkeys(("tags", "result", "status", "error"), pl.String)}
    assert dict(frame.schema) == types
    assert frame.rows() == [
        (7, "a", "x", 1.5, 1, True, None, "a", "done", None),
        (None, '[{"content":"b","role":"user"}]', None, 2.0, None, None, '[null,"ä"]', "b", "done", None),
        (None, "c", None, None, None, None, None, "c", "done", None),
    ]
    assert plain["id"].to_list() == ["x", "7", None]


async def test_fields_of_a_result_type_are_columns_of_the_frame() -> None:
    """Each field has its type, and `unnest=False` keeps the answer whole."""

    class City(BaseModel):
        name: str
        people: int | None

    given: dict[str, Any] = {"model_name": "offline:echo", "result_type": City, "return_dtype": "polars"}
    frame = await prompt_map(["a"], **given)
    assert dict(frame.schema) == {
        "prompt": pl.String,
        "name": pl.String,
        "people": pl.Int64,
        "status": pl.String,
        "error": pl.String,
    }
    (whole,) = (await prompt_map(["a"], **given, unnest=False))["result"]
    assert json.loads(whole) == {"name": frame["name"][0], "people": frame["people"][0]}


@pytest.mark.parametrize(("error", "paused"), [(Permanent, False), (Pause, True)])
async def test_a_failure_without_a_reason(error: type[Exception], paused: bool) -> None:
    """Permanent and Pause need no text, with or without parentheses, and mean what they mean with one."""
    for number, raised in enumerate((error, error())):

        async def fails(prompt: str, raised: Any = raised) -> str:
            raise raised

        (row,) = await prompt_map(["a"], fails, version="1", run=f"r{number}", progress_every=None)
        assert (row["status"], row["error"]) == ("missing", "the function gave no reason")
        (run,) = (await lbr.status(f"r{number}")).runs
        assert (run.state == "paused", run.failed) == (paused, 0 if paused else 1)
        assert run.pause_cause == ("account" if paused else None)
        assert run.pause_message == ("Pause: the function gave no reason" if paused else None)


async def test_rerun_calls_nothing_again(calls: Calls, db_url: str) -> None:
    """The same call a second time returns the same rows without a call."""

    async def count(prompt: str) -> str:
        calls.made[prompt] += 1
        return prompt[::-1]

    first = await prompt_map(CITIES, count, db_url=db_url)
    assert await prompt_map(CITIES, count, db_url=db_url) == first
    assert calls.made == Counter({"Oslo": 1, "Bergen": 1, "Narvik": 1})


async def test_more_prompts_reuse_earlier_answers(calls: Calls, db_url: str) -> None:
    """A longer list only calls for what is new; `fresh` calls for all of it."""

    async def count(prompt: str) -> str:
        calls.made[prompt] += 1
        return prompt

    await prompt_map(["a", "b"], count, db_url=db_url)
    await prompt_map(["a", "b", "c"], count, db_url=db_url)
    assert calls.made == Counter({"a": 1, "b": 1, "c": 1})
    await prompt_map(["a", "b", "c", "d"], count, fresh=True, db_url=db_url)
    assert calls.made == Counter({"a": 2, "b": 2, "c": 2, "d": 1})


async def test_a_sample_is_answered_first(calls: Calls, db_url: str) -> None:
    """The first prompts, or some at random, under a name of their own; the call for all asks the rest."""

    async def count(prompt: str) -> str:
        calls.made[prompt] += 1
        return prompt

    prompts = [f"p{n}" for n in range(9)]
    how: dict[str, Any] = {"db_url": db_url, "return_dtype": "list[str]"}
    assert await prompt_map(prompts, count, limit=2, run="my", **how) == ["p0", "p1"]
    picked = await prompt_map(prompts, count, pick=3, seed=1, run="my", **how)
    assert (len(picked), picked) == (3, sorted(picked))
    assert await prompt_map(prompts, count, run="my", **how) == prompts
    assert {run.run for run in (await lbr.status(db_url=db_url)).runs} == {"my", "my-pick"}
    assert set(calls.made.values()) == {1}
    with pytest.raises(UsageError, match=r"seed=… needs pick=…"):
        await prompt_map(prompts, count, seed=1, **how)


@pytest.mark.parametrize("shape", ["unique", "original"])
async def test_fewer_prompts_get_their_rows_alone(shape: Any, db_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A run that holds more than this call asks gives back what was asked; the results database keeps all of it."""
    given: dict[str, Any] = {"run": "my", "db_url": db_url, "results_db_url": "answers.db"}
    await prompt_map(["a", "b", "a", "c"], shout, output_shape=shape, **given)
    mirrored = rows_of("answers.db")
    expected = ["A", "B", "A"] if shape == "original" else ["A", "B"]
    forms: dict[Any, Any] = {"list[str]": expected, "list[tuple[str,str]]": [(one.lower(), one) for one in expected]}
    for dtype, answer in forms.items():
        assert await prompt_map(["a", "b", "a"], shout, output_shape=shape, return_dtype=dtype, **given) == answer
    rows = await prompt_map(["a", "b", "a"], shout, output_shape=shape, **given)
    assert [(row["idx"], row["result"]) for row in rows] == list(enumerate(expected))
    frame = await prompt_map(["a", "b", "a"], shout, output_shape=shape, return_dtype="polars", **given)
    assert frame["result"].to_list() == expected
    assert "run my holds 4 inputs, this input has 3; the others stay in it" in caplog.messages
    assert rows_of("answers.db") == mirrored
    assert len(mirrored) == (4 if shape == "original" else 3)


async def test_teardown_waits_for_the_whole_run(db_url: str) -> None:
    """What a run holds beside the prompts of this call is not thrown away unanswered."""

    async def picky(prompt: str) -> str:
        if prompt == "b":
            raise Permanent("no")
        return prompt

    given: dict[str, Any] = {"run": "my", "db_url": db_url, "results_db_url": "answers.db"}
    await prompt_map(["a", "b"], picky, **given)
    rows = await prompt_map(["a"], picky, teardown=True, **given)
    assert [row["status"] for row in rows] == ["done"]
    assert [run.run for run in (await lbr.status(db_url=db_url)).runs] == ["my"]
    assert len(rows_of("answers.db")) == 2


async def test_rerun_tries_failures_again(calls: Calls, db_url: str) -> None:
    """What failed in one call is tried again in the next, and only that."""
    calls.broken = {"b"}

    async def flaky(prompt: str) -> str:
        calls.made[prompt] += 1
        if prompt in calls.broken:
            raise Permanent("down")
        return prompt

    assert [r["status"] for r in await prompt_map(["a", "b"], flaky, db_url=db_url)] == ["done", "missing"]
    assert (await prompt_map(["a", "b"], flaky, retry_failed=False, db_url=db_url))[1]["error"] == "down"
    calls.broken = set()
    assert [r["status"] for r in await prompt_map(["a", "b"], flaky, db_url=db_url)] == ["done", "done"]
    assert calls.made == Counter({"a": 1, "b": 2})


async def test_interrupted_call_resumes(calls: Calls, db_url: str) -> None:
    """A cancelled call keeps what was answered; the same call again finishes the rest, each prompt once."""
    reached, gate = asyncio.Event(), asyncio.Event()

    async def gated(prompt: str) -> str:
        calls.made[prompt] += 1
        if len(calls.made) > 10 and not gate.is_set():
            reached.set()
            await gate.wait()
        return prompt

    prompts = [f"p{n}" for n in range(30)]
    task = asyncio.create_task(prompt_map(prompts, gated, version="1", concurrency=1, db_url=db_url))
    await asyncio.wait_for(reached.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    (before,) = (await lbr.status(db_url=db_url)).runs
    assert (before.done, before.pending, before.inflight) == (10, 20, 0)
    rows = await prompt_map(prompts, gated, version="1", concurrency=1, db_url=db_url)
    assert [row["result"] for row in rows] == prompts
    assert calls.made == Counter(prompts) + Counter({"p10": 1})


async def test_rerun_after_a_pause_goes_on(calls: Calls, db_url: str) -> None:
    """A run that paused for its account is taken up again by the same call."""
    calls.broken = {"everything"}

    async def paid(prompt: str) -> str:
        calls.made[prompt] += 1
        if calls.broken:
            raise Pause("no credit")
        return prompt

    rows = await prompt_map(["a", "b"], paid, concurrency=1, db_url=db_url)
    assert [(row["status"], row["error"]) for row in rows] == [
        ("missing", "no credit"),
        ("missing", "the run is paused: Pause: no credit"),
    ]
    calls.broken = set()
    assert [row["status"] for row in await prompt_map(["a", "b"], paid, db_url=db_url)] == ["done", "done"]
    assert calls.made == Counter({"a": 2, "b": 1})


async def test_another_model_is_other_work(db_url: str) -> None:
    """The same prompts with another setting are other jobs, in a run of their own."""
    first = await prompt_map(["a"], model_name="offline:echo", db_url=db_url)
    second = await prompt_map(["a"], model_name="offline:echo", settings={"seed": 7}, db_url=db_url)
    assert first[0]["key"] != second[0]["key"]
    assert len((await lbr.status(db_url=db_url)).runs) == 2


async def test_offline_model_with_result_type() -> None:
    """With a result type each result is a JSON string of it, from the offline model too."""
    rows = await prompt_map(["Oslo", "Bergen"], model_name="offline:echo", result_type=City)
    assert [City.model_validate_json(row["result"]).name for row in rows] == ["Oslo", "Bergen"]


async def test_function_with_result_type(calls: Calls) -> None:
    """A function's dict or model is validated; what does not fit is asked for again, then missing."""

    async def structured(prompt: str) -> Any:
        calls.made[prompt] += 1
        return City(name=prompt, people=3) if prompt == "Oslo" else {"name": prompt}

    rows = await prompt_map(["Oslo", "Bergen"], structured, result_type=City)
    assert json.loads(rows[0]["result"]) == {"name": "Oslo", "people": 3}
    assert (rows[1]["status"], rows[1]["result"]) == ("missing", None)
    assert "people" in rows[1]["error"]
    assert calls.made == Counter({"Oslo": 1, "Bergen": 3})


async def test_http_server(llmock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real chat server answers through pydantic-ai, plain and structured."""
    monkeypatch.setenv("OPENAI_BASE_URL", llmock)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    rows = await prompt_map(CITIES, model_name="openai-chat:gpt-4o-mini", output_shape="original")
    assert [row["status"] for row in rows] == ["done"] * 5
    assert all(city in row["result"] for city, row in zip(CITIES, rows, strict=True))
    typed = await prompt_map(["Oslo"], model_name="openai-chat:gpt-4o-mini", result_type=City)
    City.model_validate_json(typed[0]["result"])
    (run, _) = (await lbr.status()).runs
    assert run.input_tokens > 0
    assert run.output_tokens > 0


@pytest.mark.parametrize("way", ["arguments", "environment", "file"])
async def test_openrouter(way: str, llmock: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenRouter is named by arguments, by the environment or by a `.env` file; the key is stored nowhere."""
    key = "sk-or-v1-0123456789abcdef"
    monkeypatch.setenv("OPENROUTER_BASE_URL", llmock)
    arguments: dict[str, Any] = {}
    if way == "arguments":
        arguments = {"model_name": "openai/gpt-4o-mini", "openrouter_api_key": key}
    elif way == "environment":
        monkeypatch.setenv("MODEL", "openai/gpt-4o-mini")
        monkeypatch.setenv("OPENROUTER_API_KEY", key)
    else:
        (tmp_path / ".env").write_text(f"MODEL=openai/gpt-4o-mini\nOPENROUTER_API_KEY={key}\n")
    rows = await prompt_map(["Oslo"], **arguments)
    assert rows[0]["status"] == "done"
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("runs*"))
    assert key.encode() not in stored
    assert (await lbr.status()).runs[0].answerer == "openrouter:openai/gpt-4o-mini"


async def test_nobody_to_answer_is_one_clear_error() -> None:
    """Without a worker, a model or MODEL, the error names the three ways."""
    with pytest.raises(LbrError, match=r"no model given.*model_name=.*worker=.*MODEL and OPENROUTER_API_KEY"):
        await prompt_map(["a"])
    with pytest.raises(LbrError, match="OPENROUTER_API_KEY"):
        await prompt_map(["a"], model_name="google/gemini-flash")
    assert not Path("runs.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"concurrency": 0}, "concurrency to be a whole number from 1 to 10000, got: 0"),
        ({"lease": -1}, "lease"),
        ({"output_shape": "odd"}, "output_shape to be one of original, unique, got: 'odd'"),
        ({"return_dtype": "dict"}, "return_dtype"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"price": "cheap"}, "expected a price"),
        ({"run": ""}, "run name"),
        ({"run": " x"}, "run name"),
        ({"result_type": 3}, "3"),
        ({"db_url": "mysql://u:p@h/d"}, "a mysql URL"),
        ({"db_url": "a\0b.db"}, "expected db_url to be a name that a file can have"),
        ({"model_name": "offline:echo"}, "both"),
    ],
)
async def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    """A wrong argument is refused with what was expected and what came; nothing is written."""
    with pytest.raises(LbrError, match=words):
        await prompt_map(["a"], shout, **arguments)
    assert not Path("runs.db").exists()


@pytest.mark.parametrize("prompts", [[""], ["a", "  "], [3], "a string", None, 7])
async def test_wrong_prompts(prompts: Any) -> None:
    """Empty or wrong prompts are refused by number; nothing is written."""
    with pytest.raises(LbrError, match="expected|line [12]: prompt is empty"):
        await prompt_map(prompts, shout)
    assert not Path("runs.db").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1}, "field 'of mine' cannot be written as JSON: Type is not JSON serializable: set"),
        (b"x", "Type is not JSON serializable: bytes; convert or remove it"),
        (2**70, "Integer exceeds 64-bit range"),
        ({1: "one"}, "Dict key must be str"),
        ("\ud800", "str is not valid UTF-8: surrogates not allowed"),
        (json.loads("[" * 300 + "]" * 300), "field 'of mine' cannot be written as JSON: Recursion limit"),
    ],
)
async def test_fields_that_no_row_can_hold(value: Any, words: str) -> None:
    """What Python can say and a row cannot is refused with what is wrong with it; nothing is written."""
    with pytest.raises(LbrError, match=f"^prompts, line 2: .*{words}"):
        await prompt_map(["a", {"prompt": "b", "of mine": value}], shout)
    assert not Path("runs.db").exists()


@pytest.mark.parametrize(
    ("record", "field", "got"),
    [
        ({"score": math.inf}, "score", "inf"),
        ({"of mine": {"scores": [1.0, -math.inf]}}, "of mine.scores[1]", "-inf"),
        ({"pair": (None, math.inf)}, "pair[1]", "inf"),
    ],
)
async def test_numbers_that_json_has_not(record: dict[str, Any], field: str, got: str) -> None:
    """Infinity would become null, and come back as that; the field and the prompt are named."""
    words = f"a field cannot be written as JSON: {field} is {got}; convert or remove it"
    for asking in (
        partial(prompt_map, ["a", {"prompt": "b"} | record], shout),
        partial(lbr.enqueue, ["a", {"prompt": "b"} | record], run="r", function=shout),
    ):
        with pytest.raises(InputError, match=f"^prompts, line 2: {re.escape(words)}$"):
            await asking()
    for settings in ({"temperature": math.nan}, {"extra_body": {"x": [math.inf]}}):
        with pytest.raises(UsageError, match=r"expected settings\.(temperature|extra_body\.x\[0\]) to be a JSON"):
            await prompt_map(["a"], model_name="offline:echo", settings=settings)
    assert not Path("runs.db").exists()
    rows = await prompt_map([{"prompt": "a", "score": None, "least": 5e-324, "most": 1.7e308}], shout)
    assert rows[0]["metadata"] == {"score": None, "least": 5e-324, "most": 1.7e308}


async def test_a_record_without_a_value_for_the_template() -> None:
    """None is not written into a prompt that is paid for; a condition in the template says what stands for it."""
    records: list[Any] = [{"topic": "rivers"}, {"topic": None}]
    with pytest.raises(InputError, match="^prompts, line 2: every field that the template shows is empty: 'topic'"):
        await prompt_map(records, shout, template="About {{ topic }}")
    assert not Path("runs.db").exists()
    rows = await prompt_map(records, shout, template="About {{ topic or 'lakes' }}", return_dtype="list[str]")
    assert rows == ["ABOUT RIVERS", "ABOUT LAKES"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://u:p@h/d", "expected results_db_url to be a path.*a mysql URL"),
        ("postgresql://u:secret@h/d", "expected results_db_url to name a file, got: a PostgreSQL URL;"),
        ("a\0b.db", r"expected results_db_url to be a name that a file can have, got: 'a\\x00b.db'"),
        ("\ud800.db", r"expected results_db_url to be a name that a file can have, got: '\\ud800.db'"),
        ("nowhere/r.db", "expected a folder for the database"),
        (".", "expected results_db_url to name a file, got a directory"),
        ("queue.db", "expected a results database of its own, got: the queue"),
        ("other.db", "one with other columns"),
        ("notes.txt", "the file is not a SQLite database"),
    ],
)
async def test_wrong_place_for_results_is_told_before_a_call(url: str, words: str) -> None:
    """Where the answers cannot be mirrored to is found out before any of them is paid for; nothing is written."""
    Path("notes.txt").write_text("mine\n" * 99, encoding="utf-8")
    with closing(sqlite3.connect("other.db")) as other, other:
        other.execute("CREATE TABLE results (mine)")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(LbrError, match=words) as caught:
        await prompt_map(["a"], shout, db_url="queue.db", results_db_url=url)
    assert "secret" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


async def test_a_place_for_results_that_goes_away_does_not_cost_the_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows are returned though the folder for the results was removed meanwhile; the caller is told."""
    folder = Path("there")
    folder.mkdir()

    async def remove(prompt: str) -> str:
        folder.rmdir()
        return prompt

    (row,) = await prompt_map(["a"], remove, results_db_url="there/r.db")
    assert row["result"] == "a"
    assert "the results database was not written: expected a folder" in caplog.text


async def test_results_database_mirrors_the_shape(db_url: str) -> None:
    """The results database, beside a file or in the working directory, holds the rows in the shape of the latest call."""
    await prompt_map(CITIES, shout, db_url=db_url)
    beside = "runs-results.db" if is_postgresql(db_url) else "queue-results.db"
    assert rows_of(beside) == [
        (0, "Oslo", "done", "OSLO"),
        (1, "Bergen", "done", "BERGEN"),
        (3, "Narvik", "done", "NARVIK"),
    ]
    await prompt_map(CITIES, shout, output_shape="original", db_url=db_url)
    assert [row[3] for row in rows_of(beside)] == [city.upper() for city in CITIES]
    await prompt_map(["a"], shout, results_db_url="elsewhere.db", db_url=db_url)
    assert rows_of("elsewhere.db") == [(0, "a", "done", "A")]


async def test_export_from_queue_and_from_results(db_url: str) -> None:
    """Both databases export their newest run as JSONL, whole, in order."""
    rows = await prompt_map(CITIES, shout, output_shape="original", db_url=db_url, results_db_url="r.db")
    assert await export_jsonl(db_url, out="queue.jsonl") == 5
    assert await export_jsonl("r.db", out="results.jsonl") == 5
    for name in ("queue.jsonl", "results.jsonl"):
        assert [json.loads(line) for line in Path(name).read_text().splitlines()] == rows
    assert await export_jsonl(db_url, out="unique.jsonl", output_shape="unique") == 3
    with pytest.raises(LbrError, match="nope"):
        await export_jsonl(db_url, out="x.jsonl", run="nope")
    assert not Path("x.jsonl").exists()


async def test_chat_and_metadata_prompts(db_url: str) -> None:
    """Dicts carry messages, ids and metadata, which come back with the rows."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = await prompt_map(
        [{"messages": chat, "id": "x", "n": 1}, {"prompt": "Ho"}], model_name="offline:echo", db_url=db_url
    )
    assert [(r["prompt"], r["result"]) for r in rows] == [(chat, "Hi"), ("Ho", "Ho")]
    assert (rows[0]["id"], rows[0]["metadata"]) == ("x", {"n": 1})


async def test_teardown_after_a_complete_run() -> None:
    """Teardown leaves no file behind when everything is done."""
    rows = await prompt_map(CITIES, shout, teardown=True)
    assert [row["result"] for row in rows] == ["OSLO", "BERGEN", "NARVIK"]
    assert list(Path().glob("runs*")) == []


async def test_teardown_spares_what_is_not_done_or_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    """Teardown keeps the files after a failure, beside other runs, and while another process has them open."""

    async def picky(prompt: str) -> str:
        if prompt == "b":
            raise Permanent("no")
        return prompt

    await prompt_map(["a", "b"], picky, teardown=True, db_url="failed.db")
    assert Path("failed.db").exists()
    await prompt_map(["a"], shout, db_url="other.db")
    await prompt_map(["b"], shout, db_url="other.db", teardown=True)
    assert Path("other.db").exists()
    assert "holds other runs" in caplog.text
    await prompt_map(["a"], shout, db_url="used.db")
    program = "import sqlite3, sys; c = sqlite3.connect('used.db'); c.execute('SELECT 1 FROM jobs').fetchone(); "
    program += "print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    await prompt_map(["a"], shout, db_url="used.db", teardown=True)
    holder.communicate()
    assert Path("used.db").exists()
    assert "another process uses it" in caplog.text


async def test_progress_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """A line on stderr tells of progress now and then; None keeps quiet; stdout stays clean."""

    async def slow(prompt: str) -> str:
        await asyncio.sleep(0.01)
        return prompt

    await prompt_map([f"p{n}" for n in range(100)], slow, concurrency=2, progress_every=10, run="m")
    told = capfd.readouterr()
    assert " of 100 (" in told.err
    assert told.out == ""
    await prompt_map(["x"], slow, progress_every=None)
    assert capfd.readouterr() == ("", "")


async def test_no_rate_before_the_first_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Jobs that fail fast promise nothing about when the answers come."""

    async def fails(prompt: str) -> str:
        await asyncio.sleep(0.1)
        raise lbr.Permanent("no")

    await prompt_map([f"p{n}" for n in range(40)], fails, concurrency=2, progress_every=5)
    lines = [line for line in capfd.readouterr().err.splitlines() if " of 40 (" in line]
    assert lines
    assert not [line for line in lines if "/min" in line or "left" in line]


async def test_runs_beside_other_work_in_one_loop(db_url: str) -> None:
    """Inside a running loop, as in a notebook, several calls at once share the loop and the queue."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    first, second = await asyncio.gather(
        prompt_map([f"a{n}" for n in range(50)], shout, db_url=db_url),
        prompt_map([f"b{n}" for n in range(50)], shout, db_url=db_url),
    )
    ticking.cancel()
    assert [row["result"] for row in first] == [f"A{n}" for n in range(50)]
    assert [row["result"] for row in second] == [f"B{n}" for n in range(50)]
    assert ticks > 0


def sync_answer(prompt: str) -> str:
    """Answer without async."""
    return f"<{prompt}>"


async def test_plain_functions_and_lambdas_answer_too() -> None:
    """A plain function runs in a thread; a lambda is told apart by its code."""
    assert (await prompt_map(["a"], sync_answer))[0]["result"] == "<a>"
    first = await prompt_map(["a"], lambda p: p + "1", return_dtype="list[str]")
    second = await prompt_map(["a"], lambda p: p + "2", return_dtype="list[str]")
    assert (first, second) == (["a1"], ["a2"])


@pytest.mark.parametrize(
    "arguments",
    [{"instructions": "\ud800"}, {"settings": {"extra_body": 10**30}}, {"template": "{{ prompt }}\ud800"}],
)
async def test_what_json_cannot_hold_is_refused(arguments: dict[str, Any]) -> None:
    """A task that could not be stored is refused before anything is written."""
    with pytest.raises(LbrError, match="that JSON can hold"):
        await prompt_map(["a"], model_name="offline:echo", **arguments)
    assert not Path("runs.db").exists()


async def test_a_setting_that_is_not_sent_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before a queue is made, and beside other runs no run is."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    settings = {"top_k": 20}
    for again in (False, True):
        for asking in (
            partial(prompt_map, ["a"], model_name="openai-chat:m", settings=settings),
            partial(lbr.enqueue, ["a"], run="r", model="openai-chat:m", settings=settings),
        ):
            with pytest.raises(UsageError, match="the setting top_k is not sent to model 'openai-chat:m'"):
                await asking()
        assert Path("runs.db").exists() is again
        await lbr.enqueue(["a"], run="other", model="offline:echo")
    assert [run.run for run in (await lbr.status()).runs] == ["other"]


async def test_missing_key_leaves_nothing_behind() -> None:
    """A model that cannot be called for want of a key is refused before anything is written."""
    with pytest.raises(LbrError, match="OPENAI_API_KEY"):
        await prompt_map(["a"], model_name="openai-chat:gpt-4o-mini")
    assert not Path("runs.db").exists()


async def test_locked_results_database_does_not_cost_the_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are returned though somebody keeps the results database locked; the caller is told."""
    pragmas = ("PRAGMA busy_timeout = 50", "PRAGMA synchronous = FULL")
    monkeypatch.setattr(results_db, "PRAGMAS", pragmas)
    await prompt_map(["a"], shout)
    holder = sqlite3.connect("runs-results.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    rows = await prompt_map(["b"], shout, teardown=True)
    holder.close()
    assert [row["result"] for row in rows] == ["B"]
    assert "the results database was not written" in caplog.text
    assert Path("runs.db").exists()


@pytest.mark.parametrize("nothing", [[], (), iter([]), (city for city in CITIES[:0])])
async def test_no_prompts_are_no_rows(nothing: Any) -> None:
    """Nothing to answer is an empty result of the type asked for, and no file is made."""
    for dtype in ("list[dict]", "list[str]", "list[tuple[str,str]]"):
        assert await prompt_map(nothing, shout, return_dtype=dtype) == []
    frame = await prompt_map(nothing, shout, return_dtype="polars")
    assert (frame.columns, frame.height) == (["prompt", "result", "status", "error"], 0)
    assert list(Path.cwd().iterdir()) == []


async def test_the_order_of_fields_makes_no_other_run(calls: Calls) -> None:
    """Dicts that differ in the order of their keys alone are the same prompts of the same run."""

    async def answer(prompt: str) -> str:
        calls.made[prompt] += 1
        return prompt

    for record in (
        {"prompt": "a", "x": {"b": 1, "c": 2}, "y": 3},
        {"y": 3, "x": {"c": 2, "b": 1}, "prompt": "a"},
    ):
        (row,) = await prompt_map([record], answer)
        assert list(row["metadata"]) == ["x", "y"]  # as they were the first time
    assert len((await lbr.status()).runs) == 1
    assert calls.made == {"a": 1}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (math.nan, None),
        (np.float32("nan"), None),
        (np.datetime64("NaT", "s"), None),
        (pd.NaT, None),
        (pd.NA, None),
        (Decimal("NaN"), None),
        ([np.nan, {"a": pd.NaT}], [None, {"a": None}]),
        (pd.Timestamp("2024-01-02 03:04:05.000006"), "2024-01-02T03:04:05.000006"),
        (np.datetime64("2024-01-02T03:04:05.000000006"), "2024-01-02T03:04:05.000000006"),
        (datetime(2024, 1, 2, tzinfo=UTC), "2024-01-02T00:00:00+00:00"),
        (date(2024, 1, 2), "2024-01-02"),
        (time(3, 4), "03:04:00"),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.float64(0.1), 0.1),
        (np.bool_(True), True),
        (np.array([1, 2]), [1, 2]),
        (np.array(["2024-01-02", "NaT"], dtype="datetime64[D]"), ["2024-01-02", None]),
        (Decimal("9.99"), 9.99),
        (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
    ],
    ids=str,
)
async def test_cells_of_frames_become_json(given: Any, kept: Any) -> None:
    """What is missing is null, times are ISO text, numpy's numbers are numbers."""
    for id_ in (np.int64(7), 7.0):
        (row,) = await prompt_map([{"prompt": "a", "id": id_, "cell": given}], shout)
        assert (row["id"], row["metadata"]) == (7, {"cell": kept})


async def test_a_missing_prompt_is_refused() -> None:
    """A NaN is no prompt, alone or in a record."""
    missing: list[list[Any]] = [[{"prompt": math.nan}], [{"prompt": pd.NA}], [math.nan]]
    for prompts in missing:
        with pytest.raises(InputError, match=r"^prompts, line 1: (prompt is empty|expected a string)"):
            await prompt_map(prompts, shout)


async def test_a_call_with_nothing_to_retry_reads_no_jobs(db_url: str) -> None:
    """Where the counters show that nothing failed, the jobs are not looked through for it."""
    await prompt_map(CITIES, shout, db_url=db_url)
    asked: list[str] = []
    hearing = Hearing(lambda sql, _: asked.append(sql))
    hearing.begin()
    await prompt_map(CITIES, shout, db_url=db_url)
    hearing.end()
    assert any("counters" in sql for sql in asked)
    assert not [sql for sql in asked if "jobs.state IN" in sql]


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("CREATE TRIGGER t AFTER DELETE ON results BEGIN SELECT 1; END", "the trigger 't'"),
        ("ALTER TABLE results RENAME TO r; CREATE VIEW results AS SELECT * FROM r", "the view 'results'"),
    ],
)
async def test_a_results_database_with_code_of_its_own_is_refused(
    tmp_path: Path, db_url: str, statement: str, what: str
) -> None:
    """A trigger, or a view in the place of the table, would run in lbr's statements: refused before any call."""
    await prompt_map(["a"], shout, db_url=db_url, results_db_url="answers.db")
    with closing(sqlite3.connect(tmp_path / "answers.db")) as file:
        file.executescript(statement)
    calls: list[str] = []

    async def count(text: str) -> str:
        calls.append(text)
        return text

    with pytest.raises(OutputError, match=what):
        await prompt_map(["a"], count, version="1", db_url=db_url, results_db_url="answers.db")
    assert calls == []


async def test_both_names_of_the_model_and_the_function() -> None:
    """Each has the name of the other functions and the seed's; both of a pair are an error."""
    assert await prompt_map(["a"], function=shout, return_dtype="list[str]") == ["A"]
    assert await prompt_map(["a"], model="offline:echo", return_dtype="list[str]") == ["a"]
    given: dict[str, Any]
    for given, words in (
        ({"function": shout, "worker": shout}, "expected function or worker, got: both"),
        ({"model": "offline:echo", "model_name": "offline:echo"}, "expected model or model_name, got: both"),
        ({"model": "offline:echo", "worker": shout}, "expected a model or a function, got: both"),
    ):
        with pytest.raises(UsageError, match=words):
            await prompt_map(["a"], **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        await prompt_map(["a"], modle="offline:echo")  # type: ignore[call-overload]


async def test_duplicates_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    """A list with equal prompts and a row for each distinct one gets one line, each time; no other call does."""
    for _ in range(2):
        await prompt_map(CITIES, shout)
    await prompt_map(CITIES, shout, output_shape="original")
    await prompt_map(["Oslo"], shout)
    line = "5 prompts, 3 of them distinct: 3 rows; output_shape='original' returns a row for each prompt"
    assert caplog.messages == [line, line]
    assert {(one.name, one.levelname) for one in caplog.records} == {("lbr", "WARNING")}


async def test_a_schema_limits_and_a_budget(db_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Answers match a JSON schema; the limits are set; a run that has spent what it may pauses, and more lets it go on."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    given: dict[str, Any] = {"model": "offline:echo", "schema": schema, "price": "in=1,out=1", "db_url": db_url}
    (row,) = await prompt_map(["a"], **given, rpm=50_000, tpm=9_000_000, max_cost=1.0)
    assert isinstance(json.loads(row["result"])["n"], int)
    assert row.parsed is None
    (limits,) = await lbr.limit("offline:echo", db_url=db_url)
    assert (limits["rpm"], limits["tpm"]) == (50_000, 9_000_000)
    prompts = [f"p{n}" for n in range(60)]
    few = await prompt_map(prompts, **given, run="r", concurrency=2, max_cost=1e-5, progress_every=None)
    assert 0 < sum(row["status"] == "done" for row in few) < 60
    why = "it may cost $0.00001, with "
    assert all(row["error"] is None or row["error"].startswith(f"the run is paused: {why}") for row in few)
    assert all((row["status"] == "done") == (row["error"] is None) for row in few)
    assert f"run r is paused: {why}" in caplog.text
    assert "the same call with a higher max_cost goes on" in caplog.text
    (run,) = (await lbr.status("r", db_url=db_url)).runs
    assert (run.pause_cause, run.max_cost_usd) == ("budget", 1e-5)
    every = await prompt_map(prompts, **given, run="r", max_cost=1.0)
    assert {row["status"] for row in every} == {"done"}


async def test_records_may_name_their_columns() -> None:
    """Dicts take `prompt_column`, `id_column` and `template` as files do."""
    records = [{"text": "a", "sku": 7, "n": 1}, {"text": "b", "sku": 8, "n": 2}]
    rows = await prompt_map(records, shout, prompt_column="text", id_column="sku")
    assert [(row["prompt"], row["id"], row["metadata"]) for row in rows] == [("a", 7, {"n": 1}), ("b", 8, {"n": 2})]
    assert records[0] == {"text": "a", "sku": 7, "n": 1}
    texts = await prompt_map(records, shout, template="{{ text }}{{ n }}", return_dtype="list[str]")
    assert texts == ["A1", "B2"]
    for given, words in (
        ({"prompt_column": "txt"}, "^prompts, line 1: there is no field 'txt'; there are: 'text', 'sku', 'n'"),
        ({"prompt_column": "text", "template": "{{ text }}"}, "template=… and prompt_column=… exclude each other"),
    ):
        with pytest.raises(LbrError, match=words):
            await prompt_map(records, shout, **given)  # type: ignore[call-overload]


def test_without_a_loop_and_beside_one() -> None:
    """The plain function has the same rows and errors, in a script and in a thread whose loop is running."""
    assert prompt_map_sync(CITIES, shout, return_dtype="list[str]") == ["OSLO", "BERGEN", "NARVIK"]
    with pytest.raises(UsageError, match="expected fresh to be True or False"):
        prompt_map_sync(["a"], shout, fresh=1)  # type: ignore[call-overload]

    async def cell() -> Any:
        return prompt_map_sync(["a"], shout)

    (row,) = asyncio.run(cell())
    assert row["result"] == "A"


INTERRUPTED = """
import time
import lbr

def answer(prompt):
    print("called", flush=True)
    time.sleep(0.05)
    return prompt

lbr.prompt_map_sync([f"p{n}" for n in range(500)], answer, version="1", run="r", concurrency=2)
"""


def test_ctrl_c_reaches_the_plain_function(tmp_path: Path) -> None:
    """The process ends soon, with the jobs given back and the answers kept."""
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout is not None
    for _ in range(8):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, printed = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in printed
    (run,) = asyncio.run(lbr.status("r")).runs
    assert run.inflight == 0
    assert 0 < run.done < 500
