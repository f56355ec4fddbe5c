"""The connections of model calls: one pool for all that a worker serves, so that what is idle gives way.

aiohttp costs a tenth of a second to import, so that happens in the functions that need it.
"""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from aiohttp import ClientSession, TCPConnector

KEEPALIVE_SECONDS = 15.0
MAX_LINE_BYTES = 65_536
MAX_HEADERS = 1_000
"""Of an answer. aiohttp would refuse a header of 8 KB, and some gateways send longer ones."""


class Connections:
    """One pool, opened in the event loop of its first call.

    It makes no call wait: how many run at a time is the caller's. Connections that are idle are kept for a while, but
    where they and those in use would be more than `most`, None for any number, those that have been idle for longest
    are closed first.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._session: ClientSession | None = None
        self._connector: Any = None
        self._trust: dict[Callable[[], ssl.SSLContext], ssl.SSLContext] = {}

    def trust(self, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """Return what `make` makes, read once: connections are shared by those who trust the same store."""
        if make not in self._trust:
            found = make()
            found.set_alpn_protocols(["http/1.1"])
            self._trust[make] = found
        return self._trust[make]

    @property
    def session(self) -> ClientSession:
        """What makes the calls."""
        return self._session or self._opened()

    def _opened(self) -> ClientSession:
        from aiohttp import ClientSession, ClientTimeout, DummyCookieJar  # noqa: PLC0415

        self._connector = _connector_class()(self)
        self._session = ClientSession(
            connector=self._connector,
            cookie_jar=DummyCookieJar(loop=asyncio.get_running_loop()),
            timeout=ClientTimeout(total=None),
            trust_env=False,  # it would put what netrc holds for a host on calls; proxies are given with each
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        return self._session

    async def aclose(self) -> None:
        """Close all connections; a call that still runs fails."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@functools.cache
def _connector_class() -> Callable[[Connections], TCPConnector]:
    from aiohttp import TCPConnector  # noqa: PLC0415

    class Connector(TCPConnector):
        """aiohttp's, whose own limit counts only connections in use; the idle ones of other hosts are kept beside."""

        def __init__(self, pool: Connections) -> None:
            super().__init__(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
            self._pool = pool

        async def _create_connection(self, *how: Any) -> Any:
            # This one is counted among those in use already.
            while (
                self._pool.most is not None
                and self._conns
                and len(self._acquired) + sum(map(len, self._conns.values())) > self._pool.most
            ):
                await self._close_oldest()
            return await super()._create_connection(*how)

        async def _close_oldest(self) -> None:
            """Close what has been idle for longest, and wait until its descriptor is free."""
            key = min(self._conns, key=lambda key: self._conns[key][0][1])
            handler, _ = self._conns[key].popleft()
            if not self._conns[key]:
                del self._conns[key]
            closed = handler.closed
            handler.abort()  # one that is encrypted would wait for its other end
            if closed is not None:
                with suppress(Exception):
                    await closed

    return Connector
