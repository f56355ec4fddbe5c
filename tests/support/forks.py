"""`lbr` commands as separate processes without the time that imports take: each is a fork of one that has imported all.

A fork has its own number, folder, environment and standard files, gets its arguments as `python -m lbr` does, and
ends as any Python does, but for the objects that are left at its end: to free what was imported takes longer than most
commands.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AT_ONCE = 65_536
AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "SSL_CERT_")
"""What Python, the loader and aiohttp read at the start of a process or an import, and a fork does not."""
IMPORTED = ("lbr.cli", "lbr.store.postgres", "lbr.models.http", "lbr.models.chat", "lbr.models.pydantic_ai")
LIBRARIES = (
    "genai_prices",
    "jinja2",
    "pydantic_ai.models.openai",
    "rich.progress",
    "sqlalchemy.dialects.postgresql.asyncpg",
)
"""Commands import these when they need them; most of the second that this takes would be the time of most tests."""

_lock = threading.Lock()
_sources: list[_Source] = []


def can_run(environment: Mapping[str, str]) -> bool:
    """Tell whether a fork would do what a process that is started with this environment does."""
    return os.getuid() == os.geteuid() and _at_start(environment) == _at_start(os.environ)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(AT_START) and name != "PYTHONDONTWRITEBYTECODE"
    }


def run(
    arguments: Sequence[str],
    *,
    script: str | None = None,
    cwd: Path,
    env: Mapping[str, str],
    constants: Mapping[str, float] | None = None,
    stdin: bytes = b"",
    timeout: float,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command, or a script in the folder, to its end, with constants of modules set to other values than they have.

    As with a process that is started, what it writes is read until nobody has its standard files any more, not a child
    that it left behind either. Raises TimeoutExpired after so many seconds, when it was killed.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        (read_in, write_in), (read_out, write_out), (read_error, write_error) = (os.pipe() for _ in range(3))
        ours, theirs = (stack.enter_context(one) for one in socket.socketpair())
        with _lock:
            if not _sources:
                _sources.append(_Source())
            _sources[0].hand(theirs)
        theirs.close()
        told = {
            "arguments": list(arguments),
            "script": script,
            "cwd": str(cwd),
            "env": dict(env),
            "constants": constants or {},
        }
        handed = [read_in, write_out, write_error]
        socket.send_fds(ours, [json.dumps(told).encode() + b"\n"], handed)
        for one in handed:
            os.close(one)
        readers = [_Reader(one) for one in (read_out, read_error)]
        writer = threading.Thread(target=_write, args=(write_in, stdin), daemon=True)
        writer.start()
        ours.settimeout(timeout)
        answers = stack.enter_context(ours.makefile("rb"))
        pid = int(answers.readline())
        try:
            code = int(answers.readline())
            out, error = (reader.content(deadline - time.monotonic()) for reader in readers)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), timeout) from None
        return subprocess.CompletedProcess(list(arguments), code, out, error)


def _write(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(descriptor, "wb") as pipe:
        pipe.write(content)


class _Reader:
    """Reads a pipe to its end, beside everything else."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._content = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with open(self._descriptor, "rb") as pipe:
            self._content = pipe.read()

    def content(self, timeout: float) -> bytes:
        """Return what came. Raises TimeoutError where the end does not."""
        self._thread.join(max(0.0, timeout))
        if self._thread.is_alive():
            raise TimeoutError
        return self._content


class _Source:
    """The process that forks. It ends with this one."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=Path(__file__).resolve().parents[2],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self._end)

    def hand(self, theirs: socket.socket) -> None:
        """Give it the other end of a connection over which a command comes."""
        socket.send_fds(self._ours, [b"."], [theirs.fileno()])

    def _end(self) -> None:
        self._ours.close()
        self._process.wait()


def serve(calls: socket.socket) -> dict[str, Any] | None:
    """Fork for each call. Returns its command in the process that is to run it, None in this one when nobody calls any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        said, descriptors, _, _ = socket.recv_fds(calls, 1, 1)
        if not said:
            return None
        if os.fork() == 0:
            calls.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _attend(socket.socket(fileno=descriptors[0]))
        os.close(descriptors[0])


def _attend(call: socket.socket) -> dict[str, Any]:
    """Read a command and fork once more: this process tells how the other, to which it returns, has ended."""
    said, files, _, _ = socket.recv_fds(call, AT_ONCE, 3)
    while not said.endswith(b"\n"):
        if not (more := call.recv(AT_ONCE)):
            os._exit(1)  # the caller was killed before it had said what to run
        said += more
    if child := os.fork():
        call.sendall(b"%d\n" % child)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            call.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    call.close()
    command: dict[str, Any] = json.loads(said)
    return command | {"files": files}


def become(command: dict[str, Any]) -> None:
    """Be the process that was asked for."""
    for number, file in enumerate(command["files"]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    time.tzset()
    random.seed()
    for name, value in command["constants"].items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.argv = [command["script"] or "lbr", *command["arguments"]]
    sys.path[0] = command["cwd"]
    try:
        if command["script"]:
            runpy.run_path(command["script"], run_name="__main__")
        else:
            runpy.run_module("lbr", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    else:
        code = 0
    end_at_once(code)


def end_at_once(code: int) -> None:
    """End as Python does, with all threads and functions for the end, but free nothing; return if it cannot write."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # closed, or a pipe that nobody reads: Python has a code for that
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    for name in (*IMPORTED, *LIBRARIES):
        importlib.import_module(name)
    if (asked := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        become(asked)
