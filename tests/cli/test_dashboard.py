"""`lbr dashboard` as a command."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Cli


@pytest.fixture
def db_url(tmp_path: Path) -> str:
    """Return the URL of a file: nothing here concerns another kind of database."""
    return f"sqlite+aiosqlite:///{tmp_path / 'runs.db'}"


def test_the_command_prints_its_address_and_keeps_its_token(cli: Cli) -> None:
    """One line with the token in the fragment; a kept token is private and used again; Ctrl-C is a good end."""
    seen = []
    for _ in range(2):
        process = cli.start("dashboard", "--no-open", "--token-file", "token")
        assert process.stdout is not None
        seen.append(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#([\w-]{43})\n", process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert seen[0]
    assert seen[1]
    assert seen[0][2] == seen[1][2]
    assert (cli.folder / "token").stat().st_mode & 0o777 == 0o600
    (cli.folder / "token").chmod(0o644)
    done = cli("dashboard", "--no-open", "--token-file", "token", check=False)
    assert done.returncode == 2
    assert "chmod 600 token" in done.stderr
