"""Lines of OpenAI's batch input as a run: their model, their settings, and what is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

import lbr
from lbr.core.errors import InputError, UsageError
from lbr.core.types import Prompt, Shape
from lbr.store import reads, schema
from lbr.store.database import open_database
from tests.io import pipe_in
from tests.support.chat_wire import KEY
from tests.support.http_server import http, scripted, serving

if TYPE_CHECKING:
    from tests.support import Cli

MINI = "openai-chat:gpt-4o-mini"
USER = [{"role": "user", "content": "u"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}, "required": ["b", "a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
COMPLETION = {
    "model": "gpt-4o-mini-2024",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def line(number: int = 0, /, **body: Any) -> dict[str, Any]:
    """Return a line of a batch file."""
    whole = {"model": "gpt-4o-mini", "messages": USER, **body}
    return {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/chat/completions", "body": whole}


def write_lines(folder: Path, *lines: dict[str, Any], name: str = "in.jsonl") -> Path:
    """Write a batch file."""
    (folder / name).write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return folder / name


async def prompts_of(db_url: str, run: str = "in") -> list[Prompt]:
    """Return the stored prompts of a run's inputs, in order."""
    database = await open_database(db_url)
    found = await database.read(reads.find_run, run)
    rows = [row async for page in reads.rows(database, found, Shape.ORIGINAL) for row in page]
    await database.close()
    return [row.prompt for row in rows]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


async def test_settings_that_differ_from_the_runs_make_other_jobs(db_url: str, tmp_path: Path) -> None:
    """Settings equal to the run's are no settings of the job, so that the same work is done once."""
    lines = [line(0, temperature=0.5), line(1), line(2, temperature=0.7), line(3, temperature=0.7, stop=None)]
    path = write_lines(tmp_path, *lines)
    settings = {"temperature": 0.5, "extra_body": {"user": "me"}}
    report = await lbr.enqueue(path, settings=settings, db_url=db_url)
    assert (report.counts.inputs, report.counts.new, report.counts.duplicate) == (4, 3, 1)
    assert [notice[:18] for notice in report.notices] == ["temperature is 0.5"]
    own = [prompt.settings for prompt in await prompts_of(db_url)]
    extra = {"user": "me", "stop": None}
    assert own == [None, None, {"temperature": 0.7}, {"temperature": 0.7, "extra_body": extra}]
    again = await lbr.enqueue(path, settings=settings, db_url=db_url)
    assert (again.counts.known, again.counts.new) == (4, 0)
    # The same prompt without a batch line has the key that it always had.
    plain = await lbr.enqueue([{"messages": USER}], run="plain", model=MINI, settings=settings, db_url=db_url)
    database = await open_database(db_url)
    keys = await database.read(lambda c, _: c.execute(select(schema.prompts.c.key, schema.prompts.c.chat)).all())
    await database.close()
    assert plain.counts.new == 1
    assert len({row.key for row in keys}) == len(keys) - 1
    assert sorted(row.chat for row in keys) == [1, 1, 2, 2]


async def test_each_line_is_sent_as_it_is(db_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's settings, the line's and those of a retry are sent, later ones first; nothing of a body is lost."""
    asked: list[Any] = []

    def respond(request: Any) -> Any:
        asked.append(request.json())
        return http(200, json.dumps(COMPLETION))

    more = {"logit_bias": {"5": 1}, "service_tier": "flex", "response_format": FORMAT, "reasoning_effort": "low"}
    bodies: list[dict[str, Any]] = [
        {"temperature": 0.7, "max_completion_tokens": 9, "stop": ["X"], "seed": 3},
        more,
        {"temperature": 0.5, "user": None},
    ]
    path = write_lines(tmp_path, *(line(n, **body) for n, body in enumerate(bodies)))
    async with serving(scripted(respond)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        await lbr.enqueue(path, settings={"temperature": 0.5, "seed": 1}, db_url=db_url)
        report = await lbr.work(run="in", db_url=db_url)
        assert report.done == 3
        await lbr.retry("in", where=["status=done"], settings={"seed": 8}, db_url=db_url)
        await lbr.work(run="in", db_url=db_url)
    shared = {"model": "gpt-4o-mini", "messages": USER, "stream": False}
    wanted = [
        {**shared, "temperature": 0.7, "max_tokens": 9, "stop": ["X"], "seed": 3},
        {**shared, "temperature": 0.5, "seed": 1, **more},
        {**shared, "temperature": 0.5, "seed": 1, "user": None},
    ]

    def in_order(bodies: list[Any]) -> list[str]:
        return sorted(json.dumps(body, sort_keys=True) for body in bodies)

    assert in_order(asked[:3]) == in_order(wanted)
    assert in_order(asked[3:]) == in_order([{**body, "seed": 8} for body in wanted])
    (structured,) = [body for body in asked[:3] if "response_format" in body]
    assert list(structured["response_format"]["json_schema"]["schema"]["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        ({"model": "gpt-4o"}, {}, "the line names the model 'gpt-4o', the first one 'gpt-4o-mini'; choose one for all"),
        ({"stream": True}, {}, "the body asks for a stream"),
        ({"temperature": "hot"}, {}, "the setting temperature cannot be 'hot'"),
        ({"max_tokens": 0}, {}, "expected max_tokens to be a whole number of at least 1, got: 0"),
        ({"logprobs": True}, {}, "the setting logprobs cannot be set"),
        ({"base_url": "http://x"}, {}, "the setting extra_body.base_url cannot be set"),
        ({"response_format": FORMAT}, {"schema": SCHEMA}, "the line has a response_format, and the run a schema"),
        ({"seed": 5}, {"model": "anthropic:claude-sonnet-4-0"}, "the setting seed is not sent to model"),
    ],
)
async def test_a_line_that_cannot_be_sent_is_refused(
    tmp_path: Path, second: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """The message names the line and the way out, and no database is created."""
    path = write_lines(tmp_path, line(0), line(1, **second), line(2))
    with pytest.raises(InputError, match="in.jsonl, line 2: .*") as caught:
        await lbr.enqueue(path, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "runs.db").exists()


async def test_a_chosen_model_answers_all_lines(db_url: str, tmp_path: Path) -> None:
    """One notice reports it; a model of the same name is the one that was asked for."""
    path = write_lines(tmp_path, line(0), line(1, model="gpt-4o"))
    report = await lbr.enqueue(path, model="offline:echo", run="a", db_url=db_url)
    assert report.notices == ["the inputs name a model of their own, but offline:echo answers them"]
    assert (report.counts.new, report.counts.duplicate) == (1, 1)
    same = write_lines(tmp_path, line(0), name="same.jsonl")
    for run, model in (("b", MINI), ("c", "ollama:gpt-4o-mini")):
        assert (await lbr.enqueue(same, model=model, run=run, db_url=db_url)).notices == []
    reasoning = await lbr.enqueue([line(0, model="gpt-5", temperature=1)], run="d", db_url=db_url)
    assert reasoning.counts.new == 1
    assert (await prompts_of(db_url, "d"))[0].settings == {"extra_body": {"temperature": 1}}


async def test_a_function_gets_the_messages_only(db_url: str) -> None:
    """It has no settings, and lines that differ in them are the same to it; notices report it."""

    async def shout(messages: Any) -> str:
        return str(messages[-1]["content"]).upper()

    rows = await lbr.prompt_map([line(0, seed=1), line(1, seed=2)], shout, db_url=db_url, output_shape="original")
    assert [(row["id"], row["result"]) for row in rows] == [("r-0", "U"), ("r-1", "U")]


async def test_a_stream_names_its_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line is read once, for the model and for its prompt."""
    lines = "".join(f"{json.dumps(line(n, seed=n))}\n" for n in range(3)).encode()
    pipe_in(monkeypatch, lines)
    report = await lbr.enqueue(Path("-"), input_format="jsonl", run="s")
    assert report.counts.new == 3
    pipe_in(monkeypatch, lines)
    found = await lbr.estimate(Path("-"), input_format="jsonl")
    assert (found.model, found.inputs, found.prompts) == (MINI, 3, 3)
    monkeypatch.setenv("MODEL", "offline:echo")
    assert (await lbr.estimate(write_lines(tmp_path, line(0)))).model == "offline:echo"


async def test_other_inputs_name_no_model(tmp_path: Path) -> None:
    """Without batch lines, a model must be chosen as ever."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "model": "gpt-4o"}\n')
    with pytest.raises(UsageError, match="no model given"):
        await lbr.enqueue(path)


@pytest.mark.slow
@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
def test_a_batch_file_of_fifty_thousand_lines(cli: Cli) -> None:
    """All lines are answered, in order, with equal ones called once."""
    write_lines(cli.folder, *(line(n, seed=n % 40_000, response_format=FORMAT) for n in range(50_000)))
    done = cli("run", "in.jsonl", "-o", "out.jsonl", "--model", "offline:echo")
    assert "50000 inputs, 40000 new, 10000 duplicate" in done.stderr
    rows = [json.loads(one) for one in (cli.folder / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r-{n}" for n in range(50_000)]
    assert {(row["status"], row["result"]) for row in rows} == {("done", "u")}
