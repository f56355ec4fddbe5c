"""What no provider is asked, whichever adapter serves it: settings with authority, and schemas that none takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.core.types import Json

FORBIDDEN_SETTINGS = {
    "max_retries": "lbr retries by itself, see --max-attempts",
    "extra_headers": "settings are stored in the database, and headers carry keys",
}

_AUTHORITY = re.compile(
    r"(?:.*_)?(?:api_?(?:base|key|url)|(?:base|server)_?url|endpoint|authorization|headers|http_client|prox(?:y|ies))\Z"
)
"""Names by which a setting would say where calls go or with whose key; also what a relay would take from a body."""

_SCHEMA_WORDS = frozenset({"properties", "$defs", "definitions"})


def check_authority(settings: Mapping[str, Json]) -> None:
    """Raise UsageError for settings that say more than how to answer: who is called, with which key, how often.

    Settings come out of a database, and a database is data: whoever can write to it must not move the calls, with the
    key of the worker, to a server of theirs. Needs no provider.
    """
    for setting, reason in FORBIDDEN_SETTINGS.items():
        if setting in settings:
            raise UsageError(f"the setting {setting} cannot be set: {reason}")
    for setting in _names(settings):
        if _AUTHORITY.match(setting.rpartition(".")[2].lower().replace("-", "_")):
            raise UsageError(
                f"the setting {setting} cannot be set: settings are stored in the database, and where calls go and with "
                f"which key is for the worker's environment to say, such as OPENAI_BASE_URL and OPENAI_API_KEY"
            )


def _names(value: Json, path: str = "") -> Iterator[str]:
    """Yield the paths of all names in a value, but not what a JSON schema in it calls the fields of an answer."""
    if isinstance(value, list):
        for one in value:
            yield from _names(one, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}{name}"
            if name in _SCHEMA_WORDS and isinstance(inner, dict):
                inner = list(inner.values())  # noqa: PLW2901 - the names of fields are anybody's choice
            yield from _names(inner, f"{path}{name}.")


def not_kept(settings: Mapping[str, Json]) -> list[str]:
    """Return a message for each setting that asks for something that lbr would drop from the answer."""
    body = settings.get("extra_body")
    asked = {**settings, **(body if isinstance(body, dict) else {})}
    problems = [
        f"the setting {name} cannot be set: lbr does not keep log probabilities yet"
        for name, value in asked.items()
        if name.endswith("logprobs") and value
    ]
    number = asked.get("n")
    if isinstance(number, int) and number > 1:
        problems.append(
            "the setting n cannot be set: lbr keeps one answer of a call, and all would be paid for"
        )
    return problems


def check_schema(schema: dict[str, Json]) -> None:
    """Raise UsageError for a schema that has no object at its top."""
    top = _top(schema)
    if top.get("type", "object" if "properties" in top else None) != "object":
        raise UsageError(
            'expected an output schema with an object at its top ("type": "object"), for that is what providers want, '
            f"got: {top.get('type', 'no type')}; put it into an object with one property"
        )


def _top(schema: dict[str, Json]) -> dict[str, Json]:
    """Follow the references at the top of a schema, a few of them, for they may go round."""
    top: Json = schema
    for _ in range(10):
        reference = top.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        top = schema
        for step in reference[2:].split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            top = top.get(name) if isinstance(top, dict) else None
        if not isinstance(top, dict):
            return {}
    return dict(top)
