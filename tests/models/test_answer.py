"""What a function reports with its answer: `lbr.Answer`, the result of an agent, and what a run makes of them."""

from __future__ import annotations

import dataclasses
import enum
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import RequestUsage

import lbr
from lbr.core.errors import NO_USAGE, Permanent, Usage
from lbr.core.types import Reply
from lbr.models.answer import reply_of
from lbr.store import reads
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import Callable


class Box(BaseModel):
    """An answer with an alias."""

    in_it: int = Field(alias="inIt")


class Mood(str, enum.Enum):  # noqa: UP042 - StrEnum converts by itself
    """An output that is a string and more."""

    GOOD = "good"


@dataclasses.dataclass
class Point:
    """An output that is no pydantic model."""

    x: float


@pytest.mark.parametrize(
    ("text", "stored"),
    [("hi", "hi"), ({"a": 1}, '{"a":1}'), (["é"], '["é"]'), (Box(inIt=2), '{"inIt":2}')],
)
def test_an_answer_may_be_what_a_function_returns(text: Any, stored: str) -> None:
    """Its text becomes what it would be alone, and what is not given is not known."""
    assert reply_of(lbr.Answer(text)) == reply_of(text) == Reply(stored)


def test_what_an_answer_reports_is_kept() -> None:
    """Counts may be any whole numbers and money any number; the words for a token limit become one."""
    odd: Any = {"input_tokens": np.int64(7), "output_tokens": 0, "cached_tokens": 3.0}
    answer = lbr.Answer("hi", **odd, cost_usd=0.1, model="m", finish_reason="MAX_TOKENS")
    assert reply_of(answer) == Reply("hi", Usage(7, 0, 10**8, 3), "m", "length")
    for cost in (Decimal("0.000000001"), 1e-9, Fraction(1, 10**9), np.float32(1e-9)):
        assert reply_of(lbr.Answer("hi", cost_usd=cost)).usage == Usage(cost_nanos=1)  # type: ignore[arg-type]
    assert reply_of(lbr.Answer("", cost_usd=100_000)).usage.cost_nanos == 10**14


@pytest.mark.parametrize("name", ["input_tokens", "output_tokens", "cached_tokens"])
@pytest.mark.parametrize("value", [-1, 10**12 + 1, 10**400, 1.5, float("nan"), float("inf"), True, "7", Decimal("nan")])
def test_a_number_that_counts_no_tokens_is_refused(name: str, value: Any) -> None:
    """The job fails at once with the name and the value, and its text is kept: it may be paid for."""
    with pytest.raises(Permanent) as refused:
        reply_of(lbr.Answer("hi", **{name: value}))
    assert str(refused.value).startswith(
        f"expected {name} of lbr.Answer to be a whole number from 0 to 1,000,000,000,000, or None, got: "
    )
    assert refused.value.text == "hi"


@pytest.mark.parametrize("value", [-1e-9, 100_001, 10**400, float("nan"), float("inf"), Decimal("nan"), True, "1"])
def test_a_number_that_is_no_cost_is_refused(value: Any) -> None:
    """So is an amount that no call costs."""
    with pytest.raises(
        Permanent, match=r"expected cost_usd of lbr.Answer to be US dollars from 0 to 100,000, or None, got: "
    ):
        reply_of(lbr.Answer("hi", cost_usd=value))


def test_other_fields_of_an_answer_are_checked() -> None:
    """A model that is no text and a text that is no answer are refused."""
    with pytest.raises(Permanent, match="expected model of lbr.Answer to be a string, or None, got: 3"):
        reply_of(lbr.Answer("hi", model=3))  # type: ignore[arg-type]
    with pytest.raises(Permanent, match="expected the function to return str, dict, list or BaseModel, got: None"):
        reply_of(lbr.Answer(None, input_tokens=3))  # type: ignore[arg-type]


# --- agents -----------------------------------------------------------------------------------------------------------


def with_tool(model: Any, **options: Any) -> Agent[None, Any]:
    """Return an agent that looks an article up before it answers."""
    agent: Agent[None, Any] = Agent(model, **options)

    @agent.tool_plain
    def stock(article: str) -> int:
        """Return how many there are."""
        return len(article)

    return agent


def priced(name: str) -> FunctionModel:
    """Return a model that calls the tool and then answers, for 1,000 tokens in and 100 out each time."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        called = any(isinstance(part, ToolCallPart) for message in messages for part in message.parts)
        part = TextPart("one") if called or not info.function_tools else ToolCallPart("stock", {"article": "a"})
        usage = RequestUsage(input_tokens=1_000, output_tokens=100, cache_read_tokens=500)
        return ModelResponse([part], usage=usage, provider_name="openai", finish_reason="stop")

    return FunctionModel(respond, model_name=name)


async def test_an_agent_with_tools_reports_all_its_requests() -> None:
    """The result of a run is an answer as it is: the sum of its requests, the last one's model and reason."""
    result = await with_tool(TestModel(custom_output_text="It is 7.")).run("How many?")
    assert result.usage.requests == 2
    tokens = result.usage.input_tokens, result.usage.output_tokens
    assert reply_of(result) == Reply("It is 7.", Usage(*tokens), "test", None)
    reply = reply_of(await with_tool(priced("gpt-4o-mini")).run("How many?"))
    nanos = 2 * (500 * 150 + 500 * 75 + 100 * 600)  # of gpt-4o-mini, per token
    assert reply == Reply("one", Usage(2_000, 200, nanos, 1_000), "gpt-4o-mini", "stop")


async def test_the_cost_of_an_agent_is_whole_or_unknown() -> None:
    """It includes the agents that tools call with `usage=`; one response without a price makes it unknown."""
    helper: Agent[None, str] = Agent(priced("gpt-4o-mini"))
    agent = with_tool(priced("gpt-4o-mini"))
    helped: Agent[None, Any] = Agent(priced("gpt-4o-mini"))

    @helped.tool(name="stock")
    async def ask(context: RunContext[None], article: str) -> str:
        """Ask another agent."""
        return (await helper.run(article, usage=context.usage)).output

    alone, two = reply_of(await agent.run("How many?")), reply_of(await helped.run("How many?"))
    assert (two.usage.cost_nanos, two.usage.input_tokens) == (3 * (alone.usage.cost_nanos or 0) // 2, 3_000)
    result = await agent.run("How many?")
    responses = [one for one in result.new_messages() if isinstance(one, ModelResponse)]
    responses[0].usage.cost, responses[0].model_name = None, "nobody-knows"
    assert reply_of(result).usage == Usage(2_000, 200, None, 1_000)
    responses[0].provider_details = {"cost": 0.5}
    assert (reply_of(result).usage.cost_nanos or 0) > 500_000_000
    result.usage.unmeasured_requests = 1
    assert reply_of(result).usage is NO_USAGE


@pytest.mark.parametrize(
    ("kind", "arguments", "stored"),
    [
        (Box, {"inIt": 3}, '{"inIt":3}'),
        (list[Box], [{"inIt": 3}], '[{"inIt":3}]'),
        (Point, {"x": 0.5}, '{"x":0.5}'),
        (int, 3, "3"),
        (Mood, "good", "good"),
    ],
)
async def test_the_output_of_an_agent_may_have_any_type(kind: Any, arguments: Any, stored: str) -> None:
    """What is no text becomes JSON."""
    agent: Agent[None, Any] = Agent(TestModel(custom_output_args=arguments), output_type=kind)
    assert reply_of(await agent.run("hi")).text == stored


async def test_an_output_that_is_no_json_is_refused() -> None:
    """Its usage is counted."""
    result: Any = await Agent(priced("gpt-4o-mini")).run("hi")
    result.output = {"a": object()}
    with pytest.raises(Permanent, match="expected the agent's output to be JSON, got: ") as refused:
        reply_of(result)
    assert refused.value.usage.input_tokens == 1_000


# --- runs -------------------------------------------------------------------------------------------------------------


async def put(function: Callable[[str], Any], db_url: str, count: int = 10, **options: Any) -> None:
    """Enqueue prompts for a function."""
    await lbr.enqueue([f"p{n}" for n in range(count)], run="f", function=function, db_url=db_url, **options)


async def test_a_budget_counts_what_a_function_reports(db_url: str) -> None:
    """It ends the run before it is passed, and the status, rows and failed tries show tokens and cost."""

    def dear(prompt: str) -> lbr.Answer:
        if prompt == "p0":
            return lbr.Answer("", input_tokens=-1)
        return lbr.Answer(prompt, input_tokens=10, output_tokens=2, cost_usd=0.25, model="mine")

    await put(dear, db_url)
    report = await lbr.work(run="f", functions=[dear], concurrency=1, max_cost=1, db_url=db_url)
    assert (report.done, report.failed) == (0, 1)
    assert report.paused["f"].message.startswith("its calls report neither tokens nor cost; return lbr.Answer with")
    await lbr.resume("f", db_url=db_url)
    report = await lbr.work(run="f", functions=[dear], concurrency=4, db_url=db_url)
    assert (report.done, report.paused["f"].cause) == (4, "budget")
    (run,) = (await lbr.status("f", db_url=db_url)).runs
    assert (run.cost_usd, run.input_tokens, run.output_tokens, run.unpriced) == (1.0, 40, 8, 0)
    rows = (await lbr.collect("f", include="usage", status="done", db_url=db_url)).rows or []
    assert [(row["model"], row["input_tokens"], row["cost_usd"]) for row in rows] == [("mine", 10, 0.25)] * 4


async def test_tokens_without_a_cost_need_a_price(db_url: str) -> None:
    """Without one the budget pauses the run after one call; with one the tokens are priced."""

    def counted(prompt: str) -> lbr.Answer:
        return lbr.Answer(prompt, input_tokens=1_000, output_tokens=0)

    await put(counted, db_url)
    report = await lbr.work(run="f", functions=[counted], max_cost=1, db_url=db_url)
    assert (report.done, report.paused["f"].cause) == (1, "unpriced")
    assert report.paused["f"].message == (
        "its calls report tokens but no cost; return lbr.Answer with cost_usd, or with tokens and repeat the enqueue "
        "with --price in=…,out=…"
    )
    await put(counted, db_url, price="in=1,out=1")
    await lbr.resume("f", db_url=db_url)
    assert (await lbr.work(run="f", functions=[counted], db_url=db_url)).done == 9
    (run,) = (await lbr.status("f", db_url=db_url)).runs
    assert run.cost_usd == pytest.approx(0.009)
    assert (run.unpriced, run.input_tokens) == (1, 10_000)


async def test_tokens_a_minute_count_what_a_function_reports(db_url: str) -> None:
    """A call that took more than was debited holds the next ones back."""

    def long(prompt: str) -> lbr.Answer:
        return lbr.Answer(prompt, input_tokens=50_000, output_tokens=10_000)

    await put(long, db_url, 1)
    await lbr.work(run="f", functions=[long], tpm=20_000, db_url=db_url)
    async with opened(db_url) as database:
        (found,) = (await database.read(reads.overview)).limits
    assert found.limit.tokens is not None
    assert -60_000 < found.limit.tokens < -58_000
