"""A user's function as the one who answers, and the name by which a run remembers it."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import hashlib
import inspect
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import orjson

from lbr.errors import CallError, Permanent, UsageError
from lbr.jobs import Reply
from lbr.precedence import PRECEDENCE
from lbr.structured import import_named

if TYPE_CHECKING:
    from lbr.models.base import Request

AnyFunction = Callable[..., Any]

FORKED = 70
"""How a process ends that a function left behind by a fork; EX_SOFTWARE of sysexits.h."""

MAIN_MODULES = ("__main__", "__mp_main__")
DIGEST_BYTES = 16


def import_function(spec: str) -> AnyFunction:
    """Import `pkg.mod:fn` (or `pkg.mod:object.method`), with the working directory importable.

    Raises UsageError that says which step failed, also for whatever the module raises when it is imported.
    """
    found = import_named(spec, example="pkg.module:function")
    if isinstance(found, type):
        raise UsageError(f"expected {spec!r} to be a function, got: the class {found.__qualname__}")
    if not callable(found):
        raise UsageError(f"expected {spec!r} to be a function, got: {type(found).__name__}")
    return found  # type: ignore[no-any-return]


# --- identity ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run keeps of a function.

    `name` is `module:qualname`, `version` its author's, None where none was set. `fingerprint` is the same in every
    process of one Python version. `anonymous` says that the name alone does not tell which function it is.
    """

    name: str
    version: str | None
    fingerprint: str
    anonymous: bool


def identify(function: AnyFunction, *, version: str | None = None) -> Identity:
    """Name a function; `version` goes before the function's own `version` attribute (a str or an int)."""
    if version is None:
        own = getattr(function, "version", None)
        version = str(own) if isinstance(own, str | int) and not isinstance(own, bool) else None
    named = _named(function)
    module = _module_name(named)
    qualname: str = getattr(named, "__qualname__", type(named).__qualname__)
    anonymous = (
        named is not function
        or "<" in qualname
        or not hasattr(named, "__qualname__")
        or module in MAIN_MODULES
    )
    return Identity(f"{module}:{qualname}", version, _digest(function, _Seen({})).hex(), anonymous)


def _named(function: Any) -> Any:
    """Return what carries the name; a class method is named by itself, for its class is part of its name."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, MethodType) and not isinstance(function.__self__, type):
            function = function.__func__
        else:
            return function


def _module_name(function: Any) -> str:
    owner = (
        function
        if getattr(function, "__module__", None)
        else getattr(function, "__objclass__", type(function))
    )
    name: str = owner.__module__
    if name not in MAIN_MODULES:
        return name
    main = sys.modules.get(name) or sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else name


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a walk has met, by id; ids never reach a fingerprint.

    Functions are numbered in the order of meeting, `around` are the containers that the walk is inside of.
    """

    functions: dict[int, int]
    around: frozenset[int] = frozenset()

    def inside(self, container: Any) -> _Seen:
        """Return what is seen from inside a container."""
        return _Seen(self.functions, self.around | {id(container)})

    def alone(self) -> _Seen:
        """Return a copy, for what comes in no certain order and so must not be numbered."""
        return _Seen(dict(self.functions), self.around)


def _digest(value: Any, seen: _Seen) -> bytes:
    """Return a digest of a value that says the same in every process of this Python."""
    if id(value) in seen.around:
        return _join("cycle")
    match value:
        case enum.Enum():
            return _join("enum", _type_name(type(value)), value.name)
        case None | bool() | int() | float() | complex() | str() | bytes():
            return _join("plain", type(value).__name__, repr(value))
        case tuple() | list() | set() | frozenset() | dict():
            return _digest_container(value, seen.inside(value))
        case type():
            return _join("type", _type_name(value))
        case ModuleType():
            return _join("module", value.__name__)
        case CodeType():
            parts = (_digest(part, seen) for part in (value.co_consts, value.co_names))
            return _join("code", value.co_code, value.co_exceptiontable, *parts)
    return _digest_callable(value, seen)


def _digest_container(value: Any, seen: _Seen) -> bytes:
    match value:
        case set() | frozenset():
            members = sorted(_digest(member, seen.alone()) for member in value)
            return _join("set", *members)
        case dict():
            return _join("dict", *(_digest(part, seen) for pair in value.items() for part in pair))
    return _join(type(value).__name__, *(_digest(member, seen) for member in value))


def _digest_callable(value: Any, seen: _Seen) -> bytes:
    if id(value) in seen.functions:
        return _join("seen", str(seen.functions[id(value)]))
    if isinstance(value, FunctionType | functools.partial | MethodType):
        seen.functions[id(value)] = len(seen.functions)
    match value:
        case FunctionType():
            cells = map(_cell_contents, value.__closure__ or ())
            parts = (value.__code__, value.__defaults__, value.__kwdefaults__, tuple(cells))
            return _join("function", *(_digest(part, seen) for part in parts))
        case functools.partial():
            return _join("partial", _digest((value.func, value.args, value.keywords), seen))
        case MethodType():
            return _join("method", _digest((value.__func__, value.__self__), seen))
        case BuiltinFunctionType():
            return _join("builtin", str(value.__module__), value.__qualname__)
    wrapped = getattr(value, "__wrapped__", None)
    call = getattr(type(value), "__call__", None)  # noqa: B004 - wanted is the function itself
    inner = wrapped if isinstance(wrapped, FunctionType) else call
    return _join(
        "object", _type_name(type(value)), _digest(inner, seen) if isinstance(inner, FunctionType) else ""
    )


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "<empty>"


def _type_name(type_: type) -> str:
    return f"{_module_name(type_)}.{type_.__qualname__}"


def _join(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


# --- calling ----------------------------------------------------------------------------------------------------------


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
    if not isinstance(result, str) and (isinstance(result, dict | list) or _is_base_model(result)):
        try:
            # By alias, for that is how the schema of a result type names the fields.
            dumped = (
                orjson.dumps(result).decode()
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


def _is_base_model(value: Any) -> bool:
    pydantic = sys.modules.get("pydantic")  # nobody returns a model of a package that was never imported
    return pydantic is not None and isinstance(value, pydantic.BaseModel)


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
            PRECEDENCE.give()
            if self.future.done():  # cancelled meanwhile: its job is another's by now
                return
            try:
                result = self.call()
            finally:
                _end_copy_of(ours)
        except StopIteration as caught:  # a future refuses this one
            error = RuntimeError(f"the function raised {caught!r}")
            error.__cause__ = caught
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
