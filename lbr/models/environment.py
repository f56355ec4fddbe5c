"""What the environment says of providers: checked before any call, so that a bad key or URL costs no job an attempt."""

from __future__ import annotations

import errno
import itertools
import os
import re
import ssl
from urllib.parse import urlsplit

from lbr.core.config import hide_user
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
    raise UsageError(f"{variable} {problem}: expected a URL such as {URL_EXAMPLE}, got: {hide_user(url)!r}")


def _place_problem(url: str) -> str:
    """Return what is wrong with host and port of a URL; empty if nothing is."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # read, because only that checks it
    except ValueError as error:  # its words may quote a password
        return "has a bad port; correct it" if "port" in str(error).lower() else "has a bad host; correct it"
    return "" if parts.hostname else "has no host"


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


def check_trust() -> None:
    """Raise UsageError if the variable that names the trusted certificates names none. Other variables are not read."""
    variable = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
    path = os.environ.get(variable)
    if path and (problem := _trust_problem(variable, path)):
        raise UsageError(f"{variable} names {path}, which {problem}; fix or unset it")


def _trust_problem(variable: str, path: str) -> str:
    """Return what is wrong with a file or folder of certificates; empty if nothing is."""
    try:
        if variable == "SSL_CERT_DIR":
            folders = [folder for folder in path.split(os.pathsep) if os.path.isdir(folder)]
            if not folders:
                return "does not exist"
            files = itertools.chain.from_iterable(map(os.listdir, folders))
            hashed = any(re.fullmatch(r"[0-9a-fA-F]{8}\.\d+", name) for name in files)
            return "" if hashed else "holds no certificates by their hashes (`openssl rehash` makes those)"
        ssl.create_default_context(cafile=path)
    except FileNotFoundError:
        return "does not exist"
    except ssl.SSLError:
        return "holds no certificates"
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:  # for want of open files, for now
            raise
        return f"cannot be read: {error.strerror}"
    return ""


def takes_max_completion_tokens(base_url: str) -> bool:
    """Return whether a server is one of OpenAI's own, or Azure's with OpenAI's models.

    These refuse `max_tokens` for some models; other servers may not know the newer name.
    """
    url = urlsplit(base_url)
    host = (url.hostname or "").lower()
    if host.endswith(_FOUNDRY_HOST):  # of the models there only some are OpenAI's
        return url.path.startswith("/openai")
    return _OPENAI_HOST.match(host) is not None
