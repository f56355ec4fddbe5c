"""From what a caller named to the task that is stored, and to what this process may use to serve it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lbr.core.config import default_model
from lbr.core.errors import UsageError
from lbr.core.schema import import_type, schema_of
from lbr.core.types import Task, canonical_json
from lbr.io.records import not_finite
from lbr.models.base import OPENROUTER, Kind, kind_of, model_string
from lbr.models.build import Authority, build_model, build_validator, check_task, unsent
from lbr.models.environment import check_environment
from lbr.models.identity import has_changed, name_function, own_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lbr.core.schema import Validator
    from lbr.core.types import Json
    from lbr.models.identity import Identity, NamedFunction

WAYS = (
    "a function (--function), a model (--model), MODEL and OPENROUTER_API_KEY in the environment or .env, or, to try "
    "it out, the model offline:echo"
)

MODEL_WAYS = "a model (--model), such as offline:echo, or MODEL in the environment or .env"
"""Of these two, for what is of models only."""


@dataclass(frozen=True, slots=True)
class ResolvedTask:
    """A task, the code fingerprint of its function (None for a model), and the right to serve it here.

    `refusal` says why a new run must not have the task, None if it may: a setting of it would do nothing.
    """

    task: Task
    fingerprint: str | None
    authority: Authority
    refusal: str | None = None


def ask(
    *,
    model: str | None = None,
    function: Callable[..., Any] | str | None = None,
    version: str | None = None,
    instructions: str | None = None,
    template: str | None = None,
    settings: Mapping[str, Json] | None = None,
    schema: dict[str, Json] | None = None,
    result_type: Any = None,
    openrouter_api_key: str | None = None,
    env: Mapping[str, str] | None = None,
) -> ResolvedTask:
    """Build the task that these arguments ask for.

    `env` is asked for MODEL where neither `model` nor `function` is given. Raises UsageError where nobody is
    named, or more than one, or where no worker could ever serve the task.
    """
    if model is not None and function is not None:
        raise UsageError("expected a model or a function, got: both")
    if version is not None and function is None:
        raise UsageError(f"expected a version beside a function, got: {version} without one")
    if isinstance(result_type, str):
        result_type = import_type(result_type)
    shared = _shared(instructions, template, settings, schema, result_type)
    named = None
    if function is not None:
        named = _asked_function(function, version)
        task = _function_task(named.identity, shared)
    else:
        env = env or {}
        openrouter_api_key = openrouter_api_key or env.get("OPENROUTER_API_KEY") or None
        task = Task(model=_model(model, openrouter_api_key, env), **shared)
    _check_storable(task)
    check_task(task)
    if kind_of(task) is Kind.PROVIDER:
        check_environment(task.model or "", openrouter_api_key)
    types = [result_type] if result_type is not None else []
    authority = authorize(result_types=types, openrouter_api_key=openrouter_api_key)
    if named is None:
        return ResolvedTask(task, None, authority, next(iter(unsent(task)), None))
    return ResolvedTask(task, named.identity.fingerprint, replace(authority, functions=(named,)))


def _shared(
    instructions: str | None,
    template: str | None,
    settings: Mapping[str, Json] | None,
    schema: dict[str, Json] | None,
    result_type: Any,
) -> dict[str, Any]:
    """Return the fields that every task has; UsageError for two schemas."""
    if schema is not None and result_type is not None:
        raise UsageError("expected a schema or a result type, got: both")
    return {
        "instructions": instructions or None,
        "template": template,
        "settings": dict(settings or {}),
        "schema": schema if result_type is None else schema_of(result_type),
    }


def model_task(
    model: str | None,
    *,
    instructions: str | None = None,
    template: str | None = None,
    settings: Mapping[str, Json] | None = None,
    schema: dict[str, Json] | None = None,
    result_type: Any = None,
    env: Mapping[str, str] | None = None,
) -> Task:
    """Build the task of a model, or of MODEL in `env`, for somebody who will not call it.

    Neither a key nor the provider's package is needed, so its settings are not checked against the model's.
    Raises UsageError for what is wrong without asking them.
    """
    if isinstance(result_type, str):
        result_type = import_type(result_type)
    shared = _shared(instructions, template, settings, schema, result_type)
    task = Task(model=_named_model(model, env or {}, ways=MODEL_WAYS), **shared)
    _check_storable(task)
    if kind_of(task) is Kind.OFFLINE:
        check_task(task)
    elif task.schema is not None:
        build_validator(task, Authority())
    return task


def _check_storable(task: Task) -> None:
    """Raise UsageError for what Python can say and JSON cannot: half characters, huge numbers, deep nesting."""
    try:
        task.to_json()
    except (TypeError, RecursionError) as error:
        raise UsageError(
            f"expected instructions, template, settings and schema that JSON can hold, got: {error}"
        ) from error
    for name, value in not_finite({"settings": task.settings}):
        raise UsageError(f"expected {name} to be a JSON value, got: {value}; leave it out, or name a number")


def check_settings(task: Task, settings: Mapping[str, Json]) -> None:
    """Raise UsageError where no job of the task could have these settings over the task's."""
    wanted = replace(task, settings={**task.settings, **settings})
    _check_storable(wanted)
    check_task(wanted)
    known = unsent(task)
    for problem in unsent(wanted):
        if problem not in known:
            raise UsageError(problem)


def checker(run: str, task: Task, result_types: Iterable[Any] = ()) -> Validator:
    """Build what checks the answers of a run, by the class of its schema where that is among `result_types`.

    UsageError for a run without a schema, and for a class whose schema is another.
    """
    authority = authorize(result_types=result_types)
    validator = build_validator(task, authority)
    if validator is None:
        raise UsageError(
            f"expected a run with an output schema, got: run {run!r}, whose answers are free text"
        )
    strangers = authority.result_types.keys() - {canonical_json(task.schema).decode()}
    if strangers:
        names = ", ".join(sorted(_name_of(authority.result_types[schema]) for schema in strangers))
        raise UsageError(
            f"expected a result type with the schema that run {run!r} was enqueued with, got: {names}, whose schema is "
            f"another; mend its validators and leave its fields, or enqueue again under another --run"
        )
    return validator


def _name_of(result_type: Any) -> str:
    return str(getattr(result_type, "__qualname__", result_type))


async def check_servable(asked: ResolvedTask) -> None:
    """Raise UsageError where this process could not serve the task, for want of a key or a package."""
    await build_model(asked.task, asked.authority, concurrency=1).aclose()


def _asked_function(function: Callable[..., Any] | str, version: str | None) -> NamedFunction:
    """Find and identify the function that answers; UsageError if other functions may have the same identity."""
    named = name_function(function, version=version)
    own = own_version(named.call)
    if version is not None and own not in {None, version}:
        raise UsageError(
            f"expected the version that the function itself declares ({own}), got: {version}; change it there, "
            f"because workers go by it"
        )
    identity = named.identity
    if identity.is_ambiguous:
        raise UsageError(
            f"{identity.name} depends on an object of the class {identity.opaque}, and lbr cannot compare such objects "
            f"between runs. Pass `version=`, a different one for each object that gives other answers, or keep what "
            f"decides the answers in a dataclass"
        )
    return named


def _function_task(identity: Identity, shared: dict[str, Any]) -> Task:
    if shared["instructions"] is not None:
        raise UsageError("expected no instructions beside a function, got some; instructions are for models")
    return Task(
        function=identity.name,
        version=identity.version,
        fingerprint=identity.fingerprint if identity.anonymous else None,
        **shared,
    )


def _named_model(name: str | None, env: Mapping[str, str], *, ways: str = WAYS) -> str:
    name = name or default_model(env)
    if name is None:
        raise UsageError(f"expected somebody to answer, got: nobody; name one of {ways}")
    return model_string(name)


def _model(name: str | None, key: str | None, env: Mapping[str, str]) -> str:
    model = _named_model(name, env)
    if model.startswith(OPENROUTER) and not key:
        raise UsageError(
            f"expected a key for {model}, got: none; set OPENROUTER_API_KEY in the environment or .env, "
            f"or name another: {WAYS}"
        )
    return model


def authorize(
    functions: Iterable[Callable[..., Any] | str] = (),
    result_types: Iterable[Any] = (),
    *,
    openrouter_api_key: str | None = None,
    runs_are_named: bool = True,
) -> Authority:
    """Return what this process may use: exactly what its caller named, by object or by `pkg.mod:name`.

    If the caller named the runs as well, its word counts for functions that hold an object known by its class only.
    """
    types = [import_type(one) if isinstance(one, str) else one for one in result_types]
    return Authority(
        functions=_distinct(name_function(function) for function in functions),
        result_types={canonical_json(schema_of(one)).decode(): one for one in types},
        openrouter_api_key=openrouter_api_key,
        runs_are_named=runs_are_named,
    )


def _distinct(functions: Iterable[NamedFunction]) -> tuple[NamedFunction, ...]:
    """Return functions, each once; UsageError for two with the same identity that may be different ones."""
    found: list[NamedFunction] = []
    for one in functions:
        alike = [other for other in found if other.identity == one.identity]
        # Each access to a method creates a new object, equal to the others.
        if any(other.call != one.call for other in alike) and one.identity.is_ambiguous:
            raise UsageError(
                f"{one.identity.name} is given twice, with different objects of the class {one.identity.opaque}, which "
                f"lbr cannot tell apart. Name the functions like pkg.module:function, or serve the runs of each in a call "
                f"of its own"
            )
        if not alike:
            found.append(one)
    return tuple(found)


def changed_by_use(authority: Authority) -> list[str]:
    """Return a warning for each function that became a different one during the run: everything will be asked again."""
    return [
        f"{one.identity.name} has become another function while it was called, because a value in it changed: another "
        f"call of this program asks everything again. Keep what changes in a global, or in a dataclass as "
        f"field(compare=False)"
        for one in authority.functions
        if has_changed(one)
    ]
