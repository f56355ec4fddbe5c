"""Answers that end too early, from the server to the report: one call, kept, counted, and the way to redo them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.models.test_chat import completion
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from tests.support import Cli

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def enqueue(cli: Cli, url: str, *flags: str, count: int = 3) -> None:
    """Enqueue some prompts for a model at a URL."""
    cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-of-this-test"}
    (cli.folder / "in.txt").write_text("".join(f"p{n}\n" for n in range(count)))
    cli("enqueue", "in.txt", "--model", "openai-chat:of-nobody", "--price", "in=1,out=200", *flags)


def show(cli: Cli) -> Any:
    """Return all that there is about the first input."""
    return json.loads(cli("show", "in", "0", "--json").stdout)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"name": "Os'])
@pytest.mark.parametrize("limit", [True, False])
def test_an_answer_cut_off_is_asked_for_once(cli: Cli, content: str, limit: bool) -> None:
    """It fails at once, is kept and counted, and the advice fits what cut it off."""
    (cli.folder / "schema.json").write_text(json.dumps(SCHEMA))
    flags = ("--set", "max_tokens=5") if limit else ()
    schema = ("--schema", "schema.json") if content else ()
    with Scripted(200, json.dumps(completion(content, "length"))) as server:
        enqueue(cli, server.url, *flags, *schema)
        worker = cli("worker", check=False)
    assert len(server.asked) == 3
    advice = (
        "3 answers cut off at max_tokens; to redo: `lbr retry in --where finish_reason=length --set max_tokens=NUMBER`"
        if limit
        else "3 answers cut off at the token limit of the model; ask for shorter answers or use another model, or redo: "
        "`lbr retry in --where finish_reason=length`"
    )
    assert f"lbr: {advice}\n" in worker.stderr
    assert f"lbr: {advice}\n" in cli("collect", "in", check=False).stderr
    (one,) = show(cli)["tries"]
    cut = "max_tokens=5" if limit else "the token limit of the model"
    assert one["message"].startswith(f"the answer was cut off at {cut}: ")
    assert (one["family"], one["finish_reason"], one["output_tokens"]) == ("cut_off", "length", 5)
    assert one["text"] == content or json.loads(one["text"]) == completion(content, "length")
    now = cli.status("in")
    assert (now["failed"], now["input_tokens"], now["output_tokens"]) == (3, 30, 15)
    assert cli("retry", "in", "--where", "finish_reason=length").stdout == "run in: 3 jobs back to pending\n"


def test_an_answer_broken_off_is_never_done(cli: Cli) -> None:
    """It is tried again and fails in the end, and each try has its text, its tokens and why it ended."""
    with Scripted(200, json.dumps(completion("The half of", "abort"))) as server:
        enqueue(cli, server.url, "--max-attempts", "2", count=1)
        cli("worker", check=False)
    assert len(server.asked) == 2
    assert [(t["family"], t["text"], t["finish_reason"]) for t in show(cli)["tries"]] == [
        ("transient", "The half of", "abort")
    ] * 2
    assert ", finish reason abort, tokens 10 in, 5 out" in (shown := cli("show", "in", "0").stdout)
    assert shown.count("  raw answer\n    The half of") == 2
    assert cli.status("in")["output_tokens"] == 10


@pytest.mark.parametrize("body", [completion(None), completion(choices=[])])
def test_a_budget_counts_answers_that_cannot_be_used(cli: Cli, body: Any) -> None:
    """Each call takes $0.00101; with $0.005 to spend no sixth is made, though none brought an answer."""
    with Scripted(200, json.dumps(body)) as server:
        enqueue(cli, server.url, count=30)
        done = cli("worker", "--concurrency", "1", "--max-cost", "0.005", check=False)
    assert done.returncode == 3, done.stderr
    assert len(server.asked) <= 5
    now = cli.status("in")
    assert (now["input_tokens"], now["output_tokens"]) == (10 * len(server.asked), 5 * len(server.asked))
    assert json.loads(show(cli)["tries"][0]["text"]) == body
