"""The documentation says what the program does: help, signatures, settings, links, and every example's output.

A block's fence says what is checked: `console` runs in a folder that its page's blocks share, and must print what is
shown; below a line `<!-- volatile -->` it may print something else; `python` compiles; `title="NAME"` makes a file.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import docs_site
import pytest

import lbr
from lbr.cli import lbr as group
from lbr.core.config import WorkOptions
from tests.support import ROOT, Cli

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HELP_COLUMNS = "100"
COMMANDS = {name: command for name, command in group.commands.items() if not command.hidden}
END_OF_OUTPUT = "\x1e"

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_TITLE = re.compile(r'\btitle="([^"\s]+)"')
_VOLATILE = "<!-- volatile -->"
_TIMES = re.compile(r"\d+(\.\d+)? (ms|s)\b")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where it is, the words behind its fence, and its text."""

    page: Path
    line: int
    words: tuple[str, ...]
    text: str
    volatile: bool = False

    @property
    def title(self) -> str | None:
        """The name of the file that the block is, None where it is none."""
        found = _TITLE.search(" ".join(self.words))
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Example:
    """One command of a console block with the output that is shown."""

    command: str
    shown: str


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    words: tuple[str, ...] | None = None
    start, lines, volatile = 0, [""], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif words is None:
            volatile = lines[-1:] == [_VOLATILE]
            words, start, lines = tuple(line[3:].split()), number, []
        else:
            yield Block(page, start, words, "".join(f"{one}\n" for one in lines), volatile)
            words, lines = None, [""]
    assert words is None, f"{page}, line {start}: this block has no end"


def examples_of(block: Block) -> list[Example]:
    """Split a console block at its prompts."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0], f"{block.page}, line {block.line}: expected a command first"
    return [Example(*part.split("\n", 1)) for part in parts[1:]]


def run_examples(block: Block, cli: Cli) -> list[str]:
    """Run a block's commands in one shell; return what each printed."""
    script = ""
    for example in examples_of(block):
        script += f"{example.command}\n_code=$?; printf '{END_OF_OUTPUT}'; (exit $_code)\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cli.folder,
        env=cli.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.split(END_OF_OUTPUT)[:-1]


def normal(output: str) -> str:
    """Return output without what differs from one time to the next."""
    return _TIMES.sub(r"N \2", output)


def name_of(page: Path) -> str:
    """Return how a page is called in a test's name."""
    return str(page.relative_to(ROOT))


def examples_cli(folder: Path) -> Cli:
    """Return a clean environment in which `lbr` and `python` are those that run the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return Cli(folder, PATH=path, LC_ALL="C", COLUMNS=HELP_COLUMNS)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", docs_site.generated_pages(), ids=name_of)
def test_generated_pages_are_up_to_date(page: Path) -> None:
    """The help of all commands and the settings of a worker are those of the code; `./scripts/docs` writes them."""
    assert page.read_text(encoding="utf-8") == docs_site.generated_pages()[page]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences_are_those_of_the_site(page: Path) -> None:
    """A fence has a language and at most a title in quotes; the site shows any other as plain text."""
    for block in blocks_of(page):
        assert len(block.words) == 1 + (block.title is not None), f"{page}, line {block.line}: {block.words}"


@pytest.mark.parametrize(("name", "bounds"), docs_site.BOUNDS.items())
def test_ranges_are_those_of_the_code(name: str, bounds: tuple[str, float | None]) -> None:
    """A setting takes the end of the range that the page shows, and nothing beyond it."""
    least, most = bounds
    ends = [float(least)] if least[0].isdigit() else []
    inside: dict[str, Any] = {name: most or 1}
    assert getattr(WorkOptions(**inside), name) == inside[name]
    for value in [ends[0] - 0.25 if ends else 0, *([most + 1] if most else [])]:
        outside: dict[str, Any] = {name: value}
        with pytest.raises(lbr.UsageError):
            WorkOptions(**outside)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading that it has."""
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{page}: {target}"


def test_every_page_is_in_the_index() -> None:
    """The index lists every page, and only once, because it is the site's navigation."""
    listed = [path for _, _, path, _ in docs_site.entries()]
    assert sorted(listed) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in PAGES[1:] if page.name != "index.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_compile(page: Path) -> None:
    """Every Python block compiles; as in a notebook, it may await at its top."""
    for block in blocks_of(page):
        if block.words[:1] == ("python",):
            name = f"{page}:{block.line}"
            compile(block.text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_readme_example_runs(tmp_path: Path) -> None:
    """The README's first Python example prints what is shown below it."""
    blocks = list(blocks_of(ROOT / "README.md"))
    place = next(n for n, block in enumerate(blocks) if block.words == ("python",))
    (tmp_path / "example.py").write_text(blocks[place].text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=examples_cli(tmp_path).environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == blocks[place + 1].text


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.words[:1] == ("console",) for b in blocks_of(p))], ids=name_of
)
def test_console_examples_run(page: Path, tmp_path: Path) -> None:
    """Every command of a page, run in order in an empty folder, prints what the page shows."""
    cli = examples_cli(tmp_path)
    for block in blocks_of(page):
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        if block.words[:1] != ("console",):
            continue
        printed = run_examples(block, cli)
        assert not any("Traceback" in one for one in printed), f"{page}, line {block.line}: {printed}"
        if block.volatile:
            continue
        for example, output in zip(examples_of(block), printed, strict=True):
            assert normal(output) == normal(example.shown), f"{page}, line {block.line}: {example.command}"


def test_every_public_name_is_documented() -> None:
    """The Python page has each public name: its signature from the code, or a row; `dir` shows these names alone."""
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    made = re.findall(r"^::: lbr\.(\w+)$", text, flags=re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    headings = ", ".join(re.findall(r"^## (.*)$", text, flags=re.MULTILINE)).split(", ")
    assert {*made, *rows, *headings} - {"What functions return"} == set(lbr.__all__)
    assert {name for name in lbr.__all__ if inspect.isfunction(getattr(lbr, name))} <= set(made)
    assert dir(lbr) == sorted(lbr.__all__)


def test_every_public_error_and_returned_class_is_importable_from_lbr() -> None:
    """Each error of lbr, and each class of lbr that a public function returns, is in the package itself."""
    errors = {name for name, one in vars(lbr.core.errors).items() if _is_error(one)}
    returned = {
        word
        for name in lbr.__all__
        if inspect.iscoroutinefunction(getattr(lbr, name))
        for word in re.findall(r"\b[A-Z]\w+", str(inspect.signature(getattr(lbr, name)).return_annotation))
    }
    assert errors | (returned - {"Any", "None", "Json"}) <= set(lbr.__all__)


def _is_error(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, Exception)


def test_every_flag_has_the_twin_that_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag is read from LBR_, its command and its own name, as the page of settings says."""
    root = click.Context(group, info_name="lbr", **group.context_settings)
    for name, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option):
                flag = max(option.opts, key=len).removeprefix("--").replace("-", "_")
                monkeypatch.setenv(f"LBR_{name}_{flag}".upper(), "set")
                context = click.Context(command, parent=root, info_name=name)
                assert option.resolve_envvar_value(context) == "set"


def test_a_twin_is_used(tmp_path: Path) -> None:
    """A flag that is set in the environment holds, and one on the command line wins over it."""
    (tmp_path / "in.txt").write_text("a\n")
    environment = os.environ | {"LBR_ENQUEUE_RUN": "twin", "LBR_ENQUEUE_SET": "latency=0 seed=1"}
    command = [sys.executable, "-m", "lbr", "enqueue", "in.txt", "--model", "offline:echo"]
    done = [
        subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        for flags in ([], ["--run", "flag"])
    ]
    assert [one.stdout.split(":")[0] for one in done] == ["run twin", "run flag"]


def test_a_variable_that_names_no_flag_is_told(tmp_path: Path) -> None:
    """A mistyped flag is reported once, by the command that was typed; a variable like no flag is ignored."""
    cli = Cli(
        tmp_path,
        LBR_CONCURENCY="4",
        LBR_ZZZZZZZZZZZZZZ="1",
        LBR_CACHE_DIR="x",
        LBR_TEST_EXAMPLES="1",
        LBR_VERSION="1.2.3",
        LBR_WORKER_UNTIL="empty",
        LBR_CONFIG="some.toml",
    )
    (tmp_path / "some.toml").write_text("")
    told = [
        "lbr: the variable LBR_CONCURENCY is ignored because no flag has that name; did you mean LBR_RUN_CONCURRENCY?",
    ]
    (tmp_path / "in.txt").write_text("a\n")
    assert cli("enqueue", "in.txt", "--model", "offline:echo").stderr.splitlines() == told
    assert cli("worker", "--processes", "2").stderr.count("LBR_CONCURENCY") == 1
    assert cli("--help").stderr == ""


def test_extras_are_documented() -> None:
    """The page of models names every provider that is an extra of the package; other extras have their own pages."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    page = (ROOT / "docs/how-to/real-models.md").read_text(encoding="utf-8")
    assert [extra for extra in extras if extra not in {"polars", "postgres"} and f"[{extra}]" not in page] == []
