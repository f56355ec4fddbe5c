"""Calls of plain functions begin when no transaction that locks a file is under way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from lbr.core import precedence
from lbr.core.precedence import PRECEDENCE, Precedence
from lbr.core.types import JobId, Prompt, Reply, Task
from lbr.models.base import Request
from lbr.models.function import FunctionModel
from lbr.store.engines import open_database
from lbr.store.schema import runs

if TYPE_CHECKING:
    from pathlib import Path

    from lbr.store.connection import Connection

PATIENCE_SECONDS = 60


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls wait for transactions for as long as they take."""
    monkeypatch.setattr(precedence, "LONGEST_SECONDS", PATIENCE_SECONDS)


@pytest.mark.usefixtures("patient")
async def test_no_call_of_a_function_begins_while_the_file_is_locked(tmp_path: Path) -> None:
    """What a call was asked during a transaction it does after that."""
    database = await open_database(str(tmp_path / "queue.db"), create=True)
    order: list[str] = []
    asked, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def call(prompt: str) -> str:
        order.append("called")
        return prompt

    model = FunctionModel(call, concurrency=1)

    async def work(connection: Connection) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert asked.wait(PATIENCE_SECONDS)
        # The thread of the call has what it needs; only we can still hold it back.
        threading.Event().wait(0.02)
        await connection.execute(update(runs).values(name="none"))
        order.append("written")

    writing = asyncio.create_task(database.write(work))
    await begun.wait()
    request = Request(prompt=Prompt(text="p"), task=Task(function="m:f"), job_id=JobId(1), seq=1)
    calling = asyncio.create_task(model.answer(request))
    await asyncio.sleep(0)
    asked.set()
    await asyncio.gather(writing, calling)
    await model.aclose()
    await database.close()
    assert order == ["written", "called"]


@pytest.mark.usefixtures("patient")
def test_the_last_of_several_transactions_lets_calls_begin() -> None:
    """One that ends while another is under way changes nothing."""
    ours = Precedence()
    order: list[str] = []

    def call() -> None:
        ours.give()
        order.append("called")

    with ours.taken():
        with ours.taken():
            waiting = threading.Thread(target=call)
            waiting.start()
        time.sleep(0.02)
        order.append("written")
    waiting.join()
    assert order == ["written", "called"]


def test_a_transaction_that_waits_itself_does_not_keep_calls_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that another process has locked must not stop the calls of this one, nor slow each of them."""
    monkeypatch.setattr(precedence, "LONGEST_SECONDS", 0.3)
    ours = Precedence()
    with ours.taken():
        started = time.monotonic()
        ours.give()
        assert time.monotonic() - started >= 0.2
        for _ in range(1_000):
            ours.give()
        assert time.monotonic() - started < PATIENCE_SECONDS / 2


@pytest.mark.usefixtures("patient")
async def test_a_call_that_is_cancelled_while_it_waits_is_never_made() -> None:
    """Its job has been given back, and whoever takes it next makes the call."""
    called: list[str] = []

    def call(prompt: str) -> str:
        called.append(prompt)
        return prompt

    def ask(prompt: str) -> asyncio.Task[Reply]:
        request = Request(prompt=Prompt(text=prompt), task=Task(function="m:f"), job_id=JobId(1), seq=1)
        return asyncio.create_task(model.answer(request))

    others = set(threading.enumerate())
    model = FunctionModel(call, concurrency=1)
    await ask("before")
    with PRECEDENCE.taken():
        cancelled = ask("cancelled")
        await asyncio.sleep(0.02)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
    await model.aclose()
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE_SECONDS)
    assert called == ["before"]


FORKING = """
import os, time
from lbr.core import precedence

precedence.LONGEST_SECONDS = 60
with precedence.PRECEDENCE.taken():
    child = os.fork()
    if not child:
        started = time.monotonic()
        precedence.PRECEDENCE.give()
        os._exit(0 if time.monotonic() - started < 30 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_copy_of_the_process_waits_for_nobody() -> None:
    """The transactions of the process that was copied do not end in the copy."""
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=PATIENCE_SECONDS)
