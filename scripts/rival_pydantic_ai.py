"""pydantic-ai under measurement: `Agent.run` in a gather, which keeps nothing."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

import rival

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer with one agent and its client as they come."""
    ai = importlib.import_module("pydantic_ai")
    models = importlib.import_module("pydantic_ai.models.openai")
    providers = importlib.import_module("pydantic_ai.providers.openai")

    async def answer(task: rival.Task) -> list[object]:
        provider = providers.OpenAIProvider(base_url=task.url, api_key=rival.KEY)
        agent = ai.Agent(models.OpenAIChatModel(rival.MODEL, provider=provider))
        slots = asyncio.Semaphore(task.slots)

        async def ask(prompt: str) -> object:
            async with slots:
                return (await agent.run(prompt)).output

        return await asyncio.gather(*map(ask, task.prompts))

    def work(task: rival.Task) -> Sequence[object]:
        return asyncio.run(answer(task))

    rival.run(work, ("pydantic-ai-slim", "openai"))


if __name__ == "__main__":
    main()
