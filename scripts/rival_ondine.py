"""ondine under measurement; it keeps every answer in a SQLite file until its run has ended."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

import rival

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    """Answer with its pipeline over a table, a row for each call."""
    pandas = importlib.import_module("pandas")
    builder = importlib.import_module("ondine").PipelineBuilder
    importlib.import_module("ondine.adapters.unified_litellm_client")
    importlib.import_module("litellm")

    def work(task: rival.Task) -> Sequence[object]:
        logging.disable(logging.WARNING)
        pipeline = (
            builder.create()
            .from_dataframe(pandas.DataFrame({"prompt": task.prompts}), ["prompt"], ["answer"])
            .with_prompt("{prompt}")
            .with_llm(rival.MODEL, "openai_compatible", rival.KEY, base_url=task.url)
            .with_batch_size(1)
            .with_concurrency(task.slots)
            .with_checkpoint_dir(str(task.folder / "checkpoints"))
            .with_progress_mode("none")
            .build()
        )
        return list(pipeline.execute().to_pandas()["answer"])

    rival.run(work, ("ondine", "litellm"))


if __name__ == "__main__":
    main()
