"""What `lbr run`, `lbr worker` and `lbr status --watch` show in a real terminal, and in a log."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import Cli
from tests.support.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.processes

RUN = ("run", "in.txt", "-o", "out.jsonl", "--model")
SLOW = ("offline:echo", "--set", "latency=600", "--timeout", "1000")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """Return commands in a folder with an input."""
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(40)))
    made = Cli(tmp_path)
    yield made
    made.stop_all()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Return a function that runs a command in a terminal."""
    made: list[Terminal] = []

    def run(*arguments: str, **how: Any) -> Terminal:
        made.append(Terminal(tmp_path, *arguments, **how))
        return made[-1]

    yield run
    for one in made:
        one.stop()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_that_is_rate_limited(cli: Cli, terminal: Callable[..., Terminal], columns: int) -> None:
    """The bar is as wide as the terminal, says what it waits for, and gives way to the last lines."""
    limited = ("offline:echo", "--set", "rate_limit_rate=0.3", "--set", "retry_after=1.5", "--concurrency", "4")
    running = terminal(*RUN, *limited, columns=columns)
    shown = running.until("rate limited, next call in").splitlines()
    (bar,) = (line for line in shown if " of 40" in line)
    assert (bar[:4], len(bar)) == ("in  ", columns)
    assert [line for line in shown if line.startswith("  failed attempts: ")]
    assert "\x1b[32m" in running.raw
    running.stop()
    assert json.loads(cli("status", "--json").stdout)["runs"][0]["errors"]["rate_limited"] > 0


def test_a_run_that_ends(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    """Without colours if NO_COLOR is set; a function that prints does so above the bar; the last lines stay."""
    (cli.folder / "answers.py").write_text(
        "import time\n\ndef echo(prompt):\n    print('called', prompt)\n    time.sleep(0.5)\n    return prompt\n"
    )
    running = terminal(
        "run", "in.txt", "-o", "out.jsonl", "--function", "answers:echo", "--concurrency", "10", NO_COLOR="1"
    )
    running.until("in flight")
    assert running.end() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][;m]", running.raw)
    assert " of 40" in running.raw
    assert "%" not in running.screen
    assert running.screen.count("called p") == 40
    assert "in out.jsonl" in running.screen


@pytest.mark.slow
def test_a_run_whose_budget_is_spent(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    """The view has the cost and the most that it may be; then the run says that it is paused, and what to do."""
    dear = ("offline:echo", "--set", "latency=0.3", "--price", "in=1000000,out=1000000", "--max-cost", "20")
    running = terminal(*RUN, *dear, "--concurrency", "2", columns=120)
    assert re.search(r"\$\d+\.00 of \$20\.00", running.until(" of $20.00"))
    assert running.end() == 3
    shown = re.sub(r"\s+", " ", running.screen)
    assert re.search(r"paused: .*\$20.*`lbr resume in --max-cost DOLLARS` lets it cost more", shown)
    (run,) = json.loads(cli("status", "--json").stdout)["runs"]
    assert (run["pause_cause"], 14 <= run["cost_usd"] <= 20, run["inflight"]) == ("budget", True, 0)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c(cli: Cli, terminal: Callable[..., Terminal], processes: int) -> None:
    """The first shows what happens next and what a second one does, which gives the calls back; one view of all."""
    running = terminal(*RUN, *SLOW, "--concurrency", "20", "--processes", str(processes))
    running.until(f"{20 * processes} in flight")
    running.interrupt()
    shown = running.until("stopping: finishing the calls in flight (at most")
    assert re.sub(r"\s+", " ", shown).endswith("more); press Ctrl-C again to give them back at once")
    assert (shown.count("stopping"), shown.count(" of 40")) == (1, 1)
    running.interrupt()
    assert running.end() == 3
    assert cli.status("in")["pending"] == 40


@pytest.mark.slow
def test_a_server_that_is_away(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    """The view says since when, why, and when the next try is."""
    running = terminal(*RUN, "openai-chat:m", OPENAI_BASE_URL="http://127.0.0.1:9/v1", OPENAI_API_KEY="k", columns=120)
    running.until("next try in")
    assert re.search(
        r"  openai-chat:m unreachable since \d\d:\d\d \(the connection to .*127.0.0.1:9.* failed: ", running.screen
    )
    running.interrupt()
    assert running.end() == 3
    assert cli.status("in")["pending"] == 40


@pytest.mark.slow
def test_a_worker_shows_a_line_for_each_run(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    """As `lbr status --watch` does until all are over."""
    for name in ("first", "second"):
        cli("enqueue", "in.txt", "--run", name, "--model", "offline:echo", "--set", "latency=0.4", "--fresh")
    working = terminal("worker", "--concurrency", "8", "--processes", "2")
    watching = terminal("status", "--watch", "--interval", "0.2")
    for one in (working, watching):
        shown = one.until("second")
        assert [line.split()[0] for line in shown.splitlines() if "/40" in line] in (
            ["first", "second"],
            ["second", "first"],
        )
    watching.until("2 workers, 16 slots")
    assert (working.end(), watching.end()) == (0, 0)
    assert watching.screen.count("100 %") == 2


def test_a_dumb_terminal_and_a_log_get_lines(cli: Cli, terminal: Callable[..., Terminal]) -> None:
    """Each with the time, and nothing that controls a terminal."""
    running = terminal(*RUN, "offline:echo", TERM="dumb")
    assert running.end() == 0
    assert "\x1b" not in running.raw
    cli.constants["lbr.cli.view.LINE_SECONDS"] = 0.2
    told = cli(*RUN, "offline:echo", "--set", "latency=0.3", "--concurrency", "8", "--run", "slow").stderr
    line = next(line for line in told.splitlines() if " of 40" in line)
    assert re.fullmatch(r"lbr: \d\d:\d\d:\d\d slow: \d+ of 40 \(\d+ %\), 8 in flight.*", line)


def test_log_formats(cli: Cli) -> None:
    """JSON: every line of stderr, with the numbers of the run; -q: errors only; -v: every failed attempt."""
    cli.constants["lbr.cli.view.LINE_SECONDS"] = 0.2
    slow = (*RUN, "offline:echo", "--set", "latency=0.3", "--concurrency", "8")
    lines = [json.loads(line) for line in cli(*slow, "--log-format", "json").stderr.splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    look = next(line for line in lines if "elapsed" in line)
    assert (look["run"], look["inflight"], look["jobs"]) == ("in", 8, 40)
    wrong = cli(*slow, "--log-format", "json", "--lease", "0", check=False)
    assert json.loads(wrong.stderr)["level"] == "error"
    assert cli(*RUN, "offline:echo", "--run", "q", "-q").stderr == ""
    fails = (*RUN, "offline:echo", "--set", "failure_rate=1", "--max-attempts", "1", "--run")
    assert cli(*fails, "once", check=False).stderr.count("OfflineFailure") == 1
    assert cli(*fails, "each", "-v", check=False).stderr.count("OfflineFailure, job") == 40
    both = cli(*RUN, "offline:echo", "-q", "-v", check=False)
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)
