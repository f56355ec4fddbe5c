"""Starts the mock server `llmock serve` (a program of its own, not of this project) for one block of a test."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_SECONDS = 60
PROGRAM = Path(sys.executable).with_name("llmock")


@contextlib.contextmanager
def serve(*flags: str, style: str = "echo") -> Iterator[str]:
    """Serve on a free port until the block ends; yields the base URL, `http://127.0.0.1:PORT/v1`.

    `flags` are llmock's own, such as "--error-rate", "503=1.0" or "--rpm", "60".
    """
    port = free_port()
    command = [
        str(PROGRAM),
        "serve",
        "-p",
        str(port),
        "--response-style",
        style,
        "--log-level",
        "warning",
        *flags,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/_llmock/verdict", name="llmock")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()  # asked nicely, it waits for calls under way
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], url: str, *, name: str) -> None:
    """Wait until a server answers at all. Raises RuntimeError when it ends before, or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - http, on this machine
                return
        except urllib.error.HTTPError as error:  # it answers, and that is all that is asked
            error.close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{name} was not ready within {READY_SECONDS} seconds")
