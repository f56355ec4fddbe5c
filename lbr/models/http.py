"""HTTP for model calls, over aiohttp, with the proxies and the trust store that httpx2 has."""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbr.core.errors import UsageError
from lbr.models.connections import Connections
from lbr.models.environment import check_trust

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientTimeout
    from aiohttp.client import _RequestContextManager
    from yarl import URL

_ENTRY = re.compile(
    r"(?:(?P<scheme>[a-z]*)://)?(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^:/\[\]]*))(?::(?P<port>\d*))?(?:/(?P<bits>\d*))?\Z"
)
MAX_ANSWER_BYTES = 64 * 2**20
"""Of the body of an answer, unpacked: what is larger fails the call."""
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
"""OpenSSL's codes for a certificate that no trusted one vouches for; others are a wrong host name, or its age."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Exempt:
    """What one entry of NO_PROXY matches; None matches any."""

    scheme: str | None
    host: re.Pattern[str] | ipaddress.IPv4Network | ipaddress.IPv6Network | None
    port: int | None

    def matches(self, url: URL) -> bool:
        # As httpx2 has it, a default port is none: an entry with one matches only where it is another scheme's.
        port = None if url.port == _DEFAULT_PORTS.get(url.scheme) else url.port
        if self.scheme not in {None, url.scheme} or self.port not in {None, port}:
            return False
        host = (url.raw_host or "").lower()
        if self.host is None or isinstance(self.host, re.Pattern):
            return self.host is None or self.host.match(host) is not None
        try:
            return ipaddress.ip_address(host) in self.host
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy a call goes through, as httpx2 reads it from the environment.

    `by_scheme` has the proxies' URLs by `http`, `https` and `all`.
    """

    by_scheme: Mapping[str, str] = field(default_factory=dict, repr=False)  # they may hold passwords
    exempt: tuple[_Exempt, ...] = ()

    def of(self, url: URL) -> str | None:
        """Return the URL of the proxy for a call, None for none."""
        if not self.by_scheme or any(one.matches(url) for one in self.exempt):
            return None
        return self.by_scheme.get(url.scheme) or self.by_scheme.get("all")

    @property
    def unsupported(self) -> str | None:
        """The scheme of a proxy that aiohttp cannot speak to, such as socks5; None where there is none."""
        schemes = (proxy.partition("://")[0].lower() for proxy in self.by_scheme.values())
        return next((scheme for scheme in schemes if scheme not in {"http", "https"}), None)


def environment_proxies() -> Proxies:
    """Read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, also in small letters, and the system's own settings."""
    from urllib.request import getproxies  # noqa: PLC0415

    found = getproxies()
    entries = [entry.strip() for entry in found.get("no", "").split(",")]
    if "*" in entries:
        return Proxies()
    by_scheme = {
        scheme: url if "://" in url else f"http://{url}"
        for scheme in ("http", "https", "all")
        if (url := found.get(scheme))
    }
    return Proxies(by_scheme, tuple(one for entry in entries if entry and (one := _exempt(entry))))


def _exempt(entry: str) -> _Exempt | None:
    """Read one entry of NO_PROXY; None for what means nothing, which is ignored, as curl does."""
    network = _network(entry)
    read = _ENTRY.match(entry.lower())
    if network is not None or read is None:
        return None if network is None else _Exempt(None, network, None)
    scheme = None if read["scheme"] in {None, "all"} else read["scheme"]
    port = int(read["port"]) if read["port"] else None
    if port == _DEFAULT_PORTS.get(scheme or ""):
        port = None
    host = read["host"] or read["v6"] or ""
    network = _network(f"{host}/{read['bits']}" if read["bits"] else host)
    if network is not None or read["v6"]:
        return None if network is None else _Exempt(scheme, network, port)
    if read["bits"]:
        return None
    if "://" not in entry and host != "localhost" and not host.startswith("*."):
        host = f"*{host}"
    return _Exempt(scheme, _host_pattern(host), port)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _host_pattern(host: str) -> re.Pattern[str] | None:
    """`*.x` means what is below x, `*x` also x itself, and `x` only itself."""
    if host in {"", "*"}:
        return None
    if host.startswith("*."):
        return re.compile(rf".+\.{re.escape(host[2:])}\Z")
    if host.startswith("*"):
        return re.compile(rf"(?:.+\.)?{re.escape(host[1:])}\Z")
    return re.compile(rf"{re.escape(host)}\Z")


@functools.lru_cache(maxsize=64)
def _encoded(url: str) -> URL:
    from yarl import URL  # noqa: PLC0415

    return URL(url, encoded=True)


class Http:
    """Calls over a pool of connections: that of `connections`, None for one of its own.

    It limits nothing (how many calls run at a time is the caller's), follows no redirect, keeps no cookie, reads no
    netrc, and always verifies certificates. Construction reads the environment, and raises UsageError for a proxy
    that it cannot speak to and for a trust store that cannot be read. `make_trust` reads the trust store, None
    for httpx2's: SSL_CERT_FILE, else SSL_CERT_DIR, else the system's. Where `only` is the one URL to be called, and no
    call of it is encrypted, none is read, which takes 20 ms.
    """

    def __init__(
        self,
        make_trust: Callable[[], ssl.SSLContext] | None = None,
        *,
        only: str | None = None,
        connections: Connections | None = None,
    ) -> None:
        self._proxies = environment_proxies()
        if self._proxies.unsupported is not None:
            raise UsageError(
                f"expected a proxy like http://host:port in the environment, got one of {self._proxies.unsupported}://; "
                f"set HTTPS_PROXY to an HTTP proxy, or NO_PROXY=*"
            )
        self._connections = Connections() if connections is None else connections
        self._shared = connections is not None
        if make_trust is None and not self._is_plain(only):
            from httpx2 import create_ssl_context as make_trust  # noqa: PLC0415
        if make_trust is not None:
            check_trust()
        # Given with each call, for a pool's own would be that of whoever came first.
        self._trust = True if make_trust is None else self._connections.trust(make_trust)

    def _is_plain(self, url: str | None) -> bool:
        """Tell whether calls of a URL are encrypted neither to it nor to its proxy."""
        if url is None:
            return False
        try:
            target = _encoded(url)
            return "https" not in {target.scheme, _encoded(self._proxies.of(target) or "").scheme}
        except ValueError:  # a proxy that is none: the calls tell
            return False

    def request(
        self, method: str, url: str | URL, *, timeout: ClientTimeout, **options: Any
    ) -> _RequestContextManager:
        """Make one call, as `aiohttp.ClientSession.request` does; await it, or use it with `async with`.

        Raises aiohttp's errors. A string is taken as a URL that is already encoded.
        """
        target = _encoded(url) if isinstance(url, str) else url
        return self._connections.session.request(
            method,
            target,
            timeout=timeout,
            proxy=self._proxies.of(target),
            ssl=self._trust,
            allow_redirects=False,
            **options,
        )

    async def aclose(self) -> None:
        """Close all connections, unless they are shared; a call that still runs fails."""
        if not self._shared:
            await self._connections.aclose()


class AnswerTooLarge(ValueError):  # noqa: N818 - as CallError's
    """The body of an answer is larger than lbr reads."""


def check_size(size: int) -> None:
    """Raise AnswerTooLarge for a body of which more bytes have been unpacked than lbr reads."""
    if size > MAX_ANSWER_BYTES:
        raise AnswerTooLarge(f"larger than {MAX_ANSWER_BYTES // 2**20} MB")


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of aiohttp's or the system's says that no connection was made, or that it was reset."""
    import aiohttp  # noqa: PLC0415

    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
        return False
    unreachable = (
        aiohttp.ClientOSError,
        aiohttp.ServerDisconnectedError,
        aiohttp.ConnectionTimeoutError,
        OSError,
    )
    return isinstance(error, unreachable) and not isinstance(error, aiohttp.ClientPayloadError)


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


def _cause_of(error: BaseException | None) -> str | None:
    import aiohttp  # noqa: PLC0415

    match error:
        case aiohttp.ClientConnectorCertificateError():
            return _system_words(error.certificate_error)
        case aiohttp.ClientConnectorError():
            return _system_words(error.os_error)
        case aiohttp.ConnectionTimeoutError():
            return "it was not made in time"
        case aiohttp.ClientHttpProxyError():
            return f"the proxy answered {error.status}"  # in its own words there may be what it was sent
        case aiohttp.InvalidURL():  # ours is one
            return "the proxy that the environment names is no URL"
        case aiohttp.ServerDisconnectedError():
            return "the server closed it"
        case OSError():
            return _system_words(error)
    return None


def _system_words(error: BaseException) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            way = "; SSL_CERT_FILE can name a file with its issuer" * (error.verify_code in _UNKNOWN_ISSUER)
            return f"its certificate is not trusted: {error.verify_message}{way}"
        case ssl.SSLError(reason=str(reason)):
            return f"TLS: {reason.replace('_', ' ').lower()}"
        case OSError(errno=int(number)) if number > 0:  # its own words may be of a call that nobody made
            return os.strerror(number)
        case OSError(strerror=str(words)):
            return words
    return str(error)
