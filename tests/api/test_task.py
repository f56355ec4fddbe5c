"""A database is data: whoever writes to it can neither have code imported nor move calls and keys elsewhere."""

from __future__ import annotations

import json
import sqlite3
import textwrap
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from sqlalchemy import make_url

from lbr.core.errors import DatabaseError, Family, Permanent, UsageError
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.build import Authority, build_model
from lbr.models.pydantic_ai import PydanticAIModel, check_model
from tests.support import Cli, is_postgresql, postgres
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.processes

MODEL = "openai-chat:gpt-4o-mini"
KEY = "sk-the-key-of-the-worker"
ANSWER = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
)


def write(cli: Cli, sql: str, *values: object) -> None:
    """Write into the queue's database past lbr; values stand for `?`."""
    if is_postgresql(cli.outside_url):
        with postgres.connect(cli.outside_url, options="-c search_path=lbr") as server:
            server.execute(sql.replace("?", "%s").encode(), values)
        return
    with closing(sqlite3.connect(str(make_url(cli.outside_url).database))) as file, file:
        file.execute(sql, values)


@pytest.fixture
def own() -> Iterator[Any]:
    """Serve where the worker's environment says that calls go."""
    with Scripted(200, ANSWER) as server:
        yield server


@pytest.fixture
def attacker() -> Iterator[Any]:
    """Serve where calls must never go."""
    with Scripted(200, ANSWER) as server:
        yield server


@pytest.fixture
def queued(cli: Cli, own: Any) -> Cli:
    """Return a folder with one job for a provider's model, and the key and URL of a worker in its environment."""
    (cli.folder / "in.txt").write_text("hello\n")
    cli.environment |= {"OPENAI_BASE_URL": own.url, "OPENAI_API_KEY": KEY}
    cli("enqueue", "in.txt", "--model", MODEL)
    return cli


def attacks(url: str) -> list[dict[str, Any]]:
    """Return settings that would move calls to a server, or hand it a key."""
    return [
        {"base_url": url},
        {"extra_headers": {"Host": url}},
        {"extra_body": {"api_base": url}},
        {"openai_base_url": url},
        {"api_key": "sk-another"},
        {"api_base": url},
        {"http_client": url},
        {"provider": {"base_url": url}},
        {"extra_body": {"litellm_params": [{"api-base": url}]}},
        {"extra_body": {"extra_headers": {"X-Forward-To": url}}},
        {"openai_native_tools": [{"type": "mcp", "server_label": "x", "server_url": url}]},
        {"max_retries": 50},
    ]


NUMBER = len(attacks(""))
WITH_PROCESSES = 3
"""So many of them are tried with real workers, which take their time to start."""


@pytest.mark.slow
def test_settings_written_into_the_database_move_no_call(queued: Cli, own: Any, attacker: Any) -> None:
    """A worker refuses a run whose stored settings say where calls go, names them, and calls nobody."""
    for settings in attacks(attacker.url)[:WITH_PROCESSES]:
        task = {"model": MODEL, "settings": settings}
        write(queued, "UPDATE runs SET task = ?", json.dumps(task))
        done = queued("worker", check=False)
        assert done.returncode == 1, done.stderr
        name = next(iter(settings))
        assert "run in: not served:" in done.stderr
        assert name in done.stderr
        assert KEY not in done.stdout + done.stderr
    assert (own.asked, attacker.asked) == ([], [])
    assert queued.status("in")["pending"] == 1
    write(queued, "UPDATE runs SET task = ?", json.dumps({"model": MODEL}))
    queued("worker")
    assert (len(own.asked), attacker.asked) == (1, [])


@pytest.mark.slow
def test_settings_of_one_job_move_no_call(queued: Cli, attacker: Any) -> None:
    """Settings that somebody stored beside a prompt reach no other server either, and no key leaves."""
    for settings in attacks(attacker.url)[:WITH_PROCESSES]:
        write(queued, "UPDATE prompts SET settings = ?", json.dumps(settings))
        done = queued("worker", check=False)
        assert KEY not in done.stdout + done.stderr
        queued("retry", "in")
    assert attacker.asked == []


@pytest.mark.parametrize("number", range(NUMBER))
async def test_a_job_with_such_settings_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, number: int, own: Any, attacker: Any
) -> None:
    """The settings of one job are checked before its call; the job fails, the run goes on."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", own.url)
    settings = attacks(attacker.url)[number]
    model = PydanticAIModel(MODEL, task_settings={})
    asked = Request(prompt=Prompt(text="x"), task=Task(model=MODEL), job_id=JobId(1), seq=1, settings=settings)
    with pytest.raises(Permanent) as caught:
        await model.answer(asked)
    assert caught.value.family is Family.PERMANENT
    assert next(iter(settings)) in str(caught.value)
    await model.aclose()
    assert (own.asked, attacker.asked) == ([], [])


@pytest.mark.parametrize("number", range(NUMBER))
def test_a_worker_refuses_them_for_a_run(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The answerer of a run is not built from settings that no database may bring."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = attacks("http://127.0.0.1:9/v1")[number]
    with pytest.raises(UsageError, match=next(iter(settings))):
        build_model(Task(model=MODEL, settings=settings), Authority(), concurrency=1)


@pytest.mark.parametrize("number", range(NUMBER))
def test_enqueue_refuses_them_too(number: int) -> None:
    """What a worker would refuse is refused before it is stored."""
    settings = attacks("http://127.0.0.1:9/v1")[number]
    with pytest.raises(UsageError, match=next(iter(settings))):
        check_model(MODEL, settings)


def test_a_body_of_ones_own_is_still_allowed() -> None:
    """What a server takes beside the usual, and the names in a schema, are no say in where calls go."""
    schema = {"type": "object", "properties": {"endpoint": {"type": "string"}, "api_key": {"type": "string"}}}
    check_model(MODEL, {"extra_body": {"guided_json": schema, "top_k": 5, "provider": {"order": ["a"]}}})


def test_a_function_that_was_not_named_is_not_imported(cli: Cli) -> None:
    """A run that names a function gets it only from a worker that was told of it: nothing else is imported."""
    (cli.folder / "in.txt").write_text("hello\n")
    for name in ("evil", "good"):
        (cli.folder / f"{name}.py").write_text(
            textwrap.dedent(
                f"""
                open("{name} was imported", "w").close()

                def answer(prompt):
                    open("{name} was called", "w").close()
                    return prompt
                """
            )
        )
    cli("enqueue", "in.txt", "--function", "good:answer")
    (cli.folder / "good was imported").unlink()
    for task in ({"function": "evil:answer"}, {"function": "evil:answer", "fingerprint": "0" * 32}):
        write(cli, "UPDATE runs SET task = ?", json.dumps(task))
        for flags in ((), ("--function", "good:answer")):
            done = cli("worker", *flags, check=False)
            assert done.returncode == 1
            assert "the run asks for function evil:answer" in done.stderr
    assert not list(Path(cli.folder).glob("evil was *"))
    assert not (cli.folder / "good was called").exists()
    assert cli.status("in")["pending"] == 1
    cli("collect", "in", check=False)
    cli("show", "in", "0")
    cli("status", "in")
    assert not list(Path(cli.folder).glob("evil was *"))


def test_a_schema_fetches_nothing(queued: Cli, own: Any, attacker: Any) -> None:
    """A stored schema that refers to a document elsewhere has nobody fetch it."""
    url = f"{attacker.url}/schema.json"
    schema = {"type": "object", "properties": {"a": {"$ref": url}}}
    write(queued, "UPDATE runs SET task = ?", json.dumps({"model": MODEL, "schema": schema}))
    done = queued("worker", check=False)
    assert done.returncode == 1
    assert "run in: not served" in done.stderr
    assert (own.asked, attacker.asked, attacker.headers_seen) == ([], [], [])


@pytest.mark.parametrize(
    "task",
    [
        {"model": 5},
        {"function": 5},
        {"model": MODEL, "instructions": 5},
        {"model": MODEL, "schema": "object"},
        {"model": MODEL, "settings": []},
    ],
)
def test_a_task_of_other_types_is_none(task: dict[str, Any]) -> None:
    """What another program wrote is refused in words where it is read, not wherever it is used."""
    with pytest.raises(DatabaseError, match="expected a stored task"):
        Task.from_json(json.dumps(task))


@pytest.mark.parametrize("body", ["{nope", "5", "[5]", "{}"])
def test_stored_messages_of_other_types_are_none(body: str) -> None:
    """The same holds for a prompt."""
    with pytest.raises(DatabaseError, match="expected stored messages"):
        Prompt.from_body(body, chat=True)


@pytest.mark.parametrize(
    ("table", "column", "value", "says"),
    [
        ("limits", "rpm", "'x'", "expected rpm of limits to be integer, got: text"),
        ("limits", "rpm", "-5", "expected stored limits of at least 1 for 'offline:echo'"),
        ("limits", "slots", "'x'", "expected slots of limits to be real, got: text"),
        ("runs", "budget_nanos", "'x'", "expected budget_nanos of runs to be integer, got: text"),
        ("runs", "task", "'x'", "cannot read run 'in': expected a stored task"),
        ("jobs", "available_at", "'x'", "expected available_at of jobs to be integer, got: text"),
        ("prompts", "body", "x'ff00'", "expected body of prompts to be text, got: blob"),
    ],
)
def test_a_file_of_wrong_types_is_an_error(tmp_path: Path, table: str, column: str, value: str, says: str) -> None:
    """Whatever another program wrote into the file, a worker tells what and where, and does not break down or wait."""
    cli = Cli(tmp_path)
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    cli("enqueue", "in.txt", "--model", "offline:echo")
    cli("limit", "offline:echo", "--rpm", "100")
    with closing(sqlite3.connect(tmp_path / "runs.db")) as connection:
        connection.execute(f"UPDATE {table} SET {column} = {value}")
        connection.commit()
    told = [
        cli(*command, check=False) for command in (("worker", "--until", "empty"), ("collect", "in", "-o", "o.csv"))
    ]
    failed = [done for done in told if done.returncode == 1]
    assert failed, told
    assert all(says in done.stderr for done in failed), told


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_key_is_nowhere(tmp_path: Path, status: int) -> None:
    """A key that the provider even repeats is in no output, no file, no command line and no message."""
    key = "sk-secret-of-this-test-0123456789"
    body = json.dumps({"error": {"message": f"no such key: {key}", "type": "x", "code": "y"}})
    cli = Cli(tmp_path, XDG_STATE_HOME=str(tmp_path / "state"))
    with Scripted(status, body, {"retry-after": "0.05"}) as server:
        cli.environment |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": key}
        (tmp_path / "in.txt").write_text("one\n")
        told = [cli("enqueue", "in.txt", "--model", MODEL, "--max-attempts", "1")]
        worker = cli.start("worker")
        command_line: list[str] = []
        while worker.poll() is None:
            with suppress(psutil.Error):
                command_line += psutil.Process(worker.pid).cmdline()
            if server.asked:
                worker.terminate()
            time.sleep(0.02)
        seen = [*worker.communicate(), *command_line]
    assert server.asked
    told += [cli(*command, check=False) for command in (("status",), ("show", "in", "0"), ("collect", "in"))]
    seen += [text for done in told for text in (done.stdout, done.stderr)]
    assert "worker" in seen
    assert key not in "\n".join(seen)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file
