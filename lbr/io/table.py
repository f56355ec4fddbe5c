"""The columns of a table of answers, and the cells of a row: the input's columns, then the answer's, then lbr's own."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from lbr.core.errors import OutputError
from lbr.core.extras import Extra, Include, RowUsage
from lbr.core.text import parse_json, to_json
from lbr.core.types import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from lbr.core.types import AnswerRow, Json, Task

OWN_COLUMNS = {
    "default": ("result", "status", "error"),
    "all": ("idx", "key", "prompt", "status", "result", "error"),
}
"""lbr's own columns, by the value of `--columns`; the prompt only if no column of the input is the prompt."""
MAX_EXACT = 2**53
"""The largest integer that a float holds with all those below it."""
MAX_INT = 2**63
MAX_STEPS = 20
"""References of a schema may be circular."""


class Kind(StrEnum):
    """The type of a column's cells, as polars calls it. Text takes everything: what is no text becomes JSON."""

    INT = "Int64"
    FLOAT = "Float64"
    BOOL = "Boolean"
    TEXT = "String"


_KIND_OF_TYPES = {frozenset({"integer"}): Kind.INT, frozenset({"boolean"}): Kind.BOOL}
_KIND_OF_TYPES |= dict.fromkeys([frozenset({"number"}), frozenset({"number", "integer"})], Kind.FLOAT)
_KIND_OF_OWN = {"idx": Kind.INT, "sample": Kind.INT, "cost_usd": Kind.FLOAT}
_KIND_OF_OWN |= {name: Kind.INT for name in RowUsage.__slots__ if name.endswith(("tokens", "ms", "attempts"))}


class Kinds:
    """Finds the type that all values of each field have."""

    def __init__(self) -> None:
        self._found: defaultdict[str, set[str]] = defaultdict(set)

    def note(self, record: dict[str, Json]) -> None:
        """Note the values of a record."""
        for name, value in record.items():
            if type(value) is int and abs(value) > MAX_EXACT:
                self._found[name].add("long" if -MAX_INT <= value < MAX_INT else "longer")
            elif value is not None:
                self._found[name].add(type(value).__name__)

    def of(self, name: str) -> Kind:
        """Return the type of a field."""
        found = self._found[name] or {"none"}
        if found <= {"int", "long"}:
            return Kind.INT
        if found <= {"int", "float"}:
            return Kind.FLOAT
        return Kind.BOOL if found == {"bool"} else Kind.TEXT


def answer_fields(schema: dict[str, Json]) -> dict[str, Kind]:
    """Return the fields of a schema's answers with their types; none if an answer need not be an object."""
    top = _resolved(schema, schema)
    if top.get("type") != "object" or not isinstance(top.get("properties"), dict):
        return {}
    found = {name: _resolved(one, schema).get("type", ()) for name, one in top["properties"].items()}
    types = {name: {one} if isinstance(one, str) else {*one} - {"null"} for name, one in found.items()}
    return {name: _KIND_OF_TYPES.get(frozenset(one), Kind.TEXT) for name, one in types.items()}


def _resolved(schema: Json, root: dict[str, Json], steps: int = 0) -> dict[str, Json]:
    """Return what a schema stands for: the target of its reference, or its only alternative beside null."""
    if not isinstance(schema, dict) or steps == MAX_STEPS:
        return {}
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        return _resolved(root.get("$defs", {}).get(name), root, steps + 1)
    choices = [one for name in ("anyOf", "oneOf", "allOf") for one in schema.get(name, ()) if one != {"type": "null"}]
    return _resolved(choices[0], root, steps + 1) if "type" not in schema and len(choices) == 1 else schema


@dataclass(slots=True)
class Column:
    """A column: the part of a row that its cells come from, the field there, their type, and its name in the table."""

    part: str
    source: str
    kind: Kind
    name: str


@dataclass(slots=True)
class Table:
    """The columns of a run's answers. `left_out` gathers the fields of answers that the schema does not name.

    `instructions` are those of the run's task; `fields` are those of answers that are columns; `row_bytes` is the size
    of a typical row.
    """

    columns: list[Column] = field(default_factory=list)
    instructions: str | None = None
    fields: frozenset[str] = frozenset()
    left_out: set[str] = field(default_factory=set)
    row_bytes: int = 1

    def cells(self, row: AnswerRow) -> list[Json]:
        """Return the cells of a row, as JSON values."""
        answer: dict[str, Json] = {}
        if self.fields and row.result is not None:
            answer = parse_json(row.result)
            self.left_out |= answer.keys() - self.fields
        parts: dict[str, dict[str, Json]] = {"metadata": row.metadata or {}, "own": row.to_dict(), "answer": answer}
        return [parts[column.part].get(column.source) for column in self.columns]

    def typed_cells(self, row: AnswerRow) -> list[Json]:
        """Return the cells of a row in the types of their columns. Raises OutputError for a value that has no place."""
        cells = zip(self.columns, self.cells(row), strict=True)
        return [None if value is None else _typed(value, column, row) for column, value in cells]


def _typed(value: Json, column: Column, row: AnswerRow) -> Json:
    if column.kind is Kind.TEXT:
        return value if isinstance(value, str) else to_json(value).decode()
    number = type(value) in {int, float}
    if column.kind is Kind.FLOAT and number and abs(value) <= sys.float_info.max:
        return float(value)
    if column.kind is Kind.INT and number and int(value) == value and -MAX_INT <= value < MAX_INT:
        return int(value)
    if column.kind is Kind.BOOL and type(value) is bool:
        return value
    raise OutputError(
        f"input {row.idx}: {column.source} is {to_json(value).decode():.100}, which a column of {column.kind} cannot "
        f"hold; write a .jsonl or .csv file, or leave answers whole with --no-unnest"
    )


def make_table(
    task: Task,
    inputs: Sequence[tuple[Part, str]] = (),
    *,
    kind_of: Callable[[str], Kind] = lambda _: Kind.TEXT,
    id_kind: Kind = Kind.TEXT,
    columns: str = "default",
    unnest: bool = True,
    include: Collection[str] = (),
    samples: int = 1,
    fold: Callable[[str], str] = str,
) -> Table:
    """Return the table of a run's answers.

    `inputs` are the input's columns, `kind_of` the types of its metadata. With `unnest`, the fields of an answer are
    columns; with several `samples`, so is the number of the sample. Names that are equal after `fold` are not distinct: the input's columns keep theirs, then lbr's own.
    """
    given = [
        Column("metadata", name, kind_of(name), name)
        if part is Part.METADATA
        else Column("own", part, id_kind if part is Part.ID else Kind.TEXT, name)
        for part, name in inputs
    ]
    answer = answer_fields(task.schema) if unnest and task.schema is not None else {}
    own: list[Column] = []
    used = RowUsage.__slots__ if Include.USAGE in include else ()
    names = [*OWN_COLUMNS[columns]]
    if samples > 1:
        names.insert(names.index("idx") + 1 if "idx" in names else 0, "sample")
    for name in (*names, *used, *(kind.value for kind in Extra if kind in include)):
        if name == "result" and answer:
            own += [Column("answer", one, kind, one) for one, kind in answer.items()]
        elif name != Part.PROMPT or all(part is not Part.PROMPT for part, _ in inputs):
            own.append(Column("own", name, _KIND_OF_OWN.get(name, Kind.TEXT), name))
    taken: set[str] = set()
    for column in (*given, *sorted(own, key=lambda one: one.part == "answer")):
        while fold(column.name) in taken:
            column.name = f"{'metadata' if len(taken) < len(given) else 'answer'}.{column.name}"
        taken.add(fold(column.name))
    return Table([*given, *own], task.instructions, frozenset(answer))
