"""A real browser, a real JupyterLab, and what both complained about."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medlib.paths import NOTEBOOKS

CORAL = "04_coral.ipynb"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]  # as root, and without a graphics card
WAIT = 300_000  # ms; a machine that has nothing else to do needs a hundredth of it
TALL = {"width": 1400, "height": 2600}  # JupyterLab draws what is near the window


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


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs: its address, its token and the folder it serves."""

    address: str
    token: str
    folder: Path

    def notebook(self, name: str) -> str:
        """The address at which it opens a notebook of its folder."""
        return f"{self.address}/lab/tree/{name}?reset&token={self.token}"


@pytest.fixture(scope="module")
def lab(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab in a folder of its own, with a copy of notebook 04; its kernels work at scale ``ci``."""
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    shutil.copy(NOTEBOOKS / CORAL, folder)
    tracker = settings / "lab" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # every output is on the page, also those out of sight
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "MEDLIB_SCALE": "ci",
        "MEDLIB_PNG": "0",
        "JUPYTER_CONFIG_DIR": str(settings / "config"),
        "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "IPYTHONDIR": str(settings / "ipython"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser"]
    # A starved browser answers no ping in time; the server would then drop its connection, and messages with it.
    command += ["--ServerApp.tornado_settings={'ws_ping_interval': 0}", "--ServerApp.websocket_ping_interval=0"]
    log = settings / "log.txt"
    with log.open("w") as written:
        server = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT, cwd=folder)
    running = Lab(f"http://127.0.0.1:{port}", token, folder)
    try:
        wait_for(running, server, log)
        yield running
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(lab: Lab, server: subprocess.Popen, log: Path) -> None:
    """Returns once the server answers."""
    end = time.monotonic() + WAIT / 1000
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{lab.address}/api?token={lab.token}", timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {WAIT / 1000:.0f} s:\n{log.read_text()[-2000:]}")
