"""The witness of a storm: a process of its own that answers calls, and writes each down as it comes in.

Prints its port. Each line of its log is the caller's process and the prompt. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from storm_calls import PORT, answer_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

Call = tuple[int, str]


@asynccontextmanager
async def witness(folder: Path, latency: float) -> AsyncIterator[Callable[[], list[Call]]]:
    """Start the witness and tell all commands its port; yields what returns the calls so far: who asked for what."""
    log = folder / "calls.log"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        str(log),
        str(latency),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("expected the pipe that was asked for, got: none")
        port = (await process.stdout.readline()).decode().strip()
        os.environ |= {PORT: port, "PYTHONPATH": str(Path(__file__).parent)}
        yield lambda: _calls(log)
    finally:
        process.kill()
        await process.wait()


def _calls(log: Path) -> list[Call]:
    lines = (line.partition(" ") for line in log.read_text().splitlines())
    return [(int(pid), prompt) for pid, _, prompt in lines]


def repeats(calls: Sequence[Call]) -> Counter[int]:
    """Count the calls of each process that somebody made once more."""
    repeated: Counter[int] = Counter()
    latest: dict[str, int] = {}
    for pid, prompt in calls:
        if prompt in latest:
            repeated[latest[prompt]] += 1
        latest[prompt] = pid
    return repeated


async def _serve(log_path: Path, latency: float) -> None:
    """Answer until standard input closes."""
    rng = random.Random(7)  # noqa: S311 - not for secrets
    ended = asyncio.Event()
    with log_path.open("ab", buffering=0) as log:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    return  # dead before it asked
                log.write(line)
                await asyncio.sleep(rng.uniform(0, 2 * latency))
                prompt = line.decode().rstrip("\n").partition(" ")[2]
                writer.write(f"{answer_to(prompt)}\n".encode())
                await writer.drain()
            except ConnectionError:
                pass  # whoever asked is dead
            finally:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
        asyncio.get_running_loop().add_reader(0, lambda: None if os.read(0, 4096) else ended.set())
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
