"""A user's function as the model."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import os
import queue
import threading
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError
from lbr.models.answer import reply_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lbr.core.types import Reply
    from lbr.models.base import Request

FORK_EXIT_CODE = 70
"""The exit code of a process that a function left behind by a fork; EX_SOFTWARE of sysexits.h."""


class FunctionModel:
    """Answers by calling a function with the prompt's text, or with the list of messages of a chat prompt.

    Async functions run in the event loop, others in daemon threads, of which up to `concurrency` are reused.
    """

    def __init__(self, function: Callable[..., Any], *, concurrency: int) -> None:
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - the question is whether the call is async
        )
        self._threads = _Threads(keep=concurrency)

    async def answer(self, request: Request) -> Reply:
        """Call the function once; its exceptions pass through."""
        prompt = request.prompt
        argument = prompt.text if prompt.messages is None else list(prompt.messages)
        try:
            return reply_of(await self._call(argument))
        except SystemExit as error:  # it must not end the worker and its other calls
            raise CallError(f"the function called exit: {error}", kind="SystemExit") from error

    async def _call(self, argument: Any) -> Any:
        if self._is_async:
            parent = os.getpid()
            try:
                return await self._function(argument)
            finally:
                _exit_fork(parent)
        result = await self._threads.run(self._function, argument)
        return await result if inspect.isawaitable(result) else result

    async def aclose(self) -> None:
        """End idle threads; one that still runs keeps no process alive."""
        self._threads.close()


def _exit_fork(parent: int) -> None:
    """End this process if a function forked it and did not end it: two must not settle one claim."""
    if os.getpid() != parent:
        os._exit(FORK_EXIT_CODE)


class _Threads:
    """Daemon threads that run one call at a time and wait for the next; asyncio's own would delay the exit."""

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._idle = 0
        self._closed = False
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()

    async def run(self, function: Callable[..., Any], argument: Any) -> Any:
        """Call the function in a thread, with the caller's context variables."""
        call = functools.partial(contextvars.copy_context().run, function, argument)
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            start = self._idle == 0
            self._idle -= not start
        if start:  # before the call is queued: if no thread can be started, the call must not be made later
            threading.Thread(target=self._work, name="lbr-function", daemon=True).start()
        self._jobs.put((call, future))
        return await future

    def close(self) -> None:
        """End the idle threads."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)
            self._idle = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _run(*job)
            del job  # an idle thread must not hold a prompt or an answer
            with self._lock:
                if self._closed or self._idle >= self._keep:
                    return
                self._idle += 1


def _run(call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
    """Make a call, and hand its outcome to the future's loop if that still runs."""
    settle: Callable[[Any], None] = future.set_exception
    if future.done():  # cancelled: the job may be another worker's by now
        return
    parent = os.getpid()
    try:
        try:
            settle, outcome = future.set_result, call()
        finally:
            _exit_fork(parent)
    except (StopIteration, GeneratorExit, KeyboardInterrupt) as error:  # asyncio gives them another meaning
        outcome = CallError(f"the function raised {error!r}", kind=type(error).__name__)
    except BaseException as error:  # noqa: BLE001 - passes through to the caller of `run`
        outcome = error
    with contextlib.suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(_deliver, future, settle, outcome)


def _deliver(future: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    if not future.done():
        settle(outcome)
    elif inspect.iscoroutine(outcome):
        outcome.close()  # else Python warns that it was never awaited
