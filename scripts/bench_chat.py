"""A chat server on one core, its client on another, and the baseline: the same calls with aiohttp alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL = "bench"
KEY = "sk-bench-no-secret"
SERVER = Path(__file__).with_name("bench_chat_server.py")


@contextmanager
def chat_server(seconds: float) -> Iterator[str]:
    """Run a server in a process of its own; yield its URL, which clients use as OpenAI's."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, str(SERVER), str(seconds), *map(str, cores[-1:])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        port = int(process.stdout.readline()) if process.stdout is not None else 0
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this process and its new threads on its first core, if the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def gather(url: str, prompts: Sequence[str], at_a_time: int) -> list[str]:
    """Make the calls with aiohttp alone, store nothing, and return the answers."""
    import aiohttp  # noqa: PLC0415 - takes a tenth of a second, and only this needs it

    slots = asyncio.Semaphore(at_a_time)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def ask(prompt: str) -> str:
            body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}]})
            async with slots, session.post(f"{url}/chat/completions", data=body) as response:
                found = orjson.loads(await response.read())
            return str(found["choices"][0]["message"]["content"])

        return await asyncio.gather(*map(ask, prompts))
