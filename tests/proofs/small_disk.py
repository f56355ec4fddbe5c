"""A file system of few megabytes, to be filled, in a mount namespace of its own: nothing of it outlives the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from pathlib import Path

MOUNT = 'mount -t tmpfs -o "size=$1,mode=700" tmpfs "$2" && echo mounted && read -r _'


class SmallDisk:
    """A tmpfs at a folder, for those alone who are started with `prefix`.

    Root may mount one; others may in a user namespace, where the system lets them have one. The test is skipped
    where neither can be.
    """

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        tried = [["-m"]] if os.geteuid() == 0 else []
        for flags in (*tried, ["-r", "-m"]):
            if shutil.which("unshare") and shutil.which("nsenter") and self._mounted(flags, size):
                break
        else:
            pytest.skip("this system lets nobody mount a small disk: neither as root nor in a user namespace")

    def _mounted(self, flags: list[str], size: str) -> bool:
        # It ends with its stdin, which is ours, and the last of its namespace takes the mount along.
        self._holder = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", MOUNT, "sh", size, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "mounted\n":
            self.close()
            return False
        user = ["-U", "--preserve-credentials"] if "-r" in flags else []
        self.prefix = ("nsenter", "-t", str(self._holder.pid), *user, "-m", f"--wd={self.folder.parent}")
        return True

    def remount(self, options: str) -> None:
        """Give it another size, or let nobody write to it."""
        # With the source named, its present options are not read, which a user namespace may not set.
        self.run("mount", "-o", f"remount,{options}", "tmpfs", str(self.folder))

    def run(self, *command: str) -> str:
        """Run a command that sees it, and return what it printed; it must end well."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """Let it go, with all that is on it."""
        self._holder.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
