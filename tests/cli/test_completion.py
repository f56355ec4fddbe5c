"""Tab, in real shells, and what it never does: print an error, create a file, change a database."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from lbr.cli.completion import PROVIDERS

if TYPE_CHECKING:
    from tests.support import Cli

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOADING = {
    "bash": "bind 'set bell-style none'; source ./script; PS1='READY> '",
    "zsh": "bindkey -e; autoload -Uz compinit; compinit -u -D; source ./script; PS1='READY> '",
    "fish": "source ./script; function fish_prompt; echo 'READY> '; end",
}
SECONDS = 60.0


@pytest.fixture
def queue(cli: Cli) -> Cli:
    """Return commands with a queue of two runs, and `lbr` on the path."""
    (cli.folder / "prompts.txt").write_text("a\n")
    cli("enqueue", "prompts.txt", "--run", "my run", "--model", "openai-chat:gpt-4o-mini")
    cli("enqueue", "prompts.txt", "--run", "reviews", "--model", "offline:echo")
    cli.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{cli.environment['PATH']}"
    return cli


def ask(cli: Cli, line: str) -> list[str]:
    """Return what bash would offer at the end of a line."""
    asked = {"_LBR_COMPLETE": "bash_complete", "COMP_LINE": line, "COMP_WORDBREAKS": " \"'><=;|&(:"}
    cli.environment |= asked
    done = cli(check=False)
    for name in asked:
        del cli.environment[name]
    assert (done.stderr, done.returncode) == ("", 0), line
    return [line for line in done.stdout.splitlines() if line]


def words_of(cli: Cli, shell: str, line: str) -> list[str]:
    """Type a line and Tab in a shell on a terminal, and return the words that the shell then makes of it."""
    if shutil.which(shell) is None:
        pytest.fail(f"{shell} is not installed; install it, for example with `apt-get install {shell}`")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(cli.folder)
        environment = cli.environment | {"TERM": "xterm", "HOME": str(cli.folder), "COLUMNS": "200", "PS1": "> "}
        os.execvpe(SHELLS[shell][0], SHELLS[shell], environment)  # noqa: S606 - a shell on a terminal
    try:
        os.write(terminal, f"{LOADING[shell]}\n".encode())
        _read_until(terminal, rb"\nREADY> |READY> (?!')")
        os.write(terminal, f"{line}\t\x01printf '<%s>' \x05 END\n".encode())
        told = _read_until(terminal, rb"<END>")
        return re.findall(r"<([^%<>]*)>", told[told.index("<lbr>") : told.index("<END>")])
    finally:
        os.close(terminal)
        os.kill(child, 9)
        os.waitpid(child, 0)


def _read_until(terminal: int, pattern: bytes) -> str:
    told, deadline = b"", time.monotonic() + SECONDS
    while not re.search(pattern, told):
        assert time.monotonic() < deadline, told
        if select.select([terminal], [], [], 0.2)[0]:
            told += os.read(terminal, 65_536)
    return told.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("shell", SHELLS)
def test_tab_in_a_real_shell(queue: Cli, shell: str) -> None:
    """A command, a run whose name has a space, and a model, whose colon is no end of a word, are completed."""
    (queue.folder / "script").write_text(queue("completion", shell).stdout)
    assert words_of(queue, shell, "lbr failu") == ["lbr", "failures"]
    assert words_of(queue, shell, "lbr show my") == ["lbr", "show", "my run"]
    asked = "lbr enqueue prompts.txt --model=openai-chat:chatgpt-im"
    assert words_of(queue, shell, asked)[3] == "--model=openai-chat:chatgpt-image-latest"
    assert words_of(queue, shell, "lbr enqueue prom") == ["lbr", "enqueue", "prompts.txt"]


def test_bash_script_is_taken(tmp_path: Path, cli: Cli) -> None:
    """Bash runs the script without a complaint, and has a completion of `lbr` then."""
    (tmp_path / "script").write_text(cli("completion", "bash").stdout)
    check = ["bash", "--norc", "-c", "source ./script && complete -p lbr"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("complete -o nosort -F _lbr_completion lbr\n", "")


def test_what_is_offered(queue: Cli) -> None:
    """The newest run first; models of runs and providers; behind a colon the models of the price table."""
    runs = ["plain,reviews", r"plain,my\ run"]
    assert ask(queue, "lbr status ") == ask(queue, "lbr worker --run ") == ask(queue, "lbr compare reviews ") == runs
    assert ask(queue, "lbr show 'my ") == ["plain,my run"]
    models = ["plain,offline:echo", "plain,openai-chat:gpt-4o-mini", *(f"plain,{one}:" for one in PROVIDERS)]
    assert ask(queue, "lbr run prompts.txt --model ") == models
    table = ask(queue, "lbr enqueue --model=openai-chat:gpt-4o")
    assert "plain,gpt-4o" in table
    assert all(one.startswith("plain,gpt-4o") for one in table)
    for files in ("lbr run ", "lbr run no*.txt -o ", "lbr --db ", "lbr enqueue --schema "):
        assert ask(queue, files) == ["file,"]
    assert "plain,--max-cost" in ask(queue, "lbr run prompts.txt --max")
    assert "plain,zsh" in ask(queue, "lbr completion ")


def test_another_queue_is_asked_if_the_line_names_it(queue: Cli) -> None:
    """Before the command or behind it; one that is missing or no queue offers nothing, and is not created."""
    url = queue.environment.pop("LBR_DB")
    for line in (f"lbr --db {url} show re", f"lbr show --db {url} re", f"lbr show --db={url} re"):
        assert ask(queue, line) == ["plain,reviews"]
    assert ask(queue, f"lbr move {url} new.db re") == ["plain,reviews"]
    (queue.folder / "lbr.toml").write_text("no table")
    asked = {"_LBR_COMPLETE": "bash_complete", "COMP_LINE": "lbr show "}
    queue.environment |= asked
    broken = queue(check=False)
    assert (broken.stdout, broken.stderr) == ("", "")
    for name in asked:
        del queue.environment[name]
    (queue.folder / "lbr.toml").unlink()
    (queue.folder / "no.db").write_bytes(b"no database at all" * 100)
    before = sorted(queue.folder.iterdir())
    for wrong in ("missing.db", "no.db", "postgresql://127.0.0.1:1/none", "nothing://x"):
        assert ask(queue, f"lbr --db {wrong} show ") == []
    assert sorted(queue.folder.iterdir()) == before


@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
def test_a_queue_of_an_older_version_is_not_upgraded(queue: Cli) -> None:
    """Its runs are offered; its bytes stay."""
    path = Path(str(make_url(queue.outside_url).database))
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA user_version = 1")
        file.commit()
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.read_bytes()
    assert ask(queue, "lbr show re") == ["plain,reviews"]
    assert path.read_bytes() == before
