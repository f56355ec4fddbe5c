"""From a task to its model, with what this process may use.

A database gives no authority: a function is called only if the user of this process named it, and keys come only from
its own flags and environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbr.core.errors import UsageError
from lbr.core.extras import Extra
from lbr.core.pricing import max_output_tokens
from lbr.core.tiers import sent_settings
from lbr.core.types import canonical_json
from lbr.models import chat, checks, offline
from lbr.models.base import Kind, kind_of
from lbr.models.function import FunctionModel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import ModuleType

    from lbr.core.schema import Validator
    from lbr.core.types import Task
    from lbr.models.base import Model
    from lbr.models.http import Connections
    from lbr.models.identity import Identity, NamedFunction
    from lbr.models.pydantic_ai import PydanticAIModel


@dataclass(frozen=True)
class Authority:
    """What this process may use.

    `result_types` are by the canonical JSON of their schema. The OpenRouter key overrides the environment's.
    `runs_are_named`: the user named the runs to serve, and thereby vouches for their functions.
    """

    functions: tuple[NamedFunction, ...] = ()
    result_types: Mapping[str, type] = field(default_factory=dict)
    openrouter_api_key: str | None = field(default=None, repr=False)
    runs_are_named: bool = True

    def function_for(self, task: Task) -> NamedFunction | None:
        """Return the function that a task asks for, else another one with its name; None if there is none."""
        found = [one for one in self.functions if one.identity.name == task.function]
        found.sort(
            key=lambda one: (self.mismatch(task, one.identity) is not None, one.identity.version != task.version)
        )
        return found[0] if found else None

    def mismatch(self, task: Task, identity: Identity) -> str | None:
        """Return how a function differs from the one that a task asks for; None if it does not.

        A function without a version fits any, because the version may have been given to the enqueue only, unless other
        functions may have the same identity.
        """
        asked = "no version" if task.version is None else f"version {task.version}"
        if identity.version is not None and identity.version != task.version:
            return (
                f"{asked}, but here it has version {identity.version}; serve it with the code it was enqueued with, or "
                f"enqueue again"
            )
        if task.fingerprint is not None and task.fingerprint != identity.fingerprint:
            return (
                f"fingerprint {task.fingerprint}, but here it has {identity.fingerprint}: its code or a value that it "
                f"holds has changed, or an earlier lbr or another Python enqueued it; enqueue again"
            )
        if task.version is not None and identity.is_ambiguous and not self.runs_are_named:
            return (
                f"{asked}, but here it has none, and lbr knows the {identity.opaque} in it only by its class; name "
                f"the function's runs with run=…"
            )
        return None


def check_task(task: Task) -> None:
    """Raise UsageError for a task that no worker could serve; needs neither a key nor a network."""
    if task.schema is not None:
        build_validator(task, Authority())
    name, settings = task.model or "", sent_settings(task)
    match kind_of(task):
        case Kind.FUNCTION if task.settings:
            names = ", ".join(sorted(task.settings))
            raise UsageError(f"settings are for models, and a function takes none; remove {names}")
        case Kind.OFFLINE:
            offline.OfflineModel(name, task.settings)
        case Kind.PROVIDER:
            if task.schema is not None:
                checks.check_schema(task.schema)
            if not chat.sends(name, settings):
                _pydantic_ai(name).check_model(name, settings)
            max_output_tokens(settings)  # raises for what no worker can read


def check_keep(task: Task, keep: Collection[str]) -> None:
    """Raise UsageError if calls of a task cannot return what is to be kept besides the answer."""
    if keep and kind_of(task) is Kind.FUNCTION:
        raise UsageError("--keep is for models, and a function returns only its answer; leave it out")
    name = task.model or ""
    if Extra.LOGPROBS not in keep or kind_of(task) is not Kind.PROVIDER or chat.sends_logprobs(name):
        return
    if not _pydantic_ai(name).sends_logprobs(name, task.settings, task.schema):
        raise UsageError(f"model {name!r} cannot be asked for log probabilities; leave logprobs out of --keep")


def unsent(task: Task, keep: Collection[str] = ()) -> list[str]:
    """Return a message for each setting that would not be sent, or whose result would not be kept, which `keep` names.

    The enqueue refuses such settings; workers go on with a run of an older version that has them.
    """
    name, settings = task.model or "", sent_settings(task)
    if kind_of(task) is not Kind.PROVIDER or chat.sends(name, settings):
        return []
    return checks.not_kept(settings, keep) or [*_pydantic_ai(name).unsent(name, settings, task.schema)]


def build_model(task: Task, authority: Authority, *, concurrency: int, connections: Connections | None = None) -> Model:
    """Build the model of a task. Raises UsageError, with what to do, if this process may not or cannot.

    Calls to a provider use `connections`, None for some of its own. Models may share them, and are closed together.
    """
    match kind_of(task):
        case Kind.FUNCTION:
            return FunctionModel(_allowed_function(task, authority), concurrency=concurrency)
        case Kind.OFFLINE:
            return offline.OfflineModel(task.model or "", task.settings)
        case Kind.PROVIDER:
            return _provider_model(task, authority, connections)


def _pydantic_ai(name: str) -> ModuleType:
    """Import pydantic-ai's adapter, which takes seconds; UsageError if it, or what it needs, cannot be imported."""
    try:
        from lbr.models import pydantic_ai  # noqa: PLC0415
    except Exception as error:
        raise UsageError(
            f"cannot use model {name!r}: importing pydantic-ai failed with {type(error).__name__}: {error}; reinstall it"
        ) from error
    return pydantic_ai


def _provider_model(task: Task, authority: Authority, connections: Connections | None) -> Model:
    """Build the chat adapter if it can serve the task, else pydantic-ai's."""
    key, name, settings = authority.openrouter_api_key, task.model or "", sent_settings(task)
    checks.check_authority(settings)  # again: a program other than lbr may have written the database
    checks.check_environment(name, key)
    checks.check_trust()

    def build_other() -> PydanticAIModel:
        adapter = _pydantic_ai(name).PydanticAIModel
        model: PydanticAIModel = adapter(name, task_settings=settings, api_key=key, connections=connections)
        return model

    endpoint = chat.endpoint_of(name, key)
    if endpoint is None or chat.fields_of(endpoint, settings) is None:
        return build_other()
    response_format = None
    if task.schema is not None:
        other = build_other()
        response_format = other.response_format(task.schema)
        if response_format is None:
            return other
    return chat.ChatModel(
        endpoint,
        task_settings=settings,
        build_other=build_other,
        response_format=response_format,
        api_key=key,
        connections=connections,
    )


def build_validator(task: Task, authority: Authority) -> Validator | None:
    """Build the validator of the task's answers; None for free text."""
    if task.schema is None:
        return None
    from lbr.core.schema import Validator  # noqa: PLC0415

    return Validator(task.schema, authority.result_types.get(canonical_json(task.schema).decode()))


def _allowed_function(task: Task, authority: Authority) -> Callable[..., Any]:
    name = task.function or ""
    named = authority.function_for(task)
    if named is None:
        fix = f"start the worker with --function {name}"
        if task.fingerprint is not None:
            fix = "only the program that defines it can serve it: start that again"
        raise UsageError(f"the run asks for function {name}; {fix}")
    mismatch = authority.mismatch(task, named.identity)
    if mismatch is not None:
        raise UsageError(f"the run asks for function {name} with {mismatch}")
    return named.call
