"""Two users in one folder where everyone may put files, as in /tmp: what one plants, the other's lbr does not use."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lbr.core.types import Claim, JobId, KeyMaker, Prompt, RunId, Task
from lbr.store.database import open_database
from lbr.worker import kept_answers
from tests.support import Cli, answered, is_postgresql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.store.database import Database

ALICE, MALLORY = 54321, 65534
PROMPTS = ["one", "two", "three"]
FUNCTION = ("--function", "answers:shout")
ANSWERS = """
def shout(text):
    with open("called.txt", "a") as file:
        file.write(text + "\\n")
    return text.upper()
"""
PRECIOUS = "Alice's\n"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can be two users, by setpriv"
    ),
]


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder with the sticky bit, in which Alice has her files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # tmp_path is closed to other users
        Path(name).chmod(0o755)
        folder = Path(name, "shared")
        folder.mkdir()
        lay_out(folder)
        yield folder


def lay_out(folder: Path) -> None:
    """Let everyone put files into a folder that holds what Alice needs."""
    folder.chmod(0o1777)
    for name, text in (
        ("in.txt", "\n".join(PROMPTS) + "\n"),
        ("answers.py", ANSWERS),
        ("precious.txt", PRECIOUS),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
        os.chown(folder / name, ALICE, ALICE)
    for name in ("state", "state/lbr"):  # where kept answers go if the database is on a server
        (folder / name).mkdir()
        (folder / name).chmod(0o1777)


@pytest.fixture
def alice(shared: Path, db_url: str) -> Iterator[Cli]:
    """Return a driver of Alice's commands. She may read root's Python, and is no more than herself otherwise."""
    caps = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    prefix = ("setpriv", f"--reuid={ALICE}", f"--regid={ALICE}", "--clear-groups", *caps)
    url = db_url if is_postgresql(db_url) else f"sqlite:///{shared / 'queue.db'}"
    (private := shared.parent / "alice").mkdir(mode=0o700)
    os.chown(private, ALICE, ALICE)
    driver = Cli(shared, db_url=url, prefix=prefix, XDG_STATE_HOME=str(shared / "state"), TMPDIR=str(private))
    yield driver
    driver.stop_all()


def by_mallory(path: Path, mode: int = 0o666) -> Path:
    """Give a file to Mallory."""
    if not path.is_symlink():
        path.chmod(mode)
    os.lchown(path, MALLORY, MALLORY)
    return path


def plant(database: Database, folder: Path) -> list[Path]:
    """Put beside the queue, as Mallory, whatever a worker might take for its own."""
    maker = KeyMaker(Task(function="answers:shout"))
    planted = []
    for place in database.spool_places:
        place.parent.mkdir(exist_ok=True)
        for number, prompt in enumerate(map(Prompt, PROMPTS), 1):
            claim = Claim(JobId(number), RunId(1), 9, 0, 0, prompt, maker.key(prompt))
            path = kept_answers.keep(database, [answered(claim, "forged")])
            forged = place.with_name(f"{place.name}.{number}-0000000f{kept_answers.ENDING}")
            planted.append(by_mallory(path.rename(forged), 0o644))
        pipe = place.with_name(f"{place.name}.4-0000000f{kept_answers.ENDING}")
        os.mkfifo(pipe)
        links = [
            place.with_name(f"{place.name}.{name}")
            for name in ("5-0000000f.spool.jsonl", "1-0000000f.spool.jsonl.lock", "checkpoint.lock")
        ]
        links += [place.with_name(f"{place.name}.worker-{number}.lock") for number in (1, 2)]
        part = place.with_name(f".{place.name}.6-0000000f.spool.jsonl.0123abcd.part")
        for link in (*links, part):
            link.symlink_to(folder / "precious.txt")
        held = place.with_name(f"{place.name}.worker-3.lock")
        held.write_text("1\n")
        planted += [by_mallory(path) for path in (pipe, *links, part, held)]
    return planted


async def test_planted_files_forge_nothing_and_hold_nothing_up(alice: Cli, shared: Path) -> None:
    """Forged answers are not taken, pipes are not waited for, and nothing is written through links."""
    alice("enqueue", "in.txt", *FUNCTION)
    for path in shared.glob("queue.db*"):
        os.chown(path, 0, 0)
    database = await open_database(alice.outside_url)
    database.spool_places = (
        [shared / "state" / "lbr" / database.spool_places[0].name]
        if is_postgresql(alice.outside_url)
        else [shared / "queue.db"]
    )
    planted = plant(database, shared)
    await database.close()
    for path in shared.glob("queue.db*"):
        if path.is_file() and path.lstat().st_uid == 0:  # this process's own look
            os.chown(path, ALICE, ALICE)
    found = [(path.lstat().st_ino, path.lstat().st_mtime_ns) for path in planted]

    said = alice("worker", *FUNCTION).stderr
    assert said.count("not a regular file of yours alone") >= 4
    rows = alice.collect("in")
    assert [row["result"] for row in rows] == [prompt.upper() for prompt in PROMPTS]
    assert sorted((shared / "called.txt").read_text().split()) == sorted(PROMPTS)
    assert (shared / "precious.txt").read_text() == PRECIOUS
    assert [(path.lstat().st_ino, path.lstat().st_mtime_ns) for path in planted] == found


def test_planted_outputs_are_refused(alice: Cli, shared: Path) -> None:
    """An output that is another user's link is refused; her own is not."""
    alice("enqueue", "in.txt", *FUNCTION)
    alice("worker", *FUNCTION)
    for name in ("out.jsonl", "out.db"):
        (shared / name).symlink_to("precious.txt")
        by_mallory(shared / name)
        (shared / f"to-{name}").symlink_to(name)
        os.lchown(shared / f"to-{name}", ALICE, ALICE)
        for out in (name, f"to-{name}"):
            refused = alice("collect", "in", "-o", out, check=False)
            assert refused.returncode == 2
            assert "got: a link of another user" in refused.stderr
    (shared / "mine.jsonl").symlink_to("precious.txt")
    os.lchown(shared / "mine.jsonl", ALICE, ALICE)
    alice("collect", "in", "-o", "mine.jsonl")
    assert '"result":"ONE"' in (shared / "precious.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "suffix"), [("link", "-wal"), ("file", "-wal"), ("pipe", "-shm"), ("file", "-journal")]
)
@pytest.mark.parametrize("db_url", ["sqlite:///queue.db"])
def test_a_planted_log_is_refused(alice: Cli, shared: Path, kind: str, suffix: str) -> None:
    """What SQLite would take for its own beside a queue or a results database stops the command before it opens it."""
    alice("enqueue", "in.txt", *FUNCTION)
    alice("worker", *FUNCTION)
    alice("collect", "in", "-o", "out.db")
    for name, command in (("queue.db", "status"), ("out.db", "collect in -o out.db")):
        path = shared / f"{name}{suffix}"
        assert not path.exists()
        if kind == "link":
            path.symlink_to("precious.txt")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_text("forged")
        by_mallory(path)
        refused = alice(*command.split(), check=False)
        assert (refused.returncode, f"{path} to be what SQLite keeps" in refused.stderr) == (2, True)
        path.unlink()
        alice(*command.split())
    assert (shared / "precious.txt").read_text() == PRECIOUS


@pytest.mark.parametrize("db_url", ["sqlite:///queue.db"])
def test_a_planted_database_is_refused(alice: Cli, shared: Path) -> None:
    """Answers in another user's file are not hers, even if she may write to it."""
    alice("run", "in.txt", "-o", "out.db", *FUNCTION)
    for name, command in (
        ("queue.db", ("run", "in.txt", "--run", "mine", "-o", "mine.jsonl", *FUNCTION)),
        ("out.db", ("collect", "in", "-o", "out.db")),
    ):
        by_mallory(shared / name)
        refused = alice(*command, check=False)
        assert (refused.returncode, f"{name} to be yours, got: a file of another user" in refused.stderr) == (
            2,
            True,
        )
        os.chown(shared / name, ALICE, ALICE)
        alice(*command)
