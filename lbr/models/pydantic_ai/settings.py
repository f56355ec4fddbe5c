"""What can be checked about a model, its settings and a schema before any call, without a key or a network."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import json
import shlex
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_ai.direct import model_request
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models import infer_model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.settings import ModelSettings

from lbr.core.errors import UsageError
from lbr.models.checks import check_authority
from lbr.models.pydantic_ai.model import http_package, no_retries, parameters_of, provider_class_of, refusing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_ai.models import Model

    from lbr.core.types import Json

_OTHER_NAMES = {
    "reasoning_effort": "openai_reasoning_effort",
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}
_IN_BODY = {"temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "logit_bias", "thinking"}
"""Settings that some servers take in a body, though pydantic-ai does not send them."""
_STAND_INS = {
    "api_key": "none",
    "base_url": "http://localhost",
    "azure_endpoint": "http://localhost",
    "api_version": "2024-10-21",
}
"""The arguments of a provider that is never called."""


def check_model(name: str, settings: Mapping[str, Json]) -> None:
    """Raise UsageError for a model or a setting with which no call can succeed; needs no key and no network."""
    check_authority(settings)
    _Recorder(name)
    types = get_type_hints(ModelSettings)
    for setting, value in settings.items():
        adapter = TypeAdapter(types.get(setting, object), config=ConfigDict(arbitrary_types_allowed=True))
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise UsageError(f"the setting {setting} cannot be {value!r}: {problem}") from error
    timeout = settings.get("timeout")
    if isinstance(timeout, int | float) and not timeout > 0:
        raise UsageError(f"the setting timeout cannot be {timeout!r}: expected seconds above 0")


def unsent(name: str, settings: Mapping[str, Json], schema: dict[str, Json] | None = None) -> list[str]:
    """Return a message for each setting without which pydantic-ai would send the same request.

    Empty for the few providers that cannot be built without a key, or that do not call over httpx.
    """
    if not settings:
        return []
    with ThreadPoolExecutor(1) as thread:  # this one may run an event loop
        recorder = _Recorder(name, schema)
        unused = thread.submit(asyncio.run, _unsent(recorder, settings)).result()
    return [
        f"the setting {one} is not sent to model {name!r}; {_hint(recorder.model, one, settings[one])}"
        for one in unused
    ]


async def _unsent(recorder: _Recorder, settings: Mapping[str, Json]) -> list[str]:
    whole, unused = await recorder.record(settings), []
    for setting, value in settings.items() if whole is not None else ():
        others = [{name: other for name, other in settings.items() if name != setting}]
        if isinstance(value, bool):  # for False, nothing may be sent
            others.append({**settings, setting: not value})
        if all([await recorder.record(other) == whole for other in others]):
            unused.append(setting)
    return unused


class _Recorder:
    """A model without key and network that records its requests; `model` is None if it cannot be built so."""

    def __init__(self, name: str, schema: dict[str, Json] | None = None) -> None:
        self._schema = schema
        self._request: Any = None
        self.model: Model | None = None
        provider_class = provider_class_of(name)
        parameters, package = inspect.signature(provider_class).parameters, http_package(provider_class)
        arguments: dict[str, Any] = {name: value for name, value in _STAND_INS.items() if name in parameters}
        if package is not None:
            transport = package.MockTransport(self._keep)
            arguments["http_client"] = package.AsyncClient(transport=transport, timeout=60)
        try:
            provider = provider_class(**arguments)
        except Exception:  # noqa: BLE001 - it needs more, such as a region
            return
        with refusing(name):
            self.model = infer_model(name, lambda _: provider)

    async def _keep(self, request: Any) -> Any:
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        self._request = request.url, headers, await request.aread(), request.extensions.get("timeout")
        raise ConnectionAbortedError

    async def record(self, settings: Mapping[str, Json]) -> Any:
        """Return what a call with these settings would send, None if it cannot be recorded."""
        if self.model is None:
            return None
        wanted: Any = {**settings, **no_retries(self.model)}
        parameters = None if self._schema is None else parameters_of(self._schema, self.model.profile)
        prompt = [ModelRequest.user_text_prompt("")]
        self._request = None
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # the one of `_keep`, as the SDK raises it
            warnings.simplefilter("ignore")
            await model_request(self.model, prompt, model_settings=wanted, model_request_parameters=parameters)
        return self._request


def _hint(model: Model | None, setting: str, value: Json) -> str:
    """Return what to do instead of a setting that is not sent."""
    known = get_type_hints(ModelSettings)
    if setting not in known:
        close = difflib.get_close_matches(setting, known, n=1, cutoff=0.81)
        if meant := next(filter(None, (_OTHER_NAMES.get(setting), *close)), None):
            return f"did you mean {meant!r}?"
    is_known = setting in known.keys() - _IN_BODY or setting.startswith(("openai_", "openrouter_"))
    if is_known or not isinstance(model, OpenAIChatModel):
        return "leave it out"
    body = {"chat_template_kwargs": {"enable_thinking": bool(value)}} if setting == "thinking" else {setting: value}
    flag = f"--set {shlex.quote(f'extra_body={json.dumps(body, ensure_ascii=False)}')}"
    if setting == "thinking":
        return f"use openai_reasoning_effort, or what the server knows, for example {flag}"
    return f"send it with {flag} if the server takes it"
