"""What a PostgreSQL server's errors mean: whether they pass by themselves, and what to do about those that do not.

Codes are those of PostgreSQL's manual, appendix A.
"""

from __future__ import annotations

import ssl

from sqlalchemy.exc import DBAPIError

PASSING_CLASSES = frozenset({"08", "57"})
"""Connection exceptions; operator intervention: the server is stopped, started, or ended our session."""

PASSING = frozenset({"40001", "40P01", "55P03", "53300", "25P03"})
"""Serialization failure, deadlock, lock timeout, too many connections, a transaction that idled for too long."""

READ_ONLY = "25006"

REASONS = {
    "28P01": "the server refused the password; check user and password in the URL, PGPASSWORD or ~/.pgpass",
    "28000": "the server refused the login: {message}; check the user and the server's pg_hba.conf",
    "3D000": "{message}; create it with `createdb`, or name another",
    "42501": "{message}; the role needs the right to create the schema lbr (GRANT CREATE ON DATABASE …) or to use it",
    "53300": "the server has no connection left; start fewer workers, raise max_connections, or use a pooler",
    "53100": "the server's disk is full; make room there and run the same command again",
    "3F000": "its schema lbr is gone; it was removed while in use",
    "42P01": "a table of its schema lbr is gone: {message}; it was removed while in use, or another program made it",
    "08P01": "{message}; behind a transaction pooler add pgbouncer=true to the URL",
}


class PassingError(Exception):
    """What keeps a transaction from succeeding for now, in words."""


def sqlstate_of(error: BaseException) -> str | None:
    """Return the server's code for an error, None where it has none."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = getattr(error, "sqlstate", None)
    return code if isinstance(code, str) else None


def is_passing(error: Exception) -> bool:
    """Tell whether the same transaction may well succeed when it is run again."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, OSError | TimeoutError | PassingError):
        return True
    code = sqlstate_of(error)
    if code is not None:
        # A pooler says all that it has to say with 08P01; what it will never take is a setting.
        refused = code == "08P01" and "startup parameter" in _words(error)
        return not refused and (code[:2] in PASSING_CLASSES or code in PASSING)
    # Without a code it is the driver that speaks: of a connection that is gone, or that breaks off.
    return isinstance(error, DBAPIError) and (error.connection_invalidated or _is_cut_off(error))


def _is_cut_off(error: DBAPIError) -> bool:
    words = str(error.orig)
    return "connection" in words and any(
        word in words for word in ("closed", "lost", "reset", "in the middle")
    )


def reason_of(error: BaseException, patience: float) -> str:
    """Return what is the matter, and what to do. Neither has the URL's password in it."""
    code = sqlstate_of(error)
    message = _words(error)
    if code in REASONS:
        return REASONS[code].format(message=message)
    if isinstance(error, Exception) and is_passing(error):
        return (
            f"{message}; tried for {patience:g} s; check that the server runs and can be reached, "
            f"then run the same command again"
        )
    return message


def _words(error: BaseException) -> str:
    """Return what the driver said, without the statement and the class names that SQLAlchemy puts around it."""
    cause: BaseException = error
    if isinstance(error, DBAPIError) and error.orig is not None:
        cause = error.orig.__cause__ or error.orig
    if isinstance(cause, TimeoutError):
        return "it does not answer"
    return str(cause) or type(cause).__name__
