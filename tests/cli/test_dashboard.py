"""`lbr dashboard` as a command."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

from lbr.cli.dashboard import kept_token
from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Cli


@pytest.fixture
def db_url(tmp_path: Path) -> str:
    """Return the URL of a file: nothing here concerns another kind of database."""
    return f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"


def test_the_command_prints_its_address_and_keeps_its_token(cli: Cli) -> None:
    """One line with the kept token in the fragment, for an address that can be opened; Ctrl-C is a good end."""
    token = kept_token(cli.folder / "token")
    process = cli.start("dashboard", "--no-open", "--token-file", "token", "--host", "0.0.0.0")  # noqa: S104
    assert process.stdout is not None
    seen = re.fullmatch(r"http://127\.0\.0\.1:\d+/#([\w-]{43})\n", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert seen
    assert seen[1] == token


def test_a_token_is_kept_in_a_private_file(tmp_path: Path) -> None:
    """It is made once; one that others can read, and one that can be guessed, are refused."""
    path = tmp_path / "token"
    token = kept_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept_token(path) == token
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        kept_token(path)
    path.chmod(0o600)
    path.write_text("guess\n")
    with pytest.raises(UsageError, match="at least 32 characters"):
        kept_token(path)
