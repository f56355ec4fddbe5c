"""A model without key, network and price, for trying things out: it echoes, and fails as often as it is told to."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import orjson

from lbr.core.errors import CallError, Family, Usage, UsageError
from lbr.core.types import Reply
from lbr.models.base import OFFLINE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.types import Json, Prompt
    from lbr.models.base import Request

ECHO = OFFLINE + "echo"

DEEP = 4
"""How far into a schema optional parts are still filled; below, only what is required."""

DEEPEST = 40
"""Where a schema that requires itself without end is given up."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the offline model behaves: seconds, and shares of calls between 0 and 1."""

    latency: float = 0.0
    failure_rate: float = 0.0
    rate_limit_rate: float = 0.0
    hang_rate: float = 0.0
    seed: int = 0
    retry_after: float = 0.1


def check_name(name: str) -> None:
    """Raise UsageError for an offline model that does not exist."""
    if name != ECHO:
        raise UsageError(f"expected {ECHO!r}, the only offline model, got: {name!r}")


def check_settings(settings: Mapping[str, Json]) -> Behaviour:
    """Read the settings of a task; UsageError for an unknown name or a value out of its range."""
    known = Behaviour.__slots__
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"expected a setting of {ECHO}, one of {', '.join(known)}, got: {name!r}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name == "seed":
            fits, expected = is_number and isinstance(value, int), "a whole number"
        elif name.endswith("_rate"):
            fits, expected = is_number and 0 <= value <= 1, "a number from 0 to 1"
        else:
            fits, expected = is_number and value >= 0, "a number of seconds, 0 or more"
        if not fits:
            raise UsageError(f"expected the setting {name} of {ECHO} to be {expected}, got: {value!r}")
    return replace(Behaviour(), **settings)


class OfflineModel:
    """Answers with the prompt's text, or with an instance of the task's schema made from it.

    Whether a call fails, is limited or hangs is drawn from the seed, the prompt and `request.seq` alone, so every
    process draws the same.
    """

    def __init__(self, name: str, settings: Mapping[str, Json]) -> None:
        check_name(name)
        self._behaviour = check_settings(settings)

    async def answer(self, request: Request) -> Reply:
        """Answer after the latency; CallError as often as the settings say."""
        behaviour = self._behaviour
        if request.settings is not None:
            behaviour = check_settings({**request.task.settings, **request.settings})
        draw = random.Random(f"{behaviour.seed}:{request.seq}:{request.prompt.body()}")  # noqa: S311 - no secret
        hangs, limited, fails = draw.random(), draw.random(), draw.random()
        if hangs < behaviour.hang_rate:
            await asyncio.Event().wait()
        if behaviour.latency > 0:
            await asyncio.sleep(behaviour.latency)
        if limited < behaviour.rate_limit_rate:
            raise CallError(
                "too many requests, by the setting rate_limit_rate",
                family=Family.RATE_LIMITED,
                retry_after=behaviour.retry_after,
                kind="OfflineRateLimit",
            )
        if fails < behaviour.failure_rate:
            raise CallError(
                "failed, by the setting failure_rate", family=Family.TRANSIENT, kind="OfflineFailure"
            )
        return _reply(request)

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""


def _reply(request: Request) -> Reply:
    heard = _last_words(request.prompt)
    schema = request.task.schema
    text = heard if schema is None else orjson.dumps(fill(schema, heard)).decode()
    usage = Usage(input_tokens=len(heard.split()), output_tokens=len(text.split()), cost_nanos=0)
    return Reply(text=text, usage=usage, model=ECHO, finish_reason="stop")


def _last_words(prompt: Prompt) -> str:
    """Return the text of a prompt, of a chat that of its last user message."""
    if prompt.messages is None:
        return prompt.text or ""
    content: Json = next((m.get("content") for m in reversed(prompt.messages) if m.get("role") == "user"), "")
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return " ".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


# --- filling a schema -------------------------------------------------------------------------------------------------


def fill(schema: dict[str, Json], text: str) -> Json:
    """Make an instance of a JSON schema, always the same one for the same text.

    Knows local references, combinations and limits; `pattern` and `not` are beyond it.
    """
    return _Filler(schema, text).fill(schema, "$", 0)


class _Filler:
    def __init__(self, root: dict[str, Json], text: str) -> None:
        self._root = root
        self._text = text

    def fill(self, schema: Json, path: str, depth: int) -> Json:
        """Make an instance of one part of the schema; `path` makes its numbers differ from its neighbours'."""
        if not isinstance(schema, dict) or depth > DEEPEST:
            return None if schema is False or depth > DEEPEST else self._text
        schema = self._flatten(schema, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][self._number(path) % len(schema["enum"])]
        match _type_of(schema):
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "integer":
                return self._integer(schema, path)
            case "number":
                return self._real(schema, path)
            case "boolean":
                return self._number(path) % 2 == 0
            case "null":
                return None
        return self._string(schema, path)

    def _flatten(self, schema: dict[str, Json], depth: int) -> dict[str, Json]:
        """Merge what a schema refers to and combines into one without `$ref`, `allOf`, `anyOf` and `oneOf`."""
        for _ in range(DEEPEST):
            rest = {
                word: value
                for word, value in schema.items()
                if word not in {"$ref", "allOf", "anyOf", "oneOf"}
            }
            parts = [self._resolve(schema["$ref"])] if "$ref" in schema else []
            parts += schema.get("allOf", [])
            parts += [_choose(schema[word], depth) for word in ("anyOf", "oneOf") if schema.get(word)]
            if not parts:
                return schema
            schema = rest
            for part in parts:
                schema = _merge(schema, part if isinstance(part, dict) else {})
        return rest

    def _resolve(self, reference: str) -> Json:
        found: Json = self._root
        if not reference.startswith("#"):
            return {}
        for step in unquote(reference[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name, {}) if isinstance(found, dict) else {}
        return found

    def _object(self, schema: dict[str, Json], path: str, depth: int) -> dict[str, Json]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        names = [name for name in properties if name in required or depth < DEEP]
        names += [name for name in required if name not in properties]
        others = schema.get("additionalProperties", True)
        return {name: self.fill(properties.get(name, others), f"{path}.{name}", depth + 1) for name in names}

    def _array(self, schema: dict[str, Json], path: str, depth: int) -> list[Json]:
        least = schema.get("minItems", 0)
        first = schema.get("prefixItems", [])
        count = least if depth >= DEEP else max(least, len(first), 1)
        count = min(count, schema.get("maxItems", count))
        rest = schema.get("items", True)
        parts = [first[i] if i < len(first) else rest for i in range(count)]
        if rest is False:
            parts = parts[: len(first)]
        items = [self.fill(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(parts)]
        return _distinct(items) if schema.get("uniqueItems") else items

    def _string(self, schema: dict[str, Json], path: str) -> str:
        form = _FORMATS.get(schema.get("format", ""))
        if form is not None:
            return form(self._number(path))
        text = self._text.ljust(schema.get("minLength", 0), ".")
        return text[: schema.get("maxLength")]

    def _integer(self, schema: dict[str, Json], path: str) -> int:
        least, most = _limits(schema, step=1)
        low, high = math.ceil(least), math.floor(most)
        unit = schema.get("multipleOf", 1)
        if not isinstance(unit, int):
            unit = 1
        first = -(-low // unit)
        choices = max(high // unit - first + 1, 1)
        return (first + self._number(path) % choices) * unit

    def _real(self, schema: dict[str, Json], path: str) -> float:
        unit = schema.get("multipleOf")
        if unit:
            return self._integer({**schema, "multipleOf": unit}, path) if isinstance(unit, int) else 0.0
        least, most = _limits(schema, step=0)
        return float(least + (most - least) * (1 + self._number(path) % 98) / 100)

    def _number(self, path: str) -> int:
        data = f"{path}\0{self._text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def _choose(options: list[Json], depth: int) -> Json:
    """Take the first option; deep down one that ends there, if there is one."""
    if depth >= DEEP:
        ends = (
            option for option in options if isinstance(option, dict) and option.get("type") not in _NESTING
        )
        return next((option for option in ends if "$ref" not in option), options[0])
    return options[0]


def _merge(left: dict[str, Json], right: dict[str, Json]) -> dict[str, Json]:
    merged = {**right, **left}
    for word in ("properties", "$defs"):
        if word in left and word in right:
            merged[word] = {**right[word], **left[word]}
    if "required" in left and "required" in right:
        merged["required"] = [*left["required"], *(n for n in right["required"] if n not in left["required"])]
    for word in ("allOf", "anyOf", "oneOf"):
        if word in left and word in right:
            merged[word] = [*left[word], *right[word]] if word == "allOf" else left[word]
    return merged


def _type_of(schema: dict[str, Json]) -> str:
    """Return the type of a schema, guessed from its words where it does not say."""
    named = schema.get("type")
    if isinstance(named, list):
        return str(next((name for name in named if name != "null"), "null"))
    if isinstance(named, str):
        return named
    return next((type_ for word, type_ in _HINTS.items() if word in schema), "string")


def _limits(schema: dict[str, Json], *, step: float) -> tuple[float, float]:
    """Return the range to draw from, both ends allowed; `step` is how far an exclusive limit lies outside."""
    least: Any = max(
        (schema[w] + s for w, s in (("minimum", 0), ("exclusiveMinimum", step)) if w in schema), default=None
    )
    most: Any = min(
        (schema[w] - s for w, s in (("maximum", 0), ("exclusiveMaximum", step)) if w in schema), default=None
    )
    if least is None:
        least = 0 if most is None or most >= 0 else most - 1000
    if most is None:
        most = least + 1000
    return least, most


def _distinct(items: list[Json]) -> list[Json]:
    """Make strings differ by a number at their end, and leave the rest as it is."""
    return [
        f"{item} {i}" if i and isinstance(item, str) and item in items[:i] else item
        for i, item in enumerate(items)
    ]


_NESTING = ("object", "array")

_HINTS = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "multipleOf": "number",
}

_FORMATS = {
    "date": lambda n: f"2024-{n % 12 + 1:02}-{n % 28 + 1:02}",
    "time": lambda n: f"{n % 24:02}:{n % 60:02}:00Z",
    "date-time": lambda n: f"2024-{n % 12 + 1:02}-{n % 28 + 1:02}T{n % 24:02}:00:00Z",
    "duration": lambda n: f"PT{n % 60}M",
    "email": lambda n: f"user{n % 1000}@example.com",
    "uri": lambda n: f"https://example.com/{n % 1000}",
    "hostname": lambda n: f"host{n % 1000}.example.com",
    "uuid": lambda n: f"00000000-0000-4000-8000-{n:012x}",
    "ipv4": lambda n: f"192.0.2.{n % 256}",
    "ipv6": lambda n: f"2001:db8::{n % 65536:x}",
}
