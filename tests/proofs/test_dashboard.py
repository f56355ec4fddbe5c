"""The dashboard in a real browser: what its pages show and do, with hostile text and with what breaks meanwhile."""

from __future__ import annotations

import json
import re
import shutil
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support import Cli
from tests.support.http_server import Server, completion, reply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, BrowserContext, Dialog, Page, ViewportSize

DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
PATIENCE_MS = 30_000
OFFLINE = ("--model", "offline:echo")
IMAGE = "<img src=x onerror=alert(1)>"
HOSTILE = (
    IMAGE,
    "</script><script>alert(2)</script>",
    "\u202eright to left\u2066",
    "{{constructor.constructor('alert(3)')()}}",
)
BIG = "begin " + "<b>big</b> " * 100_000 + "end"
NOTE_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) => noteViolation(`${event.violatedDirective} ${event.blockedURI}`));"""

expect.set_options(timeout=PATIENCE_MS)


class Dashboard:
    """A queue with some runs, and the address of its dashboard with the token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cli = Cli(folder)
        self.cli.environment["OPENAI_API_KEY"] = "test"
        self.process, self.url = self.start()
        self.origin, self.token = self.url.split("/#")

    def start(self, *arguments: str) -> Any:
        """Start `lbr dashboard`; return its process and the address that it prints."""
        process = self.cli.start("dashboard", "--no-open", *arguments)
        assert process.stdout is not None
        assert process.stderr is not None
        for line in iter(process.stdout.readline, ""):
            if found := re.search(r"http://127\.0\.0\.1:\d+/#\S+", line):
                return process, found[0]
        raise AssertionError(process.stderr.read())

    def enqueue(self, name: str, prompts: list[str], *arguments: str) -> None:
        """Enqueue prompts into a run."""
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
        self.cli("enqueue", file.name, "--run", name, *arguments)

    @contextmanager
    def tab(self, browser: Browser, path: str = "", **options: Any) -> Iterator[Page]:
        """Open a page in a new tab; at the end, nothing was asked of another host and nothing broke a rule."""
        wrong: list[str] = []
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        context.add_init_script(NOTE_VIOLATIONS)
        context.expose_function("noteViolation", lambda text: wrong.extend([text]))

        def dismiss(dialog: Dialog) -> None:
            wrong.append(dialog.message)
            dialog.dismiss()

        context.on("dialog", dismiss)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("request", lambda request: self._check(request.url, wrong))
        page = context.new_page()
        page.goto(self.url)
        expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
        if path:
            go(page, path)
        yield page
        self._check_secrets(page, context)
        context.close()
        assert not wrong

    def _check(self, url: str, wrong: list[str]) -> None:
        if urlsplit(url).scheme != "data" and (not url.startswith(f"{self.origin}/") or self.token in url):
            wrong.append(url)

    def _check_secrets(self, page: Page, context: BrowserContext) -> None:
        assert self.token not in page.url
        assert context.cookies() == []


def go(page: Page, path: str) -> None:
    """Go to a page without loading the whole again."""
    page.evaluate("path => { location.hash = path }", path)
    expect(page.locator(".page[aria-busy]")).to_have_count(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser."""
    path = shutil.which("chromium")
    assert path, "these tests need chromium: `apt-get install chromium`"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Return a dashboard of a queue with a run that has failures, one with hostile text and one that waits."""
    folder = tmp_path_factory.mktemp("dashboard")
    driver = Cli(folder)
    prompts = [f"review number {number}" for number in range(80)]
    (folder / "sick.txt").write_text("\n".join(prompts))
    failing = ("--set", "failure_rate=0.3", "--set", "seed=4", "--max-attempts", "1")
    driver("enqueue", "sick.txt", *OFFLINE, *failing)
    lines = [{"prompt": text} for text in (*HOSTILE, BIG)]
    (folder / "hostile.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    driver("enqueue", "hostile.jsonl", *OFFLINE)
    driver("worker", check=False)  # jobs that failed are its exit code
    (folder / "waiting.txt").write_text("\n".join(prompts))
    driver("enqueue", "waiting.txt", "--model", "openai-chat:gpt-4o-mini", "--price", "in=1,out=2")
    made = Dashboard(folder)
    yield made
    made.cli.stop_all()


def test_from_a_failure_to_its_retry(dashboard: Dashboard, browser: Browser) -> None:
    """A run with failures, why they failed, one of them in full, and the number after a retry, without a reload."""
    failed = dashboard.cli.status("sick")["failed"]
    with dashboard.tab(browser) as page:
        page.evaluate("window.loaded = 1")
        page.get_by_role("link", name="sick").click()
        group = page.get_by_role("row").filter(has_text="OfflineFailure")
        expect(group).to_contain_text(f"{failed}")
        group.get_by_role("link", name="Show").click()
        expect(page.locator("tbody tr")).to_have_count(failed)
        page.locator("tbody tr a").first.click()
        attempt = page.get_by_role("listitem").filter(has_text="OfflineFailure")
        expect(attempt).to_contain_text("failed, by the setting failure_rate")
        page.go_back()
        page.get_by_role("button", name="Retry all that match").click()
        page.get_by_role("dialog").get_by_role("button", name="Retry them").click()
        expect(page.locator("#toast")).to_contain_text(f"{failed} jobs back to pending")
        expect(page.get_by_role("link", name="pending")).to_contain_text(f"{failed}")
        expect(page.locator("tbody tr")).to_have_count(0)
        assert page.evaluate("window.loaded") == 1
    assert dashboard.cli.status("sick")["pending"] == failed


def test_pause_resume_with_a_budget_and_cancel(dashboard: Dashboard, browser: Browser) -> None:
    with dashboard.tab(browser, "/runs/waiting") as page:
        page.get_by_role("button", name="Pause").click()
        expect(page.locator(".title .pill")).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        asked = page.get_by_role("dialog")
        asked.get_by_role("spinbutton").fill("2.5")
        asked.get_by_role("button", name="Resume").click()
        expect(page.locator(".title .pill")).to_have_text("active")
        expect(page.locator(".tiles")).to_contain_text("of $2.50")
        page.get_by_role("button", name="Cancel").click()
        asked.get_by_role("button", name="Back").click()
        expect(asked).to_have_count(0)
        page.get_by_role("button", name="Cancel").click()
        asked.get_by_role("button", name="Cancel the run").click()
        expect(page.locator(".title .pill")).to_have_text("cancelled")
    assert dashboard.cli.status("waiting")["cancelled"] == 80


PAGES = ("/", "/runs/sick", "/runs/sick/jobs", "/jobs/1", "/workers", "/batches", "/doctor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_and_the_colour_scheme(dashboard: Dashboard, browser: Browser, scheme: Any) -> None:
    with dashboard.tab(browser, viewport=PHONE, color_scheme=scheme) as page:
        for path in PAGES:
            go(page, path)
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", colour))) < 60) == (scheme == "dark")


def test_the_keyboard_is_enough(dashboard: Dashboard, browser: Browser) -> None:
    """Keys j and k move between rows, Enter opens one, and what has the focus is outlined."""
    with dashboard.tab(browser, "/runs/sick/jobs") as page:
        expect(page.locator("tbody tr")).to_have_count(50)
        for key in ("j", "j", "j", "k"):
            page.keyboard.press(key)
        focused = page.locator("tbody tr a:focus")
        expect(focused).to_have_text("1")
        assert focused.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
        page.keyboard.press("/")
        page.keyboard.type("number 7")
        page.keyboard.press("Enter")
        expect(page.locator("tbody tr")).to_have_count(11)
        page.locator("tbody tr a").last.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Input 79")
        page.keyboard.press("k")
        expect(page.get_by_role("heading", level=1)).to_have_text("Input 78")


def test_hostile_text_stays_text(dashboard: Dashboard, browser: Browser) -> None:
    """Markup in prompts and answers is shown as it is; nothing of it runs or loads (see `Dashboard.tab`)."""
    with dashboard.tab(browser, "/runs/hostile/jobs") as page:
        rows = page.locator("tbody tr")
        expect(rows).to_have_count(len(HOSTILE) + 1)
        for place, text in enumerate((*HOSTILE, BIG)):
            shown = text.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066")
            expect(rows.nth(place)).to_contain_text(shown[:20])
            rows.nth(place).locator("a").click()
            expect(page.locator("pre").first).to_contain_text(shown[:1000])
            assert page.locator("main :is(img, script, b, iframe)").count() == 0
            page.go_back()
        rows.last.locator("a").click()
        page.get_by_role("button", name="Show all").first.click()
        expect(page.locator("pre").first).to_contain_text("end")


def test_a_tab_without_the_token_asks_for_it(dashboard: Dashboard, browser: Browser) -> None:
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.goto(f"{dashboard.origin}/#/runs/sick")
    field = page.get_by_label("Token")
    for text, heading in (("wrong", "Paste the token"), (dashboard.url, "sick")):
        field.fill(text)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("sick")
    assert context.cookies() == []
    assert dashboard.token not in page.url
    context.close()


def test_what_the_page_shows_is_true_when_a_worker_and_a_model_die(dashboard: Dashboard, browser: Browser) -> None:
    """A model that goes away is reported as unreachable, a killed worker as gone; after both are back, all is answered."""
    held = Server(lambda _: reply(200, completion("fine"), seconds=0.05))
    with held, dashboard.tab(browser) as page:
        dashboard.cli.environment["OPENAI_BASE_URL"] = held.url
        dashboard.enqueue("served", [f"prompt {n}" for n in range(400)], "--model", "openai-chat:held")
        worker = dashboard.cli.start("worker", "--run", "served", "--concurrency", "2", "--lease", "5")
        dashboard.cli.wait_for("served", "done", 20)
        row = page.get_by_role("row").filter(has_text="served")
        expect(row).to_contain_text("in flight")
        held.stop()
        expect(row).to_contain_text("unreachable")
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        expect(page.get_by_label("Needs attention")).to_contain_text("lbr worker")
        held.start()
        done = dashboard.cli.status("served")["done"]
        expect(row).to_contain_text(f"{done} of 400")
        dashboard.cli("worker", "--run", "served")
        expect(row).to_contain_text("finished")
        expect(row).to_contain_text("400 of 400 (100 %)")


def test_a_dashboard_that_ends_is_said_to_be_away(dashboard: Dashboard, browser: Browser) -> None:
    """Numbers that are old are marked as old."""
    other = Dashboard(dashboard.folder)
    with other.tab(browser) as page:
        expect(page.locator("#live")).to_have_text("Live")
        other.process.kill()
        other.process.wait()
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        expect(page.get_by_role("alert")).to_contain_text("These numbers are from")
        expect(page.locator("#live")).to_have_text("Not live")
        expect(page.get_by_role("row").filter(has_text="sick")).to_be_visible()
    other.cli.stop_all()
