"""The texts that `lbr enqueue` reads from files, samples and dry runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lbr.cli.enqueue import load_text
from lbr.core.errors import UsageError
from tests.io import write
from tests.support import Cli

if TYPE_CHECKING:
    from pathlib import Path

ECHO = ("--model", "offline:echo")


class TestLoadText:
    """Templates and instructions from a flag."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none", "cannot read a template from .*: No such file or directory"),
            ("folder", "cannot read a template from .*: Is a directory"),
            ("latin", "is not UTF-8: it has 0xe9 as byte 2; convert it"),
        ],
    )
    def test_load_text_refuses(self, tmp_path: Path, name: str, message: str) -> None:
        """A template file that cannot be read is a usage error."""
        (tmp_path / "folder").mkdir()
        (tmp_path / "latin").write_bytes(b"h\xe9")
        with pytest.raises(UsageError, match=message):
            load_text(f"@{tmp_path / name}", "a template")

    @pytest.mark.parametrize(
        ("held", "meant"),
        [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\na ", "\na "), ("\n", "")],
    )
    def test_the_line_break_that_ends_a_file_is_not_meant(self, tmp_path: Path, held: str, meant: str) -> None:
        """An editor puts one there; whoever means one writes another."""
        path = write(tmp_path, "t.txt", held.encode())
        assert load_text(f"@{path}", "instructions") == meant
        assert load_text(held, "instructions") == held

    def test_load_text(self, tmp_path: Path) -> None:
        """A template, or instructions, are the argument itself, or what stands in the file after @."""
        path = write(tmp_path, "t.j2", b"\xef\xbb\xbfHi {{ a }}\n")
        assert load_text("Hi {{ a }}", "a template") == "Hi {{ a }}"
        assert load_text(f"@{path}", "a template") == "Hi {{ a }}"


def answers(path: Path) -> list[tuple[int, str | None]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["idx"], row["result"]) for row in rows]


@pytest.mark.processes
def test_a_limited_run_is_continued_without_the_limit(cli: Cli) -> None:
    """The first inputs are answered first, and are not asked again."""
    (cli.folder / "in.txt").write_text("a\nb\nc\nb\nd\n")
    done = cli("run", "in.txt", "-o", "out.jsonl", *ECHO, "--limit", "2")
    assert "run in: 2 inputs, 2 new" in done.stderr
    assert answers(cli.folder / "out.jsonl") == [(0, "a"), (1, "b")]
    done = cli("run", "in.txt", "-o", "out.jsonl", *ECHO)
    assert "run in: 5 inputs, 2 new, 1 duplicate, 0 reused, 2 known" in done.stderr
    assert answers(cli.folder / "out.jsonl") == list(enumerate("abcbd"))
    done = cli("enqueue", "in.txt", *ECHO, "--limit", "1")
    assert "run in holds 5 inputs, this input has 1; the others stay in it" in done.stderr


@pytest.mark.processes
def test_the_full_run_reuses_the_answers_of_a_sample(cli: Cli) -> None:
    """A sample is a run of its own, safe to repeat; a different one under its name is refused."""
    (cli.folder / "in.jsonl").write_text("".join(f'{{"prompt": "p{n}", "id": {n}}}\n' for n in range(40)))
    command = ("run", "in.jsonl", "-o", "out.jsonl", *ECHO)
    assert "run in-pick: 5 inputs, 5 new" in cli(*command, "--pick", "5").stderr
    sample = answers(cli.folder / "out.jsonl")
    assert "run in-pick: 5 inputs, 0 new, 0 duplicate, 0 reused, 5 known" in cli(*command, "--pick", "5").stderr
    refused = cli(*command, "--pick", "5", "--seed", "1", check=False)
    assert (refused.returncode, "run 'in-pick' holds a different sample; use another run" in refused.stderr) == (
        2,
        True,
    )
    assert "run in: 40 inputs, 40 new, 0 duplicate, 5 reused" in cli(*command).stderr
    assert {text for _, text in sample} < {text for _, text in answers(cli.folder / "out.jsonl")}
    picked = cli(
        "enqueue",
        "-",
        "--format",
        "jsonl",
        "--run",
        "piped",
        "--pick",
        "5",
        *ECHO,
        stdin=(cli.folder / "in.jsonl").read_text(),
    )
    assert picked.stdout.startswith("run piped-pick: 5 inputs, 5 new, 0 duplicate, 5 reused")


@pytest.mark.processes
@pytest.mark.parametrize("command", [("enqueue",), ("run", "-o", "out.csv", "--processes", "2")])
def test_a_dry_run_shows_what_would_happen_and_leaves_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Prompts, counts and the estimate on stdout; bad rows are refused as without it; no key, no queue."""
    (tmp_path / "in.csv").write_text('city\nOslo\n""\nRome\nOslo\nBonn\nCork\nx,y\n')
    cli = Cli(tmp_path)
    given = (
        *command,
        "in.csv",
        "--template",
        "Where is {{ city }}?",
        "--dry-run",
        "--model",
        "openai-chat:gpt-4o-mini",
    )
    done = cli(*given, check=False)
    shown = done.stdout.splitlines()
    prompts = [f"Where is {city}?" for city in ("Oslo", "Rome", "Bonn")]
    assert shown[:7] == [line for n, text in enumerate(prompts, 1) for line in (f"--- prompt {n} of 4", text)] + ["---"]
    assert shown[7] == "openai-chat:gpt-4o-mini: 5 inputs, 4 distinct, 1 duplicate, 1 empty, 1 bad"
    assert [line.split(":")[0] for line in shown[8:]] == ["input", "output", "cost", "time"]
    assert f"4 calls of 3 s, {64 if command[0] == 'run' else 32} at a time" in shown[-1]
    refused = cli(*(word for word in given if word != "--dry-run"), check=False)
    assert (done.returncode, refused.returncode) == (2, 2)
    assert "dry run: nothing was written and no model was called" in done.stderr
    skipped = cli(*given, "--skip-empty", "--skip-bad", "bad.jsonl", "--pick", "2")
    assert "2 inputs, 2 distinct, 0 duplicate, 1 empty, 1 bad" in skipped.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.processes
def test_a_dry_run_in_json_of_stdin_and_of_a_function(tmp_path: Path) -> None:
    """The JSON has the whole prompts; of a function, nothing but its inputs is known, and it is not called."""
    (tmp_path / "fns.py").write_text("def answer(text): print(text, file=open('called', 'w'))\n")
    cli, flags = Cli(tmp_path), ("--dry-run", "--seed", "3", "--pick", "1")
    found = json.loads(cli("enqueue", "-", *ECHO, *flags, "--json", stdin="a\na\n").stdout)
    assert (found["inputs"], found["examples"], found["refusal"]) == (1, ["a"], None)
    shown = cli("enqueue", "-", "--function", "fns:answer", *flags, stdin="a\nb\n").stdout.splitlines()
    assert shown[3] == "function:fns:answer: 1 input, 1 distinct, 0 duplicate, 0 empty, 0 bad"
    assert shown[4:] == ["input: about 1 token, estimated at 4 characters per token"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["fns.py"]
