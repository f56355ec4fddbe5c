"""Where a queue is: paths, SQLite URLs, and PostgreSQL URLs, which are shown without password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from lbr.core import ownership
from lbr.core.config import a_name
from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL

    from lbr.core.types import PathOrUrl

_SCHEME = re.compile(r"(postgres|postgresql)(\+\w+)?://", re.IGNORECASE)
_ALMOST_POSTGRESQL = re.compile(r"postgres(ql)?\b.*@", re.IGNORECASE)

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
"""Options that other clients put into a URL and that change nothing here."""
OTHER_NAMES = {"ssl": "sslmode", "database": "dbname"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a PostgreSQL server is. `dsn` has the password, `shown` has not.

    `pooled`: a transaction pooler is in front of the server, so that nothing may be kept between transactions.
    """

    dsn: str = field(repr=False)
    shown: str
    pooled: bool

    @property
    def server(self) -> str:
        """Host, port and database, without the user: the same for all who use the queue."""
        return self.shown.removeprefix("postgresql://").rpartition("@")[2]


def is_postgresql(url: PathOrUrl) -> bool:
    """Return whether a URL names a PostgreSQL server."""
    return _SCHEME.match(os.fspath(url)) is not None


def address_of(url: PathOrUrl) -> Address:
    """Read a PostgreSQL URL; UsageError, which shows no password, for one that cannot be read."""
    text = os.fspath(url)
    if not is_postgresql(text):
        raise UsageError("expected a PostgreSQL URL, got: another kind; write postgresql://user@host/database")
    if "\0" in unquote(text) or any("\ud800" <= one <= "\udfff" for one in unquote(text)):
        raise UsageError("expected a PostgreSQL URL, got: one with a NUL character or half a surrogate pair; remove it")
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or not _is_readable(parsed):
        raise UsageError(
            "expected a PostgreSQL URL such as postgresql://user:password@host:5432/database, got: one whose host, "
            "port or database cannot be read; percent-encode what is special in its user or password, and write several "
            "hosts as ?host=one,two"
        )
    options = _options(parsed)
    pooled = options.pop("pgbouncer", "false").lower() in {"true", "1", "yes", "on"}
    plain = parsed.set(drivername="postgresql", query=options)
    return Address(plain.render_as_string(hide_password=False), _shown(plain, options), pooled)


def _is_readable(url: URL) -> bool:
    """Return whether host, port and database of a URL may be such; the rest of a password may stand in their place."""
    labels = (url.host or "ok").split(".")
    is_host = "@" not in labels[0] and all(0 < len(label) < 64 and "@" not in label for label in labels)
    return is_host and (url.port or 0) <= 65_535 and "/" not in (url.database or "")


def _options(url: URL) -> dict[str, str]:
    given = {OTHER_NAMES.get(name, name): ",".join(value) for name, value in url.normalized_query.items()}
    if unknown := sorted(set(given) - PASSED - IGNORED - {"pgbouncer"}):
        # What is beside a password may be a part of it.
        shown = "password" not in given and not any("@" in one for one in (*given, *given.values()))
        raise UsageError(
            f"expected options of a PostgreSQL URL that lbr knows, got: {', '.join(unknown) if shown else 'others'}; "
            f"there are: {', '.join(sorted(PASSED | {'pgbouncer'}))}"
        )
    _check_files(given)
    return {name: value for name, value in given.items() if name not in IGNORED}


def _check_files(options: Mapping[str, str]) -> None:
    """Raise UsageError for a file that the driver could not read: it would try without end."""
    if (options.get("sslmode") or os.environ.get("PGSSLMODE")) == "disable":
        return
    import ssl  # noqa: PLC0415 - only with a URL of PostgreSQL

    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        given, variable = options.get(name), f"PG{name.upper()}"
        path = given or os.environ.get(variable)
        if not path:
            continue
        try:
            if name == "sslrootcert":
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            else:
                Path(path).open("rb").close()
        except OSError as error:
            reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            place = "the PostgreSQL URL" if given else f"the environment's {variable}"
            way_out = "name the system's file of certificates" if path == "system" else "correct the path"
            raise UsageError(f"cannot use {name}={path} of {place}: {reason}; {way_out}") from error


def _shown(url: URL, options: Mapping[str, str]) -> str:
    user, host = url.username or options.get("user", ""), url.host or options.get("host", "")
    host = f"[{host}]" if ":" in host and url.host else host
    number = url.port or options.get("port")
    port = f":{number}" if number and not host.startswith("/") else ""
    return f"postgresql://{user}{'@' if user else ''}{host}{port}/{url.database or options.get('dbname', '')}"


def sqlite_path(url: PathOrUrl, *, name: str = "--db") -> Path:
    """Return the file that a path or SQLite URL names; UsageError for anything else. Passwords are not shown.

    `name` is what messages call the option.
    """
    url = os.fspath(url)
    if _ALMOST_POSTGRESQL.match(url):  # and perhaps with a password in it
        raise UsageError(
            f"expected {name} to be a path or a database URL, got: something that is nearly a PostgreSQL URL; "
            "write postgresql://user@host/database"
        )
    path = _path_in(url, name) if "://" in url else url
    if not path.strip() or path == ":memory:":
        raise UsageError(f"expected {name} to name a file, got: {path!r}; processes share the queue through it")
    try:
        found = Path(a_name(name, path)).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(
            f"expected {name} to name a file, got: {path!r}, in the home of an unknown user; "
            f"write ./{path} for a file of that name"
        ) from error
    if not found.name:
        raise UsageError(f"expected {name} to name a file, got: the folder {path}")
    ownership.refuse_foreign_link(str(found))
    # SQLite keeps the WAL beside the file, not beside a link to it; so must we, and our locks.
    return Path(os.path.realpath(found)) if os.path.islink(found) else found


def _path_in(url: str, name: str) -> str:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number is the second; its words show the URL
        raise UsageError(
            f"expected {name} to be a path or a database URL, got: something unreadable; write sqlite:///runs.db"
        ) from None
    if parsed.get_backend_name() != "sqlite":
        raise UsageError(f"expected {name} to be a path, an sqlite or a postgresql URL, got: a {parsed.drivername} URL")
    unknown = sorted(set(parsed.query) - {"synchronous"})
    if parsed.host or unknown:
        more = "a host" if parsed.host else f"the options {', '.join(unknown)}"
        raise UsageError(f"expected an sqlite URL with a path alone, got: {more}; write sqlite:///runs.db")
    return parsed.database or ""


def synchronous_in(url: PathOrUrl) -> str:
    """Return the durability in a path or URL: FULL, or NORMAL, which may lose the last commits to a power cut."""
    url = os.fspath(url)
    asked = make_url(url).query.get("synchronous", "FULL") if "://" in url else "FULL"
    if asked not in {"FULL", "NORMAL"}:
        raise UsageError(f"expected synchronous to be FULL or NORMAL, got: {asked!r}")
    return str(asked)
