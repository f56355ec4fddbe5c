"""What the workers of a storm call: the witness, who writes each call down before anybody else knows of it."""

from __future__ import annotations

import asyncio
import os

PORT = "LBR_TEST_PORT"


async def ask(prompt: str) -> str:
    """Tell the witness who asks for what, and return what it answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ[PORT]))
    try:
        writer.write(f"{os.getpid()} {prompt}\n".encode())
        answer = await reader.readline()
        if not answer.endswith(b"\n"):
            raise ConnectionError("the witness broke off")
        return answer.decode().rstrip("\n")
    finally:
        writer.close()


def answer_to(prompt: str) -> str:
    """Return what the witness answers: nobody could guess it who was not told."""
    return f"answer to {prompt[::-1]}"
