"""Writers of collected rows, in order, into a file that is whole or not there, or into a pipe."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import secrets
import sqlite3
import stat
import sys
import tempfile
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING

import orjson
from filelock import AsyncFileLock

from lbr.core.config import a_name
from lbr.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from lbr.core.types import Json, Row

STDOUT_NAME = "stdout"
CSV_COLUMNS = ("idx", "id", "key", "prompt", "status", "result", "error")
BUFFER_BYTES = 1 << 20
SQLITE_COMPANIONS = ("-journal", "-wal", "-shm")

MOST_LINKS = 40
_DESCRIPTORS = re.compile(r"/dev/fd|/proc/\d+(?:/task/\d+)?/fd")
_TO_STDOUT = "name a file, or leave it to `lbr collect RUN -o -`, which writes to stdout"

_FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with; the last four are the wide forms of the first."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


class OutputFormat(StrEnum):
    """How collected rows are spelled."""

    JSONL = "jsonl"
    CSV = "csv"
    DB = "db"


FORMAT_OF_ENDING = {
    ".jsonl": OutputFormat.JSONL,
    ".ndjson": OutputFormat.JSONL,
    ".csv": OutputFormat.CSV,
    ".db": OutputFormat.DB,
    ".sqlite": OutputFormat.DB,
    ".sqlite3": OutputFormat.DB,
}


def format_of(path: str | None) -> OutputFormat:
    """Return the format that a file's ending asks for; None, which is stdout, gets JSONL. Raises UsageError."""
    if path is None:
        return OutputFormat.JSONL
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        raise UsageError(
            f"expected an output that lbr writes, got: {path}; Parquet is not supported, use .jsonl"
        )
    if ending not in FORMAT_OF_ENDING:
        endings = ", ".join(FORMAT_OF_ENDING)
        raise UsageError(f"expected an output that ends in one of {endings}, got: {path}; rename it")
    return FORMAT_OF_ENDING[ending]


def check_output(path: str | None) -> None:
    """Raise UsageError or OutputError where a file cannot be written; None is stdout, which always can.

    Tries it with a temporary file, so that a read-only file system is found before the work is done.
    """
    if path is None:
        return
    with _reasons(path):
        target = _target(path)
        if _is_descriptor(path):
            raise UsageError(f"expected an output file, got: {path}, which a program has open; {_TO_STDOUT}")
        if target.is_dir():
            raise UsageError(f"expected an output file, got: the folder {path or '.'}; add a file name")
        if target.exists() and not target.is_file():
            raise UsageError(f"expected an output file, got: the device or pipe {path}; {_TO_STDOUT}")
        if not target.parent.is_dir():
            problem = "a file" if target.parent.exists() else "nothing there"
            raise UsageError(f"expected {target.parent} to be a folder, got: {problem}; create it first")
        _create(target).unlink()
        _refuse_other_database(target, path)


def _is_descriptor(path: str) -> bool:
    """Tell whether a path leads through /dev/stdout or the like: the file behind it would be replaced, not written to."""
    for _ in range(MOST_LINKS):
        folder = os.path.realpath(os.path.dirname(path))
        if _DESCRIPTORS.fullmatch(folder):
            return True
        if not os.path.islink(path):
            return False
        path = os.path.join(folder, os.readlink(path))
    return False


def _refuse_other_database(target: Path, path: str) -> None:
    """Raise UsageError where a SQLite file that holds more than answers, the queue above all, would be replaced."""
    if not target.exists():
        return
    # By SQLite itself: whoever else opens and closes a file that this process has connected drops its locks.
    with closing(sqlite3.connect(target)) as connection:
        try:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                return
            raise UsageError(f"expected an output file, got: {path}: {error}; name another file") from error
    others = sorted({name for (name,) in found} - {"results"})
    if others:
        tables = ", ".join(others[:5])
        msg = f"expected an output file, got: {path}, a database with other tables than answers ({tables})"
        raise UsageError(f"{msg}; name another file")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path` that takes its place when the block ends well.

    Close it by then; its data reach the disk before its name does. Whatever the block raises, the
    temporary file goes and the old file stays as it was. The mode of an old file is kept, a link to it
    too. Raises OutputError.
    """
    target = _target(path)
    with _reasons(path):
        temporary = _create(target)
    try:
        yield temporary
        with _reasons(path):
            _publish(temporary, target)
    except BaseException:
        _discard(temporary)
        raise


@asynccontextmanager
async def output_lock(path: str | Path) -> AsyncIterator[None]:
    """Let one writer of a file go after the other: of one user on one machine, in this event loop or another process.

    The lock stands in the temporary folder and is never removed, for a waiter may have it open; a killed
    holder frees it. Raises OutputError.
    """
    lock = _lock_of(_target(path))
    try:
        await lock.acquire()
    except OSError as error:
        raise OutputError(f"expected to lock {path}, got: {error.strerror or error}; set TMPDIR") from error
    try:
        yield
    finally:
        await lock.release()


class JsonlWriter:
    """Writes each row as one line of JSON."""

    def __init__(self, handle: IO[bytes], *, name: str = STDOUT_NAME) -> None:
        self._sink = _Sink(handle, name)

    def write(self, rows: Iterable[Row]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        newline = orjson.OPT_APPEND_NEWLINE
        self._sink.write(b"".join([orjson.dumps(row.to_dict(), option=newline) for row in rows]))


class CsvWriter:
    """Writes a header at once, then each row as a record; None is an empty cell.

    A text that a spreadsheet would run as a formula gets an apostrophe before it. Chat messages, and metadata that are not strings, are written as JSON. A metadata column whose name is
    taken becomes `metadata.NAME`.
    """

    def __init__(
        self, handle: IO[bytes], metadata_columns: Sequence[str] = (), *, name: str = STDOUT_NAME
    ) -> None:
        self._metadata_columns = tuple(metadata_columns)
        self._csv = csv.writer(_CsvLines(_Sink(handle, name)))
        self._csv.writerow([_inert(name) for name in csv_header(metadata_columns)])

    def write(self, rows: Iterable[Row]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        self._csv.writerows(_cells(row, self._metadata_columns) for row in rows)


@contextmanager
def open_writer(
    path: str | None,
    format: OutputFormat,  # noqa: A002 - the word of the command line
    *,
    metadata_columns: Sequence[str] = (),
) -> Iterator[JsonlWriter | CsvWriter]:
    """Yield a writer into a file, which appears whole when the block ends well, or into stdout.

    `metadata_columns` are for CSV; JSONL carries all metadata. Raises UsageError for a format that is not
    written row by row, OutputError where writing fails; a BrokenPipeError of stdout is passed on.
    """
    if format is OutputFormat.DB:
        raise UsageError("expected an output of lines, got: a database; use .jsonl or .csv")
    if path is None:
        handle = _stdout()
        yield _writer(handle, format, metadata_columns, STDOUT_NAME)
        with _reasons(STDOUT_NAME):
            handle.flush()
        return
    with atomic_path(path) as temporary, _closing_quietly(temporary.open("wb", BUFFER_BYTES)) as handle:
        yield _writer(handle, format, metadata_columns, path)
        with _reasons(path):
            handle.close()


def csv_header(metadata_columns: Sequence[str]) -> list[str]:
    """Return the names of all columns: lbr's own, then the metadata's, made distinct."""
    header = list(CSV_COLUMNS)
    for column in metadata_columns:
        name = column
        while name in header:
            name = f"metadata.{name}"
        header.append(name)
    return header


def _cells(row: Row, metadata_columns: Sequence[str]) -> list[Json]:
    metadata = row.metadata or {}
    prompt = row.prompt.text if row.prompt.messages is None else list(row.prompt.messages)
    own = [row.idx, row.custom_id, row.key, _cell(prompt), row.status, row.result, row.error]
    cells = own + [_cell(metadata.get(column)) for column in metadata_columns]
    return [_inert(cell) if isinstance(cell, str) else cell for cell in cells]


def _inert(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula (OWASP, "CSV Injection"); a number is left as it is."""
    if text[:1] not in _FORMULA or _NUMBER.fullmatch(text):
        return text
    return f"'{text}"


def _cell(value: Json) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _writer(
    handle: IO[bytes], format_: OutputFormat, metadata_columns: Sequence[str], name: str
) -> JsonlWriter | CsvWriter:
    if format_ is OutputFormat.CSV:
        return CsvWriter(handle, metadata_columns, name=name)
    return JsonlWriter(handle, name=name)


def _stdout() -> IO[bytes]:
    if sys.stdout is None:  # it is where the process was started with stdout closed
        raise OutputError("expected an open stdout, got: a closed one; name a file with -o")
    with _reasons(STDOUT_NAME):
        sys.stdout.flush()
    return sys.stdout.buffer


class _Sink:
    """A binary handle whose failures name the file and the reason."""

    def __init__(self, handle: IO[bytes], name: str) -> None:
        self._handle = handle
        self._name = name

    def write(self, data: bytes) -> None:
        try:
            self._handle.write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(self._name, error) from error


class _CsvLines:
    r"""What csv.writer writes to: it ends lines in \r\n, so that it quotes cells that hold either; here \n."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink

    def write(self, line: str) -> None:
        self._sink.write(line.removesuffix("\r\n").encode() + b"\n")


def _refused(path: str | Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(f"expected to write {path}, got: {reason}; make room or choose another file with -o")


@contextmanager
def _reasons(path: str | Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _refused(path, error) from error


@contextmanager
def _closing_quietly(handle: IO[bytes]) -> Iterator[IO[bytes]]:
    """Close the handle; a full disk was told of by then, and must not hide the first error."""
    try:
        yield handle
    finally:
        with suppress(OSError):
            handle.close()


def _target(path: str | Path) -> Path:
    return Path(os.path.realpath(a_name("the output", str(path))))


def _create(target: Path) -> Path:
    """Create an empty file beside the target; hidden, and private where it will replace a file."""
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
    mode = 0o600 if target.exists() else 0o666
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    return temporary


def _publish(temporary: Path, target: Path) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        if target.exists():
            os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name last; some file systems cannot, and the file is whole under either name."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _discard(temporary: Path) -> None:
    for suffix in ("", *SQLITE_COMPANIONS):
        with suppress(OSError):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _lock_of(target: Path) -> AsyncFileLock:
    """Return the lock of one output file: in the user's own folder of the temporary folder, not beside it."""
    folder = Path(tempfile.gettempdir()) / f"lbr-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise OutputError(
                f"expected {folder} to be your own folder, got: another's; set TMPDIR to a private one"
            )
        folder.chmod(0o700)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"expected to lock a file in {folder}, got: {reason}; set TMPDIR") from error
    name = hashlib.blake2b(os.fsencode(target), digest_size=16).hexdigest()
    return AsyncFileLock(folder / f"{name}.lock", mode=0o600, fallback_to_soft=False)
