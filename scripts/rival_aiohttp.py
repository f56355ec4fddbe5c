"""A bare gather of the calls with aiohttp, which keeps nothing: no rival, but what the HTTP client allows."""

from __future__ import annotations

import asyncio

import bench_chat
import rival

if __name__ == "__main__":
    rival.run(lambda task: asyncio.run(bench_chat.gather(task.url, task.prompts, task.slots)), ("aiohttp",))
