"""The client's CPU for a chat call: by lbr, queue included, with aiohttp alone, and by pydantic-ai's own agent.

    python scripts/bench_calls.py [--calls 3000] [--repeat 3]

A fixed server that takes 50 ms for each answer sits on one core, the client, a process of its own for each
measurement, on another. What is imported and loaded by the first calls is not counted: they are made before. Every
answer is checked. The exit status is 1 if lbr takes more than its target.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import bench_chat as chat
from bench_baselines import chat_prompts, check_lines, end_to_end, expect, timed
from bench_chat_server import SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

AT_A_TIME = (64, 500)
MAX_MS = 1.0
WARM_UP = 20
FEWER = 5
"""By so much fewer calls are made of what takes ten times as long."""


def by_aiohttp(url: str, _: Path, prompts: Sequence[str], slots: int) -> None:
    """Call with aiohttp and orjson alone."""
    expect("the answers", list(prompts), asyncio.run(chat.gather(url, prompts, slots)))


def by_lbr(url: str, folder: Path, prompts: Sequence[str], slots: int) -> None:
    """Enqueue, work off and collect."""
    database, out = folder / f"{len(prompts)}.db", folder / f"{len(prompts)}.jsonl"
    with chat.environment(OPENAI_BASE_URL=url, OPENAI_API_KEY=chat.KEY):
        end_to_end(database, out, prompts, slots)
    check_lines(out, prompts)


def by_agent(url: str, _: Path, prompts: Sequence[str], slots: int) -> None:
    """Call `Agent.run` in a gather."""
    from pydantic_ai import Agent  # noqa: PLC0415 - a second, which the others must not pay
    from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415
    from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

    async def ask_all() -> list[str]:
        agent = Agent(OpenAIChatModel(chat.MODEL, provider=OpenAIProvider(base_url=url, api_key=chat.KEY)))
        room = asyncio.Semaphore(slots)

        async def ask(prompt: str) -> str:
            async with room:
                return (await agent.run(prompt)).output

        return await asyncio.gather(*map(ask, prompts))

    expect("the answers", list(prompts), asyncio.run(ask_all()))


WAYS: dict[str, Callable[[str, Path, Sequence[str], int], None]] = {
    "aiohttp and orjson alone": by_aiohttp,
    "lbr, queue included": by_lbr,
    "pydantic-ai, Agent.run": by_agent,
}


def measure_here(name: str, slots: int, calls: int) -> float:
    """Return the milliseconds of this process's CPU that each call takes."""
    way = WAYS[name]
    prompts = chat_prompts(calls)
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        chat.chat_server(SECONDS) as url,
        chat.on_one_core(),
    ):
        way(url, Path(folder), chat_prompts(WARM_UP), WARM_UP)
        return 1000 * timed(lambda: way(url, Path(folder), prompts, slots)).cpu / calls


def measured(name: str, slots: int, calls: int) -> float:
    """Do so in a process of its own."""
    command = [sys.executable, __file__, "--way", name, "--slots", str(slots), "--calls", str(calls)]
    return float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def main() -> None:
    """Measure every way, and print what a call takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=3_000)
    parser.add_argument("--repeat", type=int, default=1, help="measure so often, and take medians")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is not None:
        print(measure_here(given.way, given.slots, given.calls))
        return
    print("CPU ms for a chat call".ljust(28) + "".join(f"{f'{slots} at a time':>16}" for slots in AT_A_TIME))
    late = False
    for name, way in WAYS.items():
        calls = given.calls // FEWER if way is by_agent else given.calls
        found = [statistics.median(measured(name, slots, calls) for _ in range(given.repeat)) for slots in AT_A_TIME]
        print(name.ljust(28) + "".join(f"{one:16.3f}" for one in found), flush=True)
        late |= way is by_lbr and max(found) > MAX_MS
    print(f"lbr at most {MAX_MS:g} ms: {'no' if late else 'yes'}")
    sys.exit(late)


if __name__ == "__main__":
    main()
