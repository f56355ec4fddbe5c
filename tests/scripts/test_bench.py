"""The benchmark beside baselines, in its short form: it checks its answers."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import bench_baselines
import orjson
import pytest
from bench_baselines import BenchError, Sizes, check_lines, measure

from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def script(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.slow
@pytest.mark.processes
def test_bench_measures_and_checks(tmp_path: Path) -> None:
    """The script prints a row for each measurement, with a ratio, and leaves nothing behind."""
    found = script(tmp_path, "bench_baselines.py", "--jobs", "400", "--json")
    assert found.returncode == 0, found.stderr
    printed = orjson.loads(found.stdout)
    rows = {row["name"]: row for row in printed["measured"]}
    assert set(rows) == {"enqueue", "claim and settle", "collect", "jobs of 5 ms", "chat calls of 50 ms"}
    assert all(row["ratio"] > 0 and row["lbr"]["seconds"] > 0 for row in rows.values())
    assert "Python" in printed["about"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_one_part_is_measured(tmp_path: Path) -> None:
    """Without --json the script prints a table; --only selects the rows."""
    found = script(tmp_path, "bench_baselines.py", "--jobs", "400", "--only", "naps")
    _, header, row = found.stdout.splitlines()
    assert header.startswith("what")
    assert row.startswith("jobs of 5 ms")


@pytest.mark.parametrize("wrong", [["--jobs", "9"], ["--repeat", "0"], ["--only", "sleep"]])
def test_a_wrong_option(wrong: list[str]) -> None:
    """A number that is too small and an unknown part are refused before anything is measured."""
    with pytest.raises(SystemExit, match="2"):
        bench_baselines.read_options(wrong)


def test_wrong_answers_are_no_measurement(tmp_path: Path) -> None:
    """A missing row, and an answer that is not the prompt, end the benchmark."""
    out = tmp_path / "out.jsonl"
    good = {"idx": 0, "prompt": "a", "status": "done", "result": "a"}
    for rows in ([], [good | {"result": "b"}], [good | {"status": "failed"}], [good, good]):
        out.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        with pytest.raises(BenchError, match="the measurement means nothing"):
            check_lines(out, ["a"])
    out.write_bytes(orjson.dumps(good))
    check_lines(out, ["a"])


def test_a_benchmark_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no figure if no job was answered."""
    monkeypatch.setattr(bench_baselines, "_work", lambda *_: 0)
    with pytest.raises(BenchError, match="expected the answers to be"):
        measure(tmp_path, Sizes(20, 20, 20), ["naps"], log=lambda _: None)


@pytest.mark.slow
def test_client_cpu_is_measured_for_each_way(tmp_path: Path) -> None:
    """The script prints the CPU of a call with aiohttp alone, by lbr and by an agent, and keeps lbr to its target."""
    done = script(tmp_path, "bench_calls.py", "--calls", "250")
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line in lines[1:4]:
        assert all(float(figure) > 0 for figure in line.split()[-2:])
    assert list(tmp_path.iterdir()) == []
