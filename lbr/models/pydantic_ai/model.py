"""The model: built once per task, called once per request."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

from lbr.core.errors import CallError, Permanent, UsageError
from lbr.models.checking import check_authority
from lbr.models.environment import check_environment, check_trust, takes_max_completion_tokens
from lbr.models.pydantic_ai.checks import (
    check_known,
    missing_package,
    output_mode,
    provider_class_of,
    require,
)
from lbr.models.pydantic_ai.completions import Completions
from lbr.models.pydantic_ai.families import call_error
from lbr.models.pydantic_ai.history import history_of
from lbr.models.pydantic_ai.replies import ANSWER_TOOL, FREE, reply_of
from lbr.models.pydantic_ai.transport import client_for
from lbr.models.wording import clean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_ai.models import Model, ModelRequestParameters
    from pydantic_ai.profiles import ModelProfile
    from pydantic_ai.providers import Provider
    from pydantic_ai.settings import ModelSettings

    from lbr.core.types import Json, Reply
    from lbr.models.base import Request
    from lbr.models.http import Connections

_ENVIRONMENT_NAME = re.compile(r"`([A-Z][A-Z0-9_]{3,})`")


class PydanticAIModel:
    """One provider's model with one HTTP client, built once; the provider's SDK does not retry.

    That client calls over `connections`, None for some of its own, or over `transport`; if the provider takes none, over
    what its SDK opens.
    Construction raises UsageError when the key is missing, with the environment variable to set, and for settings
    that no database may bring.
    """

    def __init__(
        self,
        name: str,
        *,
        task_settings: Mapping[str, Json],
        api_key: str | None = None,
        connections: Connections | None = None,
        transport: Any = None,
    ) -> None:
        require(name)
        from pydantic_ai.direct import model_request  # noqa: PLC0415
        from pydantic_ai.exceptions import UsageExtractionFailedWarning  # noqa: PLC0415

        # A user must not see lines of pydantic-ai's code because a server's answer is odd.
        warnings.filterwarnings("ignore", category=UsageExtractionFailedWarning)
        warnings.filterwarnings("ignore", message="Unexpected non-string value for")
        self._api_key = api_key
        self._name = name
        check_authority(task_settings)  # again, for whoever wrote to the database need not have been lbr
        check_environment(name, api_key)
        check_trust()
        self._client = client_for(provider_class_of(name), connections, transport)
        self._model = _build(name, api_key, self._client)
        check_known(name, task_settings, self._model)
        self._fixed = {} if "max_retries" in self._model.unsupported_settings else {"max_retries": 0}
        self._puts_limit_in_body = _puts_limit_in_body(name, self._model)
        self._settings: Any = {**task_settings, **self._fixed}
        self._call = model_request

    async def answer(self, request: Request) -> Reply:
        """Make one call; CallError with the family of whatever goes wrong."""
        schema = request.task.schema
        history = history_of(request)
        settings: ModelSettings = self._settings
        if request.settings is not None:
            settings = self._settings | self._checked(request.settings) | self._fixed
        if request.timeout is not None and "timeout" not in settings:
            # Else the client gives up after ten minutes, however long the caller is willing to wait.
            settings = {**settings, "timeout": request.timeout}
        if self._puts_limit_in_body:
            settings = _limit_in_body(settings)
        try:
            response = await self._call(
                self._model,
                history,
                model_settings=settings,
                model_request_parameters=None if schema is None else _parameters(schema, self._model.profile),
            )
        except CallError:
            raise
        except Exception as error:
            raise call_error(error, api_key=self._api_key) from error
        return reply_of(response)

    def _checked(self, settings: Mapping[str, Json]) -> Mapping[str, Json]:
        try:
            check_authority(settings)
            check_known(self._name, settings, self._model)
        except UsageError as error:
            raise Permanent(str(error), kind="UsageError") from error
        return settings

    async def aclose(self) -> None:
        """Close the HTTP client."""
        async with self._model:  # which closes a client that the provider opened
            pass
        if self._client is not None:
            await self._client.aclose()


def _build(name: str, api_key: str | None, client: Any) -> Model:
    from pydantic_ai.exceptions import UserError  # noqa: PLC0415

    try:
        found = _infer(name, provider_class_of(name), api_key, client)
    except ImportError as error:
        raise missing_package(name, error) from error
    except UserError as error:
        variable = _ENVIRONMENT_NAME.search(str(error))
        if variable is None:
            raise UsageError(f"cannot use model {name!r}: {clean(str(error), api_key)}") from error
        raise UsageError(f"model {name!r} needs a key: set the environment variable {variable[1]}") from error
    except Exception as error:
        cause = f"{type(error).__name__}: {clean(str(error), api_key)}"
        raise UsageError(f"cannot use model {name!r}: {cause}") from error
    _read_leniently(found, api_key)
    _tell_free_answers(found)
    return found


def _infer(name: str, provider_class: type[Provider[Any]], api_key: str | None, client: Any) -> Model:
    from pydantic_ai.models import infer_model, parse_model_id  # noqa: PLC0415

    provider, model = parse_model_id(name)
    options = {} if client is None else {"http_client": client}
    if provider is not None and provider.startswith("gateway/"):
        from pydantic_ai.providers.gateway import gateway_provider  # noqa: PLC0415

        return infer_model(name, lambda _: gateway_provider(provider.removeprefix("gateway/"), **options))
    if provider == "openrouter":
        # Without a key of its own it looks into the environment, and says what to set if there is none.
        options |= {"api_key": api_key} if api_key else {}
        if base_url := os.environ.get("OPENROUTER_BASE_URL"):
            return _relayed_openrouter(model, base_url, options)
    return infer_model(name, lambda _: provider_class(**options))


def _relayed_openrouter(model: str, url: str, options: dict[str, Any]) -> Model:
    """Build an OpenRouter model at another URL: a relay, or a server that merely speaks the same language.

    pydantic-ai reads no variable for the URL, and insists on a field of OpenRouter's own that others leave out.
    """
    from pydantic_ai.models.openrouter import OpenRouterModel  # noqa: PLC0415
    from pydantic_ai.providers.openrouter import OpenRouterProvider  # noqa: PLC0415

    class RelayProvider(OpenRouterProvider):
        base_url = url

    class RelayModel(OpenRouterModel):
        def _validate_completion(self, response: Any) -> Any:
            if getattr(response, "provider", None) is None:
                response = response.model_copy(update={"provider": "unknown"})
            return super()._validate_completion(response)

    return RelayModel(model, provider=RelayProvider(**options))


def _puts_limit_in_body(name: str, model: Model) -> bool:
    """Return whether max_tokens goes to a server of the user's own, which may not know OpenAI's newer name for it."""
    own = name.partition(":")[0] in {"openai-chat", "ollama", "vllm", "litellm"}
    return own and not takes_max_completion_tokens(str(model.base_url))


def _limit_in_body(settings: Any) -> Any:
    """Return settings that send max_tokens under its own name: pydantic-ai would choose the other one."""
    body = settings.get("extra_body") or {}
    if "max_tokens" not in settings or not isinstance(body, dict):
        return settings
    rest = {name: value for name, value in settings.items() if name != "max_tokens"}
    return {**rest, "extra_body": {"max_tokens": settings["max_tokens"], **body}}


def _read_leniently(model: Any, api_key: str | None) -> None:
    """Let only the text of a chat completion be required, and let an error with status 200 keep its code and words."""
    from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415

    if isinstance(model, OpenAIChatModel):
        completions = Completions(model, api_key)
        # The two places that see a whole answer.
        model._completions_create = completions.create  # type: ignore[assignment]  # noqa: SLF001
        model._process_response = completions.read  # type: ignore[method-assign]  # noqa: SLF001


def _tell_free_answers(model: Any) -> None:
    """Keep OpenRouter's word that an answer was free: pydantic-ai leaves a cost of 0 out, as if none had been told."""
    if model.system != "openrouter":
        return
    process = model._process_provider_details  # noqa: SLF001 - the one place that sees the cost

    def processed(response: Any) -> dict[str, Any] | None:
        details: dict[str, Any] | None = process(response)
        free = getattr(response.usage, "cost", None) == 0
        return {**(details or {}), FREE: True} if free else details

    model._process_provider_details = processed  # noqa: SLF001


def _parameters(schema: dict[str, Json], profile: ModelProfile) -> ModelRequestParameters:
    from pydantic_ai.models import ModelRequestParameters  # noqa: PLC0415
    from pydantic_ai.output import OutputObjectDefinition  # noqa: PLC0415
    from pydantic_ai.tools import ToolDefinition  # noqa: PLC0415

    mode = output_mode(profile)
    shape = schema if "$ref" in schema else {"type": "object", **schema}
    if mode == "tool":
        tool = ToolDefinition(
            name=ANSWER_TOOL, parameters_json_schema=shape, description="The answer.", kind="output"
        )
        return ModelRequestParameters(output_mode="tool", output_tools=[tool], allow_text_output=False)
    return ModelRequestParameters(
        output_mode=mode, output_object=OutputObjectDefinition(json_schema=shape, name=ANSWER_TOOL)
    )
