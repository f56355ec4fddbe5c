"""What SQLite's errors mean: which pass by themselves, and what to do about the others."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Float, Integer, LargeBinary, func, select
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from lbr.core.errors import DatabaseBusyError, DatabaseError, MisfitError
from lbr.core.open_files import exhausted_message
from lbr.store import schema
from lbr.store.file_connections import HARMLESS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Column

# Primary result codes of SQLite, https://sqlite.org/rescode.html
ERROR, BUSY, LOCKED, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, NOTADB = 1, 5, 6, 8, 10, 11, 13, 14, 26
REASONS = {
    READONLY: "it is read-only; make the file and its folder writable",
    IOERR: "the disk reported an error",
    CORRUPT: "the file is damaged; restore a copy, or enqueue into a new one",
    FULL: "the disk is full; make room and run the same command again",
    CANTOPEN: "it cannot be opened; check the path and the permissions of the file and its folder",
    NOTADB: "the file is not a SQLite database; name another path",
}

_UNDECODED = re.compile(r"Could not decode to UTF-8 column '([^']*)'")


def _code(error: DBAPIError) -> int | None:
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def is_busy(error: Exception) -> bool:
    """Return whether another process held the file, or no file handle was left: both pass."""
    if not isinstance(error, DBAPIError):
        return False
    code = _code(error)
    return code in {BUSY, LOCKED} or (code == CANTOPEN and _is_exhausted(error))


def _is_exhausted(error: DBAPIError) -> bool:
    """Return what was noted when the error came: SQLite has the same code for a file that it may not open."""
    return getattr(error.orig, "exhausted", False)


def _reason(error: DBAPIError) -> str:
    code, words = _code(error), str(error.orig)
    if code == CANTOPEN and _is_exhausted(error):
        return exhausted_message()
    if code in REASONS:
        return REASONS[code]
    if (found := _UNDECODED.match(words)) is not None:  # what follows is the value, however long
        return f"expected text in UTF-8 in a column {found[1][:50]}, got: other bytes; restore a copy, or mend that value"
    if code == ERROR:
        return f"its tables are not those that lbr makes ({words[:200]}); restore a copy"
    return words


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what the driver raises into `DatabaseError`, with the way out."""
    try:
        yield
    except DBAPIError as error:
        code = _code(error)
        if code in {BUSY, LOCKED}:
            raise DatabaseBusyError(
                f"another process has kept {path} locked for too long; find it with `fuser {path}`, then run again"
            ) from error
        raise DatabaseError(f"cannot use the database {path}: {_reason(error)}") from error
    except StatementError as error:  # its own words would show the statement, with all that was to be written
        raise MisfitError(
            f"cannot use the database {path}: it has a value of another type than lbr writes ({error.orig}); "
            f"restore a copy, or mend that value"
        ) from error
    except SQLAlchemyError as error:
        raise DatabaseError(f"cannot use the database {path}: {error}") from error
    except UnicodeDecodeError as error:  # sqlite3's own words about a schema whose names are no text
        raise DatabaseError(
            f"cannot use the database {path}: its schema is damaged; restore a copy"
        ) from error
    except OverflowError as error:  # lbr's own numbers are far from it
        raise MisfitError(
            f"cannot use the database {path}: a number in it is so large that a sum with it is too large to write; "
            f"restore a copy, or mend that value"
        ) from error


def misfit(path: Path) -> str | None:
    """Return which column of a file has a value of another type, None if all fit. SQLite stores any value anywhere.

    It reads all rows, to explain an error that such a value may have caused. Raises sqlite3.Error.
    """
    literally: dict[str, Any] = {"dialect": sqlite_dialect(), "compile_kwargs": {"literal_binds": True}}
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute(HARMLESS)
        for column in (column for table in schema.metadata.sorted_tables for column in table.columns):
            fitting, kind = _fitting_types(column), func.typeof(column)
            query = select(kind).where(kind.not_in(fitting)).limit(1)
            found = connection.execute(str(query.compile(**literally))).fetchone()
            if found is not None:
                return f"expected {column.name} of {column.table.name} to be {fitting[0]}, got: {found[0]}"
    return None


def _fitting_types(column: Column[Any]) -> list[str]:
    match column.type:
        case Integer():
            fitting = ["integer"]
        case Float():
            fitting = ["real", "integer"]
        case LargeBinary():
            fitting = ["blob"]
        case _:
            fitting = ["text"]
    return [*fitting, "null"] if column.nullable else fitting
