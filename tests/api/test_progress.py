"""The progress of a call: a bar in a terminal, lines elsewhere, and a last line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lbr.core.text import harmless

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import asyncio, lbr

async def slow(prompt):
    await asyncio.sleep(0.05)
    return prompt

lbr.prompt_map_sync([f"p{n}" for n in range(30)], slow, version="1", run="r", concurrency=4, progress_every=10)
"""


@pytest.mark.slow
def test_lines_of_a_script_and_the_bar_of_a_terminal(tmp_path: Path) -> None:
    """Each on stderr, and both end with the run, its counts and its cost."""
    piped = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = piped.stderr.splitlines()
    assert (piped.stdout, lines[-1].partition(" in ")[0]) == ("", "lbr: run r: 30 of 30 jobs done")
    assert [line.partition("/")[0][:6] for line in lines[:-1]] == ["lbr: r"] * (len(lines) - 1)
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace('"p', '"q').replace('"r"', '"s"')],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    screen = b""
    while True:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # the child has closed it
            break
    os.close(ours)
    assert child.wait() == 0
    text = harmless(screen.decode())
    assert "30 of 30" in text
    assert "━" in text
    assert re.search(r"lbr: run s: 30 of 30 jobs done in [0-9.]+ s\s*\Z", text)
