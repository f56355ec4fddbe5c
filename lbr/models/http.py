"""HTTP for model calls: one pool of aiohttp's connections, with the proxies and the trust store of the environment.

The calls use aiohttp's connector and parser directly: its session takes more than half of the processor's time for a
call. aiohttp takes a tenth of a second to import, so the functions that need it import it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from lbr.models.failures import call_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientRequest, ClientResponse, ClientTimeout, TCPConnector
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader
    from yarl import URL

    from lbr.core.errors import CallError

KEEPALIVE_SECONDS = 15.0
MAX_LINE_BYTES = 65_536
MAX_HEADERS = 1_000
"""Of an answer. aiohttp would refuse a header of 8 KB, and some gateways send longer ones."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Of the body of an answer, unpacked: a larger one fails the call."""

_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "accept-encoding"})
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
"""OpenSSL's codes for a certificate that no trusted one vouches for; others are a wrong host name, or its age."""


def environment_proxies() -> dict[str, str]:
    """Return the proxies by `http`, `https` and `all`: HTTP_PROXY and the like, or the system's settings."""
    named = {scheme: url for scheme, url in getproxies().items() if scheme in {"http", "https", "all"} and url}
    return {scheme: url if "://" in url else f"http://{url}" for scheme, url in named.items()}


def unsupported_proxy() -> bool:
    """Return whether the environment names a proxy that aiohttp cannot speak to, such as socks5."""
    return any(not url.lower().startswith(("http://", "https://")) for url in environment_proxies().values())


class Connections:
    """The connections of all models of a worker, opened in the event loop of the first call.

    It makes no call wait (how many run at a time is the caller's), follows no redirect, keeps no cookie, reads no
    netrc, and always verifies certificates. Proxies and the trust store are read once, when the first call needs them.
    """

    def __init__(self) -> None:
        self._connector: TCPConnector | None = None
        self._routes: dict[str, ClientRequest] = {}

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        """The certificates of SSL_CERT_FILE, else SSL_CERT_DIR, else the system's. Reading them takes 20 ms."""
        from httpx2 import create_ssl_context  # noqa: PLC0415

        found = create_ssl_context()
        found.set_alpn_protocols(["http/1.1"])
        return found

    def _request(self, url: str) -> ClientRequest:
        """Return what aiohttp's connector needs to connect to a URL, through a proxy if the environment names one."""
        from aiohttp import ClientRequest  # noqa: PLC0415

        target, proxy, trust = self._route(url)
        return ClientRequest("POST", target, loop=asyncio.get_running_loop(), proxy=proxy, ssl=trust)

    def _route(self, url: str) -> tuple[URL, URL | None, ssl.SSLContext | bool]:
        """Return a URL, the proxy to it if the environment names one, and the certificates to trust."""
        from aiohttp import InvalidURL  # noqa: PLC0415
        from yarl import URL  # noqa: PLC0415

        target, proxies = URL(url, encoded=True), environment_proxies()
        if target.scheme not in {"http", "https"}:
            raise ValueError(target.scheme)
        proxy = proxies.get(target.scheme) or proxies.get("all")
        if proxy is not None and proxy_bypass(f"{target.raw_host}:{target.port}"):
            proxy = None
        try:
            proxy_url = None if proxy is None else URL(proxy)
        except ValueError as error:
            raise InvalidURL(proxy or "") from error
        is_encrypted = target.scheme == "https" or (proxy or "").startswith("https:")
        return target, proxy_url, self._trust if is_encrypted else True

    @asynccontextmanager
    async def stream(
        self, method: str, url: str, *, timeout: ClientTimeout, headers: tuple[tuple[str, str], ...], data: Any = None
    ) -> AsyncIterator[ClientResponse]:
        """Make one call whose request or answer is too large for memory; the block reads the answer.

        It follows the rules of `fetch`. A POST is sent once. Raises CallError if the connection fails.
        """
        import aiohttp  # noqa: PLC0415

        try:
            target, proxy, trust = self._route(url)
            async with (
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout) as session,
                session.request(
                    method, target, data=data, headers=headers, proxy=proxy, ssl=trust, allow_redirects=False
                ) as answer,
            ):
                yield answer
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise lost(error, url) from error

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        timeout: ClientTimeout,
        headers: tuple[tuple[str, str], ...] = (),
        data: bytes = b"",
    ) -> tuple[RawResponseMessage, bytes]:
        """Make one call, and return the head of its answer and the whole body, unpacked.

        The URL is taken as already encoded; of the timeout, only those of the connection and of silence count. Raises
        CallError if no whole answer comes, with what came of a success.
        """
        import aiohttp.http  # noqa: PLC0415

        chunks: list[bytes] = []
        head = None
        try:
            if (request := self._routes.get(url)) is None:
                request = self._routes[url] = self._request(url)
            if self._connector is None:
                self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
            try:
                connection = await self._connector.connect(request, [], timeout)
            except TimeoutError as error:
                raise aiohttp.ConnectionTimeoutError from error
            try:
                sent = b"%b%d\r\n\r\n%b" % (_head(method, request, headers), len(data), data)
                head, payload = await _answer(connection.protocol, sent, timeout.sock_read)
                await _read(payload, chunks, request.url)
            except BaseException:
                connection.close()
                raise
            transport = connection.transport
            if transport is not None and transport.get_write_buffer_size():
                # The server answered before it had read the whole request, and may never read the rest.
                transport.abort()
                connection.close()
            connection.release()
            return head, chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError, ValueError) as error:
            # A timeout is an OSError.
            failed = lost(error, url)
            if head is not None and head.code < 300 and chunks:
                failed.text = b"".join(chunks).decode(errors="replace")
            raise failed from error

    async def aclose(self) -> None:
        """Close all connections; a call that still runs fails, and a later one opens them again."""
        connector, self._connector = self._connector, None
        if connector is not None:
            await connector.close()


def _head(method: str, request: ClientRequest, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Return the head of a request up to its length. Raises ValueError for a line that would end before its end."""
    url, login, target = request.url, None, request.url.raw_path_qs
    if request.proxy is not None and not request.is_ssl():
        target, login = str(url), request.headers.get("Proxy-Authorization")
    own = [("Host", url.host_port_subcomponent), ("Accept-Encoding", request.headers["Accept-Encoding"])]
    own += [("Proxy-Authorization", login)] if login else []
    return _encoded_head(f"{method} {target} HTTP/1.1", tuple(own), headers)


@functools.lru_cache(maxsize=64)
def _encoded_head(line: str, own: tuple[tuple[str, str], ...], headers: tuple[tuple[str, str], ...]) -> bytes:
    sent = [*own, *((name, value) for name, value in headers if name.lower() not in _OWN_HEADERS)]
    lines = [line, *(f"{name}: {value}" for name, value in sent), "Content-Length: "]
    if any(character in one for one in lines for character in "\r\n\0"):
        raise ValueError("expected headers of one line each")
    return "\r\n".join(lines).encode()


async def _answer(
    protocol: ResponseHandler | None, sent: bytes, silence: float | None
) -> tuple[RawResponseMessage, StreamReader]:
    """Send a request; return the head of its answer, and the body that begins to come.

    `silence` is how many seconds may pass without a byte of the answer, None for any number.
    """
    if protocol is None or protocol.transport is None:
        raise ConnectionResetError(errno.ECONNRESET, "the server closed it")
    protocol.set_response_params(
        read_until_eof=True,
        read_timeout=silence,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
        max_headers=MAX_HEADERS,
    )
    protocol.transport.write(sent)
    protocol.start_timeout()
    while True:
        head, payload = await protocol.read()
        if not 100 <= head.code < 200 or head.code == 101:  # others announce the answer
            return head, payload


async def _read(payload: StreamReader, chunks: list[bytes], url: URL) -> None:
    """Read a body into `chunks`, which has what came if the connection fails. Raises CallError for one that is too large."""
    size = 0
    while chunk := await payload.readany():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            words = f"is larger than {MAX_ANSWER_BYTES // 2**20} MB; it was not kept"
            raise call_error(f"the answer from {_place(url)} {words}", kind="ModelConnectionError")


def _place(source: Any) -> str:
    """Return host and port alone of a URL, because the rest may hold a key, or of an error of aiohttp."""
    return f"[{source.host}]:{source.port}" if ":" in source.host else f"{source.host}:{source.port}"


def lost(error: Exception, url: str) -> CallError:
    """Return the error for a call to a URL whose connection failed."""
    import aiohttp  # noqa: PLC0415
    from yarl import URL  # noqa: PLC0415

    is_late = isinstance(error, aiohttp.ConnectionTimeoutError)
    if isinstance(error, TimeoutError) and not is_late:
        return call_error("Request timed out.", kind="ModelTimeoutError")
    # A connector's error is of the proxy, if there is one.
    place, cause = _place(error if isinstance(error, aiohttp.ClientConnectorError) else URL(url)), _cause_of(error)
    return call_error(
        f"the connection to {place} failed: {cause}" if cause else f"no whole answer came from {place}",
        kind="ModelTimeoutError" if is_late else "ModelConnectionError",
        unreachable=isinstance(error, OSError | aiohttp.ServerDisconnectedError),
    )


def _cause_of(error: Any) -> str | None:
    import aiohttp  # noqa: PLC0415

    # aiohttp's own message names a Python object beside the system's.
    match getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error:
        case ssl.SSLCertVerificationError() as found:
            hint = "; SSL_CERT_FILE can name a file with its issuer" * (found.verify_code in _UNKNOWN_ISSUER)
            return f"its certificate is not trusted: {found.verify_message}{hint}"
        case ssl.SSLError(reason=str(reason)):
            return f"TLS: {reason.replace('_', ' ').lower()}"
        case aiohttp.ConnectionTimeoutError():
            return "it was not made in time"
        case aiohttp.ClientHttpProxyError() as found:
            return f"the proxy answered {found.status}"  # its message may have what it was sent
        case aiohttp.InvalidURL():  # ours is one
            return "the proxy that the environment names is no URL"
        case aiohttp.ServerDisconnectedError():
            return "the server closed it"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)
        case OSError(strerror=words) as found:
            return words or str(found)
    return None
