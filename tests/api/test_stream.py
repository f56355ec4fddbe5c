"""Rows as they finish: in order or not, all of them, and what is left when the loop is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pandas as pd
import pytest

import lbr
from lbr import Pause, Permanent, Row
from lbr.core.errors import InputError, UsageError

STATE: dict[str, Any] = {}
"""What functions change: a global is not part of their identity."""


async def test_rows_come_while_others_run(db_url: str) -> None:
    """In input order up to the first gap, or as they finish; equal prompts have a row each; failures are rows."""
    gate = STATE["gate"] = asyncio.Event()

    async def answer(prompt: str) -> str:
        if prompt == "slow":
            await STATE["gate"].wait()
        if prompt == "bad":
            raise Permanent("no")
        return prompt.upper()

    prompts = ["a", "slow", "a", "bad"]
    how: dict[str, Any] = {"version": "1", "db_url": db_url}
    found: list[Row[Any]] = []
    async for row in lbr.stream(prompts, answer, **how, order="finished"):
        found.append(row)
        if len(found) == 3:
            gate.set()
    assert [(row["idx"], row["result"], row["error"]) for row in found] == [
        (0, "A", None),
        (2, "A", None),
        (3, None, "no"),
        (1, "SLOW", None),
    ]
    assert found[2]["status"] == "missing"
    assert [row["idx"] async for row in lbr.stream(prompts, answer, **how)] == [0, 1, 2, 3]
    frame = pd.DataFrame({"text": prompts})
    rows = [row async for row in lbr.stream(frame, answer, **how, prompt_column="text", limit=2)]
    assert [row["result"] for row in rows] == ["A", "SLOW"]
    assert [row async for row in lbr.stream([], answer)] == []


async def test_leaving_the_loop_gives_the_jobs_back(db_url: str) -> None:
    """Every answer is kept, nothing is in flight, and the same call goes on with the rest, each prompt once."""
    made = STATE["made"] = []
    left = STATE["left"] = asyncio.Event()

    async def answer(prompt: str) -> str:
        STATE["made"].append(prompt)
        if int(prompt[1:]) >= 30:
            await STATE["left"].wait()
        return prompt

    prompts = [f"p{n}" for n in range(60)]
    how: dict[str, Any] = {"version": "1", "db_url": db_url, "run": "r", "concurrency": 2}
    async with aclosing(lbr.stream(prompts, answer, **how)) as rows:
        async for row in rows:
            if row["idx"] == 5:
                break
    (run,) = (await lbr.status("r", db_url=db_url)).runs
    assert run.inflight == 0
    assert 6 <= run.done <= 30
    left.set()
    assert [row["result"] async for row in lbr.stream(prompts, answer, **how)] == prompts
    assert set(made) == set(prompts)
    assert len(made) <= 60 + 2  # the calls that were cancelled
    async for _ in lbr.stream(prompts, answer, **how, fresh=True):
        break


async def test_it_ends_with_a_paused_run_and_with_an_error(db_url: str) -> None:
    """Rows that are not finished do not come; an error ends the loop, and names parameters."""

    async def paid(prompt: str) -> str:
        if prompt == "b":
            raise Pause("no credit")
        return prompt

    how: dict[str, Any] = {"version": "1", "db_url": db_url, "concurrency": 1}
    assert [row["result"] async for row in lbr.stream(["a", "b", "c"], paid, **how)] == ["a"]
    for prompts, given, kind, words in (
        (["a", ""], {}, InputError, "^prompts, line 2: prompt is empty"),
        (["a"], {"order": "odd"}, UsageError, "expected order to be one of input, finished, got: 'odd'"),
        (["a"], {"limit": "1"}, UsageError, "expected limit to be a whole number, got: '1'"),
        (["a"], {"seed": 1}, UsageError, "seed=… needs pick=…"),
        (["a"], {"rpm": 0}, UsageError, "expected rpm to be a whole number from 1 to"),
    ):
        with pytest.raises(kind, match=words):
            [row async for row in lbr.stream(prompts, paid, **how | given)]
    with pytest.raises(TypeError, match="'odd'"):
        [row async for row in lbr.stream(["a"], paid, odd=1)]  # type: ignore[call-overload]
