"""What the calls of a model took: the same tokens and dollars as pydantic-ai counts."""

from __future__ import annotations

import random
import warnings
from decimal import Decimal
from typing import Any

import pytest
from genai_prices.data_snapshot import get_snapshot

from lbr.core.errors import Usage
from lbr.models.costs import Costs, cost_nanos

WHERE = [
    ("openai", "https://api.openai.com/v1/"),
    ("openai", "http://127.0.0.1:8000/v1/"),
    ("openai", "https://api.x.ai/v1/"),
    ("openai", "https://api.deepseek.com/v1/"),
    ("openai", "https://api.groq.com/openai/v1/"),
    ("openai", "https://api.mistral.ai/v1/"),
    ("openai", "https://api.together.xyz/v1/"),
    ("openai", "https://generativelanguage.googleapis.com/v1beta/openai/"),
    ("openrouter", "https://openrouter.ai/api/v1"),
    ("ollama", "http://127.0.0.1:11434/v1/"),
]


def usages(rng: random.Random) -> list[dict[str, Any]]:
    """Return usage objects of many shapes: the counts vary, so that a line that was learnt is used for others."""
    made: list[dict[str, Any]] = []
    for _ in range(2):
        prompt, completion = rng.randrange(400_000), rng.randrange(20_000)
        plain = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        cached = {"cached_tokens": rng.randint(0, prompt), "audio_tokens": 0}
        thought = {"reasoning_tokens": rng.randint(0, completion), "audio_tokens": None}
        made += [
            plain,
            {**plain, "prompt_tokens_details": None},
            {**plain, "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {}},
            {**plain, "prompt_tokens_details": cached},
            {**plain, "prompt_tokens_details": cached, "completion_tokens_details": thought},
            {**plain, "total_tokens": prompt + completion + 7},
            {**plain, "prompt_tokens_details": {"cached_tokens": prompt + 1}},
            {**plain, "prompt_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 2}},
            {**plain, "prompt_tokens_details": {"audio_tokens": 5}},
            {**plain, "prompt_cache_hit_tokens": 3, "prompt_cache_miss_tokens": prompt},
        ]
    return made


def as_pydantic_ai_has_it(provider: str, url: str, body: dict[str, Any]) -> Usage:
    """Return tokens and cost by the functions that its adapter calls."""
    from openai.types.chat import ChatCompletion
    from pydantic_ai.messages import ModelResponse
    from pydantic_ai.models.openai._response_fields import map_usage

    taken = map_usage(ChatCompletion.model_validate(body), provider, url, "asked")
    details = {"service_tier": body["service_tier"]} if body.get("service_tier") else {}
    response = ModelResponse(
        parts=[],
        usage=taken,
        model_name=body["model"],
        provider_name=provider,
        provider_url=url,
        provider_details={"finish_reason": "stop", **details},
    )
    try:
        nanos = round(response.cost().total_price * Decimal(10**9))
    except (LookupError, ValueError):
        nanos = None
    return Usage(taken.input_tokens, taken.output_tokens, nanos, taken.cache_read_tokens or None)


def models_at(provider: str, url: str) -> list[str]:
    """Return the models that the price table knows at a URL, else of a provider, at most so many."""
    for name, where in ((None, url), (provider, None), ("openai", None)):
        try:
            found = get_snapshot().find_provider(None, name, where)
        except LookupError:
            continue
        names = [model.id for model in found.models]
        return [*random.Random(1).sample(names, min(len(names), 60)), "of-nobody"]
    raise LookupError(url)


@pytest.mark.parametrize(("provider", "url"), WHERE, ids=[url for _, url in WHERE])
async def test_tokens_and_cost_are_the_same(provider: str, url: str) -> None:
    """For every model, at every place, with every shape of usage."""
    warnings.simplefilter("ignore")
    rng = random.Random(url)
    costs = Costs(provider, "asked", url)
    costs.begin()
    await costs.ready(60)
    for model in models_at(provider, url):
        for told in usages(rng):
            body = {
                "id": "c1",
                "object": "chat.completion",
                "created": 1,
                "choices": [],
                "model": model,
                "service_tier": rng.choice([None, "default", "flex", "priority"]),
                "usage": told,
            }
            assert costs.usage(body) == as_pydantic_ai_has_it(provider, url, body), (model, told)


@pytest.mark.parametrize(
    ("url", "model", "processing", "reported", "factor"),
    [
        ("https://api.openai.com/v1/", "gpt-5-mini", "flex", "flex", "0.5"),
        ("https://api.openai.com/v1/", "gpt-5-mini", "flex", None, "0.5"),
        ("https://api.openai.com/v1/", "gpt-5-mini", "flex", "default", "1"),  # the provider chose another tier
        ("https://api.openai.com/v1/", "gpt-5-mini", "flex", [], "1"),
        ("https://api.openai.com/v1/", "gpt-5-mini", "batch", "default", "0.5"),
        ("https://generativelanguage.googleapis.com/v1beta/openai/", "gemini-2.5-pro", "flex", None, "0.5"),
        ("https://api.groq.com/openai/v1/", "openai/gpt-oss-20b", "flex", "flex", "1"),
    ],
)
async def test_flex_and_batch_are_priced_as_they_were_processed(
    url: str, model: str, processing: Any, reported: Any, factor: str
) -> None:
    """At half the price of the same tokens, unless the provider says that it did not process them so."""
    costs = Costs("openai", "asked", url)
    costs.begin()
    await costs.ready(60)
    body = {"model": model, "usage": {"prompt_tokens": 100_000, "completion_tokens": 5_000}}
    standard = costs.usage(body).cost_nanos
    assert standard
    found = costs.usage({**body, "service_tier": reported}, processing)
    assert found.cost_nanos == round(standard * Decimal(factor))


async def test_cached_tokens_of_flex_are_cheaper_still() -> None:
    """Both discounts count, by the table."""
    costs = Costs("openai", "asked", "https://api.openai.com/v1/")
    costs.begin()
    await costs.ready(60)
    usage = {"prompt_tokens": 100_000, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 90_000}}
    found = costs.usage({"model": "gpt-5-mini", "service_tier": "flex", "usage": usage}, "flex")
    assert found == Usage(100_000, 0, 10_000 * 125 + 90_000 * 25 // 2, 90_000)


@pytest.mark.parametrize(
    ("provider", "model", "reported", "factor"),
    [
        ("google", "gemini-2.5-pro", None, "0.5"),
        ("google", "gemini-2.5-pro", "flex", "0.5"),
        ("google", "gemini-2.5-pro", "standard", "1"),  # the provider chose another tier
        ("azure", "gpt-5-mini", "flex", "0.5"),
        ("openai", "gpt-5-mini", "flex", "0.5"),
    ],
)
def test_flex_costs_half_through_pydantic_ai(provider: str, model: str, reported: str | None, factor: str) -> None:
    """The same, for responses of the other adapter."""
    from pydantic_ai.messages import ModelResponse
    from pydantic_ai.usage import RequestUsage

    def answer(details: Any) -> ModelResponse:
        usage = RequestUsage(input_tokens=100_000, output_tokens=5_000)
        return ModelResponse([], usage=usage, model_name=model, provider_name=provider, provider_details=details)

    standard = cost_nanos(answer(None), "standard")
    assert standard
    found = cost_nanos(answer({"service_tier": reported} if reported else None), "flex")
    assert found == round(standard * Decimal(factor))
