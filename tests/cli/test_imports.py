"""What starting a command costs: heavy packages are imported only by those who use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.http_server import Scripted, completion

HEAVY = (
    *("pydantic_ai", "pydantic", "openai", "aiohttp", "httpx2", "genai_prices"),
    *("asyncpg", "polars", "jinja2", "jsonschema_rs", "rich", "dotenv"),
    *("sqlalchemy.orm", "sqlalchemy.ext.asyncio", "sqlalchemy.dialects.postgresql"),
)


MAIN_JOB = """
import pathlib
from lbr.cli import lbr

pathlib.Path("in.txt").write_text("a")
lbr(["enqueue", "in.txt", "--model", "offline:echo"], standalone_mode=False)
lbr(["worker"], standalone_mode=False)
"""
HELP = "import lbr.cli; lbr.cli.lbr(['--help'], standalone_mode=False)"


@pytest.mark.parametrize("program", ["import lbr.cli", HELP, MAIN_JOB])
def test_commands_do_not_import_heavy_packages(program: str) -> None:
    """Help, enqueue and worker of the offline model get by without the heavy packages."""
    check = f"{program}\nimport sys\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


CHAT_JOB = """
import pathlib
from lbr.cli import lbr

pathlib.Path("in.txt").write_text("a\\nb")
flags = ["--model", "openai-chat:gpt-4o-mini", "--set", "temperature=0.5", "--instructions", "be brief"]
lbr(["enqueue", "in.txt", *flags], standalone_mode=False)
lbr(["worker"], standalone_mode=False)
"""


def test_a_chat_endpoint_is_called_without_pydantic_ai(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plain task for a chat endpoint is enqueued and answered without the second that pydantic-ai takes."""
    monkeypatch.chdir(tmp_path)
    check = f"{CHAT_JOB}\nimport sys\nprint(sorted({{'pydantic_ai', 'openai'}} & set(sys.modules)))"
    with Scripted(200, completion("fine")) as server:
        environment = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-test"}
        done = subprocess.run(
            [sys.executable, "-c", check],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment,
        )
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == 2
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["script", "module"])
def test_files_of_the_working_directory_replace_no_module(tmp_path: Path, command: str) -> None:
    """A queue.py, json.py or lbr/ beside answers.py is not imported, by a worker or by its processes; answers.py is."""
    for name in ("queue.py", "json.py", "ssl.py", "lbr/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported instead of the real one')\n")
    (tmp_path / "answers.py").write_text(
        "import pydantic\n\nclass Answer(pydantic.BaseModel):\n    n: int\n\n\ndef fn(text): return {'n': len(text)}\n"
    )
    (tmp_path / "in.txt").write_text("a\nbb\n")
    start = [str(Path(sys.executable).with_name("lbr"))]
    if command == "module":
        start = [sys.executable, "-m", "lbr"]  # of a folder that has an lbr of its own, Python starts that
        (tmp_path / "lbr/__init__.py").unlink()

    def lbr(*arguments: str, code: int = 0) -> str:
        done = subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    what = ("--function", "answers:fn", "--result-type", "answers:Answer")
    lbr("enqueue", "in.txt", *what)
    lbr("worker", *what, "--processes", "2")
    lbr("run", "in.txt", "--run", "second", *what, "-o", "o.jsonl", "--fresh")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [json.loads(row["result"]) for row in rows] == [{"n": 1}, {"n": 2}]
    assert '"status":"done"' in lbr("collect", "in")
    assert "not the queue.py here: rename your file" in lbr("worker", "--function", "queue:fn", code=2)
