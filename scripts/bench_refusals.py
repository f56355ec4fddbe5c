"""lbr beside a plain loop over the openai SDK, at a server that refuses a few calls at random with `Retry-After: 1`.

    ./scripts/bench refusals [--repeat 3]

Each measurement is a process of its own, from its start to its end; lbr and the loop take turns, so that a slow
minute affects both. Every answer is checked. The exit status is 1 if lbr misses a target.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL = "bench"
KEY = "sk-bench-no-secret"
MAX_RETRIES = 8
MAX_RATIO = 1.5
LBR = Path(sys.executable).with_name("lbr")


@dataclass(frozen=True, slots=True)
class Case:
    """How many calls to make, how many at a time, how long each takes and the share of them that is refused.

    `min_rate` is the target in calls a second, None if the target is the ratio to the plain loop.
    """

    calls: int
    slots: int
    seconds: float
    refused: float
    min_rate: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.calls} calls of {self.seconds:g} s, {self.slots} at a time, {self.refused:.0%} refused"


CASES = (
    Case(1_000, 32, 0.15, 0.01),
    Case(1_000, 32, 0.15, 0.03),
    Case(4_000, 64, 0.6, 0.02, min_rate=85),
)


def serve(seconds: float, refused: float) -> None:
    """Answer calls with their own prompt, after so many seconds, but refuse a share of them at random."""
    chance = random.Random(1)  # noqa: S311 - the same refusals in every measurement

    async def chat(request: web.Request) -> web.Response:
        asked = await request.json()
        if chance.random() < refused:
            error = {"error": {"message": "too many requests", "code": "rate_limit_exceeded"}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        await asyncio.sleep(seconds)
        message = {"role": "assistant", "content": asked["messages"][-1]["content"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
        head = {"id": "bench", "object": "chat.completion", "created": 1_700_000_000, "model": MODEL}
        return web.json_response(head | {"choices": [choice], "usage": usage})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


@contextmanager
def server(case: Case) -> Iterator[str]:
    """Run a fresh server in a process of its own and yield its base URL."""
    command = [sys.executable, __file__, "--serve", str(case.seconds), str(case.refused)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            port = int(process.stdout.readline()) if process.stdout is not None else 0
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def plain(source: Path, out: Path, slots: int) -> None:
    """Answer the prompts of a file with a semaphore and a gather; the SDK waits and tries again."""
    from openai import AsyncOpenAI  # noqa: PLC0415 - a second, which only this needs

    prompts = source.read_text(encoding="utf-8").splitlines()

    async def ask_all() -> list[str | None]:
        room = asyncio.Semaphore(slots)
        async with AsyncOpenAI(max_retries=MAX_RETRIES) as client:

            async def ask(prompt: str) -> str | None:
                async with room:
                    answer = await client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": prompt}]
                    )
                return answer.choices[0].message.content

            return await asyncio.gather(*map(ask, prompts))

    out.write_text("".join(json.dumps({"result": one}) + "\n" for one in asyncio.run(ask_all())))


def measured(case: Case, folder: Path, *, by_lbr: bool) -> float:
    """Return the seconds that all calls take, from the start of the process to its end."""
    source, out = folder / "in.txt", folder / "out.jsonl"
    prompts = [f"Prompt {n}" for n in range(case.calls)]
    source.write_text("".join(f"{prompt}\n" for prompt in prompts))
    if by_lbr:
        command = [str(LBR), "run", source.name, "-o", out.name, "--model", f"openai-chat:{MODEL}"]
        command += ["--concurrency", str(case.slots)]
    else:
        command = [sys.executable, __file__, "--plain", str(source), str(out), str(case.slots)]
    with server(case) as url:
        environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stderr=subprocess.DEVNULL)
        took = time.perf_counter() - started
    answers = [json.loads(line)["result"] for line in out.read_text(encoding="utf-8").splitlines()]
    if answers != prompts:
        sys.exit(f"expected the {case.calls} prompts as answers, got: {len(answers)} others")
    return took


def compare(case: Case, repeat: int) -> bool:
    """Measure both in turn, print a line, and return whether lbr meets the target."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeat):
        for by_lbr in (True, False):
            with tempfile.TemporaryDirectory(prefix="lbr-refusals-") as folder:
                found[by_lbr].append(measured(case, Path(folder), by_lbr=by_lbr))
    ours, loop = statistics.median(found[True]), statistics.median(found[False])
    rate = case.calls / ours
    met = ours <= MAX_RATIO * loop if case.min_rate is None else rate >= case.min_rate
    target = f"at most {MAX_RATIO:g}x" if case.min_rate is None else f"at least {case.min_rate:g} calls/s"
    print(
        f"{case.name}: lbr {ours:.2f} s ({rate:.0f} calls/s), plain loop {loop:.2f} s, ratio {ours / loop:.2f}; "
        f"{target}: {'met' if met else 'not met'}",
        flush=True,
    )
    return met


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, or be the server or the plain loop of one."""
    parser = argparse.ArgumentParser(prog="bench refusals", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=1, help="measure so often, and take medians")
    parser.add_argument("--serve", nargs=2, type=float, help=argparse.SUPPRESS)
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve is not None:
        serve(*given.serve)
    elif given.plain is not None:
        plain(Path(given.plain[0]), Path(given.plain[1]), int(given.plain[2]))
    else:
        met = [compare(case, given.repeat) for case in CASES]
        sys.exit(not all(met))


if __name__ == "__main__":
    main()
