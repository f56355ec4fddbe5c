"""What can be said about a model, its settings and a schema before any call, without key and network."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any, Literal

from lbr.core.errors import UsageError
from lbr.models.checking import check_authority, check_schema, not_kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic_ai.models import Model
    from pydantic_ai.profiles import ModelProfile
    from pydantic_ai.providers import Provider

    from lbr.core.types import Json

OutputMode = Literal["native", "tool", "prompted"]

_SLIM_EXTRA = re.compile(r"pydantic-ai-slim\[([\w-]+)\]")


_NAMES_ELSEWHERE = {
    "stop": "stop_sequences",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}
"""Settings by the names that APIs have for them."""

_SAMPLING = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias"})
_OF_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})
_UNUSED = frozenset(
    {
        "first_event_timeout",
        "openai_continuous_usage_stats",
        "citations",
        "openai_include_raw_annotations",
        "openai_include_unmapped_response_data",
    }
)
"""Settings of streams, of which lbr reads none, and of parts of an answer that lbr does not keep."""


def check_model(name: str, settings: Mapping[str, Json], *, schema: dict[str, Json] | None = None) -> None:
    """Raise UsageError for a model, a setting or a schema that no call could be made with.

    Needs neither a key nor the network; a provider whose package is not installed is refused with the way to get it.
    """
    if schema is not None:
        check_schema(schema)
    check_authority(settings)
    require(name)
    provider_class_of(name)
    model = _keyless_model(name)
    if model is not None:
        check_known(name, settings, model)


def require(name: str) -> None:
    """Load pydantic-ai; UsageError where it, or what it needs, is damaged or cannot be read."""
    try:
        import pydantic_ai.direct  # noqa: F401, PLC0415 - with all that any call needs
    except Exception as error:
        raise UsageError(
            f"cannot use model {name!r}: expected pydantic-ai, got: {type(error).__name__}: {error}; see that it can be "
            f"imported, with the packages that it needs"
        ) from error


def provider_class_of(name: str) -> type[Provider[Any]]:
    """Return the class behind the name's provider; UsageError for none, and for one whose package is missing."""
    from pydantic_ai.exceptions import UserError  # noqa: PLC0415
    from pydantic_ai.models import infer_model, parse_model_id  # noqa: PLC0415
    from pydantic_ai.providers import infer_provider_class  # noqa: PLC0415

    provider, model = parse_model_id(name)
    if provider is None or not model:
        raise UsageError(f"expected a model like 'openai-chat:gpt-4o-mini', got: {name!r}")
    try:
        found = infer_provider_class(provider)
        found.model_profile(model)
    except ImportError as error:
        raise missing_package(name, error) from error
    except UserError as error:
        raise UsageError(f"cannot use model {name!r}: {error}") from error
    except ValueError:
        try:
            infer_model(name)  # raises, and its words may hold a suggestion
        except UserError as error:
            raise UsageError(str(error)) from error
        raise UsageError(f"Unknown model: {name}") from None
    return found


def missing_package(name: str, error: ImportError) -> UsageError:
    """Say how to install the package that a provider needs."""
    extra = _SLIM_EXTRA.search(str(error))
    if extra is None:
        return UsageError(f"cannot use model {name!r}: {error}")
    return UsageError(
        f"model {name!r} needs a package that is not installed: pip install 'pydantic-ai-slim[{extra[1]}]'"
    )


def _keyless_model(name: str) -> Model | None:
    """Build the model on a provider without key and connection, to ask it what it knows.

    None for the few that insist on a real provider; the worker that builds them will tell.
    """
    from pydantic_ai.exceptions import UserError  # noqa: PLC0415
    from pydantic_ai.models import infer_model  # noqa: PLC0415

    try:
        return infer_model(name, lambda provider: _keyless_provider(provider, provider_class_of(name)))
    except ImportError as error:
        raise missing_package(name, error) from error
    except UserError as error:
        if str(error).startswith("Unknown model"):
            raise UsageError(str(error)) from error
        return None
    except Exception:  # noqa: BLE001 - whatever it tripped over was the missing connection
        return None


class _NoClient:
    """Stands where a provider's client would be, and is never called."""

    def __getattr__(self, name: str) -> _NoClient:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _keyless_provider(provider_name: str, provider_class: type[Provider[Any]]) -> Provider[Any]:
    from pydantic_ai.providers import Provider  # noqa: PLC0415

    class Keyless(Provider[Any]):
        name = provider_name
        base_url = "http://localhost"
        client = _NoClient()
        model_profile = staticmethod(provider_class.model_profile)

    return Keyless()


def check_known(name: str, settings: Mapping[str, Json], model: Model) -> None:
    """Raise UsageError for a setting that the model does not know, of another type, or with which no call can end."""
    known = _known_settings(model)
    for setting, value in settings.items():
        if setting not in known:
            for problem in not_kept({"extra_body": {setting: value}}):
                raise UsageError(problem)
            hint = _hint(model, setting, value, known)
            hint = f"; {hint}" if hint else ""
            raise UsageError(f"expected a setting that model {name!r} knows, got: {setting!r}{hint}")
        _check_value(setting, value, known[setting])
    timeout = settings.get("timeout")
    if isinstance(timeout, int | float) and not timeout > 0:
        raise UsageError(f"expected the setting timeout to be seconds above 0, got: {timeout!r}")


def _hint(model: Model, setting: str, value: Json, known: Iterable[str] = ()) -> str:
    """Return what to do instead of a setting that a model is not sent; empty if it can only be left out."""
    if setting in _OF_TOOLS | _UNUSED | {"cache"}:
        return ""
    if setting == "thinking":
        body = _in_body(model, {"chat_template_kwargs": {"enable_thinking": bool(value)}})
        return body and f"use openai_reasoning_effort, or what the server knows, for example {body}"
    prefixed = [one for one in sorted(known) if one.partition("_")[2] == setting]
    elsewhere = _NAMES_ELSEWHERE.get(setting)
    close = difflib.get_close_matches(setting, known, n=1, cutoff=0.81)
    for meant in ([elsewhere] if elsewhere else []) + prefixed + close:
        return f"did you mean {meant!r}?"
    body = _in_body(model, {setting: value})
    return body and f"send it with {body} if the server takes it"


def _in_body(model: Model, fields: dict[str, Json]) -> str:
    """Return the flag that puts fields into the body of chat completions; empty for models with another API."""
    from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415

    flag = f"extra_body={json.dumps(fields, ensure_ascii=False)}"
    return f"--set {shlex.quote(flag)}" if isinstance(model, OpenAIChatModel) else ""


def unsent(name: str, settings: Mapping[str, Json], schema: dict[str, Json] | None = None) -> list[str]:
    """Return a message for each setting that the model knows, but that is not sent to it.

    By what pydantic-ai says of the model's class and its profile. Empty for the few models that cannot be asked here.
    """
    model = _keyless_model(name)
    if model is None:
        return []
    problems = []
    for setting, value in settings.items():
        if not _is_sent(model, setting, settings, schema):
            hint = _hint(model, setting, value) or "leave it out"
            problems.append(f"the setting {setting} is not sent to model {name!r}; {hint}")
    return problems


def _is_sent(
    model: Model, setting: str, settings: Mapping[str, Json], schema: dict[str, Json] | None
) -> bool:
    profile: Mapping[str, Any] = model.profile
    if setting in model.unsupported_settings or setting in profile.get(
        "openai_unsupported_model_settings", ()
    ):
        return False
    if setting in _OF_TOOLS:  # the only tool is the answer
        return schema is not None and output_mode(model.profile) == "tool"
    if setting in _UNUSED or _is_foreign(model, setting, settings[setting]):
        return False
    if setting == "cache":
        return bool(profile.get("supports_cache"))
    if setting == "thinking":
        return bool(profile.get("supports_thinking") or profile.get("thinking_always_enabled"))
    if profile.get("anthropic_disallows_sampling_settings") and setting in _SAMPLING | {"top_k"}:
        return False
    return setting not in _SAMPLING or not _reasons(profile, settings)


def _is_foreign(model: Model, setting: str, value: Json) -> bool:
    """Return whether a model's API has no field for a setting that pydantic-ai declares for it."""
    from pydantic_ai.models.openai import OpenAIResponsesModel  # noqa: PLC0415

    if setting == "service_tier" and model.system == "anthropic":
        return value not in {"auto", "default"}
    return setting == "openai_prediction" and isinstance(model, OpenAIResponsesModel)


def _reasons(profile: Mapping[str, Any], settings: Mapping[str, Json]) -> bool:
    """Return whether one of OpenAI's models reasons under these settings: it takes no sampling settings then."""
    if not profile.get("openai_supports_reasoning"):
        return False
    efforts = profile.get("openai_reasoning_efforts")
    stops = profile.get("openai_supports_reasoning_effort_none") if efforts is None else "none" in efforts
    effort, thinking = settings.get("openai_reasoning_effort"), settings.get("thinking")
    if effort is not None:
        return not stops or effort != "none"
    if thinking is not None:
        return not stops or thinking is not False or bool(profile.get("thinking_always_enabled"))
    return not stops or bool(profile.get("thinking_enabled_by_default"))


def output_mode(profile: ModelProfile) -> OutputMode:
    """Choose how to ask for JSON: by the provider's own schema support, else as a tool call, else in words."""
    if profile.get("supports_json_schema_output", False):
        return "native"
    return "tool" if profile.get("supports_tools", True) else "prompted"


def _known_settings(model: Model) -> dict[str, Any]:
    """Return the names of a model's settings with their types; they are declared beside its class and its bases."""
    from typing import get_type_hints  # noqa: PLC0415

    known: dict[str, Any] = {}
    for base in type(model).__mro__:
        for name, found in vars(sys.modules[base.__module__]).items():
            if name.endswith("ModelSettings") and hasattr(found, "__optional_keys__"):
                known |= dict.fromkeys(found.__optional_keys__ | found.__required_keys__, Any)
                try:
                    known |= get_type_hints(found)
                except NameError:  # a type that is imported for type checkers only: the names will do
                    continue
    return known


def _check_value(setting: str, value: Json, type_: Any) -> None:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError  # noqa: PLC0415

    try:
        TypeAdapter(type_, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
            value, strict=True
        )
    except PydanticUserError:  # a type that pydantic cannot check: the provider will
        return
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise UsageError(
            f"expected another value of the setting {setting}, got: {value!r}; {problem}"
        ) from error
