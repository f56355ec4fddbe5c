"""The texts that `lbr enqueue` reads from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lbr.cli.enqueue import load_text
from lbr.core.errors import UsageError
from tests.io import write

if TYPE_CHECKING:
    from pathlib import Path


class TestLoadText:
    """Templates and instructions from a flag."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none", "cannot read a template from .*: No such file or directory"),
            ("folder", "cannot read a template from .*: Is a directory"),
            ("latin", "is not UTF-8: it has 0xe9 as byte 2; convert it"),
        ],
    )
    def test_load_text_refuses(self, tmp_path: Path, name: str, message: str) -> None:
        """A template file that cannot be read is a usage error."""
        (tmp_path / "folder").mkdir()
        (tmp_path / "latin").write_bytes(b"h\xe9")
        with pytest.raises(UsageError, match=message):
            load_text(f"@{tmp_path / name}", "a template")

    @pytest.mark.parametrize(
        ("held", "meant"),
        [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\na ", "\na "), ("\n", "")],
    )
    def test_the_line_break_that_ends_a_file_is_not_meant(self, tmp_path: Path, held: str, meant: str) -> None:
        """An editor puts one there; whoever means one writes another."""
        path = write(tmp_path, "t.txt", held.encode())
        assert load_text(f"@{path}", "instructions") == meant
        assert load_text(held, "instructions") == held

    def test_load_text(self, tmp_path: Path) -> None:
        """A template, or instructions, are the argument itself, or what stands in the file after @."""
        path = write(tmp_path, "t.j2", b"\xef\xbb\xbfHi {{ a }}\n")
        assert load_text("Hi {{ a }}", "a template") == "Hi {{ a }}"
        assert load_text(f"@{path}", "a template") == "Hi {{ a }}"
