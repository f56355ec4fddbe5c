"""The same examples of prompt_map against everybody who can answer: a function, offline:echo, a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from pydantic import BaseModel

import lbr
from lbr import DB_URL_DEFAULT, export_jsonl, prompt_map
from tests.support.llmock_server import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

CITIES = ["Oslo", "Bergen", "Oslo", "Narvik", "Bergen"]
FIRST = ["Oslo", "Bergen", "Narvik"]


class City(BaseModel):
    """A structured answer."""

    name: str


async def echo(prompt: str) -> str:
    """Answer with the prompt."""
    return prompt


async def name_of(prompt: str) -> City:
    """Answer with a class."""
    return City(name=prompt)


@pytest.fixture(scope="module")
def llmock() -> Iterator[str]:
    """Start a chat server that others wrote."""
    with serve("--response-style", "echo") as url:
        yield url


@pytest.fixture(params=["function", "offline", "http"])
def who(request: pytest.FixtureRequest, llmock: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments that name one who answers."""
    if request.param == "function":
        return {"worker": echo}
    if request.param == "offline":
        return {"model_name": "offline:echo"}
    monkeypatch.setenv("OPENAI_BASE_URL", llmock)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    return {"model_name": "openai-chat:gpt-4o-mini"}


@pytest.mark.slow
async def test_shapes_dtypes_results_and_export(who: dict[str, Any]) -> None:
    """Both shapes, every return type, the results database and the export tell the same answers, in order."""
    unique = await prompt_map(CITIES, **who)
    assert [(row["prompt"], row["status"]) for row in unique] == [(city, "done") for city in FIRST]
    answers = {row["prompt"]: row["result"] for row in unique}
    assert all(city in answer for city, answer in answers.items())
    rows = await prompt_map(CITIES, **who, output_shape="original")
    assert [row["result"] for row in rows] == [answers[city] for city in CITIES]
    assert await prompt_map(CITIES, **who, return_dtype="list[str]") == [answers[city] for city in FIRST]
    pairs = await prompt_map(CITIES, **who, return_dtype="list[tuple[str,str]]", output_shape="original")
    assert pairs == [(city, answers[city]) for city in CITIES]
    frame = await prompt_map(CITIES, **who, return_dtype="polars")
    assert isinstance(frame, pl.DataFrame)
    assert frame["result"].to_list() == [answers[city] for city in FIRST]
    for url, count in ((DB_URL_DEFAULT, 5), ("runs-results.db", 3)):
        assert await export_jsonl(url, out="out.jsonl") == count
        exported = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert exported == (rows if count == 5 else unique)
    # All of that was one run, answered once.
    (run,) = (await lbr.status()).runs
    assert (run.done, run.failed, run.errors) == (3, 0, {})


async def test_structured_output(who: dict[str, Any]) -> None:
    """With a result type every answer is a JSON string of it."""
    named = {"worker": name_of} if "worker" in who else who
    rows = await prompt_map(FIRST, **named, result_type=City)
    assert [row["status"] for row in rows] == ["done"] * 3
    assert all(City.model_validate_json(row["result"]).name for row in rows)


async def test_teardown(who: dict[str, Any]) -> None:
    """After a complete run teardown leaves no file, whoever answered."""
    assert len(await prompt_map(CITIES, **who, teardown=True)) == 3
    assert list(Path().glob("runs*")) == []


async def test_enqueue_work_collect(who: dict[str, Any]) -> None:
    """The three steps one by one give what the one call gives."""
    named = {"function": echo} if "worker" in who else {"model": who["model_name"]}
    await lbr.enqueue(CITIES, run="r", **named)
    report = await lbr.work(run="r", functions=[echo] if "worker" in who else [])
    assert (report.done, report.failed) == (3, 0)
    collected = await lbr.collect("r")
    assert collected.rows is not None
    assert [row["prompt"] for row in collected.rows] == CITIES
    assert all(row["prompt"] in row["result"] for row in collected.rows)
