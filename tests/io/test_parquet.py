"""Parquet files become items like the lines of JSONL, a slice at a time."""

from __future__ import annotations

import datetime as dt
import os
import re
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Part, Prompt
from lbr.io import parquet
from lbr.io.readers import InputFormat
from tests.io import read

if TYPE_CHECKING:
    from pathlib import Path

NOON = dt.datetime(2024, 5, 6, 12, 0, 0, 125_000, dt.UTC)


def write_frame(folder: Path, columns: dict[str, Any], name: str = "in.parquet") -> str:
    """Write a frame, and return its path."""
    path = folder / name
    pl.DataFrame(columns).write_parquet(path)
    return str(path)


def test_every_type_becomes_what_json_has(tmp_path: Path) -> None:
    """Times become ISO text with all their digits, null and NaN are null, numbers stay numbers."""
    values: dict[str, tuple[Any, Any]] = {
        "prompt": ("Größe\n🎉", None),
        "id": (2**63 - 1, 2**63 - 1),
        "small": (pl.Series([-3], dtype=pl.Int8), -3),
        "large": (pl.Series([2**64 - 1], dtype=pl.UInt64), 2**64 - 1),
        "none": (None, None),
        "nan": (float("nan"), None),
        "share": (0.1, 0.1),
        "yes": (True, True),
        "day": (dt.date(2024, 5, 6), "2024-05-06"),
        "hour": (dt.time(1, 2, 3), "01:02:03"),
        "noon": (NOON.replace(tzinfo=None), "2024-05-06T12:00:00.125000"),
        "zone": (NOON, "2024-05-06T12:00:00.125000+00:00"),
        "nanos": (pl.Series([1_700_000_000_123_456_789]).cast(pl.Datetime("ns")), "2023-11-14T22:13:20.123456789"),
        "plain": (pl.Series([1_700_000_000_000_000_000]).cast(pl.Datetime("ns", "UTC")), "2023-11-14T22:13:20+00:00"),
        "money": (Decimal("1.50"), 1.5),
        "exact": (Decimal("12345678901234567890.12"), "12345678901234567890.12"),
        "kind": (pl.Series(["a"], dtype=pl.Categorical), "a"),
        "list": ([1, None, 3], [1, None, 3]),
        "deep": ({"when": dt.date(2024, 1, 2), "Binary": float("nan")}, {"when": "2024-01-02", "Binary": None}),
    }
    columns = {name: value if isinstance(value, pl.Series) else [value] for name, (value, _) in values.items()}
    (item,) = read(path := write_frame(tmp_path, columns))
    assert item.prompt == Prompt("Größe\n🎉")
    assert (item.custom_id, item.source, item.line) == (2**63 - 1, path, 1)
    assert item.metadata == {name: shown for name, (_, shown) in values.items() if name not in {"prompt", "id"}}
    assert item.columns is not None
    assert list(item.columns) == list(values)
    assert {name for name, part in item.columns.items() if part is not Part.METADATA} == {"prompt", "id"}


def test_rows_come_in_order_whatever_the_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is lost or read twice at the edge of a slice, whatever the flags."""
    for rows in (999, 1_000, 1_001, 4_567):
        frame = pl.DataFrame({"text": [f"p{n}" for n in range(rows)], "sku": range(rows)})
        frame.write_parquet(path := tmp_path / "in.parquet", row_group_size=700)
        monkeypatch.setattr(parquet, "MAX_ROWS", 1_234)
        items = read(str(path), prompt_column="text", id_column="sku")
        assert [(item.prompt.text, item.custom_id, item.line) for item in items] == [
            (f"p{n}", n, n + 1) for n in range(rows)
        ]
    (item, *_) = read(str(path), template="{{ sku }}: {{ text }}")
    assert (item.prompt.text, item.metadata) == ("0: p0", {"text": "p0", "sku": 0})


def test_long_texts_make_short_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows are in memory depends on how long they are."""
    sizes = []
    sliced = pl.LazyFrame.slice

    def noting(frame: pl.LazyFrame, offset: int, length: int) -> pl.LazyFrame:
        sizes.append(length)
        return sliced(frame, offset, length)

    monkeypatch.setattr(pl.LazyFrame, "slice", noting)
    read(write_frame(tmp_path, {"prompt": [f"{n}" * 2_000 for n in range(1_500)]}))
    assert sizes[0] == parquet.FIRST_ROWS
    assert all(size < 5_000 for size in sizes)
    sizes.clear()
    read(write_frame(tmp_path, {"prompt": [f"{n}" for n in range(1_500)]}))
    assert sizes[1] == parquet.MAX_ROWS


def test_messages_and_odd_names(tmp_path: Path) -> None:
    """A column of messages is the prompt; a name with brackets is no pattern for polars."""
    messages = [{"role": "user", "content": "Hi"}]
    (item,) = read(write_frame(tmp_path, {"messages": [messages]}, "in[1].parquet"))
    assert item.prompt == Prompt(messages=tuple(messages))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, {}, "there is no column 'prompt'; there are: 'text'; set --prompt-column or --template"),
        ({"prompt": ["a"]}, {"id_column": "sku"}, "there is no column 'sku'; there are: 'prompt'; set --id-column"),
        ({"prompt": ["a"]}, {"template": "{{ city }}"}, "names columns that are not there: 'city'"),
        ({"prompt": ["a"], "image": [b"\0"]}, {}, "cannot read column 'image', which has the type Binary; write it as"),
        ({"prompt": ["a"], "x": [[{"y": b"\0"}]]}, {}, "cannot read column 'x'"),
        ({"prompt": ["a"], "for": [dt.timedelta(1)]}, {}, "cannot read column 'for', which has the type Duration"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """The file, the column and what to do are named before any row is read."""
    path = write_frame(tmp_path, columns)
    with pytest.raises(UsageError, match=re.escape(f"{path}: ") + ".*" + message):
        read(path, **options)


def test_bad_rows_have_their_number(tmp_path: Path) -> None:
    """A row without a prompt, or with an infinity, is refused by its place."""
    path = write_frame(tmp_path, {"prompt": ["a", None, "b"], "x": [1.0, 2.0, float("inf")]})
    with pytest.raises(InputError, match=r"in.parquet, line 2: prompt is empty \(and 1 more bad row\)") as caught:
        read(path)
    assert "line 3: a field cannot be written as JSON: x is inf" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"prompt\na\n"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    """The file's name and a way out are in the message."""
    path = tmp_path / "in.parquet"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read .*in.parquet as Parquet: .*; write it again, or set --format"):
        read(str(path))


def test_a_stream_is_refused(tmp_path: Path) -> None:
    """Parquet has its index at the end, so that a pipe cannot be read."""
    os.mkfifo(pipe := tmp_path / "in.parquet")
    for source in (str(pipe), "-"):
        with pytest.raises(UsageError, match="expected a Parquet file, got: the stream"):
            read(source, format=InputFormat.PARQUET)


def test_without_polars_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is imported for Parquet only."""
    path = write_frame(tmp_path, {"prompt": ["a"]})
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UsageError, match=re.escape("polars is not installed: `pip install 'lbr[polars]'`")):
        read(path)
    program = "import sys, lbr.io.readers; sys.exit('polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
