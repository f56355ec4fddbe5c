"""A user's function as the one who answers."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbr.core import digits
from lbr.core.errors import CallError, Permanent
from lbr.core.schema import is_base_model
from lbr.core.types import Reply

if TYPE_CHECKING:
    from lbr.models.base import Request

AnyFunction = Callable[..., Any]

FORKED = 70
"""How a process ends that a function left behind by a fork; EX_SOFTWARE of sysexits.h."""


class FunctionModel:
    """Answers by calling a function with the prompt's text, or with the list of messages of a chat prompt.

    Async functions run in the event loop, plain ones in daemon threads, of which up to `concurrency` are kept for the
    next calls.
    """

    def __init__(self, function: AnyFunction, *, concurrency: int) -> None:
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - the question is whether the call is async
        )
        self._threads = _Threads(keep=concurrency)

    async def answer(self, request: Request) -> Reply:
        """Call the function once; what it raises passes through."""
        prompt = request.prompt
        argument = prompt.text if prompt.messages is None else list(prompt.messages)
        try:
            result = await self._call(argument)
        except SystemExit as error:
            # Left alone it would end the worker and all that runs beside this call.
            raise CallError(f"the function called exit: {error}", kind="SystemExit") from error
        return Reply(text=_text_of(result))

    async def _call(self, argument: Any) -> Any:
        if self._is_async:
            ours = os.getpid()
            try:
                return await self._function(argument)
            finally:
                _end_copy_of(ours)
        result = await self._threads.run(self._function, argument)
        return await result if inspect.isawaitable(result) else result

    async def aclose(self) -> None:
        """Let idle threads end; one that still runs is left to itself and keeps no process alive."""
        self._threads.close()


def _text_of(result: Any) -> str:
    """Return what a function gave as an answer's text; Permanent for anything that is no answer."""
    if not isinstance(result, str) and (isinstance(result, dict | list) or is_base_model(result)):
        try:
            # By alias, for that is how the schema of a result type names the fields.
            dumped = (
                digits.dumps(result).decode()
                if isinstance(result, dict | list)
                else result.model_dump_json(by_alias=True)
            )
        except (TypeError, ValueError) as error:
            raise Permanent(
                f"expected the function's {type(result).__name__} to be JSON, got: {error}"
            ) from error
        return str(dumped)
    if not isinstance(result, str):
        raise Permanent(f"expected the function to return str, dict or BaseModel, got: {_describe(result)}")
    try:
        if not result.isascii():
            result.encode()
    except UnicodeEncodeError as error:
        raise Permanent(
            f"expected the function to return text, got: {error.reason} at character {error.start}"
        ) from error
    return str(result)


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:79] + '…'}"


def _end_copy_of(ours: int) -> None:
    """End this process if a function forked it off and did not end it itself: two must not settle one claim."""
    if os.getpid() != ours:
        os._exit(FORKED)


@dataclass(frozen=True, slots=True)
class _Job:
    """A call on its way to a thread, and the future that waits for it."""

    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def run(self) -> None:
        """Call, and hand the outcome to the loop, if that is still there."""
        result: Any = None
        error: BaseException | None = None
        ours = os.getpid()
        try:
            if self.future.done():  # cancelled meanwhile: its job is another's by now
                return
            try:
                result = self.call()
            finally:
                _end_copy_of(ours)
        except StopIteration as caught:  # a future refuses this one
            error = RuntimeError(f"the function raised {caught!r}")
            error.__cause__ = caught
        except (GeneratorExit, KeyboardInterrupt) as caught:
            # Python takes the one for the end of a coroutine, and a Ctrl-C never comes in a thread.
            error = CallError(f"the function raised {caught!r}", kind=type(caught).__name__)
        except BaseException as caught:  # noqa: BLE001 - passes through to whoever awaits the answer
            error = caught
        try:
            self.loop.call_soon_threadsafe(self._deliver, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _discard(result)

    def _deliver(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            _discard(result)
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def _discard(result: Any) -> None:
    """Close a coroutine that nobody will await, or Python warns about it."""
    if inspect.iscoroutine(result):
        result.close()


class _Threads:
    """Daemon threads that run one call at a time and wait for the next; asyncio's own would hold up the exit."""

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._idle = 0
        self._closed = False
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    async def run(self, function: AnyFunction, argument: Any) -> Any:
        """Call the function in a thread, with the caller's context variables."""
        loop = asyncio.get_running_loop()
        call = functools.partial(contextvars.copy_context().run, function, argument)
        job = _Job(call, loop, loop.create_future())
        with self._lock:
            start = self._idle == 0
            self._idle -= not start
        if start:
            # Before the job is queued: where no thread can be had, the call has failed and nobody may make it later.
            threading.Thread(target=self._work, name="lbr-function", daemon=True).start()
        self._jobs.put(job)
        return await job.future

    def close(self) -> None:
        """Send the idle threads home."""
        with self._lock:
            self._closed = True
            for _ in range(self._idle):
                self._jobs.put(None)
            self._idle = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # an idle thread holds nobody's prompt or answer
            with self._lock:
                if self._closed or self._idle >= self._keep:
                    return
                self._idle += 1
