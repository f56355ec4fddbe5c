"""The task that a caller's arguments describe, and what this process may use to serve tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lbr.core.config import one_of, some_of
from lbr.core.errors import InputError, UsageError
from lbr.core.extras import Extra
from lbr.core.pricing import max_output_tokens
from lbr.core.schema import import_type, schema_of
from lbr.core.tiers import TIERS, check_tier
from lbr.core.types import Task, canonical_json
from lbr.io.records import not_finite, shown
from lbr.models import chat
from lbr.models.base import OPENROUTER, Kind, kind_of, model_string
from lbr.models.build import Authority, build_model, build_validator, check_keep, check_task, unsent
from lbr.models.checks import check_authority, check_environment, not_kept
from lbr.models.identity import has_changed, name_function, own_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lbr.core.schema import Validator
    from lbr.core.types import Item, Json
    from lbr.io.sources import Source
    from lbr.models.identity import Identity, NamedFunction

USE_MODEL = "Use --model (e.g. openai-chat:gpt-4o-mini)"
OPENAI = "openai-chat:"
"""The provider of the models that lines of OpenAI's batch input name."""
WITHOUT_KEY = "Without a key: --model offline:echo"
WAYS = f"{USE_MODEL} or --function, or set MODEL and OPENROUTER_API_KEY in the environment or .env. {WITHOUT_KEY}"


@dataclass(frozen=True, slots=True)
class ResolvedTask:
    """A task, its function's code fingerprint, None for a model, the right to serve it here, and what to keep of it."""

    task: Task
    fingerprint: str | None
    authority: Authority
    keep: tuple[Extra, ...] = ()


def resolve_task(
    *,
    source: Source | None = None,
    model: str | None = None,
    function: Callable[..., Any] | str | None = None,
    version: str | None = None,
    result_type: Any = None,
    openrouter_api_key: str | None = None,
    keep: str | Sequence[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
    **fields: Any,
) -> ResolvedTask:
    """Build the task of a model, of a function, or of MODEL in `env`; for `fields` see `_common_fields`.

    The inputs of `source` may name a model as well, and have settings of their own, which are fitted to the task.

    Raises UsageError without a model, with two, or if no worker could ever serve the task.
    """
    if model is not None and function is not None:
        raise UsageError("expected a model or a function, got: both")
    if version is not None and function is None:
        raise UsageError(f"expected a version beside a function, got: {version} without one")
    common = _common_fields(result_type, **fields)
    key = openrouter_api_key or env.get("OPENROUTER_API_KEY") or None
    types = [] if result_type is None else [result_type]
    authority = authorize(result_types=types, openrouter_api_key=key)
    named, of_lines = None if function is None else _find_function(function, version), None
    if named is None:
        of_lines = _model_of_lines(model, env, source)
        name = _model_name(model or of_lines, env, WAYS)
        if name.startswith(OPENROUTER) and not key:
            use = "set OPENROUTER_API_KEY in the environment or .env, or use a different model"
            raise UsageError(f"no key for {name}: {use}. {WITHOUT_KEY}")
        task = Task(model=name, **common)
    else:
        task = _function_task(named, common)
        authority = replace(authority, functions=(named,))
    kept = tuple(map(Extra, some_of("--keep", keep, tuple(Extra))))
    check_tier(task)
    _check_storable(task)
    check_task(task)
    check_keep(task, kept)
    for problem in unsent(task, kept):
        raise UsageError(problem)
    if kind_of(task) is Kind.PROVIDER:
        check_environment(task.model or "", key)
    if source is not None:
        source.fit = _Fitter(task, of_lines, source.notices, kept).fit
    return ResolvedTask(task, None if named is None else named.identity.fingerprint, authority, kept)


def model_task(
    model: str | None, source: Source, *, env: Mapping[str, str], result_type: Any = None, **fields: Any
) -> Task:
    """Build the task of a model, of MODEL in `env`, or of the inputs, that will not be called.

    It needs no key and no package of the provider, so settings are not checked against the model's.
    """
    of_lines = _model_of_lines(model, env, source)
    name = _model_name(model or of_lines, env, f"{USE_MODEL}, or set MODEL in the environment or .env")
    task = Task(model=name, **_common_fields(result_type, **fields))
    check_tier(task)
    _check_storable(task)
    if kind_of(task) is Kind.OFFLINE:
        check_task(task)
    elif task.schema is not None:
        build_validator(task, Authority())
    source.fit = _Fitter(task, of_lines, source.notices).fit
    return task


def _common_fields(
    result_type: Any,
    *,
    instructions: str | None = None,
    template: str | None = None,
    settings: Mapping[str, Json] | None = None,
    schema: dict[str, Json] | None = None,
    tier: str | None = None,
) -> dict[str, Any]:
    """Return the fields that every task has; UsageError for two schemas."""
    if schema is not None and result_type is not None:
        raise UsageError("expected a schema or a result type, got: both")
    if result_type is not None:
        schema = schema_of(_imported(result_type))
    tier = None if tier is None else one_of("--tier", tier, TIERS)
    given = {"settings": dict(settings or {}), "schema": schema, "tier": tier}
    return {"instructions": instructions or None, "template": template, **given}


def _imported(result_type: Any) -> Any:
    return import_type(result_type) if isinstance(result_type, str) else result_type


def _model_name(model: str | None, env: Mapping[str, str], ways: str) -> str:
    name = model or env.get("MODEL", "").strip()
    if not name:
        raise UsageError(f"no model given. {ways}")
    return model_string(name)


def _model_of_lines(model: str | None, env: Mapping[str, str], source: Source | None) -> str | None:
    """Return the model that the first input names; None if it names none, or if another was chosen."""
    found = None if model or env.get("MODEL", "").strip() or source is None else source.first_model()
    return None if found is None else OPENAI + found


def _find_function(function: Callable[..., Any] | str, version: str | None) -> NamedFunction:
    """Find and identify a function; UsageError if other functions may have the same identity."""
    named = name_function(function, version=version)
    own = own_version(named.call)
    if version is not None and own not in {None, version}:
        raise UsageError(
            f"expected the version that the function itself declares ({own}), got: {version}; change it there, because "
            f"workers use that one"
        )
    if named.identity.is_ambiguous:
        raise UsageError(
            f"{named.identity.name} depends on an object of the class {named.identity.opaque}, and lbr cannot compare such "
            f"objects between runs. Pass `version=`, a different one for each object that gives other answers, or keep "
            f"what decides the answers in a dataclass"
        )
    return named


def _function_task(named: NamedFunction, common: dict[str, Any]) -> Task:
    if common["instructions"] is not None:
        raise UsageError("expected no instructions beside a function, got some; instructions are for models")
    identity = named.identity
    fingerprint = identity.fingerprint if identity.anonymous else None
    return Task(function=identity.name, version=identity.version, fingerprint=fingerprint, **common)


def _check_storable(task: Task) -> None:
    """Raise UsageError for what JSON cannot hold: lone surrogates, huge numbers, deep nesting."""
    try:
        task.to_json()
    except (TypeError, RecursionError) as error:
        raise UsageError(
            f"expected instructions, template, settings and schema that JSON can hold, got: {error}"
        ) from error
    for name, value in not_finite({"settings": task.settings}):
        raise UsageError(f"expected {name} to be a JSON value, got: {value}; leave it out, or use a number")


def check_settings(
    task: Task, settings: Mapping[str, Json], keep: tuple[Extra, ...] = (), model: str | None = None
) -> None:
    """Raise UsageError if no job of a run with this task that keeps these extras could have these settings too.

    `model` is the job's own, None for the task's.
    """
    if model is not None and task.function is not None:
        raise UsageError(f"--model is for runs of a model, and {task.answerer} answers this one; omit it")
    if "model" in settings:
        raise UsageError("the setting model cannot be set; use --model")
    wanted = replace(task, model=model or task.model, settings={**task.settings, **settings})
    _check_storable(wanted)
    check_task(wanted)
    check_keep(wanted, keep)
    known = unsent(task, keep) if model is None else []
    for problem in unsent(wanted, keep):
        if problem not in known:
            raise UsageError(problem)


def answer_validator(run: str, task: Task, result_types: Iterable[Any] = ()) -> Validator:
    """Build what checks a run's answers, with the class of its schema if that is among `result_types`.

    Raises UsageError for a run without a schema, and for a class with a different schema.
    """
    authority = authorize(result_types=result_types)
    validator = build_validator(task, authority)
    if validator is None:
        raise UsageError(f"expected a run with an output schema, got: run {run!r}, whose answers are free text")
    others = authority.result_types.keys() - {canonical_json(task.schema).decode()}
    if others:
        classes = [authority.result_types[schema] for schema in others]
        names = ", ".join(sorted(str(getattr(one, "__qualname__", one)) for one in classes))
        raise UsageError(
            f"expected a result type with the schema that run {run!r} was enqueued with, got: {names}, with a different "
            f"one; change only its validators, not its fields, or enqueue again with another --run"
        )
    return validator


async def check_servable(resolved: ResolvedTask) -> None:
    """Raise UsageError if this process could not serve the task, because a key or a package is missing."""
    await build_model(resolved.task, resolved.authority, concurrency=1).aclose()


def authorize(
    functions: Iterable[Callable[..., Any] | str] = (),
    result_types: Iterable[Any] = (),
    *,
    openrouter_api_key: str | None = None,
    runs_are_named: bool = True,
) -> Authority:
    """Return what this process may use: only what its caller named, as an object or as `pkg.mod:name`.

    `runs_are_named`: whether the caller named the runs as well, which allows functions with an opaque object.
    """
    types = map(_imported, result_types)
    return Authority(
        functions=_distinct(name_function(function) for function in functions),
        result_types={canonical_json(schema_of(one)).decode(): one for one in types},
        openrouter_api_key=openrouter_api_key,
        runs_are_named=runs_are_named,
    )


def _distinct(functions: Iterable[NamedFunction]) -> tuple[NamedFunction, ...]:
    """Return each function once; UsageError for two with the same identity that may differ."""
    found: dict[Identity, NamedFunction] = {}
    for one in functions:
        known = found.setdefault(one.identity, one)
        # Each access to a method creates a new object, equal to the others.
        if known.call != one.call and one.identity.is_ambiguous:
            raise UsageError(
                f"{one.identity.name} is given twice, with different objects of the class {one.identity.opaque}, which lbr "
                f"cannot tell apart. Name the functions like pkg.module:function, or serve the runs of each in a separate call"
            )
    return tuple(found.values())


def change_warnings(authority: Authority) -> list[str]:
    """Return a warning for each function whose code or values changed during the run."""
    return [
        f"{one.identity.name} has become another function while it was called, because a value in it changed: another "
        f"call of this program asks everything again. Keep what changes in a global, or in a dataclass as "
        f"field(compare=False)"
        for one in authority.functions
        if has_changed(one)
    ]


class _Fitter:
    """Fits the settings that inputs bring, as lines of OpenAI's batch input do, to a task.

    `of_lines` is the model that they all must name; None if the caller chose another one. `keep` is what the run keeps;
    None to leave the settings unchecked.
    """

    def __init__(
        self, task: Task, of_lines: str | None, notices: list[str], keep: tuple[Extra, ...] | None = None
    ) -> None:
        self._task, self._of_lines, self._notices, self._keep = task, of_lines, notices, keep
        self._checked: set[frozenset[tuple[str, type]]] = set()

    def fit(self, item: Item) -> Item:
        """Return an item with those of its settings that differ from the task's. Raises InputError for a bad one."""
        settings, model = dict(item.prompt.settings or {}), self._task.model or ""
        try:
            self._check_model(settings.pop("model", None), model)
            if self._task.function is None:
                settings = self._own(chat.as_sent(model, settings))
            elif settings:
                self._note("a function takes no settings, so those of the inputs are not used")
                settings = {}
        except UsageError as error:
            raise InputError(str(error), source=item.source, line=item.line) from error
        return replace(item, prompt=replace(item.prompt, settings=settings or None))

    def _note(self, notice: str) -> None:
        if notice not in self._notices:
            self._notices.append(notice)

    def _check_model(self, named: str | None, model: str) -> None:
        bare = model.partition(":")[2]
        if named in {None, model, bare, bare.rpartition("/")[2]}:
            return
        if self._of_lines is not None:
            raise UsageError(
                f"the line names the model {shown(named)}, the first one {shown(bare)}; choose one for all lines with "
                f"--model, or put the lines of each model into a run of its own"
            )
        self._note(f"the inputs name a model of their own, but {self._task.answerer} answers them")

    def _own(self, settings: dict[str, Json]) -> dict[str, Json]:
        shared = self._task.settings
        if "extra_body" in settings:
            settings["extra_body"] = {**shared.get("extra_body", {}), **settings["extra_body"]}
        own = {name: value for name, value in settings.items() if name not in shared or shared[name] != value}
        if self._keep is not None and kind_of(self._task) is Kind.PROVIDER:
            self._check_sent(own, self._keep)
        return own

    def _check_sent(self, own: dict[str, Json], keep: tuple[Extra, ...]) -> None:
        check_authority(own)
        for problem in not_kept(own, keep):
            raise UsageError(problem)
        max_output_tokens(own)
        if self._task.schema is not None and "response_format" in own.get("extra_body", {}):
            raise UsageError("the line has a response_format, and the run a schema; remove one of them")
        if chat.sends(self._task.model or "", {name: value for name, value in own.items() if name != "extra_body"}):
            return
        kinds = frozenset((name, type(value)) for name, value in own.items())
        if kinds not in self._checked:  # it takes long, so only once for settings of the same names
            check_settings(self._task, own, keep)
            self._checked.add(kinds)
