"""How collected rows are written, and what stays when writing fails."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from lbr.core.errors import OutputError, UsageError
from lbr.core.types import AnswerRow, Part, Prompt, Task
from lbr.io.table import Table, make_table
from lbr.io.writers import (
    CsvStyle,
    CsvWriter,
    JsonlWriter,
    OutputFormat,
    atomic_path,
    check_output,
    format_of,
    open_writer,
    output_lock,
)
from tests.support import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = AnswerRow(0, "k0", Prompt(text="one"), "done", result="eins")
FULL = AnswerRow(
    1,
    "k1",
    Prompt(messages=({"role": "user", "content": "zwei, «two»"},)),
    "failed",
    error='said "no",\nthen left',
    custom_id="c-1",
    metadata={"city": "Oslo", "n": 1.5, "deep": {"x": [None]}, "id": "theirs", "none": None},
)


def table(*columns: tuple[Part, str]) -> Table:
    """Return a table of these columns of an input and all of lbr's own."""
    return make_table(Task(model="m"), columns, columns="all")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Stdout(io.TextIOWrapper):
    """A stdout whose bytes can be read back."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def written(self) -> bytes:
        """Return what reached the bytes below the text."""
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


class Broken(io.BytesIO):
    """A pipe that nobody reads any more."""

    def write(self, data: object) -> int:
        """Fail as such a pipe does."""
        raise BrokenPipeError(32, "Broken pipe")


class TestFormat:
    """The ending says how the rows are spelled."""

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            (None, OutputFormat.JSONL),
            ("a.jsonl", OutputFormat.JSONL),
            ("a.b/c.NDJSON", OutputFormat.JSONL),
            ("a.csv", OutputFormat.CSV),
            ("a.db", OutputFormat.DB),
            ("a.parquet", OutputFormat.PARQUET),
            ("a.sqlite", OutputFormat.SQLITE),
            ("a.sqlite3", OutputFormat.SQLITE),
        ],
    )
    def test_known_endings(self, path: str, expected: OutputFormat) -> None:
        """Each ending has its format, stdout is JSONL."""
        assert format_of(path) is expected

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (
                "a.json",
                "cannot write a.json; use a name that ends in .jsonl, .ndjson, .csv, .parquet, .pq, .db, .sqlite, .sqlite3",
            ),
            ("a", "cannot write a; use a name that ends in .jsonl,"),
            ("jsonl/", "cannot write jsonl/; use a name that ends in .jsonl,"),
        ],
    )
    def test_other_endings_are_refused(self, path: str, message: str) -> None:
        """An ending without a format is a usage error that names those there are."""
        with pytest.raises(UsageError, match=re.escape(message)):
            format_of(path)


class TestCheckOutput:
    """Whether a file can be written is known before the work is done."""

    @pytest.mark.parametrize("name", ["new.jsonl", "old.jsonl", "link.jsonl"])
    def test_a_good_path_leaves_no_trace(self, tmp_path: Path, name: str) -> None:
        """A path that can be written passes, and the folder stays as it was."""
        (tmp_path / "old.jsonl").write_text("old")
        (tmp_path / "link.jsonl").symlink_to("old.jsonl")
        check_output(str(tmp_path / name))
        assert names(tmp_path) == ["link.jsonl", "old.jsonl"]
        assert (tmp_path / "old.jsonl").read_text() == "old"

    def test_stdout_passes(self) -> None:
        """There is nothing to check about stdout."""
        check_output(None)

    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
    def test_devices_are_refused(self, name: str) -> None:
        """What stdout goes to may be a file, which is not replaced behind its back."""
        with pytest.raises(UsageError, match=r"is a device or a pipe; name a file, or .* -o -`"):
            check_output(name)

    def test_a_file_in_memory_passes(self) -> None:
        """Not all that is in /dev is a device."""
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("there is no /dev/shm")
        check_output(f"/dev/shm/lbr-test-{os.getpid()}.jsonl")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none/a.csv", "there is no folder .*none; create it first"),
            ("file/a.csv", "there is no folder .*file; create it first"),
            ("folder.csv", "the output .*folder.csv is a folder; add a file name"),
            (
                "pipe.csv",
                "the output .*pipe.csv is a device or a pipe; name a file, or .* -o -`",
            ),
            ("a\0b.csv", r"expected the output to be a name that a file can have, got: '.*a\\x00b.csv'"),
        ],
    )
    def test_a_path_that_is_no_file_is_refused(self, tmp_path: Path, name: str, message: str) -> None:
        """What cannot become a file is a usage error."""
        (tmp_path / "file").write_text("")
        (tmp_path / "folder.csv").mkdir()
        os.mkfifo(tmp_path / "pipe.csv")
        with pytest.raises(UsageError, match=message):
            check_output(str(tmp_path / name))

    @pytest.mark.parametrize(
        ("path", "reason"),
        [("/sys/a.jsonl", ".+"), ("a" * 300 + ".csv", "File name too long")],
    )
    def test_a_refused_file_is_told_with_the_reason(self, path: str, reason: str) -> None:
        """What the file system refuses, to root too, is an error with its reason."""
        with pytest.raises(OutputError, match=f"^cannot write {path}: {reason}; "):
            check_output(path)

    def test_a_read_only_folder_is_refused(self, mortal_folder: Path) -> None:
        """A folder without permission is refused with the reason."""
        mortal_folder.chmod(0o500)
        with pytest.raises(OutputError, match="Permission denied"):
            check_output(str(mortal_folder / "a.csv"))


class TestAtomicPath:
    """A file is whole or not there."""

    def test_the_new_file_takes_the_old_ones_place(self, tmp_path: Path) -> None:
        """The old content stays until the block ends, then the new one is there, alone."""
        path = tmp_path / "out.db"
        path.write_text("old")
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(f".out.db.{os.getpid()}.")
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert names(tmp_path) == ["out.db"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, OutputError])
    @pytest.mark.parametrize("old", ["old", None])
    def test_an_exception_leaves_everything_as_it_was(
        self, tmp_path: Path, error: type[BaseException], old: str | None
    ) -> None:
        """Whatever stops the block, the old file stays and nothing is left beside it."""
        path = tmp_path / "out.db"
        if old is not None:
            path.write_text(old)
        before = names(tmp_path)

        def fail() -> None:
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                Path(f"{temporary}-wal").write_text("SQLite leaves this")
                raise error("stop")

        with pytest.raises(error, match="stop"):
            fail()
        assert names(tmp_path) == before
        assert (path.read_text() if path.exists() else None) == old

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
    def test_the_mode_of_the_old_file_is_kept(self, tmp_path: Path, mode: int) -> None:
        """Who could read the old file can read the new one, and nobody else, even on the way."""
        path = tmp_path / "out.csv"
        path.write_text("old")
        path.chmod(mode)
        with atomic_path(path) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_a_new_file_has_the_ordinary_mode(self, tmp_path: Path, umask: int) -> None:
        """A new file gets the mode that any program's new file gets."""
        before = os.umask(umask)
        try:
            with atomic_path(tmp_path / "out.csv"):
                pass
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out.csv").stat().st_mode) == 0o666 & ~umask

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        """Writing through a link replaces the file that it leads to."""
        (tmp_path / "there").mkdir()
        link = tmp_path / "out.csv"
        link.symlink_to("there/real.csv")
        with atomic_path(link) as temporary:
            temporary.write_text("new")
        assert link.is_symlink()
        assert (tmp_path / "there" / "real.csv").read_text() == "new"

    def test_a_long_name_is_no_hindrance(self, tmp_path: Path) -> None:
        """A name as long as the file system allows can be written."""
        path = tmp_path / ("é" * 125 + ".csv")
        with atomic_path(path) as temporary:
            temporary.write_text("new")
        assert names(tmp_path) == [path.name]

    def test_a_missing_folder_is_an_output_error(self, tmp_path: Path) -> None:
        """Without a check before, a missing folder is still told with its reason."""
        with (
            pytest.raises(OutputError, match=": No such file or directory"),
            atomic_path(tmp_path / "a" / "b"),
        ):
            pass

    def test_a_folder_that_came_in_between_is_an_output_error(self, tmp_path: Path) -> None:
        """What only comes to light at the end is told with its reason, and cleaned up."""
        path = tmp_path / "out.csv"
        with pytest.raises(OutputError, match=": Is a directory"), atomic_path(path):
            path.mkdir()
        assert names(tmp_path) == ["out.csv"]

    @pytest.mark.processes
    def test_a_killed_writer_leaves_the_old_file(self, tmp_path: Path) -> None:
        """After a kill in the middle the old file is whole, and the next writer succeeds."""
        code = (
            "import os, signal, sys; from lbr.io.writers import atomic_path\n"
            "with atomic_path(sys.argv[1]) as new:\n"
            "    new.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        path = tmp_path / "out.jsonl"
        path.write_text("old")
        ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
        assert ended.returncode == -9
        assert path.read_text() == "old"
        with atomic_path(path) as temporary:
            temporary.write_text("new")
        assert path.read_text() == "new"

    def test_what_dead_processes_left_is_removed(self, tmp_path: Path) -> None:
        """A temporary file goes a day after it was written, with SQLite's beside it."""
        tails = ("0" * 12 + ".tmp", "0" * 12 + ".tmp-journal")
        left = [tmp_path / f".out.csv.7.{tail}" for tail in tails]
        others = [tmp_path / f".out.csv.7.{tail}" for tail in ("0.tmp", "0" * 12 + ".tmp.csv", "z" * 12 + ".tmp")]
        others += [tmp_path / f".not.csv.7.{tails[0]}", tmp_path / f".out.csv.me.{tails[0]}"]
        young = tmp_path / f".out.csv.7.{'2' * 12}.tmp"
        link = tmp_path / f".out.csv.7.{'3' * 12}.tmp"
        for path in (*left, *others, young):
            path.touch()
        for path in (*left, *others):
            os.utime(path, (time.time() - 90_000,) * 2)
        link.symlink_to(young)
        with atomic_path(tmp_path / "out.csv") as temporary:
            temporary.write_text("new")
        assert set(tmp_path.iterdir()) == {*others, young, link, tmp_path / "out.csv"}


class TestLock:
    """Writers of one file go one after the other."""

    async def test_a_lock_leaves_nothing(self, tmp_path: Path) -> None:
        """The folder is locked, not a file in it."""
        async with output_lock(tmp_path / "out.csv"):
            assert names(tmp_path) == []

    async def test_tasks_of_one_loop_wait_for_each_other(self, tmp_path: Path) -> None:
        """Two writers in one event loop neither overlap nor block it."""
        inside: list[str] = []

        async def write(word: str) -> None:
            async with output_lock(tmp_path / "out.csv"):
                inside.append(word)
                await asyncio.sleep(0.05)
                inside.append(word)

        await asyncio.gather(write("one"), write("two"))
        assert inside in (["one", "one", "two", "two"], ["two", "two", "one", "one"])

    @pytest.mark.slow
    @pytest.mark.processes
    def test_two_processes_write_one_after_the_other(self, tmp_path: Path) -> None:
        """Of two processes that write one file at once, each waits for the other, and the file is whole."""
        code = (
            "import asyncio, sys; from lbr.io.writers import atomic_path, output_lock\n"
            "path, word = sys.argv[1:]\n"
            "async def main():\n"
            "    for turn in range(20):\n"
            "        async with output_lock(path):\n"
            "            with atomic_path(path) as new, new.open('w') as file:\n"
            "                others = [o for o in new.parent.glob('.*.tmp') if o != new]\n"
            "                assert not others, others\n"
            "                for line in range(2000): file.write(word + '\\n')\n"
            "asyncio.run(main())\n"
        )
        path = tmp_path / "out.jsonl"
        command = [sys.executable, "-c", code, str(path)]
        writers = [subprocess.Popen([*command, word]) for word in ("one", "two")]
        assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
        assert path.read_text() in ("one\n" * 2000, "two\n" * 2000)
        assert names(tmp_path) == ["out.jsonl"]


class TestJsonl:
    """A row is a line of JSON."""

    def test_rows_become_lines(self) -> None:
        """Each row is written as its own dictionary, in order; the id and metadata only where there are any."""
        handle = io.BytesIO()
        writer = JsonlWriter(handle)
        writer.write(iter([PLAIN]))
        writer.write([FULL])
        assert handle.getvalue() == orjson.dumps(PLAIN.to_dict()) + b"\n" + orjson.dumps(FULL.to_dict()) + b"\n"

    def test_to_a_file(self, tmp_path: Path) -> None:
        """Rows reach the file whole when the block ends."""
        path = tmp_path / "out.jsonl"
        with open_writer(str(path), OutputFormat.JSONL) as writer:
            writer.write([PLAIN])
            assert not path.exists()
        assert path.read_bytes() == (
            b'{"idx":0,"key":"k0","prompt":"one","status":"done","result":"eins","error":null}\n'
        )

    def test_no_rows_are_an_empty_file(self, tmp_path: Path) -> None:
        """Nothing collected is a file of no lines."""
        path = tmp_path / "out.jsonl"
        with open_writer(str(path), OutputFormat.JSONL):
            pass
        assert path.read_bytes() == b""

    def test_to_stdout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows follow what was printed before, flushed, and stdout stays open."""
        stdout = Stdout()
        monkeypatch.setattr(sys, "stdout", stdout)
        stdout.write("before\n")
        with open_writer(None, OutputFormat.JSONL) as writer:
            writer.write([PLAIN])
        assert stdout.written() == b"before\n" + orjson.dumps(PLAIN.to_dict()) + b"\n"


class TestCsv:
    """A row is a record."""

    def test_rows_become_records(self) -> None:
        """The input's columns come first; what is not text is JSON, None is an empty cell, an empty text one in quotes."""
        handle = io.BytesIO()
        names = ["city", "n", "deep", "none", "nowhere"]
        columns = [(Part.METADATA, name) for name in names]
        given = table((Part.ID, "custom_id"), *columns[:1], (Part.PROMPT, "text"), *columns[1:])
        writer = CsvWriter(handle, given)
        writer.write([replace(PLAIN, custom_id=7, result="")])
        writer.write([FULL])
        assert handle.getvalue().decode() == (
            "custom_id,city,text,n,deep,none,nowhere,idx,key,status,result,error\n"
            '7,,one,,,,,0,k0,done,"",\n'
            'c-1,Oslo,"[{""role"":""user"",""content"":""zwei, «two»""}]",1.5,"{""x"":[null]}",,,'
            '1,k1,failed,,"said ""no"",\nthen left"\n'
        )

    @pytest.mark.parametrize(
        "text",
        [
            "a\rb",
            "a\r\nb",
            "a\nb\n",
            "x\r\n",
            '"',
            ",",
            " a ",
            "ü\u2028",
            "-1.5",
            "+4e10",
            "'",
            "\ufeff",
            "a;b\tc|d",
        ]
        + [f"{mark}x" for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \t\r\n5"],
    )
    @pytest.mark.parametrize("skips_spaces", [False, True])
    def test_every_text_comes_back(self, text: str, skips_spaces: bool) -> None:
        """What a CSV reader gets is what the model said, also if it skips spaces after delimiters."""
        handle = io.BytesIO()
        CsvWriter(handle, table()).write([AnswerRow(0, "k", Prompt(text=text), "done", result=text)])
        lines = io.StringIO(handle.getvalue().decode(), newline="")
        (row,) = csv.DictReader(lines, strict=True, skipinitialspace=skips_spaces)
        assert (row["prompt"], row["result"]) == (text, text)

    @pytest.mark.parametrize(
        "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1", "-"]
    )
    @pytest.mark.parametrize("safe", [False, True])
    def test_on_request_no_cell_is_a_formula(self, text: str, safe: bool) -> None:
        """With `spreadsheet_safe`, what a spreadsheet would run has an apostrophe before it, the header too."""
        handle = io.BytesIO()
        row = AnswerRow(0, "k", Prompt(text=text), "failed", text, text, text, {text: text})
        columns = [(Part.METADATA, text), (Part.ID, "id")]
        CsvWriter(handle, table(*columns), CsvStyle(spreadsheet_safe=safe)).write([row])
        header, cells = csv.reader(io.StringIO(handle.getvalue().decode(), newline=""), strict=True)
        text = f"'{text}" if safe else text
        assert header[0] == text
        assert cells == [text, text, "0", "k", text, "failed", text, text]

    def test_names_are_made_distinct(self) -> None:
        """The input's columns keep their names, and no two columns share one."""
        handle = io.BytesIO()
        names = ["result", "answer.result", "key"]
        columns = [(Part.PROMPT, "idx"), *((Part.METADATA, name) for name in names), (Part.METADATA, "idx")]
        CsvWriter(handle, table(*columns))
        assert handle.getvalue() == (
            b"idx,result,answer.result,key,metadata.idx,answer.idx,answer.key,status,answer.answer.result,error\n"
        )

    def test_to_a_file(self, tmp_path: Path) -> None:
        """A file has its header even when no row is written, and on request a byte order mark before it."""
        path = tmp_path / "out.csv"
        style = CsvStyle(bom=True)
        with open_writer(str(path), OutputFormat.CSV, table=table((Part.METADATA, "city")), style=style):
            pass
        assert path.read_bytes() == b"\xef\xbb\xbfcity,idx,key,prompt,status,result,error\n"

    def test_to_stdout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CSV can be piped on, too."""
        stdout = Stdout()
        monkeypatch.setattr(sys, "stdout", stdout)
        with open_writer(None, OutputFormat.CSV, table=table()) as writer:
            writer.write([PLAIN])
        assert stdout.written() == b"idx,key,prompt,status,result,error\n0,k0,one,done,eins,\n"

    @pytest.mark.parametrize("kind", [OutputFormat.JSONL, OutputFormat.DB])
    def test_other_formats_have_no_style(self, kind: OutputFormat) -> None:
        """Flags of CSV are refused for other formats."""
        with pytest.raises(UsageError, match=f"--bom is for CSV only, got: {kind}"):
            CsvStyle(bom=True).check(kind)


class TestFailures:
    """What cannot be written is told with file and reason."""

    @pytest.mark.parametrize("format_", [OutputFormat.JSONL, OutputFormat.CSV])
    @pytest.mark.parametrize("count", [1, 50_000])
    @pytest.mark.processes
    def test_a_full_disk_at_stdout(self, tmp_path: Path, format_: OutputFormat, count: int) -> None:
        """A full disk behind stdout is an error whether it shows while writing or at the end."""
        code = f"""
            import os, sys; from lbr.io.writers import open_writer, OutputFormat
            from lbr.core.types import Prompt, AnswerRow
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            try:
                with open_writer(None, OutputFormat({format_.value!r})) as writer:
                    writer.write([AnswerRow(0, 'k', Prompt(text='one'), 'done')] * {count})
            except Exception as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(0)
        """
        assert Cli(tmp_path).python(code).stderr == (
            "OutputError cannot write stdout: No space left on device; make room, or choose another file with -o\n"
        )

    @pytest.mark.parametrize("format_", [OutputFormat.JSONL, OutputFormat.CSV])
    @pytest.mark.parametrize("count", [1, 50_000])
    @pytest.mark.processes
    def test_a_full_disk_under_a_file(self, tmp_path: Path, format_: OutputFormat, count: int) -> None:
        """A file that cannot take its rows is an error with its name, and the old file stays."""
        path = tmp_path / "here" / "out"
        path.parent.mkdir()
        path.write_text("old")
        code = f"""
            import resource, signal, sys; from lbr.io.writers import open_writer, OutputFormat
            from lbr.core.types import Prompt, AnswerRow, Task
            from lbr.io.table import make_table
            table = make_table(Task(model="m"))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            try:
                with open_writer({str(path)!r}, OutputFormat({format_.value!r}), table=table) as writer:
                    writer.write([AnswerRow(0, 'k', Prompt(text='one'), 'done')] * {count})
            except Exception as error:
                print(type(error).__name__, error)
        """
        ended = Cli(tmp_path).python(code)
        assert ended.stdout == (
            f"OutputError cannot write {path}: File too large; make room, or choose another file with -o\n"
        )
        assert (names(path.parent), path.read_text(), ended.stderr) == (["out"], "old", "")

    @pytest.mark.parametrize("writer_class", [JsonlWriter, CsvWriter])
    def test_a_broken_pipe_is_left_to_the_caller(self, writer_class: type[JsonlWriter | CsvWriter]) -> None:
        """Somebody who stops reading is no error of the output."""
        with pytest.raises(BrokenPipeError):
            writer_class(Broken()).write([PLAIN])

    def test_an_error_of_the_rows_is_not_taken_for_the_files(self, tmp_path: Path) -> None:
        """What fails while rows are fetched passes as it is, and nothing is written."""

        def rows() -> Iterator[AnswerRow]:
            yield PLAIN
            raise ConnectionError("the database is gone")

        with (
            pytest.raises(ConnectionError, match="the database is gone"),
            open_writer(str(tmp_path / "out.csv"), OutputFormat.CSV) as writer,
        ):
            writer.write(rows())
        assert names(tmp_path) == []
