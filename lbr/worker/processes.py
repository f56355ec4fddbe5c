"""Several worker processes under one parent, which passes signals on and waits for all of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def hearing(on_progress: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Have the running event loop call `hear` with each signal that stops; afterwards they do what they did before.

    SIGHUP is left alone if it is ignored, as under nohup. A second one is the same closed terminal: the shell and the
    kernel both send it.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    last: signal.Signals | None = None

    def note(number: signal.Signals) -> None:
        nonlocal last
        if number is not signal.SIGHUP or last is not number:
            on_progress(number)
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
) -> list[int]:
    """Run `lbr` with these arguments in `count` processes until all have ended; return their exit codes.

    `environment` is added to this process's own. Each gets `--parent` with the end of a pipe that nobody writes to:
    when this process is gone, however that came, the pipe is at its end.

    A negative code is the signal that killed a process; its jobs are reclaimed by the others. Each process
    has a group of its own, so that a Ctrl-C reaches it once, through us.
    """
    children: list[asyncio.subprocess.Process] = []
    told = False

    def pass_on(_: signal.Signals) -> None:
        nonlocal told
        told = True
        _stop(children)

    ours, theirs = os.pipe()[::-1]
    # -P: a queue.py or a folder lbr in the working directory must not be imported instead of the real one.
    command = [sys.executable, "-P", "-m", "lbr", *arguments, "--parent", str(theirs)]
    # Before the first child: a signal that comes while they start must find them all.
    with hearing(pass_on):
        try:
            while len(children) < count and not told:
                children.append(
                    await asyncio.create_subprocess_exec(
                        *command, process_group=0, env=os.environ | environment, pass_fds=(theirs,)
                    )
                )
            if told:
                _stop(children[-1:])
            codes = await asyncio.gather(*(_watch(child, lambda: told, notify) for child in children))
            return list(codes)
        finally:
            _stop(children)
            os.close(ours)
            os.close(theirs)


async def _watch(
    child: asyncio.subprocess.Process, told: Callable[[], bool], notify: Callable[[str], None]
) -> int:
    code = await child.wait()
    if code == -signal.SIGTERM and told():
        return 0  # by our own signal, which came before it listened, so before it held anything
    if code < 0:
        notify(
            f"worker process {child.pid} was killed by {signal.Signals(-code).name}; its jobs will be reclaimed"
        )
    return code


def _stop(children: Sequence[asyncio.subprocess.Process]) -> None:
    # Whatever we heard: of a Ctrl-C that comes before a child listens, Python would print where it was.
    for child in children:
        if child.returncode is None:
            child.terminate()
