"""Tiers: what is sent for them, which models have them, and that no answer depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lbr.api.enqueue import enqueue
from lbr.api.estimate import estimate
from lbr.api.operate import status
from lbr.core.errors import RunMismatchError, UsageError
from lbr.core.tiers import check_tier, sent_settings
from lbr.core.types import KeyMaker, Prompt, Task
from lbr.models.build import check_task, unsent

if TYPE_CHECKING:
    from lbr.store.database import Database

MODEL = "openai-chat:gpt-5-mini"


@pytest.mark.parametrize(
    "model",
    ["openai-chat:m", "openai:m", "openai-responses:m", "azure:gpt-5-mini", "google:gemini-2.5-flash"],
)
def test_flex_is_sent_where_it_is_offered(model: str) -> None:
    """As a setting that the provider gets, whichever adapter sends it."""
    task = Task(model=model, settings={"max_tokens": 9}, tier="flex")
    check_tier(task)
    assert sent_settings(task) == {"max_tokens": 9, "service_tier": "flex"}
    assert unsent(task) == []
    assert sent_settings(Task(model=model, tier="standard")) == {}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            {"model": "anthropic:claude-sonnet-4-5"},
            "no flex tier: only OpenAI, Azure and Gemini offer it .*leave out --tier",
        ),
        ({"model": "openrouter:openai/gpt-5"}, "no flex tier"),
        ({"function": "m:f"}, "function:m:f has no flex tier"),
        ({"model": MODEL, "settings": {"service_tier": "priority"}}, "got: both"),
        ({"model": MODEL, "settings": {"extra_body": {"service_tier": "flex"}}}, "got: both"),
    ],
)
def test_a_tier_that_no_call_could_have_is_refused(task: Any, words: str) -> None:
    """With the reason, and what to do."""
    with pytest.raises(UsageError, match=words):
        check_tier(Task(**task, tier="flex"))


def test_an_odd_tier_is_left_to_the_check_of_settings() -> None:
    """Of a setting, whatever type it has."""
    with pytest.raises(UsageError, match="the setting service_tier cannot be"):
        check_task(Task(model=MODEL, settings={"service_tier": [1]}))


def test_a_redone_job_of_another_model_goes_without() -> None:
    """Its provider may not know the tier."""
    assert sent_settings(Task(model="groq:m", tier="flex")) == {}


def test_no_key_depends_on_the_tier() -> None:
    """So that whoever changes it pays for no answer twice; a setting of that name is a setting as ever."""
    keys = {KeyMaker(Task(model=MODEL, tier=tier)).key(Prompt("a")) for tier in (None, "standard", "flex")}
    assert len(keys) == 1
    task = Task(model=MODEL, tier="flex")
    assert Task.from_json(task.to_json()) == task
    assert b"tier" not in task.canonical()
    assert b"service_tier" in Task(model=MODEL, settings={"service_tier": "flex"}).canonical()


async def test_a_run_changes_its_tier(database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on, with the same jobs; without the parameter it stays as it is."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")

    async def tier_after(**more: Any) -> str | None:
        report = await enqueue(["a", "b"], run="r", model=MODEL, db_url=db_url, **more)
        assert report.counts.inputs == 2
        (found,) = (await status(db_url=db_url)).runs
        assert found.jobs == 2
        return found.tier

    assert await tier_after() is None
    assert await tier_after(tier="flex") == "flex"
    assert await tier_after() == "flex"
    assert await tier_after(tier="standard") == "standard"
    with pytest.raises(UsageError, match="expected tier to be one of standard, flex, got: 'fast'"):
        await tier_after(tier="fast")
    with pytest.raises(RunMismatchError, match=r"different task \(instructions"):
        await tier_after(tier="flex", instructions="x")


async def test_an_estimate_is_at_the_price_of_the_tier() -> None:
    """Half the table's, or the factor of a price of one's own."""
    asked: dict[str, Any] = {"model": MODEL, "output_tokens": 100}
    standard, flex = await estimate(["a" * 400], **asked), await estimate(["a" * 400], tier="flex", **asked)
    assert flex.price == {"in": 0.125, "out": 1.0}
    assert standard.cost_usd is not None
    assert flex.cost_usd == pytest.approx(standard.cost_usd / 2)
    own = await estimate(["a" * 400], tier="flex", price="in=1,out=1", batch_factor=0.1, **asked)
    assert own.price == {"in": 0.1, "out": 0.1}
