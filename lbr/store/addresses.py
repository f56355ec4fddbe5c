"""PostgreSQL URLs as people paste them: read, checked, and shown without their password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlencode

from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.types import PathOrUrl

_SCHEME = re.compile(r"(postgres|postgresql)(\+\w+)?://", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:@/?#\[\]]*)(:(\d{1,5})?)?")
_PAIRS = re.compile(r"[\w.]+=[^&]*(&[\w.]+=[^&]*)*")

PASSED = frozenset(
    {"host", "port", "dbname", "user", "password", "passfile", "service", "sslmode", "sslcert", "sslkey"}
    | {"sslrootcert", "sslcrl", "sslpassword", "sslnegotiation", "ssl_min_protocol_version", "krbsrvname"}
    | {"ssl_max_protocol_version", "target_session_attrs", "gsslib", "options", "application_name"}
)
"""Options that the driver understands as libpq does."""

IGNORED = frozenset(
    {"channel_binding", "gssencmode", "connect_timeout", "keepalives", "keepalives_idle", "client_encoding"}
    | {"keepalives_interval", "keepalives_count", "tcp_user_timeout", "fallback_application_name", "schema"}
    | {"sslcompression", "connection_limit", "pool_timeout", "uselibpqcompat"}
)
"""What other clients put into a URL and what changes nothing here."""

OTHER_NAMES = {"ssl": "sslmode", "database": "dbname"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a PostgreSQL server is. `dsn` has the password, `shown` has not.

    `pooled` tells that a transaction pooler stands before the server: nothing may be kept between transactions.
    """

    dsn: str = field(repr=False)
    shown: str
    pooled: bool

    @property
    def server(self) -> str:
        """Host, port and database, without the user: the same for everybody who works there."""
        return self.shown.removeprefix("postgresql://").rpartition("@")[2]


def is_postgresql(url: PathOrUrl) -> bool:
    """Tell whether a URL names a PostgreSQL server."""
    return _SCHEME.match(fspath(url)) is not None


def address_of(url: PathOrUrl) -> Address:
    """Read a PostgreSQL URL; UsageError, which shows no password, for one that cannot be read.

    A password may have characters that a URL would have percent-encoded.
    """
    url = fspath(url)
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise UsageError(
            "expected a PostgreSQL URL, got: another kind; write postgresql://user@host/database"
        )
    if not _is_text(unquote(url)):
        raise UsageError(
            "expected a PostgreSQL URL, got: one with a NUL character or half a surrogate pair; remove it"
        )
    user, password, rest, query = _split(url[scheme.end() :])
    hosts, _, database = rest.partition("/")
    if not all(map(_is_host, hosts.split(","))) or (hosts and "" in hosts.split(",")) or "/" in database:
        raise UsageError(
            "expected a PostgreSQL URL such as postgresql://user:password@host:5432/database, got: one whose host, "
            "port or database cannot be read; percent-encode what is special in its user or password"
        )
    options = _options(query)
    pooled = options.pop("pgbouncer", "false").lower() in {"true", "1", "yes", "on"}
    login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    where = f"{hosts}/{quote(unquote(database), safe='')}"
    encoded = urlencode(options, quote_via=quote)
    return Address(
        dsn=f"postgresql://{login}@{where}?{encoded}".removesuffix("?"),
        shown=_shown(user, hosts, database, options),
        pooled=pooled,
    )


def _is_text(text: str) -> bool:
    """Tell whether a text can be sent to a server."""
    return "\0" not in text and not any("\ud800" <= one <= "\udfff" for one in text)


def _is_host(text: str) -> bool:
    """Tell whether a text may be a host with or without its port; empty is the one that is set elsewhere."""
    found = _HOST.fullmatch(text)
    if found is None or int(found[3] or 0) > 65_535:
        return False
    labels = found[1].split(".") if found[1] and not found[1].startswith(("[", "%2F", "%2f")) else ["ok"]
    return all(0 < len(label) < 64 for label in labels)


def _split(body: str) -> tuple[str, str, str, str]:
    """Return user, password, host and path, and query.

    The query begins at the first question mark if what follows reads like one; else that was the password's.
    """
    head, _, query = body.partition("?")
    if "@" in query and not _PAIRS.fullmatch(query):
        userinfo, _, body = body.rpartition("@")
        head, _, query = body.partition("?")
    else:
        userinfo, _, head = head.rpartition("@")
    user, _, password = userinfo.partition(":")
    return unquote(user), unquote(password), head, query


def _options(query: str) -> dict[str, str]:
    given = {OTHER_NAMES.get(name, name): value for name, value in parse_qsl(query, keep_blank_values=True)}
    if unknown := sorted(set(given) - PASSED - IGNORED - {"pgbouncer"}):
        raise UsageError(
            f"expected options of a PostgreSQL URL that lbr knows, got: {_safely(unknown, query)}; "
            f"there are: {', '.join(sorted(PASSED | {'pgbouncer'}))}"
        )
    _check_files(given)
    return {name: value for name, value in given.items() if name not in IGNORED}


def _check_files(options: Mapping[str, str]) -> None:
    """Raise UsageError for a file that the driver could not read: it would try again and again."""
    if (options.get("sslmode") or os.environ.get("PGSSLMODE")) == "disable":
        return
    import ssl  # noqa: PLC0415 - only with a URL of PostgreSQL

    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        variable = f"PG{name.upper()}"
        place, path = "the PostgreSQL URL", options.get(name)
        if not path:
            place, path = f"the environment's {variable}", os.environ.get(variable)
        if not path:
            continue
        try:
            if name == "sslrootcert":
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            else:
                Path(path).open("rb").close()
        except OSError as error:
            reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            way_out = "name the system's file of certificates" if path == "system" else "correct the path"
            raise UsageError(f"cannot use {name}={path} of {place}: {reason}; {way_out}") from error


def _safely(names: list[str], query: str) -> str:
    """Return names as a message may show them: what stands beside a password may be a part of it."""
    return "others" if "password" in query or "@" in query else ", ".join(names)


def _shown(user: str, hosts: str, database: str, options: Mapping[str, str]) -> str:
    user, hosts = user or options.get("user", ""), hosts or options.get("host", "")
    database = unquote(database) or options.get("dbname", "")
    port = f":{options['port']}" if "port" in options and not hosts.startswith("/") else ""
    return f"postgresql://{user}{'@' if user else ''}{hosts}{port}/{database}"
