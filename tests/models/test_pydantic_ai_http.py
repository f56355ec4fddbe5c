"""What carries model calls: the same errors, headers, proxies and trust as httpx has, over aiohttp's connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import httpx
import httpx2
import pytest

from lbr.core.errors import CallError, Family, Symptom, UsageError
from lbr.core.types import JobId, Prompt, Task
from lbr.models.base import Request
from lbr.models.pydantic_ai import PydanticAIModel, Transport, http_package
from tests.support.http_server import (
    Request as HttpRequest,
)
from tests.support.http_server import (
    answer,
    answering,
    certificate,
    completion,
    proxying,
    read,
    reset,
    serving,
)
from tests.support.llmock_server import free_port

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
COMPLETION = answer(completion("hello").encode(), "content-type: application/json")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without proxies, trust stores and URLs of the machine's own, and with keys."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith("_BASE_URL") or name.startswith("SSL_CERT_"):
            monkeypatch.delenv(name)
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@asynccontextmanager
async def opened() -> AsyncIterator[httpx2.AsyncClient]:
    """Open a client over aiohttp and close it."""
    async with httpx2.AsyncClient(transport=Transport(None), timeout=30) as client:
        yield client


async def test_an_answer_comes_as_it_was_sent() -> None:
    """Status, repeated headers and the body are the server's; a connection serves many calls."""
    asked: list[HttpRequest] = []
    sent = answer(b"{}", "x-a: 1", "X-A: 2", "x-long: " + "l" * 20_000, status="418 Teapot")
    async with serving(answering(sent, asked)) as server, opened() as client:
        for _ in range(3):
            answered = await client.post(f"{server.url}/a%2Fb?q=%20", json={"q": "é"}, headers={"X-Key": "k"})
        assert server.begun == 1
    assert (answered.status_code, answered.headers.get_list("x-a")) == (418, ["1", "2"])
    assert (answered.headers["x-long"], answered.content) == ("l" * 20_000, b"{}")
    assert asked[0].line == "POST /v1/a%2Fb?q=%20 HTTP/1.1"
    assert json.loads(asked[0].body) == {"q": "é"}
    assert asked[0].headers["x-key"] == "k"
    assert asked[0].headers["user-agent"].startswith("python-httpx")


async def test_a_password_in_a_url_is_sent_as_a_header() -> None:
    """Aiohttp refuses both at once."""
    asked: list[HttpRequest] = []
    async with serving(answering(answer(b"{}"), asked)) as server, opened() as client:
        await client.get(server.url.replace("//", "//user:word@"))
    assert asked[0].headers["authorization"].startswith("Basic ")


async def test_a_packed_answer_is_unpacked_once() -> None:
    """What says gzip is unpacked, and what is in it is left as it is."""
    packed = gzip.compress(gzip.compress(b"hello"))
    async with serving(answering(answer(packed, "content-encoding: gzip"))) as server, opened() as client:
        assert gzip.decompress((await client.get(server.url)).content) == b"hello"


async def test_redirects_are_not_followed() -> None:
    """No key goes where nobody meant it to go."""
    sent = answer(b"", "location: /v1/there", status="307 There")
    async with serving(answering(sent)) as server, opened() as client:
        assert (await client.post(server.url, json={})).status_code == 307


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/", "http://nobody.invalid/"])
async def test_a_server_that_is_not_there(url: str) -> None:
    """No server listens, or the host cannot be found: other calls will fail as well."""
    url = url.format(free_port())
    async with opened() as client:
        with pytest.raises(CallError) as raised:
            await client.get(url)
    assert (raised.value.kind, raised.value.symptom) == ("ModelConnectionError", Symptom.UNREACHABLE)


FAULTS = {
    "closed before the answer": (b"", False),
    "reset before the answer": (b"", True),
    "truncated": (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", False),
    "truncated in chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf", False),
    "reset in the middle": (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", True),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", False),
}


async def test_a_connection_that_no_server_accepts() -> None:
    """TLS that the server does not answer fails by the timeout for connecting alone."""

    async def handle(reader: Any, writer: Any) -> None:
        await reader.read()

    async with serving(handle) as server, opened() as client:
        url = server.url.replace("http:", "https:")
        with pytest.raises(CallError, match="it was not made in time") as raised:
            await client.get(url, timeout=httpx2.Timeout(30, connect=0.2))
    assert raised.value.kind == "ModelTimeoutError"


async def test_what_no_request_may_hold() -> None:
    """A key with a line break fails before anything is sent."""
    async with serving(answering(answer(b"{}"))) as server, opened() as client:
        with pytest.raises(CallError):
            await client.get(server.url, headers={"x-key": "a\r\nb: c"})


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"])
async def test_a_cancelled_call_closes_its_connection(sent: bytes) -> None:
    """The server sees the end of a call that is not waited for any more, and need not go on."""
    came = asyncio.Event()

    async def handle(reader: Any, writer: Any) -> None:
        await read(reader)
        writer.write(sent)
        came.set()
        await reader.read()

    async with serving(handle) as server, opened() as client:
        call = asyncio.create_task(client.post(server.url, json={}))
        await came.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await server.all_ended()


async def test_an_untrusted_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are verified, and SSL_CERT_FILE names those that are trusted."""
    file, tls = certificate(tmp_path)
    async with serving(answering(answer(b"{}")), tls) as server:
        async with opened() as client:
            with pytest.raises(CallError, match="its certificate is not trusted"):
                await client.get(server.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        async with opened() as trusting:
            assert (await trusting.get(server.url)).status_code == 200
            with pytest.raises(CallError):
                await trusting.get(server.url.replace("127.0.0.1", "localhost"))


async def test_a_proxy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY takes calls in the clear, with the user it names; HTTPS_PROXY a tunnel; NO_PROXY excepts hosts."""
    file, tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    asked: list[HttpRequest] = []
    async with (
        serving(proxying(asked)) as proxy,
        serving(answering(answer(b"{}"))) as plain,
        serving(answering(answer(b"{}")), tls) as secret,
    ):
        monkeypatch.setenv("ALL_PROXY", f"http://user:w%2Ford@127.0.0.1:{proxy.port}")
        async with opened() as client:
            assert (await client.post(plain.url, json={})).json() == {"by": "proxy"}
            assert (await client.post(secret.url, json={})).json() == {}
        monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
        async with opened() as client:
            assert (await client.post(plain.url, json={})).json() == {}
    assert [one.line for one in asked] == [
        f"POST {plain.url} HTTP/1.1",
        f"CONNECT 127.0.0.1:{secret.port} HTTP/1.1",
    ]
    assert {one.headers["proxy-authorization"] for one in asked} == {"Basic dXNlcjp3L29yZA=="}


async def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel that is refused fails the call, and so does a proxy that is not there."""
    async with serving(answering(answer(b"", status="403 Forbidden"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")
        async with opened() as client:
            with pytest.raises(CallError, match="the proxy answered 403"):
                await client.get("https://example.com")
    async with opened() as client:
        with pytest.raises(CallError, match=f"127.0.0.1:{proxy.port} failed"):
            await client.get("https://example.com")


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
    provider, client = cast("Any", model._model).provider, cast("Any", model._client)
    assert provider._own_http_client is None
    assert isinstance(client._transport, Transport)
    await model.aclose()
    assert client.is_closed


def test_which_package_a_provider_calls_with() -> None:
    """Some still need the older httpx, and some take no client."""

    class Newer:
        def __init__(self, *, http_client: httpx2.AsyncClient | None = None) -> None: ...

    class Older:
        def __init__(self, *, http_client: httpx.AsyncClient | None = None) -> None: ...

    class Ignoring:
        def __init__(self, *, http_client: AsyncClient | None = None) -> None: ...  # type: ignore[name-defined] # noqa: F821

    class Without:
        def __init__(self) -> None: ...

    found: list[Any] = [http_package(cast("Any", one)) for one in (Newer, Older, Ignoring, Without)]
    assert found == [httpx2, httpx, None, None]


async def test_what_pydantic_ai_sets_on_its_client_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its user agent and its timeouts are the same over aiohttp."""
    asked: list[HttpRequest] = []
    async with serving(answering(COMPLETION, asked)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        model = PydanticAIModel(MODEL, task_settings={})
        assert model._client is not None
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
