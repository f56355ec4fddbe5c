"""A provider that goes away in every way, under four real workers that are killed meanwhile: no job fails for it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT, Cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPTS = 600
SLOTS = 8
WORKER = ("worker", "--concurrency", str(SLOTS), "--lease", "3", "--timeout", "3")
QUIET_SECONDS = 4.0
"""From then on every worker knows of an outage: calls that were under way have ended."""


class Provider:
    """The moody server as a process that can be ended and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as one:
            self._port = one.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self.feel("up")

    def feel(self, mood: str) -> float:
        """Change the mood; return when."""
        (self._folder / "mood.new").write_text(mood)
        (self._folder / "mood.new").rename(self._folder / "mood")
        return time.time()

    def start(self) -> None:
        """Listen."""
        command = [sys.executable, "-m", "tests.support.moody_server", str(self._folder), str(self._port)]
        self._process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        with socket.socket() as one:
            while one.connect_ex(("127.0.0.1", self._port)):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> float:
        """Refuse every connection from now on; return when."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        return time.time()

    def requests(self) -> list[dict[str, Any]]:
        """Return what came in and ended."""
        lines = (self._folder / "requests.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


@contextmanager
def provider(folder: Path) -> Iterator[Provider]:
    """Run a provider for the length of a block."""
    one = Provider(folder)
    one.start()
    try:
        yield one
    finally:
        one.stop()


def enqueue(cli: Cli, url: str, prompts: list[str]) -> None:
    """Enqueue prompts into the run `in`."""
    cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-good"}
    (cli.folder / "in.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    cli("enqueue", "in.txt", "--model", "openai-chat:moody")


@pytest.fixture
def cli(db_url: str, tmp_path: Path) -> Iterator[Cli]:
    """Return a driver of commands on either database."""
    driver = Cli(tmp_path, db_url=db_url)
    yield driver
    driver.stop_all()


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_a_provider_that_goes_away_and_comes_back(cli: Cli, tmp_path: Path) -> None:
    """Refused connections, 500s and silence, with a worker killed in each: all is answered, and no job fails."""
    prompts = [f"prompt {n}" for n in range(PROMPTS)]
    spans = []
    with provider(tmp_path) as server:
        enqueue(cli, server.url, prompts)
        workers = [cli.start(*WORKER) for _ in range(4)]
        for number, mood in enumerate(("refused", "broken", "silent")):
            cli.wait_for("in", "done", 60 + 120 * number)
            began = server.stop() if mood == "refused" else server.feel(mood)
            time.sleep(6)
            workers.pop(0).send_signal(signal.SIGKILL)
            time.sleep(3)
            workers.append(cli.start(*WORKER))
            spans.append((mood, began, time.time()))
            server.feel("up")
            if mood == "refused":
                server.start()
        said = ""
        for worker in workers:
            _, stderr = worker.communicate(timeout=180)
            assert worker.returncode == 0, stderr
            said += stderr
        requests = server.requests()
    assert any(words in said for words in ("so all workers wait", "as all workers do", "answers again"))
    rows = cli.collect("in")
    assert [row["result"] for row in rows] == [f"answer to {prompt}" for prompt in prompts]
    numbers = cli.status("in")
    assert (numbers["failed"], numbers["done"]) == (0, PROMPTS)
    # While it was broken every worker waited, and one call at a time found out whether it still was.
    mood, began, ended = spans[1]
    probes = [one for one in requests if one["mood"] == mood and began + QUIET_SECONDS < one["at"] < ended]
    assert probes
    assert max(one["open"] for one in probes) == 1
    # A killed worker's calls are made again, and those that were refused; nothing else is.
    again = Counter(one["prompt"] for one in requests if one["status"] == 200)
    assert sum(again.values()) - len(again) <= 3 * SLOTS


NO_NAMES = """
import pathlib, socket
lookup = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    if pathlib.Path(__file__).with_name("mood").read_text() == "nameless" and host == "localhost":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return lookup(host, *more, **named)
socket.getaddrinfo = getaddrinfo
"""
"""Loaded by each worker: while the provider is nameless, no lookup of its name succeeds."""


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_a_name_that_does_not_resolve_for_a_while(cli: Cli, tmp_path: Path) -> None:
    """DNS that fails for all workers, one of which is killed meanwhile, fails no job."""
    (tmp_path / "sitecustomize.py").write_text(NO_NAMES)
    cli.environment["PYTHONPATH"] = str(tmp_path)
    with provider(tmp_path) as server:
        enqueue(cli, server.url.replace("127.0.0.1", "localhost"), [f"prompt {n}" for n in range(PROMPTS)])
        workers = [cli.start(*WORKER) for _ in range(4)]
        cli.wait_for("in", "done", 60)
        server.feel("nameless")
        server.stop()  # connections that are kept alive need no name
        time.sleep(6)
        workers.pop(0).send_signal(signal.SIGKILL)
        # A client that starts now has no address in its cache.
        workers.append(cli.start(*WORKER))
        time.sleep(12)
        server.start()
        server.feel("up")
        said = ""
        for worker in workers:
            _, stderr = worker.communicate(timeout=180)
            assert worker.returncode == 0, stderr
            said += stderr
    assert "Name or service not known" in said
    numbers = cli.status("in")
    assert (numbers["failed"], numbers["done"]) == (0, PROMPTS)


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["no such host", "wrong key"])
def test_one_worker_that_cannot_reach_the_model_stops_alone(cli: Cli, tmp_path: Path, fault: str) -> None:
    """A worker with a dead network or a wrong key beside a good one ends, and says why; no job fails."""
    prompts = [f"prompt {n}" for n in range(PROMPTS)]
    with provider(tmp_path) as server:
        enqueue(cli, server.url, prompts)
        good = dict(cli.environment)
        cli.environment |= (
            {"OPENAI_BASE_URL": "http://no-such-host.invalid/v1"}
            if fault == "no such host"
            else {"OPENAI_API_KEY": "sk-wrong"}
        )
        bad = cli.start(*WORKER)
        cli.environment = good
        others = [cli.start(*WORKER) for _ in range(2)]
        _, stderr = bad.communicate(timeout=120)
        assert bad.returncode == 1, stderr
        assert "does not answer this worker" in stderr
        assert "but it answers others" in stderr
        for worker in others:
            _, stderr = worker.communicate(timeout=120)
            assert worker.returncode == 0, stderr
    numbers = cli.status("in")
    assert (numbers["failed"], numbers["done"]) == (0, PROMPTS)


@pytest.mark.processes
def test_a_wrong_key_beside_a_worker_that_is_busy_pauses_nothing(cli: Cli, tmp_path: Path) -> None:
    """While a worker with the right key has no slot free to probe, the other's denied probes decide nothing."""
    with provider(tmp_path) as server:
        enqueue(cli, server.url, [f"slow {n}" for n in range(16)])
        good = cli.start("worker", "--concurrency", "4")
        cli.wait_for("in", "inflight", 4)
        cli.environment["OPENAI_API_KEY"] = "sk-wrong"
        bad = cli.start("worker", "--concurrency", "8")
        cli.environment["OPENAI_API_KEY"] = "sk-good"
        _, stderr = good.communicate(timeout=120)
        assert good.returncode == 0, stderr
        bad.communicate(timeout=120)
    assert bad.returncode in {0, 1}
    numbers = cli.status("in")
    assert (numbers["done"], numbers["failed"]) == (16, 0)


@pytest.mark.processes
def test_a_set_up_that_is_wrong_is_no_failure_of_jobs(cli: Cli, tmp_path: Path) -> None:
    """The worker counts and reports none as failed, and ends with 3 like for any paused run."""
    with provider(tmp_path) as server:
        enqueue(cli, server.url.removesuffix("/v1"), [f"prompt {n}" for n in range(50)])
        done = cli("worker", check=False)
    assert (done.returncode, "0 done, 0 failed" in done.stderr) == (3, True), done.stderr
    assert "that were called failed alike: 404: Not Found (HTTP 404 from http://127.0.0.1:" in done.stderr
    assert cli.status("in")["pending"] == 50


@pytest.mark.processes
def test_a_removed_run_costs_a_sleeping_worker_no_other_answer(cli: Cli, tmp_path: Path) -> None:
    """A worker that was stopped while a run of its was removed goes on with the others when it wakes up."""
    with provider(tmp_path) as server:
        enqueue(cli, server.url, [f"slow {n}" for n in range(4)])
        (cli.folder / "keep.txt").write_text("".join(f"slow keep {n}\n" for n in range(8)))
        cli("enqueue", "keep.txt", "--model", "openai-chat:moody")
        worker = cli.start("worker", "--concurrency", "12", "--lease", "2")
        cli.wait_for("in", "inflight", 4)
        cli.wait_for("keep", "inflight", 8)
        worker.send_signal(signal.SIGSTOP)
        cli("rm", "in", "--yes")
        worker.send_signal(signal.SIGCONT)
        _, stderr = worker.communicate(timeout=120)
    assert worker.returncode == 0, stderr
    assert cli.status("keep")["done"] == 8


@pytest.mark.processes
def test_a_wrong_key_pauses_the_run(cli: Cli, tmp_path: Path) -> None:
    """With no worker that gets in, the run is paused with the provider's words, and no job is charged."""
    with provider(tmp_path) as server:
        enqueue(cli, server.url, [f"prompt {n}" for n in range(50)])
        cli.environment["OPENAI_API_KEY"] = "sk-wrong"
        done = cli(*WORKER, check=False)
        assert done.returncode == 3
        assert "Incorrect API key provided" in done.stderr
        assert cli.status("in")["pending"] == 50
        cli.environment["OPENAI_API_KEY"] = "sk-good"
        cli("resume", "in")
        cli(*WORKER)
    assert cli.status("in")["done"] == 50
