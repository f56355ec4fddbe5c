"""Generate reference pages from the code, and build the site from `docs/`.

`python scripts/docs_site.py` does both; `reference` only generates the pages, `check` only builds the site, `serve` shows it
while you write. The navigation and `llms.txt` are the list of pages in `docs/index.md`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import Option
from click.testing import CliRunner

from lbr.cli import lbr as group
from lbr.core import config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DOCS, SITE = ROOT / "docs", ROOT / "build" / "site"
HELP_WIDTH = 98  # a terminal of 100 columns
BOUNDS: dict[str, tuple[str, float | None]] = {
    "concurrency": ("1", config.MAX_SLOTS),
    "lease": ("0.5", 86_400),
    "grace": ("0", None),
    "timeout": ("above 0", None),
    "patience": ("above 0", None),
    "rpm": ("1", config.MAX_PER_MINUTE),
    "tpm": ("1", config.MAX_PER_MINUTE),
    "max_cost": ("above 0", config.MAX_DOLLARS),
    "outage_patience": ("above 0", None),
}
"""The least and the greatest value of each number in `WorkOptions`; a test compares them with what it accepts."""

COMMANDS_HEAD = """# Commands

The help of every command.
Every flag can also be set in the environment and in the config file: see [Settings](settings.md), which also has the exit codes.
`./scripts/docs` generates this page.
"""
_MARKS = "<!-- generated from lbr/core/config.py by ./scripts/docs -->\n", "<!-- end -->\n"
_ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)#]+\.md)\)(.*)$")


def main() -> int:
    """Do what the first argument names; return the exit code."""
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    if what in {"all", "reference"}:
        for path, text in generated_pages().items():
            path.write_text(text, encoding="utf-8")
    if what == "reference":
        return 0
    return build(serve=what == "serve")


def generated_pages() -> dict[Path, str]:
    """Return the pages that are made from the code, by path."""
    settings = DOCS / "reference" / "settings.md"
    return {
        DOCS / "reference" / "commands.md": commands_page(),
        settings: _between_marks(settings.read_text(encoding="utf-8"), settings_table()),
    }


def commands_page() -> str:
    """Return the page with the help of every command."""
    sections = [_section("lbr"), *(_section("lbr", name) for name, one in group.commands.items() if not one.hidden)]
    return COMMANDS_HEAD + "".join(sections)


def _section(*command: str) -> str:
    runner = CliRunner()
    shown = runner.invoke(group, [*command[1:], "--help"], prog_name="lbr", terminal_width=HELP_WIDTH)
    return f"\n## {' '.join(command)}\n\n```text\n{shown.stdout}```\n"


def settings_table() -> str:
    """Return a table of the settings of a worker: flag, default, range and meaning."""
    options = {option.name: option for option in group.commands["worker"].params if isinstance(option, Option)}
    rows = ["| flag | default | from | to | |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(config.WorkOptions):
        option = options.get(field.name)
        if option is not None and field.name in BOUNDS:
            least, most = BOUNDS[field.name]
            flag, meaning = max(option.opts, key=len), _one_line(option.help or "")
            rows.append(f"| `{flag}` | {_shown(field.default)} | {least} | {_shown(most)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,g}" if isinstance(value, float) else f"{value:,}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _between_marks(page: str, text: str) -> str:
    before, rest = page.split(_MARKS[0])
    return before + _MARKS[0] + "\n" + text + "\n" + _MARKS[1] + rest.split(_MARKS[1])[1]


def entries() -> Iterator[tuple[str, str, str, str]]:
    """Yield section, title, path and description of each page that `docs/index.md` lists."""
    section = ""
    for line in (DOCS / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif found := _ENTRY.match(line):
            yield section, found[1], found[2], found[3].strip(" :,")


def navigation() -> str:
    """Return the sections and pages of `docs/index.md` as zensical's `nav`."""
    sections: dict[str, list[str]] = {}
    for section, title, path, _ in entries():
        sections.setdefault(section, []).append(f'{{ "{title}" = "{path}" }}')
    parts = [f'  {{ "{section}" = [{", ".join(pages)}] }},' for section, pages in sections.items()]
    return "\n".join(["nav = [", '  { "lbr" = "index.md" },', *parts, "]", ""])


def build(*, serve: bool = False) -> int:
    """Build the site, or serve it; a broken link fails the build. Returns the exit code."""
    made = ROOT / ".zensical.toml"  # paths in it are relative to its folder
    text = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    made.write_text(text.replace("\n[project.theme]", f"{navigation()}\n[project.theme]", 1), encoding="utf-8")
    zensical = [sys.executable, "-m", "zensical"]
    if serve:
        return subprocess.run([*zensical, "serve", "-f", str(made)], cwd=ROOT, check=False).returncode
    command = [*zensical, "build", "--clean", "--strict", "-f", str(made)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, check=False)
    if done.returncode == 0:
        write_llms(SITE)
    return done.returncode


def write_llms(site: Path) -> None:
    """Put `llms.txt`, which lists the pages, and the pages as Markdown into the site."""
    lines = [
        "# lbr",
        "",
        "> A durable, multi-process batch runner for LLM prompts: at-least-once calls, exactly-once results.",
    ]
    section = ""
    for heading, title, path, description in entries():
        if heading != section:
            section = heading
            lines += ["", f"## {section}", ""]
        lines.append(f"- [{title}]({path})" + (f": {description}" if description else ""))
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DOCS / path, site / path)
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
