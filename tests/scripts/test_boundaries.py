"""The count of calls between modules, in its short form."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import boundaries
import pytest
from boundaries import Crossing, crossings

from lbr.core import text
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "boundaries.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.slow
@pytest.mark.processes
def test_crossings_of_a_job_are_counted(tmp_path: Path) -> None:
    """The script prints the pairs of modules and the total, and fails above its limit."""
    found = script(tmp_path, "--jobs", "40", "--limit", "1")
    assert found.returncode == 1, found.stderr
    *pairs, total = found.stdout.splitlines()
    assert re.search(r"worker\.\w+ -> models\.chat ", found.stdout)
    assert float(total.split()[0]) == pytest.approx(sum(float(line.split()[0]) for line in pairs), abs=1)
    assert total.endswith("at most 1: no")


def test_only_calls_between_modules_are_counted() -> None:
    """A call from outside lbr counts as none, and a coroutine that goes on is not called again."""
    with crossings() as found:
        text.pluralize(2, "job")
    assert not found
    assert boundaries.table({Crossing("worker", "store", "f"): 2.0}).split()[:4] == ["2.00", "worker", "->", "store"]
