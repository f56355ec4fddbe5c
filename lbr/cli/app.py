"""The command group: where settings come from, and how errors become exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson

from lbr.cli import completion
from lbr.cli.examples import SECTIONS
from lbr.core.config import load_environment
from lbr.core.errors import DatabaseError, LbrError, MisfitError, OutputError, StoppedError, UsageError
from lbr.core.text import harmless, parse_json

F = TypeVar("F", bound=Callable[..., Any])

CONFIG_VARIABLE, CONFIG_FILE, TEST_PREFIX = "LBR_CONFIG", "lbr.toml", "LBR_TEST_"
EXIT_UNFINISHED, EXIT_FAILURES = 3, 4
YOUNG_OBJECTS = 20_000
"""New objects after which the garbage collector looks for cycles.

A batch makes many values without cycles that live as long as a call: looking every few hundred of them takes a fifth
of a worker's time.
"""


class Group(click.Group):
    """Reads `.env` and the config file before the flags, and is the one place where errors become exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; an `LbrError` ends the process with its message and its exit code."""
        try:
            load_environment(Path.cwd())
            given = (*sys.argv, *(value for name, value in os.environ.items() if name.startswith("LBR_")))
            if bad := [text for text in given if text != text.encode(errors="replace").decode()]:
                raise UsageError(f"expected flags, names and file names in UTF-8, got: {bad[0]!r}; set LC_ALL=C.UTF-8")
            extra.setdefault("default_map", _read_config(self))
            return super().main(*args, **extra)
        except LbrError as error:
            if completion.VARIABLE in os.environ:
                sys.exit(error.exit_code)
            log(error.in_flags or str(error), error=True)
            try:
                sys.stdout.flush()
            except (AttributeError, OSError, ValueError):  # it is closed or full, and Python would flush it again
                sys.stdout = None
            sys.exit(error.exit_code)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in their sections, a line for each."""
        width = max(len(name) for names in SECTIONS.values() for name in names)
        for title, names in SECTIONS.items():
            with formatter.section(title):
                helps = [self.commands[name].get_short_help_str(formatter.width) for name in names]
                formatter.write_dl([(name.ljust(width), text) for name, text in zip(names, helps, strict=True)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; DatabaseError instead of a traceback if an invalid value in the database made it fail.

        Raises StoppedError for a Ctrl-C that the command does not handle itself.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("interrupted") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MisfitError) as error:
            from lbr.store.health import misfit  # noqa: PLC0415 - only after a failure

            if ctx.obj is None or (found := misfit(ctx.obj["db_url"])) is None:
                raise
            raise DatabaseError(
                f"{found}; the database was changed by another program: restore a copy, or fix that value"
            ) from error


def options(*given: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds flags to a command, in this order."""

    def add(command: F) -> F:
        for option in reversed(given):
            command = option(command)
        return command

    return add


def _read_config(group: click.Group) -> dict[str, Any]:
    """Return the flags of the config file: the one that LBR_CONFIG names, else lbr.toml here, if there is one."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_FILE)
    if not named and not path.is_file():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"expected {path} to be TOML: {error}") from error
    return _flag_defaults(group, found, str(path))


def _flag_defaults(command: click.Command, found: Any, where: str) -> dict[str, Any]:
    """Convert the flags of a config file, which has one table per command, to the parameter names of click.

    Raises UsageError for an unknown flag, and for a value that a flag does not take.
    """
    if not isinstance(found, dict):
        raise UsageError(f"expected {where} to be a table of flags, got: {found!r}; write [{command.name}]")
    flags = {one.name: one for one in command.params if isinstance(one, click.Option)}
    commands = command.commands if isinstance(command, click.Group) else {}
    defaults: dict[str, Any] = {}
    for name, value in found.items():
        parameter = name.replace("-", "_")
        if name in commands:
            defaults[name] = _flag_defaults(commands[name], value, f"{name} in {where}")
        elif (option := flags.get(parameter)) is None:
            known = ", ".join(sorted(str(flag).replace("_", "-") for flag in flags))
            tables = ", ".join(f"[{one}]" for one, its in sorted(commands.items()) if not its.hidden)
            known += f", and the tables {tables}" * bool(tables)
            raise UsageError(f"expected a flag in {where}, got: {name!r}; there are: {known}")
        elif (type(value) is bool, type(value) is list) != (option.is_flag, option.multiple) or type(value) is dict:
            kind = "true or false" if option.is_flag else "a list" if option.multiple else "one value"
            raise UsageError(f"expected {name} in {where} to be {kind}, got: {value!r}")
        else:
            defaults[parameter] = value
    return defaults


def _report_unknown_variables(group: click.Group) -> None:
    """Warn of each LBR_ variable that resembles a flag's; others may belong to another program."""
    shown = {"": group} | {f"{name}_": one for name, one in group.commands.items() if not one.hidden}
    known = {f"{prefix}{one.name}".upper() for prefix, command in shown.items() for one in command.params}
    ours = (name for name in sorted(os.environ) if name.startswith("LBR_") and not name.startswith(TEST_PREFIX))
    for name in ours:
        if name != CONFIG_VARIABLE and name[4:] not in known:
            from difflib import get_close_matches  # noqa: PLC0415 - only if there is something to report

            for close in get_close_matches(name[4:], sorted(known), n=1, cutoff=0.8):
                log(f"the variable {name} is ignored because no flag has that name; did you mean LBR_{close}?")


@dataclass(slots=True)
class Talk:
    """How this process prints messages: all of them or only errors if `quiet`, more if `verbose`; as text, or as JSON."""

    quiet: bool = False
    verbose: bool = False
    log_format: str = "text"


talk = Talk()


def log(text: str, *, error: bool = False, **fields: Any) -> None:
    """Print a message on stderr, because stdout carries data only. If stderr is closed, work continues.

    `error` marks what is printed even with -q; `fields` are more numbers for a log in JSON.
    """
    if talk.quiet and not error:
        return
    line = f"lbr: {text}"
    if talk.log_format == "json":
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        message = text.encode(errors="replace").decode()
        line = orjson.dumps(
            {"time": when, "level": "error" if error else "info", "message": message, **fields}
        ).decode()
    with suppress(OSError, AttributeError):  # it is None if it was closed from the start
        sys.stderr.write(harmless(f"{line}\n"))  # not click, which would write into a progress bar
        sys.stderr.flush()


def echo(text: str) -> None:
    """Print text on stdout, harmless for a terminal. Raises OutputError; click handles a BrokenPipeError."""
    try:
        click.echo(harmless(text))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write stdout: {error.strerror}; make room") from error


def echo_json(value: Any) -> None:
    """Print a value as a line of JSON."""
    echo(orjson.dumps(value).decode())


@click.group(
    cls=Group,
    context_settings={
        "auto_envvar_prefix": "LBR",  # a parameter must have its flag's name, because variables are made of it
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.option(
    "--db",
    metavar="PATH_OR_URL",
    default="runs.db",
    show_envvar=True,
    shell_complete=completion.files,
    help="The queue: a SQLite file, which the first enqueue creates, or a postgresql:// URL.",
)
@click.option("--allow-network-fs", is_flag=True, help="Use a SQLite file on a network file system, at your own risk.")
@click.version_option(package_name="lbr", prog_name="lbr", allow_from_autoenv=False)
@click.pass_context
def lbr(context: click.Context, db: str, allow_network_fs: bool) -> None:
    """Run LLM prompts in batches that survive crashes.

    Enqueue prompts once, start workers in as many terminals as you like, and collect the answers in input order.
    Exit codes: 0 success, 1 error, 2 wrong usage or bad input, 3 unfinished, 4 finished with failures, 5 the doctor found a
    problem, 130 interrupted.
    """
    context.obj = {"db_url": db, "allow_network_fs": allow_network_fs}
    talk.quiet, talk.verbose, talk.log_format = False, False, "text"
    group = context.command
    # A hidden command is a child process, whose parent has printed them.
    if isinstance(group, click.Group) and not group.commands[context.invoked_subcommand or ""].hidden:
        _report_unknown_variables(group)


run_argument = click.argument("run", shell_complete=completion.run_names)


def option(name: str, metavar: str | None, meaning: str, **more: Any) -> Callable[[F], F]:
    """Return a flag with a value."""
    return click.option(name, metavar=metavar, help=meaning, shell_complete=completion.OFFERS.get(name), **more)


def switch(name: str, meaning: str) -> Callable[[F], F]:
    """Return a flag without a value."""
    return click.option(name, is_flag=True, help=meaning)


def choice(name: str, values: Iterable[str], meaning: str, **more: Any) -> Callable[[F], F]:
    """Return a flag that takes one of these values."""
    return click.option(name, type=click.Choice(list(map(str, values))), help=meaning, **more)


def _set_talk(_: click.Context, parameter: click.Parameter, value: Any) -> None:
    setattr(talk, str(parameter.name), value)
    if talk.quiet and talk.verbose:
        raise UsageError("--quiet and --verbose exclude each other; give one of them")


_of_talk: dict[str, Any] = {"expose_value": False, "callback": _set_talk}
talk_options = options(
    click.option("-q", "--quiet", is_flag=True, help="Print errors only.", **_of_talk),
    click.option(
        "-v", "--verbose", is_flag=True, help="Print every failed attempt, not only the first of a kind.", **_of_talk
    ),
    choice("--log-format", ("text", "json"), "Messages and progress as text, or as JSON.", default="text", **_of_talk),
)


def with_database(command: Callable[..., Any]) -> Callable[..., Any]:
    """Accept --db after the command's name as well, and pass the arguments that open a database."""

    def remember(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.ensure_object(dict)["db_url"] = value  # the one object of this command and the group

    meaning = "The queue; same as `lbr --db` before the command."
    option = click.option(
        "--db",
        metavar="PATH_OR_URL",
        callback=remember,
        expose_value=False,
        show_default=False,
        shell_complete=completion.files,
        help=meaning,
    )
    return option(click.pass_obj(command))


def read_settings(texts: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE settings; a value is JSON if it can be read as that, else text."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"expected --set NAME=VALUE, got: {text!r}")
        try:
            settings[name.strip()] = parse_json(value)
        except orjson.JSONDecodeError:
            settings[name.strip()] = value
    return settings


def main() -> None:
    """Run the command `lbr`. SIGTERM and SIGHUP act as Ctrl-C, so that they remove temporary files as well."""
    # If a shell started this as a background job with Ctrl-C ignored, the other signals still end it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    collect_garbage_rarely()
    lbr(prog_name="lbr")


def collect_garbage_rarely() -> None:
    """Tune the garbage collector for a process that does only lbr's work."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
