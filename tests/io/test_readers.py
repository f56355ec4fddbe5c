"""How files and streams become items, and how wrong ones are refused."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import random
import re
import string
import threading
import time
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Part, Prompt
from lbr.io import readers
from lbr.io.readers import InputFormat, check_sources, is_stream, read_items
from tests.io import pipe_in, read, refused, texts, write

if TYPE_CHECKING:
    from pathlib import Path


class TestText:
    """A line is a prompt."""

    def test_each_line_is_an_item_that_knows_its_place(self, tmp_path: Path) -> None:
        """Every line becomes an item, with file and line number."""
        path = write(tmp_path, "in.txt", "one\n two \n")
        assert read(path) == [
            Item(Prompt(text="one"), source=path, line=1),
            Item(Prompt(text=" two "), source=path, line=2),
        ]

    @pytest.mark.parametrize(
        "content",
        [
            b"a\nb\n",
            b"a\nb",
            b"a\r\nb\r\n",
            b"\xef\xbb\xbfa\nb\n",
            b"a\nb\n\n  \n\r\n",
            "a\r\nb".encode("utf-16"),
        ],
        ids=["lf", "no end", "crlf", "bom", "blank end", "utf-16"],
    )
    def test_line_ends_bom_and_blank_end_do_not_matter(self, tmp_path: Path, content: str | bytes) -> None:
        """The same prompts come out whatever way the file marks its lines and its end."""
        assert texts(write(tmp_path, "in.txt", content)) == ["a", "b"]

    def test_only_line_feeds_end_lines(self, tmp_path: Path) -> None:
        """Separators that Unicode calls line ends stay within the prompt."""
        assert texts(write(tmp_path, "in.txt", "a\u2028b\x0cc\x85d\n")) == ["a\u2028b\x0cc\x85d"]

    def test_an_empty_file_has_no_items(self, tmp_path: Path) -> None:
        """A file of no lines gives no items."""
        assert read(write(tmp_path, "in.txt", "")) == []

    @pytest.mark.parametrize("blank", ["", "   ", "\t"])
    def test_blank_lines_are_skipped(self, tmp_path: Path, blank: str) -> None:
        """A line of white space is no prompt; the lines after it keep their numbers."""
        path = write(tmp_path, "in.txt", f"a\n{blank}\n\nb\n")
        assert [(item.prompt.text, item.line) for item in read(path)] == [("a", 1), ("b", 4)]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("in.txt", b"ok\nna\xefve\n"), ("in.jsonl", b'{"prompt":"a"}\n{"prompt":"\xe9"}\n')],
    )
    def test_a_wrong_byte_is_named_with_its_line(self, tmp_path: Path, name: str, content: str | bytes) -> None:
        """Bytes that are not UTF-8 are an error that names the flag for the encoding."""
        refused(
            write(tmp_path, name, content),
            2,
            "the line is not UTF-8: it has 0xe[9f] as byte .*--encoding cp1252",
        )

    @pytest.mark.parametrize(
        "content",
        ["a".encode("utf-16-le"), b"\0"],
    )
    def test_nul_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """Text in a different encoding is never taken for prompts."""
        refused(write(tmp_path, "in.txt", content), 1, "the line has a NUL character; remove it")

    def test_memory_does_not_grow_with_the_input(self, tmp_path: Path) -> None:
        """A file of 30 MB is read within 2 MB."""
        path = tmp_path / "in.txt"
        with path.open("wb") as file:
            for _ in range(30):
                file.write((b"x" * 999 + b"\n") * 1_000)
        tracemalloc.start()
        try:
            count = sum(1 for _ in read_items([str(path)]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 30_000
        assert peak < 2_000_000


class TestJsonl:
    """A line is an object."""

    def test_prompt_id_and_metadata(self, tmp_path: Path) -> None:
        """The prompt and the id are taken out, the other fields are metadata."""
        path = write(
            tmp_path,
            "in.jsonl",
            '{"prompt":"a"}\r\n{"id":7,"prompt":"b","n":1.5,"deep":{"x":[null]}}\n'
            '{"custom_id":"c-1","prompt":"c"}\n{"id":null,"prompt":"d"}\n\n',
        )
        assert [(item.prompt.text, item.custom_id, item.metadata, item.line) for item in read(path)] == [
            ("a", None, None, 1),
            ("b", 7, {"n": 1.5, "deep": {"x": [None]}}, 2),
            ("c", "c-1", None, 3),
            ("d", None, None, 4),
        ]

    def test_messages(self, tmp_path: Path) -> None:
        """Chat messages are taken as they are, their content text or parts."""
        path = write(
            tmp_path,
            "in.jsonl",
            '{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"t"}]}]}',
        )
        messages = (
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
        )
        assert read(path) == [Item(Prompt(messages=messages), source=path, line=1)]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("oops", "the line is not a JSON object: unexpected character"),
            ('{"prompt":"\\ud800"}', "the line is not a JSON object: .*half a surrogate pair, which is not Unicode"),
            ('{"prompt":"a","x":{"y":NaN}}', "the line is not a JSON object: .* JSON has no NaN: write null"),
            ('{"prompt":"a","x":-Infinity}', "the line is not a JSON object: .* JSON has no Infinity: write null"),
            ("[" * 5000, "the line is not a JSON object: "),
            ("[1]", r"expected a JSON object, got: \[1\]"),
            ('"a"', "expected a JSON object, got: 'a'"),
            ("{}", "expected one of the fields prompt and messages, got: none; set --prompt-column"),
            ('{"text":"a","n":1}', "expected one of the fields prompt and messages, got: 'text', 'n'; "),
            (
                '{"prompt":"a","messages":[]}',
                "expected one of the fields prompt and messages, got: 'prompt', ",
            ),
            ('{"prompt":" "}', "prompt is empty. Use --skip-empty, or fill it in"),
            ('{"prompt":5}', "expected prompt to be a string, got: 5"),
            ('{"prompt":null}', "prompt is empty. Use --skip-empty, or fill it in"),
            ('{"prompt":"a\\u0000"}', "a field has a NUL character"),
            ('{"prompt":"a","x":["\\\\\\u0000"]}', "a field has a NUL character"),
            ('{"prompt":"a","id":true}', "expected the id to be a string or a whole number, got: True"),
            ('{"prompt":"a","id":1.5}', "expected the id to be a string or a whole number, got: 1.5"),
            ('{"prompt":"a","id":1,"custom_id":2}', "both id and custom_id are set"),
            ('{"messages":[]}', r"expected messages to be a list of at least one, got: \[\]"),
            ('{"messages":"a"}', "expected messages to be a list of at least one, got: 'a'"),
            (
                '{"prompt":"a","x":' + "[" * 260 + "]" * 260 + "}",
                "field 'x' cannot be written as JSON: Recursion limit reached",
            ),
        ],
    )
    def test_a_wrong_line_is_refused(self, tmp_path: Path, line: str, message: str) -> None:
        """What is wrong with a line is said with file and line, right lines before it are read."""
        path = write(tmp_path, "in.jsonl", f'{{"prompt":"fine"}}\n{line}\n{{"prompt":"fine"}}\n')
        items = read_items([path])
        assert next(items).prompt.text == "fine"
        refused(path, 2, message)

    def test_an_escaped_backslash_before_u0000_is_no_nul(self, tmp_path: Path) -> None:
        """A prompt that talks about the escape is a prompt like any other."""
        assert texts(write(tmp_path, "in.jsonl", r'{"prompt":"\\u0000"}')) == [r"\u0000"]

    def test_blank_lines_are_skipped(self, tmp_path: Path) -> None:
        """A blank line between objects is skipped as one at the end is."""
        assert texts(write(tmp_path, "in.jsonl", '{"prompt":"a"}\n\n{"prompt":"b"}\n\n')) == ["a", "b"]

    def test_a_long_value_is_shortened(self, tmp_path: Path) -> None:
        """A message never carries a whole prompt along."""
        path = write(tmp_path, "in.jsonl", '"' + "x" * 100_000 + '"')
        with pytest.raises(InputError) as caught:
            read(path)
        assert len(str(caught.value)) < len(path) + 200

    def test_prompt_column_names_the_field(self, tmp_path: Path) -> None:
        """Any field can be the prompt; the others are metadata, even one named prompt."""
        path = write(tmp_path, "in.jsonl", '{"question":"a","prompt":"p","id":1}\n')
        assert read(path, prompt_column="question") == [
            Item(Prompt(text="a"), custom_id=1, metadata={"prompt": "p"}, source=path, line=1)
        ]

    def test_a_missing_prompt_column_is_refused(self, tmp_path: Path) -> None:
        """A line without the named field is an error that names those it has."""
        path = write(tmp_path, "in.jsonl", '{"q":"a"}\n{"prompt":"p"}\n')
        refused(path, 2, "there is no field 'q'; there are: 'prompt'", prompt_column="q")


class TestBadRows:
    """Rows that make no prompt."""

    ROWS = 'id,prompt\n1,a\n2,\n3\n4,b\n5, \n6,\n7,\n8,na\xefve\n9,"c"d\n10,e\n11,"f\n12,g\n'.encode("latin-1")

    def test_all_are_counted_and_the_first_shown(self, tmp_path: Path) -> None:
        """One message has the number of bad rows, and the first five with their lines."""
        path = write(tmp_path, "in.csv", self.ROWS)
        with pytest.raises(InputError) as caught:
            read(path)
        first, *more, way_out = str(caught.value).split("\n")
        assert first == f"{path}, line 3: column prompt is empty (and 7 more bad rows)"
        assert [line.split(": ")[0] for line in more] == [f"{path}, line {n}" for n in (4, 6, 7, 8)]
        assert way_out == "Fix them, or leave them out with --skip-bad FILE"
        assert caught.value.line == 3

    def test_they_are_left_out_and_written_to_a_file(self, tmp_path: Path) -> None:
        """The other rows are read; the file has line, reason and text of each bad one, every time the same."""
        path, file = write(tmp_path, "in.csv", self.ROWS), tmp_path / "bad.jsonl"
        for skip_empty, lines in [(False, [3, 4, 6, 7, 8, 9, 10, 12]), (True, [4, 9, 10, 12])] * 2:
            bad = readers.BadRows(skip_bad=str(file), skip_empty=skip_empty)
            # A quote that is not closed costs its own line alone.
            assert [item.custom_id for item in read_items([path], bad=bad)] == ["1", "4", "10", "12"]
            assert (bad.count, bad.empty) == (len(lines), 8 - len(lines))
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert [(row["source"], row["line"]) for row in rows] == [(path, line) for line in lines]
            assert [row["text"] for row in rows[-3:]] == ["8,na\\xefve", '9,"c"d', '11,"f']
            assert rows[0]["reason"].startswith("expected 2 cells" if skip_empty else "column prompt is empty")
        assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.jsonl", "in.csv"]

    def test_a_reader_that_is_left_publishes_nothing(self, tmp_path: Path) -> None:
        """The file with the bad rows is whole, or as it was."""
        path, file = write(tmp_path, "in.csv", self.ROWS), tmp_path / "bad.jsonl"
        file.write_text("before")
        items = read_items([path], bad=readers.BadRows(skip_bad=str(file)))
        next(items)
        del items
        assert file.read_text() == "before"
        assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.jsonl", "in.csv"]


class TestLargeNumbers:
    """A whole number that would lose its last digits is refused; every other one stays what it is."""

    LARGE = "12345678901234567890123"

    @pytest.mark.parametrize(
        ("record", "field", "number"),
        [
            (f'{{"prompt":"a","n":{LARGE}}}', "n", LARGE),
            (f'{{"prompt":"a","n":-{LARGE}}}', "n", f"-{LARGE}"),
            (f'{{"prompt":"a","id":{LARGE}}}', "id", LARGE),
            (f'{{"prompt":"a","of":{{"mine":[1,{LARGE}]}}}}', "of.mine[1]", LARGE),
            (f'{{"messages":[{{"role":"user","content":"a","n":{LARGE}}}]}}', "messages[0].n", LARGE),
            ('{"prompt":"a","n":18446744073709551616}', "n", "18446744073709551616"),
            ('{"prompt":"a","n":-9223372036854775809}', "n", "-9223372036854775809"),
            (f'{{"prompt":"a","n":1,"m":{"9" * 100}}}', "m", "9" * 80 + "…"),
        ],
    )
    def test_is_refused(self, tmp_path: Path, record: str, field: str, number: str) -> None:
        """The field and the number, as it stands in the file, are named."""
        path = write(tmp_path, "in.jsonl", f'{{"prompt":"b"}}\n{record}\n')
        message = f"the number in '{field}' has more than 64 bits: {number}; put it in quotes"
        refused(path, 2, re.escape(message))

    @pytest.mark.parametrize(
        "value",
        [
            "18446744073709551615",
            "-9223372036854775808",
            "1e30",
            "-1.5e300",
            "123456789012345678901.5",
            '"12345678901234567890123"',
            '["12345678901234567890123", 1e25]',
            "0.12345678901234567890123",
        ],
    )
    def test_others_are_kept(self, tmp_path: Path, value: str) -> None:
        """Numbers with a point or an exponent are floats, and digits in quotes are text."""
        (item,) = read(write(tmp_path, "in.jsonl", f'{{"prompt":"{"1" * 40}","n":{value}}}'))
        assert item.metadata == {"n": json.loads(value)}


class TestSources:
    """What may be read, and in which way."""

    def test_sources_are_read_in_order_each_in_its_format(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files and stdin follow each other as they were named."""
        pipe_in(monkeypatch, b"from stdin\n")
        first = write(tmp_path, "a.ndjson", '{"prompt":"json"}')
        last = write(tmp_path, "b.CSV", "prompt\ncsv\n")
        items = list(read_items([first, "-", last]))
        assert [(item.prompt.text, item.source, item.line) for item in items] == [
            ("json", first, 1),
            ("from stdin", "stdin", 1),
            ("csv", last, 2),
        ]

    def test_format_beats_the_ending(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The format as given holds for every source, stdin too."""
        pipe_in(monkeypatch, b'{"prompt":"b"}')
        path = write(tmp_path, "in.json", '{"prompt":"a"}')
        items = read_items([path, "-"], format=InputFormat.JSONL)
        assert [item.prompt.text for item in items] == ["a", "b"]

    def test_stdin_errors_name_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lines of stdin are told apart like those of a file, and stdin stays open."""
        pipe_in(monkeypatch, b"a\nb\0\nc\n")
        with pytest.raises(InputError, match=r"^stdin, line 2: "):
            list(read_items(["-"]))
        os.fstat(readers.STDIN_FILE)

    def test_a_closed_stdin_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that was started without stdin gets an error."""
        monkeypatch.setattr(readers, "STDIN_FILE", 987)
        with pytest.raises(UsageError, match="cannot read '-': Bad file descriptor"):
            list(read_items(["-"]))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "none.txt",
                "cannot read '.*none.txt': No such file or directory; check the path",
            ),
            ("", "is a folder; name the files in it"),
            ("a.txt/b", "cannot read '.*b': Not a directory"),
            ("nul\0", "cannot read .*null"),
        ],
    )
    def test_all_sources_are_checked_before_anything_is_read(self, tmp_path: Path, name: str, message: str) -> None:
        """A source that cannot be read is refused at once, by read_items too."""
        good = write(tmp_path, "a.txt", "a\n")
        sources = [good, str(tmp_path / name)]
        with pytest.raises(UsageError, match=message):
            check_sources(sources)
        with pytest.raises(UsageError, match=message):
            read_items(sources)

    def test_an_unreadable_file_is_refused(self, mortal_folder: Path) -> None:
        """A file without permission is refused with the reason."""
        path = mortal_folder / "a.txt"
        path.write_text("a")
        path.chmod(0)
        with pytest.raises(UsageError, match="Permission denied; check the path and its permissions"):
            check_sources([str(path)])

    @pytest.mark.parametrize(
        ("sources", "message"),
        [
            ([], "no input given"),
            (["-", "-"], r"- \(stdin\) can be read only once"),
        ],
    )
    def test_impossible_lists_of_sources_are_refused(self, sources: list[str], message: str) -> None:
        """No source at all, and stdin twice, are usage errors."""
        with pytest.raises(UsageError, match=message):
            check_sources(sources)

    @pytest.mark.parametrize(
        ("name", "way_out"),
        [
            ("a.json", "JSONL, one object per line"),
            ("a.JSON.gz", "JSONL, one object per line"),
            ("a.parquet.gz", "unpack it"),
            ("a.xlsx", "save it as CSV"),
            ("a.jsonl.zst", "unpack it, or compress it with gzip"),
        ],
    )
    def test_formats_that_are_not_read_are_refused(self, tmp_path: Path, name: str, way_out: str) -> None:
        """An ending that lbr cannot read is refused with a way out instead of being taken for text."""
        path = write(tmp_path, name, "[]")
        with pytest.raises(
            UsageError, match=rf"cannot read .*{name}: lbr reads text, JSONL, CSV, TSV and Parquet; .*{way_out}"
        ):
            read_items([path])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_column": "a"}, "--prompt-column needs columns, and .*a.txt is read as text"),
            ({"prompt_column": "a", "template": "b"}, "--template and --prompt-column exclude each other"),
            ({"id_column": "a"}, "--id-column needs columns, and .*a.txt is read as text"),
            (
                {"prompt_column": "a", "id_column": "a", "format": InputFormat.CSV},
                "are the same, 'a'; name two columns",
            ),
        ],
    )
    def test_flags_that_exclude_each_other_are_refused(
        self, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        """Combinations without a meaning are refused before anything is read."""
        with pytest.raises(UsageError, match=message):
            read_items([write(tmp_path, "a.txt", "a\n")], **options)

    def test_a_pipe_is_checked_and_read_without_loss(self, tmp_path: Path) -> None:
        """Checking a named pipe takes nothing from it."""
        path = tmp_path / "pipe"
        os.mkfifo(path)
        check_sources([str(path)])
        writer = threading.Thread(target=path.write_text, args=("a\nb\n",))
        writer.start()
        assert texts(str(path)) == ["a", "b"]
        writer.join()

    def test_is_stream(self, tmp_path: Path) -> None:
        """Stdin, pipes and devices can be read only once, regular files again."""
        os.mkfifo(tmp_path / "pipe")
        names = ["-", str(tmp_path / "pipe"), "/dev/null", write(tmp_path, "a.txt", "a")]
        assert [is_stream(name) for name in names] == [True, True, True, False]

    def test_a_reader_that_is_left_closes_its_file(self, tmp_path: Path) -> None:
        """Nothing stays open when the consumer stops early."""
        path = write(tmp_path, "a.txt", "a\nb\n")
        items = read_items([path])
        next(items)
        del items
        assert path not in [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]


class TestGzip:
    """Text formats may be compressed; the content says so, the name has the format."""

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_the_same_items_come_out(self, tmp_path: Path, encoding: str) -> None:
        """Compressed files are read as they would be without, and their lines have the same numbers."""
        for name, content in {
            "in.txt": "Größe\nb\n",
            "in.jsonl": '{"prompt": "Größe", "id": 1}\n\n{"prompt": "b"}\n',
            "in.csv": 'id;prompt\n1;"Grö\nße"\n2;b\n',
            "in.tsv": "id\tprompt\n1\tGröße\n",
        }.items():
            plain = write(tmp_path, name, content.encode(encoding))
            packed = write(tmp_path, f"{name}.gz", gzip.compress(content.encode(encoding)))
            assert [replace(item, source=plain) for item in read(packed)] == read(plain)
        two = write(tmp_path, "two.txt.GZ", gzip.compress(b"a\n") + gzip.compress(b"b\n"))
        assert texts(two) == ["a", "b"]

    def test_the_content_decides(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that only has the name is read as it is; one without the name, and stdin, are unpacked."""
        assert texts(write(tmp_path, "a.txt.gz", b"a\n")) == ["a"]
        assert texts(write(tmp_path, "a.txt", gzip.compress(b"a\n"))) == ["a"]
        pipe_in(monkeypatch, gzip.compress(b"a\nb\n"))
        assert texts("-") == ["a", "b"]

    def test_a_file_that_is_cut_off_is_refused_with_its_line(self, tmp_path: Path) -> None:
        """Wherever it was cut, the file is never taken for a shorter one."""
        lines = [f"{random.Random(n).randbytes(40).hex()}\n" for n in range(400)]
        whole = gzip.compress("".join(lines).encode())
        for size in (5, 12, 300, len(whole) // 2, len(whole) - 1):
            path = write(tmp_path, "in.txt.gz", whole[:size])
            with pytest.raises(
                InputError, match=r"in.txt.gz, line \d+: cannot be read: the compressed file is cut off"
            ):
                read(path)
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0xFF
        with pytest.raises(InputError, match=r"line \d+: cannot be read"):
            read(write(tmp_path, "in.txt.gz", bytes(damaged)))

    def test_a_reader_that_is_left_closes_its_file(self, tmp_path: Path) -> None:
        """Nothing stays open when the consumer stops early."""
        path = write(tmp_path, "a.txt.gz", gzip.compress(b"a\nb\n"))
        items = read_items([path])
        next(items)
        del items
        assert path not in [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]


class TestIdColumn:
    """`--id-column` names the id."""

    def test_the_column_is_the_id(self, tmp_path: Path) -> None:
        """Fields that would be the id otherwise are metadata then."""
        (row,) = read(write(tmp_path, "in.csv", "id,sku,prompt\n1,007,a\n"), id_column="sku")
        assert (row.custom_id, row.metadata) == ("007", {"id": "1"})
        assert row.columns == {"id": Part.METADATA, "sku": Part.ID, "prompt": Part.PROMPT}
        lines = '{"prompt": "a", "sku": 7, "id": 1, "custom_id": 2}\n'
        (line,) = read(write(tmp_path, "in.jsonl", lines), id_column="sku", template="{{ prompt }}")
        assert (line.custom_id, line.metadata) == (7, {"prompt": "a", "id": 1, "custom_id": 2})

    def test_a_column_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        """In a table at once, in JSONL by its line."""
        with pytest.raises(UsageError, match="there is no column 'sku'; there are: 'prompt'.*; set --id-column"):
            read(write(tmp_path, "in.csv", "prompt\na\n"), id_column="sku")
        path = write(tmp_path, "in.jsonl", '{"prompt": "a", "sku": 1}\n{"prompt": "a"}\n')
        refused(path, 2, "there is no field 'sku' for --id-column", id_column="sku")


class TestCsv:
    """A record is a row under the header."""

    @pytest.mark.parametrize(("name", "comma"), [("in.csv", ","), ("in.tsv", "\t")])
    def test_prompt_id_and_metadata(self, tmp_path: Path, name: str, comma: str) -> None:
        """The prompt and the id are taken out, the other columns are metadata, lines count from the record's start."""
        rows = ["id,prompt,city", '1,"two\nlines",Oslo', ',"say ""hi""",', "3,c,Rome", "", ""]
        path = write(tmp_path, name, "\n".join(rows).replace(",", comma))
        assert read(path) == [
            Item(Prompt(text="two\nlines"), "1", {"city": "Oslo"}, path, 2),
            Item(Prompt(text='say "hi"'), None, {"city": ""}, path, 4),
            Item(Prompt(text="c"), "3", {"city": "Rome"}, path, 5),
        ]

    def test_bom_and_crlf(self, tmp_path: Path) -> None:
        """A file as spreadsheets write it is read as it is meant."""
        path = write(tmp_path, "in.csv", b"\xef\xbb\xbfprompt\r\na\r\n\r\n")
        assert read(path) == [Item(Prompt(text="a"), source=path, line=2)]

    def test_prompt_column_names_the_column(self, tmp_path: Path) -> None:
        """Any column can be the prompt; the others are metadata, even one named prompt."""
        path = write(tmp_path, "in.csv", "q,prompt,messages\na,p,m\n")
        assert read(path, prompt_column="q") == [
            Item(Prompt(text="a"), metadata={"prompt": "p", "messages": "m"}, source=path, line=2)
        ]

    def test_a_column_named_messages_is_metadata(self, tmp_path: Path) -> None:
        """CSV has no chat messages, so the name means nothing there."""
        path = write(tmp_path, "in.csv", "prompt,messages\na,m\n")
        assert read(path) == [Item(Prompt(text="a"), metadata={"messages": "m"}, source=path, line=2)]

    def test_the_id_may_be_the_prompt(self, tmp_path: Path) -> None:
        """A column named as the prompt is the prompt, whatever its name."""
        path = write(tmp_path, "in.csv", "id,custom_id\na,7\n")
        assert read(path, prompt_column="id") == [Item(Prompt(text="a"), "7", None, path, 2)]

    def test_a_huge_cell(self, tmp_path: Path) -> None:
        """A cell may be longer than Python's csv module allows by itself."""
        assert texts(write(tmp_path, "in.csv", "prompt\n" + "x" * 1_000_000)) == ["x" * 1_000_000]

    @pytest.mark.parametrize(
        ("content", "line", "message"),
        [
            ("prompt,prompt\na,b\n", 1, "several columns have the same name: 'prompt'"),
            ("column_2,,prompt\na,,b\n", 1, "several columns have the same name: 'column_2'"),
            ("prompt,x,\na,b,\na\n", 3, "expected 3 cells as in line 1, got: 1; put cells"),
            ("\n\nprompt,x\na\n", 4, "expected 2 cells as in line 3, got: 1"),
            (
                "prompt\na,\n",
                2,
                "expected 1 cell as in line 1, got: 2; put .* ',' in quotes, or set --delimiter tab",
            ),
            ("prompt,x\na,b\nc\n", 3, "expected 2 cells as in line 1, got: 1"),
            ('prompt,x\n"a\n",b\nc,d,e\n', 4, "expected 2 cells as in line 1, got: 3"),
            ("prompt,x\na,b\n ,d\n", 3, "column prompt is empty. Use --skip-empty, or fill it in"),
            ('prompt\na\n""\n', 3, "column prompt is empty"),
            (
                'prompt,x\na,b\n"c\n,d\n',
                3,
                "the row is not valid CSV: unexpected end of data; close",
            ),
            ('prompt,x\na,b\n"c"d,e\n', 3, "the row is not valid CSV: ',' expected after '\"'"),
            ("id,custom_id,prompt\n1,2,a\n", 2, "both id and custom_id are set"),
        ],
    )
    def test_a_wrong_record_is_refused(self, tmp_path: Path, content: str, line: int, message: str) -> None:
        """What is wrong with a record is said with the line that it starts in."""
        refused(write(tmp_path, "in.csv", content), line, message)

    @pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
    def test_an_empty_file_is_refused(self, tmp_path: Path, content: str | bytes) -> None:
        """A file without a header is an error, for nobody can say what its columns were."""
        path = write(tmp_path, "in.csv", content)
        with pytest.raises(InputError, match=re.escape(path) + ": the file is empty"):
            read(path)

    @pytest.mark.parametrize("column", [None, "nope"])
    def test_a_missing_column_is_refused(self, tmp_path: Path, column: str | None) -> None:
        """Without the prompt's column the error names those there are, and both flags."""
        path = write(tmp_path, "in.csv", "q,city\na,b\n")
        message = (
            f"there is no column '{column or 'prompt'}'; there are: 'q', 'city' (delimiter ','); set --prompt-column"
        )
        with pytest.raises(UsageError, match=re.escape(f"{path}: {message}")):
            read(path, prompt_column=column)


class TestCsvOfEveryDay:
    """CSV as pandas, spreadsheets and people write it."""

    @pytest.mark.parametrize("delimiter", list(",;\t|"))
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
    def test_every_dialect_gives_the_same_cells(self, tmp_path: Path, delimiter: str, end: str, encoding: str) -> None:
        """What csv.writer has written is read back cell by cell, whatever the cells begin with or hold."""
        cells = [f"{mark}x{mark}" for mark in string.punctuation + " \t\n\r"]
        cells += [
            "",
            "a\nb",
            "a\r\nb",
            "a\rb",
            'say "hi"',
            " both ",
            "grün; ja, | oder\tnein",
            "\u2028",
            "0012",
        ]
        rows = [{"column_1": str(n), "id": f"i{n}", "prompt": f"{one}p", "note": one} for n, one in enumerate(cells)]
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["", "id", "prompt", "note"], *(row.values() for row in rows)])
        content = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
        items = read(write(tmp_path, "in.csv", content + file.getvalue().encode(encoding)))
        assert [{"id": item.custom_id, "prompt": item.prompt.text, **(item.metadata or {})} for item in items] == rows

    def test_a_line_for_excel_names_the_delimiter(self, tmp_path: Path) -> None:
        """It is no header, lines are counted with it, and --delimiter goes before it."""
        for encoding in ("utf-8-sig", "utf-16"):
            content = 'sep=#\r\nid#prompt\r\n1#"a,b"\r\n'.encode(encoding)
            (item,) = read(path := write(tmp_path, "in.csv", content))
            assert (item.custom_id, item.prompt.text, item.line) == ("1", "a,b", 3)
        with pytest.raises(UsageError, match="there are: 'id#prompt'"):
            read(path, delimiter=",")
        assert texts(write(tmp_path, "in.csv", "sep=a\nx\n"), prompt_column="sep=a") == ["x"]

    @pytest.mark.parametrize(
        "rows",
        [
            ["Hello, world; fine", "Yes, no; maybe", "One, two; three"],
            ["a | b", "c | d"],
            ["tab\there", "tab\tthere"],
        ],
    )
    def test_one_column_of_prose_stays_one(self, tmp_path: Path, rows: list[str]) -> None:
        """However regular the commas and semicolons of prose are, they are never taken for columns."""
        quoted = write(tmp_path, "quoted.csv", "prompt\n" + "".join(f'"{row}"\n' for row in rows))
        assert texts(quoted) == rows
        plain = write(tmp_path, "plain.csv", "prompt\n" + "".join(f"{row}\n" for row in rows))
        if "," in rows[0]:
            refused(plain, 2, "expected 1 cell as in line 1, got: 2", delimiter=",")
            refused(plain, 2, "expected 1 cell as in line 1, got: 2")
        else:
            assert texts(plain) == rows

    @pytest.mark.parametrize(
        ("header", "row", "column", "delimiter"),
        [
            ("id;prompt", "1;Hi, you", None, ";"),
            ("prompt,id;x", "Hi,1;x", None, ","),
            ("name, first;age", "Bo, Jo;7", "age", ";"),
            ("a;b,prompt", "1;2,Hi", "a;b", ","),
            ("q;n", "one;2", "nope", ";"),
            ("prompt;note; more", "", "nope", ";"),
        ],
    )
    def test_the_delimiter_is_the_one_that_gives_the_column(
        self, tmp_path: Path, header: str, row: str, column: str | None, delimiter: str
    ) -> None:
        """Of two that fit, it is the one with the wanted column; without any, the message names the one used."""
        path = write(tmp_path, "in.csv", f"{header}\n{row}\n{row}\n")
        if column == "nope":
            with pytest.raises(UsageError, match=re.escape(f"(delimiter '{delimiter}')")):
                read(path, prompt_column=column)
        else:
            wanted = column or "prompt"
            cells = dict(zip(header.split(delimiter), row.split(delimiter), strict=True))
            assert texts(path, prompt_column=column) == [cells[wanted]] * 2

    @pytest.mark.parametrize(("given", "meant"), [(":", ":"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t")])
    def test_the_delimiter_can_be_given(self, tmp_path: Path, given: str, meant: str) -> None:
        """Any character can be the delimiter, of .tsv files too."""
        path = write(tmp_path, "in.tsv", f"id{meant}prompt\n1{meant}a,b;c|d\n")
        assert texts(path, delimiter=given) == ["a,b;c|d"]

    def test_one_column_gets_a_hint(self, tmp_path: Path) -> None:
        """A file whose delimiter is not known says how to name it."""
        path = write(tmp_path, "in.csv", "id:prompt\n1:a\n")
        with pytest.raises(UsageError, match=r"there are: 'id:prompt' \(delimiter ','\); set --delimiter if"):
            read(path)

    @pytest.mark.parametrize(
        ("content", "metadata"),
        [
            (",prompt,label\n0,Hello,a\n", [{"column_1": "0", "label": "a"}]),
            ("column_1,,prompt,\na,b,Hello,\n", [{"column_1": "a", "column_2": "b"}]),
            (
                "id,prompt,,\n1,Hello,,\n2,Hello\n3,Hello,,x\n",
                [None, None, {"column_3": "", "column_4": "x"}],
            ),
            ('id, prompt, n\n1, Hello,  x \n2,Hello," y"\n', [{"n": "x "}, {"n": " y"}]),
            ("id,prompt, n\n1,Hello, x\n", [{" n": " x"}]),
            ("\n\nid;prompt;\n\n1;Hello;\n \n2;Hello;\n", [None, None]),
        ],
    )
    def test_the_header(self, tmp_path: Path, content: str, metadata: list[dict[str, str] | None]) -> None:
        """Unnamed columns get a name, empty ones at the end are left out, and `id, prompt` has no spaces in names."""
        items = read(write(tmp_path, "in.csv", content))
        assert [(item.prompt.text, item.metadata) for item in items] == [("Hello", one) for one in metadata]

    def test_stdin_is_looked_at_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The delimiter and the encoding of a stream are found without losing a row of it."""
        rows = "".join(f"{n};Hi, {n}\n" for n in range(20_000))
        pipe_in(monkeypatch, f"id;prompt\n{rows}".encode("utf-16"))
        items = list(read_items(["-"], format=InputFormat.CSV))
        assert [item.prompt.text for item in items] == [f"Hi, {n}" for n in range(20_000)]

    def test_an_encoding_can_be_given(self, tmp_path: Path) -> None:
        """A file is read in the encoding that is given; bytes that do not fit it are refused."""
        path = write(tmp_path, "in.csv", "id;prompt\n1;Grüße für 5 €\n".encode("cp1252"))
        assert texts(path, encoding="cp1252") == ["Grüße für 5 €"]
        refused(path, 2, "the line is not ASCII: it has 0xfc as byte 5", encoding="ascii")

    @pytest.mark.parametrize(
        "options",
        [{"encoding": one} for one in ("utf-9", "base64", "rot13", "a\0b")] + [{"delimiter": '"'}, {"delimiter": "::"}],
    )
    def test_flags_without_a_meaning_are_refused(self, tmp_path: Path, options: dict[str, Any]) -> None:
        """Unknown encodings, encodings that are not for text, and impossible delimiters are usage errors."""
        (flag,) = options
        with pytest.raises(UsageError, match=f"expected --{flag} to be "):
            read_items([write(tmp_path, "in.csv", "prompt\na\n")], **options)

    def test_a_header_of_300_000_columns(self, tmp_path: Path) -> None:
        """The time for a header grows with its length, not with its square."""
        columns = ",".join(f"c{n}" for n in range(300_000))
        path = write(tmp_path, "in.csv", f"prompt,{columns},\na,{columns},\n")
        started = time.process_time()
        (item,) = read(path)
        assert len(item.metadata or {}) == 300_000
        assert time.process_time() - started < 20

    @pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.csv"])
    def test_a_line_that_is_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """A line above the limit is refused before it is read whole."""
        monkeypatch.setattr(readers, "MAX_LINE", 2**20)
        path = write(tmp_path, name, "prompt\n" + "x" * 30_000_000)
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match="line 2: the line is longer than 1 MB"):
                list(read_items([path], bad=readers.BadRows(skip_bad=str(tmp_path / "bad"))))
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()


class TestWhatAFileShows:
    """What the beginning of a table decides about the rest."""

    def test_a_header_in_another_encoding_is_named(self, tmp_path: Path) -> None:
        """The header is checked like any row; with its encoding it is read."""
        path = write(tmp_path, "in.csv", "Größe;prompt\n1;Hallo\n".encode("cp1252"))
        with pytest.raises(
            InputError, match=r"line 1: the line is not UTF-8: it has 0xf6 as byte 3; .*--encoding cp1252"
        ):
            read(path)
        (item,) = read(path, encoding="cp1252")
        assert (item.prompt.text, item.metadata) == ("Hallo", {"Größe": "1"})

    def test_a_byte_order_mark_goes_before_a_flag(self, tmp_path: Path) -> None:
        """A file that begins with a mark says itself what it is."""
        for encoding in ("utf-8-sig", "utf-16"):
            (item,) = read(write(tmp_path, "in.csv", "prompt\ngrün\n".encode(encoding)), encoding="cp1252")
            assert item.prompt.text == "grün"

    def test_a_quote_after_spaces_begins_a_cell(self, tmp_path: Path) -> None:
        """Spaces before a quote belong to no cell; others do if the header has none."""
        (first, second) = read(write(tmp_path, "in.csv", b'id,prompt\n1, "a, b"\n2, c\n'))
        assert (first.prompt.text, second.prompt.text) == ("a, b", "c")
        path = write(tmp_path, "in.csv", b'id,prompt,x\n1," ""a"", ","b, "\n2, c,", ""d"""\n')
        rows = [(item.prompt.text, item.metadata) for item in read(path)]
        assert rows == [(' "a", ', {"x": "b, "}), (" c", {"x": ', "d"'})]

    def test_a_carriage_return_ends_a_row(self, tmp_path: Path) -> None:
        """As in pandas, it belongs to a cell only inside quotes."""
        assert texts(write(tmp_path, "in.csv", b'prompt\nx\ra\n"b\rc"\n')) == ["x", "a", "b\rc"]
