"""An answer that came is paid for: it is kept, whatever its worker lacks to read or to price it."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from bench_chat import chat_server
from genai_prices import data_snapshot

from lbr.core.errors import Usage
from lbr.models.chat import ChatModel, endpoint_of
from lbr.models.costs import Costs
from lbr.worker.attempt import Deadlines, LateCalls, attempt
from tests.models.test_chat import asking, completion
from tests.support import Cli
from tests.support.chat_wire import MODELS, Wire, chat_model, environment, http, reference_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAME = MODELS["openai"]


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    """Serve where calls go."""
    found = Wire()
    async with found.open() as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        yield found


class Failing:
    """Fails so many times, and then does what it stands for."""

    def __init__(self, does: Any, times: int) -> None:
        self.does = does
        self.left = times
        self.asked = 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        """Fail or do it."""
        self.asked += 1
        if self.left:
            self.left -= 1
            raise OSError(24, "Too many open files")
        return self.does(*arguments, **more)


@pytest.mark.slow
def test_without_a_price_table_every_answer_is_kept(tmp_path: Path) -> None:
    """A worker that cannot import the table makes each call once and knows its tokens, but not its cost."""
    broken = tmp_path / "broken" / "genai_prices"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError(24, 'Too many open files')\n")
    cli = Cli(tmp_path, PYTHONPATH=str(broken.parent))
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(20)))
    with chat_server(0.05) as url:
        cli.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-of-this-test"}
        cli("enqueue", "in.txt", "--model", "openai-chat:gpt-4o-mini", "--max-attempts", "2")
        cli("worker", "--concurrency", "8")
        with urllib.request.urlopen(url, timeout=10) as told:  # noqa: S310
            assert json.load(told)["calls"] == 20
    (found,) = json.loads(cli("status", "in", "--json").stdout)["runs"]
    assert (found["done"], found["failed"], found["input_tokens"]) == (20, 0, 20 * 40)
    assert [row["result"] for row in cli.collect("in")] == [f"p{n}" for n in range(20)]
    assert cli.query("SELECT count(*) FROM results WHERE cost_nanos IS NOT NULL") == [(0,)]


async def test_a_price_table_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that failed leaves the cost of that answer unknown; the next call makes costs known again."""
    snapshot = Failing(data_snapshot.get_snapshot, 1)
    monkeypatch.setattr(data_snapshot, "get_snapshot", snapshot)
    costs = Costs("openai", "gpt-4o-mini", "https://api.openai.com/v1")
    body = completion() | {"model": "gpt-4o-mini"}
    for cost in (None, 4_500, 4_500):
        costs.begin()
        await costs.ready(60)
        assert costs.usage(body) == Usage(10, 5, cost)
    assert snapshot.asked == 2


async def test_a_price_table_that_takes_long_lets_no_call_be_late(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table is not there in time, the answer is kept without its cost."""
    ended = threading.Event()
    monkeypatch.setattr(data_snapshot, "get_snapshot", lambda: ended.wait(60))
    wire.script = http(200, json.dumps(completion()))
    asked = chat_model(NAME)
    try:
        outcome = await attempt(asked, None, asking(timeout=2), Deadlines(2), LateCalls())
    finally:
        ended.set()
        await asked.aclose()
    assert outcome.failure is None
    assert outcome.reply is not None
    assert (outcome.reply.text, outcome.reply.usage) == ("fine", Usage(10, 5, None))


async def test_what_could_not_be_built_is_built_for_a_later_call(wire: Wire) -> None:
    """A call that only pydantic-ai can make fails while that cannot be built, and no longer."""
    wire.script = http(200, json.dumps(completion()))
    endpoint = endpoint_of(NAME)
    assert endpoint is not None
    build_other = Failing(lambda: reference_model(NAME), 1)
    model = ChatModel(endpoint, task_settings={}, build_other=build_other)
    with pytest.raises(OSError, match="Too many open files"):
        await model.answer(asking("<|x|>"))
    assert (await model.answer(asking("<|x|>"))).text == "fine"
    await model.aclose()
