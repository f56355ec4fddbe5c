"""HTTP for model calls: one pool of aiohttp's connections, with the proxies and the trust store of the environment.

aiohttp costs a tenth of a second to import, so that happens in the functions that need it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession, ClientTimeout
    from yarl import URL

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
    from urllib.request import getproxies  # noqa: PLC0415

    found = getproxies()
    return {
        scheme: url if "://" in url else f"http://{url}"
        for scheme in ("http", "https", "all")
        if (url := found.get(scheme))
    }


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
        self._proxies: dict[tuple[str, str | None], str | None] = {}

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        """The certificates of SSL_CERT_FILE, else SSL_CERT_DIR, else the system's. It takes 20 ms to read them."""
        from httpx2 import create_ssl_context  # noqa: PLC0415

        found = create_ssl_context()
        found.set_alpn_protocols(["http/1.1"])
        return found

    def _proxy_of(self, url: URL) -> str | None:
        place = url.scheme, url.raw_host
        if place not in self._proxies:
            from urllib.request import proxy_bypass  # noqa: PLC0415

            found = environment_proxies()
            proxy = found.get(url.scheme) or found.get("all")
            self._proxies[place] = None if proxy is None or proxy_bypass(url.raw_host or "") else proxy
        return self._proxies[place]

    def _opened(self) -> ClientSession:
        from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector  # noqa: PLC0415

        self._session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            cookie_jar=DummyCookieJar(loop=asyncio.get_running_loop()),
            timeout=ClientTimeout(total=None),
            trust_env=False,  # it would put what netrc holds for a host on calls; proxies are given with each
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        return self._session

    async def request(
        self, method: str, url: str, *, timeout: ClientTimeout, **options: Any
    ) -> ClientResponse:
        """Make one call, as `aiohttp.ClientSession.request` does, and return its answer, to be read and closed.

        Raises aiohttp's errors. The URL is taken as already encoded.
        """
        target = _encoded(url)
        proxy = self._proxy_of(target)
        encrypted = target.scheme == "https" or (proxy is not None and proxy.startswith("https:"))
        return await (self._session or self._opened()).request(
            method,
            target,
            timeout=timeout,
            proxy=proxy,
            ssl=self._trust if encrypted else True,
            allow_redirects=False,
            **options,
        )

    async def aclose(self) -> None:
        """Close all connections; a call that still runs fails."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class AnswerTooLarge(ValueError):  # noqa: N818 - as CallError's
    """The body of an answer is larger than lbr reads."""


def check_size(size: int) -> None:
    """Raise AnswerTooLarge for a body of which more bytes have been unpacked than lbr reads."""
    if size > MAX_ANSWER_BYTES:
        raise AnswerTooLarge(f"larger than {MAX_ANSWER_BYTES // 2**20} MB")


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error of aiohttp or the system means that no connection was made, or that it was reset."""
    import aiohttp  # noqa: PLC0415

    if isinstance(error, TimeoutError):
        return isinstance(error, aiohttp.ConnectionTimeoutError)
    return isinstance(error, OSError | aiohttp.ServerDisconnectedError)


def shown_url(url: str) -> str:
    """Return a URL without user, password and query, which may be secret."""
    return str(_encoded(url).with_user(None).with_query(None))


def lost_words(error: BaseException | None, url: str) -> str:
    """Say that no answer came from a URL, or not all of it, and why: of the URL host and port alone, for it may hold a key.

    `error` is aiohttp's or the system's, None where it is not known.
    """
    from aiohttp import ClientConnectorError  # noqa: PLC0415

    place = _encoded(url)
    host, port = place.host, place.port
    if isinstance(error, ClientConnectorError):  # perhaps the proxy's
        host, port = error.host, error.port
    if host is None:
        return "expected a URL with a host, got: one without; see how the provider's base URL is set"
    where = f"[{host}]:{port}" if host and ":" in host else f"{host}:{port}"
    if isinstance(error, AnswerTooLarge):
        return f"the answer from {where} is {error}; it was not kept"
    cause = _cause_of(error)
    return f"the connection to {where} failed: {cause}" if cause else f"no whole answer came from {where}"


def _cause_of(error: Any) -> str | None:
    import aiohttp  # noqa: PLC0415

    # aiohttp's own words name a Python object beside the system's.
    match getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error:
        case ssl.SSLCertVerificationError() as found:
            way = "; SSL_CERT_FILE can name a file with its issuer" * (found.verify_code in _UNKNOWN_ISSUER)
            return f"its certificate is not trusted: {found.verify_message}{way}"
        case ssl.SSLError(reason=str(reason)):
            return f"TLS: {reason.replace('_', ' ').lower()}"
        case aiohttp.ConnectionTimeoutError():
            return "it was not made in time"
        case aiohttp.ClientHttpProxyError() as found:
            return f"the proxy answered {found.status}"  # in its own words there may be what it was sent
        case aiohttp.InvalidURL():  # ours is one
            return "the proxy that the environment names is no URL"
        case aiohttp.ServerDisconnectedError():
            return "the server closed it"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number)
        case OSError(strerror=words) as found:
            return words or str(found)
    return None
