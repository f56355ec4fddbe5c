"""What prompt_map returns: typed rows that are dicts, and frames beside those that were given."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

import numpy as np
import orjson
import pandas as pd
import polars as pl
import pytest
from pandas.testing import assert_frame_equal
from pydantic import AfterValidator, BaseModel, Field, create_model

import lbr
from lbr import Permanent, Row, prompt_map
from lbr.core.errors import UsageError


class Review(BaseModel):
    """A structured answer."""

    label: str
    score: int = Field(alias="points")
    sure: bool | None = None


async def judge(prompt: str) -> Any:
    """Judge a text; refuse a bad one."""
    if prompt == "bad":
        raise Permanent("refused")
    return {"label": prompt.upper(), "points": len(prompt)}


async def test_rows_are_dicts_with_an_instance() -> None:
    """They are JSON, frames and pickles as dicts are; `parsed` is an instance, made once, None without an answer."""
    rows = await prompt_map(["good", "bad"], judge, result_type=Review)
    assert all(type(row) is Row and isinstance(row, dict) for row in rows)
    done, failed = rows
    assert done.parsed is not None
    assert (done.parsed, done.parsed.score) == (Review(label="GOOD", points=4), 4)
    assert done.parsed is done.parsed
    assert (failed.parsed, failed["error"]) == (None, "refused")
    assert json.loads(json.dumps(rows)) == orjson.loads(orjson.dumps(rows)) == rows
    assert json.loads(rows[0]["result"]) == {"label": "GOOD", "points": 4, "sure": None}
    for frame in (pd.DataFrame(rows), pl.DataFrame(rows)):
        assert list(frame["status"]) == ["done", "missing"]
    pickled = pickle.loads(pickle.dumps(done))  # noqa: S301 - our own
    for twin in (pickled, copy.deepcopy(done)):
        assert (twin, twin.parsed) == (done, done.parsed)
    (plain,) = await prompt_map(["good"], judge, version="2")
    assert plain.parsed is None


async def test_a_class_that_no_longer_reads_its_answers() -> None:
    """An answer that was kept is not validated again, so `parsed` has an error that says how to ask again."""

    def with_least(least: int) -> type[BaseModel]:
        def check(points: int) -> int:
            if points < least:
                raise ValueError("too few")
            return points

        return create_model("Points", points=(Annotated[int, AfterValidator(check)], ...))

    (row,) = await prompt_map(["good"], judge, result_type=with_least(0))
    assert row.parsed == row.parsed
    (row,) = await prompt_map(["good"], judge, result_type=with_least(5))
    assert row["result"] == '{"points":4}'
    words = r"the answer of input 0 does not fit the result type as it is now: \$.points: Value error, too few. .*`fresh=True`"
    with pytest.raises(UsageError, match=words):
        _ = row.parsed


def pandas_frame() -> pd.DataFrame:
    """Return what real tables have: gaps, times, categories, numbers of every kind, an index, odd names."""
    return pd.DataFrame(
        {
            "text": ["good", "bad", "fine", "good"],
            "n": [1.5, np.nan, 3.0, 1.5],
            "when": pd.to_datetime(["2024-01-02", None, "2024-01-04", "2024-01-02"]),
            "kind": pd.Categorical(["x", None, "y", "x"]),
            "count": pd.array([1, None, 3, 1], dtype="Int64"),
            "small": np.array([1, 2, 3, 1], dtype="int8"),
            "span": pd.to_timedelta(["1h", None, "2h", "1h"]),
            "month": pd.PeriodIndex(["2024-01", "2024-02", "2024-03", "2024-01"], freq="M"),
            "status": ["old"] * 4,
            7: [None, "a", True, None],
        },
        index=pd.Index(["r1", "r2", "r2", "r4"], name="row"),
    )


def polars_frame() -> pl.DataFrame:
    """Return the same for polars."""
    return pl.DataFrame(
        {
            "text": ["good", "bad", "fine", "good"],
            "n": [1.5, float("nan"), None, 1.5],
            "when": [datetime(2024, 1, 2, tzinfo=UTC), None, datetime(2024, 1, 4, tzinfo=UTC)] * 1 + [None],
            "day": [date(2024, 1, 2), None, None, None],
            "span": [timedelta(hours=1), None, None, None],
            "tags": [["a"], [], None, ["a"]],
            "inner": [{"a": 1}, None, {"a": 2}, {"a": 1}],
            "status": ["old"] * 4,
        },
        schema_overrides={"n": pl.Float32},
    ).with_columns(kind=pl.Series(["x", None, "y", "x"], dtype=pl.Categorical))


async def test_a_frame_of_pandas_comes_back_with_answers() -> None:
    """Its columns, types and index are as they were; a row each, and behind them the answers with their types."""
    given = pandas_frame()
    before = given.copy(deep=True)
    found = await prompt_map(given, judge, prompt_column="text", result_type=Review)
    assert isinstance(found, pd.DataFrame)
    assert_frame_equal(given, before)
    assert_frame_equal(found[list(given.columns)], before)
    assert list(found.columns)[len(given.columns) :] == ["label", "points", "sure", "answer.status", "error"]
    types = {name: str(found[name].dtype) for name in ("label", "points", "sure", "answer.status", "error")}
    assert types == {"label": "str", "points": "Int64", "sure": "boolean", "answer.status": "str", "error": "str"}
    assert found["answer.status"].tolist() == ["done", "missing", "done", "done"]
    assert found["points"].tolist() == [4, pd.NA, 4, 4]
    assert found["error"].fillna("").tolist() == ["", "refused", "", ""]
    rows = await prompt_map(given, judge, prompt_column="text", return_dtype="list[dict]")
    assert [row["idx"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["metadata"] == {
        "n": 1.5,
        "when": "2024-01-02T00:00:00",
        "kind": "x",
        "count": 1,
        "small": 1,
        "span": "P0DT1H0M0S",
        "month": "2024-01",
        "status": "old",
        "7": None,
    }
    gaps = {name: rows[1]["metadata"][name] for name in ("n", "when", "kind", "count", "span")}
    assert gaps == dict.fromkeys(gaps)


async def test_a_frame_of_polars_comes_back_with_answers() -> None:
    """As one of pandas does."""
    given = polars_frame()
    found = await prompt_map(given, judge, prompt_column="text", result_type=Review)
    assert isinstance(found, pl.DataFrame)
    assert found.select(given.columns).equals(given)
    assert found.schema == {
        **given.schema,
        "label": pl.String,
        "points": pl.Int64,
        "sure": pl.Boolean,
        "answer.status": pl.String,
        "error": pl.String,
    }
    assert found["points"].to_list() == [4, None, 4, 4]
    rows = await prompt_map(given, judge, prompt_column="text", return_dtype="list[dict]")
    assert rows[0]["metadata"] == {
        "n": 1.5,
        "when": "2024-01-02T00:00:00+00:00",
        "day": "2024-01-02",
        "span": "1:00:00",
        "tags": ["a"],
        "inner": {"a": 1},
        "status": "old",
        "kind": "x",
    }
    assert rows[1]["metadata"]["n"] is None


@pytest.mark.parametrize("given", [pandas_frame(), polars_frame()], ids=["pandas", "polars"])
async def test_some_rows_of_a_frame(given: Any) -> None:
    """One of each kind, the first ones, and some at random are rows of the frame; an empty one has its columns."""
    how: dict[str, Any] = {"template": "{{ text }}"}
    found = await prompt_map(given, judge, **how, output_shape="unique")
    assert list(found["text"]) == ["good", "bad", "fine"]
    assert list((await prompt_map(given, judge, **how, limit=2))["text"]) == ["good", "bad"]
    picked = await prompt_map(given, judge, **how, pick=2, seed=3)
    answers = [json.loads(one)["label"] if isinstance(one, str) else None for one in picked["result"]]
    assert answers == [None if text == "bad" else text.upper() for text in picked["text"]]
    assert len(set(picked["text"])) == 2
    empty = await prompt_map(given.head(0), judge, **how)
    assert list(empty.columns) == [*given.columns, "result", "answer.status", "error"]
    assert await prompt_map(given, judge, **how, limit=1, return_dtype="list[tuple[str,str]]") == [
        ("good", '{"label":"GOOD","points":4}')
    ]


async def test_lists_and_frames_as_the_other_kind() -> None:
    """A list, or a frame of the other library, becomes a frame with the columns of the prompts."""
    records: list[dict[str, Any]] = [{"prompt": "good", "n": 1}, {"prompt": "bad", "n": None}]
    found = await prompt_map(records, judge, result_type=Review, return_dtype="pandas")
    assert list(found.columns) == ["prompt", "n", "label", "points", "sure", "status", "error"]
    assert {name: str(found[name].dtype) for name in ("n", "points", "label")} == {
        "n": "Int64",
        "points": "Int64",
        "label": "str",
    }
    assert found["points"].tolist() == [4, pd.NA]
    other = await prompt_map(pd.DataFrame(records), judge, return_dtype="polars")
    assert isinstance(other, pl.DataFrame)
    assert (other["prompt"].to_list(), other["n"].to_list()) == (["good", "bad"], [1.0, None])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (
            pd.DataFrame({"prompt": ["a"]}, index=pd.MultiIndex.from_tuples([(1, 2)])),
            "the index of the frame is a MultiIndex; make columns of it first: df.reset_index",
        ),
        (
            pd.DataFrame([["a"]], columns=pd.MultiIndex.from_tuples([("prompt", "x")])),
            "the columns of the frame are a MultiIndex; give each one name first, for example df.columns = ",
        ),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "the frame has several columns named 'prompt'"),
        (pd.DataFrame([["a", "b"]], columns=[1, "1"]), "the frame has several columns named '1'"),
        (
            pd.DataFrame({"prompt": ["a", None]}),
            r"^prompts, line 2: prompt is empty. Fill it in, or leave such prompts out; .* df.dropna\(subset=",
        ),
        (
            pd.DataFrame({"prompt": ["a"], "x": [b"y"]}),
            "^prompts, line 1: field 'x' cannot be written as JSON: .*bytes",
        ),
        (pl.DataFrame({"text": ["a"]}), "expected one of the fields prompt and messages, got: 'text'; set prompt_col"),
    ],
)
async def test_frames_that_are_refused(frame: Any, words: str) -> None:
    """In words, before anything is written or called."""
    with pytest.raises(lbr.LbrError, match=words):
        await prompt_map(frame, judge)


async def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named before a call."""
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas is not installed: `pip install pandas`"):
        await prompt_map(["a"], judge, return_dtype="pandas")


async def test_fields_without_a_column_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    """A frame has the columns of the schema; what an answer has besides is named."""
    schema = {"type": "object", "properties": {"label": {"type": "string"}}}
    found = await prompt_map(pl.DataFrame({"prompt": ["a"]}), judge, schema=schema)
    assert found.columns == ["prompt", "label", "status", "error"]
    assert caplog.messages == ["fields that the schema does not name have no column: points; unnest=False keeps them"]
