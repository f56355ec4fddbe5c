"""Curator of Bespoke Labs under measurement; it keeps every answer in a file of its working folder."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import rival

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer with its OpenAI backend, which calls with aiohttp and is the faster one."""
    curator = importlib.import_module("bespokelabs.curator")
    importlib.import_module("bespokelabs.curator.request_processor.online.openai_online_request_processor")
    # It counts tokens with a table that it would download; the same comes with a package that it needs.
    tokenizers = importlib.import_module("litellm.litellm_core_utils.tokenizers")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(str(tokenizers.__file__)).parent)

    def work(task: rival.Task) -> Sequence[object]:
        llm = curator.LLM(
            model_name=rival.MODEL,
            backend="openai",
            backend_params={
                "base_url": task.url,
                "api_key": rival.KEY,
                "max_requests_per_minute": rival.FAR_AWAY,
                "max_tokens_per_minute": rival.FAR_AWAY * 1_000,
                "max_concurrent_requests": task.slots,
            },
        )
        found = llm(task.prompts, working_dir=str(task.folder / "curator"))
        return list(found.dataset["response"])

    rival.run(work, ("bespokelabs-curator", "litellm", "aiohttp"))


if __name__ == "__main__":
    main()
