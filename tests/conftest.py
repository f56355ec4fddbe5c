"""Databases for the tests: every store test runs once for each kind of database that lbr supports."""

from __future__ import annotations

import asyncio
import compileall
import concurrent.futures.thread  # noqa: F401 - loaded late otherwise, by a user who may not read root's Python
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url

from lbr.store.database import open_database
from tests.support import ROOT, Cli, Clock, is_postgresql, postgres
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from lbr.store.database import Database

DATABASES = ("sqlite", "postgresql")
NOBODY = 65534


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of pytest-xdist share one PostgreSQL, and all that tests start the compiled modules."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, every command would ignore it too
    if not hasattr(config, "workerinput"):
        for package in ("lbr", "tests"):
            compileall.compile_dir(ROOT / package, quiet=2)
        postgres.open_session()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End that PostgreSQL when the last of them is gone."""
    if not hasattr(config, "workerinput"):
        postgres.close_session()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every proof as slow, and commands on PostgreSQL, whose store has quick tests of its own.

    Of these, `again` are those that SQLite shows as well: CI, which has half an hour, leaves them out.
    """
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        on_server = given.get("db_url") == "postgresql" and "cli" in getattr(item, "fixturenames", ())
        is_proof = item.path.is_relative_to(ROOT / "tests" / "proofs")
        if on_server or is_proof:
            item.add_marker("slow")
        if on_server and (not is_proof or item.path.name in {"test_model_outages.py", "test_scale.py"}):
            item.add_marker("again")


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own settings and keys out of every test."""
    for name in ("MODEL", "OPENROUTER_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "LBR_DB", "LBR_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mortal_folder() -> Iterator[Path]:
    """Return a folder of a user to whom permissions apply, and be that user: root may do everything."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
            Path(name).chmod(0o700)


@pytest.fixture
def clock() -> Clock:
    """Return a clock that the test moves."""
    return Clock()


@pytest.fixture
def new_database() -> Iterator[Callable[[], str]]:
    """Return a function that makes an empty PostgreSQL database and returns its URL; they are dropped after the test."""
    made: list[str] = []

    def make() -> str:
        made.append(postgres.create_database(postgres.shared_server()))
        return made[-1]

    yield make
    for url in made:
        postgres.drop_database(postgres.shared_server(), url)


@pytest.fixture(scope="session")
def migrated_postgresql() -> str:
    """Return the name of an empty queue on the server, to make copies of: to migrate takes longer than most tests."""
    return postgres.migrated_template(_migrate)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an empty queue, to make copies of."""
    path = tmp_path_factory.mktemp("migrated") / "queue.db"
    _migrate(f"sqlite:///{path}")
    return path


def _migrate(url: str) -> None:
    async def migrate() -> None:
        await (await open_database(url, create=True)).close()

    asyncio.run(migrate())


@pytest.fixture
def proxy(new_database: Callable[[], str]) -> Iterator[Proxy]:
    """Return a network to an empty database."""
    with Proxy(postgres.over_tcp(new_database())) as made:
        yield made


@pytest.fixture
def own_server() -> Iterator[postgres.Server]:
    """Return a running PostgreSQL that the test may stop and start."""
    with postgres.Server() as server:
        yield server


@pytest.fixture(scope="session")
def queues(migrated_postgresql: str) -> Iterator[postgres.Queues]:
    """Return empty queues on PostgreSQL."""
    kept = postgres.Queues(migrated_postgresql)
    yield kept
    kept.close()


@pytest.fixture
def new_queue(queues: postgres.Queues) -> Iterator[Callable[[], str]]:
    """Return a function that returns the URL of an empty queue on PostgreSQL, the test's own until its end."""
    used: list[str] = []

    def take() -> str:
        used.append(queues.take())
        return used[-1]

    yield take
    for url in used:
        queues.give_back(url)


@pytest.fixture(params=DATABASES)
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a queue: an empty one on PostgreSQL, a file that does not exist yet with SQLite."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("new_queue")())
    return f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
async def database(db_url: str, clock: Clock, migrated_file: Path) -> AsyncIterator[Database]:
    """Return an empty open queue whose leases go by the test's clock."""
    path = Path(str(make_url(db_url).database))
    if not is_postgresql(db_url) and not path.exists():
        shutil.copyfile(migrated_file, path)
        path.chmod(0o600)
    opened = await open_database(db_url, create=True, clock=clock)
    yield opened
    await opened.close()


@pytest.fixture
def cli(tmp_path: Path, db_url: str) -> Iterator[Cli]:
    """Return a driver of `lbr` in an empty folder; whatever it started is killed at the end."""
    driver = Cli(tmp_path, db_url=db_url)
    yield driver
    driver.stop_all()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write modules into the working directory and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def write(name: Any, text: Any) -> None:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]
