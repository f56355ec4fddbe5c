"""A queue whose file somebody else has written into: how it is built, what is written, and the commands that read it."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import textwrap
import time
import traceback
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import lbr.cli

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

    from tests.support import Cli

SECONDS = 20
"""So long a command may take that reads a hostile file; each of them takes a fraction of one otherwise."""

EXIT_CODES = frozenset({0, 1, 2, 3, 4, 5})
RAW = ("Traceback", "sqlite3.", "sqlalchemy", "sqlalche.me", "pydantic_core", "[SQL:", "validation error for")
"""What nobody is to see: the words of the libraries underneath."""

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r../../\nlbr: all is well {{ 'own' * 3 }}"
HUGE = 3_000_000
VALUES: dict[str, Any] = {
    "text": "garbage",
    "blob": b"\xff\x00\xfe",
    "minus one": -1,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "fraction": 0.5,
    "infinite": float("inf"),
    "infinitely less": float("-inf"),
    "null": None,
    "empty": "",
    "huge": "x" * HUGE,
    "deep": "[" * 50_000,
    "escapes": ESCAPES,
    "no utf-8": b"\xff\xfe",
    "lone surrogate": b"\xed\xa0\x80",
    "nul": "a\0b",
    "formula": "=cmd|' /C calc'!A0",
    "template": "{{ 'own' * 3 }}",
    "path": "../../../../etc/passwd",
    "json": '{"a": 1}',
}

RENDERED = "ownownown"
DEEDS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"})
"""What no file may have a command do."""
AS_TEXT = frozenset({"no utf-8", "lone surrogate"})
"""Bytes that are written as what SQLite takes for text."""

FUNCTIONS = """
    import os
    import signal

    import lbr


    def answer(prompt):
        if prompt == "never":
            raise lbr.Permanent("no answer to this")
        if prompt == "later":
            raise OSError("not now")
        if prompt == "dies" and "MAY_DIE" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return prompt.upper()
"""
FUNCTION = ("--function", "hostile_answers:answer")
MODEL = ("--model", "offline:echo", "--set", "latency=0", "--set", "seed=5")
INPUT = """
    {"prompt": "one", "id": "a", "note": "first", "n": 1}
    {"prompt": "one", "id": "b"}
    {"messages": [{"role": "user", "content": "two"}]}
    {"prompt": "never"}
    {"prompt": "later"}
"""


def build(cli: Cli) -> bytes:
    """Make a queue by the real commands, and return its file.

    It has a run of a function, with jobs that are done, failed, waiting and held by a worker that was killed, and
    one of a model, with price, budget, limits and settings of single jobs, and one that is finished.
    """
    folder = cli.folder
    (folder / "hostile_answers.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / "in.jsonl").write_text(textwrap.dedent(INPUT).lstrip())
    (folder / "more.jsonl").write_text('{"prompt": "dies"}\n')
    (folder / "schema.json").write_text('{"type": "object"}')
    model = (*MODEL, "--price", "in=1,out=2")
    for command in (
        ("enqueue", "in.jsonl", "--run", "f", *FUNCTION),
        ("worker", *FUNCTION, "--until", "empty"),
        ("enqueue", "more.jsonl", "--run", "f", *FUNCTION, "--append"),
        ("enqueue", "in.jsonl", "--run", "m", *model),
        ("worker", "--run", "m", "--max-cost", "5"),
        ("enqueue", "in.jsonl", "--run", "t", "--fresh", *model),
        ("worker", "--run", "t", "--until", "empty"),
        ("retry", "m", "--where", "status=done", "--set", "seed=9"),
        ("worker", "--run", "m", "--until", "empty"),
        ("enqueue", "more.jsonl", "--run", "m", "--append", *model),
        ("enqueue", "in.jsonl", "--run", "s", "--model", "offline:echo", "--schema", "schema.json"),
        ("worker", "--run", "s", "--until", "empty"),
        ("limit", "offline:echo", "--rpm", "1000", "--tpm", "100000"),
    ):
        done = call(command)
        assert done.code in ({0, 4} if command[0] == "worker" else {0}), (command, done)
    assert cli("worker", "--run", "f", *FUNCTION, check=False).returncode == -signal.SIGKILL
    with closing(sqlite3.connect(folder / "runs.db")) as file:
        file.execute("UPDATE jobs SET lease_until = lease_until + 86400000 WHERE state = 'inflight'")
        file.commit()
        file.execute("PRAGMA journal_mode = DELETE")
    return (folder / "runs.db").read_bytes()


def commands(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the commands that read a queue, by name; all that they write is in `folder`."""
    return {
        "status": ("status",),
        "status json": ("status", "--json"),
        "list": ("list",),
        "failures": ("failures", "f"),
        "failures rows": ("failures", "f", "--rows"),
        "compare": ("compare", "t", "s"),
        "show done": ("show", "f", "0"),
        "show id": ("show", "f", "--id", "a"),
        "show failed": ("show", "f", "3"),
        "show json": ("show", "f", "3", "--json"),
        "show priced": ("show", "m", "0"),
        "collect": ("collect", "f"),
        "collect csv": ("collect", "f", "--spreadsheet-safe", "-o", str(folder / "out.csv")),
        "collect db": ("collect", "f", "-o", str(folder / "out.db")),
        "collect unique": ("collect", "m", "--shape", "unique"),
        "worker of the function": ("worker", *FUNCTION, "--until", "empty", "--run", "f"),
        "worker of the model": ("worker", "--run", "m", "--until", "empty"),
        "worker": ("worker", *FUNCTION, "--until", "empty"),
        "retry": ("retry", "f"),
        "retry where": ("retry", "m", "--where", "status=done", "--set", "seed=7"),
        "retry error": ("retry", "f", "--where", "error~no answer", "--where", "family=permanent"),
        "reparse": ("retry", "s", "--reparse"),
        "pause": ("pause", "m"),
        "resume": ("resume", "m", "--max-cost", "7"),
        "cancel": ("cancel", "f"),
        "limit": ("limit",),
        "limit set": ("limit", "offline:echo", "--rpm", "500"),
        "enqueue": ("enqueue", "in.jsonl", "--run", "m", *MODEL),
        "enqueue another": ("enqueue", "in.jsonl", "--run", "n", *FUNCTION),
        "enqueue more": ("enqueue", "more.jsonl", "--run", "m", "--append", *MODEL),
        "run": ("run", "in.jsonl", "-o", str(folder / "out.jsonl"), "--run", "o", "--model", "offline:echo"),
        "doctor": ("doctor",),
        "doctor fix": ("doctor", "--fix"),
        "doctor json": ("doctor", "--json"),
        "move": ("move", "runs.db", str(folder / "moved.db"), "t"),
    }


class _Terminal(io.TextIOWrapper):
    """What a command prints to; where it says that it is a terminal, nothing is taken out on the way."""

    def __init__(self, *, terminal: bool) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", errors="strict", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        self.flush()
        return self._bytes.getvalue().decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended: its exit code, or what it raised, and what it printed."""

    code: int | str
    out: str
    err: str


class Hang(BaseException):
    """A command took too long."""


@contextmanager
def _limited() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(arguments: Sequence[str]) -> Done:
    """Run a command in this process as a terminal would have it."""
    out, err = (_Terminal(terminal=True) for _ in range(2))
    code: int | str
    # On another terminal a view is drawn, which steers it, as it must.
    with redirect_stdout(out), redirect_stderr(err), _limited(), patch.dict(os.environ, TERM="dumb"):
        try:
            lbr.cli.lbr(args=list(arguments), prog_name="lbr")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:  # noqa: BLE001 - whatever it is
            code = traceback.format_exc()
    return Done(code, out.text(), err.text())


def columns_of(data: bytes) -> list[tuple[str, str]]:
    """Return every column of every table in a file, as the file itself has them."""
    with closing(sqlite3.connect(":memory:")) as file:
        file.deserialize(data)
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return [
            (table, column)
            for table in tables
            for _, column, *_ in file.execute(f"PRAGMA table_info({table})").fetchall()
        ]


def poisoned(data: bytes, changes: Sequence[tuple[str, str, str]], random: Random) -> tuple[bytes, int]:
    """Return a file with hostile values in it, and how many it took: what a key or an affinity refuses is left out.

    `changes` are table, column and the value's name. Whether every row gets the value, the first or the last alone is
    drawn from `random`.
    """
    taken = 0
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        file.deserialize(_without_not_null(data) if any(VALUES[v] is None for _, _, v in changes) else data)
        file.execute("PRAGMA ignore_check_constraints = ON")
        file.execute("UPDATE workers SET seen_at = ?", (time.time_ns() // 1_000_000,))
        for table, column, value in changes:
            which = random.choice(["", "LIMIT 1", "DESC LIMIT 1"])
            try:
                key = "rowid"
                file.execute(f"SELECT rowid FROM {table} LIMIT 0")
            except sqlite3.OperationalError:
                key = _key_of(file, table)
            where = f"WHERE ({key}) IN (SELECT {key} FROM {table} ORDER BY 1 {which})" if which else ""
            new = "CAST(? AS TEXT)" if value in AS_TEXT else "?"
            with suppress(sqlite3.Error):
                done = file.execute(f"UPDATE {table} SET {column} = {new} {where}", (VALUES[value],))
                taken += done.rowcount > 0
        return file.serialize(), taken


def _key_of(file: sqlite3.Connection, table: str) -> str:
    found = file.execute(f"PRAGMA table_info({table})").fetchall()
    return ", ".join(name for _, name, _, _, _, place in found if place)


def _without_not_null(data: bytes) -> bytes:
    """Return the file with tables whose columns may all be null."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        file.deserialize(data)
        file.execute("PRAGMA writable_schema = ON")
        file.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE type = 'table'")
        return file.serialize()


def place(folder: Path, data: bytes) -> None:
    """Put a file where the queue is, and remove what commands left beside the one before."""
    for old in (*folder.glob("runs.db*"), *folder.glob("moved.db*"), *folder.glob("out.*")):
        old.unlink()
    shutil.rmtree(folder / "state", ignore_errors=True)
    (folder / "runs.db").write_bytes(data)


def strangers(folder: Path) -> list[str]:
    """Return what is in a folder, or beside it, that neither belongs there nor was named."""
    inputs = ("in.jsonl", "more.jsonl", "schema.json", "hostile_answers.py", "__pycache__")
    known = ("runs.db", "moved.db", "out.", "state", *inputs)
    found = [one.name for one in folder.iterdir() if not one.name.startswith(known)]
    return found + [one.name for one in folder.parent.iterdir() if one != folder]


def changed(data: bytes, *statements: str) -> bytes:
    """Return a file after statements that another program could have run."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        if data:
            file.deserialize(data)
        for statement in statements:
            file.execute(statement)
        return file.serialize()


def complaints(arguments: Sequence[str], done: Done) -> list[str]:
    """Return what is wrong with how a command ended, and with what it printed and wrote."""
    if isinstance(done.code, str):
        return ["hangs" if "Hang" in done.code else done.code]
    both = done.out + done.err
    found = [] if done.code in EXIT_CODES else [f"exit code {done.code}"]
    found += [f"says {word}" for word in RAW if word in both]
    found += ["renders a template"] * (RENDERED in both)
    if done.code in {1, 2} and not done.err.strip():
        found.append("says nothing")
    if "csv" in str(arguments[-1]) and done.code in {0, 3, 4}:
        found += _formulas(Path(arguments[-1]))
    if "--json" in arguments or arguments[0] == "collect":
        return found  # data are given as they are
    return found + [f"prints {c!r} to a terminal" for c in "\x1b\x07\x9b\r" if c in both]


def _formulas(path: Path) -> list[str]:
    csv.field_size_limit(HUGE * 10)
    with path.open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    # A number may begin with its sign: of the values here only minus infinity begins otherwise.
    return [f"has the cell {cell[:50]!r}" for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r", "-i"))]


def lock_folder() -> str:
    """Return where the locks of output files stand."""
    return f"{tempfile.gettempdir()}/lbr-{os.getuid()}"


class Watch:
    """Watches what this process does beyond the queue: programs, connections, files written elsewhere."""

    def __init__(self, *allowed: Path) -> None:
        self.seen: list[str] = []
        self._allowed = tuple(os.path.realpath(one) for one in allowed)
        self._on = True
        sys.addaudithook(self._hear)

    def close(self) -> None:
        """Hear nothing any more: a hook stays for ever."""
        self._on = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in DEEDS:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and _writes(arguments[2]):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path != os.devnull and not path.startswith(self._allowed):
                self.seen.append(f"opens {path} to write")


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
