"""Which tasks the chat adapter serves, and where their calls go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.models.environment import takes_max_completion_tokens
from lbr.models.http import unsupported_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lbr.core.types import Json

PLACEHOLDER_KEY = "api-key-not-set"
"""What a server gets that needs no key, for its client library insists on one."""

# Each would change what is sent in ways that only the SDK knows.
_FOREIGN_VARIABLES = ("OPENAI_CUSTOM_HEADERS", "OPENAI_ADMIN_KEY", "OPENAI_LOG")
_URL = re.compile(
    r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::(?:\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}))?(?:/[\w./~:-]*)?\Z",
    re.ASCII,
)
_KEY = re.compile(r"[!-~]+\Z")
_NO_SYSTEM = re.compile(r"(?:^|/)o1-mini")
"""Models that take no system messages, which pydantic-ai makes up for."""

_NAME = re.compile(r"[!-~]+\Z")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model's calls go. `url` is that of its chat completions, `base_url` what prices are looked up by.

    `thinking_tags` stand around what of an answer is no answer. `relayed` says that the URL is not the provider's
    own, so that fields of its own may be missing.
    """

    provider: str
    model: str
    base_url: str
    url: str
    headers: Mapping[str, str]
    thinking_tags: tuple[str, str]
    relayed: bool = False

    def __repr__(self) -> str:
        """Leave the headers out, which hold the key."""
        return f"Endpoint({self.provider}:{self.model} at {self.base_url})"


def serves(name: str) -> bool:
    """Tell whether a model's full name, `provider:model`, is one that the chat adapter can serve."""
    provider, _, model = name.partition(":")
    if provider not in {"openai-chat", "openrouter", "ollama"} or _NAME.match(model) is None:
        return False
    if provider == "openrouter" and "/" not in model:
        return False
    return _NO_SYSTEM.search(model) is None


def endpoint_of(name: str, api_key: str | None = None) -> Endpoint | None:
    """Return where a model's calls go by this process's environment; `api_key` is OpenRouter's, from a flag.

    None where the chat adapter cannot serve the model, or a key or URL is missing or out of the ordinary: pydantic-ai's
    adapter takes it then, or says what is wrong.
    """
    if not serves(name) or any(os.environ.get(variable) for variable in _FOREIGN_VARIABLES):
        return None
    if unsupported_proxy():
        return None
    provider, _, model = name.partition(":")
    found = _PLACES[provider](api_key)
    if found is None:
        return None
    base_url, key, relayed = found
    if _URL.match(base_url) is None or _KEY.match(key) is None:
        return None
    return Endpoint(
        provider="openai" if provider == "openai-chat" else provider,
        model=model,
        base_url=base_url if provider == "openrouter" else f"{base_url.rstrip('/')}/",
        url=f"{base_url.rstrip('/')}/chat/completions",
        headers=_headers(provider, key),
        thinking_tags=_thinking_tags(provider, model),
        relayed=relayed,
    )


def _openai(_: str | None) -> tuple[str, str, bool] | None:
    base_url, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    if base_url is None:
        return None if key is None else ("https://api.openai.com/v1", key, False)
    return base_url, PLACEHOLDER_KEY if key is None else key, False


def _openrouter(api_key: str | None) -> tuple[str, str, bool] | None:
    key = api_key or os.environ.get("OPENROUTER_API_KEY")
    base_url = os.environ.get("OPENROUTER_BASE_URL")
    return None if not key else (base_url or "https://openrouter.ai/api/v1", key, bool(base_url))


def _ollama(_: str | None) -> tuple[str, str, bool] | None:
    base_url = os.environ.get("OLLAMA_BASE_URL")
    return None if not base_url else (base_url, os.environ.get("OLLAMA_API_KEY") or PLACEHOLDER_KEY, False)


_PLACES: dict[str, Callable[[str | None], tuple[str, str, bool] | None]] = {
    "openai-chat": _openai,
    "openrouter": _openrouter,
    "ollama": _ollama,
}


def _headers(provider: str, key: str) -> dict[str, str]:
    variables = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    if provider == "openrouter":
        variables |= {"HTTP-Referer": "OPENROUTER_APP_URL", "X-Title": "OPENROUTER_APP_TITLE"}
    named = {header: os.environ.get(variable) for header, variable in variables.items()}
    return {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "lbr",
        **{header: value for header, value in named.items() if value},
    }


def _thinking_tags(provider: str, model: str) -> tuple[str, str]:
    if provider == "openrouter" and model.removeprefix("~").startswith("anthropic/"):
        return "<thinking>", "</thinking>"
    return "<think>", "</think>"


# --- settings ---------------------------------------------------------------------------------------------------------

_SAMPLING = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty"})
_DROPS_SAMPLING = re.compile(r"(?:^|[/:])(?:o\d|gpt-[5-9])")
"""Names among which are the models that take no sampling settings while they reason."""


def knows(model: str, settings: Mapping[str, Json]) -> bool:
    """Return whether a model is sent all of these settings as they are, so that no call will refuse them."""
    if settings.keys() & _SAMPLING and _DROPS_SAMPLING.search(model):
        return False
    return all(name in _FITS and _FITS[name](value) for name, value in settings.items())


def words_of(endpoint: Endpoint, settings: Mapping[str, Json]) -> dict[str, Json] | None:
    """Return settings as the request's body has them; None where only pydantic-ai can tell what becomes of them."""
    if not knows(endpoint.model, settings):
        return None
    newer = endpoint.provider != "openrouter" and takes_max_completion_tokens(endpoint.base_url)
    most = "max_completion_tokens" if newer else "max_tokens"
    names = {"max_tokens": most, "stop_sequences": "stop"}
    return {names.get(name, name): value for name, value in settings.items() if name != "timeout"}


def _is_number(value: Json) -> bool:
    return type(value) in {int, float}


def _is_int(value: Json) -> bool:
    return type(value) is int


def _is_texts(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_FITS: dict[str, Callable[[Json], bool]] = {
    **dict.fromkeys(_SAMPLING, _is_number),
    "timeout": lambda value: _is_number(value) and value > 0,
    "max_tokens": _is_int,
    "seed": _is_int,
    "stop_sequences": _is_texts,
}
