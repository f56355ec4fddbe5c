"""How many boundaries between modules of lbr each further job of a worker crosses.

    python scripts/boundaries.py [--jobs 500] [--limit 50]

A crossing is a call from a function in one module of lbr to a function in another, in any thread. A coroutine that goes
on after a wait is not called again. The script answers N prompts and then 2N of them through the chat adapter, from a
queue in a SQLite file, and divides the difference by N. The exit status is 1 if there are more than the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import sys
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bench_chat as chat

import lbr

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SERVER_SECONDS = 0.02
SLOTS = 64
SHOWN_FUNCTIONS = 3


class Crossing(NamedTuple):
    """A call between two modules; the modules are without `lbr.`."""

    caller: str
    called: str
    function: str


@contextmanager
def crossings() -> Iterator[Counter[Crossing]]:
    """Count crossings within the block, in this thread and in those that it starts."""
    found: Counter[Crossing] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_back is None or not is_new(frame):
            return
        called, caller = module_of(frame), module_of(frame.f_back)
        if called and caller and called != caller:
            found[Crossing(caller, called, frame.f_code.co_qualname)] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def is_new(frame: FrameType) -> bool:
    """Return whether a function has just been called, and no coroutine or generator goes on."""
    code = frame.f_code
    if not code.co_flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return True
    return frame.f_lineno == code.co_firstlineno


def module_of(frame: FrameType) -> str:
    """Return the name of a function's module of lbr; empty if it is another package's."""
    package, _, name = str(frame.f_globals.get("__name__", "")).partition(".")
    return name if package == "lbr" else ""


async def crossed(folder: Path, jobs: int) -> Counter[Crossing]:
    """Enqueue prompts, and return the crossings of a worker that answers them."""
    database = folder / f"{jobs}.db"
    prompts = [f"What do you make of {n}?" for n in range(jobs)]
    await lbr.enqueue(prompts, run="all", model=f"openai-chat:{chat.MODEL}", db_url=database)
    with crossings() as found:
        report = await lbr.work(concurrency=SLOTS, db_url=database)
    if report.done != jobs:
        sys.exit(f"expected {jobs} answers, got: {report.done}")
    return found


def measure(jobs: int) -> dict[Crossing, float]:
    """Return the crossings of each further job."""
    with (
        tempfile.TemporaryDirectory(prefix="lbr-boundaries-") as folder,
        chat.chat_server(SERVER_SECONDS) as url,
        chat.environment(OPENAI_BASE_URL=url, OPENAI_API_KEY=chat.KEY),
    ):
        few, many = (asyncio.run(crossed(Path(folder), count)) for count in (jobs, 2 * jobs))
    # What a shorter run crossed more often, by chance, is no crossing of a job.
    return {one: max(0, many[one] - few[one]) / jobs for one in many}


def table(found: dict[Crossing, float]) -> str:
    """Return a line for each pair of modules, most crossings first, with the functions that are called most."""
    pairs: Counter[tuple[str, str]] = Counter()
    for one, times in found.items():
        pairs[one.caller, one.called] += times  # type: ignore[assignment]
    lines = []
    for (caller, called), times in pairs.most_common():
        if times < 0.005:
            break
        functions = {one.function: n for one, n in found.items() if (one.caller, one.called) == (caller, called)}
        most = sorted(functions, key=functions.__getitem__, reverse=True)[:SHOWN_FUNCTIONS]
        words = ", ".join(f"{name} {functions[name]:.2f}" for name in most if functions[name] >= 0.005)
        lines.append(f"{times:7.2f}  {f'{caller} -> {called}':<44}  {words}")
    return "\n".join(lines)


def main() -> None:
    """Count, print the table and the total, and compare it with the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=500, help="prompts of the first run; the second has twice as many")
    parser.add_argument("--limit", type=float, default=50.0, help="the most crossings of each further job")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error("expected --jobs to be at least 1")
    found = measure(given.jobs)
    total = sum(found.values())
    print(table(found))
    print(f"{total:7.2f}  for each further job, at most {given.limit:g}: {'yes' if total <= given.limit else 'no'}")
    sys.exit(total > given.limit)


if __name__ == "__main__":
    main()
