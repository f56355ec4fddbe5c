"""The rivals, the environment of each, and the command that has one of them do a task."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".venv-rivals"
INSTALL_SECONDS = 600
QUIET = {
    # Some say at home that they are used, or fetch prices there; others are asked not to leave the machine.
    "TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
}


class NotMeasuredError(Exception):
    """A rival that could not be installed, failed, or gave a wrong answer; the message says why, in a line."""


@dataclass(frozen=True, slots=True)
class Rival:
    """One way of using one package.

    `ways` has what its program is told, for each part of the measurement that it takes part in. No packages means that
    it needs none but Python's own. `keeps` is false for one that keeps nothing, which is no rival there but a limit.
    """

    key: str
    name: str
    program: str
    ways: Mapping[str, str]
    environment: str = ""
    packages: tuple[str, ...] = field(default=())
    keeps: bool = True

    def command(self, part: str, url: str, folder: Path, slots: int) -> list[str]:
        """Return what to start; raises NotMeasuredError where its environment cannot be made."""
        return [
            str(self._python()),
            str(HERE / self.program),
            url,
            str(folder),
            str(slots),
            self.ways[part],
        ]

    def _python(self) -> Path:
        if not self.packages:
            return Path(sys.executable)
        folder = ENVIRONMENTS / self.environment
        python, stamp = folder / "bin" / "python", folder / "installed"
        wanted = "\n".join(self.packages)
        if not (stamp.exists() and stamp.read_text() == wanted):
            uv = str(Path(sys.executable).with_name("uv"))
            _install(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
            _install(uv, "pip", "install", "--quiet", "--python", str(python), *self.packages)
            stamp.write_text(wanted)
        return python


def _install(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"could not be installed within {INSTALL_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        raise NotMeasuredError(f"could not be installed: {last_line(error.stderr)}") from error


def last_line(text: str) -> str:
    """Return the last line with anything on it: of a traceback it says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def surroundings(folder: Path) -> dict[str, str]:
    """Return the environment variables of a rival: what it keeps at home it keeps in the folder."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return os.environ | QUIET | {"HOME": str(home)}


DELUGE = ("lm-deluge", "plyvel")
RIVALS = (
    Rival(
        "deluge",
        "lm-deluge, nothing kept",
        "rival_deluge.py",
        {"chat": "plain", "whole": "plain"},
        "lm-deluge",
        DELUGE,
    ),
    Rival(
        "deluge-leveldb",
        "lm-deluge, LevelDB cache",
        "rival_deluge.py",
        {"chat": "leveldb", "crash": "leveldb"},
        "lm-deluge",
        DELUGE,
    ),
    Rival(
        "deluge-sqlite",
        "lm-deluge, SQLite cache",
        "rival_deluge.py",
        {"chat": "sqlite", "crash": "sqlite"},
        "lm-deluge",
        DELUGE,
    ),
    Rival(
        "curator",
        "curator",
        "rival_curator.py",
        {"chat": "online", "crash": "online"},
        "curator",
        ("bespokelabs-curator",),
    ),
    Rival(
        "async-batch-llm",
        "async-batch-llm, SQLite store",
        "rival_async_batch.py",
        {"naps": "nap", "chat": "chat", "crash": "chat"},
        "async-batch-llm",
        ("async-batch-llm[openai]",),
    ),
    Rival("ondine", "ondine", "rival_ondine.py", {"chat": "table"}, "ondine", ("ondine",)),
    Rival(
        "pydantic-ai",
        "pydantic-ai, Agent.run in a gather",
        "rival_pydantic_ai.py",
        {"chat": "gather"},
        "pydantic-ai",
        ("pydantic-ai-slim[openai]",),
    ),
    Rival("aiohttp", "a bare aiohttp gather", "rival_aiohttp.py", {"whole": "gather"}, keeps=False),
    Rival("gather", "a bare gather, nothing kept", "rival_plain.py", {"naps": "nothing"}, keeps=False),
    Rival("plain", "plain loop, a commit each", "rival_plain.py", {"naps": "delete"}),
    Rival("plain-wal", "plain loop, a commit each, WAL", "rival_plain.py", {"naps": "wal"}),
)
