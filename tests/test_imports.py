"""What starting a command costs: heavy packages are imported only by those who use them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("pydantic_ai", "pydantic", "polars", "jinja2", "jsonschema", "rich", "dotenv")


MAIN_JOB = """
import pathlib
from lbr.cli import lbr

pathlib.Path("in.txt").write_text("a")
lbr(["enqueue", "in.txt", "--model", "offline:echo"], standalone_mode=False)
lbr(["worker"], standalone_mode=False)
lbr(["status"], standalone_mode=False)
"""
HELP = "import lbr.cli; lbr.cli.lbr(['--help'], standalone_mode=False)"


@pytest.mark.parametrize("program", ["import lbr.cli", HELP, MAIN_JOB])
def test_commands_do_not_import_heavy_packages(program: str) -> None:
    """Help, enqueue, worker and status of the offline model get by without the heavy packages."""
    check = f"{program}\nimport sys\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
