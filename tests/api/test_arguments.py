"""What a caller of the public functions may hand over by mistake: told in words, before anything is written."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import BaseModel

import lbr
from lbr.core.errors import UsageError


async def up(prompt: str) -> str:
    """Answer in capitals."""
    return prompt.upper()


class DataFrame:
    """Iterates as a pandas frame does: over the names of its columns."""

    columns = ("prompt", "topic")

    def __iter__(self) -> Any:
        return iter(self.columns)


TABLES: list[Any] = [
    DataFrame(),
    pl.LazyFrame({"prompt": ["a"]}),
    {"a": 1},
    MappingProxyType({"prompt": "a"}),
]


@pytest.mark.parametrize("given", TABLES, ids=lambda given: type(given).__name__)
async def test_a_table_is_no_list_of_prompts(given: Any) -> None:
    """A mapping or another library's frame would be read by the names in it; it is refused, with what to give instead."""
    words = r"^expected a list of prompts or a Path, got: a (DataFrame|LazyFrame|dict|mappingproxy); give "
    for asking in (
        partial(lbr.prompt_map, given, up),
        partial(lbr.enqueue, given, run="r", function=up),
        partial(lbr.estimate, given, model="offline:echo"),
    ):
        with pytest.raises(UsageError, match=words):
            await asking()
    assert not Path("runs.db").exists()


async def test_the_way_out_fits_the_table() -> None:
    """What is named instead is there: the frame itself, a column of it, or its rows as records."""
    frame = pl.DataFrame({"prompt": ["a", "b"], "topic": ["x", "y"]})
    words = r"give a DataFrame of pandas or polars \(of a LazyFrame, df\.collect\(\)\), or a list of dicts$"
    for given in (frame.lazy(), DataFrame()):
        with pytest.raises(UsageError, match=words):
            await lbr.prompt_map(given, up)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a list with the dict in it for one record$"):
        await lbr.prompt_map({"prompt": "a"}, up)
    assert await lbr.prompt_map(frame["prompt"], up, return_dtype="list[str]") == ["A", "B"]
    assert await lbr.prompt_map(frame["prompt"].to_list(), up, return_dtype="list[str]") == ["A", "B"]
    for rows in (
        await lbr.prompt_map(frame, up, return_dtype="list[dict]"),
        await lbr.prompt_map(frame.to_dicts(), up),
    ):
        assert [(row["result"], row["metadata"]) for row in rows] == [
            ("A", {"topic": "x"}),
            ("B", {"topic": "y"}),
        ]
    assert (await lbr.enqueue(frame, run="r", model="offline:echo")).counts.new == 2
    assert (await lbr.estimate(frame, model="offline:echo", template="{{ topic }}")).examples == ["x", "y"]


class City(BaseModel):
    """A structured answer."""

    name: str


class Folder:
    """A path of another library's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __fspath__(self) -> str:
        return self.name


async def prompt_map(**given: Any) -> Any:
    """Answer one prompt."""
    return await lbr.prompt_map(["a"], **{"worker": up} | given)


async def enqueue(**given: Any) -> Any:
    """Enqueue one prompt."""
    known: dict[str, Any] = {"run": "r", "function": up}
    return await lbr.enqueue(["a"], **known | given)


async def estimate(**given: Any) -> Any:
    """Estimate one prompt."""
    return await lbr.estimate(["a"], **{"model": "offline:echo"} | given)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (prompt_map, {"run": 5}, "expected run to be a string, got: 5"),
    (prompt_map, {"price": 0.3}, "expected price to be a string, got: 0.3"),
    (prompt_map, {"price": {"in": 1}}, "expected price to be a string, got: {'in': 1}"),
    (prompt_map, {"timeout": 0}, "expected timeout to be a number above 0, got: 0"),
    (prompt_map, {"timeout": "5"}, "expected timeout to be a number above 0, got: '5'"),
    (prompt_map, {"timeout": True}, "expected timeout to be a number above 0, got: True"),
    (prompt_map, {"timeout": 10**400}, "expected timeout to be a number above 0, got: 1000"),
    (prompt_map, {"lease": [1]}, "expected lease to be a number above 0"),
    (prompt_map, {"settings": [1]}, "expected settings to be a dict, got: [1]"),
    (prompt_map, {"settings": ""}, "expected settings to be a dict, got: ''"),
    (prompt_map, {"worker": 5}, "expected a function from str to str, got: 5"),
    (
        prompt_map,
        {"worker": SimpleNamespace(run_sync=1)},  # as an agent has it
        "expected a function from str to str, got: namespace(run_sync=1); write a function that returns `await agent.run(",
    ),
    (
        prompt_map,
        {"worker": None, "model_name": up},
        "expected model_name to be a string, got: <function up at 0x",
    ),
    (prompt_map, {"version": 2}, "expected version to be a string, got: 2"),
    (prompt_map, {"template": 5}, "expected template to be a string, got: 5"),
    (prompt_map, {"openrouter_api_key": b"sk-1"}, "expected openrouter_api_key to be a string, got: bytes"),
    (prompt_map, {"db_url": 5}, "expected db_url to be a string or a path, got: int"),
    (prompt_map, {"db_url": None}, "expected db_url to be a string or a path, got: NoneType"),
    (prompt_map, {"results_db_url": 5}, "expected results_db_url to be a string or a path, got: int"),
    (prompt_map, {"output_shape": 5}, "expected output_shape to be a string, got: 5"),
    (prompt_map, {"return_dtype": np.arange(2)}, "expected return_dtype to be a string, got: array([0, 1])"),
    (prompt_map, {"db_url": Path("/")}, "expected db_url to name a file, got: the folder /"),
    (prompt_map, {"progress_every": "all"}, "expected progress_every to be a whole number, got: 'all'"),
    (prompt_map, {"progress_every": -1}, "expected progress_every to be a whole number of at least 0"),
    (prompt_map, {"teardown": "no"}, "expected teardown to be True or False, got: 'no'"),
    (prompt_map, {"fresh": 1}, "expected fresh to be True or False, got: 1"),
    (enqueue, {"run": 5}, "expected run to be a string, got: 5"),
    (enqueue, {"price": 0.3}, "expected price to be a string, got: 0.3"),
    (enqueue, {"settings": "x"}, "expected settings to be a dict, got: 'x'"),
    (enqueue, {"schema": [1]}, "expected schema to be a dict, got: [1]"),
    (enqueue, {"model": up, "function": None}, "expected model to be a string, got: <function up at 0x"),
    (
        enqueue,
        {"input_format": "odd"},
        "expected input_format to be one of text, jsonl, csv, tsv, parquet, got: 'odd'",
    ),
    (enqueue, {"prompt_column": 1}, "expected prompt_column to be a string, got: 1"),
    (enqueue, {"function": 5}, "expected a function from str to str, got: 5"),
    (enqueue, {"instructions": ["x"]}, "expected instructions to be a string, got: ['x']"),
    (estimate, {"model": up}, "expected model to be a string, got: <function up at 0x"),
    (estimate, {"price": 0.3}, "expected price to be a string, got: 0.3"),
    (estimate, {"rpm": "5"}, "expected rpm to be a number above 0, got: '5'"),
    (estimate, {"seconds_per_call": None}, "expected seconds_per_call to be a number above 0, got: None"),
    (estimate, {"output_tokens": "5"}, "expected output_tokens to be a whole number"),
    (lbr.work, {"functions": up}, "expected functions to be a list, got: <function up at 0x"),
    (lbr.work, {"functions": "m:f"}, "expected functions to be a list, got: 'm:f'"),
    (lbr.work, {"functions": np.array("x")}, "expected functions to be a list, got: array('x'"),
    (lbr.work, {"functions": [5]}, "expected a function from str to str, got: 5"),
    (lbr.work, {"result_types": City}, "expected result_types to be a list, got: <class "),
    (lbr.work, {"until": "dne"}, "expected until to be one of done, empty, forever, got: 'dne'"),
    (lbr.work, {"run": 5}, "expected run to be a string or a list of them, got: 5"),
    (lbr.work, {"run": [5]}, "expected run to be a string or a list of them, got: [5]"),
    (lbr.work, {"grace": None}, "expected grace to be a number of at least 0, got: None"),
    (lbr.work, {"patience": "1"}, "expected patience to be a number above 0, got: '1'"),
    (lbr.work, {"max_cost": "1"}, "expected max_cost to be a number above 0, got: '1'"),
    (lbr.work, {"notify": 5}, "expected notify to be a function, got: 5"),
    (lbr.collect, {"run": None}, "expected run to be a string, got: None"),
    (lbr.collect, {"run": "r", "out": 5}, "expected out to be a string or a path, got: int"),
    (lbr.collect, {"run": "r", "shape": 5}, "expected shape to be a string, got: 5"),
    (lbr.collect, {"run": "r", "shape": "odd"}, "expected shape to be one of original, unique, got: 'odd'"),
    (
        lbr.collect,
        {"run": "r", "format": "odd"},
        "expected format to be one of jsonl, csv, parquet, sqlite, db, openai, messages, got: 'odd'",
    ),
    (lbr.collect, {"run": "r", "format": 5}, "expected format to be a string, got: 5"),
    (lbr.status, {"run": 5}, "expected run to be a string, got: 5"),
    (lbr.status, {"db_url": b"runs.db"}, "expected db_url to be a string or a path, got: bytes"),
    (lbr.show, {"run": "r", "idx": "0"}, "expected idx to be a whole number, got: '0'"),
    (lbr.retry, {"run": 5}, "expected run to be a string, got: 5"),
    (lbr.retry, {"run": "r", "where": 5}, "expected where to be a string or a list of them, got: 5"),
    (lbr.retry, {"run": "r", "settings": [1]}, "expected settings to be a dict, got: [1]"),
    (lbr.reparse, {"run": "r", "result_types": City}, "expected result_types to be a list, got: <class "),
    (lbr.cancel, {"run": ["r"]}, "expected run to be a string, got: ['r']"),
    (lbr.pause, {"run": "r", "reason": None}, "expected reason to be a string, got: None"),
    (lbr.resume, {"run": "r", "max_cost": [1]}, "expected max_cost to be a number above 0, got: [1]"),
    (lbr.limit, {"scope": 5}, "expected scope to be a string, got: 5"),
    (lbr.limit, {"scope": "a:b", "values": [1]}, "expected values to be a dict, got: [1]"),
    (lbr.move, {"run": "r", "to_url": 5}, "expected to_url to be a string or a path, got: int"),
    (lbr.doctor, {"fix": "no"}, "expected fix to be True or False, got: 'no'"),
    (lbr.doctor, {"db_url": Path("/")}, "expected db_url to name a file, got: the folder /"),
    (lbr.doctor, {"db_url": 5}, "expected db_url to be a string or a path, got: int"),
    (lbr.export_jsonl, {"out": None}, "expected out to be a string or a path, got: NoneType"),
    (lbr.export_jsonl, {"out": "a.jsonl", "run": 5}, "expected run to be a string, got: 5"),
]


@pytest.mark.parametrize(
    ("asking", "given", "words"),
    WRONG,
    ids=[f"{one.__name__}-{next(iter(given))}" for one, given, _ in WRONG],
)
async def test_arguments_of_another_type(asking: Any, given: dict[str, Any], words: str) -> None:
    """What is of another type is told in words before anything is written, never by an error from inside."""
    with pytest.raises(UsageError, match=f"^{re.escape(words)}"):
        await asking(**given)
    assert not list(Path().iterdir())


async def test_every_argument_of_every_function_is_looked_at() -> None:
    """Whatever a function of the package takes refuses an object that is nothing of the kind."""
    needed: dict[str, Any] = {
        "prompts": ["a"],
        "inputs": ["a"],
        "run": "r",
        "runs": ["r", "s"],
        "idx": 0,
        "to_url": "x.db",
        "out": "x.jsonl",
        "file": "copy.db",
        "older": "30d",
        "nonce": "1a2b3c4d5e6f",
    }
    for name in lbr.__all__:
        function = getattr(lbr, name)
        if not inspect.iscoroutinefunction(function):
            continue
        parameters = inspect.signature(function).parameters
        known = {one: needed[one] for one, parameter in parameters.items() if parameter.default is parameter.empty}
        if name in {"prompt_map", "enqueue"}:
            known |= {"worker" if name == "prompt_map" else "function": up, "run": "r"}
        if name == "estimate":
            known["model"] = "offline:echo"
        for one in parameters:
            with pytest.raises(lbr.LbrError, match="^expected "):
                await function(**known | {one: object()})
    assert not list(Path().iterdir())


async def test_paths_of_every_kind_name_files(tmp_path: Path) -> None:
    """Wherever a file is named, a path of any library's does as well as its text."""
    queue, answers = Folder(str(tmp_path / "q.db")), Folder(str(tmp_path / "answers.db"))
    rows = await lbr.prompt_map(["a"], up, db_url=queue, results_db_url=answers, run="r")
    assert rows[0]["result"] == "A"
    assert (await lbr.status(db_url=tmp_path / "q.db")).runs[0].run == "r"
    await lbr.prompt_map(["a"], up, db_url=tmp_path / "p.db", run="r")
    assert (tmp_path / "p-results.db").is_file()
    (tmp_path / "in.txt").write_text("One\n")
    await lbr.enqueue(Folder(str(tmp_path / "in.txt")), function=up, db_url=queue)
    await lbr.enqueue([Folder(str(tmp_path / "in.txt"))], run="in", function=up, db_url=queue)
    await lbr.work(functions=[up], db_url=queue)
    out = Folder(str(tmp_path / "out.jsonl"))
    assert (await lbr.collect("in", out=out, db_url=queue)).total == 1
    assert await lbr.export_jsonl(queue, out=out) == 1
    assert await lbr.export_jsonl(answers, out=out) == 1
    assert (await lbr.move("in", to_url=Folder(str(tmp_path / "to.db")), db_url=queue)).known is False
    assert [one.gravity for one in await lbr.doctor(db_url=queue) if one.is_grave] == []
    assert {path.name for path in Path().iterdir()} == {path.name for path in tmp_path.iterdir()}


async def test_errors_name_parameters(tmp_path: Path) -> None:
    """What the command line calls flags has the names of this function's parameters; the other message is kept."""
    file = tmp_path / "in.csv"
    file.write_text("text,prompt\na,b\n")
    await lbr.enqueue([file], run="r", model="offline:echo")
    no_way: dict[str, Any] = {"run": "r", "model": "offline:echo"}
    for asking, words, flag in (
        (
            partial(lbr.enqueue, [file], **no_way, prompt_column="no"),
            "set prompt_column=… or template=…",
            "--prompt-column",
        ),
        (
            partial(lbr.enqueue, [file], **no_way, prompt_column="text"),
            "with run=…, or .* with append=True",
            "--append",
        ),
        (partial(lbr.enqueue, ["a"], model="offline:echo"), "set run=…", "--run"),
        (
            partial(lbr.enqueue, ["a"], run="x"),
            r"Use model=… .* or function=…, .*model='offline:echo'",
            "--model",
        ),
        (
            partial(lbr.prompt_map, ["a"]),
            r"Use model_name=… .* or worker=…, .*model_name='offline:echo'",
            "--model",
        ),
        (partial(lbr.collect, "r", out="-", bom=True), "bom is for CSV only", "--bom"),
    ):
        with pytest.raises(lbr.LbrError, match=words) as caught:
            await asking()
        assert "--" not in str(caught.value)
        assert flag in (caught.value.in_flags or "")
    with pytest.raises(lbr.UsageError, match="already exists with a different task .*another name .run=…."):
        await lbr.prompt_map(["a"], up, run="r")
    await lbr.cancel("r")
    with pytest.raises(lbr.UsageError, match="`lbr retry r` takes it up again"):
        await lbr.resume("r")
