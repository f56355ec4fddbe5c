"""HTTP for model calls: one pool of aiohttp's connections, with the proxies and the trust store of the environment.

aiohttp takes a tenth of a second to import, so the functions that need it import it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from lbr.models.failures import call_error

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession, ClientTimeout
    from yarl import URL

    from lbr.core.errors import CallError

KEEPALIVE_SECONDS = 15.0
MAX_LINE_BYTES = 65_536
MAX_HEADERS = 1_000
"""Of an answer. aiohttp would refuse a header of 8 KB, and some gateways send longer ones."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Of the body of an answer, unpacked: a larger one fails the call."""

_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
"""OpenSSL's codes for a certificate that no trusted one vouches for; others are a wrong host name, or its age."""


def environment_proxies() -> dict[str, str]:
    """Return the proxies by `http`, `https` and `all`: HTTP_PROXY and the like, or the system's settings."""
    named = {scheme: url for scheme, url in getproxies().items() if scheme in {"http", "https", "all"} and url}
    return {scheme: url if "://" in url else f"http://{url}" for scheme, url in named.items()}


def unsupported_proxy() -> bool:
    """Return whether the environment names a proxy that aiohttp cannot speak to, such as socks5."""
    return any(not url.lower().startswith(("http://", "https://")) for url in environment_proxies().values())


@functools.lru_cache(maxsize=64)
def _encoded(url: str) -> URL:
    from yarl import URL  # noqa: PLC0415

    return URL(url, encoded=True)


class Connections:
    """The connections of all models of a worker, opened in the event loop of the first call.

    It makes no call wait (how many run at a time is the caller's), follows no redirect, keeps no cookie, reads no
    netrc, and always verifies certificates. Proxies and the trust store are read once, when the first call needs them.
    """

    def __init__(self) -> None:
        self._session: ClientSession | None = None
        self._routes: dict[str, tuple[URL, str | None, Any]] = {}

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        """The certificates of SSL_CERT_FILE, else SSL_CERT_DIR, else the system's. Reading them takes 20 ms."""
        from httpx2 import create_ssl_context  # noqa: PLC0415

        found = create_ssl_context()
        found.set_alpn_protocols(["http/1.1"])
        return found

    def _route(self, url: str) -> tuple[URL, str | None, Any]:
        """Return a URL as aiohttp takes it, its proxy, None for none, and its trust store."""
        target = _encoded(url)
        proxies = environment_proxies()
        proxy = proxies.get(target.scheme) or proxies.get("all")
        if proxy is not None and proxy_bypass(f"{target.raw_host}:{target.port}"):
            proxy = None
        is_encrypted = target.scheme == "https" or (proxy or "").startswith("https:")
        return target, proxy, self._trust if is_encrypted else True

    def _open(self) -> ClientSession:
        from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector  # noqa: PLC0415

        return ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            cookie_jar=DummyCookieJar(loop=asyncio.get_running_loop()),
            timeout=ClientTimeout(total=None),
            trust_env=False,  # it would put what netrc holds for a host on calls; proxies are given with each
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )

    async def fetch(
        self, method: str, url: str, *, timeout: ClientTimeout, **options: Any
    ) -> tuple[ClientResponse, bytes]:
        """Make one call, as `aiohttp.ClientSession.request` does, and return its answer and the whole body.

        The URL is taken as already encoded. Raises CallError if no whole answer comes, with what came of a success.
        """
        from aiohttp import ClientError  # noqa: PLC0415

        chunks: list[bytes] = []
        size, status = 0, 0
        try:
            if (route := self._routes.get(url)) is None:
                route = self._routes[url] = self._route(url)
            session = self._session = self._session or self._open()
            target, proxy, trust = route
            async with session.request(
                method, target, timeout=timeout, proxy=proxy, ssl=trust, allow_redirects=False, **options
            ) as response:
                status = response.status
                while chunk := await response.content.readany():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > MAX_ANSWER_BYTES:
                        words = f"is larger than {MAX_ANSWER_BYTES // 2**20} MB; it was not kept"
                        raise call_error(f"the answer from {_place(target)} {words}", kind="ModelConnectionError")
                return response, chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except (ClientError, OSError, ValueError) as error:  # a timeout is an OSError
            lost = _lost(error, url)
            if 200 <= status < 300 and chunks:
                lost.text = b"".join(chunks).decode(errors="replace")
            raise lost from error

    async def aclose(self) -> None:
        """Close all connections; a call that still runs fails."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def shown_url(url: str) -> str:
    """Return a URL without user, password and query, which may be secret."""
    return str(_encoded(url).with_user(None).with_query(None))


def _place(source: Any) -> str:
    """Return host and port alone of a URL, because the rest may hold a key, or of an error of aiohttp."""
    return f"[{source.host}]:{source.port}" if ":" in source.host else f"{source.host}:{source.port}"


def _lost(error: Exception, url: str) -> CallError:
    """Return the error for a call whose connection failed."""
    import aiohttp  # noqa: PLC0415

    connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
    if isinstance(error, TimeoutError):
        words = lost_words(error, url) if connecting else "Request timed out."
        return call_error(words, kind="ModelTimeoutError", connecting=connecting, unreachable=connecting)
    unreachable = isinstance(error, OSError | aiohttp.ServerDisconnectedError)
    return call_error(lost_words(error, url), kind="ModelConnectionError", unreachable=unreachable)


def lost_words(error: Exception, url: str) -> str:
    """Return a message for an error of aiohttp or the system in a call to a URL."""
    from aiohttp import ClientConnectorError  # noqa: PLC0415

    if not _encoded(url).host:
        return "expected a URL with a host, got: one without; see how the provider's base URL is set"
    # A connector's error is of the proxy, if there is one.
    place, cause = (
        _place(error if isinstance(error, ClientConnectorError) else _encoded(url)),
        _cause_of(error),
    )
    return f"the connection to {place} failed: {cause}" if cause else f"no whole answer came from {place}"


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
