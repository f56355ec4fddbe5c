"""How CSV is read, as pandas, spreadsheets and people write it."""

from __future__ import annotations

import codecs
import csv
import io
import re
import string
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.readers import InputFormat, read_items
from tests.io import pipe_in, read, refused, texts, write

if TYPE_CHECKING:
    from pathlib import Path


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
