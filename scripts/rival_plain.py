"""The loop that an author writes: a semaphore, a gather, and a commit for each answer.

`delete` leaves SQLite's journal as it comes, `wal` asks for the faster one; both wait for the disk at every commit.
`nothing` keeps no answer: it is no rival, but what the event loop allows.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import rival

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


async def answer(task: rival.Task, keep: Callable[[int, str], object]) -> list[object]:
    """Nap over each prompt and keep it."""
    slots = asyncio.Semaphore(task.slots)

    async def nap(n: int, prompt: str) -> object:
        async with slots:
            await asyncio.sleep(rival.NAP_SECONDS)
            keep(n, prompt)
        return prompt

    return await asyncio.gather(*(nap(n, prompt) for n, prompt in enumerate(task.prompts)))


def work(task: rival.Task) -> Sequence[object]:
    """Answer, and read back what is kept."""
    if task.way == "nothing":
        return asyncio.run(answer(task, lambda _n, _prompt: None))
    with closing(sqlite3.connect(task.folder / "answers.db")) as connection:
        connection.execute(f"PRAGMA journal_mode = {task.way}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE answers (n INTEGER PRIMARY KEY, answer TEXT)")

        def keep(n: int, prompt: str) -> None:
            connection.execute("INSERT INTO answers VALUES (?, ?)", (n, prompt))
            connection.commit()

        asyncio.run(answer(task, keep))
        return [row[0] for row in connection.execute("SELECT answer FROM answers ORDER BY n")]


if __name__ == "__main__":
    rival.run(work, ())
