"""How templates make prompts of records."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from lbr.core.errors import InputError, UsageError
from lbr.core.types import Part, Prompt
from lbr.io import readers
from lbr.io.readers import read_items
from tests.io import read, refused, texts, write

if TYPE_CHECKING:
    from pathlib import Path


class TestTemplate:
    """A template makes prompts of records."""

    @pytest.mark.parametrize(
        ("name", "content", "metadata"),
        [
            ("in.txt", "Oslo\n", {"prompt": "Oslo"}),
            ("in.jsonl", '{"prompt":"Oslo","id":1}\n', {"prompt": "Oslo"}),
            ("in.jsonl", '{"prompt":"Oslo","messages":3}\n', {"prompt": "Oslo", "messages": 3}),
            ("in.csv", "prompt,id\nOslo,1\n", {"prompt": "Oslo"}),
        ],
    )
    def test_fields_fill_the_template_and_stay_as_metadata(
        self, tmp_path: Path, name: str, content: str | bytes, metadata: dict[str, object]
    ) -> None:
        """Every format's fields are variables, and all but the id come back as metadata."""
        (item,) = read(write(tmp_path, name, content), template="Where is <{{ prompt }}>?\n")
        assert (item.prompt, item.metadata) == (Prompt(text="Where is <Oslo>?\n"), metadata)

    def test_the_id_is_a_variable(self, tmp_path: Path) -> None:
        """The id can be named in a template, and is the item's id all the same."""
        (item,) = read(write(tmp_path, "in.jsonl", '{"id":7,"x":{"y":[1]}}'), template="{{ id }} {{ x.y[0] }}")
        assert item.prompt.text == "7 1"
        assert item.custom_id == 7
        assert item.metadata == {"x": {"y": [1]}}

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ city }}", "UndefinedError: 'city' is undefined; the fields are: 'n', 'items'"),
            ("{{ items.city }}", "UndefinedError"),
            ("{{ n.__class__.__mro__ }}", "SecurityError"),
            ("{{ items.append(1) }}", "SecurityError"),
            ("{{ n + 'a' }}", "TypeError"),
            ("{{ n / (n - n) }}", "ZeroDivisionError"),
            ("{{ range(10 ** 9) }}{{ n }}", "OverflowError"),
            ("{% include 'x' %}{{ n }}", "TypeError"),
        ],
    )
    def test_a_template_that_cannot_be_rendered_is_refused(self, tmp_path: Path, template: str, message: str) -> None:
        """Whatever goes wrong in a template is an error of the record at hand."""
        path = write(tmp_path, "in.jsonl", '{"n":1,"items":[]}\n')
        refused(path, 1, f"the template cannot be rendered: {message}", template=template)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% if n is defined %}x{% endif %}", "is empty"),
            ('{{ "\\ud800" if n is undefined }}', "has half a surrogate pair"),
            ('{{ "\\x00" if n is undefined }}', "has a NUL character"),
        ],
    )
    def test_what_is_no_prompt_is_refused(self, tmp_path: Path, template: str, message: str) -> None:
        """A rendered prompt has to be one that can be stored and sent."""
        path = write(tmp_path, "in.jsonl", "{}\n")
        refused(path, 1, f"the rendered template {message}", template=template)

    @pytest.mark.parametrize(
        ("template", "field"),
        [
            ("{{ topic }}", "topic"),
            ("About {{ topic }}, in {{ n }} words", "topic"),
            ("{{ user.name }}", "user.name"),
            ("{{ user['name'] }}", "user.name"),
            ("{{ xs[1] }}", "xs[1]"),
            ("{{ topic|upper|trim }}", "topic"),
            ("{{ 'about ' ~ topic }}", "topic"),
            ("{% for x in xs %}{{ x }}{% endfor %}", "xs[1]"),
            ("{{ user.get('name') }}", "user.name"),
            ("{{ topic|default('none given') }}", "topic"),
            ("{{ user.name or topic }}", "topic', 'user.name"),
        ],
    )
    def test_a_null_is_not_written_into_a_prompt(self, tmp_path: Path, template: str, field: str) -> None:
        """A placeholder without a value would make a prompt that says None; the field and the record are named."""
        record = '{"topic":null,"n":3,"user":{"name":null},"xs":["a",null]}'
        path = write(tmp_path, "in.jsonl", f'{{"topic":"x","n":1,"user":{{"name":"y"}},"xs":["a","b"]}}\n{record}')
        message = f"the template shows a field that is null: '{field}'. Fill it in"
        refused(path, 2, re.escape(message), template=f"{template}{{{{ n }}}}")

    @pytest.mark.parametrize(
        ("template", "prompt"),
        [
            ("{{ topic or 'anything' }}", "anything"),
            ("{{ topic|default('anything', true) }}", "anything"),
            ("{% if topic is none %}anything{% else %}{{ topic }}{% endif %}", "anything"),
            ("{{ 'anything' if topic is none else topic }}", "anything"),
            ("a{% if topic %} {{ topic }}{% endif %}", "a"),
            ("{{ topic|tojson }}", "null"),
            ("{{ user|tojson }}", '{"name": null}'),
            ("{{ xs|select|join('-') }}", "a"),
            ("{{ n }}{{ zero }}{{ no }}", "30False"),
        ],
    )
    def test_a_template_may_say_what_stands_for_null(self, tmp_path: Path, template: str, prompt: str) -> None:
        """A condition of the template's own, and JSON, go on to take a null for what it is."""
        record = '{"topic":null,"n":3,"zero":0,"no":false,"user":{"name":null},"xs":["a",null]}'
        (item,) = read(write(tmp_path, "in.jsonl", record), template=template)
        assert item.prompt.text == prompt

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("in.csv", "a,b,c\nx,,1\n,,2\n, ,3\n,y,4\n"),
            ("in.jsonl", '{"a":"x","b":""}\n{"a":"","b":""}\n{"a":null,"b":" "}\n{"a":null,"b":"y"}\n'),
        ],
    )
    def test_a_record_with_nothing_to_fill_in_is_empty(self, tmp_path: Path, name: str, content: str) -> None:
        """A prompt that is only the template's own words is refused, in CSV as in JSONL, and can be skipped."""
        path, template = write(tmp_path, name, content), "{{ '@' }}Say: {{ a or '' }} {{ b|upper }}"
        message = "every field that the template shows is empty: 'a', 'b' (and 1 more bad row)\n"
        header = name == "in.csv"
        refused(path, 2 + header, re.escape(f"{message}{path}, line {3 + header}: "), template=template)
        bad = readers.BadRows(skip_empty=True)
        assert [item.line for item in read_items([path], template=template, bad=bad)] == [
            1 + header,
            4 + header,
        ]
        assert (bad.empty, bad.count) == (2, 0)

    @pytest.mark.parametrize("name", ["Review Text", "2nd", "range", "dict", "self", "row", 'a"b'])
    def test_a_column_of_any_name(self, tmp_path: Path, name: str) -> None:
        """`row` holds every column; a column of that name, or of one of Jinja's own, comes first."""
        path = write(tmp_path, "in.jsonl", json.dumps({name: "x"}) + "\n")
        if name != "row":
            assert texts(path, template=f"{{{{ row[{json.dumps(name)}] }}}}") == ["x"]
        if name in {"range", "dict", "row"}:
            assert texts(path, template=f"{{{{ {name} }}}}") == ["x"]

    def test_a_method_is_no_prompt(self, tmp_path: Path) -> None:
        """A field that has the name of a method is written in brackets."""
        path = write(tmp_path, "in.jsonl", b'{"values": "x"}\n')
        with pytest.raises(InputError, match=r"values is a method or a function; write a field of that name as row"):
            read(path, template="{{ row.values }}")
        assert texts(path, template='{{ row["values"] }}') == ["x"]

    @pytest.mark.parametrize("template", ["{{ Review Text }}", "{{ 2nd }}", "{{ Review_Text }}", "{{ row['x'] }}"])
    def test_an_error_names_the_way_to_a_column_of_any_name(self, tmp_path: Path, template: str) -> None:
        """The error for a name that is not one word shows how to write it."""
        path = write(tmp_path, "in.csv", "Review Text,2nd\na,b\n")
        with pytest.raises(UsageError, match=r'Write \{\{ row\["(Review Text|Column Name)"\] \}\}'):
            read(path, template=template)

    def test_a_global_that_is_no_column_is_no_field(self, tmp_path: Path) -> None:
        """A template that shows one of Jinja's own functions would make every prompt the same."""
        with pytest.raises(InputError, match="range is a method or a function"):
            read(write(tmp_path, "in.csv", "prompt\na\n"), template="{{ range }}")

    @pytest.mark.parametrize("template", ["prompt.txt", "Summarise {review}", ""])
    def test_a_template_that_names_nothing_is_refused(self, tmp_path: Path, template: str) -> None:
        """A template that would make every prompt the same is a mistake: a forgotten @, or the wrong braces."""
        path = write(tmp_path, "in.jsonl", "{}\n")
        with pytest.raises(UsageError, match="the template names no field"):
            read_items([path], template=template)

    @pytest.mark.parametrize(
        ("name", "content", "columns"),
        [("in.csv", "a,b\n1,2\n", "'a', 'b'"), ("in.txt", "a\n", "'prompt'")],
    )
    def test_a_column_that_is_not_there_is_refused(
        self, tmp_path: Path, name: str, content: str | bytes, columns: str
    ) -> None:
        """Where the columns are known, the error comes before the first item and names them."""
        path = write(tmp_path, name, content)
        message = f"{path}: the template names columns that are not there: 'city'; there are: {columns}"
        with pytest.raises(UsageError, match=re.escape(message)):
            next(read_items([path], template="{% for i in range(2) %}{{ city }}{% endfor %}"))

    @pytest.mark.parametrize(("template", "line"), [("{{ a", 1), ("x\n{{ a | nope }}", 2), ("{% if %}", 1)])
    def test_a_template_that_is_none_is_refused_at_once(self, tmp_path: Path, template: str, line: int) -> None:
        """A template is compiled before anything is read."""
        path = write(tmp_path, "in.txt", "a\n")
        with pytest.raises(UsageError, match=rf"the template is not valid Jinja: .* \(line {line}\)"):
            read_items([path], template=template)


class TestBatchLines:
    """Lines of OpenAI's batch input."""

    MESSAGES: ClassVar[list[Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]

    def line(self, body: dict[str, Any] | None = None, /, **fields: Any) -> str:
        """Return a line."""
        whole = {"model": "gpt-4o-mini", "messages": self.MESSAGES} | (body or {})
        return json.dumps({"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": whole} | fields)

    def test_the_body_becomes_prompt_and_settings(self, tmp_path: Path) -> None:
        """What the chat adapter has a name for is a setting, all else is sent as it is; the rest is metadata."""
        schema = {"type": "json_schema", "json_schema": {"schema": {"properties": {"b": {}, "a": {}}}}}
        settings = {"temperature": 0, "top_p": 1, "presence_penalty": 0.5, "frequency_penalty": 1, "seed": 7}
        body = settings | {"max_completion_tokens": 9, "stop": "X", "stream": False, "n": 1, "logit_bias": {"5": 1}}
        body |= {"response_format": schema, "user": None, "reasoning_effort": "low"}
        (item,) = read(write(tmp_path, "in.jsonl", self.line(body)))
        extra = {"n": 1, "logit_bias": {"5": 1}, "response_format": schema, "user": None, "reasoning_effort": "low"}
        wanted = {"model": "gpt-4o-mini", **settings, "max_tokens": 9, "stop_sequences": ["X"], "extra_body": extra}
        assert item.prompt == Prompt(messages=tuple(self.MESSAGES), settings=wanted)
        assert (item.custom_id, item.metadata) == ("a-1", {"method": "POST", "url": "/v1/chat/completions"})
        assert item.columns == {
            "custom_id": Part.ID,
            "method": Part.METADATA,
            "url": Part.METADATA,
            "body": Part.PROMPT,
        }

    def test_two_names_for_one_setting_are_both_sent(self, tmp_path: Path) -> None:
        """Nothing of the body is dropped: the second goes where it is sent under its name."""
        (item,) = read(write(tmp_path, "in.jsonl", self.line({"max_tokens": 5, "max_completion_tokens": 6})))
        assert item.prompt.settings == {
            "model": "gpt-4o-mini",
            "max_tokens": 5,
            "extra_body": {"max_completion_tokens": 6},
        }

    @pytest.mark.parametrize(
        ("body", "fields", "message"),
        [
            ({"stream": True}, {}, "the body asks for a stream, and lbr keeps whole answers; remove stream"),
            ({"n": 2}, {}, "the body asks for 2 answers, and lbr keeps one per call; remove n"),
            ({"n": [1]}, {}, r"the body asks for \[1\] answers"),
            ({"model": 5}, {}, "expected the model of the body to be a string, got: 5"),
            ({"messages": "hi"}, {}, "expected messages to be a list"),
            ({}, {"url": "/v1/embeddings"}, "expected the url /v1/chat/completions, got: '/v1/embeddings'"),
            ({}, {"url": 7}, "expected the url"),
            ({}, {"body": "text"}, "expected one of the fields prompt and messages"),
            ({}, {"id": 3}, "both id and custom_id are set"),
        ],
    )
    def test_what_lbr_cannot_do_is_refused_with_its_line(
        self, tmp_path: Path, body: dict[str, Any], fields: dict[str, Any], message: str
    ) -> None:
        """Whatever a line asks for is done, or the line is refused."""
        refused(write(tmp_path, "in.jsonl", f"{self.line()}\n{self.line(body, **fields)}\n"), 2, message)

    def test_a_record_with_a_prompt_is_none(self, tmp_path: Path) -> None:
        """A template, a prompt column or a prompt come first: a field called body is data then."""
        path = write(tmp_path, "in.jsonl", self.line(prompt="p"))
        for options in ({}, {"prompt_column": "prompt"}, {"template": "{{ prompt }}"}):
            (item,) = read(path, **options)
            assert item.prompt == Prompt("p")
            assert item.metadata is not None
            assert "body" in item.metadata
