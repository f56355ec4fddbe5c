"""Answers that are larger than lbr reads, from a server that never stops sending."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import zlib

import pytest

from tests.support.http_server import read, serving

MEGABYTES = 500
CALLER = """
import asyncio, json, resource, sys
from lbr.core.errors import CallError
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from tests.support.chat_wire import chat_model, reference_model

NAME = "openai-chat:gpt-4o-mini"
REQUEST = Request(prompt=Prompt(text="p"), task=Task(model=NAME), job_id=JobId(1), seq=1)

async def main():
    model = {"chat": chat_model, "pydantic-ai": reference_model}[sys.argv[1]](NAME)
    ended = await asyncio.gather(*(model.answer(REQUEST) for _ in range(4)), return_exceptions=True)
    await model.aclose()
    assert all(isinstance(one, CallError) for one in ended), ended
    told = [[one.family, str(one.symptom), one.text, str(one)] for one in ended]
    print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]))

asyncio.run(main())
"""


def endless(*, packed: bool) -> tuple[bytes, bytes]:
    """Return how an answer begins, and the piece of 16 MB that it repeats for ever; packed, of 16 KB."""
    piece = b"x" * 2**24
    if not packed:
        return b"\r\n", piece
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    start = packer.compress(b"x") + packer.flush(zlib.Z_FULL_FLUSH)
    return b"content-encoding: gzip\r\n\r\n" + start, packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["chat", "pydantic-ai"])
@pytest.mark.parametrize(("packed", "status"), [(False, "200 OK"), (True, "200 OK"), (False, "500 Oops")])
async def test_an_endless_answer_fails_its_call(adapter: str, packed: bool, status: str) -> None:
    """Four endless answers at once fail with an attempt charged, are not kept, and take little memory."""
    start, piece = endless(packed=packed)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n".encode() + start)
        while True:
            writer.write(piece)
            await writer.drain()

    async with serving(handle) as server:
        environment = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"}
        caller = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CALLER, adapter, stdout=asyncio.subprocess.PIPE, env=environment
        )
        told, megabytes = json.loads((await caller.communicate())[0])
        await server.all_ended()
    words = f"the answer from 127.0.0.1:{server.port} is larger than 64 MB; it was not kept"
    assert told == [["transient", "None", None, words]] * 4
    assert megabytes < MEGABYTES
