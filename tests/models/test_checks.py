"""Keys and base URLs of the environment: refused before any call when no call could be made with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.core.errors import UsageError
from lbr.core.types import Task
from lbr.models.build import Authority, build_model
from lbr.models.checks import check_environment, takes_max_completion_tokens
from tests.support import Cli
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "openai-chat:m"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without keys and base URLs."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("'http://x/v1'", "has quotes around it"),
        ('"http://x/v1"', "has quotes around it"),
        ("127.0.0.1:8000/v1", "does not begin with http:// or https://"),
        ("ftp://x/v1", "does not begin with http:// or https://"),
        ("http://x/v1 ", "contains white space"),
        ("http://x/v1\n", "contains white space"),
        ("http://a b/v1", "contains white space"),
        ("http://", "has no host"),
        ("https:///v1", "has no host"),
        ("http://:8000/v1", "has no host"),
        ("http://127.0.0.1:99999/v1", "has a bad host or port"),
        ("http://127.0.0.1:80a/v1", "has a bad host or port"),
        ("http://[::1/v1", "has a bad host or port"),
    ],
)
@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (MODEL, "OPENAI_BASE_URL"),
        ("openai:gpt-5", "OPENAI_BASE_URL"),
        ("anthropic:claude-sonnet-4-0", "ANTHROPIC_BASE_URL"),
        ("ollama:x", "OLLAMA_BASE_URL"),
        ("openrouter:a/b", "OPENROUTER_BASE_URL"),
    ],
)
def test_a_bad_base_url_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, url: str, problem: str
) -> None:
    """The variable and what is wrong with it are named, at the enqueue and by the worker."""
    monkeypatch.setenv(variable, url)
    monkeypatch.setenv(variable.replace("_BASE_URL", "_API_KEY"), "sk-good")
    if name.startswith("openrouter:") and not url:
        check_environment(name)  # empty, it is as if unset
        return
    with pytest.raises(UsageError, match=f"^{variable} {problem}"):
        check_environment(name)
    with pytest.raises(UsageError, match=f"^{variable} {problem}"):
        build_model(Task(model=name), Authority(), concurrency=1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "HTTPS://x.example/v1/"])
def test_a_good_environment_passes(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Keys and URLs that calls can be made with pass, and so does what is not set."""
    check_environment(MODEL)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "any-key-of-a-server's-own")
    check_environment(MODEL)
    monkeypatch.setenv("OPENROUTER_BASE_URL", "")
    check_environment("openrouter:a/b", "sk-or")


@pytest.mark.parametrize(
    "key",
    [
        "sk-secret\n",
        "sk-sec\r\nret",
        " sk-secret",
        "sk-secret\t",
        "sk-sec\u200bret",
        "\ufeffsk-secret",
        "sk-secret\u2026",
        "sk-sec\x01ret",
        "sk-sec ret",
        "\u201csk-secret\u201d",
    ],
)
@pytest.mark.parametrize(
    ("name", "variable"),
    [
        (MODEL, "OPENAI_API_KEY"),
        ("openrouter:a/b", "OPENROUTER_API_KEY"),
        ("anthropic:claude-sonnet-4-0", "ANTHROPIC_API_KEY"),
        ("google:gemini-2.5-flash", "GOOGLE_API_KEY"),
    ],
)
def test_a_bad_key_is_named_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str, key: str
) -> None:
    """The variable is named, the key is not."""
    monkeypatch.setenv(variable, key)
    for check in (
        lambda: check_environment(name),
        lambda: build_model(Task(model=name), Authority(), concurrency=1),
    ):
        with pytest.raises(UsageError, match=f"^{variable}.* contains a line break, a space, an invisible") as caught:
            check()
        assert "sec" not in str(caught.value)


def test_a_password_in_a_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the host is left out of the message."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@x/v1 ")
    with pytest.raises(UsageError) as caught:
        check_environment(MODEL)
    assert "secret" not in str(caught.value)


def test_a_key_of_a_call_is_checked_too() -> None:
    """One that is passed as an argument is refused like one of the environment."""
    with pytest.raises(UsageError, match=r"openrouter_api_key.* contains a line break"):
        check_environment("openrouter:a/b", "sk\n")


async def test_no_job_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker with a bad key serves nothing and calls nobody; with a good one it answers the same jobs."""
    db_url = str(tmp_path / "q.db")
    await lbr.enqueue(["a", "b"], run="r", model=MODEL, db_url=db_url)
    with Scripted() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        with pytest.raises(UsageError, match="OPENAI_API_KEY contains a line break"):
            await lbr.work(run="r", db_url=db_url)
        with pytest.raises(UsageError, match="OPENAI_API_KEY contains a line break"):
            await lbr.enqueue(["a", "b"], run="s", model=MODEL, db_url=db_url)
        assert server.asked == []
    (run,) = (await lbr.status(db_url=db_url)).runs
    assert (run.pending, run.errors) == (2, {})


@pytest.mark.parametrize(
    ("url", "newer"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1/", True),
        ("https://API.OpenAI.com:443/v1", True),
        ("https://mine.openai.azure.com/openai/v1/", True),
        ("https://mine.openai.azure.us/openai/v1/", True),
        ("https://mine.openai.azure.cn/openai/v1/", True),
        ("https://mine.services.ai.azure.com/openai/v1/", True),
        ("https://mine.services.ai.azure.com/models", False),
        ("https://api.openai.com.example/v1", False),
        ("https://fakeapi.openai.com/v1", False),
        ("http://127.0.0.1:8000/v1", False),
        ("https://api.mistral.ai/v1", False),
    ],
)
def test_who_knows_the_newer_name_of_max_tokens(url: str, newer: Any) -> None:
    """OpenAI's own hosts and Azure's do; of other servers nothing is known."""
    assert takes_max_completion_tokens(url) is newer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai-chat:m", "gone.pem"),
        ("openai-chat:m", "empty.pem"),
        ("openai-chat:m", "."),
        ("openai-responses:m", "gone.pem"),
        ("openrouter:a/b", "gone.pem"),
    ],
)
def test_certificates_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    """`lbr run` and `lbr worker` name the variable and the path before a call, and `lbr run` enqueues nothing."""
    for one in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(one, raising=False)
    cli = Cli(tmp_path, **{f"{model.split('-', maxsplit=1)[0].split(':', maxsplit=1)[0].upper()}_API_KEY": "k"})
    (tmp_path / "empty.pem").write_text("none\n")
    (tmp_path / "in.txt").write_text("a\n")
    words = f"SSL_CERT_FILE names {name}, which holds no certificates: "
    cli.environment["SSL_CERT_FILE"] = name
    done = cli("run", "in.txt", "-o", "out.jsonl", "--model", model, check=False)
    assert (done.returncode, words in done.stderr, "fix or unset it" in done.stderr) == (2, True, True)
    assert not (tmp_path / "runs.db").exists()
    if model == MODEL:
        cli("enqueue", "in.txt", "--model", model)
        done = cli("worker", "--run", "in", check=False)
        assert (done.returncode, words in done.stderr) == (2, True)
        assert cli.query("SELECT state, claim_seq, attempts FROM jobs") == [("pending", 0, 0)]


@pytest.mark.parametrize(
    ("file", "exported", "warned"),
    [
        ("OPENAI_BASE_URL=http://u:pw@there/v1", "OPENAI_API_KEY", True),
        ("GOOGLE_GEMINI_BASE_URL=http://there", "GEMINI_API_KEY", True),
        ("ANTHROPIC_BASE_URL=http://there\nANTHROPIC_API_KEY=own", "ANTHROPIC_API_KEY", True),
        ("OPENAI_BASE_URL=http://there\nOPENAI_API_KEY=exported", "OPENAI_API_KEY", False),
        ("OPENAI_BASE_URL=http://there", "GROQ_API_KEY", False),
        ("OPENAI_API_KEY=own", "OPENAI_API_KEY", False),
    ],
)
def test_a_folder_that_takes_an_exported_key_elsewhere_is_reported(
    tmp_path: Path, file: str, exported: str, warned: bool
) -> None:
    """A base URL in `.env` and a key from outside are named together, once for all processes; a key of its own is not."""
    cli = Cli(tmp_path, **{exported: "exported"})
    (tmp_path / ".env").write_text(f"{file}\n")
    (tmp_path / "in.txt").write_text("a\n")
    assert f"sends {exported}" not in cli("enqueue", "in.txt", "--model", "offline:echo", check=False).stdout
    said = cli("worker", "--processes", "2").stderr
    assert said.count(f" sends {exported}, which is set outside this file, to 'http://") == warned
    assert said.count(".env: ") == warned
    assert "pw@" not in said
