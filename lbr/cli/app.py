"""The command group: where settings come from, and how errors become exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import orjson

from lbr.core import digits
from lbr.core.config import CONFIG_FILE, load_environment, read_config_file
from lbr.core.errors import DatabaseError, LbrError, MisfitError, OutputError, StoppedError, UsageError
from lbr.core.text import harmless

F = TypeVar("F", bound=Callable[..., Any])

DB_DEFAULT = "runs.db"
CONFIG_VARIABLE, OF_TESTS = "LBR_CONFIG", "LBR_TEST_"
EXIT_UNFINISHED, EXIT_FAILURES = 3, 4
YOUNG_OBJECTS = 20_000
"""After how many new objects the garbage collector looks for cycles.

A batch makes many values that live as long as a call, and none of them in circles: looking every few hundred of them
takes a fifth of a worker's time.
"""


class Group(click.Group):
    """Reads `.env` and the config file before the flags, and is the one place where errors become exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; an `LbrError` ends the process with its message and its exit code."""
        try:
            _read_environment()
            extra.setdefault("default_map", _read_config(self))
            return super().main(*args, **extra)
        except LbrError as error:
            fail(error)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where a value in the database that is none made it fail, tell that instead of a traceback.

        Raises StoppedError for a Ctrl-C that the command does not take up itself.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("interrupted") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MisfitError) as error:
            from lbr.store.database import misfit  # noqa: PLC0415 - only where something failed

            if ctx.obj is None or (found := misfit(ctx.obj["db_url"])) is None:
                raise
            raise DatabaseError(
                f"{found}; the database was changed by another program: restore a copy, or mend that value"
            ) from error


def with_options(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """Add flags to a command, in this order before those that it has."""
    for option in reversed(options):
        command = option(command)
    return command


def _read_environment() -> None:
    """Put `.env` into the environment; UsageError for flags and LBR_ variables that no database could hold."""
    load_environment(Path.cwd())
    ours = (value for name, value in os.environ.items() if name.startswith("LBR_"))
    for text in (*sys.argv[1:], *ours):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"expected flags, names and file names in UTF-8, got: {text!r}; "
                f"rename the file, or set LC_ALL=C.UTF-8 where the locale is another"
            ) from error


def _read_config(group: click.Group) -> dict[str, Any]:
    """Return the flags of the config file: the one that the environment names, else that of the folder, if there is one."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named or CONFIG_FILE)
    if not named and not path.is_file():
        return {}
    return flag_defaults(group, read_config_file(path), str(path))


def unknown_variables(group: click.Group) -> list[str]:
    """Return a message for each LBR_ variable that resembles a flag's; any other may belong to another program."""
    shown = {"": group} | {f"{name}_": one for name, one in group.commands.items() if not one.hidden}
    flags = ((prefix, one) for prefix, command in shown.items() for one in command.params)
    known = {f"LBR_{prefix}{one.name}".upper() for prefix, one in flags if isinstance(one, click.Option)}
    known |= {CONFIG_VARIABLE}
    ours = (name for name in os.environ if name.startswith("LBR_") and not name.startswith(OF_TESTS))
    notices = []
    for name in sorted(set(ours) - known):
        from difflib import get_close_matches  # noqa: PLC0415 - only where there is something to say

        # Without what all of them begin with, which would make short ones alike.
        close = get_close_matches(name[4:], [one[4:] for one in sorted(known)], n=1, cutoff=0.8)
        notices += [
            f"{name} in the environment is ignored, for it names no flag; did you mean LBR_{one}?"
            for one in close
        ]
    return notices


def flag_defaults(command: click.Command, found: Any, where: str) -> dict[str, Any]:
    """Turn the flags in a config file, one table per command, into what click calls them.

    Raises UsageError for what is no flag, and for a value that no flag takes.
    """
    if not isinstance(found, dict):
        raise UsageError(f"expected {where} to be a table of flags, got: {found!r}; write [{command.name}]")
    options = [one for one in command.params if isinstance(one, click.Option)]
    flags = {flag.lstrip("-"): one for one in options for flag in one.opts}
    commands = command.commands if isinstance(command, click.Group) else {}
    defaults: dict[str, Any] = {}
    for name, value in found.items():
        option = flags.get(name.replace("_", "-"))
        if name in commands:
            defaults[name] = flag_defaults(commands[name], value, f"{name} in {where}")
        elif option is None or option.name is None:
            known = ", ".join(sorted(flag for flag in flags if len(flag) > 1))
            tables = ", ".join(f"[{one}]" for one, its in sorted(commands.items()) if not its.hidden)
            known += f", and the tables {tables}" * bool(tables)
            raise UsageError(f"expected a flag in {where}, got: {name!r}; there are: {known}")
        elif option.is_flag and not isinstance(value, bool):
            raise UsageError(f"expected {name} in {where} to be true or false, got: {value!r}; mend the file")
        elif isinstance(value, dict) or isinstance(value, list) != option.multiple:
            kind = "a list" if option.multiple else "one value"
            raise UsageError(f"expected {name} in {where} to be {kind}, got: {value!r}; mend the file")
        else:
            defaults[option.name] = value
    return defaults


def fail(error: LbrError) -> NoReturn:
    """End the process as the error asks for."""
    log(f"lbr: {error.in_flags or error}")
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # it is closed or full, and Python would flush it once more
        sys.stdout = None
    sys.exit(error.exit_code)


def log(text: str) -> None:
    """Talk to the person: on stderr, so that stdout carries data only. Where nobody listens any more, work goes on."""
    with suppress(OSError):  # the terminal was closed, or the reader of the pipe has ended
        click.echo(harmless(text), err=True)


def echo(data: str | bytes) -> None:
    """Write what was asked for to stdout: words, or data, as they are unless it is a terminal.

    Raises OutputError; a BrokenPipeError is click's.
    """
    if isinstance(data, bytes) and sys.stdout is not None and sys.stdout.isatty():
        data = data.decode()
    try:
        click.echo(harmless(data) if isinstance(data, str) else data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"expected to write stdout, got: {error.strerror}; make room") from error


@click.group(
    cls=Group,
    context_settings={
        "auto_envvar_prefix": "LBR",  # each parameter has the name of its flag, because variables are made of it
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.option(
    "--db",
    metavar="PATH_OR_URL",
    default=DB_DEFAULT,
    show_envvar=True,
    help="The queue: a SQLite file, made by the first enqueue.",
)
@click.option(
    "--allow-network-fs", is_flag=True, help="Use a SQLite file on a network file system, at your own risk."
)
@click.version_option(package_name="lbr", prog_name="lbr", allow_from_autoenv=False)
@click.pass_context
def lbr(context: click.Context, db: str, allow_network_fs: bool) -> None:
    """Run LLM prompts in batches that survive crashes.

    Enqueue prompts once, start workers in as many terminals as you like, collect the answers in input order.
    Exit codes: 0 all well, 1 error, 2 usage, 3 unfinished, 4 finished with failures, 5 the doctor found something,
    130 interrupted.
    """
    context.obj = {"db_url": db, "allow_network_fs": allow_network_fs}
    group = context.command
    # A hidden command is a child's, whose parent has said it.
    if isinstance(group, click.Group) and not group.commands[context.invoked_subcommand or ""].hidden:
        for notice in unknown_variables(group):
            log(f"lbr: {notice}")


def database_option(command: F) -> F:
    """Accept --db behind the command's name as well."""

    def remember(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.find_root().obj = context.obj = context.obj | {"db_url": value}

    return click.option(
        "--db",
        metavar="PATH_OR_URL",
        callback=remember,
        expose_value=False,
        show_default=False,
        help="The queue; the same as before the command.",
    )(command)


def read_setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON where it can be, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"expected --set NAME=VALUE, got: {text!r}")
    try:
        return name.strip(), digits.loads(value)
    except orjson.JSONDecodeError:
        return name.strip(), value


def main() -> None:
    """Be the command `lbr`. SIGTERM and SIGHUP are Ctrl-C, so that they too remove temporary files; workers handle all."""
    # A background job of a shell may have been started with Ctrl-C ignored: the others must still end that.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    collect_garbage_rarely()
    lbr(prog_name="lbr")


def collect_garbage_rarely() -> None:
    """Set up the garbage collector of a process that does nothing but lbr's work."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
