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

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


def not_kept(settings: Mapping[str, Json]) -> list[str]:
    """Return a message for each setting that asks for something that lbr would drop from the answer."""
    body = settings.get("extra_body")
    wanted = {**settings, **(body if isinstance(body, dict) else {})}
    problems = [
        f"the setting {name} cannot be set: lbr does not keep log probabilities yet"
        for name, value in wanted.items()
        if name.endswith("logprobs") and value
    ]
    number = wanted.get("n")
    if isinstance(number, int) and number > 1:
        problems.append("the setting n cannot be set: lbr keeps one answer per call, and you would pay for all")
    return problems


def check_schema(schema: dict[str, Json]) -> None:
    """Raise UsageError for a schema that has no object at its top."""
    top = _top(schema)
    if top.get("type", "object" if "properties" in top else None) != "object":
        raise UsageError(
            'expected an output schema with an object at its top ("type": "object"), as providers require, '
            f"got: {top.get('type', 'no type')}; put it into an object with one property"
        )


def _top(schema: dict[str, Json]) -> dict[str, Json]:
    """Follow the references at the top of a schema, up to ten because they may be circular."""
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


# --- the environment --------------------------------------------------------------------------------------------------

URL_EXAMPLE = "http://127.0.0.1:8000/v1"

_PREFIXES = {"openai-chat": "OPENAI", "openai-responses": "OPENAI", "cohere": "CO", "azure": "AZURE_OPENAI"}
"""The beginning of a provider's variables, if it is not the provider's name."""

_MORE_KEYS = {"google": ("GEMINI_API_KEY",), "huggingface": ("HF_TOKEN",)}
_MORE_URLS = {"google": ("GOOGLE_GEMINI_BASE_URL",), "azure": ("AZURE_OPENAI_ENDPOINT",)}
_EMPTY_IS_UNSET = {"OPENROUTER_BASE_URL", "GOOGLE_GEMINI_BASE_URL"}

_OPENAI_HOST = re.compile(r"(?:.*\.)?(?:api\.openai\.com|openai\.azure\.(?:com|us|cn)|cognitiveservices\.azure\.com)\Z")
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
    if not url.strip():
        raise UsageError(f"{variable} is empty; unset it, or set it to a URL such as {URL_EXAMPLE}")
    if url[0] in "\"'" or url[-1] in "\"'":
        problem = "has quotes around it; remove them"
    elif re.search(r"\s", url):
        problem = "contains white space; remove it"
    elif not url.lower().startswith(("http://", "https://")):
        problem = "does not begin with http:// or https://; put one of them before it"
    else:
        problem = _place_problem(url)
    if problem:
        raise UsageError(f"{variable} {problem}: expected a URL such as {URL_EXAMPLE}, got: {hide_user(url)!r}")


def _place_problem(url: str) -> str:
    """Return what is wrong with host and port of a URL; empty if nothing is."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may quote a password
        return "has a bad host; correct it"
    try:
        _ = parts.port
    except ValueError:
        return "has a bad port; correct it"
    return "" if parts.hostname else "has no host"


def _check_key(variable: str, key: str | None) -> None:
    """Raise UsageError, without the key, for a key that no header can carry, or that was copied with more than the key."""
    if not key or _VISIBLE.match(key):
        return
    if re.search(r"[\r\n]", key):
        problem = "contains a line break"
    elif key != key.strip():
        problem = "has white space around it"
    else:
        problem = "contains a space, an invisible character or one that is not ASCII"
    raise UsageError(f"{variable} {problem}; set it to the key alone")


def check_trust() -> None:
    """Raise UsageError if SSL_CERT_FILE, else SSL_CERT_DIR, names no certificates."""
    variable = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
    path = os.environ.get(variable)
    if path and (problem := _trust_problem(variable, path)):
        raise UsageError(f"{variable} names {path}, which {problem}; fix or unset it")


def _trust_problem(variable: str, path: str) -> str:
    try:
        if variable == "SSL_CERT_DIR":
            folders = [folder for folder in path.split(os.pathsep) if os.path.isdir(folder)]
            if not folders:
                return "does not exist"
            names = (name for folder in folders for name in os.listdir(folder))
            hashed = any(re.fullmatch(r"[0-9a-fA-F]{8}\.\d+", name) for name in names)
            return "" if hashed else "holds no certificates by their hashes (`openssl rehash` makes those)"
        ssl.create_default_context(cafile=path)
    except FileNotFoundError:
        return "does not exist"
    except ssl.SSLError:
        return "holds no certificates"
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:  # no open file is left for now
            raise
        return f"cannot be read: {error.strerror}"
    return ""


def takes_max_completion_tokens(base_url: str) -> bool:
    """Return whether a server is one of OpenAI's, or Azure's with OpenAI's models.

    These refuse `max_tokens` for some models; other servers may not know the newer name.
    """
    url = urlsplit(base_url)
    host = (url.hostname or "").lower()
    if host.endswith(".services.ai.azure.com"):  # only some of the models there are OpenAI's
        return url.path.startswith("/openai")
    return _OPENAI_HOST.match(host) is not None
