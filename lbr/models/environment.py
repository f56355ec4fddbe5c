"""What the environment says of providers: checked before any call, so that a bad key or URL costs no job an attempt."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from lbr.core.errors import UsageError

URL_EXAMPLE = "http://127.0.0.1:8000/v1"

_PREFIXES = {"openai-chat": "OPENAI", "openai-responses": "OPENAI", "cohere": "CO", "azure": "AZURE_OPENAI"}
"""How the variables of providers begin, if not with the provider's name."""

_MORE_KEYS = {"google": ("GEMINI_API_KEY",), "huggingface": ("HF_TOKEN",)}
_MORE_URLS = {"google": ("GOOGLE_GEMINI_BASE_URL",), "azure": ("AZURE_OPENAI_ENDPOINT",)}
_EMPTY_IS_UNSET = {"OPENROUTER_BASE_URL", "GOOGLE_GEMINI_BASE_URL"}

_OPENAI_HOST = re.compile(
    r"(?:.*\.)?(?:api\.openai\.com|openai\.azure\.(?:com|us|cn)|cognitiveservices\.azure\.com)\Z"
)
_FOUNDRY_HOST = ".services.ai.azure.com"
_VISIBLE = re.compile(r"[!-~]+\Z")


def check_environment(name: str, api_key: str | None = None) -> None:
    """Raise UsageError for a base URL or a key of the model's provider that no call could be made with.

    `api_key` is OpenRouter's, from a flag. Variables that are not set are fine here.
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
    if not problem:
        return
    raise UsageError(f"{variable} {problem}: expected a URL such as {URL_EXAMPLE}, got: {_hide_user(url)!r}")


def _place_problem(url: str) -> str:
    """Return what is wrong with host and port of a URL; empty if nothing is."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # read, because only that checks it
    except ValueError as error:  # its words may quote a password
        return "has a bad port; correct it" if "port" in str(error).lower() else "has a bad host; correct it"
    return "" if parts.hostname else "has no host"


def _hide_user(url: str) -> str:
    """Return a URL without what stands before an @, which may be a password."""
    return re.sub(r"[^/@\s]*@", "…@", url)


def _check_key(variable: str, key: str | None) -> None:
    """Raise UsageError for a key that is not visible ASCII: no header can carry it, or it was copied with more than the key.

    Never shows the key.
    """
    if not key or _VISIBLE.match(key):
        return
    if re.search(r"[\r\n]", key):
        problem = "contains a line break"
    elif key != key.strip():
        problem = "has white space around it"
    else:
        problem = "contains a space, an invisible character or one that is not ASCII"
    raise UsageError(f"{variable} {problem}; set it to the key alone")


def takes_max_completion_tokens(base_url: str) -> bool:
    """Return whether a server is one of OpenAI's own, or Azure's with OpenAI's models.

    These refuse `max_tokens` for some models; other servers may not know the newer name.
    """
    url = urlsplit(base_url)
    host = (url.hostname or "").lower()
    if host.endswith(_FOUNDRY_HOST):  # of the models there only some are OpenAI's
        return url.path.startswith("/openai")
    return _OPENAI_HOST.match(host) is not None
