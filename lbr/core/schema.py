"""Answers with a schema: where the JSON schema comes from, and whether an answer fits it.

jsonschema_rs and pydantic are imported where they are used, because `lbr status` must not pay for them.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from lbr.core.errors import BadAnswer, UsageError
from lbr.core.text import parse_json, read_text, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from jsonschema_rs import Draft202012Validator
    from pydantic import TypeAdapter

    from lbr.core.types import Json

MAX_PROBLEMS = 5
MAX_PROBLEM_CHARS = 200
SCHEMA_EXAMPLE = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
MAX_BACKTRACKS = 100_000
"""Steps back that a pattern with look-arounds or back-references may take on one text: a few milliseconds."""

_KEYWORDS = frozenset(
    """$dynamicRef $ref additionalProperties allOf anyOf const contains dependentRequired dependentSchemas enum
    exclusiveMaximum exclusiveMinimum format if items maxItems maxLength maxProperties maximum minItems minLength
    minProperties minimum multipleOf not oneOf pattern patternProperties prefixItems properties propertyNames required
    type unevaluatedItems unevaluatedProperties uniqueItems""".split()  # noqa: SIM905 - one word a line would be a page
)
"""A schema without any of these allows everything."""
_PLAIN_STEP = re.compile(r"[A-Za-z_]\w*")
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\r?\n?(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)


def load_schema(path: str | Path) -> dict[str, Json]:
    """Read a file with a JSON schema; UsageError, with the path and the line, if it has none."""
    text = read_text(path, "the schema")
    try:
        value = parse_json(text)
        _build_validator(value)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error.__cause__
    return dict(value)


def schema_of(result_type: Any) -> dict[str, Json]:
    """Return the JSON schema of a pydantic model class, or of anything else that pydantic reads types from."""
    from pydantic import TypeAdapter  # noqa: PLC0415

    wrong = f"expected a pydantic BaseModel class as result type, got: {getattr(result_type, '__qualname__', repr(result_type))}"
    try:
        schema = TypeAdapter(result_type).json_schema()
    except Exception as error:
        raise UsageError(f"{wrong}, which has no JSON schema: {_first_line(error)}") from error
    if not schema.keys() & _KEYWORDS:
        raise UsageError(f"{wrong}, whose JSON schema allows everything")
    return schema


def import_type(spec: str) -> type:
    """Import `pkg.mod:Class`, a pydantic BaseModel class, with the working directory importable."""
    from pydantic import BaseModel  # noqa: PLC0415

    found = import_named(spec, example="pkg.module:Class")
    if not isinstance(found, type) or not issubclass(found, BaseModel):
        got = f"{type(found).__name__} {_short(repr(found))}"
        raise UsageError(f"expected {spec!r} to be a pydantic BaseModel class, got: {got}")
    return found


def import_named(spec: str, *, example: str) -> Any:
    """Import what `pkg.mod:name` (or `pkg.mod:name.name`) stands for, with the working directory importable.

    Raises UsageError that says which step failed and why, whatever the module does when it is imported.
    """
    module_name, _, attributes = spec.partition(":")
    if not module_name or not attributes:
        raise UsageError(f"expected a name like {example!r}, got: {spec!r}")
    if module_name.endswith(".py"):
        instead = module_name.removesuffix(".py").replace(os.sep, ".")
        raise UsageError(f"expected a module, got: the file in {spec!r}; write {instead}:{attributes}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # Last: a queue.py here must not be imported instead of Python's own.
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"cannot import {spec!r}: module {module_name!r} failed with {cause}") from error
    try:
        return attrgetter(attributes)(module)
    except AttributeError as error:
        raise UsageError(f"cannot import {spec!r}: {error}{_shadowed(module_name)}") from None


def _shadowed(name: str) -> str:
    """Return what to do if a file of the working directory has the name of a module that is found before it."""
    here = os.path.join(os.getcwd(), *name.split(".")) + ".py"
    found = getattr(sys.modules[name], "__file__", None)
    if not os.path.isfile(here) or (found and os.path.realpath(found) == os.path.realpath(here)):
        return ""
    return f"; it is {found or 'part of Python'}, not the {os.path.basename(here)} here: rename your file"


def is_base_model(value: Any) -> bool:
    """Return whether a value is an instance of a pydantic model class."""
    pydantic = sys.modules.get("pydantic")  # if it was never imported, no value is
    return pydantic is not None and isinstance(value, pydantic.BaseModel)


class Validator:
    """Checks answers against one schema; with `result_type` pydantic does it, and so converts what it can.

    Construction raises UsageError for a schema that is not valid, or that refers to another document: nothing is
    ever fetched.
    """

    def __init__(self, schema: dict[str, Json], result_type: Any = None) -> None:
        self._judge: Callable[[str, Json], tuple[str, list[str]]]
        if result_type is None:
            self._judge = functools.partial(_judge_by_schema, _build_validator(schema))
        else:
            from pydantic import TypeAdapter  # noqa: PLC0415

            self._judge = functools.partial(_judge_by_type, TypeAdapter(result_type), schema)

    def check(self, text: str) -> str:
        """Return the answer as compact JSON; BadAnswer, with up to five problems and the raw text, if it does not fit.

        White space and one Markdown fence around the JSON are ignored.
        """
        bare = text.strip()
        if fenced := _FENCE.match(bare):
            bare = fenced[1]
        try:
            answer, problems = self._judge(bare, parse_json(bare))
        except orjson.JSONDecodeError as error:
            raise BadAnswer(f"$: expected JSON, got: {error}", text=text) from None
        except (RecursionError, TypeError, ValueError):  # of json, orjson and jsonschema_rs, whose limits differ
            raise BadAnswer("$: is nested too deeply to check", text=text) from None
        if problems:
            more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            raise BadAnswer("; ".join(map(_short, problems[:MAX_PROBLEMS])) + more, text=text)
        return answer


def _judge_by_schema(validator: Draft202012Validator, _: str, value: Json) -> tuple[str, list[str]]:
    """Return an answer as compact JSON, and what is wrong with it."""
    answer = to_json(value).decode()
    errors = sorted(
        validator.iter_errors(value), key=lambda one: ([str(step) for step in one.instance_path], one.message)
    )
    return answer, [f"{_json_path(error.instance_path)}: {error.message}" for error in errors]


def _judge_by_type(adapter: TypeAdapter[Any], schema: dict[str, Json], text: str, value: Json) -> tuple[str, list[str]]:
    try:
        read = adapter.validate_json(text)
        # By alias, so that the answer fits the schema that was asked for and the type can read it back.
        answer = adapter.dump_json(read, by_alias=True).decode()
    except Exception as error:  # noqa: BLE001 - a user's validator may raise anything, here for this answer
        return "", problems_of(error)
    if not _reads_back(adapter, answer, read) and _fits(schema, value):
        answer = to_json(value).decode()  # as it came
    return answer, []


def _reads_back(adapter: TypeAdapter[Any], answer: str, read: Any) -> bool:
    """Return whether a type reads its own JSON as the same value; not if it writes other names than it reads."""
    try:
        return bool(adapter.validate_json(answer) == read)
    except Exception:  # noqa: BLE001 - a user's validator may raise anything
        return False


def _fits(schema: dict[str, Json], value: Json) -> bool:
    try:
        return _build_validator(schema).is_valid(value)
    except UsageError:  # pydantic knows more patterns
        return False


def problems_of(error: Exception) -> list[str]:
    """Return what is wrong with an answer, given what a result type raised."""
    from pydantic import ValidationError  # noqa: PLC0415

    if not isinstance(error, ValidationError):
        return [f"$: the result type failed with {type(error).__name__}: {_first_line(error)}"]
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [f"{_json_path(one['loc'])}: {one['msg']}" for one in found]


def _json_path(steps: Iterable[str | int]) -> str:
    return "$" + "".join(
        f".{step}" if isinstance(step, str) and _PLAIN_STEP.fullmatch(step) else f"[{step!r}]" for step in steps
    )


def _build_validator(schema: Json) -> Draft202012Validator:
    from jsonschema_rs import Draft202012Validator, FancyRegexOptions, ValidationError  # noqa: PLC0415

    if not isinstance(schema, dict) or not schema.keys() & _KEYWORDS:
        keys = f"its keys: {', '.join(sorted(schema)) or 'none'}" if isinstance(schema, dict) else _short(repr(schema))
        raise UsageError(f"expected a JSON schema such as {SCHEMA_EXAMPLE}, got: an object without any keyword; {keys}")
    # Patterns without look-arounds and back-references take linear time.
    options = FancyRegexOptions(backtrack_limit=MAX_BACKTRACKS)
    try:
        return Draft202012Validator(schema, retriever=_refuse, pattern_options=options, validate_formats=False)
    except ValidationError as error:
        if error.kind.name == "$ref":
            target = error.message.partition(" is not ")[0]
            raise UsageError(
                f"a $ref of the schema does not point into the schema itself: {target}; copy its target to '$defs'"
            ) from error
        where = _json_path(error.instance_path)
        raise UsageError(f"the JSON schema is not valid at {where}: {_short(error.message)}") from error
    except ValueError as error:
        raise UsageError("the JSON schema is nested too deeply to check") from error


def _refuse(uri: str) -> NoReturn:
    """Fetch nothing: a schema must not make lbr call a URL or read a file."""
    raise ValueError(uri)


def _short(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM_CHARS else text[: MAX_PROBLEM_CHARS - 1] + "…"


def _first_line(error: BaseException) -> str:
    return _short(str(error).strip().partition("\n")[0] or "no message")
