"""async-batch-llm under measurement with its SQLite store: `chat` calls a server, `nap` a function that waits.

The store is left as it comes, which is faster than what lbr promises: committed answers outlive a killed process, but
may be lost with the power.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

import rival

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer with `process_prompts`, one `concurrency` for workers, calls and connections, as its guide says."""
    batch = importlib.import_module("async_batch_llm")
    importlib.import_module("openai")

    async def nap(prompt: str, *, attempt: int, timeout: float, state: object) -> Any:  # noqa: ARG001 - what it calls
        await asyncio.sleep(rival.NAP_SECONDS)
        return batch.CallOutcome(prompt)

    def strategy(task: rival.Task, identity: Any) -> Any:
        if task.way == "nap":
            return batch.CallableStrategy(nap, identity=identity)
        return batch.llm(f"openai-compatible:{rival.MODEL}", base_url=task.url, api_key=rival.KEY)

    async def answer(task: rival.Task) -> list[object]:
        identity = batch.ArtifactIdentity(provider="bench", model=rival.MODEL)
        store = batch.SqliteArtifactStore(task.folder / "artifacts.sqlite", identity=identity)
        found = await batch.process_prompts(
            strategy(task, identity),
            [(str(n), prompt) for n, prompt in enumerate(task.prompts)],
            config=batch.ProcessorConfig(concurrency=task.slots),
            artifact_store=store,
            resume=batch.ResumePolicy.REUSE_SUCCESSES,
            preserve_order=True,
        )
        return [one.output for one in found.results]

    def work(task: rival.Task) -> Sequence[object]:
        return asyncio.run(answer(task))

    rival.run(work, ("async-batch-llm", "openai"))


if __name__ == "__main__":
    main()
