"""A terminal of a given size, in which a test runs a command and looks at the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 60.0
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """Runs `lbr` in a terminal; `raw` is all that it wrote, `screen` what is there to see.

    Knows what a view does: the cursor goes up, and a line is erased before it is written again.
    """

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lbr", *arguments],
            cwd=folder,
            env={**kept, "TERM": "xterm-256color", **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no thread runs
        )
        os.close(theirs)
        self.raw = ""
        self._lines, self._row = [""], 0

    @property
    def screen(self) -> str:
        """The lines on the screen."""
        return "\n".join(_STYLE.sub("", line).rstrip() for line in self._lines).strip("\n")

    @property
    def styled(self) -> str:
        """The lines on the screen, with their colours."""
        return "\n".join(self._lines).strip("\n")

    def until(self, text: str) -> str:
        """Wait until the screen shows a text; return the screen."""
        deadline = time.monotonic() + SECONDS
        while text not in self.screen:
            assert self._read(deadline), f"{text!r} never appeared:\n{self.screen}"
        return self.screen

    def watch(self, seconds: float) -> bool:
        """Let time pass; return False if the command has ended meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._ours], [], [], left)[0] and not self._read(end):
                return False
        return True

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._ours, b"\x03")

    def end(self) -> int:
        """Wait until the command has ended; return its exit code."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):
            pass
        os.close(self._ours)
        return self.process.wait(timeout=SECONDS)

    def stop(self) -> None:
        """Kill the command if it still runs."""
        self.process.kill()
        self.process.wait()

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, self.screen
        data = b""
        with suppress(OSError):  # the command has closed it
            data = os.read(self._ours, 65_536)
            while data and select.select([self._ours], [], [], 0.02)[0] and (more := os.read(self._ours, 65_536)):
                data += more
        text = data.decode(errors="replace")
        self.raw += text
        for found in _TOKEN.finditer(text):
            self._write(found)
        return bool(data)

    def _write(self, token: re.Match[str]) -> None:
        text, (count, letter) = token[0], token.groups()
        if text == "\n":
            self._row += 1
            self._lines += [""] * (self._row >= len(self._lines))
        elif letter == "A":
            self._row = max(0, self._row - int(count or 1))
        elif letter == "K":
            self._lines[self._row] = ""
        elif letter in {None, "m"} and text != "\r":
            self._lines[self._row] += text
