"""A headless Chromium for tests of the page, Debian's, driven by Playwright; and `ggufloop serve` for it to visit.

with Served(path, "--results", folder) as server, Visit(browser, server.url) as visit:
    visit.ask("Hello")                            # by keyboard, and waits for the answers
    visit.requests                                # what the page asked for
                                                  # fails here if the page logged an error or left its server

A tiny random model writes noise. Where a test needs words, the visit holds the model to them: a message that SCRIPTS
has is answered under a grammar which allows that answer alone, added to the request on its way. Everything else is the
server's: its sampling, stream, counts and times.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")

SCRIPTS = {
    "sky": (
        "Air scatters blue sunlight.",
        "Molecules of air scatter blue light far.",
    ),
    "same": ("Four.", "Four."),
    "markup": (
        "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>",
        "<b>bold</b> <a href='javascript:window.hit=3'>link</a> <svg onload='window.hit=4'></svg>",
    ),
    "code": (
        "Use **print**:\n\n```python\nprint(1)\n```\n\n- one\n- two\n\nSee [here](https://example.org).",
        "Use **print**:\n\n```python\nprint(2)\n```\n\n- one\n- *three*\n\nSee ![here](https://example.org/x.png).",
    ),
    "think": ("Let me see.\n</think>\nFour.", "So many.\n\nTwo of two.</think>\n\nFive."),
}
SLOW = "slow"
"""The message that is answered with as many words as are let be."""


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


class Served:
    """`ggufloop serve` with a model file, in a process of its own, until the block ends."""

    def __init__(self, model: Path, *words: str | Path, port: int = 0) -> None:
        self._model, self._words, self._port = model, words, port
        self.url = ""

    def __enter__(self) -> Served:
        code = "from ggufloop.cli import main; main()"
        words = ["serve", self._model, "-t", "1", "-c", "2048", "--port", str(self._port), *self._words]
        self._process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        told = []
        for line in self._process.stderr:
            told.append(line)
            if address := re.match(r"serving .* at (http://127\.0\.0\.1:(\d+)) ", line):
                self.url, self._port = f"{address[1]}/", int(address[2])
                return self
        self._process.wait()
        raise AssertionError("".join(told))

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=10)
        finally:
            self._process.kill()

    @property
    def port(self) -> int:
        return self._port

    def kill(self) -> None:
        """End llama-server as if it had crashed, and `serve` with it."""
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self._process.wait(10)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def at_work(self) -> int:
        """How many answers are being written."""
        return sum(slot["is_processing"] for slot in self.get("slots"))


class Visit:
    """A page in a context of its own, so that nothing is kept from one test to the next.

    refusals: whether answers of 400 and above are expected, which the browser logs as errors. before: called with the
    page before it is opened.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        refusals: bool = False,
        ready: bool = True,
        before: Callable[[Page], object] | None = None,
        **context: Any,
    ) -> None:
        self.url, self.refusals, self.ready = url, refusals, ready
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        if before is not None:
            before(self.page)
        self.requests: list[dict[str, Any]] = []
        self.context.route("**/v1/chat/completions", self._chat)
        self.errors: list[str] = []
        self.left: list[str] = []
        self.page.on("console", self._logged)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda request: self._asked(request.url))

    def _chat(self, route: Route) -> None:
        """Note what the page asks for, and hold the model to the words of SCRIPTS."""
        body = json.loads(route.request.post_data or "")
        self.requests.append(body)
        message = body["messages"][-1]["content"]
        more: dict[str, Any] = {}
        if message in SCRIPTS:
            answer = SCRIPTS[message][body["loop"] is not None]
            more["grammar"] = f"root ::= {json.dumps(answer)}"
        elif message == SLOW:
            more = {"grammar": 'root ::= "word " root', "max_tokens": 1500}
        with contextlib.suppress(Exception):  # the page has gone
            route.continue_(post_data=json.dumps({**body, **more}))

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
            f"async (a) => {{ const m = await import('/{module}'); return {expression}; }}", argument
        )
