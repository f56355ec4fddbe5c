"""Take the pictures of the dashboard in docs/: real pages of real runs, which the offline model answers."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from tests.support import Cli

if TYPE_CHECKING:
    from typing import Literal

    from playwright.sync_api import Browser, ViewportSize

DOCS = Path("docs")
MINUTES = 12.0
WIDE: ViewportSize = {"width": 1280, "height": 860}
PHONE: ViewportSize = {"width": 390, "height": 844}
MAX_BYTES = 150_000
# The file's name, the page, the size, and light or dark.
PICTURES: tuple[tuple[str, str, ViewportSize, Literal["light", "dark"]], ...] = (
    ("dashboard", "/", WIDE, "light"),
    ("dashboard-dark", "/runs/reviews?minutes=15", WIDE, "dark"),
    ("dashboard-run", "/runs/reviews?minutes=15", WIDE, "light"),
    ("dashboard-jobs", "/runs/reviews/jobs?state=failed", WIDE, "light"),
    ("dashboard-job", "/runs/reviews/jobs?state=done", WIDE, "light"),
    ("dashboard-phone", "/", PHONE, "light"),
)
TOPICS = ("breakfast", "lift", "view", "staff", "noise", "pool", "price", "bed", "parking", "garden")
ADJECTIVES = (
    "excellent",
    "cold",
    "slow",
    "friendly",
    "broken",
    "quiet",
    "too small",
    "worth it",
    "disappointing",
    "clean",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "neutral", "negative"]},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
        "topics": {"type": "array", "items": {"enum": list(TOPICS)}, "minItems": 2},
    },
    "required": ["sentiment", "score", "topics"],
}
TEMPLATE = "Classify this hotel review: {{ prompt }}"


def fill(folder: Path, lbr: Cli) -> None:
    """Enqueue four runs: one at work, one at its budget, one that is finished and one that waits."""
    draw = random.Random(4)  # noqa: S311 - no secret
    reviews = [
        f"The {draw.choice(TOPICS)} was {draw.choice(ADJECTIVES)}, the {draw.choice(TOPICS)} {draw.choice(ADJECTIVES)}, in room {n}."
        for n in range(9_000)
    ]
    (folder / "schema.json").write_text(json.dumps(SCHEMA))

    def enqueue(name: str, count: int, *options: str, **settings: float) -> None:
        (folder / f"{name}.txt").write_text("\n".join(reviews[:count]))
        given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        lbr("enqueue", f"{name}.txt", "--model", "offline:echo", *given, *options)

    enqueue("summaries", 400, latency=0.05)
    lbr("worker", "--run", "summaries")
    enqueue("triage", 1_200, "--price", "in=400,out=1600", latency=0.4, failure_rate=0.01)
    lbr("worker", "--run", "triage", "--max-cost", "12", "--concurrency", "16", check=False)
    asked = (
        "--schema",
        "schema.json",
        "--template",
        TEMPLATE,
        "--instructions",
        "You read hotel reviews. Answer in JSON.",
    )
    often = {"latency": 1.4, "failure_rate": 0.12, "rate_limit_rate": 0.03, "retry_after": 4.0}
    enqueue("reviews", 9_000, *asked, "--price", "in=40,out=160", "--max-attempts", "2", **often)
    enqueue("translations", 2_500, latency=1.0)
    lbr("pause", "translations", "--reason", "until the new glossary is there")


def watch(lbr: Cli, minutes: float) -> str:
    """Let two workers answer for a while, one of them a little later; return the address of the dashboard."""
    page = lbr.start("dashboard", "--no-open")
    assert page.stdout is not None  # noqa: S101 - for the type checker
    address = next(word for line in page.stdout for word in line.split() if word.startswith("http"))
    crew = ("worker", "--run", "reviews", "--concurrency")
    lbr.start(*crew, "8", "--max-cost", "25")
    time.sleep(minutes * 20)
    lbr.start(*crew, "12")
    time.sleep(minutes * 40)
    return address


def take(browser: Browser, address: str) -> None:
    """Write the pictures."""
    for name, place, size, scheme in PICTURES:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("h1")
        page.evaluate("place => { location.hash = place }", place)
        page.wait_for_selector(".page:not([aria-busy])")
        if name == "dashboard-job":
            page.locator("tbody a").nth(3).click()
            page.wait_for_selector(".tree")
        page.wait_for_timeout(1000)
        file = DOCS / f"{name}.png"
        page.screenshot(path=file)
        print(f"{file}: {file.stat().st_size:,} bytes")
        if file.stat().st_size > MAX_BYTES:
            sys.exit(f"expected at most {MAX_BYTES:,} bytes")
        context.close()


def main() -> None:
    """Make the runs, wait, and take the pictures."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        lbr = Cli(folder)
        try:
            fill(folder, lbr)
            address = watch(lbr, minutes)
            path = shutil.which("chromium")
            with playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
            ) as browser:
                take(browser, address)
        finally:
            lbr.stop_all()


if __name__ == "__main__":
    main()
