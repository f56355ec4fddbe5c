"""What the programs of the rivals share: prompts from a file, answers into another, the clock between the two.

Each rival_*.py runs in the rival's own environment, which has nothing of lbr's, so this needs the standard library
alone. A program is started with a URL, a folder that holds prompts.json and is there again for a second try, the
number of calls at a time, and which way of using the rival is meant.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODEL = "bench"
KEY = "sk-bench-no-secret"
FAR_AWAY = 100_000_000
"""A rate limit in a minute that is never met."""
NAP_SECONDS = 0.005
PROMPTS, ANSWERS = "prompts.json", "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done: answer the prompts, so many at a time, keeping what is to be kept in the folder."""

    url: str
    folder: Path
    slots: int
    way: str
    prompts: list[str]


def run(work: Callable[[Task], Sequence[object]], packages: Sequence[str]) -> None:
    """Do the task of the command line; write its answers in the order of the prompts and print what it took.

    The clock runs from before the work until the answers are written. It does not count what was imported before.
    """
    url, folder, slots, way = sys.argv[1:]
    prompts = json.loads((Path(folder) / PROMPTS).read_text(encoding="utf-8"))
    task = Task(url, Path(folder), int(slots), way, prompts)
    started, cpu = time.perf_counter(), time.process_time()
    answers = work(task)
    with (task.folder / ANSWERS).open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"prompt": prompt, "result": answer}) + "\n"
            for prompt, answer in zip(task.prompts, answers, strict=True)
        )
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps(took | {"versions": {name: version(name) for name in packages}}), flush=True)
