"""What happens when a run ends: a real shell, a real HTTP server, real workers."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.api import finish
from lbr.core.errors import UsageError
from tests.support import eventually
from tests.support.http_server import Request, Script, Server, http

if TYPE_CHECKING:
    from tests.support import Cli

TOKEN = "token-of-a-chat"


class Hook(Server):
    """A server that gives these answers in turn, the last one for ever, and keeps what it was sent."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(self._next)
        self.statuses = list(statuses)
        self.sent: list[Any] = []

    def _next(self, request: Request) -> Script:
        self.sent.append((request.path, request.json()))
        return http(self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])

    @property
    def hook(self) -> str:
        """Its URL, with a token."""
        return f"{self.url}/hooks/{TOKEN}?key={TOKEN}"


async def upper(text: str) -> str:
    """Answer, or not."""
    if text == "bad":
        raise lbr.Permanent("no")
    if text == "stop":
        raise lbr.Pause("the key has expired")
    await asyncio.sleep(0.01)
    return text.upper()


async def enqueue(db_url: str, prompts: list[str], run: str = "r") -> None:
    """Enqueue prompts for `upper`."""
    await lbr.enqueue(prompts, function=upper, run=run, db_url=db_url)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(finish, "LOOK_SECONDS", 0.05)


async def test_a_command_gets_the_numbers_and_its_code_is_reported(db_url: str, tmp_path: Path) -> None:
    """It is a line for the shell; what it prints is shown, harmless for a terminal."""
    await enqueue(db_url, ["a", "b", "bad"])
    said: list[str] = []
    line = "env | grep ^LBR_ | grep -v TEST > seen; printf 'one\\ntwo\\033[2J\\n'; echo bad >&2; exit 3"
    report = await lbr.work(functions=[upper], db_url=db_url, on_finish=line, notify=said.append)
    seen = dict(one.split("=", 1) for one in (tmp_path / "seen").read_text().splitlines())
    assert (report.done, report.failed) == (2, 1)
    assert seen == {
        "LBR_RUN": "r",
        "LBR_STATE": "finished",
        "LBR_JOBS": "3",
        "LBR_DONE": "2",
        "LBR_FAILED": "1",
        "LBR_CANCELLED": "0",
        "LBR_INPUT_TOKENS": "0",
        "LBR_OUTPUT_TOKENS": "0",
        "LBR_COST_USD": "",
        "LBR_FILE": "",
        "LBR_PAUSE_CAUSE": "",
        "LBR_PAUSE_MESSAGE": "",
        "LBR_DB": db_url,
    }
    assert said[-4:] == [
        *("--on-finish: one", "--on-finish: two\\x1b[2J", "--on-finish: bad"),
        "run r: the command of --on-finish ended with exit code 3",
    ]


async def test_of_several_workers_one_reports_each_end(db_url: str) -> None:
    """While they work, a run that ends early is reported at once; a pause is an end as well."""
    await enqueue(db_url, ["a"], run="first")
    await enqueue(db_url, ["stop"], run="second")
    with Hook(204) as server:
        workers: list[lbr.Worker] = []
        flags: dict[str, Any] = {"until": "forever", "notify_url": server.hook, "on_start": workers.append}
        both = [asyncio.create_task(lbr.work(functions=[upper], db_url=db_url, **flags)) for _ in range(2)]
        await eventually(lambda: len(server.sent) == 2)
        await enqueue(db_url, ["a", "bad"], run="first")
        await eventually(lambda: len(server.sent) == 3)
        for one in workers:
            one.drain()
        await asyncio.gather(*both)
        found = sorted(server.sent, key=lambda one: (one[1]["run"], one[1]["jobs"]))
    assert {path for path, _ in found} == {f"/v1/hooks/{TOKEN}?key={TOKEN}"}
    first, again, second = (one for _, one in found)
    assert (first["run"], first["state"], first["done"], first["file"]) == ("first", "finished", 1, None)
    assert (again["run"], again["state"], again["done"], again["failed"]) == ("first", "finished", 1, 1)
    assert (second["state"], second["pause_cause"]) == ("paused", "account")
    assert again["text"].startswith("run first: 1 of 2 jobs done; 1 failed")
    assert "the key has expired" in second["text"]


@pytest.mark.parametrize(
    ("statuses", "tries", "words"),
    [
        ([503, 429, 200], 3, ""),
        ([500], finish.POST_TRIES, "answered with status 500"),
        ([404], 1, "answered with status 404"),
        ([302], 1, "answered with status 302"),
    ],
)
async def test_a_message_is_tried_again_if_that_may_help(
    db_url: str, statuses: list[int], tries: int, words: str
) -> None:
    """What fails is reported with the host alone, and the work is done all the same."""
    await enqueue(db_url, ["a"])
    said: list[str] = []
    with Hook(*statuses) as server:
        report = await lbr.work(functions=[upper], db_url=db_url, notify_url=server.hook, notify=said.append)
        place = server.url.split("/")[2]
    assert (report.done, len(server.sent)) == (1, tries)
    assert said == ([f"run r: --notify failed: {place} {words}"] if words else [])


async def test_a_server_that_is_away_or_silent_is_reported(
    db_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither messages nor logs have the token."""
    monkeypatch.setattr(finish, "POST_SECONDS", 0.1)
    said: list[str] = []
    with Server(lambda _: Script(then="hang")) as server:
        for run, url in (("away", "http://127.0.0.1:9"), ("silent", server.url)):
            await enqueue(db_url, [run], run=run)
            await lbr.work(functions=[upper], db_url=db_url, notify_url=f"{url}/{TOKEN}", notify=said.append)
    away, silent = said
    assert away == "run away: --notify failed: the connection to 127.0.0.1:9 failed: Connection refused"
    assert silent.startswith("run silent: --notify failed: ")
    assert TOKEN not in caplog.text + str(said)


async def test_a_command_that_hangs_is_ended(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is that of a caller who is cancelled; one that a signal ended is reported by the signal's name."""
    monkeypatch.setattr(finish, "COMMAND_SECONDS", 0.1)
    said: list[str] = []
    for run, line in (("r", "exec sleep 100"), ("s", "kill -KILL $$")):
        await enqueue(db_url, [run], run=run)
        await lbr.work(functions=[upper], db_url=db_url, on_finish=line, notify=said.append)
    assert said == [
        "run r: the command of --on-finish was ended, because it took more than 0 s",
        f"run s: the command of --on-finish was ended by {signal.Signals.SIGKILL.name}",
    ]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("on_finish", " "),
        ("on_finish", "a\0b"),
        *(("notify_url", f"{start}{TOKEN}") for start in ("", "ftp://host/", "https:///", "https://user:pw@host/")),
        *(("notify_url", f"{start}{TOKEN}") for start in ("http://host/ ", "http://host:x/", "http://[::1/")),
    ],
)
async def test_what_cannot_be_done_is_refused_at_once(db_url: str, flag: str, value: str) -> None:
    """Nothing is started; no message has the URL."""
    await enqueue(db_url, ["a"])
    with pytest.raises(UsageError, match=rf"expected {flag} to be") as caught:
        await lbr.work(functions=[upper], db_url=db_url, **{flag: value})  # type: ignore[arg-type]
    assert TOKEN not in str(caught.value) + str(caught.value.in_flags)
    assert (await lbr.status("r", db_url=db_url)).runs[0].done == 0


@pytest.mark.processes
class TestCommands:
    """`lbr run` and `lbr worker`."""

    def test_a_run_reports_after_its_file_is_written(self, cli: Cli) -> None:
        """The same command again reports nothing; a command of lbr in it finds the queue, and warns of no variable."""
        (cli.folder / "in.txt").write_text("a\nb\n")
        line = 'wc -l < "$LBR_FILE"; lbr collect "$LBR_RUN" -o copy.jsonl'
        flags = ["--model", "offline:echo", "-o", "out.jsonl", "--on-finish", line]
        cli.environment["PATH"] = f"{Path(sys.executable).parent}:{cli.environment['PATH']}"
        done = cli("run", "in.txt", *flags).stderr.splitlines()
        shown = [one for one in done if "--on-finish" in one]
        assert shown == ["lbr: --on-finish: 2", "lbr: --on-finish: lbr: run in: 2 rows: 2 done"]
        assert "--on-finish" not in cli("run", "in.txt", *flags).stderr

    def test_processes_report_once_and_show_no_url(self, cli: Cli) -> None:
        """Their flags, which every user of the machine sees, do not have the URL or the command either."""
        (cli.folder / "in.txt").write_text("".join(f"{n}\n" for n in range(8)))
        cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=0.2")
        line = f"echo '{TOKEN}' >> done; ps -eo args | grep -v grep | grep worker-process > seen"
        with Hook(200) as server:
            flags = ["--processes", "2", "--concurrency", "2", "--on-finish", line, "--notify", server.hook]
            done = cli("worker", *flags)
        assert [one["done"] for _, one in server.sent] == [8]
        assert (cli.folder / "done").read_text() == f"{TOKEN}\n"
        assert TOKEN not in (cli.folder / "seen").read_text() + done.stderr

    def test_bad_values_are_wrong_usage(self, cli: Cli) -> None:
        """Nothing is written, not even the queue."""
        (cli.folder / "in.txt").write_text("a\n")
        run = ("run", "in.txt", "-o", "out.jsonl", "--model", "offline:echo")
        for flags in (("--notify", f"file:///{TOKEN}"), ("--on-finish", "")):
            done = cli(*run, *flags, check=False)
            assert (done.returncode, TOKEN in done.stderr) == (2, False)
            assert f"expected {flags[0]} to be" in done.stderr
        assert cli("status", check=False).returncode in {0, 2}
        assert not (cli.folder / "out.jsonl").exists()
