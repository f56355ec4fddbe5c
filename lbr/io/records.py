"""Records become items: prompts are checked, templates rendered, the other fields kept as metadata."""

from __future__ import annotations

import itertools
import json
import math
import re
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache, wraps
from inspect import isroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lbr.core.errors import InputError, UsageError
from lbr.core.messages import check_messages
from lbr.core.text import LONG
from lbr.core.types import Item, Json, Part, Prompt, canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Fields = dict[str, Json]

EXACT_TYPES = frozenset({str, int, bool, type(None)})
"""Types that keep all digits of a number; most records have no other values."""
ID_FIELDS = ("id", "custom_id")
BATCH_URL = "/chat/completions"
BATCH_NAMES = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}
"""Settings that the body of a batch line calls by another name."""
BATCH_SETTINGS = {
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "stop_sequences",
}
"""The settings among the fields of such a body; the others go to its `extra_body`."""
ROW = "row"
"""The template variable that holds all columns of a record; a column of that name comes first."""
SHOWN_CHARACTERS = 80
TEXT_FILTERS = """capitalize center e escape indent lower replace string striptags title trim truncate upper urlencode
urlize wordwrap""".split()  # noqa: SIM905 - one word a line would be a page
"""The filters that turn any value into text, null into "None"."""
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class EmptyPromptError(InputError):
    """A record has no prompt: the field, or everything that the template shows, is empty."""


class Place(NamedTuple):
    """Where a record starts."""

    source: str
    line: int

    def error(self, message: str, kind: type[InputError] = InputError) -> InputError:
        """Return the error that names this place."""
        return kind(message, source=self.source, line=self.line)


class Template:
    """A compiled Jinja template; it cannot reach Python's internals, nor change the record. Raises UsageError."""

    def __init__(self, text: str) -> None:
        # Jinja takes a tenth of a second to import.
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        self._written: set[str] = set()
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=self._note
        )
        environment.filters |= {name: self._noting(environment.filters[name]) for name in TEXT_FILTERS}
        try:
            tree = environment.parse(text)
            for concat in tree.find_all(nodes.Concat):
                concat.nodes = [nodes.Filter(one, "string", [], [], None, None) for one in concat.nodes]
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            msg = f"the template is not valid Jinja: {error.message} (line {error.lineno})"
            raise UsageError(f"{msg}. {_row_hint('Column Name')}") from error
        except Exception as error:  # constants are folded, and expressions nested, while it compiles
            raise UsageError(f"the template does not compile: {type(error).__name__}: {error}") from error
        self._fields = meta.find_undeclared_variables(tree)
        self._of_row = {
            item.arg.value
            for item in tree.find_all(nodes.Getitem)
            if isinstance(item.node, nodes.Name) and item.node.name == ROW and isinstance(item.arg, nodes.Const)
        }
        # A column named like one of Jinja's globals comes before it.
        self._names = (
            self._fields
            | self._of_row
            | {name.name for name in tree.find_all(nodes.Name) if name.name in environment.globals}
        )
        if not self._names:
            raise UsageError(
                f"the template names no field, so that every prompt would be the same: {shown(text)}. Write fields like "
                f"{{{{ prompt }}}}; a template in a file is @FILE"
            )

    @property
    def columns(self) -> set[str]:
        """The columns that a table must have for this template."""
        return (self._fields - {ROW}) | self._of_row

    def check_columns(self, columns: Collection[str], source: str, hint: str = "") -> None:
        """Raise UsageError if the template names a column that the source does not have."""
        if missing := sorted((self._fields if ROW in columns else self.columns) - set(columns)):
            odd = next((column for column in columns if not column.isidentifier()), None)
            way_out = "" if odd is None else f". {_row_hint(odd)}"
            raise UsageError(
                f"{source}: the template names columns that are not there: {names(missing)}; there are: "
                f"{names(columns)}{hint}{way_out}"
            )

    def render(self, fields: Fields, place: Place) -> str:
        """Return the prompt of one record; InputError for whatever the template's expressions raise.

        EmptyPromptError if all that the template shows is empty or null; InputError if something is null.
        """
        self._written.clear()
        try:
            prompt = self._template.render({ROW: fields} | fields if ROW in self._fields else fields)
        except Exception as error:  # whatever a template's expression may raise
            msg = f"the template cannot be rendered: {type(error).__name__}: {error}"
            raise place.error(f"{msg}; the fields are: {names(fields)}") from error
        if not self._written or ("text" in self._written and "null" not in self._written):
            return prompt
        used = {name: value for name, value in fields.items() if name in self._names} or fields
        if "text" not in self._written:
            msg = f"every field that the template shows is empty: {names(used)}"
            raise place.error(msg, EmptyPromptError)
        empty = names([name for name, leaf in leaves(used) if leaf is None] or used)
        raise place.error(
            f"the template shows a field that is null: {empty}. Fill it in, or write what to use instead, for "
            f"example {{{{ topic or 'anything' }}}}"
        )

    def _note(self, value: object) -> object:
        """Note what a value that is written into the prompt is; Jinja would write null as None."""
        if value is None:
            self._written.add("null")
            return ""
        if isroutine(value) or isinstance(value, type):
            name = getattr(value, "__name__", "this")
            raise TypeError(f'{name} is a method or a function; write a field of that name as row["{name}"]')
        self._written.add("blank" if isinstance(value, str) and (not value or value.isspace()) else "text")
        return value

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter that makes text of values, to note a null before that."""
        at = int(hasattr(function, "jinja_pass_arg"))  # the first argument is Jinja's environment then

        @wraps(function)
        def noting(*args: Any, **options: Any) -> Any:
            if args[at] is None:
                args = (*args[:at], self._note(None), *args[at + 1 :])
            return function(*args, **options)

        return noting


def _row_hint(column: str) -> str:
    return f'Write {{{{ row["{column}"] }}}} for a column whose name is not one plain word'


def item_of(
    fields: Fields, place: Place, template: Template | None, column: str | None, id_column: str | None = None
) -> Item:
    """Make an item of a record, using the record up: what is left of it is the metadata."""
    given = tuple(fields)
    if template is not None:
        prompt = _text_prompt(template.render(fields, place), "the rendered template", place)
    elif column is not None:
        if column not in fields:
            raise place.error(f"there is no field {shown(column)}; there are: {names(fields)}")
        prompt = _text_prompt(fields.pop(column), f"column {column}", place)
    elif _is_batch_line(fields):
        column, prompt = "body", _batch_prompt(fields.pop("body"), fields.get("url"), place)
    else:
        column = "messages" if "messages" in fields else "prompt"
        prompt = _named_prompt(fields, place)
    ids = ID_FIELDS if id_column is None else (id_column,)
    columns = _columns(given, ids, None if template is not None else column)
    return Item(prompt, _pop_id(fields, ids, place), fields or None, place.source, place.line, columns)


@lru_cache(maxsize=8)  # the records of an input share it
def _columns(names: tuple[str, ...], ids: tuple[str, ...], of_prompt: str | None) -> dict[str, Part]:
    parts = dict.fromkeys(ids, Part.ID) | {of_prompt: Part.PROMPT}
    return {name: parts.get(name, Part.METADATA) for name in names}


def _named_prompt(fields: Fields, place: Place) -> Prompt:
    if ("prompt" in fields) == ("messages" in fields):
        msg = f"expected one of the fields prompt and messages, got: {names(fields)}"
        raise place.error(f"{msg}; set --prompt-column or --template")
    if "prompt" in fields:
        return _text_prompt(fields.pop("prompt"), "prompt", place)
    return Prompt(messages=_messages(fields.pop("messages"), place))


def _messages(value: Json, place: Place) -> tuple[dict[str, Json], ...]:
    try:
        check_messages(value)
    except InputError as error:
        raise place.error(str(error)) from error
    return tuple(value)


def _is_batch_line(fields: Fields) -> bool:
    """Return whether a record is a line of OpenAI's batch input."""
    return "custom_id" in fields and isinstance(fields.get("body"), dict) and not {"prompt", "messages"} & fields.keys()


def _batch_prompt(body: Fields, url: Json, place: Place) -> Prompt:
    """Make the prompt of a batch line. Its settings have the model, too."""
    if url is not None and not (isinstance(url, str) and url.endswith(BATCH_URL)):
        raise place.error(f"expected the url /v1{BATCH_URL}, got: {shown(url)}; lbr makes no other calls")
    if body.pop("stream", None):
        raise place.error("the body asks for a stream, and lbr keeps whole answers; remove stream")
    if body.get("n") not in (None, 1):
        raise place.error(f"the body asks for {shown(body['n'])} answers, and lbr keeps one per call; remove n")
    if not isinstance(body.get("model", ""), str):
        raise place.error(f"expected the model of the body to be a string, got: {shown(body['model'])}")
    messages = _messages(body.pop("messages", None), place)
    settings: Fields = {"model": body.pop("model")} if "model" in body else {}
    extra: Fields = {}
    for name, value in body.items():
        setting = BATCH_NAMES.get(name, name)
        if setting in BATCH_SETTINGS and setting not in settings and value is not None:
            settings[setting] = [value] if name == "stop" and isinstance(value, str) else value
        else:
            extra[name] = value
    settings |= {"extra_body": extra} if extra else {}
    return Prompt(messages=messages, settings=settings or None)


def _text_prompt(value: Json, what: str, place: Place) -> Prompt:
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        raise place.error(f"{what} is empty", EmptyPromptError)
    if not isinstance(value, str):
        way_out = "name chat messages `messages`" if isinstance(value, list) else "put it in quotes"
        raise place.error(f"expected {what} to be a string, got: {shown(value)}; {way_out}")
    if "\x00" in value:
        raise place.error(f"{what} has a NUL character; remove it")
    if not value.isascii() and _HALF_PAIR.search(value):
        raise place.error(f"{what} has half a surrogate pair; remove it")
    return Prompt(value)


def _pop_id(fields: Fields, ids: tuple[str, ...], place: Place) -> str | int | None:
    if ids is not ID_FIELDS and ids[0] not in fields:
        raise place.error(f"there is no field {shown(ids[0])} for --id-column; there are: {names(fields)}")
    given = [fields.pop(name) for name in ids if name in fields]
    if len(given) > 1:
        raise place.error("both id and custom_id are set; remove or rename one")
    value = given[0] if given else None
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of whole numbers with a gap
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise place.error(f"expected the id to be a string or a whole number, got: {shown(value)}")
    return value


def check_storable(fields: Fields, place: Place, line: str = "") -> None:
    """Raise InputError for what Python or JSON can express, but a database or a collected row cannot hold.

    `line` is the JSON that the fields come from: orjson makes floats of whole numbers with more than 64 bits.
    """
    try:
        text = canonical_json([[fields]])  # a row nests metadata deeper than its line did
    except TypeError as error:
        raise _not_json(error, place, fields) from error
    if b"\\u0000" in text.replace(rb"\\", b""):
        raise place.error("a field has a NUL character (\\u0000); remove it")
    if not EXACT_TYPES.issuperset(map(type, fields.values())) and LONG.search(line):
        for name, leaf in leaves(json.loads(line, parse_int=Decimal)):
            if isinstance(leaf, Decimal) and not -(2**63) <= leaf < 2**64:
                number = shortened(str(leaf))
                raise place.error(f"the number in {shown(name)} has more than 64 bits: {number}; put it in quotes")


def json_of(record: dict[str, Any], place: Place) -> tuple[Fields, bytes]:
    """Return a dict as JSON has it, and that JSON: NaN becomes null, values of pandas, numpy and others what JSON has."""
    try:
        text = orjson.dumps(_finite(record), default=_as_json)
    except TypeError as error:
        raise _not_json(error, place, record) from error
    fields: Fields = orjson.loads(text)
    check_storable(fields, place)
    return fields, text


def _finite(value: Any) -> Any:
    """Return a value; TypeError for an infinity in it, which JSON does not have."""
    for name, number in not_finite(value):
        if math.isinf(number):
            raise TypeError(f"{name or 'a number'} is {number}")
    return value


def _as_json(value: Any) -> Any:
    """Return a value that orjson does not know as one that it does; TypeError if there is none."""
    if type(value).__name__ in {"NAType", "NaTType"} or str(value) == "NaT":  # of pandas and numpy
        return None
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy: an array, or a scalar
        if value.dtype.kind == "M":  # a time, which would become a number without its unit
            return list(value) if value.shape else str(value)
        return _finite(value.tolist())
    if isinstance(value, Decimal):
        number = float(value)
        return number if value.is_nan() or Decimal(repr(_finite(number))) == value else str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, timedelta) or type(value).__module__.partition(".")[0] == "pandas":  # a period, an interval
        return str(value)
    raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")


def _not_json(error: TypeError, place: Place, fields: dict[str, Any]) -> InputError:
    """Return the error for fields that orjson refused, with the name of the first of them."""
    what = next((f"field {shown(name)}" for name, value in fields.items() if not _is_json(value)), "a field")
    return place.error(f"{what} cannot be written as JSON: {error.__cause__ or error}; convert or remove it")


def _is_json(value: object) -> bool:
    try:
        return bool(orjson.dumps(value, default=_as_json))
    except TypeError:
        return False


def not_finite(value: object) -> Iterator[tuple[str, float]]:
    """Yield path and value of each NaN or infinity within a value; JSON has neither."""
    for name, leaf in leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            yield name, leaf


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield path and value of everything within that has no parts of its own."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from leaves(one, f"{name}[{place}]")
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
