"""HTTP for model calls: proxies, trust and what a failed connection is reported as."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientHttpProxyError, ClientTimeout, RequestInfo
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from lbr.core.errors import CallError
from lbr.models.http import Connections, lost
from tests.support.http_server import Request, answer, answering, certificate, read, serving

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without proxies and trust stores of the machine's own."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL_CERT_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({"HTTP_PROXY": "http://p:1"}, "http://example.com/", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "https://example.com/", None),
        ({"https_proxy": "p:2", "ALL_PROXY": "http://p:3"}, "https://example.com/", "http://p:2"),
        ({"HTTPS_PROXY": "p:2", "ALL_PROXY": "http://p:3"}, "http://example.com/", "http://p:3"),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "*"}, "http://example.com/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "a, Example.com"}, "http://example.com/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "example.com"}, "http://api.example.com/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": ".example.com"}, "http://api.example.com/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "example.com"}, "http://notexample.com/", "http://p:3"),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "127.0.0.1,::1"}, "http://127.0.0.1:8/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "127.0.0.1:8"}, "http://127.0.0.1:8/", None),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "127.0.0.1:8"}, "http://127.0.0.1:9/", "http://p:3"),
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "127.0.0.1,::1"}, "http://[::1]:8/", None),
    ],
)
async def test_which_proxy_a_call_takes(
    environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies and exceptions are those that Python's own urllib reads."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Connections()._request(url).proxy == (None if proxy is None else URL(proxy))


async def test_calls_have_no_password_of_netrc_and_no_cookie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine holds for other programs, and what a server left, does not go with calls."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    asked: list[Request] = []
    http = Connections()
    async with serving(answering(answer(b"{}", "set-cookie: a=b"), asked)) as server:
        for _ in range(2):
            assert (await http.fetch("POST", server.url, timeout=ClientTimeout(total=30)))[1] == b"{}"
        await http.aclose()
        await server.all_ended()
    assert not any({"authorization", "cookie"} & one.headers.keys() for one in asked)


async def test_a_request_has_each_header_once() -> None:
    """The connection's own headers replace the caller's, and a header of two lines is refused before it is sent."""
    asked: list[Request] = []
    http = Connections()
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    async with serving(answering(hints + answer(b"{}"), asked)) as server:
        names = (("Host", "another"), ("Content-Length", "7"), ("Transfer-Encoding", "chunked"), ("X-Own", "a: b"))
        head, body = await http.fetch("POST", f"{server.url}?a=%2F", timeout=ClientTimeout(), headers=names, data=b"[]")
        assert (head.code, body) == (200, b"{}")
        for wrong in ("a\r\nb: c", "a\nb: c", "a\0"):
            with pytest.raises(CallError, match="no whole answer"):
                await http.fetch("POST", server.url, timeout=ClientTimeout(), headers=(("X-Own", wrong),))
        await http.aclose()
        await server.all_ended()
    [one] = asked
    assert one.body == b"[]"
    assert one.line.endswith("?a=%2F HTTP/1.1")
    assert one.headers == {
        "host": f"127.0.0.1:{server.port}",
        "x-own": "a: b",
        "accept-encoding": one.headers["accept-encoding"],
        "content-length": "2",
    }


@pytest.mark.parametrize("url", ["http://api.example.com/v1", "https://api.example.com/v1"])
async def test_a_proxy_that_is_none_fails_calls_and_nothing_else(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """A worker serves other runs, too: what is wrong with the environment of one is told by its calls."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://user:pa[ss@127.0.0.1:1")
    http = Connections()
    with pytest.raises(CallError, match="the proxy that the environment names is no URL"):
        await http.fetch("GET", url, timeout=ClientTimeout())
    await http.aclose()


async def test_a_certificate_of_no_known_issuer_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The way out is SSL_CERT_FILE, also for who has set REQUESTS_CA_BUNDLE, which lbr does not read."""
    file, tls = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
    async with serving(answering(answer(b"{}")), tls) as server:
        http = Connections()
        with pytest.raises(CallError, match="not trusted: self.*; SSL_CERT_FILE can name a file with its issuer$"):
            await http.fetch("GET", server.url, timeout=ClientTimeout(5))
        await http.aclose()


def test_nobody_imports_aiohttp_before_a_call() -> None:
    """`lbr --help` and the modules of models stay as fast as they were."""
    code = "import sys, lbr.cli, lbr.models.http, lbr.models.build; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_proxy_says_is_not_repeated() -> None:
    """Some say what they were sent, a password among it."""
    asked = RequestInfo(URL("http://api.example"), "CONNECT", CIMultiDictProxy(CIMultiDict()), URL())
    refused = ClientHttpProxyError(asked, (), status=407, message="Basic bWU6c2VjcmV0 is nobody's")
    found = lost(refused, "https://api.example/v1?key=secret")
    assert str(found) == "the connection to api.example:443 failed: the proxy answered 407"


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


async def test_a_connection_whose_request_was_not_read_is_not_used_again() -> None:
    """A server may answer before it has read a large request, and never read the rest: the next call goes elsewhere."""
    done = asyncio.Event()
    handlers: list[Any] = []

    async def answer_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\nno")
        await done.wait()
        writer.transport.abort()

    server = await asyncio.start_server(answer_early, "127.0.0.1", 0, limit=100_000)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
    connections = Connections()
    for size in (12_000_000, 100):
        async with asyncio.timeout(20):
            head, body = await connections.fetch(
                "POST", url, timeout=ClientTimeout(total=None, connect=5), data=b"x" * size
            )
        assert (head.code, body) == (429, b"no")
    await connections.aclose()
    done.set()
    await asyncio.gather(*handlers)
    server.close()
    await asyncio.sleep(0)  # the loop closes what was aborted
