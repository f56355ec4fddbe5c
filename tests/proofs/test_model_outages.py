"""A provider that goes away in every way, under four real workers that are killed meanwhile: no job fails for it."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import Cli
from tests.support.http_server import Request, Script, Server, completion, prompt_of, reply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPTS = 600
SLOTS = 8
WORKER = ("worker", "--concurrency", str(SLOTS), "--lease", "3", "--timeout", "3")
QUIET_SECONDS = 4.0
"""From then on every worker knows of an outage: calls that were under way have ended."""


SECONDS = 0.1
"""What an answer takes."""
SLOW_SECONDS = 5.0
"""What an answer takes to a prompt that begins with `slow`."""
KEY = "sk-good"


class Provider(Server):
    """A provider that goes away and comes back, and notes each request that it answered.

    Its moods are `up`, `broken` (500 to every call) and `silent` (no call is answered); a file in the folder has it too.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(self._respond)
        self._folder = folder
        self._open: dict[int, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.feel("up")

    def feel(self, mood: str) -> float:
        """Change the mood; return when."""
        self._mood = mood
        (self._folder / "mood.new").write_text(mood)
        (self._folder / "mood.new").rename(self._folder / "mood")
        return time.time()

    def stop(self) -> None:
        """Refuse every connection from now on."""
        self._open.clear()
        super().stop()

    def ended(self, request: Request) -> None:
        """Note what was answered before the provider went away."""
        if seen := self._open.pop(id(request), None):
            self.requests.append(seen)

    def _respond(self, request: Request) -> Script:
        if request.path != "/v1/chat/completions":
            return reply(404, "404: Not Found", {"content-type": "text/plain"})
        prompt, mood = prompt_of(request), self._mood
        seen = {"at": time.time(), "prompt": prompt, "mood": mood, "open": len(self._open) + 1, "status": 200}
        self._open[id(request)] = seen
        seconds = SLOW_SECONDS if prompt.startswith("slow") else SECONDS
        if mood == "silent":
            return Script(wait_seconds=3600)
        if mood == "broken":
            seen["status"], body = 500, {"error": {"message": "internal trouble"}}
        elif request.headers["authorization"] != f"Bearer {KEY}":
            wrong = {"message": "Incorrect API key provided", "code": "invalid_api_key"}
            seen["status"], body = 401, {"error": wrong}
        else:
            return reply(200, completion(f"answer to {prompt}"), seconds=seconds)
        return reply(int(str(seen["status"])), json.dumps(body), seconds=seconds)


def enqueue(cli: Cli, url: str, prompts: list[str]) -> None:
    """Enqueue prompts into the run `in`."""
    cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
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
    with Provider(tmp_path) as server:
        enqueue(cli, server.url, prompts)
        workers = [cli.start(*WORKER) for _ in range(4)]
        for number, mood in enumerate(("refused", "broken", "silent")):
            cli.wait_for("in", "done", 60 + 120 * number)
            began = server.feel(mood)
            if mood == "refused":
                server.stop()
            time.sleep(5)
            workers.pop(0).send_signal(signal.SIGKILL)
            time.sleep(1)
            workers.append(cli.start(*WORKER))
            while mood == "broken" and server.requests[-1]["at"] < began + QUIET_SECONDS:
                time.sleep(0.05)
            spans.append((mood, began, time.time()))
            server.feel("up")
            if mood == "refused":
                server.start()
        said = ""
        for worker in workers:
            _, stderr = worker.communicate(timeout=180)
            assert worker.returncode == 0, stderr
            said += stderr
        requests = server.requests
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
    with Provider(tmp_path) as server:
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
    with Provider(tmp_path) as server:
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
    with Provider(tmp_path) as server:
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
    with Provider(tmp_path) as server:
        enqueue(cli, server.url.removesuffix("/v1"), [f"prompt {n}" for n in range(50)])
        done = cli("worker", check=False)
    assert (done.returncode, "0 done, 0 failed" in done.stderr) == (3, True), done.stderr
    assert "that were called failed alike: 404: Not Found (HTTP 404 from http://127.0.0.1:" in done.stderr
    assert cli.status("in")["pending"] == 50


@pytest.mark.processes
def test_a_removed_run_costs_a_sleeping_worker_no_other_answer(cli: Cli, tmp_path: Path) -> None:
    """A worker that was stopped while a run of its was removed goes on with the others when it wakes up."""
    with Provider(tmp_path) as server:
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
    with Provider(tmp_path) as server:
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
