"""The offline model, for trying lbr out without a key, a network or costs: it echoes, and fails on request."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from lbr.core.errors import CallError, Family, Usage, UsageError
from lbr.core.messages import texts_in
from lbr.core.types import Reply
from lbr.models.base import OFFLINE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.types import Json, Prompt
    from lbr.models.base import Request

ECHO = OFFLINE + "echo"

MAX_OPTIONAL_DEPTH = 4  # below, only the required parts of a schema are filled
MAX_DEPTH = 40  # where a schema that requires itself is cut off


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the offline model behaves: seconds, and shares of calls between 0 and 1."""

    latency: float = 0.0
    failure_rate: float = 0.0
    rate_limit_rate: float = 0.0
    hang_rate: float = 0.0
    seed: int = 0
    retry_after: float = 0.1


def check_settings(settings: Mapping[str, Json]) -> Behaviour:
    """Read the settings of a task. Raises UsageError for an unknown name or a value out of range."""
    known = Behaviour.__slots__
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"expected a setting of {ECHO}, one of {', '.join(known)}, got: {name!r}")
        most, expected = math.inf, "a number of seconds, 0 or more"
        if name.endswith("_rate"):
            most, expected = 1, "a number from 0 to 1"
        fits = type(value) in {int, float} and 0 <= value <= most and value < math.inf
        if name == "seed":
            fits, expected = type(value) is int, "a whole number"
        if not fits:
            raise UsageError(f"expected the setting {name} of {ECHO} to be {expected}, got: {value!r}")
    return Behaviour(**settings)


class OfflineModel:
    """Answers with the prompt's text, or with an instance of the task's schema made from it.

    Construction raises UsageError for a different name, and for settings that do not fit. Whether a call fails, is rate-limited or hangs depends on the seed, the prompt and `request.seq` only, so that
    every process draws the same.
    """

    def __init__(self, name: str, settings: Mapping[str, Json]) -> None:
        if name != ECHO:
            raise UsageError(f"expected {ECHO!r}, the only offline model, got: {name!r}")
        self._behaviour = check_settings(settings)

    async def answer(self, request: Request) -> Reply:
        """Answer after the latency. Raises CallError as often as the settings ask for."""
        behaviour = self._behaviour
        if request.settings is not None:
            # Those of the prompt are a provider's, and mean nothing here.
            foreign = (request.prompt.settings or {}).keys() - set(Behaviour.__slots__)
            own = {name: value for name, value in request.settings.items() if name not in foreign}
            behaviour = check_settings({**request.task.settings, **own})
        draw = random.Random(f"{behaviour.seed}:{request.seq}:{request.prompt.body()}")  # noqa: S311 - no secret
        hangs, limited, fails = draw.random(), draw.random(), draw.random()
        if hangs < behaviour.hang_rate:
            await asyncio.Event().wait()
        if behaviour.latency > 0:
            await asyncio.sleep(behaviour.latency)
        if limited < behaviour.rate_limit_rate:
            message, wait = "too many requests, by the setting rate_limit_rate", behaviour.retry_after
            raise CallError(message, family=Family.RATE_LIMITED, retry_after=wait, kind="OfflineRateLimit")
        if fails < behaviour.failure_rate:
            message = "failed, by the setting failure_rate"
            raise CallError(message, family=Family.TRANSIENT, kind="OfflineFailure")
        prompt, schema = _last_words(request.prompt), request.task.schema
        text = prompt if schema is None else orjson.dumps(fill(schema, prompt)).decode()
        usage = Usage(input_tokens=len(prompt.split()), output_tokens=len(text.split()), cost_nanos=0)
        return Reply(text=text, usage=usage, model=ECHO, finish_reason="stop")

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""


def _last_words(prompt: Prompt) -> str:
    """Return the text of a prompt, or of the last user message of a chat."""
    if prompt.messages is None:
        return prompt.text or ""
    content = next((m.get("content") for m in reversed(prompt.messages) if m.get("role") == "user"), None)
    return " ".join(texts_in(content))


# --- filling a schema -------------------------------------------------------------------------------------------------

_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_NESTING = frozenset({"object", "array"})
_FORMATS = {
    "date": lambda n: f"2024-{n % 12 + 1:02}-{n % 28 + 1:02}",
    "time": lambda n: f"{n % 24:02}:{n % 60:02}:00Z",
    "date-time": lambda n: f"2024-{n % 12 + 1:02}-{n % 28 + 1:02}T{n % 24:02}:00:00Z",
    "duration": lambda n: f"PT{n % 60}M",
    "email": lambda n: f"user{n % 1000}@example.com",
    "uri": lambda n: f"https://example.com/{n % 1000}",
    "uuid": lambda n: f"00000000-0000-4000-8000-{n:012x}",
    "ipv4": lambda n: f"192.0.2.{n % 256}",
    "ipv6": lambda n: f"2001:db8::{n % 65536:x}",
}


def fill(schema: dict[str, Json], text: str) -> Json:
    """Make an instance of a JSON schema, always the same one for the same text.

    Supports what pydantic makes of classes: local references, combinations and limits, but no `pattern`.
    """
    return _Filler(schema, text).fill(schema, "$", 0)


class _Filler:
    def __init__(self, root: dict[str, Json], text: str) -> None:
        self._root = root
        self._text = text

    def fill(self, schema: Json, path: str, depth: int) -> Json:
        """Make an instance of a part of the schema; numbers differ by `path`."""
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return None if depth > MAX_DEPTH else self._text
        schema = self._flatten(schema, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][self._number(path) % len(schema["enum"])]
        match _type_of(schema):
            case "object":
                properties, required = schema.get("properties", {}), schema.get("required", [])
                names = [name for name in properties if name in required or depth < MAX_OPTIONAL_DEPTH]
                names += [name for name in required if name not in properties]
                return {name: self.fill(properties.get(name), f"{path}.{name}", depth + 1) for name in names}
            case "array":
                return self._array(schema, path, depth)
            case "integer" | "number" as kind:
                return self._numeric(schema, path, 1 if kind == "integer" else 0.01)
            case "boolean":
                return self._number(path) % 2 == 0
            case "null":
                return None
        if make := _FORMATS.get(schema.get("format", "")):
            return make(self._number(path))
        return self._text.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]

    def _flatten(self, schema: dict[str, Json], depth: int) -> dict[str, Json]:
        """Merge what a schema refers to and combines into one without `$ref`, `allOf`, `anyOf` and `oneOf`."""
        for _ in range(MAX_DEPTH):
            parts = [self._resolve(schema["$ref"])] if "$ref" in schema else []
            parts += schema.get("allOf", [])
            parts += [_choose(schema[word], depth) for word in ("anyOf", "oneOf") if schema.get(word)]
            if not parts:
                break
            schema = {word: value for word, value in schema.items() if word not in _COMBINING}
            for part in parts:
                properties = {**part.get("properties", {}), **schema.get("properties", {})}
                required = [*schema.get("required", []), *part.get("required", [])]
                schema = {**part, **schema} | ({"properties": properties} if properties else {})
                schema |= {"required": required} if required else {}
        return schema

    def _resolve(self, reference: str) -> Json:
        return functools.reduce(lambda found, step: found[step], reference.split("/")[1:], self._root)

    def _array(self, schema: dict[str, Json], path: str, depth: int) -> list[Json]:
        first, count = schema.get("prefixItems", []), schema.get("minItems", 0)
        if depth < MAX_OPTIONAL_DEPTH:
            count = max(count, len(first), 1)
        parts = [*first, *[schema.get("items")] * count][: min(count, schema.get("maxItems", count))]
        return [self.fill(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(parts)]

    def _numeric(self, schema: dict[str, Json], path: str, step: float) -> Json:
        step = schema.get("multipleOf", step)
        low, high = (schema.get(name, schema.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
        if low is None:
            low = 0 if high is None or high > 0 else high - 1000
        if high is None:
            high = low + 1000
        first = math.floor(low / step) + 1 if "exclusiveMinimum" in schema else math.ceil(low / step)
        last = math.ceil(high / step) - 1 if "exclusiveMaximum" in schema else math.floor(high / step)
        number = (first + self._number(path) % max(last - first + 1, 1)) * step
        return number if isinstance(step, int) else round(number, 9)

    def _number(self, path: str) -> int:
        data = f"{path}\0{self._text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def _choose(options: list[Json], depth: int) -> Json:
    """Return the first option, or below the optional depth the first that nests no further."""
    if depth < MAX_OPTIONAL_DEPTH:
        return options[0]
    return next((one for one in options if "$ref" not in one and one.get("type") not in _NESTING), options[0])


def _type_of(schema: dict[str, Json]) -> str:
    """Return the type of a schema, inferred from its keywords if it names none."""
    named = schema.get("type")
    if isinstance(named, list):
        return str(next((name for name in named if name != "null"), "null"))
    return str(named or ("object" if "properties" in schema else "array" if "items" in schema else "string"))
