"""What a caller of the public functions may hand over by mistake: told in words, before anything is written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl
import pytest

import lbr
from lbr.errors import UsageError


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
    pl.DataFrame({"prompt": ["a"]}),
    pl.LazyFrame({"prompt": ["a"]}),
    {"a": 1},
    MappingProxyType({"prompt": "a"}),
]


@pytest.mark.parametrize("given", TABLES, ids=lambda given: type(given).__name__)
async def test_a_table_is_no_list_of_prompts(given: Any) -> None:
    """A frame or a mapping would be read by the names in it; it is refused, with what to give instead."""
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
    """What is named instead is there: a column of it, or its rows as records."""
    frame = pl.DataFrame({"prompt": ["a", "b"], "topic": ["x", "y"]})
    with pytest.raises(UsageError, match=r'df\["prompt"\]\.to_list\(\), or df\.to_dicts\(\) for records$'):
        await lbr.prompt_map(frame, up)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r'df\["prompt"\]\.tolist\(\), or df\.to_dict\("records"\) for records$'
    ):
        await lbr.prompt_map(DataFrame(), up)
    with pytest.raises(UsageError, match=r"a list with the dict in it for one record$"):
        await lbr.prompt_map({"prompt": "a"}, up)
    assert await lbr.prompt_map(frame["prompt"], up, return_dtype="list[str]") == ["A", "B"]
    assert await lbr.prompt_map(frame["prompt"].to_list(), up, return_dtype="list[str]") == ["A", "B"]
    rows = await lbr.prompt_map(frame.to_dicts(), up)
    assert [(row["result"], row["metadata"]) for row in rows] == [
        ("A", {"topic": "x"}),
        ("B", {"topic": "y"}),
    ]
