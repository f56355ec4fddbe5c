"""The doctor finds what is wrong with a queue and what to do about it, and changes nothing without --fix."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url

import lbr
from lbr.api.doctor import Finding, Gravity, examine, has_wal_reset_bug
from lbr.core.errors import UsageError
from lbr.core.types import PauseCause
from lbr.store import counters, files, health, migrations, runs
from lbr.store.database import local_clock, open_database
from lbr.store.settle import settle
from lbr.worker import kept_answers
from tests.support import ROOT, Cli, Queue, answered, assert_counted, is_postgresql, postgres, put

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lbr.core.types import Millis
    from lbr.store.database import Database
    from tests.support import Clock

GRAVE = 5
HOUR_MS = 3_600_000


def change(db_url: str, *statements: str) -> None:
    """Change a queue behind lbr's back."""
    if is_postgresql(db_url):
        with postgres.connect(db_url, options="-c search_path=lbr") as server:
            for statement in statements:
                server.execute(statement)
        return
    with closing(sqlite3.connect(str(make_url(db_url).database), timeout=30, isolation_level=None)) as file:
        for statement in statements:
            file.execute(statement)


async def examined(db_url: str, clock: Callable[[], Millis] | None = None, **options: Any) -> dict[str, list[Finding]]:
    """Return the findings by their check."""
    return by_check(await examine(db_url, clock=clock, **options))


def by_check(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Return findings by their check."""
    grouped: dict[str, list[Finding]] = {}
    for one in found:
        assert one.gravity in {Gravity.OK, Gravity.NOTE} or one.do, f"nothing to do about {one}"
        grouped.setdefault(one.check, []).append(one)
    return grouped


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the findings that `lbr doctor --json` printed, by their check."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        one = json.loads(line)
        assert set(one) == {"check", "gravity", "found", "do"}
        grouped.setdefault(one["check"], []).append(one)
    return grouped


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the names of a folder's files with their digests and modes; -shm is SQLite's scratch pad."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), stat.S_IMODE(path.stat().st_mode))
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith("-shm")
    }


async def make(path: Path, prompts: int = 3, **options: Any) -> None:
    """Make a queue in a file, with a run of a number of prompts, and close it."""
    database = await open_database(str(path), create=True, **options)
    await put(database, [f"p{n}" for n in range(prompts)])
    await database.close()


def overwrite_page(path: Path, table: str) -> bytes:
    """Damage the first page of a table, and return the file's bytes."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as file:
        (page,) = file.execute(f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'").fetchone()
    data = bytearray(path.read_bytes())
    data[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(data)
    return bytes(data)


async def test_nothing_is_wrong_with_a_sound_queue(database: Database, db_url: str, clock: Clock) -> None:
    """A queue in use has no finding above a note, except for the tests' own server."""
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    await database.write(settle, [answered(one) for one in await queue.claim(worker, [run.id], 1, lease=60)])
    found = await examined(db_url, clock)
    grave = {check for check, those in found.items() if any(one.is_grave for one in those)}
    assert grave <= ({"settings", "machine's clock"} if is_postgresql(db_url) else set())
    checks = {"schema", "leases", "counters", "runs"}
    checks |= (
        {"server", "settings", "machine's clock"}
        if is_postgresql(db_url)
        else {"sqlite", "file system", "mode", "disk", "wal", "integrity"}
    )
    assert checks <= set(found)
    if not is_postgresql(db_url):
        assert sqlite3.sqlite_version in found["sqlite"][0].found


async def test_expired_leases_are_found(database: Database, db_url: str, clock: Clock) -> None:
    """An expired lease is a note while a worker can take the job over, and a warning if none reports."""
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    await queue.claim(worker, [run.id], 2, lease=5)
    assert [one.gravity for one in (await examined(db_url, clock))["leases"]] == [Gravity.OK]
    clock.forward(10)
    (one,) = (await examined(db_url, clock))["leases"]
    assert (one.gravity, one.found) == (
        Gravity.NOTE,
        "2 leases expired, the oldest 5.0 s ago; 1 of 1 worker reported recently",
    )
    clock.forward(100)
    (one,) = (await examined(db_url, clock))["leases"]
    assert one.gravity is Gravity.WARNING
    assert "; 0 of 1 worker reported recently" in one.found
    assert one.do == "start `lbr worker`: it takes the jobs over"
    await queue.reclaim()
    assert [one.gravity for one in (await examined(db_url, clock))["leases"]] == [Gravity.OK]


async def test_paused_and_unsealed_runs_are_found(database: Database, db_url: str, clock: Clock) -> None:
    """Runs that wait for the user are named, each with the command that lets it go on."""
    by_hand, broke, spent = [await put(database, ["a"], name=name) for name in ("hand", "broke", "spent")]
    await database.write(runs.pause, by_hand, "manually")
    await database.write(runs.pause, broke, "Pause: the licence has expired", cause=PauseCause.ACCOUNT)
    await database.write(runs.pause, spent, "it may cost $1", cause=PauseCause.BUDGET)
    change(db_url, "UPDATE runs SET sealed_at = NULL WHERE name = 'hand'")
    clock.forward(600)
    hints = [(one.gravity, one.do or "") for one in (await examined(db_url, clock))["runs"]]
    assert hints == [
        (
            Gravity.WARNING,
            "run the same enqueue again: it adds what is missing; with --append, check first what is there",
        ),
        (Gravity.NOTE, "`lbr resume hand` lets it go on"),
        (Gravity.WARNING, "fix it, then `lbr resume broke`"),
        (Gravity.WARNING, "`lbr resume spent --max-cost DOLLARS` lets it cost more"),
    ]
    change(db_url, f"UPDATE runs SET enqueued_at = {clock() - 1_000}")
    assert (await examined(db_url, clock))["runs"][0].gravity is Gravity.NOTE
    for run in (by_hand, broke, spent):
        await runs.cancel(database, run)
    (one,) = (await examined(db_url, clock))["runs"]
    assert (one.gravity, one.found) == (Gravity.OK, "none is paused or still being enqueued")


async def test_keys_are_looked_for_and_never_shown(
    database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For each open run the doctor reports whether its key is set, in the environment or .env, and never shows it."""
    await lbr.enqueue(["a"], run="m", model="openai-chat:gpt-4o-mini", db_url=db_url)
    await lbr.enqueue(["a"], run="f", function="os.path:basename", db_url=db_url)
    await lbr.enqueue(["a"], run="e", model="offline:echo", db_url=db_url)
    model, function, offline = by_check(await lbr.doctor(db_url=db_url))["keys"]
    assert model.gravity is Gravity.WARNING
    assert "OPENAI_API_KEY" in f"{model.found} {model.do}"
    assert (function.gravity, offline.gravity) == (Gravity.OK, Gravity.OK)
    assert "--function posixpath:basename" in function.found
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    (model, *_) = found = by_check(await lbr.doctor(db_url=db_url))["keys"]
    assert model.gravity is Gravity.OK
    assert "secret" not in str(found)
    monkeypatch.setattr(os, "environ", {n: v for n, v in os.environ.items() if n != "OPENAI_API_KEY"})
    cli = Cli(tmp_path, db_url=db_url)
    assert printed(cli("doctor", "--json", check=False))["keys"][0]["gravity"] == "warning"
    (tmp_path / ".env").write_text("OPENAI_API_KEY=sk-very-secret\n")
    done = cli("doctor", check=False)
    assert "nothing is missing for openai-chat:gpt-4o-mini" in done.stdout
    assert "secret" not in done.stdout + done.stderr


async def test_kept_answers_are_found(
    database: Database, db_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Answers in a file are counted, with the command that writes them into the database."""
    run = await put(database, ["a", "b"])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=2)
    claims = await queue.claim(worker, [run.id], 2, lease=60)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    database.spool_places = health.open_unchanged(db_url).spool_places
    path = kept_answers.keep(database, [answered(claim) for claim in claims])
    (waiting,) = by_check(await lbr.doctor(db_url=db_url))["kept answers"]
    assert waiting.found == f"2 finished answers in {path} are not in the database yet"
    assert waiting.gravity is Gravity.WARNING
    await kept_answers.settle_kept(database, lambda _: None)
    assert "kept answers" not in by_check(await lbr.doctor(db_url=db_url))


@pytest.mark.slow
def test_counters_are_fixed_while_workers_go_on(cli: Cli, tmp_path: Path) -> None:
    """Counters that another program changed are found and fixed while workers go on, and the run finishes."""
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(400)))
    cli("enqueue", "in.txt", "--run", "r", "--model", "offline:echo", "--set", "latency=0.15")
    workers = [cli.start("worker", "--concurrency", "4") for _ in range(2)]
    cli.wait_for("r", "done", 50)
    db_url = cli.outside_url
    change(
        db_url,
        "UPDATE counters SET value = value + 7 WHERE name = 'pending'",
        "UPDATE counters SET value = value - 5 WHERE name = 'input_tokens'",
    )
    looked = cli("doctor", "--json", check=False)
    assert looked.returncode == GRAVE
    (counters,) = printed(looked)["counters"]
    assert counters["gravity"] == "error"
    assert counters["do"] == "`lbr doctor --fix` fixes them, while workers go on"
    fixed, sound = [printed(cli("doctor", *flags, "--json", check=False))["counters"] for flags in (["--fix"], [])]
    assert [one["gravity"] for one in fixed] == ["note"]
    assert fixed[0]["found"].startswith("differed and are fixed: run r: input_tokens")
    assert [one["gravity"] for one in sound] == ["ok"]
    assert cli.query("SELECT count(*) FROM jobs WHERE state = 'done'")[0][0] < 400, "the workers were done too soon"
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert [row["result"] for row in cli.collect("r")] == [f"p{n}" for n in range(400)]
    assert printed(cli("doctor", "--json", check=False))["counters"][0]["gravity"] == "ok"
    status = cli.status("r")
    assert (status["done"], status["pending"], status["input_tokens"]) == (400, 0, 400)


async def test_two_fixes_at_once_fix_once(database: Database, db_url: str, clock: Clock) -> None:
    """A difference is added once, however many doctors see it at the same time."""
    run = await put(database, [f"p{n}" for n in range(50)])
    others = [await open_database(db_url, clock=clock) for _ in range(3)]
    change(
        db_url,
        "UPDATE counters SET value = value + 11 WHERE name = 'pending'",
        "DELETE FROM counters WHERE name = 'reused'",
        f"INSERT INTO counters (run_id, name, shard, value) VALUES ({run.id}, 'inflight', 0, -3)",
    )
    found = await asyncio.gather(*(one.write(counters.fix) for one in others))
    assert sorted(len(drifts) for drifts in found) == [0, 0, 2]
    await assert_counted(database, run)
    for one in others:
        await one.close()


@pytest.mark.slow
async def test_a_fix_keeps_what_is_counted_meanwhile(database: Database, db_url: str, clock: Clock) -> None:
    """Settlements that are written during a fix are counted, neither lost nor counted twice."""
    run = await put(database, [f"p{n}" for n in range(300)])
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=300)
    claims = await queue.claim(worker, [run.id], 300, lease=60)
    doctor = await open_database(db_url, clock=clock)
    change(db_url, "UPDATE counters SET value = value + 11 WHERE name = 'done' OR name = 'inflight'")

    async def work() -> None:
        for claim in claims:
            await database.write(settle, [answered(claim)])

    working = asyncio.create_task(work())
    while not working.done():
        await doctor.write(counters.fix)
    await working
    await assert_counted(database, run)
    await doctor.close()


def test_missing_database_is_found(cli: Cli, new_database: Callable[[], str]) -> None:
    """A missing queue is a finding with the command that creates it, and nothing is created."""
    if is_postgresql(cli.outside_url):
        cli = Cli(cli.folder, db_url=new_database())
    done = cli("doctor", check=False)
    assert done.returncode == GRAVE
    assert "`lbr enqueue`" in done.stdout
    done = cli("doctor", "--fix", "--json", check=False)
    assert done.returncode == GRAVE
    if not is_postgresql(cli.outside_url):
        assert list(cli.folder.glob("queue.db*")) == []
        (found,) = printed(done)["database"]
        assert (found["found"].endswith("got: no such file"), found["do"]) == (True, "`lbr enqueue` creates it")
    else:
        assert printed(done)["schema"][0]["found"] == "no lbr queue here yet"


async def test_newer_and_older_schemas_are_found(database: Database, db_url: str, clock: Clock) -> None:
    """A queue of a newer lbr is an error and one of an older a note; neither is read further or upgraded."""
    await put(database, ["a"])
    change(db_url, "INSERT INTO schema_version (version, name, applied_at) VALUES (99, 'future', 0)")
    found = by_check(await lbr.doctor(fix=True, db_url=db_url))
    assert found["schema"][0].gravity is Gravity.ERROR
    assert "version 99, of a newer lbr" in found["schema"][0].found
    assert "counters" not in found
    change(db_url, f"DELETE FROM schema_version WHERE version >= {migrations.LATEST}")
    found = by_check(await lbr.doctor(db_url=db_url))
    assert found["schema"][0].gravity is Gravity.NOTE
    assert "counters" not in found
    assert f"version {migrations.LATEST - 1}, of an older lbr" in (await examined(db_url))["schema"][0].found


async def test_a_bad_task_does_not_hide_other_findings(database: Database, db_url: str, tmp_path: Path) -> None:
    """A stored task that cannot be read is an error among the other findings."""
    await put(database, ["a"])
    character = "chr" if is_postgresql(db_url) else "char"
    change(db_url, f"UPDATE runs SET task = 'nonsense' || {character}(27) || '[31m', pause_message = '...'")
    done = Cli(tmp_path, db_url=db_url)("doctor", check=False)
    assert done.returncode == GRAVE
    assert "runs: cannot be read: cannot read run 'r': expected a stored task, got: 'nonsense" in done.stdout
    assert "counters: agree with a recount" in done.stdout
    assert "\x1b" not in done.stdout


def test_words_of_the_command(cli: Cli, tmp_path: Path) -> None:
    """Findings go to stdout with what to do below them, their number to stderr; the exit code shows grave ones."""
    (tmp_path / "in.txt").write_text("a\n")
    cli("enqueue", "in.txt", "--run", "r", "--model", "offline:echo")
    cli("pause", "r", "--reason", "the moon")
    change(cli.outside_url, "UPDATE runs SET pause_cause = 'account'")
    done = cli("doctor", check=False)
    assert done.returncode == GRAVE
    assert (
        "warning  runs: run r: paused with 1 job to do: the moon\n         fix it, then `lbr resume r`\n" in done.stdout
    )
    assert "warning" in done.stderr
    assert json.loads(cli("doctor", "--json", check=False).stdout.splitlines()[0])["check"]


async def test_bad_urls_are_usage_errors() -> None:
    """A URL of another kind is a usage error, as in every command."""
    with pytest.raises(UsageError, match="a mysql URL"):
        await lbr.doctor(db_url="mysql://me:secret@host/db")


# Only on SQLite.


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("3.40.1", True),
        ("3.44.5", True),
        ("3.44.6", False),
        ("3.45.0", True),
        ("3.50.6", True),
        ("3.50.7", False),
        ("3.51.0", True),
        ("3.51.2", True),
        ("3.51.3", False),
        ("3.52.0", True),
        ("3.53.1", False),
    ],
)
def test_versions_with_the_wal_reset_bug_are_known(version: str, has: bool) -> None:
    """The versions with the bug are those that SQLite names."""
    assert has_wal_reset_bug(version) == has


async def test_open_files_are_found(tmp_path: Path) -> None:
    """A database that others may read is a warning, and so are SQLite's files beside it."""
    path = tmp_path / "q.db"
    await make(path)
    path.chmod(0o644)
    (one,) = (await examined(str(path)))["mode"]
    assert one.gravity is Gravity.WARNING
    assert (one.found, one.do) == (
        "others can read or write prompts and answers: q.db 0644",
        f"chmod 600 {path}",
    )
    path.chmod(0o600)
    database = await open_database(str(path))
    await database.changed()
    Path(f"{path}-wal").chmod(0o640)
    (one,) = (await examined(str(path)))["mode"]
    assert one.found.endswith("q.db-wal 0640")
    await database.close()


async def test_a_large_wal_is_found(tmp_path: Path) -> None:
    """A WAL that a reader keeps from shrinking is a warning, with the command that finds the reader."""
    path = tmp_path / "q.db"
    await make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA synchronous = OFF")
        other.execute("PRAGMA wal_autocheckpoint = 0")
        for size, gravity in ((40_000_000, Gravity.OK), (100_000_000, Gravity.WARNING)):
            other.execute("CREATE TABLE IF NOT EXISTS filling (body BLOB)")
            other.execute(f"INSERT INTO filling VALUES (zeroblob({size}))")
            (one,) = (await examined(str(path)))["wal"]
            assert one.gravity is gravity
        assert one.do is not None
        assert f"fuser {path}" in one.do
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert [one.gravity for one in (await examined(str(path)))["wal"]] == [Gravity.OK]


async def test_little_disk_space_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 100 MiB of free disk space is a warning."""
    await make(tmp_path / "q.db")
    usage = shutil.disk_usage(tmp_path)
    for free, gravity in ((200, Gravity.OK), (20, Gravity.WARNING)):
        there = usage._replace(free=free * 1024 * 1024)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, there=there: there)
        (one,) = (await examined(str(tmp_path / "q.db")))["disk"]
        assert (one.gravity, one.found.startswith(f"{free} MiB are free")) == (gravity, True)


async def test_damaged_pages_are_found(tmp_path: Path) -> None:
    """An overwritten page is found; the parts that can be read are reported, the others are errors of their own."""
    path = tmp_path / "q.db"
    await make(path, 500)
    overwrite_page(path, "jobs")
    found = await examined(str(path))
    (one,) = found["integrity"]
    assert one.gravity is Gravity.ERROR
    assert one.found.startswith("the file is damaged:")
    assert f"sqlite3 {path} .recover" in (one.do or "")
    assert found["counters"][0].found.startswith("cannot be read: cannot use the database")
    assert found["runs"][0].gravity is Gravity.OK
    before = contents(tmp_path)
    done = Cli(tmp_path, db_url=f"sqlite:///{path}")("doctor", "--fix", check=False)
    assert done.returncode == GRAVE
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("text", "the file is not a SQLite database"),
        ("first page", "the file is damaged"),
        ("cut", "the file is damaged"),
        ("empty", "no lbr queue here yet"),
        ("foreign", "a SQLite file of another program, with tables t"),
        ("folder", "got a directory"),
        ("no folder", "expected a folder for the database"),
    ],
)
async def test_other_files_are_found(tmp_path: Path, what: str, words: str) -> None:
    """A file that is no database, is damaged from its start, or is another program's is found, and left as it is."""
    path = tmp_path / "q.db"
    await make(path, 100)
    data = path.read_bytes()
    path.unlink()
    match what:
        case "text":
            path.write_text("some text that is longer than the header of a database, which has a hundred bytes " * 9)
        case "first page":
            path.write_bytes(data[:100] + b"\xff" * 3_996 + data[4_096:])
        case "cut":
            path.write_bytes(data[:20_000])
        case "empty":
            path.touch()
        case "foreign":
            with closing(sqlite3.connect(path)) as file:
                file.execute("CREATE TABLE t (x)")
        case "folder":
            path.mkdir()
        case "no folder":
            path = tmp_path / "nowhere" / "q.db"
    before = contents(tmp_path)
    found = await lbr.doctor(fix=True, db_url=str(path))
    assert any(one.is_grave and words in one.found for one in found), found
    assert contents(tmp_path) == before


def crash(path: Path) -> None:
    """Make a queue of a paused run of two jobs in a process that is killed: its WAL stays."""
    program = (
        "import asyncio, os, sys\n"
        "from lbr.store.database import open_database\n"
        "from lbr.store import runs\n"
        "from tests.support import put\n"
        "async def main():\n"
        "    database = await open_database(sys.argv[1], create=True)\n"
        "    await database.write(runs.pause, await put(database, ['a', 'b'], name='left'), 'x')\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)


async def test_nothing_is_changed_after_a_crash(tmp_path: Path) -> None:
    """The WAL that a killed process left stays as it is, byte by byte, and its contents are seen."""
    path = tmp_path / "q.db"
    crash(path)
    before = contents(tmp_path)
    assert before.keys() >= {"q.db", "q.db-wal"}
    (one,) = (await examined(str(path)))["runs"]
    assert contents(tmp_path) == before
    assert one.found == "run left: paused with 2 jobs to do: x"
    # The same without the WAL's index, as after the machine has crashed.
    Path(f"{path}-shm").unlink()
    await examined(str(path))
    assert contents(tmp_path) == before


async def test_nothing_is_left_beside_an_idle_queue(tmp_path: Path) -> None:
    """Examining a queue that no process uses makes no file and changes none."""
    path = tmp_path / "q.db"
    await make(path)
    before, names = contents(tmp_path), sorted(one.name for one in tmp_path.iterdir())
    await lbr.doctor(db_url=str(path))
    assert contents(tmp_path) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == names


async def test_read_only_files_are_found(mortal_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that this user may only read is examined, with the warning that their workers cannot use it."""
    monkeypatch.chdir(mortal_folder)
    path = mortal_folder / "q.db"
    await make(path)
    assert "writable" not in await examined(str(path))
    lock = path.with_name("q.db.checkpoint.lock")  # as an `lbr` under `sudo` leaves it
    lock.touch()
    lock.chmod(0o000)
    assert f"you may not write {lock}:" in (await examined(str(path)))["writable"][0].found
    lock.unlink()
    path.chmod(0o400)
    mortal_folder.chmod(0o500)
    found = await examined(str(path))
    assert found["writable"][0].gravity is Gravity.WARNING
    assert [one.gravity for one in found["counters"]] == [Gravity.OK]
    mortal_folder.chmod(0o700)
    path.chmod(0o600)
    change(f"sqlite:///{path}", "UPDATE counters SET value = 9 WHERE name = 'pending'")
    path.chmod(0o400)
    fixed = by_check(await lbr.doctor(fix=True, db_url=str(path)))
    assert "read-only" in fixed["fix"][0].found
    assert [one.gravity for one in fixed["counters"]] == [Gravity.ERROR]
    path.chmod(0o000)
    (one,) = (await examined(str(path)))["database"]
    assert "permission" in f"{one.found} {one.do}"


async def test_network_file_systems_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database on a network file system is not opened, and the ways out are named; --allow-network-fs examines it."""
    path = tmp_path / "q.db"
    await make(path)
    mounts = tmp_path / "mounts"
    mounts.write_text("22 1 8:1 / / rw - fuse.sshfs server:/x rw\n")
    monkeypatch.setattr(files, "MOUNTS", mounts)
    found = await examined(str(path))
    (one,) = found["file system"]
    assert one.gravity is Gravity.ERROR
    assert "a network file system (fuse.sshfs)" in one.found
    assert "PostgreSQL" in (one.do or "")
    assert "counters" not in found
    found = await examined(str(tmp_path / "new.db"))
    assert [found[check][0].gravity for check in ("database", "file system")] == [Gravity.ERROR] * 2
    found = await examined(str(path), allow_network_fs=True)
    assert (found["file system"][0].gravity, found["counters"][0].gravity) == (Gravity.WARNING, Gravity.OK)


async def test_a_damaged_file_is_not_fixed(tmp_path: Path) -> None:
    """Counters in a file that is damaged elsewhere are left as they are, with a finding."""
    path = tmp_path / "q.db"
    await make(path, 100)
    change(f"sqlite:///{path}", "UPDATE counters SET value = 9 WHERE name = 'pending'")
    data = overwrite_page(path, "items")
    found = by_check(await lbr.doctor(fix=True, db_url=str(path)))
    assert found["counters"][0].gravity is Gravity.ERROR
    assert "in a damaged file are not fixed" in found["fix"][0].found
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["what?mode=rw#x.db", "100%25.db"])
async def test_files_with_odd_names_are_examined(tmp_path: Path, name: str) -> None:
    """Characters with a meaning in a URI have none in a file's name."""
    await make(tmp_path / name)
    assert [one.gravity for one in (await examined(str(tmp_path / name)))["counters"]] == [Gravity.OK]
    assert sorted(path.name for path in tmp_path.glob("*") if not path.name.endswith(".lock")) == [name]


@pytest.mark.parametrize("shared", [True, False])
async def test_a_wal_in_a_folder_that_cannot_be_written_is_read(mortal_folder: Path, shared: bool) -> None:
    """In a read-only folder the WAL that a crash left is read, or the finding says why it cannot be."""
    path = mortal_folder / "q.db"
    database = await open_database(str(path), create=True)
    await database.write(runs.pause, await put(database, ["a", "b"]), "x")
    for suffix in ("", "-wal", "-shm") if shared else ("", "-wal"):
        (mortal_folder / f"left.db{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    await database.close()
    mortal_folder.chmod(0o500)
    found = await examined(str(mortal_folder / "left.db"))
    if shared:
        assert found["runs"][0].found == "run r: paused with 2 jobs to do: x"
    else:
        assert "check the path and the permissions of the file and its folder" in (found["database"][0].do or "")


async def test_a_queue_that_is_locked_is_examined(tmp_path: Path) -> None:
    """A program that holds the write lock does not keep the doctor from examining the queue."""
    path = tmp_path / "q.db"
    await make(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        found = await examined(str(path))
        assert [one.gravity for one in found["counters"]] == [Gravity.OK]


# Only on PostgreSQL.


async def test_settings_of_the_server_are_found(own_server: postgres.Server) -> None:
    """A server that does not wait for its disk, or does not vacuum, is found; with its defaults nothing is wrong."""
    url = own_server.url()
    database = await open_database(url, create=True)
    await put(database, ["a"])
    found = await examined(url)
    assert found["settings"][0].found.startswith("fsync = off: a crash of the server can damage the database; full_")
    for name, value in (("fsync", "on"), ("full_page_writes", "on"), ("autovacuum", "off")):
        postgres.execute(url, f"ALTER SYSTEM SET {name} = {value}")
    postgres.execute(url, "ALTER ROLE postgres SET synchronous_commit = off")
    own_server.restart()
    found = await examined(url)
    assert found["settings"][0].gravity is Gravity.WARNING
    assert [part.partition(":")[0] for part in found["settings"][0].found.split("; ")] == [
        "synchronous_commit = off",
        "autovacuum = off",
    ]
    assert (found["settings"][0].do or "").startswith("set synchronous_commit = on, autovacuum = on, for")
    postgres.execute(url, "ALTER ROLE postgres RESET synchronous_commit")
    postgres.execute(url, "ALTER SYSTEM RESET autovacuum")
    own_server.restart()
    done = Cli(own_server.folder, db_url=url)("doctor")
    assert done.returncode == 0, done.stdout
    await database.close()
    own_server.stop()
    late = Cli(own_server.folder, db_url=url)
    late.constants["lbr.store.health.PATIENCE"] = 0.5
    done = late("doctor", check=False)
    assert done.returncode == GRAVE
    assert "cannot reach the database" in done.stdout


async def test_other_states_of_a_server(new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is too old, a standby, a clock that differs: each has its own finding."""
    url = new_database()
    server = health.open_unchanged(url)
    seen = await server.read(health.server_facts, local_clock())
    await server.close()
    assert int(seen.settings["server_version_num"]) >= 140_000
    assert abs(seen.clock_ms) <= 1_000
    old = {"server_version": "13.1", "server_version_num": "130001"}
    for change_, check, gravity, words in (
        (
            {"settings": seen.settings | old},
            "server",
            Gravity.ERROR,
            "PostgreSQL 13.1, which is older than 14",
        ),
        (
            {"settings": seen.settings | {"standby": "true"}},
            "server",
            Gravity.ERROR,
            "a standby: nothing can",
        ),
        ({"clock_ms": 1_500}, "machine's clock", Gravity.OK, "agrees with the server's"),
        ({"clock_ms": -7_000}, "machine's clock", Gravity.NOTE, "7.0 s behind the server's"),
        ({"clock_ms": 2 * HOUR_MS}, "machine's clock", Gravity.WARNING, "ahead of the server's"),
    ):
        facts = replace(seen, **change_)
        monkeypatch.setattr(health, "server_facts", lambda *_, facts=facts: facts)
        (one,) = (await examined(url))[check]
        assert one.gravity is gravity
        assert words in one.found


async def test_a_pooler_without_a_timeout_is_found(new_database: Callable[[], str]) -> None:
    """Behind a pooler, where lbr sends no settings, the missing timeout of silent transactions is a warning."""
    url = new_database()
    await (await open_database(url, create=True)).close()
    pooled = f"{url}{'&' if '?' in url else '?'}pgbouncer=true"
    timeout = "idle_in_transaction_session_timeout"
    assert f"{timeout} = 0: behind a pooler" in (await examined(pooled))["settings"][0].found
    postgres.execute(url, f"ALTER DATABASE {make_url(url).database} SET {timeout} = '20s'")
    assert timeout not in (await examined(pooled))["settings"][0].found
