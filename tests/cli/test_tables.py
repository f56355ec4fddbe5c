"""Tables as users bring them, through `lbr run` and back into pandas: equal cell by cell."""

from __future__ import annotations

import json
import sqlite3
import string
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pandas as pd
import polars as pl
import pytest

from tests.support import Cli

if TYPE_CHECKING:
    from pathlib import Path

ODD = [f"{mark} first, then" for mark in f"{string.punctuation} \t\n5"] + [
    "two\nlines",
    "two\r\nlines\n",
    'she said "no"; twice',
    '"',
    " spaces around ",
    "Größe, 日本語, 🎉",
    "-1.50",
    "+49 170 1234567",
    "007",
    "NA",
    "a|b\tc;d",
    "'quoted'",
]
TABLE = pd.DataFrame(
    {
        "result": ["positive", ""] * (len(ODD) // 2) + [""] * (len(ODD) % 2),
        "text": ODD,
        "id": [f"{n:04}" for n in range(len(ODD))],
        "Review Text": reversed(ODD),
        "count": ["1.50", "", "1e400"] * (len(ODD) // 3) + [""] * (len(ODD) % 3),
    },
    dtype=str,
)
CSV: dict[str, Any] = {"dtype": str, "keep_default_na": False}
OWN = ["answer.result", "status", "error"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bom": {"encoding": "utf-8-sig"},
    "all quoted": {"quoting": 1},
    "pandas index": {"index": True},
    "semicolons": {"sep": ";"},
    "tabs": {"sep": "\t"},
    "UTF-16": {"encoding": "utf-16"},
    "pandas index, semicolons, UTF-16": {"index": True, "sep": ";", "encoding": "utf-16"},
}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a driver with a queue in a file: tables are read and written alike whatever the database."""
    return Cli(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_table_comes_back_cell_by_cell(cli: Cli, variant: str) -> None:
    """Every column is there under its name, in its place, with its text; lbr's own follow."""
    how = {"index": False} | VARIANTS[variant]
    given = TABLE.reset_index(names="column_1").astype(str) if how["index"] else TABLE
    TABLE.to_csv(cli.folder / "in.csv", **how)
    cli("run", "in.csv", "-o", "out.csv", "--model", "offline:echo", "--prompt-column", "text")
    out = pd.read_csv(cli.folder / "out.csv", **CSV)
    assert list(out.columns) == [*given.columns, *OWN]
    pd.testing.assert_frame_equal(out[list(given.columns)], given)
    assert list(out["answer.result"]) == list(given["text"])


def test_a_merge_on_any_column_loses_no_row(cli: Cli) -> None:
    """Answers in CSV, Parquet and SQLite have the keys of the table that was given, read as text."""
    TABLE.to_csv(cli.folder / "in.csv", index=False)
    cli("run", "in.csv", "-o", "out.csv", "--model", "offline:echo", "--prompt-column", "text")
    for name in ("out.parquet", "out.sqlite"):
        cli("collect", "in", "-o", name)
    with closing(sqlite3.connect(cli.folder / "out.sqlite")) as answers:
        found = {
            "csv": pd.read_csv(cli.folder / "out.csv", **CSV),
            "parquet": pd.DataFrame(pl.read_parquet(cli.folder / "out.parquet").to_dict(as_series=False)),
            "sqlite": pd.read_sql("SELECT * FROM answers", answers),
        }
    given = TABLE.reset_index()
    for name, out in found.items():
        assert list(out.columns) == [*TABLE.columns, *OWN], name
        for column in TABLE.columns:
            merged = given.merge(out[[column, "status"]], on=column)
            assert set(merged["index"]) == set(given["index"]), (name, column)
        merged = given.merge(out, on=list(TABLE.columns))
        assert list(merged["answer.result"]) == list(given["text"]), name


def test_pandas_and_polars_read_the_same_cells(cli: Cli) -> None:
    """Of CSV, JSONL and SQLite; Parquet is read by polars alone, because pandas needs pyarrow for it."""
    TABLE.to_csv(cli.folder / "in.csv", index=False)
    cli("run", "in.csv", "-o", "out.csv", "--model", "offline:echo", "--prompt-column", "text")
    out = {name: cli.folder / f"out.{name}" for name in ("csv", "jsonl", "sqlite", "parquet", "db")}
    for name in ("jsonl", "sqlite", "parquet", "db"):
        cli("collect", "in", "-o", out[name].name)
    answers = pl.read_parquet(out["parquet"])
    plain = answers.with_columns(pl.all().fill_null(""))
    assert plain.rows() == pd.read_csv(out["csv"], **CSV).to_records(index=False).tolist()
    assert plain.equals(pl.read_csv(out["csv"], infer_schema=False, empty_string_is_null=False))
    for name, table in (("sqlite", "answers"), ("db", "results")):
        with closing(sqlite3.connect(out[name])) as connection:
            query = f"SELECT * FROM {table}"
            found = pl.read_database(query, connection, infer_schema_length=None)
            assert pd.read_sql(query, connection).to_dict("records") == found.to_dicts()
            assert name == "db" or found.cast(answers.schema).equals(answers)
    lines = pl.read_ndjson(out["jsonl"], infer_schema_length=None)
    frame = pd.read_json(out["jsonl"], lines=True, dtype=False).drop(columns="error")  # null alone is NaN in pandas
    assert frame.to_dict("records") == lines.drop("error").to_dicts()
    assert lines["id"].to_list() == list(TABLE["id"])


def test_answers_to_stdout(cli: Cli) -> None:
    """`lbr run -o -` writes nothing but rows to stdout, also if it reads stdin."""
    done = cli("run", "-", "--run", "r", "-o", "-", "--model", "offline:echo", "--with", "usage", stdin="one\ntwo\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["result"], row["model"]) for row in rows] == [("one", "offline:echo"), ("two", "offline:echo")]
    assert "2 of 2 jobs done in" in done.stderr
    assert "lbr: 2 rows in stdout\n" in done.stderr
    refused = cli("run", "-", "--run", "r2", "-o", "o.jsonl", "--no-unnest", stdin="one", check=False)
    assert (refused.returncode, "--no-unnest is for tables, got: jsonl" in refused.stderr) == (2, True)


def test_fields_that_a_schema_does_not_name_are_reported(cli: Cli) -> None:
    """A table has a column for each field of the schema; a warning names the others, and --no-unnest keeps them."""
    (cli.folder / "more.py").write_text("def answer(prompt):\n    return {'a': prompt, 'b': 1}\n")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    (cli.folder / "schema.json").write_text(json.dumps(schema))
    (cli.folder / "in.txt").write_text("one\n")
    done = cli("run", "in.txt", "-o", "out.csv", "--function", "more:answer", "--schema", "schema.json")
    assert (cli.folder / "out.csv").read_text() == "prompt,a,status,error\none,one,done,\n"
    assert "lbr: fields that the schema does not name have no column: 'b'; --no-unnest and JSONL keep" in done.stderr
    whole = cli("collect", "in", "--format", "csv", "--no-unnest")
    assert whole.stdout == 'prompt,result,status,error\none,"{""a"":""one"",""b"":1}",done,\n'
    assert "no column" not in whole.stderr


def test_lbr_reads_its_own_output(cli: Cli) -> None:
    """The answers of one run as prompts of another are the same texts: every one of them is answered already."""
    TABLE.to_csv(cli.folder / "in.csv", index=False)
    cli("run", "in.csv", "-o", "one.csv", "--model", "offline:echo", "--prompt-column", "text")
    flags = ("--run", "two", "-o", "two.csv", "--model", "offline:echo", "--prompt-column", "answer.result")
    again = cli("run", "one.csv", *flags)
    assert f"{len(ODD)} inputs, {len(ODD)} new, 0 duplicate, {len(ODD)} reused" in again.stderr
    one, two = (pd.read_csv(cli.folder / name, **CSV) for name in ("one.csv", "two.csv"))
    pd.testing.assert_frame_equal(two[list(one.columns)], one)


def test_flags_of_csv(cli: Cli) -> None:
    """`--spreadsheet-safe` and `--bom` change CSV alone; other formats are refused before anything is called."""
    (cli.folder / "in.txt").write_text("- first\n")
    for flag in ("--bom", "--spreadsheet-safe"):
        for refused in (
            cli("run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo", flag, check=False),
            cli("collect", "in", flag, check=False),
        ):
            assert refused.returncode == 2
            assert f"lbr: {flag} is for CSV only, got: jsonl" in refused.stderr
    cli("run", "in.txt", "-o", "out.csv", "--model", "offline:echo", "--bom", "--spreadsheet-safe")
    assert (cli.folder / "out.csv").read_bytes().startswith(b"\xef\xbb\xbfprompt,result,")
    assert pd.read_csv(cli.folder / "out.csv")["result"].tolist() == ["'- first"]
    cli("collect", "in", "-o", "out.csv")
    assert (cli.folder / "out.csv").read_text().startswith("prompt,result,status,error\n- first,")


def test_numbers_of_jsonl_stay_numbers(cli: Cli) -> None:
    """Metadata have their order and numbers all their digits, and an id is a number where it was one."""
    metadata = '{"z":18446744073709551615,"b":-9223372036854775808,"f":0.1,"deep":{"y":1e+300,"x":2.0},"a":"7"}'
    fields = metadata[1:-1].split(",", 1)
    lines = [f'{{{fields[0]},"id":7,"prompt":"a",{fields[1]}}}', '{"prompt":"b","id":"7"}']
    (cli.folder / "in.jsonl").write_text("\n".join(lines))
    cli("run", "in.jsonl", "-o", "out.jsonl", "--model", "offline:echo")
    first, second = (cli.folder / "out.jsonl").read_text().splitlines()
    assert first.startswith('{"idx":0,"id":7,')
    assert first.replace("1e300", "1e+300").endswith(f'"metadata":{metadata}}}')
    assert second.startswith('{"idx":1,"id":"7",')
    cli("collect", "in", "-o", "out.csv")
    header, row, _ = (cli.folder / "out.csv").read_text().splitlines()
    assert header == "z,id,prompt,b,f,deep,a,result,status,error"
    assert row.startswith("18446744073709551615,7,a,-9223372036854775808,0.1,")
    cli("collect", "in", "-o", "out.db")
    with closing(sqlite3.connect(cli.folder / "out.db")) as results:
        found = results.execute("SELECT id, metadata FROM results ORDER BY idx").fetchall()
    assert found == [
        (7, first.partition('"metadata":')[2][:-1]),
        ("7", None),
    ]
