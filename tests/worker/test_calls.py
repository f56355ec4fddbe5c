"""An answer that came is paid for: it is kept, whatever its worker lacks to read or to price it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from bench_chat import chat_server
from genai_prices import data_snapshot
from sqlalchemy import func, select

from lbr.api.enqueue import enqueue
from lbr.api.operate import status
from lbr.api.task import authorize
from lbr.api.work import work
from lbr.core.config import WorkOptions
from lbr.core.errors import Usage
from lbr.core.limits import FIRST_SLOTS
from lbr.core.retry import RetryPolicy
from lbr.models.chat import ChatModel, endpoint_of
from lbr.models.costs import Costs
from lbr.store.database import opened
from lbr.store.limits import all_limits
from lbr.store.schema import jobs, limits
from lbr.worker.attempt import Deadlines, LateCalls, attempt
from lbr.worker.worker import Worker
from tests.models.test_chat import asking, completion
from tests.support import Cli
from tests.support.chat_wire import MODELS, Wire, chat_model, environment, http, reference_model
from tests.support.http_server import Request, Script, Scripted, Server, prompt_of, reply

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


@pytest.mark.slow
async def test_a_lack_of_flex_capacity_slows_nothing_else_down(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers wait it out job by job: no attempt is charged, nothing is learned, no worker cools down."""
    lack = {"message": "Resource unavailable", "type": "resource_unavailable", "code": "resource_unavailable"}
    bodies: list[Any] = []

    def respond(request: Request) -> Script:
        bodies.append(request.json())
        prompt = prompt_of(request)
        asked[prompt] += 1
        if asked[prompt] < 3:
            return reply(429, json.dumps({"error": lack}), {"x-ratelimit-reset-tokens": "6m"})
        return reply(200, json.dumps(completion(model="gpt-5-mini", service_tier="flex")))

    async def noted(model: ChatModel, request: Any) -> Any:
        timeouts.add(request.timeout)
        return await answer(model, request)

    asked: Counter[str] = Counter()
    timeouts: set[float] = set()
    answer = ChatModel.answer
    monkeypatch.setattr(ChatModel, "answer", noted)
    policy = RetryPolicy(backoff_first=0.02, retry_after_most=0.05)
    with Server(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
        await enqueue([f"p{n}" for n in range(40)], run="r", model="openai-chat:gpt-5-mini", tier="flex", db_url=db_url)
        async with opened(db_url) as one, opened(db_url) as other:
            workers = [Worker(it, authorize(), WorkOptions(concurrency=8), policy=policy) for it in (one, other)]
            await asyncio.gather(*(worker.run() for worker in workers))
            learned = await one.read(all_limits)
            attempts = await one.read(lambda c, _: c.scalar(select(func.max(jobs.c.attempts))))
            cooled = await one.read(lambda c, _: c.scalar(select(func.max(limits.c.cooldown_until))))
    assert {body["service_tier"] for body in bodies} == {"flex"}
    assert len(bodies) == 120
    assert timeouts == {900.0}
    (found,) = (await status(db_url=db_url)).runs
    assert (found.done, found.errors, attempts) == (40, {"rate_limited": 80}, 1)
    assert found.cost_usd == pytest.approx(40 * (10 * 125 + 5 * 1000) / 1e9)
    assert [(it.limit.slots, it.limit.cut_at, it.limit.refused) for it in learned] == [(FIRST_SLOTS, None, None)]
    assert cooled == 0


async def test_a_first_call_fills_the_cache_for_the_others(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker calls before it is answered; the cached tokens of the others are counted, at their price."""
    began: list[float] = []
    ended: list[float] = []
    first = threading.Lock()

    def respond(_: Request) -> Script:
        began.append(time.monotonic())
        cached = {"prompt_tokens_details": {"cached_tokens": 0 if first.acquire(blocking=False) else 1_000}}
        usage = {"prompt_tokens": 1_200, "completion_tokens": 5, "total_tokens": 1_205, **cached}
        seconds = 0.5 if len(began) == 1 else 0.0
        ended.append(time.monotonic() + seconds)
        return reply(200, json.dumps(completion(model="gpt-5-mini", usage=usage)), seconds=seconds)

    with Server(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
        asked: dict[str, Any] = {"model": "openai-chat:gpt-5-mini", "warm_cache": True, "db_url": db_url}
        await enqueue([f"p{n}" for n in range(20)], run="r", **asked)
        async with opened(db_url) as one, opened(db_url) as other:
            workers = [Worker(it, authorize(), WorkOptions(concurrency=8)) for it in (one, other)]
            await asyncio.gather(*(worker.run() for worker in workers))
    assert len(began) == 20
    assert min(began[1:]) >= ended[0]
    (found,) = (await status(db_url=db_url)).runs
    assert (found.done, found.input_tokens, found.cached_tokens) == (20, 24_000, 19_000)
    assert found.cost_usd == pytest.approx((5_000 * 250 + 19_000 * 25 + 100 * 2_000) / 1e9)
    assert found.tokens == "tokens 24000 in (19000 of them cached), 100 out"


async def test_a_price_of_ones_own_is_factored_at_flex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the cost is limited: what a call may cost at most is less, so that more calls fit."""
    body = json.dumps(completion(model="gpt-5-mini", service_tier="flex"))
    db_url = f"sqlite:///{tmp_path / 'q.db'}"
    with Scripted(200, body) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
        asked: dict[str, Any] = {"model": "openai-chat:gpt-5-mini", "tier": "flex", "settings": {"max_tokens": 5}}
        await enqueue(["a", "b"], run="r", price="in=1,out=2", batch_factor=0.3, db_url=db_url, **asked)
        await work(max_cost=1, db_url=db_url)
    (found,) = (await status(db_url=db_url)).runs
    assert (found.done, found.price) == (2, {"in": 1.0, "out": 2.0})
    assert found.cost_usd == pytest.approx(2 * (10 * 1 + 5 * 2) * 0.3 / 1e6)
