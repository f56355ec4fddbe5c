"""Writers of collected rows, in order, into a file that is whole or not there, or into a pipe."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import sqlite3
import stat
import sys
import tempfile
import time
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import orjson
from filelock import AsyncFileLock

from lbr.core import ownership
from lbr.core.config import a_name
from lbr.core.errors import OutputError, UsageError
from lbr.core.text import harmless
from lbr.core.types import Part

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from lbr.core.types import Json, Row

STDOUT_NAME = "stdout"
OWN_COLUMNS = ("idx", "key", "prompt", "status", "result", "error")
"""The columns of CSV that are lbr's own; the prompt's only if no column of the input is the prompt."""
BOM = b"\xef\xbb\xbf"
BUFFER_BYTES = 1 << 20

ABANDONED_SECONDS = 3600.0
MAX_LINKS = 40
_DESCRIPTORS = re.compile(r"/dev/fd|/proc/\d+(?:/task/\d+)?/fd")
_TO_STDOUT = "name a file, or leave it to `lbr collect RUN -o -`, which writes to stdout"

_FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with; the last four are the wide forms of the first."""
_QUOTED = re.compile(r"""^[\s\ufeff]|[",;|\t\r\n]|\s$""")
"""What a cell in quotes holds: what ends a cell, or is read as another delimiter, or as no part of the cell."""
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
        _lock_of(target)
        _refuse_other_database(target, path)


def _is_descriptor(path: str) -> bool:
    """Tell whether a path leads through /dev/stdout or the like: the file behind it would be replaced, not written to."""
    for _ in range(MAX_LINKS):
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
    ownership.check_database(target)
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
    """Yield an empty temporary file beside `path` that takes its place when the block ends well; hold `output_lock`.

    Close it by then; its data reach the disk before its name does. Whatever the block raises, the
    temporary file goes and the old file stays as it was. The mode of an old file is kept, a link to it
    too. Raises OutputError.
    """
    target = _target(path)
    with _reasons(path):
        _remove_abandoned(target)
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


@dataclass(frozen=True, slots=True)
class CsvStyle:
    """How CSV is written: with an apostrophe before what a spreadsheet would run as a formula, after a UTF-8 BOM."""

    spreadsheet_safe: bool = False
    bom: bool = False

    def check(self, kind: OutputFormat) -> None:
        """Raise UsageError if another format than CSV is to be written so."""
        for flag, is_set in (("--spreadsheet-safe", self.spreadsheet_safe), ("--bom", self.bom)):
            if is_set and kind is not OutputFormat.CSV:
                raise UsageError(f"{flag} is for CSV alone, got: {kind}; leave it out, or write a .csv file")


PLAIN_CSV = CsvStyle()


class CsvWriter:
    """Writes a header at once, then each row as a record: the input's columns first, then lbr's own.

    A column of lbr's own whose name is taken becomes `answer.NAME`. None is an empty cell, an empty text one in quotes.
    Chat messages, and metadata that are not strings, are written as JSON.
    """

    def __init__(
        self,
        handle: IO[bytes],
        columns: Sequence[tuple[Part, str]] = (),
        style: CsvStyle = PLAIN_CSV,
        *,
        name: str = STDOUT_NAME,
    ) -> None:
        has_prompt = any(part is Part.PROMPT for part, _ in columns)
        self._columns = columns
        self._own = [name for name in OWN_COLUMNS if name != Part.PROMPT or not has_prompt]
        self._safe = style.spreadsheet_safe
        self._sink = _Sink(handle, name)
        self._sink.write(BOM * style.bom + self._line(self._header()))

    def write(self, rows: Iterable[Row]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        self._sink.write(b"".join([self._line(self._cells(row)) for row in rows]))

    def _header(self) -> list[str]:
        header: dict[str, None] = {}
        wanted = [("metadata", name) for _, name in self._columns] + [("answer", name) for name in self._own]
        for prefix, column in wanted:
            name = column
            while name in header:
                name = f"{prefix}.{name}"
            header[name] = None
        return list(header)

    def _cells(self, row: Row) -> list[Json]:
        fields, metadata = row.to_dict(), row.metadata or {}
        given = [
            metadata.get(name) if part is Part.METADATA else fields.get(part) for part, name in self._columns
        ]
        return given + [fields[name] for name in self._own]

    def _line(self, cells: Iterable[Json]) -> bytes:
        return (",".join([self._spelled(cell) for cell in cells]) + "\n").encode()

    def _spelled(self, cell: Json) -> str:
        if cell is None:
            return ""
        text = cell if isinstance(cell, str) else orjson.dumps(cell).decode()
        if self._safe and text[:1] in _FORMULA and not _NUMBER.fullmatch(text):
            text = f"'{text}"
        return text if text and not _QUOTED.search(text) else '"' + text.replace('"', '""') + '"'


@contextmanager
def open_writer(
    path: str | None,
    format: OutputFormat,  # noqa: A002 - the word of the command line
    *,
    columns: Sequence[tuple[Part, str]] = (),
    style: CsvStyle = PLAIN_CSV,
) -> Iterator[JsonlWriter | CsvWriter]:
    """Yield a writer into a file, which appears whole when the block ends well, or into stdout.

    `columns` are the input's, for CSV; JSONL carries all metadata. Raises UsageError for a format that is not
    written row by row, OutputError where writing fails; a BrokenPipeError of stdout is passed on.
    """
    if format is OutputFormat.DB:
        raise UsageError("expected an output of lines, got: a database; use .jsonl or .csv")
    if path is None:
        handle = _stdout()
        yield _writer(handle, format, columns, style, STDOUT_NAME)
        with _reasons(STDOUT_NAME):
            handle.flush()
        return
    with atomic_path(path) as temporary, _closing_quietly(temporary.open("wb", BUFFER_BYTES)) as handle:
        yield _writer(handle, format, columns, style, path)
        with _reasons(path):
            handle.close()


def _writer(
    handle: IO[bytes],
    format_: OutputFormat,
    columns: Sequence[tuple[Part, str]],
    style: CsvStyle,
    name: str,
) -> JsonlWriter | CsvWriter:
    if format_ is OutputFormat.CSV:
        return CsvWriter(handle, columns, style, name=name)
    return JsonlWriter(handle, name=name)


def _stdout() -> IO[bytes]:
    if sys.stdout is None:  # it is where the process was started with stdout closed
        raise OutputError("expected an open stdout, got: a closed one; name a file with -o")
    with _reasons(STDOUT_NAME):
        sys.stdout.flush()
    return cast("IO[bytes]", _Terminal(sys.stdout.buffer)) if sys.stdout.isatty() else sys.stdout.buffer


class _Terminal:
    """A terminal, which must not be steered by what a model answered. It gets whole lines."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.flush = handle.flush

    def write(self, data: bytes) -> int:
        return self._handle.write(harmless(data.decode()).encode())


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
    ownership.refuse_foreign_link(a_name("the output", str(path)))
    return Path(os.path.realpath(a_name("the output", str(path))))


def _create(target: Path) -> Path:
    """Create an empty file beside the target; hidden, and private where it will replace a file."""
    temporary = target.with_name(f"{_temporary_prefix(target)}{os.getpid()}.{secrets.token_hex(6)}.tmp")
    mode = 0o600 if target.exists() else 0o666
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    return temporary


def _temporary_prefix(target: Path) -> str:
    return f".{target.name[:40]}."


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files that killed processes left beside an output.

    That no such process runs says little of other machines and containers that share the folder, so the file must also
    have been left alone for an hour.
    """
    name = re.compile(re.escape(_temporary_prefix(target)) + r"(\d{1,9})\.[0-9a-f]{12}\.tmp")
    for path in target.parent.glob(f"{glob.escape(_temporary_prefix(target))}*.tmp"):
        with suppress(OSError):
            found, matched = path.lstat(), name.fullmatch(path.name)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            old = time.time() - found.st_mtime > ABANDONED_SECONDS
            if matched and ours and old and not _runs(int(matched[1])):
                _discard(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


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
    for suffix in ("", *ownership.COMPANIONS):
        with suppress(OSError):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _lock_of(target: Path) -> AsyncFileLock:
    """Return the lock of one output file: in the user's own folder of the temporary folder, not beside it."""
    try:
        folder = Path(tempfile.gettempdir()) / f"lbr-{os.getuid()}"
    except OSError as error:
        raise OutputError(
            f"expected a temporary folder for the lock of {target}, got: none that can be written; set TMPDIR to one"
        ) from error
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
