"""Whatever somebody wrote into the file of a queue, lbr tells it, or goes on: it never breaks down, hangs or obeys."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from lbr.core.errors import DatabaseError
from lbr.store import results_db
from lbr.store.database import open_database
from tests.proofs import hostile
from tests.support import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EXAMPLES = os.environ.get("LBR_TEST_EXAMPLES")
"""So many cases, new ones each time: single values first, with every command. A few, and always the same, if unset."""

FEW_COMMANDS = 2
SLOW = frozenset({"run", "move"})


@dataclass(frozen=True, slots=True)
class Queue:
    """A folder with a complete queue, and its file as lbr made it."""

    folder: Path
    data: bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """Make the queue once."""
    folder = tmp_path_factory.mktemp("hostile") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        yield Queue(folder, hostile.build(Cli(folder, MAY_DIE="1", XDG_STATE_HOME=str(folder / "state"))))
    sys.modules.pop("hostile_answers", None)


@pytest.fixture
def queue(made: Queue, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Return the queue, with the test in its folder."""
    monkeypatch.chdir(made.folder)
    hostile.place(made.folder, made.data)
    return made


def told_of(queue: Queue, data: bytes, names: Sequence[str]) -> tuple[dict[str, hostile.Done], list[str]]:
    """Run commands on a file, one after the other, and return how they ended and all that is wrong with that."""
    hostile.place(queue.folder, data)
    every = hostile.commands(queue.folder)
    done = {name: hostile.call(every[name]) for name in names}
    wrong = [f"{name}: {what}" for name, one in done.items() for what in hostile.complaints(every[name], one)]
    return done, wrong + hostile.strangers(queue.folder)


def cases(queue: Queue, random: Random) -> Iterator[tuple[list[tuple[str, str, str]], list[str]]]:
    """Draw what is written where, and the commands that then read it, in their order."""
    columns = hostile.columns_of(queue.data)
    names = list(hostile.commands(queue.folder))
    if EXAMPLES is None:
        random.shuffle(columns)
        quick = [name for name in names if name not in SLOW]
        cells = [(table, column, random.choice(list(hostile.VALUES))) for table, column in columns]
        for place in range(0, len(cells), 2):
            yield cells[place : place + 2], random.sample(quick, FEW_COMMANDS)
        return
    cells = [(table, column, value) for table, column in columns for value in hostile.VALUES]
    random.shuffle(cells)
    singles = [[cell] for cell in cells[: int(EXAMPLES)]]
    more = [random.sample(cells, random.randint(2, 5)) for _ in range(int(EXAMPLES) - len(singles))]
    for case in singles + more:
        yield case, random.sample(names, len(names))


def test_every_column_may_hold_anything(queue: Queue) -> None:
    """Values of other types, huge, negative, missing, or made to be obeyed: each command ends well or says what is wrong."""
    seed = 11 if EXAMPLES is None else Random().randrange(10**6)
    random = Random(seed)
    wrong: list[str] = []
    files = values = calls = refused = 0
    watch = hostile.Watch(queue.folder, Path(hostile.lock_folder()))
    try:
        for case, names in cases(queue, random):
            data, taken = hostile.poisoned(queue.data, case, random)
            done, found = told_of(queue, data, names)
            wrong += [f"{case}: {what[-2000:]}" for what in found]
            files, values, calls = files + 1, values + taken, calls + len(done)
            refused += sum(one.code == 1 for one in done.values())
    finally:
        watch.close()
    columns = len(hostile.columns_of(queue.data))
    print(
        f"seed {seed}: {columns} columns, {len(hostile.VALUES)} values; {files} files with {values} values, "
        f"{calls} commands, {refused} of them an error in words, {len(wrong)} complaints"
    )
    assert not wrong, "\n\n".join(wrong[:20])
    assert not watch.seen


@pytest.mark.parametrize(
    ("table", "column", "value", "command", "says"),
    [
        (
            "limits",
            "threshold",
            "text",
            "worker of the model",
            "expected threshold of limits to be real, got: text",
        ),
        (
            "limits",
            "slots",
            "infinite",
            "status",
            "expected stored limits of finite numbers for 'offline:echo'",
        ),
        ("results", "output_tokens", "smallest", "doctor fix", "a number in it is so large"),
        (
            "items",
            "job_id",
            "minus one",
            "move",
            "input 0 of run 't' in",
        ),
        ("runs", "name", "no utf-8", "status", "expected text in UTF-8 in a column name, got: other bytes"),
        ("sqlite_sequence", "seq", "text", "enqueue another", "4 new"),
        ("limits", "requests", "fraction", "run", "4 of 4 jobs done"),
        ("prompts", "body", "deep", "collect unique", "expected stored messages to be JSON"),
    ],
)
def test_what_such_a_value_does(queue: Queue, table: str, column: str, value: str, command: str, says: str) -> None:
    """Each is told with its place, not with the statement or the value, however long, or does no harm."""
    told = ""
    for seed in range(8):  # one row or another
        data, _ = hostile.poisoned(queue.data, [(table, column, value)], Random(seed))
        done, wrong = told_of(queue, data, [command])
        assert not wrong
        told = done[command].out + done[command].err
        assert len(told) < 10_000
        if says in told:
            return
    pytest.fail(told)


def test_the_untouched_queue_serves_every_command(queue: Queue) -> None:
    """The commands above do read the queue: without hostile values each of them does its work."""
    for name, arguments in hostile.commands(queue.folder).items():
        done, wrong = told_of(queue, queue.data, [name])
        assert not wrong, (name, wrong)
        expected = {0, 3} if arguments[0] == "collect" else {5} if arguments[0] == "doctor" else {0}
        assert done[name].code in expected, (name, done)


TRIGGER = "CREATE TRIGGER meddle AFTER UPDATE ON jobs BEGIN UPDATE results SET text = 'another'; END"
ENDLESS = (
    "CREATE VIEW results AS WITH RECURSIVE c(job_id) AS (SELECT 1 UNION ALL SELECT job_id + 1 FROM c) "
    "SELECT job_id, 'x' AS text, 'm' AS model, 'stop' AS finish_reason, 1 AS input_tokens, 1 AS output_tokens, "
    "1 AS cost_nanos, 1 AS latency_ms, NULL AS reused_from FROM c"
)
SCHEMA = "UPDATE sqlite_master SET sql = {} WHERE name = 'jobs'"
WRITABLE = "PRAGMA writable_schema = ON"
CALLING = SCHEMA.format("replace(sql, 'CHECK (', 'CHECK (state REGEXP ''(.+)+x'' AND ')")
LBR_FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "a trigger": ((TRIGGER,), "got: one with the trigger 'meddle'"),
    "a view for a table": (("DROP TABLE results", ENDLESS), "got: one with the view 'results'"),
    "a virtual table": (
        ("DROP TABLE workers", "CREATE VIRTUAL TABLE workers USING fts5(id, host)"),
        "got: one with the table 'workers'",
    ),
    "no versions table": (("DROP TABLE schema_version",), "a SQLite file of another program"),
    "a version of another type": (
        (
            "DROP TABLE schema_version",
            "CREATE TABLE schema_version (version, name, applied_at)",
            "INSERT INTO schema_version VALUES ('x', 'x', 1)",
        ),
        "expected version of schema_version to be integer, got: text",
    ),
    "a newer version": (("INSERT INTO schema_version VALUES (99, 'x', 1)",), "a newer lbr wrote it"),
    "a missing table": (("DROP TABLE prompts",), "its tables are not those that lbr makes"),
    "a missing column": (("ALTER TABLE runs DROP COLUMN price",), "its tables are not those that lbr makes"),
    "a check that calls out": ((WRITABLE, CALLING), "cannot use the database"),
    "a broken schema": ((WRITABLE, SCHEMA.format("'nonsense'")), "the file is damaged"),
}
SOME = ("status", "collect", "worker", "enqueue another", "doctor fix", "move")


@pytest.mark.parametrize("name", LBR_FILES)
def test_a_schema_of_another_program(queue: Queue, name: str) -> None:
    """A file whose tables are not lbr's, or that brings statements of its own, is told; nothing of it is run."""
    statements, says = LBR_FILES[name]
    done, wrong = told_of(queue, hostile.changed(queue.data, *statements), SOME)
    assert not wrong
    assert any(says in one.err + one.out for one in done.values()), done
    assert done["worker"].code == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no database", "is not a SQLite database"),
        ("empty", "there is no lbr queue in"),
        ("zeros", "is not a SQLite database"),
        ("only a header", "the file is damaged"),
        ("a half", "the file is damaged"),
        ("another program's", "a SQLite file of another program"),
    ],
)
def test_another_file(queue: Queue, kind: str, says: str) -> None:
    """A file that is no queue is told, and only an enqueue makes one of an empty one."""
    data = {
        "no database": b"hello\n" * 1000,
        "empty": b"",
        "zeros": bytes(8192),
        "only a header": queue.data[:100],
        "a half": queue.data[: len(queue.data) // 2],
        "another program's": hostile.changed(b"", "CREATE TABLE accounts (secret)"),
    }[kind]
    done, wrong = told_of(queue, data, SOME[:3])
    assert not wrong
    assert all(says in one.err and one.code in {1, 2} for one in done.values()), done
    assert (queue.folder / "runs.db").read_bytes() == data


def test_flipped_bytes(queue: Queue) -> None:
    """A file with bytes changed anywhere is told to be damaged, or its values are read as what they are."""
    for seed in (4, 5, 9):
        random, data = Random(seed), bytearray(queue.data)
        for _ in range(random.choice((1, 20, 400))):
            data[random.randrange(100, len(data))] = random.randrange(256)
        _, wrong = told_of(queue, bytes(data), SOME)
        assert not wrong, (seed, wrong)


def test_a_move_into_a_file_with_a_trigger(queue: Queue) -> None:
    """The file that a run is moved into is looked at as well."""
    Path("moved.db").write_bytes(hostile.changed(queue.data, TRIGGER))
    done = hostile.call(("move", "runs.db", "moved.db", "t"))
    assert done.code == 1
    assert "got: one with the trigger 'meddle'" in done.err


def test_views_of_ones_own_may_stay(queue: Queue) -> None:
    """Whoever reads the file by other means may keep views, tables and indexes in it: lbr does not use them."""
    own = (
        "CREATE VIEW failures AS SELECT * FROM jobs WHERE state = 'failed'",
        "CREATE TABLE notes (text)",
        "CREATE INDEX failed_at ON jobs (finished_at)",
    )
    done, wrong = told_of(queue, hostile.changed(queue.data, *own), ["status", "worker"])
    assert not wrong
    assert [one.code for one in done.values()] == [0, 0]


async def test_the_schema_of_a_file_is_not_trusted(queue: Queue) -> None:
    """No connection lets a file's own schema call functions that could do harm."""
    database = await open_database("runs.db")
    for ask in (database.read, database.write):
        found = await ask(lambda connection, _: connection.scalar(text("PRAGMA trusted_schema")))
        assert found == 0
    await database.close()


def test_names_do_not_steer_a_terminal(queue: Queue) -> None:
    """In `lbr status` a name stays on its line, spelled out; in `lbr show` an answer keeps its lines, and no more."""
    evil = "x\x1b[2J\x9b31m\nrun y: finished"
    data = hostile.changed(queue.data)
    with closing(sqlite3.connect(":memory:")) as file:
        file.deserialize(data)
        file.execute("UPDATE runs SET name = ? WHERE name = 's'", (evil,))
        file.execute("UPDATE results SET text = ?", ("one\n\x1b]0;title\x07two\u202e\ttab\r\nend",))
        file.commit()
        hostile.place(queue.folder, file.serialize())
    status = hostile.call(("status",)).out
    assert r"run x\x1b[2J\x9b31m\nrun y: finished (offline:echo): finished" in status.splitlines()
    shown = hostile.call(("show", "f", "0")).out
    assert "\n  one\n  \\u001b]0;title\\u0007two\\u202e\ttab\r\n  end\n" in shown
    # Data are what they are.
    rows = [json.loads(line) for line in hostile.call(("collect", "f")).out.splitlines()]
    assert rows[0]["result"] == "one\n\x1b]0;title\x07two\u202e\ttab\r\nend"


def test_no_cell_is_a_formula(queue: Queue) -> None:
    """Ids, fields and their names, prompts, answers and errors that a spreadsheet would run are made inert."""
    formula = hostile.VALUES["formula"]
    columns = (("items", "custom_id"), ("prompts", "body"), ("results", "text"), ("attempts", "message"))
    with closing(sqlite3.connect(":memory:")) as file:
        file.deserialize(queue.data)
        for table, column in columns:
            file.execute(f"UPDATE {table} SET {column} = ?", (formula,))
        file.execute("UPDATE prompts SET chat = 0")
        file.execute("UPDATE items SET metadata = ?", (json.dumps({formula: formula}),))
        file.commit()
        _, wrong = told_of(queue, file.serialize(), ["collect csv"])
    assert not wrong
    assert Path("out.csv").read_text().count(f"'{formula}") > 12


async def test_a_results_database_of_other_values(tmp_path: Path) -> None:
    """What another program wrote into a results database is told as well."""
    with closing(sqlite3.connect(tmp_path / "r.db")) as file, file:
        file.execute("CREATE TABLE results (run, idx, id, key, prompt, status, result, error, metadata)")
        file.execute("INSERT INTO results VALUES ('r', 0, NULL, 'k', 'p', 'done', 'x', NULL, '{nope')")
    with pytest.raises(DatabaseError, match="expected stored metadata to be JSON"):
        [page async for page in results_db.read_run(str(tmp_path / "r.db"), "r")]
