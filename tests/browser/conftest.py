"""A real browser, and what it complained about."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # as root, and without a graphics card
WAIT = 300_000  # ms; a machine that has nothing else to do needs a hundredth of it


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where Playwright or Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make setup")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page complained about, and what it asked of other hosts."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def follow(self, page: Any, home: str) -> None:
        """Listen to ``page``; ``home`` is how an address begins that is not another host's."""
        page.on("console", lambda m: self.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        own = (home, "data:", "blob:", home.replace("http:", "ws:"))
        page.on("request", lambda r: None if r.url.startswith(own) else self.outside.append(r.url))


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., tuple[Any, Watch]]]:
    """Opens an address in a page of its own: ``open_page(address, home, **settings)`` gives the page and its watch."""
    contexts = []

    def opened(address: str, home: str, **settings: Any) -> tuple[Any, Watch]:
        context = chromium.new_context(**settings)
        contexts.append(context)
        page, watch = context.new_page(), Watch()
        page.set_default_timeout(WAIT)
        watch.follow(page, home)
        page.goto(address)
        return page, watch

    yield opened
    for context in contexts:
        context.close()
