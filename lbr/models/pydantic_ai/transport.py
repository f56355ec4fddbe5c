"""What carries the calls: aiohttp's connections under the httpx clients of the providers' SDKs.

httpx's own pool costs more per call the more connections it holds: at 500 calls at a time it takes more than all that
is above it. Only the transport is another one; timeouts, headers, hooks and redirects stay the client's, and errors
are httpx's, so that SDKs and pydantic-ai sort them as ever.
"""

from __future__ import annotations

import asyncio
import functools
import io
import sys
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from lbr.models.http import AnswerTooLarge, Http, check_size, environment_proxies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import ModuleType

    from aiohttp import ClientResponse, ClientTimeout
    from pydantic_ai.models import Model

    from lbr.models.connections import Connections

_ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
LARGE_BYTES = 2**20
PIECE_BYTES = 2**14
_SET_BY_AIOHTTP = b"transfer-encoding"


def carry_over_aiohttp(model: Model, connections: Connections | None = None) -> None:
    """Put aiohttp's connections under the HTTP client that a model's provider opened for itself.

    They are `connections`, None for a pool of its own.
    Providers that have none (Bedrock over boto, xAI over gRPC, Hugging Face) stay as they are, and so do all where the
    environment names a proxy that aiohttp cannot speak to (SOCKS).
    """
    provider: Any = model.provider
    client = getattr(provider, "_own_http_client", None)
    factory = getattr(provider, "_http_client_factory", None)
    if client is None or factory is None or environment_proxies().unsupported is not None:
        return
    _carry(client, connections)

    # Also under the client that takes its place, once it is closed or used in another event loop.
    provider._http_client_factory = lambda: _carry(factory(), connections)  # noqa: SLF001 - the one place that makes them


def put_under(client: Any, transport: Any) -> None:
    """Give an httpx client another transport, before its first call; what it had is not open yet."""
    client._transport = transport  # noqa: SLF001 - one given at construction would change what else a client does
    client._mounts.clear()  # noqa: SLF001 - a proxy of its own would go before the transport


def _carry(client: Any, connections: Connections | None = None) -> Any:
    put_under(client, _transport_class(_httpx_of(client))(connections))
    return client


def _httpx_of(client: Any) -> ModuleType:
    """Return the package a client is from: httpx2, or httpx where an SDK has not moved on yet."""
    return next(
        sys.modules[name]
        for name in (base.__module__.partition(".")[0] for base in type(client).__mro__)
        if name in {"httpx", "httpx2"}
    )


@functools.cache
def _transport_class(httpx: ModuleType) -> type[Any]:
    """Make the transport in the words of one of the two packages."""
    errors = _Errors(httpx)

    class Body(httpx.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, response: ClientResponse) -> None:
            self._response = response

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with errors.of_answer():
                # In small pieces, because a client may unpack a whole one at once.
                async for chunk in self._response.content.iter_chunked(PIECE_BYTES):
                    yield chunk

        async def aclose(self) -> None:
            # Where the whole answer has come the connection is free already; else nobody can use it again.
            self._response.close()

    class Answer(httpx.Response):  # type: ignore[name-defined,misc]
        async def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
            size = 0
            async with aclosing(super().aiter_bytes(chunk_size)) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    with errors.of_answer():
                        check_size(size)
                    yield chunk

    class AiohttpTransport(httpx.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self, connections: Connections | None) -> None:
            self._http = Http(httpx.create_ssl_context, connections=connections)

        async def handle_async_request(self, request: Any) -> Any:
            timeouts = request.extensions.get("timeout", {})
            with errors.of_call():
                async with asyncio.timeout(_longest(timeouts)):
                    response = await self._http.request(
                        request.method,
                        _url(request),
                        headers=_headers(request),
                        data=_body(request, httpx.RequestNotRead),
                        timeout=_client_timeout(timeouts),
                        skip_auto_headers=_ADDED_BY_AIOHTTP,
                        auto_decompress=False,  # the client does, by the header that it gets
                    )
            return Answer(
                response.status,
                headers=response.raw_headers,
                stream=Body(response),
                extensions={
                    "http_version": b"HTTP/1.1" if response.version != (1, 0) else b"HTTP/1.0",
                    "reason_phrase": (response.reason or "").encode("ascii", "replace"),
                },
            )

        async def aclose(self) -> None:
            await self._http.aclose()

    return AiohttpTransport


def _url(request: Any) -> str:
    """Return where to, without a user and a password: the client made a header of them."""
    url = request.url
    return str(url.copy_with(username=None, password=None) if url.userinfo else url)


def _headers(request: Any) -> list[tuple[str, str]]:
    return [
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
        for name, value in request.headers.raw
        if name.lower() != _SET_BY_AIOHTTP
    ]


def _body(request: Any, not_read: type[Exception]) -> Any:
    try:
        content = request.content
    except not_read:
        return aiter(request.stream)
    # Of what is large, such as images, aiohttp wants to send one piece after the other.
    return io.BytesIO(content) if len(content) > LARGE_BYTES else content or None


def _client_timeout(timeouts: dict[str, float | None]) -> ClientTimeout:
    """Say in aiohttp's words how long each phase may take; None is as long as it wants.

    No call waits for the pool: it has no limit. To connect is to look the name up too, as httpx means it.
    """
    from aiohttp import ClientTimeout  # noqa: PLC0415

    return ClientTimeout(total=None, connect=timeouts.get("connect"), sock_read=timeouts.get("read"))


def _longest(timeouts: dict[str, float | None]) -> float | None:
    """Bound connecting, sending and waiting together, for aiohttp has no bound for a server that reads nothing."""
    phases = [timeouts.get(phase) for phase in ("connect", "write", "read")]
    known = [phase for phase in phases if phase is not None]
    return sum(known) if len(known) == len(phases) else None


class _Errors:
    """aiohttp's errors in the words of httpx or httpx2."""

    def __init__(self, httpx: ModuleType) -> None:
        import aiohttp  # noqa: PLC0415

        # The first that fits decides, so the narrow ones go first.
        self._by_class: list[tuple[type[Exception], Callable[[str], Exception]]] = [
            (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
            (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
            (aiohttp.ClientHttpProxyError, httpx.ProxyError),
            (aiohttp.ClientConnectorError, httpx.ConnectError),
            (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
            (aiohttp.ClientConnectionError, httpx.ReadError),
            (aiohttp.ClientPayloadError, httpx.RemoteProtocolError),
            (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
            (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
            (aiohttp.ClientError, httpx.LocalProtocolError),
        ]
        self._broken: Callable[[str], Exception] = httpx.RemoteProtocolError
        self._reset: Callable[[str], Exception] = httpx.ReadError
        self._slow_write = httpx.WriteTimeout
        self._slow_read = httpx.ReadTimeout
        self._unsendable = httpx.LocalProtocolError

    @contextmanager
    def of_call(self) -> Iterator[None]:
        """Raise httpx's errors for those of a call until its answer begins."""
        from aiohttp import ClientError  # noqa: PLC0415

        try:
            yield
        except ClientError as error:
            raise self._mapped(error) from error
        except TimeoutError as error:
            raise self._slow_write("the server took too long to take the request") from error
        except OSError as error:
            raise self._reset(str(error)) from error
        except ValueError as error:  # a header that no request may have
            raise self._unsendable(str(error)) from error

    @contextmanager
    def of_answer(self) -> Iterator[None]:
        """Raise httpx's errors for those of an answer's body."""
        from aiohttp import ClientError  # noqa: PLC0415

        try:
            yield
        except ClientError as error:
            raise self._mapped(error) from error
        except TimeoutError as error:
            raise self._slow_read(str(error)) from error
        except AnswerTooLarge as error:
            raise self._broken(str(error)) from error
        except OSError as error:
            raise self._reset(str(error)) from error

    def _mapped(self, error: Exception) -> Exception:
        make = next(make for kind, make in self._by_class if isinstance(error, kind))
        if make is self._broken and ConnectionResetError.__name__ in str(error):
            make = self._reset  # it did not merely end too early, which aiohttp tells in its words alone
        cause = getattr(error, "os_error", None)  # its own words name a Python object beside it
        return make(str(error if cause is None else cause))
