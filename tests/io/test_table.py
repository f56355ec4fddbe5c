"""Which columns a table of answers has, how they are called, and the types of their cells."""

from __future__ import annotations

from typing import Any

import pytest

from lbr.core.errors import OutputError
from lbr.core.extras import RowUsage
from lbr.core.types import AnswerRow, Part, Prompt, Task
from lbr.io.table import Kind, Kinds, answer_fields, make_table

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"$ref": "#/$defs/Label"},
        "score": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "count": {"type": ["integer", "null"]},
        "either": {"type": ["integer", "number"]},
        "sure": {"allOf": [{"$ref": "#/$defs/Sure"}], "description": "how sure"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "union": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "loop": {"$ref": "#/$defs/Loop"},
        "any": {},
        "all": True,
    },
    "$defs": {
        "Label": {"enum": ["a"], "type": "string"},
        "Sure": {"type": "boolean"},
        "Loop": {"$ref": "#/$defs/Loop"},
    },
}
TYPES = {
    "label": Kind.TEXT,
    "score": Kind.FLOAT,
    "count": Kind.INT,
    "either": Kind.FLOAT,
    "sure": Kind.BOOL,
    **dict.fromkeys(("tags", "union", "loop", "any", "all"), Kind.TEXT),
}


def names_of(*inputs: tuple[Part, str], schema: dict[str, Any] | None = None, **how: Any) -> list[str]:
    """Return the names of a table's columns."""
    return [one.name for one in make_table(Task(model="m", schema=schema), inputs, **how).columns]


def test_fields_have_the_types_of_the_schema() -> None:
    """References, optional fields and unions of numbers have one type; what has several is text."""
    assert answer_fields(SCHEMA) == TYPES
    assert answer_fields({"$ref": "#/$defs/A", "$defs": {"A": SCHEMA | {"$defs": {}}}}).keys() == TYPES.keys()


@pytest.mark.parametrize(
    "schema",
    [{"type": "array"}, {"type": "object"}, {"type": ["object", "null"]}, {"properties": {"a": {}}}, {"$ref": "#/a"}],
)
def test_other_answers_stay_whole(schema: dict[str, Any]) -> None:
    """An answer that may be no object, or whose fields are not known, is one column."""
    assert answer_fields(schema) == {}
    assert names_of(schema=schema) == ["result", "status", "error"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, -(2**63)], Kind.INT),
        ([1, 0.5], Kind.FLOAT),
        ([2**53 + 1, 0.5], Kind.TEXT),
        ([2**63], Kind.TEXT),
        ([True, None], Kind.BOOL),
        ([True, 1], Kind.TEXT),
        (["1"], Kind.TEXT),
        ([[1]], Kind.TEXT),
        ([None], Kind.TEXT),
        ([], Kind.TEXT),
    ],
)
def test_a_column_has_the_type_of_all_its_values(values: list[Any], kind: Kind) -> None:
    """Numbers are floats only if no digit is lost; what has no common type is text."""
    kinds = Kinds()
    for value in values:
        kinds.note({"a": value})
    assert kinds.of("a") is kind


def test_columns_come_in_order() -> None:
    """The input's columns, the answer, status and error, then usage; `all` adds lbr's own, and the prompt if need be."""
    inputs = [(Part.METADATA, "b"), (Part.PROMPT, "text"), (Part.ID, "id")]
    assert names_of(*inputs) == ["b", "text", "id", "result", "status", "error"]
    assert names_of(*inputs, schema=SCHEMA) == ["b", "text", "id", *TYPES, "status", "error"]
    assert names_of(*inputs, schema=SCHEMA, unnest=False) == names_of(*inputs)
    own = ["idx", "key", "status", "result", "error"]
    assert names_of(*inputs, columns="all", include={"usage"}) == ["b", "text", "id", *own, *RowUsage.__slots__]
    assert names_of(columns="all") == ["idx", "key", "prompt", *own[2:]]


def test_no_two_columns_share_a_name() -> None:
    """The input's columns keep their names, then lbr's own do; of a SQLite table, `A` and `a` are one name."""
    schema = {"type": "object", "properties": {"status": {}, "text": {}, "score": {}}}
    inputs = [(Part.PROMPT, "text"), (Part.METADATA, "error"), (Part.METADATA, "text"), (Part.METADATA, "Score")]
    names = [
        "text",
        "error",
        "metadata.text",
        "Score",
        "answer.status",
        "answer.text",
        "score",
        "status",
        "answer.error",
    ]
    assert names_of(*inputs, schema=schema) == names
    names[6] = "answer.score"
    assert names_of(*inputs, schema=schema, fold=str.lower) == names


def test_cells_have_the_types_of_their_columns() -> None:
    """JSON values become cells; what is no text is JSON in a text column, and what the schema does not name is noted."""
    table = make_table(Task(model="m", schema=SCHEMA), [(Part.ID, "id"), (Part.METADATA, "deep")])
    answer = '{"label":"a","score":2,"count":3.0,"sure":true,"tags":["x"],"union":18446744073709551616,"other":1}'
    row = AnswerRow(0, "k", Prompt("p"), "done", answer, custom_id=7, metadata={"deep": {"a": [None]}})
    cells = dict(zip([one.name for one in table.columns], table.typed_cells(row), strict=True))
    assert {name: value for name, value in cells.items() if value is not None} == {
        "id": "7",
        "deep": '{"a":[null]}',
        "label": "a",
        "score": 2.0,
        "count": 3,
        "sure": True,
        "tags": '["x"]',
        "union": "18446744073709551616",
        "status": "done",
    }
    assert (type(cells["score"]), type(cells["count"])) == (float, int)
    assert table.left_out == {"other"}


def test_a_value_without_a_place_is_an_error() -> None:
    """An integer that no column holds is not rounded: the message names the input and the way out."""
    table = make_table(Task(model="m", schema=SCHEMA))
    with pytest.raises(OutputError, match=r"^input 3: count is 9223372036854775808, .* Int64 .* --no-unnest"):
        table.typed_cells(AnswerRow(3, "k", Prompt("p"), "done", '{"count":9223372036854775808}'))
