"""What carries model calls: the same errors, headers, proxies and trust as httpx has, over aiohttp's connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest
from aiohttp import ClientHttpProxyError, ClientTimeout, InvalidURL, RequestInfo
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from lbr.core.errors import CallError, Family, UsageError
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.http import Connections, lost_words
from lbr.models.pydantic_ai import PydanticAIModel
from lbr.models.pydantic_ai import transport as transports
from tests.support.faulty_server import answer as completion
from tests.support.llmock_server import free_port
from tests.support.raw_server import (
    ResolvedTask,
    answer,
    answering,
    certificate,
    proxying,
    read,
    reset,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MODEL = "openai-chat:gpt-4o-mini"
KEYS = {
    "OPENAI_API_KEY": "k-openai",
    "OPENROUTER_API_KEY": "k-openrouter",
    "ANTHROPIC_API_KEY": "k-anthropic",
    "GOOGLE_API_KEY": "k-google",
    "DEEPSEEK_API_KEY": "k-deepseek",
    "PYDANTIC_AI_GATEWAY_API_KEY": "k-gateway",
}
COMPLETION = answer(json.dumps(completion("hello")).encode(), "content-type: application/json")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without proxies, trust stores and URLs of the machine's own, and with keys."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith("_BASE_URL") or name.startswith("SSL_CERT_"):
            monkeypatch.delenv(name)
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@pytest.fixture(params=["httpx2", "httpx", "httpx2's own", "httpx's own"])
async def client(request: Any) -> AsyncIterator[Any]:
    """Open a client of each package over aiohttp, and over its own pool: what a test says holds for all."""
    package = httpx2 if request.param.startswith("httpx2") else httpx
    async with opened(package, carried="own" not in request.param) as one:
        yield one


@asynccontextmanager
async def opened(package: Any = httpx2, *, carried: bool = True, **options: Any) -> AsyncIterator[Any]:
    """Open a client and close it."""
    transport = transports.make_transport(package) if carried else None
    async with package.AsyncClient(transport=transport, **{"timeout": 30, **options}) as client:
        yield client


def error_of(client: Any, name: str) -> Any:
    """Return an error's class in the client's package."""
    return getattr(httpx2 if isinstance(client, httpx2.AsyncClient) else httpx, name)


async def test_an_answer_comes_as_it_was_sent(client: Any) -> None:
    """Status, headers that come twice and the body are the server's; a connection serves many calls."""
    asked: list[ResolvedTask] = []
    said = answer(b"{}", "x-a: 1", "X-A: 2", "x-long: " + "l" * 20_000, status="418 Teapot")
    async with serving(answering(said, asked)) as server:
        for _ in range(3):
            answered = await client.post(f"{server.url}/a%2Fb?q=%20", json={"q": "é"}, headers={"X-Key": "k"})
        assert server.begun == 1
    assert (answered.status_code, answered.http_version) == (418, "HTTP/1.1")
    assert answered.headers.get_list("x-a") == ["1", "2"]
    assert answered.headers["x-long"] == "l" * 20_000
    assert answered.content == b"{}"
    assert asked[0].line == "POST /v1/a%2Fb?q=%20 HTTP/1.1"
    assert json.loads(asked[0].body) == {"q": "é"}
    assert asked[0].headers["x-key"] == "k"
    assert asked[0].headers["user-agent"].startswith("python-httpx")


async def test_only_the_headers_of_the_client_are_sent() -> None:
    """Nothing but what httpx itself would send reaches the server."""
    asked: list[ResolvedTask] = []
    async with serving(answering(answer(b"{}"), asked)) as server:
        for carried in (True, False):
            async with opened(carried=carried) as client:
                await client.post(server.url, json={"q": 1})
                await client.get(server.url)
                await client.post(server.url.replace("//", "//user:word@"), content=b"")
    names = [{name: value for name, value in one.headers.items() if name != "connection"} for one in asked]
    assert names[:3] == names[3:]
    assert asked[2].headers["authorization"].startswith("Basic ")


async def test_a_packed_answer_is_unpacked_once(client: Any) -> None:
    """What says gzip is unpacked, and what is in it is left as it is."""
    packed = gzip.compress(gzip.compress(b"hello"))
    async with serving(answering(answer(packed, "content-encoding: gzip"))) as server:
        assert gzip.decompress((await client.get(server.url)).content) == b"hello"


async def test_an_answer_can_be_read_as_it_comes(client: Any) -> None:
    """Each part of a streamed answer is there before the next is sent."""
    wanted = asyncio.Event()

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await wanted.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as server, client.stream("GET", server.url) as answered:
        chunks = answered.aiter_raw()
        assert await anext(chunks) == b"one"
        wanted.set()
        assert await anext(chunks) == b"two"


async def test_redirects_are_the_clients_affair(client: Any) -> None:
    """The transport follows none by itself, so that no key goes where nobody meant it to go."""
    async with serving(answering(answer(b"", "location: /v1/there", status="307 There"))) as server:
        assert (await client.post(server.url, json={})).status_code == 307


async def test_a_refused_connection(client: Any) -> None:
    """Nobody listens: ConnectError."""
    with pytest.raises(error_of(client, "ConnectError")):
        await client.get(f"http://127.0.0.1:{free_port()}/")


async def test_a_name_that_is_nobodys(client: Any) -> None:
    """A host that cannot be found: ConnectError."""
    with pytest.raises(error_of(client, "ConnectError")):
        await client.get("http://nobody.invalid/")


FAULTS = {
    "closed before the answer": (b"", False),
    "reset before the answer": (b"", True),
    "truncated": (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", False),
    "truncated in chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf", False),
    "reset in the middle": (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", True),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", False),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_answer(client: Any, fault: str) -> None:
    """Each way to break off is an error of the transport, and no timeout."""
    said, hard = FAULTS[fault]

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(said)
        await writer.drain()
        if hard:
            await asyncio.sleep(0.05)  # a reset takes with it what is still on its way
            reset(writer)

    async with serving(handle) as server:
        with pytest.raises(error_of(client, "TransportError")) as raised:
            await client.post(server.url, json={})
    assert not isinstance(raised.value, error_of(client, "TimeoutException"))


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"])
async def test_a_slow_answer(client: Any, said: bytes) -> None:
    """Headers, or a rest of the body, that do not come in time: ReadTimeout, and the connection is closed."""

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(said)
        await reader.read()

    async with serving(handle) as server:
        with pytest.raises(error_of(client, "ReadTimeout")):
            await client.post(server.url, json={}, timeout=0.1)
        await server.all_ended()


async def test_a_connection_that_nobody_accepts(client: Any) -> None:
    """TLS that the server does not answer: ConnectTimeout, by the timeout for connecting alone."""

    async def handle(reader: Any, writer: Any) -> None:
        await reader.read()

    timeout = (httpx2 if isinstance(client, httpx2.AsyncClient) else httpx).Timeout(30, connect=0.2)
    async with serving(handle) as server:
        with pytest.raises(error_of(client, "ConnectTimeout")):
            await client.get(server.url.replace("http:", "https:"), timeout=timeout)


async def test_what_no_request_may_hold(client: Any) -> None:
    """A key with a line break fails before anything is sent."""
    async with serving(answering(answer(b"{}"))) as server:
        with pytest.raises(error_of(client, "TransportError")):
            await client.get(server.url, headers={"x-key": "a\r\nb: c"})


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"])
async def test_a_cancelled_call_closes_its_connection(client: Any, said: bytes) -> None:
    """The server sees the end of a call that nobody waits for any more, and need not go on."""
    came = asyncio.Event()

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(said)
        came.set()
        await reader.read()

    async with serving(handle) as server:
        call = asyncio.create_task(client.post(server.url, json={}))
        await came.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await server.all_ended()


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates are verified, and SSL_CERT_FILE says by whom, as for httpx."""
    file, tls = certificate(tmp_path)
    async with serving(answering(answer(b"{}")), tls) as server:
        with pytest.raises(error_of(client, "ConnectError"), match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(server.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        package = httpx2 if isinstance(client, httpx2.AsyncClient) else httpx
        async with opened(package) as trusting:
            assert (await trusting.get(server.url)).status_code == 200
            with pytest.raises(error_of(client, "ConnectError")):
                await trusting.get(server.url.replace("127.0.0.1", "localhost"))


@pytest.mark.parametrize("carried", [True, False])
async def test_a_proxy_of_the_environment(carried: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """HTTP_PROXY takes calls in the clear, with the user it names; HTTPS_PROXY a tunnel; NO_PROXY excepts hosts."""
    file, tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    asked: list[ResolvedTask] = []
    async with (
        serving(proxying(asked)) as proxy,
        serving(answering(answer(b"{}"))) as plain,
        serving(answering(answer(b"{}")), tls) as secret,
    ):
        address = f"http://user:w%2Ford@127.0.0.1:{proxy.port}"
        monkeypatch.setenv("ALL_PROXY", address)
        async with opened(carried=carried) as client:
            assert (await client.post(plain.url, json={})).json() == {"by": "proxy"}
            assert (await client.post(secret.url, json={})).json() == {}
        monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
        async with opened(carried=carried) as client:
            assert (await client.post(plain.url, json={})).json() == {}
    assert [one.line for one in asked] == [
        f"POST {plain.url} HTTP/1.1",
        f"CONNECT 127.0.0.1:{secret.port} HTTP/1.1",
    ]
    assert {one.headers["proxy-authorization"] for one in asked} == {"Basic dXNlcjp3L29yZA=="}


@pytest.mark.parametrize("carried", [True, False])
async def test_a_proxy_that_says_no(carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel that is refused fails the call; a proxy that is not there is a ConnectError."""
    async with serving(answering(answer(b"", status="403 Forbidden"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")
        async with opened(carried=carried) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get("https://example.com")
    async with opened(carried=carried) as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get("https://example.com")


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
        ({"ALL_PROXY": "http://p:3", "NO_PROXY": "127.0.0.1,::1"}, "http://[::1]:8/", None),
    ],
)
def test_which_proxy_a_call_takes(
    environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies and exceptions are those that Python's own urllib reads."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Connections()._proxy_of(URL(url)) == proxy


async def test_calls_have_no_password_of_netrc_and_no_cookie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this machine holds for other programs, and what a server left, does not go with calls."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    asked: list[ResolvedTask] = []
    http = Connections()
    async with serving(answering(answer(b"{}", "set-cookie: a=b"), asked)) as server:
        for _ in range(2):
            async with await http.request("POST", server.url, timeout=ClientTimeout(total=30)) as answered:
                assert await answered.json(content_type=None) == {}
        await http.aclose()
        await server.all_ended()
    assert not any({"authorization", "cookie"} & one.headers.keys() for one in asked)


@pytest.mark.parametrize("url", ["http://api.example.com/v1", "https://api.example.com/v1"])
async def test_a_proxy_that_is_none_fails_calls_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """A worker serves other runs, too: what is wrong with the environment of one is told by its calls."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://user:pa[ss@127.0.0.1:1")
    http = Connections()
    with pytest.raises(InvalidURL):
        await http.request("GET", url, timeout=ClientTimeout())
    await http.aclose()


async def test_a_proxy_that_aiohttp_cannot_speak_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOCKS is for httpx's own pool, which providers keep then."""
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@127.0.0.1:1080")
    with pytest.raises(UsageError, match="socksio"):
        PydanticAIModel(MODEL, task_settings={})


def request(timeout: float | None = None) -> Request:
    """Make a request for a provider's model."""
    return Request(prompt=Prompt(text="hi"), task=Task(model=MODEL), job_id=JobId(1), seq=1, timeout=timeout)


PROVIDERS = [
    MODEL,
    "openai:gpt-4o-mini",
    "openrouter:a/b",
    "anthropic:claude-sonnet-4-5",
    "google:gemini-2.5-flash",
    "deepseek:deepseek-chat",
    "gateway/openai:gpt-4o-mini",
    "gateway/anthropic:claude-sonnet-4-5",
]


@pytest.mark.parametrize("name", [*PROVIDERS, "relay"])
async def test_every_provider_is_carried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each provider's SDK takes the client over aiohttp, and opens none of its own."""
    monkeypatch.setenv("PYDANTIC_AI_GATEWAY_BASE_URL", "http://127.0.0.1:1")
    if name == "relay":
        monkeypatch.setenv("OPENROUTER_BASE_URL", "http://127.0.0.1:1/v1")
        name = "openrouter:a/b"
    model = PydanticAIModel(name, task_settings={})
    provider: Any = model._model.provider
    assert provider._own_http_client is None
    assert type(model._client._transport).__name__ == "AiohttpTransport"
    await model.aclose()
    assert model._client.is_closed


def test_which_providers_take_a_client() -> None:
    """Those that still need the older httpx get a client of it, and those that take none get none."""

    class Older:
        def __init__(self, *, http_client: httpx.AsyncClient | None = None) -> None: ...

    class Ignoring:
        def __init__(self, *, http_client: AsyncClient | None = None) -> None: ...  # type: ignore[name-defined] # noqa: F821

    class Without:
        def __init__(self) -> None: ...

    made = [transports.client_for(one, None) for one in (Older, Ignoring, Without)]  # type: ignore[arg-type]
    assert isinstance(made[0], httpx.AsyncClient)
    assert made[1:] == [None, None]


async def test_what_pydantic_ai_sets_on_its_client_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user agent and its timeouts are the same over aiohttp."""
    asked: list[ResolvedTask] = []
    async with serving(answering(COMPLETION, asked)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        model = PydanticAIModel(MODEL, task_settings={})
        assert (model._client.timeout.connect, model._client.timeout.read) == (5, 600)
        assert (await model.answer(request())).text == "hello"
        await model.answer(request())
        assert (server.begun, server.ended) == (1, 0)
        await model.aclose()
        await server.all_ended()
    assert asked[0].headers["user-agent"].startswith("pydantic-ai/")
    assert asked[0].headers["authorization"] == "Bearer k-openai"


@pytest.mark.parametrize("fault", [*FAULTS, "slow", "refused"])
async def test_a_fault_of_the_network_is_transient(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks between here and a provider may pass; only what could not connect in time is an overload."""
    said, hard = FAULTS.get(fault, (b"", False))

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(said)
        await writer.drain()
        if fault == "slow":
            await reader.read()
        if hard:
            reset(writer)

    async with serving(handle) as server:
        url = f"http://127.0.0.1:{free_port()}/v1" if fault == "refused" else server.url
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        model = PydanticAIModel(MODEL, task_settings={})
        with pytest.raises(CallError) as raised:
            await model.answer(request(timeout=0.2 if fault == "slow" else None))
        await model.aclose()
    assert raised.value.family is Family.TRANSIENT
    assert not raised.value.overloaded
    assert raised.value.kind == ("ModelTimeoutError" if fault == "slow" else "ModelConnectionError")
    place = url.removeprefix("http://").removesuffix("/v1")
    assert (place in str(raised.value)) is (fault != "slow")


async def test_a_connection_that_is_not_made_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be reached in time is named, too."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@127.0.0.1:9/v1?key=secret")
    model = PydanticAIModel(MODEL, task_settings={})

    async def late(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr("aiohttp.TCPConnector.connect", late)
    with pytest.raises(CallError) as raised:
        await model.answer(request())
    await model.aclose()
    assert str(raised.value) == "the connection to 127.0.0.1:9 failed: it was not made in time"
    assert raised.value.kind == "ModelTimeoutError"


def test_nobody_imports_aiohttp_before_a_call() -> None:
    """`lbr --help` and the modules of models stay as fast as they were."""
    code = "import sys, lbr.cli, lbr.models.http, lbr.models.pydantic_ai; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_proxy_says_is_not_repeated() -> None:
    """Some say what they were sent, a password among it."""
    asked = RequestInfo(URL("http://api.example"), "CONNECT", CIMultiDictProxy(CIMultiDict()), URL())
    refused = ClientHttpProxyError(asked, (), status=407, message="Basic bWU6c2VjcmV0 is nobody's")
    words = lost_words(refused, "https://api.example/v1?key=secret")
    assert words == "the connection to api.example:443 failed: the proxy answered 407"


@pytest.mark.parametrize("url", ["http:///v1", "https:", "v1"])
def test_a_url_without_a_host_is_told_as_that(url: str) -> None:
    """Nothing was tried, and no proxy is to blame."""
    assert lost_words(InvalidURL(url), url).startswith("expected a URL with a host, got: one without; ")
