"""Parquet files: complete or not there, and of any number of rows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import polars as pl
import pytest

from lbr.core.errors import OutputError, UsageError
from lbr.core.types import AnswerRow, Part, Prompt, Task
from lbr.io.table import Kind, make_table
from lbr.io.writers import OutputFormat, check_output, open_writer

if TYPE_CHECKING:
    from pathlib import Path

TABLE = make_table(Task(model="m"), [(Part.ID, "id"), (Part.PROMPT, "prompt")], id_kind=Kind.INT)


@pytest.mark.parametrize("pages", [[], [1], [2_500] * 5 + [7]])
def test_rows_come_back_in_order(tmp_path: Path, pages: list[int]) -> None:
    """Pages of any number and size are one file, whose columns have their types without a row, too."""
    path, count = tmp_path / "o.parquet", 0
    with open_writer(str(path), OutputFormat.PARQUET, table=TABLE) as writer:
        for size in pages:
            writer.write(
                [AnswerRow(n, "k", Prompt(f"ü{n}"), "done", None, custom_id=n) for n in range(count, count + size)]
            )
            count += size
        assert not path.exists()
    found = pl.read_parquet(path)
    assert dict(found.schema) == {"id": pl.Int64} | dict.fromkeys(("prompt", "result", "status", "error"), pl.String)
    assert found["id"].to_list() == list(range(count))
    assert found["prompt"].to_list() == [f"ü{n}" for n in range(count)]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """An error between the rows, and one of the file itself, leave no file and no thread that waits."""
    path = str(tmp_path / "o.parquet")

    def write(row: AnswerRow, error: type[Exception] | None = None) -> None:
        with open_writer(path, OutputFormat.PARQUET, table=TABLE) as writer:
            writer.write([row])
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        write(AnswerRow(0, "k", Prompt("a"), "done"), KeyError)
    with pytest.raises(OutputError, match=r"^input 1: id is \"x\", which a column of Int64 cannot hold"):
        write(AnswerRow(1, "k", Prompt("a"), "done", custom_id="x"))
    assert list(tmp_path.iterdir()) == []


def test_without_polars_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parquet needs an extra, which the message names before anything is done; stdout cannot take it."""
    with pytest.raises(UsageError, match="parquet cannot be written to stdout; name a file with -o"):
        check_output(None, OutputFormat.PARQUET)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UsageError, match=r"pip install 'lbr\[polars\]'"):
        check_output(str(tmp_path / "o.parquet"), OutputFormat.PARQUET)
