"""aiohttp's connections under the httpx clients of the providers' SDKs.

httpx's own pool costs more per call the more connections it holds: at 500 calls at a time it takes more than all that
is above it. Only the transport is replaced; timeouts, headers, hooks and redirects stay the client's.
"""

from __future__ import annotations

import functools
import inspect
import io
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from lbr.models.http import Connections, check_size, unsupported_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType

    from aiohttp import ClientResponse
    from pydantic_ai.providers import Provider

_ADDED_BY_AIOHTTP = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
LARGE_BYTES = 2**20
PIECE_BYTES = 2**14


def client_for(provider: type[Provider[Any]], connections: Connections | None, transport: Any = None) -> Any:
    """Return an HTTP client for a provider, over `connections`, None for some of its own; or over `transport`.

    None for providers that take none (Bedrock over boto, xAI over gRPC, Hugging Face), and for all if the environment
    names a proxy that aiohttp cannot speak to (SOCKS).
    """
    import httpx2  # noqa: PLC0415
    from pydantic_ai.models import create_async_httpx2_client, get_user_agent  # noqa: PLC0415

    parameter = inspect.signature(provider).parameters.get("http_client")
    own = parameter is None or (transport is None and unsupported_proxy())
    wanted = "" if own or parameter is None else str(parameter.annotation)
    if "HTTPClient" in wanted or "httpx2." in wanted:
        return create_async_httpx2_client(transport=transport or make_transport(httpx2, connections))
    if "httpx." not in wanted:
        return None
    import httpx  # noqa: PLC0415 - of SDKs that have not moved on yet (Groq, Cohere)

    return httpx.AsyncClient(
        transport=make_transport(httpx, connections),
        timeout=httpx.Timeout(600, connect=5),
        headers={"User-Agent": get_user_agent()},
    )


def make_transport(httpx: ModuleType, connections: Connections | None = None) -> Any:
    """Return a transport in the classes of one of the two packages, httpx2 or httpx."""
    return _transport_class(httpx)(connections or Connections(), shared=connections is not None)


@functools.cache
def _transport_class(httpx: ModuleType) -> type[Any]:
    answer_class = _answer_class(httpx)

    class AiohttpTransport(httpx.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self, connections: Connections, *, shared: bool) -> None:
            self._connections = connections
            self._shared = shared

        async def handle_async_request(self, request: Any) -> Any:
            with _errors_of(httpx):
                return answer_class(await _send(self._connections, request, await request.aread()))

        async def aclose(self) -> None:
            if not self._shared:
                await self._connections.aclose()

    return AiohttpTransport


def _answer_class(httpx: ModuleType) -> type[Any]:
    class Body(httpx.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, response: ClientResponse) -> None:
            self._response = response

        async def __aiter__(self) -> AsyncIterator[bytes]:
            with _errors_of(httpx):
                # In small pieces, because a client may unpack a whole one at once.
                async for chunk in self._response.content.iter_chunked(PIECE_BYTES):
                    yield chunk

        async def aclose(self) -> None:
            self._response.close()  # if the whole answer has come, the connection is free already

    class Answer(httpx.Response):  # type: ignore[name-defined,misc]
        def __init__(self, response: ClientResponse) -> None:
            super().__init__(response.status, headers=response.raw_headers, stream=Body(response))

        async def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
            size = 0
            async with aclosing(super().aiter_bytes(chunk_size)) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    with _errors_of(httpx):
                        check_size(size)
                    yield chunk

    return Answer


async def _send(connections: Connections, request: Any, content: bytes) -> ClientResponse:
    from aiohttp import ClientTimeout  # noqa: PLC0415

    url, timeouts = request.url, request.extensions.get("timeout", {})
    return await connections.request(
        request.method,
        # The client made a header of a user and a password.
        str(url.copy_with(username=None, password=None) if url.userinfo else url),
        headers=[(name.decode("latin-1"), value.decode()) for name, value in request.headers.raw],
        # aiohttp wants to send what is large, such as images, piece by piece.
        data=io.BytesIO(content) if len(content) > LARGE_BYTES else content or None,
        # To connect includes the look-up of the name, as in httpx.
        timeout=ClientTimeout(total=None, connect=timeouts.get("connect"), sock_read=timeouts.get("read")),
        skip_auto_headers=_ADDED_BY_AIOHTTP,
        auto_decompress=False,  # the client does, by the header that it gets
    )


@contextmanager
def _errors_of(httpx: ModuleType) -> Iterator[None]:
    """Raise httpx's errors instead of aiohttp's, which stay their cause."""
    import aiohttp  # noqa: PLC0415

    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorError as error:  # its own words name a Python object
        raise httpx.ConnectError(str(getattr(error, "os_error", error))) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise httpx.ReadError(str(error)) from error
