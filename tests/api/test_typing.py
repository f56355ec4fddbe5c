"""What type checkers know of the public functions: mypy and pyright read scripts of users, and agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = """
import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, assert_type

import polars as pl
from pydantic import BaseModel

import lbr
from lbr import Row, prompt_map, prompt_map_sync, stream


class City(BaseModel):
    name: str
    people: int


async def shout(prompt: str) -> str:
    return prompt.upper()


async def main(cities: list[str], records: list[dict[str, str]], frame: pl.DataFrame) -> None:
    rows = await prompt_map(cities, shout)
    assert_type(rows, list[Row[Any]])
    typed = await prompt_map(cities, None, "offline:echo", result_type=City, concurrency=4, output_shape="original")
    assert_type(typed, list[Row[City]])
    assert_type(typed[0].parsed, City | None)
    for row in typed:
        if row.parsed is not None:
            print(row["idx"], row.parsed.name.upper(), row.parsed.people + 1)
    assert_type(await prompt_map(records, model="offline:echo", return_dtype="list[str]"), list[str])
    pairs = await prompt_map(Path("in.csv"), function="m:f", result_type=City, return_dtype="list[tuple[str,str]]")
    assert_type(pairs, list[tuple[str, str]])
    assert_type(await prompt_map(frame, shout, template="{{ text }}"), pl.DataFrame)
    assert_type(await prompt_map(frame, shout, result_type=City), pl.DataFrame)
    assert_type(await prompt_map(frame, shout, return_dtype="list[dict]", result_type=City), list[Row[City]])
    assert_type(await prompt_map(cities, shout, return_dtype="polars"), pl.DataFrame)
    assert_type(await prompt_map(frame["text"], shout), list[Row[Any]])
    assert_type(stream(cities, shout), AsyncGenerator[Row[Any], None])
    async for one in stream(cities, model="offline:echo", result_type=City, order="finished", rpm=60):
        assert_type(one.parsed, City | None)
    report = await lbr.enqueue(frame, run="r", function=shout)
    print(report.counts.new)


assert_type(prompt_map_sync(["a"], shout), list[Row[Any]])
assert_type(prompt_map_sync(["a"], shout, result_type=City), list[Row[City]])
assert_type(prompt_map_sync(["a"], shout, return_dtype="list[str]"), list[str])
assert_type(prompt_map_sync(pl.DataFrame(), shout), pl.DataFrame)
asyncio.run(main([], [], pl.DataFrame()))
"""
PANDAS = """
from typing import Any, assert_type

import pandas as pd

from lbr import Row, prompt_map_sync

frame = pd.DataFrame({"prompt": ["a"]})
found = prompt_map_sync(frame, model="offline:echo")
print(found["result"].tolist())
rows = prompt_map_sync(["a"], model="offline:echo", output_shape="unique")
assert_type(rows, list[Row[Any]])
"""
WRONG = """
from lbr import prompt_map_sync, stream

prompt_map_sync(["a"], model="m", output_shape="both")
prompt_map_sync(["a"], model="m", return_dtype="dict")
prompt_map_sync(["a"], model="m", concurrency="4")
prompt_map_sync(["a"], modle="m")
prompt_map_sync(3, model="m")
stream(["a"], model="m", order="sorted")
"""


def lines_with_errors(checker: str, folder: Path) -> dict[str, list[int]]:
    """Return the lines of each script in a folder that a type checker refuses."""
    arguments = {
        # With the settings and the cache of ./scripts/check, which knows the packages that lbr uses.
        "mypy": [
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
            "--output",
            "json",
        ],
        "pyright": ["-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
    }[checker]
    scripts = sorted(path.name for path in folder.glob("*.py"))
    done = subprocess.run(
        [sys.executable, *arguments, *scripts], cwd=folder, capture_output=True, text=True, check=False
    )
    if checker == "mypy":
        assert not done.stderr, done.stderr
        notes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        errors = {(one["file"], one["line"]) for one in notes if one["severity"] == "error"}
    else:
        report = json.loads(done.stdout)
        assert report["summary"]["filesAnalyzed"] == len(scripts)
        notes = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
        errors = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in notes}
    return {name: sorted(line for file, line in errors if file == name) for name in scripts}


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_know_what_is_returned(checker: str, tmp_path: Path) -> None:
    """Each form has its type, and wrong words, names and types are errors."""
    for name, text in (("script", SCRIPT), ("tables", PANDAS), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    found = lines_with_errors(checker, tmp_path)
    assert found == {"script.py": [], "tables.py": [], "wrong.py": [4, 5, 6, 7, 8, 9]}
