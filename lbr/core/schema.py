"""Answers with a shape: where their JSON schema comes from, and whether an answer fits it.

jsonschema_rs and pydantic are imported where they are used, for `lbr status` must not pay for them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from lbr.core import digits
from lbr.core.errors import BadAnswer, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from jsonschema_rs import Draft202012Validator
    from jsonschema_rs import ValidationError as Misfit
    from pydantic import ValidationError

    from lbr.core.types import Json

    Check = Callable[[str, Json], tuple[str, list[str]]]

MAX_PROBLEMS = 5
MAX_PROBLEM_CHARS = 200
SCHEMA_EXAMPLE = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'

MAX_BACKTRACKS = 100_000
"""Steps back that a pattern with look-arounds or back-references may take on one text: a few milliseconds."""

_WORDS = frozenset(
    """$dynamicRef $ref additionalProperties allOf anyOf const contains dependentRequired dependentSchemas enum
    exclusiveMaximum exclusiveMinimum format if items maxItems maxLength maxProperties maximum minItems minLength
    minProperties minimum multipleOf not oneOf pattern patternProperties prefixItems properties propertyNames required
    type unevaluatedItems unevaluatedProperties uniqueItems""".split()  # noqa: SIM905 - one word a line would be a page
)
"""Of which a schema must have one to say something."""

_PLAIN_STEP = re.compile(r"[A-Za-z_]\w*")
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\r?\n?(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)


def load_schema(path: str | Path) -> dict[str, Json]:
    """Read a file with a JSON schema; UsageError with the path, and the line for bad JSON, when it has none."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise UsageError(
            f"{path}: expected a JSON schema, an object such as {SCHEMA_EXAMPLE}, got: {_kind_of_json(value)}"
        )
    try:
        _build_validator(value)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error.__cause__
    return value


def _read_json(path: str | Path) -> Json:
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: expected a file with a JSON schema, but there is no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: expected a file with a JSON schema, got a directory") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: expected UTF-8 text, got: byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}: expected JSON, got: {error.msg} at column {error.colno}"
        ) from None
    except RecursionError:
        raise UsageError(
            f"{path}: expected a JSON schema, got JSON that is nested too deeply to read"
        ) from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise UsageError(f"{path}: expected JSON, got: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]}, which is larger than any number here")
    return number


def _kind_of_json(value: Json) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def schema_of(result_type: Any) -> dict[str, Json]:
    """Return the JSON schema of a pydantic model class, or of anything else that pydantic reads types from."""
    from pydantic import TypeAdapter  # noqa: PLC0415

    name = getattr(result_type, "__qualname__", repr(result_type))
    try:
        schema = TypeAdapter(result_type).json_schema()
    except Exception as error:
        raise UsageError(
            f"expected a pydantic BaseModel class as result type, got: {name}, "
            f"which has no JSON schema: {_first_line(error)}"
        ) from error
    if not schema.keys() & _WORDS:
        raise UsageError(
            f"expected a pydantic BaseModel class as result type, got: {name}, whose JSON schema says nothing"
        )
    return schema


def import_type(spec: str) -> type:
    """Import `pkg.mod:Class`, a pydantic BaseModel class, with the working directory importable."""
    from pydantic import BaseModel  # noqa: PLC0415

    found = import_named(spec, example="pkg.module:Class")
    if not isinstance(found, type) or not issubclass(found, BaseModel):
        raise UsageError(
            f"expected {spec!r} to be a pydantic BaseModel class, got: {type(found).__name__} {_short(repr(found))}"
        )
    return found


def import_named(spec: str, *, example: str) -> Any:
    """Import what `pkg.mod:name` (or `pkg.mod:name.name`) stands for, with the working directory importable.

    Raises UsageError that says which step failed and why, whatever the module does when it is imported.
    """
    module_name, colon, attributes = spec.partition(":")
    if not colon or not module_name or not attributes:
        raise UsageError(f"expected a name like {example!r}, got: {spec!r}")
    if module_name.endswith(".py"):
        module = module_name.removesuffix(".py").replace(os.sep, ".")
        raise UsageError(f"expected a module, got: the file in {spec!r}; write {module}:{attributes}")
    found: Any = _import_module(module_name, spec)
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = getattr(found, "__name__", type(found).__name__)
            raise UsageError(
                f"cannot import {spec!r}: {where!r} has no attribute {name!r}{_shadowed(module_name)}"
            ) from None
    return found


def _import_module(name: str, spec: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # Last: a queue.py here must not be imported instead of Python's own.
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        cause = _first_line(error)
        raise UsageError(
            f"cannot import {spec!r}: module {name!r} failed with {type(error).__name__}: {cause}"
        ) from error


def _shadowed(name: str) -> str:
    """Return what to do if a file of the working directory has the name of a module that is found before it."""
    here = os.path.join(os.getcwd(), *name.split(".")) + ".py"
    found = getattr(sys.modules[name], "__file__", None)
    if not os.path.isfile(here) or (found and os.path.realpath(found) == os.path.realpath(here)):
        return ""
    return f"; it is {found or 'part of Python'}, not the {os.path.basename(here)} here: rename your file"


def is_base_model(value: Any) -> bool:
    """Tell whether a value is an instance of a pydantic model class."""
    pydantic = sys.modules.get("pydantic")  # nobody has one of a package that was never imported
    return pydantic is not None and isinstance(value, pydantic.BaseModel)


class Validator:
    """Checks answers against one schema; with `result_type` pydantic does it, and so coerces what it can.

    Construction raises UsageError for a schema that is none, or that points at another one elsewhere: nothing is ever
    fetched.
    """

    def __init__(self, schema: dict[str, Json], result_type: Any = None) -> None:
        if result_type is None:
            self._check = _schema_check(schema)
        else:
            self._check = _type_check(result_type)

    def check(self, text: str) -> str:
        """Return the answer as compact JSON; BadAnswer, with up to five problems and the raw text, when it does not fit.

        White space and one Markdown fence around the JSON are forgiven.
        """
        bare = text.strip()
        fenced = _FENCE.match(bare)
        bare = fenced.group(1) if fenced else bare
        try:
            answer, problems = self._check(bare, digits.loads(bare))
        except orjson.JSONDecodeError as error:
            raise BadAnswer(f"$: expected JSON, got: {error}", text=text) from None
        except (RecursionError, TypeError):  # of json and orjson, whose limits differ
            raise BadAnswer("$: is nested too deeply to check", text=text) from None
        if problems:
            raise BadAnswer(_list_problems(problems), text=text)
        return answer


def _list_problems(problems: list[str]) -> str:
    shown = [_short(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(shown)


def _type_check(result_type: Any) -> Check:
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415

    adapter: TypeAdapter[Any] = TypeAdapter(result_type)

    def check(text: str, _: Json) -> tuple[str, list[str]]:
        try:
            value = adapter.validate_json(text)
            # By alias, so that the answer fits the schema that was asked for and can be read back by the type.
            return adapter.dump_json(value, by_alias=True).decode(), []
        except ValidationError as error:
            return "", _pydantic_problems(error)
        except Exception as error:  # noqa: BLE001 - a validator of the user's own may raise anything, here for this answer
            return "", [f"$: the result type failed with {type(error).__name__}: {_first_line(error)}"]

    return check


def _pydantic_problems(error: ValidationError) -> list[str]:
    return [
        f"{_json_path(problem['loc'])}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _json_path(steps: Iterable[str | int]) -> str:
    return "$" + "".join(
        f".{step}" if isinstance(step, str) and _PLAIN_STEP.fullmatch(step) else f"[{step!r}]"
        for step in steps
    )


def _schema_check(schema: dict[str, Json]) -> Check:
    validator = _build_validator(schema)

    def check(_: str, value: Json) -> tuple[str, list[str]]:
        return digits.dumps(value).decode(), list(_schema_problems(validator, value))

    return check


def _schema_problems(validator: Draft202012Validator, value: Json) -> list[str]:
    try:
        errors = list(validator.iter_errors(value))
    except ValueError as error:  # it has a recursion limit of its own
        return [f"$: is nested too deeply to check: {error}"]
    errors.sort(key=lambda error: ([str(step) for step in error.instance_path], error.message))
    return [f"{_json_path(error.instance_path)}: {_words_of(error)}" for error in errors]


def _words_of(error: Misfit) -> str:
    from jsonschema_rs import ValidationErrorKind  # noqa: PLC0415

    match error.kind:
        case ValidationErrorKind.Enum(options=options):  # its own words name two of them
            return f"{digits.dumps(error.instance).decode()} is not one of {digits.dumps(options).decode()}"
        case ValidationErrorKind.BacktrackLimitExceeded() | ValidationErrorKind.RegexEngineFailure():
            return "the schema's pattern takes too many steps on this text"
    return error.message


def _build_validator(schema: dict[str, Json]) -> Draft202012Validator:
    from jsonschema_rs import Draft202012Validator, FancyRegexOptions, RegexOptions, ValidationError  # noqa: PLC0415

    if not schema.keys() & _WORDS:
        keys = ", ".join(sorted(schema)) or "none"
        raise UsageError(
            f"expected a JSON schema such as {SCHEMA_EXAMPLE}, got an object without any of its words; its keys: {keys}"
        )
    # The first engine is linear, but knows no look-arounds.
    for options in (RegexOptions(), FancyRegexOptions(backtrack_limit=MAX_BACKTRACKS)):
        try:
            return Draft202012Validator(
                schema, retriever=_refuse, pattern_options=options, validate_formats=False
            )
        except ValidationError as error:
            problem = error
        except ValueError as error:
            raise UsageError("expected a JSON schema, got one that is nested too deeply to check") from error
    place = _json_path(problem.instance_path)
    match problem.kind.name:
        case "$ref":
            raise UsageError(
                f"expected every $ref of the schema to point into the schema itself, got: "
                f"{problem.message.partition(' is not ')[0]}; copy what it stands for under '$defs'"
            )
        case "format":
            shown = _short(repr(problem.instance))
            raise UsageError(
                f"expected the pattern at {place} to be a regular expression, got: {shown}, which is wrong or too large"
            )
    raise UsageError(f"expected a JSON schema, but at {place}: {_short(problem.message)}")


def _refuse(uri: str) -> NoReturn:
    """Fetch nothing: a schema must not make lbr call a URL or read a file."""
    raise ValueError(uri)


def _short(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM_CHARS else text[: MAX_PROBLEM_CHARS - 1] + "…"


def _first_line(error: BaseException) -> str:
    return _short(str(error).strip().partition("\n")[0] or "no message")
