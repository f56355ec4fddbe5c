"""Databases for the tests: every store test runs once for each kind of database that lbr supports."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lbr.store.engines import open_database
from tests.support import Clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lbr.store.engines import Database

DATABASES = ("sqlite",)
NOBODY = 65534


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own settings and keys out of every test."""
    for name in ("MODEL", "OPENROUTER_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "LBR_DB", "LBR_CONFIG"):
        monkeypatch.delenv(name, raising=False)
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


@pytest.fixture(params=DATABASES)
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a queue that does not exist yet."""
    assert request.param == "sqlite"
    return f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
async def database(db_url: str, clock: Clock) -> AsyncIterator[Database]:
    """Return an empty open queue whose leases go by the test's clock."""
    opened = await open_database(db_url, create=True, clock=clock)
    yield opened
    await opened.close()
