"""What is checked before any call: settings, schemas, and the keys, URLs and certificates of the environment."""

from __future__ import annotations

import errno
import os
import re
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lbr.core.config import hide_user
from lbr.core.errors import Permanent, UsageError
from lbr.core.extras import Extra

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from lbr.core.types import Json
    from lbr.models.base import Request

# --- settings ---------------------------------------------------------------------------------------------------------

FORBIDDEN_SETTINGS = {
    "max_retries": "lbr retries by itself, see --max-attempts",
    "extra_headers": "settings are stored in the database, and headers carry keys",
}

_AUTHORITY = re.compile(
    r"(?:.*_)?(?:api_?(?:base|key|url)|(?:base|server)_?url|endpoint|authorization|headers|http_client|prox(?:y|ies))\Z"
)
"""Names by which a setting, or a field of a relay's body, would decide where calls go or with whose key."""

_SCHEMA_WORDS = frozenset({"properties", "$defs", "definitions"})


def check_authority(settings: Mapping[str, Json]) -> None:
    """Raise UsageError for settings that decide where calls go, with which key, or how often.

    Settings come from a database: a program that can write to it must not send calls, with the worker's key, to a
    server of its own.
    """
    for setting, reason in FORBIDDEN_SETTINGS.items():
        if setting in settings:
            raise UsageError(f"the setting {setting} cannot be set: {reason}")
    for setting in _names(settings):
        if _AUTHORITY.match(setting.rpartition(".")[2].lower().replace("-", "_")):
            raise UsageError(
                f"the setting {setting} cannot be set: settings are stored in the database. The worker's environment "
                f"decides where calls go and with which key, for example OPENAI_BASE_URL and OPENAI_API_KEY"
            )


def settings_of(request: Request, task_settings: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return a task's settings with those of the request's job over them. Raises Permanent for what no job may set."""
    if request.settings is None:
        return task_settings
    try:
        check_authority(request.settings)
    except UsageError as error:
        raise Permanent(str(error), kind="UsageError") from error
    return {**task_settings, **request.settings}


def _names(value: Json, path: str = "") -> Iterator[str]:
    """Yield the paths of all names in a value, but not the fields of an answer in a JSON schema."""
    if isinstance(value, list):
        for one in value:
            yield from _names(one, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}{name}"
            if name in _SCHEMA_WORDS and isinstance(inner, dict):
                inner = list(inner.values())  # noqa: PLW2901
            yield from _names(inner, f"{path}{name}.")


def not_kept(settings: Mapping[str, Json], keep: Collection[str] = ()) -> list[str]:
    """Return a message for each setting that asks for something that lbr would drop from the answer."""
    body = settings.get("extra_body")
    wanted = {**settings, **(body if isinstance(body, dict) else {})}
    problems = [
        f"the setting {name} cannot be set: lbr does not keep log probabilities unless you add logprobs to --keep"
        for name, value in wanted.items()
        if name.endswith("logprobs") and value and Extra.LOGPROBS not in keep
    ]
    number = wanted.get("n")
    if isinstance(number, int) and number > 1:
        problems.append("the setting n cannot be set: lbr keeps one answer per call, and you would pay for all")
    return problems


def check_schema(schema: dict[str, Json]) -> None:
    """Raise UsageError for a schema that has no object at its top."""
    top: Json = schema
    for _ in range(10):  # they may be circular
        if not isinstance(top, dict) or "$ref" not in top:
            break
        top = schema.get("$defs", {}).get(str(top["$ref"]).removeprefix("#/$defs/"))
    kind = top.get("type", "object" if "properties" in top else "no type") if isinstance(top, dict) else "no type"
    if kind != "object":
        raise UsageError(
            'expected an output schema with an object at its top ("type": "object"), as providers require, '
            f"got: {kind}; put it into an object with one property"
        )


# --- the environment --------------------------------------------------------------------------------------------------

URL_EXAMPLE = "http://127.0.0.1:8000/v1"

_PREFIXES = {"openai-chat": "OPENAI", "openai-responses": "OPENAI", "cohere": "CO", "azure": "AZURE_OPENAI"}
"""The beginning of a provider's variables, if it is not the provider's name."""

_MORE_KEYS = {"google": ("GEMINI_API_KEY",), "huggingface": ("HF_TOKEN",)}
_MORE_URLS = {"google": ("GOOGLE_GEMINI_BASE_URL",), "azure": ("AZURE_OPENAI_ENDPOINT",)}
_EMPTY_IS_UNSET = {"OPENROUTER_BASE_URL", "GOOGLE_GEMINI_BASE_URL"}

_URL_PROBLEMS = {
    r"\s*\Z": "is empty; set it, or unset it",
    r"[\"']": "has quotes around it; remove them",
    r"\S*\s": "contains white space; remove it",
    r"(?!https?://)": "does not begin with http:// or https://; put one of them before it",
    r"https?://[:/]|https?://\Z": "has no host",
}
_OPENAI_URL = re.compile(
    r"https?://(?:[^/@]*\.)?(?:(?:api\.openai\.com|openai\.azure\.(?:com|us|cn)|cognitiveservices\.azure\.com)(?:[:/]|\Z)"
    r"|services\.ai\.azure\.com/openai)",  # only some of the models there are OpenAI's
    re.IGNORECASE,
)
_VISIBLE = re.compile(r"[!-~]+\Z")


def check_environment(name: str, api_key: str | None = None) -> None:
    """Raise UsageError for a base URL or a key of the model's provider with which no call can be made.

    `api_key` is OpenRouter's, from a flag. Variables that are not set pass.
    """
    provider = name.partition(":")[0]
    prefix = _PREFIXES.get(provider, provider.upper().replace("-", "_"))
    if provider.startswith("gateway/"):
        prefix = "PYDANTIC_AI_GATEWAY"
    for variable in (f"{prefix}_BASE_URL", *_MORE_URLS.get(provider, ())):
        _check_url(variable, os.environ.get(variable))
    for variable in (f"{prefix}_API_KEY", *_MORE_KEYS.get(provider, ())):
        _check_key(variable, os.environ.get(variable))
    if provider == "openrouter":
        _check_key("OPENROUTER_API_KEY (or openrouter_api_key)", api_key)


def _check_url(variable: str, url: str | None) -> None:
    if url is None or (not url and variable in _EMPTY_IS_UNSET):
        return
    problem = next((words for pattern, words in _URL_PROBLEMS.items() if re.match(pattern, url, re.IGNORECASE)), "")
    try:
        _ = urlsplit(url).port
    except ValueError:  # its text may quote a password
        problem = problem or "has a bad host or port; correct it"
    if problem:
        raise UsageError(f"{variable} {problem}: expected a URL such as {URL_EXAMPLE}, got: {hide_user(url)!r}")


def _check_key(variable: str, key: str | None) -> None:
    """Raise UsageError, without the key, for a key that no header can carry, or that was copied with more than the key."""
    if key and not _VISIBLE.match(key):
        raise UsageError(
            f"{variable} contains a line break, a space, an invisible character or one that is not ASCII; set it to the "
            f"key alone"
        )


def check_trust() -> None:
    """Raise UsageError if SSL_CERT_FILE names no certificates."""
    file = os.environ.get("SSL_CERT_FILE")
    try:
        if file:
            ssl.create_default_context(cafile=file)
    except OSError as error:  # one of ssl's is an OSError
        if error.errno in {errno.EMFILE, errno.ENFILE}:  # no open file is left for now
            raise
        raise UsageError(
            f"SSL_CERT_FILE names {file}, which holds no certificates: {error}; fix or unset it"
        ) from error


def takes_max_completion_tokens(base_url: str) -> bool:
    """Return whether a server is one of OpenAI's, or Azure's with OpenAI's models.

    These refuse `max_tokens` for some models; other servers may not know the newer name.
    """
    return _OPENAI_URL.match(base_url) is not None
