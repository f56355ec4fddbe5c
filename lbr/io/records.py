"""From a record, wherever it was read, to an item: prompts checked, templates rendered, the rest kept as metadata."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from enum import Enum
from functools import lru_cache
from inspect import isroutine
from typing import TYPE_CHECKING, NamedTuple

from lbr.core.errors import InputError, UsageError
from lbr.core.messages import check_messages
from lbr.core.types import Item, Json, Part, Prompt, canonical_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from jinja2 import nodes

Fields = dict[str, Json]

ID_FIELDS = ("id", "custom_id")
SHOWN_CHARACTERS = 80


class EmptyPromptError(InputError):
    """A record has no prompt: the field, or everything that the template fills in, is empty."""


class Place(NamedTuple):
    """Where a record starts."""

    source: str
    line: int

    def error(self, message: str) -> InputError:
        """Return the error that names this place."""
        return InputError(message, source=self.source, line=self.line)


class Template:
    """A compiled Jinja template. It cannot reach Python's insides, nor change the record it is given."""

    def __init__(self, text: str) -> None:
        # Jinja takes a tenth of a second to import: only those who use a template pay for it.
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        environment.filters[_NOTING] = self._note
        try:
            tree = environment.parse(text)
            # A column named as one of Jinja's globals comes before it.
            shadowed = {name.name for name in tree.find_all(nodes.Name)} & environment.globals.keys()
            self._fields = meta.find_undeclared_variables(tree)
            self._names = self._fields | shadowed
            self._of_row = _columns_of_row(tree)
            self._template = environment.from_string(_noting(tree))
        except TemplateSyntaxError as error:
            msg = f"expected a Jinja template, got: {error.message} (line {error.lineno}); fix the template"
            raise UsageError(f"{msg}. {_row_words('Column Name')}") from error
        except Exception as error:  # constants are folded, and expressions nested, while it compiles
            msg = f"expected a Jinja template, got one that does not compile: {type(error).__name__}: {error}"
            raise UsageError(f"{msg}; fix the template") from error

        self._filled, self._null = False, ""
        self._empty: set[str] = set()
        self._constant = UsageError(
            f"expected a template that names a field, such as {{{{ prompt }}}}, got: {shown(text)}; "
            f"every prompt would be the same. A template in a file is @FILE"
        )
        if not self._names:
            raise self._constant

    @property
    def columns(self) -> set[str]:
        """The columns that a table must have for this template."""
        return (self._fields - {ROW}) | self._of_row

    def check_columns(self, columns: Collection[str], source: str, hint: str = "") -> None:
        """Raise UsageError if the template asks for a column that no record of the source will have."""
        if missing := sorted((self._fields if ROW in columns else self.columns) - set(columns)):
            msg = f"{source}: expected the columns that the template names, got no {names(missing)}"
            odd = next((column for column in columns if not column.isidentifier()), None)
            how = "" if odd is None else f". {_row_words(odd)}"
            raise UsageError(f"{msg}; there are: {names(columns)}{hint}{how}")

    def render(self, fields: Fields, place: Place) -> str:
        """Return the prompt of one record; InputError for whatever the template's expressions raise.

        EmptyPromptError if all that the record fills in is empty or null.
        """
        if not self._fields and self._names.isdisjoint(fields):
            raise self._constant
        self._filled, self._empty, self._null = False, set(), ""
        try:
            prompt = self._template.render({ROW: fields} | fields if ROW in self._fields else fields)
        except Exception as error:  # whatever a template's expression may raise
            msg = f"expected the template to render, got: {type(error).__name__}: {error}"
            raise place.error(f"{msg}; the fields are: {names(fields)}") from error
        if self._empty and not self._filled:
            msg = f"every field that the template shows is empty: {names(sorted(self._empty))}"
            raise EmptyPromptError(msg, source=place.source, line=place.line)
        if self._null:
            example = self._null if self._null in fields and self._null.isidentifier() else "…"
            raise place.error(
                f"expected {shown(self._null)} to have a value for the template, got: null; fill it in, "
                f"or say in the template what stands for it, as {{{{ {example} or 'none' }}}} does"
            )
        return prompt

    def _note(self, value: object, name: str) -> object:
        """Note whether an expression has a value; null, which Jinja would write as None, becomes empty."""
        if isroutine(value):
            raise TypeError(f'{name} is a method; name a field of that name in brackets, as in row["values"]')
        if value is None:
            self._null = self._null or name
            value = ""
        if isinstance(value, str) and (not value or value.isspace()):
            self._empty.add(name)
        else:
            self._filled = True
        return value


ROW = "row"
"""The name of a template's variable that holds all columns of a record; a column of that name comes first."""
_NOTING = "value of"
"""A filter of this name notes empty values; no template can call it, because the name has a space."""
_WORDING = frozenset(
    {"capitalize", "center", "e", "escape", "indent", "lower", "replace", "string", "striptags"}
    | {"title", "trim", "truncate", "upper", "urlencode", "urlize", "wordwrap"}
)
"""The filters that make text of what they are given, of a null "None"."""


def _row_words(column: str) -> str:
    return f'Write {{{{ row["{column}"] }}}} for a column whose name is not one plain word'


def _columns_of_row(tree: nodes.Template) -> set[str]:
    """Return the names that a template takes from `row["…"]`."""
    from jinja2 import nodes  # noqa: PLC0415 - see Template

    found = set()
    for item in tree.find_all(nodes.Getitem):
        match item:
            case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=str(name))):
                found.add(name)
    return found


def _noting(tree: nodes.Template) -> nodes.Template:
    """Have every expression of a parsed template pass its value through the filter that notes empty ones."""
    from jinja2 import nodes  # noqa: PLC0415 - see Template

    def noting(part: nodes.Expr) -> nodes.Expr:
        # What a condition, `or` or `default` decides is decided before: only what is written in the end is looked at.
        match part:
            case nodes.TemplateData() | nodes.Const():
                return part
            case nodes.Concat():
                part.nodes = [noting(one) for one in part.nodes]
                return part
            case nodes.Filter(name=name, node=nodes.Expr() as node) if name in _WORDING:
                part.node = noting(node)
                return part
        return nodes.Filter(part, _NOTING, [nodes.Const(_words_of(part))], [], None, None, lineno=part.lineno)

    for output in tree.find_all(nodes.Output):
        output.nodes = [noting(one) for one in output.nodes]
    return tree


def _words_of(expression: nodes.Expr) -> str:
    """Return an expression as its author may have written it, what is longer than a path shortened."""
    from jinja2 import nodes  # noqa: PLC0415 - see Template

    match expression:
        case nodes.Name(name=name):
            return str(name)
        case nodes.Getattr(node=node, attr=attr):
            return f"{_words_of(node)}.{attr}"
        case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=str(name))):
            return name
        case nodes.Getitem(node=node, arg=nodes.Const(value=str(name))):
            return f"{_words_of(node)}.{name}"
        case nodes.Getitem(node=node, arg=nodes.Const(value=place)):
            return f"{_words_of(node)}[{place}]"
        case nodes.Call(node=node):
            return f"{_words_of(node)}(…)"
        case nodes.Filter(node=nodes.Expr() as node):
            return _words_of(node)
    return ", ".join(dict.fromkeys(one.name for one in expression.find_all(nodes.Name))) or "…"


def item_of(fields: Fields, place: Place, template: Template | None, column: str | None) -> Item:
    """Make an item of a record, using the record up: what is left of it is the metadata."""
    given = tuple(fields)
    if template is not None:
        prompt = _text_prompt(template.render(fields, place), "the rendered template", place)
    elif column is not None:
        if column not in fields:
            raise place.error(f"expected a field {shown(column)}, got: {names(fields)}; add it")
        prompt = _text_prompt(fields.pop(column), f"column {column}", place)
    else:
        column = "messages" if "messages" in fields else "prompt"
        prompt = _named_prompt(fields, place)
    columns = _columns(given, None if template is not None else column)
    return Item(prompt, _pop_id(fields, place), fields or None, place.source, place.line, columns)


@lru_cache(maxsize=8)  # the records of an input share it
def _columns(names: tuple[str, ...], of_prompt: str | None) -> dict[str, Part]:
    parts = dict.fromkeys(ID_FIELDS, Part.ID) | {of_prompt: Part.PROMPT}
    return {name: parts.get(name, Part.METADATA) for name in names}


def _named_prompt(fields: Fields, place: Place) -> Prompt:
    if ("prompt" in fields) == ("messages" in fields):
        msg = f"expected one of the fields prompt and messages, got: {names(fields)}"
        raise place.error(f"{msg}; set --prompt-column or --template")
    if "prompt" in fields:
        return _text_prompt(fields.pop("prompt"), "prompt", place)
    messages = fields.pop("messages")
    try:
        check_messages(messages)
    except InputError as error:
        raise place.error(str(error)) from error
    return Prompt(messages=tuple(messages))


def is_plain(text: str) -> bool:
    """Tell whether a text is a prompt without a doubt, as nearly all are; `item_of` knows what to say of others."""
    return text != "" and text.isascii() and not text.isspace() and "\x00" not in text


def _text_prompt(value: Json, what: str, place: Place) -> Prompt:
    """Make a prompt of a text; InputError, in which it is called `what`, for what says nothing or is no text."""
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        raise EmptyPromptError(f"{what} is empty", source=place.source, line=place.line)
    if not isinstance(value, str):
        raise place.error(f"expected {what} to be a string, got: {shown(value)}; put it in quotes")
    if "\x00" in value:
        raise place.error(f"expected {what} to be text, got: a NUL character; remove it")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise place.error(f"expected {what} to be Unicode, got: half a surrogate pair; remove it") from error
    return Prompt(value)


def _pop_id(fields: Fields, place: Place) -> str | int | None:
    given = [fields.pop(name) for name in ID_FIELDS if name in fields]
    if len(given) > 1:
        raise place.error("expected one of the fields id and custom_id, got: both; rename one")
    value = given[0] if given else None
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # as pandas has a column of numbers with a gap
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise place.error(f"expected the id to be a string or a whole number, got: {shown(value)}")
    return value


def check_storable(fields: Fields, place: Place) -> None:
    """Raise InputError for what Python or JSON can say but a database or a collected row cannot hold."""
    try:
        text = canonical_json([[fields]])  # a row nests metadata deeper than its line did
    except TypeError as error:
        if "ecursion" in str(error):
            raise place.error(
                "expected at most 250 levels of nesting, got: more; flatten the object"
            ) from error
        raise place.error(
            f"expected fields that JSON can hold, got: {error}; convert or remove it"
        ) from error
    if b"\\u0000" in text.replace(rb"\\", b""):
        raise place.error("expected text, got: a NUL character (\\u0000); remove it")


def check_finite(fields: Fields, place: Place) -> None:
    """Raise InputError for NaN and infinity, which Python has and JSON has not: null would stand for them."""
    for name, value in not_finite(fields):
        raise place.error(
            f"expected {shown(name)} to be a JSON value, got: {value}; put None for what is missing"
        )


def not_finite(value: object) -> Iterator[tuple[str, float]]:
    """Yield the path and the value of each float within that JSON has not; of what JSON can hold as it is."""
    for name, leaf in leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            yield name, leaf


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the path and the value of everything within that has no parts of its own."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from leaves(one, f"{name}[{place}]")
    elif isinstance(value, Enum):
        yield from leaves(value.value, name)
    elif is_dataclass(value):
        yield from leaves({field.name: getattr(value, field.name) for field in dataclass_fields(value)}, name)
    else:
        yield name, value


def shown(value: Json) -> str:
    """Return a value as messages quote it, shortened."""
    return shortened(repr(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value))


def shortened(text: str) -> str:
    """Return a text with no more characters than messages quote."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def names(names: Collection[str]) -> str:
    """Return names as messages list them."""
    return ", ".join(map(shown, itertools.islice(names, 30))) or "none"
