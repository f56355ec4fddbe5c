"""The storm itself, a short one: the long ones are for `./scripts/storm`."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT, is_postgresql

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = ROOT / "scripts" / "storm.py"
KILLS = 12
JOBS = 2_400
"""More than can be done before the last kill, however soon processes are at work."""


@pytest.mark.processes
def test_a_short_storm(db_url: str, tmp_path: Path) -> None:
    """Workers and enqueues are killed a dozen times, and every input is answered once."""
    where = ["--db", db_url] if is_postgresql(db_url) else []
    command = [
        sys.executable,
        str(SCRIPT),
        "--kills",
        str(KILLS),
        "--jobs",
        str(JOBS),
        "--folder",
        str(tmp_path / "storm"),
        *where,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills" in done.stdout
    assert "every input answered once, in order, counters right" in done.stdout
    held = re.search(r"(\d+) repeated, of (\d+) that killed workers held", done.stdout)
    assert held is not None
    assert 0 < int(held[1]) <= int(held[2])
