"""How inputs are checked before they are read."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.sources import Source
from tests.io import write

if TYPE_CHECKING:
    from pathlib import Path


class TestSource:
    """Files or prompts behind one class."""

    ROWS = b'id,prompt\n1,a\n2,\n3\n4,b\n5, \n6,\n7,\n8,na\xefve\n9,"c"d\n10,e\n11,"f\n12,g\n'

    async def test_a_check_reports_all_and_a_stream_ends_at_the_first(self, tmp_path: Path) -> None:
        """What can be read twice is checked whole; of a stream, nothing behind a bad row is taken."""
        path = tmp_path / "in.csv"
        path.write_bytes(self.ROWS)
        with pytest.raises(InputError, match="and 7 more bad rows"):
            await Source(path).check()
        with pytest.raises(InputError, match=r"line 3: column prompt is empty\. Use --skip-empty, or fill it in$"):
            list(Source(path))

    @pytest.mark.parametrize(
        ("skip_bad", "message"),
        [
            ("in.csv", "in.csv is the input; name a new file for the bad rows"),
            ("no/bad", "there is no folder"),
            ("", "is a folder"),
        ],
    )
    def test_the_file_must_be_one_that_may_be_written(self, tmp_path: Path, skip_bad: str, message: str) -> None:
        """The input is never overwritten, and what cannot be written is refused at once."""
        write(tmp_path, "in.csv", self.ROWS)
        with pytest.raises(UsageError, match=message):
            Source(tmp_path / "in.csv", skip_bad=tmp_path / skip_bad)
        assert (tmp_path / "in.csv").read_bytes() == self.ROWS

    @pytest.mark.parametrize(
        "options", [{"delimiter": ";"}, {"encoding": "cp1252"}, {"skip_bad": "b"}, {"skip_empty": True}]
    )
    def test_prompts_in_memory_have_no_such_flags(self, options: dict[str, Any]) -> None:
        """Flags about files are refused for prompts in memory."""
        with pytest.raises(UsageError, match=f"expected {next(iter(options))} with files, got: prompts"):
            Source(["a"], **options)


async def test_a_check_of_many_inputs_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a long check is heard before the file's end."""
    path = tmp_path / "in.txt"
    path.write_text("a\n")
    source = Source(path)
    monkeypatch.setattr(readers, "read_items", lambda *_, **__: itertools.repeat(Item(Prompt("a"))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await source.check()
