"""Writers of collected rows, in order, into a file that is whole or not there, or into a pipe."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import sqlite3
import stat
import sys
import time
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING

import orjson

from lbr.core import ownership
from lbr.core.config import a_name
from lbr.core.errors import OutputError, UsageError
from lbr.core.extras import RowUsage
from lbr.core.messages import with_instructions
from lbr.core.text import harmless, to_json
from lbr.io import frames
from lbr.io.table import Kind, Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from lbr.core.types import AnswerRow, Json

STDOUT_NAME = "stdout"
BUFFER_BYTES = 1 << 20
_ROW = b'{"idx":'
LOCK_SECONDS = 0.05
ABANDONED_SECONDS = 86_400.0
MAX_LOCK_TRIES = 12_000

_FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with; the last four are the wide forms of the first."""
_QUOTED = re.compile(r"""^[\s\ufeff]|[",;|\t\r\n]|\s$""")
"""What a cell in quotes holds: what ends a cell, or is read as another delimiter, or is lost at the edges of a cell."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


class OutputFormat(StrEnum):
    """How collected rows are written."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    SQLITE = "sqlite"
    DB = "db"
    OPENAI = "openai"
    MESSAGES = "messages"


FORMAT_OF_ENDING = {".jsonl": OutputFormat.JSONL, ".ndjson": OutputFormat.JSONL, ".csv": OutputFormat.CSV}
FORMAT_OF_ENDING |= {".parquet": OutputFormat.PARQUET, ".pq": OutputFormat.PARQUET, ".db": OutputFormat.DB}
FORMAT_OF_ENDING |= dict.fromkeys((".sqlite", ".sqlite3"), OutputFormat.SQLITE)
TABLES = frozenset({OutputFormat.CSV, OutputFormat.PARQUET, OutputFormat.SQLITE})
"""The formats with columns."""
TYPED = frozenset({OutputFormat.PARQUET, OutputFormat.SQLITE})
"""Those whose columns have types. They are files, and cannot be written to a pipe."""


def format_of(path: str | None) -> OutputFormat:
    """Return the format that a file's ending asks for; None, which is stdout, gets JSONL. Raises UsageError."""
    if path is None:
        return OutputFormat.JSONL
    ending = Path(path).suffix.lower()
    if ending not in FORMAT_OF_ENDING:
        raise UsageError(f"cannot write {path}; use a name that ends in {', '.join(FORMAT_OF_ENDING)}")
    return FORMAT_OF_ENDING[ending]


def check_output(path: str | None, format: OutputFormat | None = None) -> None:  # noqa: A002 - the name of the flag
    """Raise UsageError or OutputError if a file cannot be written; None is stdout, which takes the formats of lines.

    Tries it with a temporary file, so that a read-only file system is found before the work is done.
    """
    if path is None:
        if format in TYPED or format is OutputFormat.DB:
            raise UsageError(f"the format {format} cannot be written to stdout; name a file with -o FILE")
        return
    if format is OutputFormat.PARQUET:
        frames.library("polars")
    with named_errors(path):
        target = _target(path)
        if target.is_dir():
            raise UsageError(f"the output {path or '.'} is a folder; add a file name")
        # /dev/stdout may lead to a file, which would be replaced instead of written to; /dev/shm holds files.
        is_device = re.match("/dev/(?!shm/)|/proc/", os.path.abspath(path))
        if is_device or (target.exists() and not target.is_file()):
            raise UsageError(
                f"the output {path} is a device or a pipe; name a file, or use `lbr collect RUN -o -`, which writes to stdout"
            )
        if not target.parent.is_dir():
            raise UsageError(f"there is no folder {target.parent}; create it first")
        _create(target).unlink()
        if target.exists():
            _refuse_other_database(target, path, format)


def _refuse_other_database(target: Path, path: str, format: OutputFormat | None) -> None:  # noqa: A002
    """Raise UsageError for a SQLite file that holds more than answers, above all a queue: it would be replaced."""
    ownership.check_database(target)
    # By SQLite itself: to open and close a file that this process has connected would drop its locks.
    with closing(sqlite3.connect(target)) as connection:
        try:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                return
            raise UsageError(f"{path} cannot be the output: {error}; name another file") from error
    own = {OutputFormat.SQLITE: {"answers"}, None: {"answers", "results"}}.get(format, {"results"})
    if others := sorted({name for (name,) in found} - own):
        raise UsageError(
            f"{path} is a database with other tables than answers ({', '.join(others[:5])}); name another output file"
        )


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path` that takes its place if the block succeeds; hold `output_lock`.

    Close it by then; its data reach the disk before its name does. If the block fails, the temporary file is removed
    and the old file stays. The mode of an old file is kept, and so is a link to it. Raises OutputError.
    """
    target = _target(path)
    with named_errors(path):
        _remove_abandoned(target)
        temporary = _create(target)
    try:
        yield temporary
        with named_errors(path):
            _publish(temporary, target)
    except BaseException:
        _discard(temporary)
        raise


@asynccontextmanager
async def output_lock(path: str | Path) -> AsyncIterator[None]:
    """Let the writers into a folder take turns. Raises OutputError.

    The folder itself is locked, so that no lock file is left; a killed holder frees it.
    """
    with named_errors(path):
        folder = os.open(_target(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a network file system without such locks
            for _ in range(MAX_LOCK_TRIES):  # its holder may not end
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_SECONDS)
        yield
    finally:
        os.close(folder)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes, here or on other machines, left beside an output a day ago."""
    name = re.compile(rf"\.{re.escape(target.name[:40])}\.\d{{1,9}}\.[0-9a-f]{{12}}\.tmp")
    for path in filter(lambda path: name.fullmatch(path.name), target.parent.iterdir()):
        with suppress(OSError):
            found = path.lstat()
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if ours and found.st_mtime < time.time() - ABANDONED_SECONDS:
                _discard(path)


@dataclass(frozen=True, slots=True)
class CsvStyle:
    """How CSV is written: with an apostrophe before what a spreadsheet would run as a formula, after a UTF-8 BOM."""

    spreadsheet_safe: bool = False
    bom: bool = False

    def check(self, kind: OutputFormat) -> None:
        """Raise UsageError if it is set for another format than CSV."""
        for flag, is_set in (("--spreadsheet-safe", self.spreadsheet_safe), ("--bom", self.bom)):
            if is_set and kind is not OutputFormat.CSV:
                raise UsageError(f"{flag} is for CSV only, got: {kind}; omit it, or write a .csv file")


PLAIN_CSV = CsvStyle()


class JsonlWriter:
    """Writes each row as one line of JSON. A terminal gets what it shows only, because answers must not steer it.

    The formats of one line for each row derive from it. `table` is for those with columns.
    """

    def __init__(
        self, handle: IO[bytes], table: Table | None = None, style: CsvStyle = PLAIN_CSV, *, name: str = STDOUT_NAME
    ) -> None:
        self._handle, self._name = handle, name
        self._table, self._style = table or Table(), style
        self._is_terminal = handle.isatty()
        self._begin()

    def _begin(self) -> None:
        """Write what comes before the rows: nothing."""

    def write(self, rows: Iterable[AnswerRow]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        self._put(b"".join([self._encode(row) for row in rows]))

    def flush(self) -> None:
        """Write what is in the buffer. Raises OutputError."""
        with named_errors(self._name):
            self._handle.flush()

    def close(self) -> None:
        """Write what is in the buffer, and close a file. Raises OutputError."""
        with named_errors(self._name):
            (self._handle.flush if self._name == STDOUT_NAME else self._handle.close)()

    def _put(self, data: bytes) -> None:
        with named_errors(self._name):
            self._handle.write(harmless(data.decode()).encode() if self._is_terminal else data)

    def _encode(self, row: AnswerRow) -> bytes:
        return orjson.dumps(row.to_dict(), option=orjson.OPT_APPEND_NEWLINE)


class CsvWriter(JsonlWriter):
    """Writes a header at once, then each row as a record.

    None is an empty cell, an empty text one in quotes. What is no text is written as JSON.
    """

    def _begin(self) -> None:
        self._put(b"\xef\xbb\xbf" * self._style.bom + self._line(one.name for one in self._table.columns))

    def _encode(self, row: AnswerRow) -> bytes:
        return self._line(self._table.cells(row))

    def _line(self, cells: Iterable[Json]) -> bytes:
        return (",".join([self._cell(cell) for cell in cells]) + "\n").encode()

    def _cell(self, value: Json) -> str:
        if value is None:
            return ""
        text = value if isinstance(value, str) else to_json(value).decode()
        if self._style.spreadsheet_safe and text[:1] in _FORMULA and not _NUMBER.fullmatch(text):
            text = f"'{text}"
        return text if text and not _QUOTED.search(text) else '"' + text.replace('"', '""') + '"'


class OpenaiWriter(JsonlWriter):
    """Writes each row as a line of the output of OpenAI's batches: a chat completion, or an error."""

    def _encode(self, row: AnswerRow) -> bytes:
        name, used, response, error = f"{row.key}-{row.idx}", row.usage or RowUsage(), None, None
        if row.result is None:
            error = {"code": row.status, "message": row.error or f"the job is {row.status}"}
        else:
            message = {"role": "assistant", "content": row.result, "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": used.finish_reason or "stop"}
            counts = {"prompt_tokens": used.input_tokens or 0, "completion_tokens": used.output_tokens or 0}
            usage = counts | {"total_tokens": sum(counts.values())}
            head = {"id": f"chatcmpl-{row.key}", "object": "chat.completion", "created": int(time.time())}
            body = head | {"model": used.model or "", "choices": [choice], "usage": usage}
            response = {"status_code": 200, "request_id": name, "body": body}
        custom_id = str(row.idx if row.custom_id is None else row.custom_id)
        line = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


class MessagesWriter(JsonlWriter):
    """Writes each answer as a chat: the instructions, the prompt and the answer, for fine-tuning. Others are left out."""

    def _encode(self, row: AnswerRow) -> bytes:
        if row.result is None:
            return b""
        prompt = [{"role": "user", "content": row.prompt.text}] if row.prompt.messages is None else row.prompt.messages
        messages = with_instructions(prompt, self._table.instructions)
        line = {"messages": [*messages, {"role": "assistant", "content": row.result}]}
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


class SqliteWriter:
    """Writes rows into the table `answers` of a new SQLite file."""

    def __init__(self, path: Path, table: Table, *, name: str) -> None:
        self._table, self._name = table, name
        names = [one.name.replace('"', '""') for one in table.columns]
        columns = ", ".join(
            f'"{name}" {_SQLITE_TYPES[one.kind]}' for name, one in zip(names, table.columns, strict=True)
        )
        self._insert = f"INSERT INTO answers VALUES ({', '.join('?' * len(table.columns))})"  # noqa: S608 - no names
        self._connection = sqlite3.connect(path, isolation_level=None)
        try:
            with self._errors():
                # No program reads it before it is complete.
                self._connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
                self._connection.execute(f"CREATE TABLE answers ({columns})")
                self._connection.execute("BEGIN")
        except BaseException:
            self._connection.close()
            raise

    def write(self, rows: Iterable[AnswerRow]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        with self._errors():
            self._connection.executemany(self._insert, [self._table.typed_cells(row) for row in rows])

    def close(self) -> None:
        """Commit, and close the file. Raises OutputError."""
        with closing(self._connection), self._errors():
            self._connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(f"cannot write {self._name}: {error}; make room, or write a .csv file") from error


Writer = JsonlWriter | SqliteWriter | frames.ParquetWriter
_SQLITE_TYPES = {Kind.INT: "INTEGER", Kind.FLOAT: "REAL", Kind.BOOL: "BOOLEAN", Kind.TEXT: "TEXT"}


LINE_WRITERS: dict[OutputFormat, type[JsonlWriter]] = {
    OutputFormat.JSONL: JsonlWriter,
    OutputFormat.CSV: CsvWriter,
    OutputFormat.OPENAI: OpenaiWriter,
    OutputFormat.MESSAGES: MessagesWriter,
}
FILE_WRITERS: dict[OutputFormat, type[SqliteWriter | frames.ParquetWriter]] = {
    OutputFormat.PARQUET: frames.ParquetWriter,
    OutputFormat.SQLITE: SqliteWriter,
}
"""What writes each format into a file; the store writes results databases."""


@contextmanager
def open_writer(
    path: str | None,
    format: OutputFormat,  # noqa: A002 - the name of the flag
    *,
    table: Table | None = None,
    style: CsvStyle = PLAIN_CSV,
) -> Iterator[Writer]:
    """Yield a writer into a file, which appears whole if the block succeeds, or into stdout.

    `table` has the columns. Raises OutputError if writing fails; a BrokenPipeError of stdout is passed on.
    """
    if path is None:
        if sys.stdout is None:  # the process was started with stdout closed
            raise OutputError("stdout is closed; name a file with -o")
        with named_errors(STDOUT_NAME):
            sys.stdout.flush()
        lines = LINE_WRITERS[format](sys.stdout.buffer, table, style)
        yield lines
        lines.close()
        return
    with atomic_path(path) as temporary:
        if format in FILE_WRITERS:
            writer: Writer = FILE_WRITERS[format](temporary, table or Table(), name=path)
        else:
            writer = LINE_WRITERS[format](temporary.open("wb", BUFFER_BYTES), table, style, name=path)
        try:
            yield writer
        except BaseException:
            with suppress(Exception):  # it must not hide the first error
                writer.close()
            raise
        writer.close()


@contextmanager
def open_appender(
    path: str | None, samples: int = 1
) -> Iterator[tuple[JsonlWriter, bytearray, tuple[int, str] | None]]:
    """Yield a writer behind the rows of a JSONL file, or into stdout, with a 1 for each row there and the last one's key.

    `samples` is the number of rows per input. A last line that was not written completely is cut off. Raises UsageError for a file with other lines, and
    OutputError if it cannot be written.
    """
    if path is None:
        with open_writer(None, OutputFormat.JSONL) as lines:
            yield lines, bytearray(), None  # type: ignore[misc] # of lines
        return
    with named_errors(path):
        file = _target(path).open("a+b", BUFFER_BYTES)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # else a network file system without such locks
                raise OutputError(f"another process appends to {path}; end it, or name another file") from error
        with named_errors(path):
            written, last = _cut_to_rows(file, path, samples)
        writer = JsonlWriter(file, name=path)
        yield writer, written, last
        writer.close()


def _cut_to_rows(file: IO[bytes], path: str, samples: int) -> tuple[bytearray, tuple[int, str] | None]:
    """Cut off a last line without an end; return which rows a file has, and the place and the key of the last one."""
    written, last, end = bytearray(), None, 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n") and line.startswith(_ROW[: len(line)]):
            file.truncate(end)
            break
        try:
            row = orjson.loads(line)
            last, status = (row["idx"], row["key"]), row["status"]
            place = last[0] * samples + row.get("sample", 0)
            written.extend(bytes(max(0, place + 1 - len(written))))
            written[place] = 1
        except (ValueError, LookupError, TypeError, MemoryError):
            status = None
        if status in {None, "pending", "inflight"}:
            raise UsageError(f"{path}, line {number} is no finished row of a run; name another file")
        end += len(line)
    return written, last


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Raise OutputError, with the path and the reason, for an OSError other than a broken pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write {path}: {reason}; make room, or choose another file with -o") from error


def _target(path: str | Path) -> Path:
    ownership.refuse_foreign_link(a_name("the output", str(path)))
    return Path(os.path.realpath(path))


def _create(target: Path) -> Path:
    """Create an empty file beside the target; hidden, and private if it will replace a file."""
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
    mode = 0o600 if target.exists() else 0o666
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    return temporary


def _publish(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as file:
        if target.exists():
            os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
        os.fsync(file.fileno())
    temporary.replace(target)
    with suppress(OSError):  # some file systems cannot; the file is whole under either name
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _discard(temporary: Path) -> None:
    for suffix in ("", *ownership.COMPANIONS):
        with suppress(OSError):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
