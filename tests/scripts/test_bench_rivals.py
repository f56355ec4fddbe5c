"""The comparison with other batch runners, without them: the loop by hand, and one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import bench_rivals
import httpx2
import pytest
from bench_chat import chat_server
from rival_environments import RIVALS, Rival

from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = ROOT / "scripts" / "bench_rivals.py"


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.slow
@pytest.mark.processes
def test_lbr_is_measured_beside_a_loop(tmp_path: Path) -> None:
    """Everybody's answers are checked, and each target is said to be met or not; the folder is left empty."""
    file = tmp_path / "found.json"
    done = bench(
        tmp_path,
        "--only",
        "aiohttp,gather,plain-wal",
        "--parts",
        "naps,chat,whole",
        "--whole",
        "20,30",
        "--naps",
        "40",
        "--calls",
        "20",
        "--json",
        str(file),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written: dict[str, Any] = json.loads(file.read_text())
    assert {(one["part"], one["system"]) for one in written["speeds"]} == {
        ("naps", "lbr"),
        ("naps", "the ceiling of its slots"),
        ("naps", "a bare gather, nothing kept"),
        ("naps", "plain loop, a commit each, WAL"),
        ("chat", "lbr"),
        ("chat", "a bare aiohttp gather"),
        *(
            (f"whole-{calls}", who)
            for calls in (20, 30)
            for who in ("lbr", "lbr, three commands", "a bare aiohttp gather")
        ),
    }
    assert written["not measured"] == []
    assert all("met (" in line and line in done.stdout for line in written["targets"])
    assert len(written["targets"]) == 4
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.processes
def test_a_failing_rival_is_reported(tmp_path: Path) -> None:
    """A rival that cannot do the task is not measured, says why, and the others go on."""
    absent = Rival("absent", "absent", "rival_ondine.py", {"naps": "table"})
    loop = next(one for one in RIVALS if one.key == "plain-wal")
    options = bench_rivals.read_options(["--folder", str(tmp_path), "--naps", "10", "--parts", "naps"])
    found = bench_rivals.Found()
    for rival in (absent, loop):
        bench_rivals.attempt(found, "naps", rival, options)
    assert "No module named" in found.missing["naps", "absent"]
    assert found.took("naps", loop.name) is not None


def test_the_server_tells_when_calls_came() -> None:
    """A GET tells the first call since a moment; a call that asks nothing is refused and not counted."""
    with chat_server(0.0) as url, httpx2.Client() as client:
        before = time.time()
        asked = {
            "model": "bench",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        }
        answer = client.post(f"{url}/chat/completions", json=asked)
        after = time.time()
        assert answer.json()["choices"][0]["message"]["content"] == "Hi"
        refused = client.post(f"{url}/chat/completions", json={"model": "bench", "messages": []})
        assert refused.status_code == 400
        found = client.get(url, params={"since": before}).json()
        assert (found["calls"], found["distinct"]) == (1, 1)
        assert before <= found["first"] <= after
        assert client.get(url, params={"since": after + 1}).json()["first"] is None


@pytest.mark.parametrize(
    "arguments", [["--only", "nobody"], ["--parts", "sleep"], ["--calls", "0"], ["--whole", "9,x"]]
)
def test_a_wrong_option(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown name or a number below one is refused before anything is measured."""
    with pytest.raises(SystemExit, match="2"):
        bench_rivals.read_options(["--folder", str(tmp_path), *arguments])
    assert "expected" in capsys.readouterr().err
