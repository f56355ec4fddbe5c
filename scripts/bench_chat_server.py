"""A chat server that takes a fixed time for each answer and next to no CPU.

It speaks as much of HTTP/1.1 and of OpenAI's chat completions as a client needs, and answers with the prompt itself, so
that answers can be checked. A GET returns the number of calls and, for a URL that ends in `?since=SECONDS` of the epoch,
the time of the first call since then. It runs as a process of its own, which ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from bisect import bisect_left
from collections import Counter
from typing import Any

import orjson

SECONDS = 0.05
USAGE = {"prompt_tokens": 40, "completion_tokens": 40, "total_tokens": 80}
NOTHING_ASKED = b'{"error": {"message": "expected a message, got: none"}}'


class ChatServer:
    """What all connections share: the calls so far, by prompt, and the time of each."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls: Counter[str] = Counter()
        self.times: list[float] = []

    def answer(self, body: bytes) -> bytes | None:
        """Note a call and return the answer's body; None if it has no message, as some clients try."""
        asked = orjson.loads(body)
        if not asked["messages"]:
            return None
        prompt = text_of(asked["messages"][-1]["content"])
        self.calls[prompt] += 1
        self.times.append(time.time())
        message = {"role": "assistant", "content": prompt}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "bench", "object": "chat.completion", "created": 1_700_000_000, "model": asked["model"]}
        return orjson.dumps(head | {"choices": [choice], "usage": USAGE})

    def report(self, since: float) -> bytes:
        """Return the answer to a GET: `first` is the time of the first call since then, None if there was none."""
        later = self.times[bisect_left(self.times, since) :][:1]
        return orjson.dumps(
            {"calls": len(self.times), "distinct": len(self.calls), "first": later[0] if later else None}
        )


def text_of(content: str | list[dict[str, str]]) -> str:
    """Return a message's text, which comes as it is or in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class Connection(asyncio.Protocol):
    """One client's connection: a request at a time, kept open."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server
        self._read = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        """Keep what the answers are written to."""
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Write no more."""
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Take the data; answer a complete request after the fixed time."""
        self._read += data
        head, found, rest = self._read.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._read = rest
            self._write(self._server.report(float(head.split()[1].partition(b"?since=")[2] or 0)))
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return
        self._read = rest[length:]
        body = self._server.answer(rest[:length])
        if body is None:
            self._write(NOTHING_ASKED, b"400 Bad Request")
            return
        asyncio.get_running_loop().call_later(self._server.seconds, self._write, body)

    def _write(self, body: bytes, status: bytes = b"200 OK") -> None:
        if self._transport is not None:
            head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self._transport.write(head % (status, len(body)) + body)


async def serve(seconds: float) -> None:
    """Serve on a free port, print the port, and stop when standard input ends."""
    loop = asyncio.get_running_loop()
    server = ChatServer(seconds)
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=2_000)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    listening.close()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        os.sched_setaffinity(0, {int(sys.argv[2])})
    asyncio.run(serve(float(sys.argv[1])))
