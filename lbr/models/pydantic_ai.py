"""Every provider that pydantic-ai supports, one plain call over aiohttp at a time, and what can be checked before any.

Answers in OpenAI's format are read as `lbr.models.chat` reads them. Importing pydantic-ai takes seconds, so
`lbr.models.build` imports this module when it needs it.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import json
import os
import re
import shlex
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import httpx2
import orjson
from aiohttp import ClientTimeout
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_ai import messages as pm
from pydantic_ai.direct import model_request
from pydantic_ai.exceptions import UsageExtractionFailedWarning, UserError
from pydantic_ai.models import ModelRequestParameters, create_async_httpx2_client, infer_model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.openrouter import OpenRouterModel
from pydantic_ai.output import OutputObjectDefinition
from pydantic_ai.providers import infer_provider_class
from pydantic_ai.providers.gateway import gateway_provider
from pydantic_ai.providers.openrouter import OpenRouterProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from lbr.core.errors import Permanent, Usage, UsageError
from lbr.core.extras import Extra, Extras
from lbr.core.pricing import processing_of
from lbr.core.types import Reply
from lbr.models.base import messages_of
from lbr.models.chat import ANSWER_TOOL, Reader, extras
from lbr.models.checks import check_authority, settings_of, takes_max_completion_tokens
from lbr.models.costs import cost_nanos
from lbr.models.failures import check_answer, clean, ending_of, filter_words, from_exception
from lbr.models.http import Connections, unsupported_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

    from pydantic_ai.models import Model
    from pydantic_ai.profiles import ModelProfile
    from pydantic_ai.providers import Provider

    from lbr.core.pricing import Processing
    from lbr.core.types import Json
    from lbr.models.base import Request

TABLE_SECONDS = 10.0
"""The longest wait for the price table after an answer."""

_PACKING = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
_ENVIRONMENT_NAME = re.compile(r"`([A-Z][A-Z0-9_]{3,})`")
_answers: ContextVar[list[httpx2.Response]] = ContextVar("answers")


class PydanticAIModel:
    """One provider's model with one HTTP client; the provider's SDK does not retry.

    The client calls over `connections`, None for its own, and closes them. Raises UsageError if the key is missing, with
    the environment variable to set.
    """

    def __init__(
        self,
        name: str,
        *,
        task_settings: Mapping[str, Json],
        api_key: str | None = None,
        connections: Connections | None = None,
    ) -> None:
        # Users must not see lines of pydantic-ai's code because of an odd answer.
        warnings.filterwarnings("ignore", category=UsageExtractionFailedWarning)
        warnings.filterwarnings("ignore", message="Unexpected non-string value for")
        self._api_key = api_key
        self._settings = task_settings
        self._client: httpx2.AsyncClient | None = None
        provider_class = provider_class_of(name)
        with refusing(name, api_key):
            if http_package(provider_class) is httpx2:
                transport = None if unsupported_proxy() else Transport(connections)
                self._client = create_async_httpx2_client(transport=transport)
                self._client.event_hooks = {"response": [_keep_answer]}
            self._model = _build(name, provider_class, api_key, self._client)
        own = name.partition(":")[0] in {"openai-chat", "ollama", "vllm", "litellm"}
        self._puts_limit_in_body = own and not takes_max_completion_tokens(str(self._model.base_url))
        self._reader: Reader | None = None
        if isinstance(self._model, OpenAIChatModel) and self._client is not None:
            self._reader = Reader(self._model.system, self._model.model_name, str(self._model.base_url), api_key)

    async def answer(self, request: Request) -> Reply:
        """Make one call. Raises CallError with the family of the failure."""
        history, schema = history_of(request), request.task.schema
        parameters = None if schema is None else parameters_of(schema, self._model.profile)
        settings: Any = self._settings_of(request)
        processing = processing_of(settings)
        failure: Exception | None = None
        answers: list[httpx2.Response] = []
        token = _answers.set(answers)
        try:
            response = await model_request(
                self._model, history, model_settings=settings, model_request_parameters=parameters
            )
        except Exception as error:  # noqa: BLE001 - raised below, unless its answer can be read
            failure = error
        finally:
            _answers.reset(token)
        if self._reader is not None and answers and answers[-1].is_success:
            # pydantic-ai rejects answers with an unusual envelope, and reports an error with status 200 as missing fields.
            self._reader.costs.begin()
            await self._reader.costs.ready(TABLE_SECONDS)
            return self._reader.read(answers[-1].content, keep=bool(request.keep), processing=processing)
        if failure is not None:
            url = str(answers[-1].request.url.copy_with(username=None, password=None, query=None)) if answers else None
            raise from_exception(failure, url=url, api_key=self._api_key) from failure
        if answers and answers[-1].is_error:  # Azure's content filter, of which pydantic-ai makes an answer
            reason = filter_words(response.provider_details) or "content filter"
            raise Permanent(f"the provider refused the prompt; {reason} (HTTP 400)", kind="ContentFilterError")
        reply = reply_of(response, processing)
        return replace(reply, extras=_extras_of(response, answers) if request.keep else None)

    def _settings_of(self, request: Request) -> dict[str, Json]:
        settings = dict(settings_of(request, self._settings))
        if Extra.LOGPROBS in request.keep:
            settings.setdefault(_logprobs_setting(self._model), True)
        if request.timeout is not None:  # else the client gives up after ten minutes
            settings = {"timeout": request.timeout, **settings}
        if self._puts_limit_in_body and "max_tokens" in settings:
            # pydantic-ai sends it as max_completion_tokens, which servers of the user's own may not know.
            settings["extra_body"] = {"max_tokens": settings.pop("max_tokens"), **(settings.get("extra_body") or {})}
        return settings | no_retries(self._model)

    def response_format(self, schema: dict[str, Json]) -> dict[str, Json] | None:
        """Return what a chat completions request has for a schema; None if the model is asked in another way."""
        if output_mode(self._model.profile) != "native":
            return None
        settings: Any = self._settings
        _, prepared = self._model.prepare_request(settings, parameters_of(schema, self._model.profile))
        if prepared.output_object is None:
            return None
        found: dict[str, Json] = {"name": ANSWER_TOOL, "schema": prepared.output_object.json_schema}
        profile: Mapping[str, Any] = self._model.profile
        if profile.get("openai_supports_strict_tool_definition", True):
            found["strict"] = prepared.output_object.strict
        return {"type": "json_schema", "json_schema": found}

    async def aclose(self) -> None:
        """Close the HTTP client."""
        async with self._model:  # which closes a client that the provider opened
            pass
        if self._client is not None:
            await self._client.aclose()


def no_retries(model: Model) -> dict[str, Json]:
    """Return the setting with which a provider's SDK does not retry."""
    return {} if "max_retries" in model.unsupported_settings else {"max_retries": 0}


# --- the connection ---------------------------------------------------------------------------------------------------


async def _keep_answer(response: httpx2.Response) -> None:
    await response.aread()
    _answers.get().append(response)


class Transport(httpx2.AsyncBaseTransport):
    """aiohttp's connections under a provider's SDK: httpx's own pool gets slow with hundreds of them.

    Raises CallError if no whole answer came.
    """

    def __init__(self, connections: Connections | None) -> None:
        self._connections = connections or Connections()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Make a call, and read its answer."""
        url, content = str(request.url.copy_with(username=None, password=None)), await request.aread()
        timeouts = request.extensions.get("timeout", {})
        answer, body = await self._connections.fetch(
            request.method,
            url,
            headers=tuple([(name.decode("latin-1"), value.decode()) for name, value in request.headers.raw]),
            data=content,
            timeout=ClientTimeout(total=None, connect=timeouts.get("connect"), sock_read=timeouts.get("read")),
        )
        headers = [(name, value) for name, value in answer.raw_headers if name.lower() not in _PACKING]
        return httpx2.Response(answer.code, headers=headers, content=body, request=request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()


def http_package(provider: type[Provider[Any]]) -> ModuleType | None:
    """Return the package whose clients a provider calls with: httpx2, or httpx; None if it takes no client."""
    parameter = inspect.signature(provider).parameters.get("http_client")
    wanted = "" if parameter is None else str(parameter.annotation)
    if "HTTPClient" in wanted or "httpx2." in wanted:
        return httpx2
    return importlib.import_module("httpx") if "httpx." in wanted else None


# --- the model --------------------------------------------------------------------------------------------------------


def provider_class_of(name: str) -> type[Provider[Any]]:
    """Return the class of a model's provider. Raises UsageError for none, and if its package is not installed."""
    provider, _, model = name.partition(":")
    with refusing(name):
        try:
            found = infer_provider_class(provider)
            found.model_profile(model)
        except ValueError:
            infer_model(name)  # raises, and may suggest a name
            raise
    return found


@contextmanager
def refusing(name: str, api_key: str | None = None) -> Iterator[None]:
    """Raise UsageError for what keeps a model from being built."""
    try:
        yield
    except Exception as error:
        is_users = isinstance(error, UserError)
        if is_users and (variable := _ENVIRONMENT_NAME.search(str(error))):
            raise UsageError(f"model {name!r} needs a key: set the environment variable {variable[1]}") from error
        kind = "" if is_users else f"{type(error).__name__}: "
        raise UsageError(f"cannot use model {name!r}: {kind}{clean(str(error), api_key)}") from error


def _build(name: str, provider_class: type[Provider[Any]], api_key: str | None, client: Any) -> Model:
    provider, _, model = name.partition(":")
    options = {} if client is None else {"http_client": client}
    if provider.startswith("gateway/"):
        upstream = provider.removeprefix("gateway/")
        return infer_model(name, lambda _: gateway_provider(upstream, **options))
    if provider == "openrouter":
        options |= {"api_key": api_key} if api_key else {}
        if base_url := os.environ.get("OPENROUTER_BASE_URL"):
            relay = type("RelayProvider", (OpenRouterProvider,), {"base_url": base_url})
            return OpenRouterModel(model, provider=relay(**options))
    return infer_model(name, lambda _: provider_class(**options))


# --- what is sent -----------------------------------------------------------------------------------------------------


def output_mode(profile: ModelProfile) -> Literal["native", "tool", "prompted"]:
    """Choose how to ask for JSON: with the provider's schema support, else as a tool call, else in the prompt."""
    if profile.get("supports_json_schema_output", False):
        return "native"
    return "tool" if profile.get("supports_tools", True) else "prompted"


def parameters_of(schema: dict[str, Json], profile: ModelProfile) -> ModelRequestParameters:
    """Return what makes a model answer by a schema."""
    mode, shape = output_mode(profile), schema if "$ref" in schema else {"type": "object", **schema}
    if mode != "tool":
        output = OutputObjectDefinition(json_schema=shape, name=ANSWER_TOOL)
        return ModelRequestParameters(output_mode=mode, output_object=output)
    tool = ToolDefinition(name=ANSWER_TOOL, parameters_json_schema=shape, description="The answer.", kind="output")
    return ModelRequestParameters(output_mode="tool", output_tools=[tool], allow_text_output=False)


def history_of(request: Request) -> list[pm.ModelMessage]:
    """Return a request as messages, the last request among them with the instructions.

    Raises Permanent for messages of which a part would not be sent.
    """
    history: list[pm.ModelMessage] = []
    tools: dict[str, str] = {}
    for message in messages_of(request):
        if message["role"] == "assistant":
            calls = [(call["id"], call["function"]) for call in message.get("tool_calls", ())]
            tools |= {call_id: called["name"] for call_id, called in calls}
            texts = [pm.TextPart(message["content"])] if message["content"] or not calls else []
            parts = [pm.ToolCallPart(called["name"], called["arguments"], call_id) for call_id, called in calls]
            history.append(pm.ModelResponse(parts=[*texts, *parts]))
        elif history and isinstance(history[-1], pm.ModelRequest):
            history[-1].parts = [*history[-1].parts, _part(message, tools)]
        else:
            history.append(pm.ModelRequest(parts=[_part(message, tools)]))
    requests = [message for message in history if isinstance(message, pm.ModelRequest)]
    requests[-1].instructions = request.task.instructions
    return history


def _part(message: Mapping[str, Any], tools: Mapping[str, str]) -> pm.ModelRequestPart:
    match message:
        case {"role": "tool", "content": text, "tool_call_id": call_id}:
            return pm.ToolReturnPart(tools[call_id], text, call_id)
        case {"role": "system", "content": text}:
            return pm.SystemPromptPart(text)
        case {"content": str(text)}:
            return pm.UserPromptPart(text)
    return pm.UserPromptPart([_content(part) for part in message["content"]])


def _content(part: Mapping[str, Any]) -> pm.UserContent:
    if part["type"] == "text":
        return str(part["text"])
    url, detail = part["image_url"]["url"], part["image_url"].get("detail")
    metadata = None if detail is None else {"detail": detail}
    if not url.startswith("data:"):
        return pm.ImageUrl(url, vendor_metadata=metadata)
    found = pm.BinaryContent.from_data_uri(url)
    found.vendor_metadata = metadata
    return found


# --- what comes back --------------------------------------------------------------------------------------------------


def reply_of(response: pm.ModelResponse, processing: Processing = "standard") -> Reply:
    """Read a response, whose call was asked to be processed so. Raises CallError if it holds no answer."""
    text, details = _text_of(response), response.provider_details or {}
    usage, cost = response.usage, cost_nanos(response, processing)
    counted = Usage(cost_nanos=cost)
    if not usage.unmeasured_requests:
        counted = Usage(usage.input_tokens, usage.output_tokens, cost, usage.cache_read_tokens or None)
    named = details.get("finish_reason")
    ending = ending_of(response.finish_reason or named)
    reasons = (named if named not in {None, ending} else None, filter_words(details))
    raw = None
    if not text.strip():
        raw = pm.ModelMessagesTypeAdapter.dump_json([response], fallback=str).decode(errors="replace")
    why = "; ".join(filter(None, reasons)) or None
    check_answer(text, ending, counted, raw=raw, refusal=details.get("refusal"), why=why)
    return Reply(text=text, usage=counted, model=response.model_name, finish_reason=ending)


def _text_of(response: pm.ModelResponse) -> str:
    for part in response.parts:
        if isinstance(part, pm.ToolCallPart) and part.tool_name == ANSWER_TOOL:
            return part.args if isinstance(part.args, str) else orjson.dumps(part.args or {}).decode()
    return "".join(part.content for part in response.parts if isinstance(part, pm.TextPart))


def _extras_of(response: pm.ModelResponse, answers: Sequence[httpx2.Response]) -> Extras:
    """Return what came with an answer; `answers` has its body, if it came over our client."""
    thoughts = "\n\n".join(part.content for part in response.parts if isinstance(part, pm.ThinkingPart))
    details = (getattr(one, "provider_details", None) or {} for one in (response, *response.parts))
    logprobs = next((one["logprobs"] for one in details if one.get("logprobs")), None)
    whole = answers[-1].content if answers else pm.ModelMessagesTypeAdapter.dump_json([response], fallback=str)
    return extras(thoughts, logprobs, whole)


# --- settings ---------------------------------------------------------------------------------------------------------

_OTHER_NAMES = {
    "reasoning_effort": "openai_reasoning_effort",
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}
_IN_BODY = {"temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "logit_bias", "thinking"}
"""Settings that some servers take in a body, though pydantic-ai does not send them."""
_STAND_INS = dict.fromkeys(("base_url", "azure_endpoint"), "http://localhost")
_STAND_INS |= {"api_key": "none", "api_version": "2024-10-21"}
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


_LOGPROBS = {"OpenAIChatModel": "openai", "OpenAIResponsesModel": "openai", "GoogleModel": "google", "XaiModel": "xai"}


def _logprobs_setting(model: Model | None) -> str:
    """Return the setting that asks for log probabilities; one that is not sent for a model that gives none."""
    prefixes = (_LOGPROBS.get(one.__name__) for one in type(model).__mro__)
    return next((f"{prefix}_logprobs" for prefix in prefixes if prefix), "logprobs")


def sends_logprobs(name: str, settings: Mapping[str, Json], schema: dict[str, Json] | None = None) -> bool:
    """Return whether a model can be asked for log probabilities; True if it cannot be built without a key."""
    setting = _logprobs_setting(_Recorder(name).model)
    return not any(f"setting {setting} " in problem for problem in unsent(name, {**settings, setting: True}, schema))


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
        prompt = [pm.ModelRequest.user_text_prompt("")]
        self._request = None
        with warnings.catch_warnings(), suppress(Exception):  # the one of `_keep`, as the SDK raises it
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
