"""lm-deluge under measurement: `plain` keeps nothing, `sqlite` and `leveldb` are its two caches on disk."""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import TYPE_CHECKING, Any

import rival

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer with `process_prompts_async`, its call for batches."""
    deluge = importlib.import_module("lm_deluge")
    caches = importlib.import_module("lm_deluge.cache")
    models = importlib.import_module("lm_deluge.models")
    importlib.import_module("lm_deluge.api_requests.common")

    def cache(task: rival.Task) -> Any:
        if task.way == "sqlite":
            return caches.SqliteCache(str(task.folder / "cache.db"))
        if task.way == "leveldb":
            return caches.LevelDBCache(str(task.folder / "cache.leveldb"))
        return None

    def work(task: rival.Task) -> Sequence[object]:
        os.environ["BENCH_KEY"] = rival.KEY
        models.register_model(rival.MODEL, rival.MODEL, task.url, "BENCH_KEY", provider="bench")
        client = deluge.LLMClient(
            rival.MODEL,
            max_requests_per_minute=rival.FAR_AWAY,
            max_tokens_per_minute=rival.FAR_AWAY * 1_000,
            max_concurrent_requests=task.slots,
            cache=cache(task),
        )
        found = asyncio.run(client.process_prompts_async(task.prompts, show_progress=False))
        return [one.completion for one in found]

    rival.run(work, ("lm-deluge", "aiohttp"))


if __name__ == "__main__":
    main()
