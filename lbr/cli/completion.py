"""`lbr completion`, and what a shell offers when you press Tab: commands, flags, runs, models and files.

A shell asks while the user types, so nothing here prints an error, creates a file or upgrades a database.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from contextlib import suppress

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    split_arg_string,
)
from click.shell_completion import add_completion_class as added

from lbr.api import operate
from lbr.core.pricing import table_models
from lbr.models.offline import ECHO

VARIABLE = "_LBR_COMPLETE"
"""The environment variable with which a shell asks."""
PROVIDERS = [
    "openai-chat",
    "openai",
    "openrouter",
    "anthropic",
    "google",
    "groq",
    "mistral",
    "cohere",
    "bedrock",
    "huggingface",
    "ollama",
]
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        [[ $type != file ]] || compopt -o default
        [[ $type != plain ]] || COMPREPLY+=("$value")
        [[ $value != *: ]] || compopt -o nospace
    done < <(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_SPECIAL = re.compile(r"[^\w@%+=:,./-]")
"""What a word of bash cannot have without a backslash before it."""


class _WholeWords(ShellComplete):
    """Offers values of `--flag=value` with the flag, because shells replace the whole word; bash, behind a break."""

    word_breaks = ""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        flag, equals, _ = incomplete.partition("=")
        prefix = flag + equals if equals and flag.startswith("-") else ""
        start = 1 + max([incomplete.rfind(one) for one in self.word_breaks], default=-1)
        found = super().get_completions(args, incomplete)
        return [CompletionItem((prefix + one.value)[start:], one.type, one.help) for one in found]


@added
class _Bash(_WholeWords, BashComplete):
    source_template = _BASH
    quoted = False

    def get_completion_args(self) -> tuple[list[str], str]:
        """Read the line itself, because bash splits `openai-chat:gpt-4o` into three words."""
        line = os.environ["COMP_LINE"]
        try:
            shlex.split(line)
        except ValueError:
            self.quoted = not line.endswith("\\")
        if not self.quoted:
            self.word_breaks = "".join({":", "="} & {*os.environ.get("COMP_WORDBREAKS", "")})
        *words, last = split_arg_string(f"{line}|")
        return words[1:], last[:-1]

    def format_completion(self, item: CompletionItem[str]) -> str:
        value = item.value if self.quoted else _SPECIAL.sub(r"\\\g<0>", item.value)
        return f"{item.type},{value}"


@added
class _Zsh(_WholeWords, ZshComplete):
    pass


@added
class _Fish(_WholeWords, FishComplete):
    pass


SHELLS = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


def files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Let the shell offer files."""
    return [CompletionItem(incomplete, type="file")]


def run_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Offer the runs of the queue, the newest first."""
    return [name for name, _ in _known(context) if name.startswith(incomplete)]


def models(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Offer the models of the queue's runs, and providers; behind a provider the models of the price table."""
    provider, colon, _ = incomplete.partition(":")
    found = [model for _, model in _known(context) if not model.startswith(operate.FUNCTION)]
    found += table_models(provider) if colon else [ECHO, *(f"{one}:" for one in PROVIDERS)]
    return [one for one in dict.fromkeys(found) if one.startswith(incomplete)]


def _known(context: click.Context) -> list[tuple[str, str]]:
    """Return the runs of the queue that the line names, each with its model; none if they cannot be read."""
    named = context.params.get("from_url") or (context.obj or {}).get("db_url")
    with suppress(Exception):
        return asyncio.run(operate.names(str(named or context.find_root().params.get("db"))))
    return []


OFFERS = {"--run": run_names, "--model": models, "--schema": files, "--skip-bad": files}


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, flags, runs, models and files. Save it as below, and open a new terminal. To try it in this
    one, run `source <(lbr completion bash)`, with the name of your shell.
    """
    click.echo(SHELLS[shell](context.find_root().command, {}, "lbr", VARIABLE).source(), nl=False)
