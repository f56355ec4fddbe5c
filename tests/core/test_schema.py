"""Where schemas come from, and which answers fit them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field, field_validator

from lbr.core.errors import BadAnswer, Family, UsageError
from lbr.core.schema import Validator, import_type, load_schema, schema_of

if TYPE_CHECKING:
    from pathlib import Path

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


class Person(BaseModel):
    """A type with a limit."""

    name: str
    age: int = Field(ge=0)


class Aliased(BaseModel):
    """A type whose JSON has other names than its Python."""

    first_name: str = Field(alias="firstName")


class Names(RootModel[list[str]]):
    """A type that is a list at the top."""


@dataclass
class Point:
    """A type that is not pydantic's own."""

    x: int


def test_load_schema_reads_a_schema(tmp_path: Path) -> None:
    """A file with a JSON schema, byte order mark or not, is returned as it is."""
    path = tmp_path / "schema.json"
    path.write_bytes(b'\xef\xbb\xbf{"type": "object", "properties": {"a": {"type": "string"}}}')
    assert load_schema(path) == {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"type":\n  "object"\n"x"}',
            "{path}, line 3: not valid JSON: ",
        ),
        (b'{"type": "integer", "minimum": NaN}', "{path}, line 1: not valid JSON: "),
        (b'{"type": "number", "maximum": 1e999}', "{path}, line 1: not valid JSON: "),
        (b"", "{path}, line 1: not valid JSON: "),
        (b"\xff", "{path} is not UTF-8: it has 0xff as byte 1"),
        (b"[1]", "{path}: expected a JSON schema such as"),
        (b"null", "{path}: expected a JSON schema such as"),
        (b"{}", "{path}: expected a JSON schema such as"),
        (b'{"foo": 1}', "{path}: expected a JSON schema such as"),
        (
            b'{"type": "strnig"}',
            '{path}: the JSON schema is not valid at $.type: "strnig" is not valid under any',
        ),
        (
            b'{"properties": {"a": {"type": 3}}}',
            "{path}: the JSON schema is not valid at $.properties.a.type: 3",
        ),
        (
            b'{"required": "a"}',
            '{path}: the JSON schema is not valid at $.required: "a" is not of type "array"',
        ),
        (b"[" * 100_000, "{path}, line 1: not valid JSON: "),
    ],
)
def test_load_schema_refuses_what_is_none(tmp_path: Path, content: Any, message: Any) -> None:
    """A file without a JSON schema that says something is refused with its path and the reason."""
    path = tmp_path / "schema.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_schema(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_load_schema_names_the_words_it_does_not_know(tmp_path: Path) -> None:
    """An object without schema words is answered with its keys and an example."""
    path = tmp_path / "schema.json"
    path.write_text('{"name": "x", "fields": []}')
    with pytest.raises(UsageError, match=r"without any keyword; its keys: fields, name"):
        load_schema(path)


def test_load_schema_refuses_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    """What is no file is refused with its path."""
    with pytest.raises(UsageError, match=r"cannot read the schema .*nowhere\.json: No such file"):
        load_schema(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=": Is a directory"):
        load_schema(tmp_path)


@pytest.mark.parametrize(
    ("type_", "schema_type"), [(Person, "object"), (Names, "array"), (Point, "object"), (list[int], "array")]
)
def test_schema_of_takes_what_pydantic_reads(type_: Any, schema_type: Any) -> None:
    """Pydantic models, dataclasses and plain types have a schema."""
    assert schema_of(type_)["type"] == schema_type


@pytest.mark.parametrize("value", [object, socket.socket, 3, "Nowhere", Any])
def test_schema_of_refuses_the_rest(value: Any) -> None:
    """What has no JSON schema is refused."""
    with pytest.raises(UsageError, match="expected a pydantic BaseModel class as result type, got: "):
        schema_of(value)


def test_import_type_finds_a_class_in_the_working_directory(module: Any, tmp_path: Path) -> None:
    """The working directory is importable, also when Python was started elsewhere."""
    module(
        "shapes_here",
        "from pydantic import BaseModel\nclass Box:\n    class Inner(BaseModel):\n        a: int\n",
    )
    assert str(tmp_path) not in sys.path
    assert import_type("shapes_here:Box.Inner").__qualname__ == "Box.Inner"
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes_bad", "expected a name like 'pkg.module:Class', got: 'shapes_bad'"),
        (":A", "expected a name like 'pkg.module:Class', got: ':A'"),
        (
            "nowhere_mod:A",
            "cannot import 'nowhere_mod:A': module 'nowhere_mod' failed with ModuleNotFoundError: No",
        ),
        (
            "shapes_bad:A",
            "cannot import 'shapes_bad:A': module 'shapes_bad' failed with ZeroDivisionError: division",
        ),
        ("shapes_good:B", "cannot import 'shapes_good:B': module 'shapes_good' has no attribute 'B'"),
        ("shapes_good:A.b", "cannot import 'shapes_good:A.b': type object 'A' has no attribute 'b'"),
        (
            "shapes_good:A",
            "expected 'shapes_good:A' to be a pydantic BaseModel class, got: type <class 'shapes_good.A'>",
        ),
        ("shapes_good:a", "expected 'shapes_good:a' to be a pydantic BaseModel class, got: int 3"),
    ],
)
def test_import_type_says_which_step_failed(module: Any, spec: Any, message: Any) -> None:
    """A type that cannot be had is refused with the step that failed and why."""
    module("shapes_bad", "1 / 0")
    module("shapes_good", "class A: ...\na = 3")
    with pytest.raises(UsageError) as caught:
        import_type(spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '\n  {"age":36,"name":"Ada"}  ',
        '```json\n{"name": "Ada", "age": 36}\n```',
        '```\n{"name": "Ada", "age": 36}```',
        ' ```JSON\r\n{"name": "Ada", "age": 36}\r\n``` ',
    ],
)
@pytest.mark.parametrize("result_type", [None, Person])
def test_a_fitting_answer_becomes_compact_json(text: Any, result_type: Any) -> None:
    """White space and one fence are forgiven; the answer comes back as compact JSON."""
    answer = Validator(PERSON, result_type).check(text)
    keys_as_written = '{"age":36,"name":"Ada"}' if '36,"name' in text and result_type is None else None
    assert answer == (keys_as_written or '{"name":"Ada","age":36}')


@pytest.mark.parametrize("result_type", [None, list[int | float]])
@pytest.mark.parametrize("number", [2**64 - 1, 2**64, -(2**63) - 1, 10**200])
def test_whole_numbers_keep_their_digits(result_type: Any, number: Any) -> None:
    """An answer may hold more than 64 bits in a number: an id, say."""
    answer = Validator({"items": {"type": ["integer", "number"]}}, result_type).check(f"[{number}, 1e30, 0.5]")
    assert (json.loads(answer), str(number) in answer) == ([number, 1e30, 0.5], True)


@pytest.mark.parametrize(
    ("result_type", "text", "message"),
    [
        (
            None,
            '{"name": 3, "age": -1}',
            '$.age: -1 is less than the minimum of 0; $.name: 3 is not of type "string"',
        ),
        (None, '{"name": "Ada"}', '$: "age" is a required property'),
        (None, "[]", '$: [] is not of type "object"'),
        (Person, '{"name": "Ada", "age": -1}', "$.age: Input should be greater than or equal to 0"),
        (Person, "{}", "$.name: Field required; $.age: Field required"),
    ],
)
def test_an_answer_that_does_not_fit_says_where(result_type: Any, text: Any, message: Any) -> None:
    """A bad answer names its problems by JSON path and keeps the raw text."""
    with pytest.raises(BadAnswer) as caught:
        Validator(PERSON, result_type).check(text)
    assert (str(caught.value), caught.value.text, caught.value.family) == (message, text, Family.BAD_ANSWER)


@pytest.mark.parametrize("text", ["certainly!", "", "```json\n```", '{"name": NaN}', "\ud800", "[" * 5000, "{} {}"])
@pytest.mark.parametrize("result_type", [None, Person])
def test_text_that_is_no_json_is_a_bad_answer(result_type: Any, text: Any) -> None:
    """Whatever is no JSON is a bad answer that says so."""
    with pytest.raises(BadAnswer, match=r"\A\$: expected JSON, got: "):
        Validator(PERSON, result_type).check(text)


@pytest.mark.parametrize("result_type", [None, Names])
def test_at_most_five_problems_are_listed(result_type: Any) -> None:
    """A long list of problems is cut, and says so."""
    with pytest.raises(BadAnswer) as caught:
        Validator({"type": "array", "items": {"type": "string"}}, result_type).check("[1, 2, 3, 4, 5, 6, 7]")
    shown = str(caught.value).split("; ")
    assert (len(shown), shown[0][:5], shown[-1]) == (6, "$[0]:", "and 2 more")


def test_a_long_problem_is_cut() -> None:
    """A problem that quotes the whole answer is cut to a line."""
    with pytest.raises(BadAnswer) as caught:
        Validator({"type": "integer"}).check('"' + "x" * 5000 + '"')
    assert len(str(caught.value)) == 200


def test_a_result_type_answers_by_alias() -> None:
    """The answer has the names of the schema, so that the type reads it back."""
    answer = Validator(schema_of(Aliased), Aliased).check('{"firstName": "Ada"}')
    assert answer == '{"firstName":"Ada"}'
    assert Aliased.model_validate_json(answer).first_name == "Ada"


def test_local_references_are_followed() -> None:
    """References into the schema itself work."""
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}, "m": {"$ref": "#/$defs/n"}}}
    assert Validator(schema).check("3") == "3"


@pytest.mark.parametrize(
    "reference",
    ["https://example.com/x.json", "other.json", "#/$defs/nowhere", "file:///etc/passwd", "#nowhere"],
)
@pytest.mark.parametrize("place", ["top", "property", "combined"])
def test_references_elsewhere_are_refused(reference: Any, place: Any) -> None:
    """A schema that points outside itself is refused at once."""
    inner = {"$ref": reference}
    schema = {
        "top": inner,
        "property": {"type": "object", "properties": {"a": inner}},
        "combined": {"anyOf": [{"type": "null"}, {"items": inner}]},
    }[place]
    with pytest.raises(UsageError, match=r"a \$ref of the schema does not point into the schema itself: "):
        Validator(schema)


@pytest.mark.parametrize("word", ["$ref", "$dynamicRef"])
def test_nothing_is_fetched(word: str) -> None:
    """A reference to a server is refused without a connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.json"
        with pytest.raises(UsageError, match=r"does not point into the schema itself: Resource 'http://127"):
            Validator({"type": "object", "properties": {"a": {word: url}}})
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(?=a)(?:a|aa)+$", "^(?!b)(\\w+\\s?)*\\1$"])
def test_a_pattern_cannot_hang_a_worker(pattern: str) -> None:
    """Patterns that take exponential time in a backtracking engine fail the answer within milliseconds."""
    validator = Validator({"type": "object", "properties": {"a": {"pattern": pattern}}})
    started = time.process_time()
    with pytest.raises(BadAnswer, match=r"^\$\.a: ") as caught:
        validator.check(json.dumps({"a": "a" * 60 + "!"}))
    assert time.process_time() - started < 1
    words = str(caught.value)
    assert "does not match" in words or "backtracking" in words


@pytest.mark.parametrize("pattern", ["^(?!x).*$", "^\\p{L}+$", "^[\\s\\S]{1,10000}$", "^\\d{4}-\\d\\d$|^a", "(a)\\1|a"])
def test_patterns_of_ecma_262_are_known(pattern: str) -> None:
    """Look-arounds, back-references, Unicode classes and long repeats work."""
    assert Validator({"type": "string", "pattern": pattern}).check('"aa"') == '"aa"'


@pytest.mark.parametrize("schema", [{"pattern": "["}, {"patternProperties": {"[": {}}}, {"pattern": "(a{999}){9999}"}])
def test_a_pattern_that_does_not_compile_is_refused(schema: Any) -> None:
    """A pattern that is wrong, or that would take too much memory, is refused with its place."""
    with pytest.raises(UsageError, match=r"the JSON schema is not valid at \$\.pattern.* is not a .regex"):
        Validator(schema)


@pytest.mark.parametrize(
    ("schema", "text", "message"),
    [
        ({"enum": ["x", "y"]}, '"z"', '$: "z" is not one of "x" or "y"'),
        ({"items": {"items": {"type": "null"}}}, "[[1]]", '$[0][0]: 1 is not of type "null"'),
        ({"properties": {"a b": {"type": "null"}}}, '{"a b":1}', "$['a b']: 1 is not of type \"null\""),
        ({"type": "integer"}, "1.5", '$: 1.5 is not of type "integer"'),
        ({"maximum": 10**25}, str(2**90), f"$: {2**90} is greater than the maximum of {10**25}"),
        (
            {"properties": {"a": {}}, "additionalProperties": False},
            '{"b":1}',
            "$: Additional properties are not allowed ('b' was unexpected)",
        ),
    ],
)
def test_a_problem_says_what_was_expected_and_what_came(schema: Any, text: Any, message: Any) -> None:
    """Each kind of problem names the place, the value and what the schema allows."""
    with pytest.raises(BadAnswer) as caught:
        Validator(schema).check(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "schema", [{"type": "integer"}, {"format": "email"}, {"$schema": "https://example.com/x", "items": {}}]
)
def test_a_whole_float_is_an_integer_and_formats_are_notes(schema: Any) -> None:
    """1.0 is a whole number; `format` and an unknown `$schema` reject nothing."""
    assert Validator(schema).check("1.0") == "1.0"
    assert Validator({"format": "email"}).check('"nobody"') == '"nobody"'


@pytest.mark.parametrize("depth", [300, 1000])
def test_a_deeply_nested_answer_or_schema_is_refused(depth: int) -> None:
    """Nesting that the validator cannot follow is a bad answer, or no schema."""
    recursive = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]}
    with pytest.raises(BadAnswer, match="too deeply to check"):
        Validator(recursive).check("[" * depth + '"a"' + "]" * depth)
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(UsageError, match="the JSON schema is nested too deeply to check"):
        Validator(schema)


def test_a_property_named_ref_is_no_reference() -> None:
    """Only references in the place of a reference count."""
    schema = {"type": "object", "properties": {"$ref": {"type": "string"}}, "examples": [{"$ref": "x"}]}
    assert Validator(schema).check('{"$ref": "https://example.com"}') == '{"$ref":"https://example.com"}'


def test_the_standard_metaschema_may_be_referred_to() -> None:
    """JSON schema's own documents are known without the network."""
    validator = Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})
    assert validator.check('{"type": "object"}') == '{"type":"object"}'


def test_a_validator_refuses_a_schema_that_is_none() -> None:
    """A stored schema that is broken is a usage error, not a bad answer."""
    with pytest.raises(UsageError, match=r"the JSON schema is not valid at \$.type"):
        Validator({"type": "strnig"})


def test_importing_costs_nothing() -> None:
    """The front ends import these modules without pydantic-ai, pydantic and jsonschema_rs."""
    code = (
        "import sys, lbr.models.build, lbr.models.function, lbr.models.offline, lbr.core.schema\n"
        "heavy = {'pydantic_ai', 'pydantic', 'jsonschema_rs', 'openai', 'httpx2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_validator_that_fails_is_a_bad_answer() -> None:
    """What a class of the user's own raises belongs to the answer, whose text is kept to be validated again."""

    class Mood(BaseModel):
        score: int

        @field_validator("score", mode="before")
        @classmethod
        def read(cls, value: object) -> object:
            return {"bad": 1}[str(value)]

    validator = Validator(schema_of(Mood), Mood)
    assert validator.check('{"score": "bad"}') == '{"score":1}'
    with pytest.raises(BadAnswer, match="the result type failed with KeyError: 'fine'") as caught:
        validator.check('{"score": "fine"}')
    assert caught.value.text == '{"score": "fine"}'


def test_a_class_that_does_not_read_what_it_writes() -> None:
    """Its answer stays as it came, so that the class reads the same value from it; but not if the schema forbids that."""

    class Price(BaseModel):
        model_config = ConfigDict(extra="forbid")
        share: float = Field(validation_alias="percent", serialization_alias="part")
        unit: str = "%"

        @field_validator("share", mode="before")
        @classmethod
        def scale(cls, value: float | str) -> float:
            return float(str(value).rstrip("%")) / 100

        @computed_field  # type: ignore[prop-decorator]
        @property
        def is_half(self) -> bool:
            return self.share == 0.5

    validator = Validator(schema_of(Price), Price)
    assert validator.check('{"percent": 50}') == '{"percent":50}'
    assert validator.check('{"percent": "50%"}') == '{"part":0.5,"unit":"%","is_half":true}'
    with pytest.raises(BadAnswer, match=r"\$.part: Extra inputs are not permitted"):
        validator.check('{"percent": 5, "part": 1}')
