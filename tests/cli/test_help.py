"""What `lbr --help` shows on a small terminal, and the examples of each command."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click
import pytest

from lbr.cli import lbr as group
from lbr.cli.examples import EXAMPLES, SECTIONS

if TYPE_CHECKING:
    from tests.support import Cli

SHOWN = [name for name, command in group.commands.items() if not command.hidden]


def test_each_command_has_one_line_in_one_section() -> None:
    """At 80 columns no line wraps, and no help is cut."""
    context = click.Context(group, info_name="lbr", terminal_width=80)
    lines = group.get_help(context).splitlines()
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(SHOWN)
    start = lines.index(f"{next(iter(SECTIONS))}:")
    listed = [line for line in lines[start:] if line.startswith("  ")]
    assert [line.split()[0] for line in listed] == [name for names in SECTIONS.values() for name in names]
    assert all(len(line) <= 80 and line.endswith(".") and not line.endswith("..") for line in listed)


@pytest.mark.parametrize("name", SHOWN)
def test_examples_are_of_flags_that_there_are(name: str) -> None:
    """Each is short enough for a small terminal, and the command takes its flags."""
    for line in EXAMPLES[name]:
        first, *words = shlex.split(line.partition(" > ")[0])
        assert first == name
        group.commands[name].make_context(name, words, parent=click.Context(group, obj={}))
        assert len(f"    lbr {line}") <= 80


def test_help_ends_with_examples(cli: Cli) -> None:
    """Each on its own line."""
    shown = cli("retry", "--help").stdout
    assert shown.endswith("\n".join(["  Examples:", *(f"    lbr {one}" for one in EXAMPLES["retry"])]) + "\n")
