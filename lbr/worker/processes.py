"""Several worker processes under one parent, which passes signals on and waits for all of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

READ_BYTES = 65_536
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled_signals(on_signal: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Let the running event loop call `on_signal` for each of SIGNALS; afterwards restore the handlers.

    An ignored SIGHUP stays ignored, as under nohup. A second one in a row is the same closed terminal, which the shell
    and the kernel both report.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    last: signal.Signals | None = None

    def note(number: signal.Signals) -> None:
        nonlocal last
        if number is not signal.SIGHUP or last is not number:
            on_signal(number)
        last = number

    for number in before:
        loop.add_signal_handler(number, note, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # one that is not Python's cannot be put back
                signal.signal(number, handler)


async def run_processes(
    arguments: Sequence[str],
    count: int,
    *,
    environment: Mapping[str, str],
    notify: Callable[[str], None] = lambda _: None,
    on_stop: Callable[[], None] = lambda: None,
    on_line: Callable[[str], None] | None = None,
) -> list[int]:
    """Run `lbr` with these arguments in `count` processes until all have ended; return their exit codes.

    `environment` is added to this process's own. A negative code is the signal that killed a process. Each process gets
    `--parent` with a pipe that closes when this process ends, and has its own group, so that a Ctrl-C reaches it once,
    through this process. `on_stop` is called after each such signal. `on_line` gets the lines that they write to stderr
    and to a terminal, which otherwise are this process's own.
    """
    children: list[asyncio.subprocess.Process] = []
    stopping = False

    def stop(_: signal.Signals) -> None:
        nonlocal stopping
        stopping = True
        _terminate(children)
        on_stop()

    async def wait_for(child: asyncio.subprocess.Process) -> int:
        stream = child.stdout or child.stderr
        if stream is not None and on_line is not None:
            await _read_lines(stream, on_line)
        code = await child.wait()
        if code == -signal.SIGTERM and stopping:
            return 0  # our own signal, before the child listened to signals and so before it held a job
        if code < 0:
            name = signal.Signals(-code).name
            notify(f"worker process {child.pid} was killed by {name}; its jobs will be reclaimed")
        return code

    output: dict[str, Any] = {} if on_line is None else {"stderr": asyncio.subprocess.PIPE}
    if output and sys.stdout is not None and sys.stdout.isatty():  # the same terminal
        output = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
    theirs, ours = os.pipe()
    # -P: a queue.py or a folder lbr in the working directory must not be imported instead of the real one.
    command = [sys.executable, "-P", "-m", "lbr", *arguments, "--parent", str(theirs)]
    with handled_signals(stop):  # before the first child starts, so that a signal reaches them all
        try:
            while len(children) < count and not stopping:
                child = await asyncio.create_subprocess_exec(
                    *command, process_group=0, env=os.environ | environment, pass_fds=(theirs,), **output
                )
                children.append(child)
            if stopping:
                _terminate(children[-1:])
            return list(await asyncio.gather(*map(wait_for, children)))
        finally:
            _terminate(children)
            os.close(ours)
            os.close(theirs)


async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Pass on lines until the stream ends; one that is too long is broken."""
    rest = b""
    while chunk := await stream.read(READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > READ_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            on_line(line.decode(errors="replace"))
    if rest:
        on_line(rest.decode(errors="replace"))


def _terminate(children: Sequence[asyncio.subprocess.Process]) -> None:
    # Never SIGINT: a child that does not listen yet would print a traceback.
    for child in children:
        if child.returncode is None:
            child.terminate()
