"""How inputs are checked before they are read."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.samples import Sample
from lbr.io.sources import Source, expanded
from tests.io import write


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

    async def test_a_dry_read_counts_and_writes_nothing(self, tmp_path: Path) -> None:
        """Empty and other bad rows are counted apart; the refusal is the one that an enqueue raises."""
        write(tmp_path, "in.csv", self.ROWS)
        given: list[tuple[dict[str, Any], bool]] = [
            ({}, True),
            ({"skip_empty": True}, True),
            ({"skip_bad": tmp_path / "bad"}, False),
            ({"skip_bad": tmp_path / "bad", "skip_empty": True}, False),
        ]
        for skip, is_refused in given:
            source = Source(tmp_path / "in.csv", **skip)
            kept = [item.custom_id for item in source.read(dry=True)]
            refusal = source.bad.refusal()
            assert (kept, source.bad.empty + source.bad.blank) == (["1", "4", "10", "12"], 4)
            assert (source.bad.count - source.bad.blank, refusal is not None) == (4, is_refused)
            if refusal:
                with pytest.raises(InputError) as raised:
                    await source.check()
                assert str(raised.value) == str(refusal)
        assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]

    async def test_a_limit_does_not_see_bad_rows_behind_it_and_a_pick_does(self, tmp_path: Path) -> None:
        """A pick reads everything, so that no bad row depends on luck."""
        path = tmp_path / "in.csv"
        path.write_bytes(self.ROWS)
        source = Source(path, sample=Sample(limit=1))
        await source.check()
        assert [item.custom_id for item in source] == ["1"]
        with pytest.raises(InputError, match="and 7 more bad rows"):
            await Source(path, sample=Sample(pick=1)).check()

    def test_run_names(self, tmp_path: Path) -> None:
        """The first file's stem unless one is given; a picked sample has its own."""
        path = Path(write(tmp_path, "in.csv", self.ROWS))
        assert [Source(path).run_name(given) for given in (None, "a")] == ["in", "a"]
        assert [Source(path, sample=Sample(pick=2)).run_name(given) for given in (None, "a", "")] == [
            "in-pick",
            "a-pick",
            "",
        ]
        with pytest.raises(UsageError, match="the run needs a name"):
            Source(["a"], sample=Sample(pick=2)).run_name(None)


async def test_a_check_of_many_inputs_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a long check is heard before the file's end."""
    path = tmp_path / "in.txt"
    path.write_text("a\n")
    source = Source(path)
    monkeypatch.setattr(readers, "read_items", lambda *_, **__: itertools.repeat(Item(Prompt("a"))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await source.check()


class TestPatterns:
    """A pattern stands for the files that match it."""

    def test_matching_files_come_sorted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name that a file has is no pattern; other names, and stdin, stay where they are."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "deep" / "er").mkdir(parents=True)
        for name in ("b.txt", "a.txt", "c[1].txt", "c1.txt", "deep/er/d.txt", ".hidden.txt"):
            (tmp_path / name).touch()
        assert expanded(["z", "*.txt", "-"]) == ["z", "a.txt", "b.txt", "c1.txt", "c[1].txt", "-"]
        assert expanded(["c[1].txt"]) == ["c[1].txt"]
        assert expanded(["**/d.*"]) == ["deep/er/d.txt"]
        with pytest.raises(UsageError, match=re.escape("no file matches '*.csv'; check the pattern")):
            expanded(["a.txt", "*.csv"])

    def test_a_run_is_named_after_its_first_file(self, tmp_path: Path) -> None:
        """Both endings of a compressed file are left out; a name with dots keeps the others."""
        names = {"a.csv": "a", "b.csv.gz": "b", "c.d.JSONL.GZ": "c.d", "e.gz": "e", "f": "f", "g.parquet": "g"}
        for name in names:
            (tmp_path / name).touch()
        assert {name: Source(tmp_path / name).run_name(None) for name in names} == names
        assert Source([tmp_path / "[a-b]*", tmp_path / "f"]).run_name(None) == "a"
