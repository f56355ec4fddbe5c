"""Tests of reading and writing files, and what they share."""

from __future__ import annotations

import os
import re
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from lbr.core.errors import InputError
from lbr.io import readers
from lbr.io.readers import read_items

if TYPE_CHECKING:
    from pathlib import Path

    from lbr.core.types import Item


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: str, **options: Any) -> list[Item]:
    return list(read_items([path], **options))


def texts(path: str, **options: Any) -> list[str | None]:
    return [item.prompt.text for item in read(path, **options)]


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        monkeypatch.setattr(readers, "STDIN_FILE", os.dup(file.fileno()))


def refused(path: str, line: int, message: str, **options: Any) -> None:
    """Check that reading ends in an InputError that names the file, the line and the matter."""
    with pytest.raises(InputError, match=re.escape(f"{path}, line {line}: ") + message) as caught:
        read(path, **options)
    assert (caught.value.source, caught.value.line) == (path, line)
