"""The progress of a call: a bar in a terminal, lines elsewhere, and a last line."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import lbr
from lbr.api.progress import last_line
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


async def test_lines_of_a_status() -> None:
    """The run, the counts, the cost and a pause."""
    await lbr.prompt_map(["a", "b"], model="offline:echo", price="in=1,out=1", run="r", progress_every=None)
    (now,) = (await lbr.status("r")).runs
    assert last_line(now) == "run r: 2 of 2 jobs done; cost $0.000004"
    half = replace(now, done=1, failed=1, jobs=4, pending=2, rate=2.0, cost_usd=None)
    paused = replace(half, finished=False, state="paused", pause_cause="budget", pause_message="it has cost $1")
    assert last_line(paused).startswith("run r: 1 of 4 jobs done, 1 failed; paused: it has cost $1; `lbr resume r")


@pytest.mark.slow
def test_lines_of_a_script_and_the_bar_of_a_terminal(tmp_path: Path) -> None:
    """Each on stderr, and both end with the run, its counts and its cost."""
    piped = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = piped.stderr.splitlines()
    assert (piped.stdout, lines[-1]) == ("", "lbr: run r: 30 of 30 jobs done")
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
    assert text.rstrip().endswith("lbr: run s: 30 of 30 jobs done")
