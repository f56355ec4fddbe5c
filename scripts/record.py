"""Record `lbr run` in a terminal as docs/run.svg: real frames of a real run, one after another."""

from __future__ import annotations

import io
import os
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.support.terminal import Terminal

TARGET = Path("docs/run.svg")
COLUMNS, ROWS, LOOK_SECONDS = 92, 10, 3.0
SHOWN_SECONDS, END_SECONDS = 1.5, 4.5
COMMAND = ("run", "reviews.csv", "-o", "answers.csv", "--model", "offline:echo")
OFFLINE = ("latency=0.8", "rate_limit_rate=0.04", "retry_after=5", "failure_rate=0.02", "seed=7")
MORE = ("--template", "Sentiment of {{ text }}?", "--price", "in=15,out=60", "--concurrency", "24")


def frames() -> list[str]:
    """Run the command; return the screens that were seen meanwhile, with their colours, and the last one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reviews.csv").write_text("text\n" + "".join(f"review {n}\n" for n in range(600)))
        settings = [word for one in OFFLINE for word in ("--set", one)]
        running = Terminal(folder, *COMMAND, *MORE, *settings, columns=COLUMNS)
        screens = []
        while running.watch(LOOK_SECONDS):
            screens.append(running.styled)
        running.end()
        return [f"\x1b[1m$\x1b[0m lbr {' '.join(COMMAND)} …\n{screen}" for screen in (*screens, running.styled)]


def picture(screens: list[str]) -> str:
    """Return an SVG that shows the screens one after another, again and again; only the last one where nothing moves."""
    last = len(screens) - 1
    span = last * SHOWN_SECONDS + END_SECONDS
    parts: list[str] = []
    for place, screen in enumerate(screens):
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        lines = screen.split("\n")
        console.print(Text.from_ansi("\n".join(lines + [""] * (ROWS - len(lines)))))
        svg = console.export_svg(title="lbr run", unique_id=f"f{place}")
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
        head, body = svg.strip().removesuffix("</svg>").split(">", maxsplit=1)
        kind, delay = "last" if place == last else "frame", place * SHOWN_SECONDS - span
        parts.append(f'<g class="{kind}" style="animation-delay: {delay:g}s">{body}</g>')
    shown, kept = 100 * SHOWN_SECONDS / span, 100 * END_SECONDS / span
    style = (
        f".frame {{ animation: show {span:g}s step-end infinite; visibility: hidden }} "
        f".last {{ animation: stay {span:g}s step-end infinite }} "
        f"@keyframes show {{ 0% {{ visibility: visible }} {shown:.2f}% {{ visibility: hidden }} }} "
        f"@keyframes stay {{ 0% {{ visibility: visible }} {kept:.2f}% {{ visibility: hidden }} }} "
        f"@media (prefers-reduced-motion) {{ .frame, .last {{ animation: none }} }}"
    )
    return "\n".join([f"{head}>", f"<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Write the file."""
    started = time.monotonic()
    TARGET.write_text(picture(frames()), encoding="utf-8")
    print(f"{TARGET}: {os.path.getsize(TARGET):,} bytes, after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
