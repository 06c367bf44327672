"""A headless Chromium for tests of the page: Debian's, driven by Playwright.

with Visit(browser, server.url) as visit:         # fails at its end if the page logged an error or left its server
    visit.page.fill("#prompt", "Hello")
    visit.ask("Hello")                            # by keyboard, and waits for the answers
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser's path; without one the test is skipped and says how to get it."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(NAMES)}): apt-get install chromium")
    return found


def launched() -> Iterator[Browser]:
    """A browser, for a fixture of module scope: Playwright holds an event loop that other tests must not meet."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in a context of its own, so that nothing is kept from one test to the next.

    refusals: whether answers of 400 and above are expected, which the browser logs as errors.
    """

    def __init__(self, browser: Browser, url: str, refusals: bool = False, ready: bool = True, **context: Any) -> None:
        self.url, self.refusals, self.ready = url, refusals, ready
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.errors: list[str] = []
        self.left: list[str] = []
        self.page.on("console", self._logged)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda request: self._asked(request.url))

    def _logged(self, message: Any) -> None:
        if message.type in ("error", "warning") and not (self.refusals and "Failed to load resource" in message.text):
            self.errors.append(message.text)

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url, f"blob:{self.url}")):
            self.left.append(url)

    def __enter__(self) -> Visit:
        self.page.goto(self.url)
        if self.ready:
            self.page.wait_for_selector("#model[data-state=ready]")
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.context.close()
        if kind is None:
            assert self.errors == []
            assert self.left == []

    def send(self, text: str) -> None:
        """Type a message and press Enter."""
        self.page.focus("#prompt")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")
        self.until("document.getElementById('prompt').value === ''")

    def ask(self, text: str) -> None:
        """`send`, and wait until nothing is written any more."""
        self.send(text)
        self.settle()

    def settle(self) -> None:
        self.until("!document.getElementById('send').hidden && !document.querySelector('.answer[aria-busy=true]')")

    def until(self, expression: str, seconds: float = 10) -> None:
        """Wait for an expression to hold. Not `wait_for_function`, which the page's security policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"still not: {expression}"
            self.page.wait_for_timeout(15)

    def text(self, variant: str) -> str:
        """The last turn's answer, as it is on the screen."""
        return str(self.page.locator(f".turn:last-child .answer.{variant} .text").text_content())

    def marked(self, variant: str) -> list[str]:
        return self.page.locator(f".turn:last-child .answer.{variant} mark").all_text_contents()

    def run(self, module: str, expression: str, argument: Any = None) -> Any:
        """Evaluate an expression over a module of the page (`m`) and an argument (`a`)."""
        return self.page.evaluate(
            f"async (a) => {{ const m = await import('/page/{module}'); return {expression}; }}", argument
        )
