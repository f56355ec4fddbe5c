"""How files and streams become items, and how wrong ones are refused."""

from __future__ import annotations

import json
import os
import re
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.readers import InputFormat, check_sources, is_stream, load_text, read_items
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
            ('{"prompt":"\\ud800"}', "the line is not a JSON object: .*surrogate"),
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
                "a field cannot be written as JSON: Recursion limit reached",
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
            ("a.parquet", "JSONL or CSV"),
            ("a.gz", "unpack it first"),
        ],
    )
    def test_formats_that_are_not_read_are_refused(self, tmp_path: Path, name: str, way_out: str) -> None:
        """An ending that lbr cannot read is refused with a way out instead of being taken for text."""
        path = write(tmp_path, name, "[]")
        with pytest.raises(UsageError, match=rf"cannot read .*{name}: lbr reads text, JSONL, CSV and TSV; .*{way_out}"):
            read_items([path])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_column": "a"}, "--prompt-column needs columns, and .*a.txt is read as text"),
            ({"prompt_column": "a", "template": "b"}, "--template and --prompt-column exclude each other"),
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
