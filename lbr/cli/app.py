"""The command group: where settings come from, and how errors become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from lbr.config import CONFIG_FILE, environment, read_config_file
from lbr.errors import LbrError

F = TypeVar("F", bound=Callable[..., Any])

DB_DEFAULT = "runs.db"


class Group(click.Group):
    """Reads `.env` and the config file before the flags, and is the one place where errors become exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; an `LbrError` ends the process with its message and its exit code."""
        try:
            os.environ.update(environment(Path.cwd()))
            extra.setdefault("default_map", read_config_file(Path(os.environ.get("LBR_CONFIG", CONFIG_FILE))))
            return super().main(*args, **extra)
        except LbrError as error:
            fail(error)


def fail(error: LbrError) -> NoReturn:
    """End the process as the error asks for."""
    say(f"lbr: {error}")
    sys.exit(error.exit_code)


def say(text: str) -> None:
    """Talk to the person: on stderr, so that stdout carries data only."""
    click.echo(text, err=True)


@click.group(
    cls=Group,
    context_settings={
        "auto_envvar_prefix": "LBR",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.option(
    "--db",
    metavar="PATH_OR_URL",
    default=DB_DEFAULT,
    envvar="LBR_DB",
    show_envvar=True,
    help="The queue: a SQLite file, made by the first enqueue.",
)
@click.option(
    "--allow-network-fs",
    is_flag=True,
    help="Use a SQLite file on a network file system, at your own risk.",
)
@click.version_option(version("llm-batch-runner"), prog_name="lbr")
@click.pass_context
def lbr(context: click.Context, db: str, allow_network_fs: bool) -> None:
    """Run LLM prompts in batches that survive crashes.

    Enqueue prompts once, start workers in as many terminals as you like, collect the answers in input order.
    Exit codes: 0 all well, 1 error, 2 usage, 3 unfinished, 4 finished with failures.
    """
    context.obj = {"db_url": db, "allow_network_fs": allow_network_fs}


def database_option(command: F) -> F:
    """Accept --db behind the command's name as well."""

    def remember(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.obj = context.obj | {"db_url": value}

    return click.option(
        "--db",
        metavar="PATH_OR_URL",
        callback=remember,
        expose_value=False,
        show_default=False,
        help="The queue; the same as before the command.",
    )(command)


def main() -> None:
    """Be the command `lbr`."""
    lbr(prog_name="lbr")
