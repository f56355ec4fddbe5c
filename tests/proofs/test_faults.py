"""Providers that fail in every way, with real processes: what becomes of jobs, and what the server saw."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import Cli
from tests.support.http_server import (
    BAD_ANSWER,
    GOOD,
    LIMITED,
    REFUSED,
    Faulty,
    Prompted,
    Script,
    Scripted,
    completion,
    reply,
    story_of,
)
from tests.worker.test_processes import recount, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.processes

MODEL = "openai-chat:gpt-4o-mini"
SCHEMA = {"type": "object", "properties": {"echo": {"type": "string"}}, "required": ["echo"]}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Cli]:
    """Return a driver of `lbr` on a file: what a provider does is the same on every database."""
    driver = Cli(tmp_path)
    yield driver
    driver.stop_all()


def enqueue(cli: Cli, url: str, lines: list[str], *flags: str) -> None:
    """Enqueue prompts for a provider at a URL."""
    write(cli.folder, lines)
    cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-of-this-test"}
    cli("enqueue", "in.txt", "--model", MODEL, *flags)


def show(cli: Cli, idx: int) -> dict[str, Any]:
    """Return everything about one input."""
    found: dict[str, Any] = json.loads(cli("show", "in", str(idx), "--json").stdout)
    return found


# --- one fault at a time ----------------------------------------------------------------------------------------------


def test_malformed_bodies_are_transient_and_pass(local: Cli) -> None:
    """While every body is broken, jobs fail as transient at their last try; afterwards a retry finishes them."""
    lines = ["one", "two", "three"]
    broken = [True]
    with Prompted(
        lambda prompt, _: reply(200, '{"id": "c1", "choi' if broken else completion(prompt.upper()))
    ) as server:
        enqueue(local, server.url, lines, "--max-attempts", "2")
        assert local("worker", check=False).returncode == 4
        rows = local.collect("in", code=4)
        assert [row["status"] for row in rows] == ["failed"] * 3
        assert all(row["error"] for row in rows)
        assert server.requests == dict.fromkeys(lines, 2)
        assert {one["family"] for one in show(local, 0)["tries"]} == {"transient"}
        broken.clear()
        local("retry", "in")
        local("worker")
        assert [row["result"] for row in local.collect("in")] == ["ONE", "TWO", "THREE"]
        assert server.requests == dict.fromkeys(lines, 3)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Script:
    """Return an error as providers word it."""
    return reply(status, json.dumps({"error": {"message": message, "type": "error"}}), headers)


def test_a_429_is_waited_for_and_not_charged(local: Cli) -> None:
    """A 429 with Retry-After twice, then an answer: no try is charged, and the wait was kept."""
    limit = error(429, "slow down", {"retry-after": "1"})
    with Prompted(lambda _, number: limit if number < 3 else reply(200, completion("at last"))) as server:
        enqueue(local, server.url, ["hello"])
        local("worker")
        story = show(local, 0)
        assert (story["result"], story["attempts"], story["claim_seq"]) == ("at last", 1, 3)
        assert [one["family"] for one in story["tries"]] == ["rate_limited"] * 2
        first, second = (one["at"] for one in story["tries"])
        assert second - first >= 1000
        assert story["finished_at"] - second >= 1000
        assert server.requests == {"hello": 3}


def test_server_errors_are_tried_again_and_charged(local: Cli) -> None:
    """A 500 and a 503, then an answer: the first is charged, and the second waited for."""
    answers = [error(500, "broke"), error(503, "busy"), reply(200, completion("well again"))]
    with Prompted(lambda _, number: answers[number - 1]) as server:
        enqueue(local, server.url, ["hello"])
        local("worker")
        story = show(local, 0)
        assert (story["result"], story["attempts"]) == ("well again", 2)
        assert [one["message"] for one in story["tries"]] == ["broke (HTTP 500)", "busy (HTTP 503)"]


def test_an_answer_cut_off_says_so(local: Cli) -> None:
    """The finish reason `length` is kept with the answer, counted by collect with the way out, and shown."""
    with Prompted(
        lambda prompt, _: reply(200, completion("I was about to", "length") if prompt == "hello" else completion("bye"))
    ) as server:
        enqueue(local, server.url, ["hello", "bye", "hello"])
        local("worker")
    assert local.collect("in")[0]["result"] == "I was about to"
    assert local("collect", "in").stderr == (
        "lbr: run in: 3 rows: 3 done\n"
        "lbr: 2 answers cut off at the token limit of the model; ask for shorter answers or use another model, or redo: "
        "`lbr retry in --where finish_reason=length`\n"
    )
    assert "lbr: 1 answer cut off" in local("collect", "in", "--shape", "unique").stderr
    assert show(local, 0)["finish_reason"] == "length"
    assert "ms, finish reason length, " in local("show", "in", "0").stdout


# --- an account that is empty -----------------------------------------------------------------------------------------


def test_a_billing_error_half_way_pauses_and_loses_nothing(cli: Cli) -> None:
    """The run is paused, every job is kept; once the account is filled `lbr resume` repeats no answered call."""
    lines = [f"p{n}" for n in range(40)]
    with Faulty(broke_after=15) as server:
        enqueue(cli, server.url, lines)
        done = cli("worker", "--concurrency", "4", check=False)
        assert done.returncode == 3, done.stderr
        assert "is paused now: ModelQuotaExceededError: You exceeded your current quota" in done.stderr
        now = cli.status("in")
        assert (now["done"], now["pending"], now["failed"], now["inflight"]) == (15, 25, 0, 0)
        asked = server.requests.total()
        assert 15 < asked <= 15 + 4
        assert "0 done" in cli("worker", check=False).stderr
        assert server.requests.total() == asked
        server.broke_after = None
        cli("resume", "in")
        cli("worker", "--concurrency", "4")
    assert [json.loads(row["result"])["echo"] for row in cli.collect("in")] == lines
    assert server.answered == dict.fromkeys(lines, 1)
    assert all(show(cli, idx)["attempts"] == 1 for idx in (0, 39))
    recount(cli)


# --- everything at once -----------------------------------------------------------------------------------------------


def test_every_fault_at_once_ends_exactly(cli: Cli) -> None:
    """A fifth of all calls fails in one of six ways: every job ends for the right reason, after exactly its calls."""
    rate, max_attempts = 0.2, 3
    lines = [f"p{n}" for n in range(150)] + [f"never {n}" for n in range(2)] + [f"refuse {n}" for n in range(4)]
    stories = {line: story_of(line, rate=rate, max_attempts=max_attempts) for line in lines}
    (cli.folder / "schema.json").write_text(json.dumps(SCHEMA))
    with Faulty(rate=rate) as server:
        flags = ("--schema", "schema.json", "--max-attempts", str(max_attempts))
        enqueue(cli, server.url, lines, *flags)
        workers = [cli.start("worker", "--concurrency", "8", "--timeout", "8") for _ in range(3)]
        told = [worker.communicate(timeout=150)[1] for worker in workers]
        assert {worker.returncode for worker in workers} <= {0, 4}, told
        assert server.requests == {line: len(story) for line, story in stories.items()}
    assert server.answered == {line: story.count(GOOD) for line, story in stories.items() if story[-1] == GOOD} | {
        line: 0 for line, story in stories.items() if story[-1] != GOOD
    }
    rows = cli.collect("in", code=4)
    assert [row["prompt"] for row in rows] == lines
    for row in rows:
        _check_end(row, stories[row["prompt"]][-1])
    numbers = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
    assert numbers["errors"] == _families(stories.values())
    assert (numbers["stale"], numbers["crashed"]) == (0, 0)
    recount(cli)


def _check_end(row: dict[str, Any], last: str) -> None:
    if last == GOOD:
        assert (row["status"], json.loads(row["result"])) == ("done", {"echo": row["prompt"]})
        return
    words = {
        "500": "trouble 500",
        "503": "trouble 503",
        "slow": "no answer within 8 s",
        REFUSED: "not this one",
        BAD_ANSWER: 'is not of type "string"',
    }
    assert row["status"] == "failed"
    assert words.get(last, "") in row["error"]


def _families(stories: Any) -> dict[str, int]:
    names = {LIMITED: "rate_limited", "503": "rate_limited", BAD_ANSWER: "bad_answer", REFUSED: "permanent"}
    faults = [fault for story in stories for fault in story if fault != GOOD]
    return dict(Counter(names.get(fault, "transient") for fault in faults))


# --- servers that hang ------------------------------------------------------------------------------------------------


TRICKLING = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"


@pytest.mark.parametrize("script", [Script(then="hang"), Script(TRICKLING, "trickle")], ids=["silent", "trickling"])
def test_a_server_that_hangs_holds_no_slot_longer_than_the_timeout(local: Cli, script: Script) -> None:
    """Each call ends at --timeout, frees its slot, is tried again, and fails as transient; the worker exits."""
    lines = ["one", "two", "three"]
    with Prompted(lambda _, __: script) as server:
        enqueue(local, server.url, lines, "--max-attempts", "2")
        # One slot: the second prompt is asked only when the first has been given up.
        assert local("worker", "--concurrency", "1", "--timeout", "1", check=False).returncode == 4
        assert server.requests == dict.fromkeys(lines, 2)
    rows = local.collect("in", code=4)
    assert [(row["status"], row["error"]) for row in rows] == [("failed", "no answer within 1 s")] * 3
    story = show(local, 0)
    assert [(one["family"], one["error"]) for one in story["tries"]] == [("transient", "CallTimeout")] * 2
    assert story["attempts"] == 2
    recount(local)


@pytest.mark.parametrize(("flags", "seconds"), [((), "120"), (("--timeout", "900"), "900")])
def test_the_providers_library_waits_as_long_as_the_worker(local: Cli, flags: Any, seconds: str) -> None:
    """The HTTP client, which by itself gives up after ten minutes, is told how long the call may take."""
    local.environment["OPENAI_CUSTOM_HEADERS"] = (
        "X-Of: this-test"  # read by the library alone, so that it makes the call
    )
    with Scripted(200, completion("fine")) as server:
        enqueue(local, server.url, ["hello"])
        local("worker", *flags)
    ((_, headers),) = server.headers_seen
    assert headers["x-stainless-read-timeout"].removesuffix(".0") == seconds
