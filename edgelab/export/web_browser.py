"""A real Chromium with the page in it, whose every way out is a wall that counts."""

import base64
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelab.export import NoRuntimeError


def chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def find_browser():
    """(playwright's sync_playwright, path of Chromium)."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoRuntimeError(
            'the page is verified in a browser, driven by playwright: pip install "edgelab[web]"; check=False (--no-verify) leaves that out'
        ) from None
    path = chromium()
    if path is None:
        raise NoRuntimeError(
            "the page is verified in a real browser, and there is no Chromium or Chrome on the PATH "
            "(Debian and Ubuntu: apt install chromium); check=False (--no-verify) leaves that out"
        )
    return sync_playwright, path


class Wall:
    """A proxy on 127.0.0.1 that lets nothing through and writes down what was asked: a browser's only way out leads here.

    It sees what a page's own counter and the driver's interception cannot: requests of workers, service workers and of the browser.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                peer.settimeout(2)
                line = peer.recv(2048).split(b"\r\n", 1)[0].decode("latin-1")
                if line:
                    self.asked.append(line)
                peer.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def arguments(self) -> list[str]:
        """Chromium's: everything but 127.0.0.1 goes to this proxy, and the browser has no business of its own."""
        return [
            "--no-sandbox",
            f"--proxy-server=http://127.0.0.1:{self.port}",
            "--proxy-bypass-list=127.0.0.1",
            # what the browser would ask for by itself, on any page: updates, the time, its accounts, hints how to fill in forms
            "--disable-features=AutofillServerCommunication,OptimizationHints,MediaRouter,Translate,NetworkTimeServiceQuerying",
            "--disable-background-networking",
            "--disable-component-update",
            "--component-updater=url-source=http://127.0.0.1:9/",
            "--gaia-url=http://127.0.0.1:9/",
            "--disable-domain-reliability",
            "--disable-sync",
            "--no-first-run",
            "--no-pings",
        ]


@dataclass
class Opened:
    """A page in a browser: the tab, what was asked of other addresses (`asked`), the scripts' errors."""

    tab: object
    wall: Wall
    intercepted: list[str]
    errors: list[str]

    @property
    def asked(self) -> list[str]:
        return [*self.wall.asked, *self.intercepted]

    def logits(self, ids: np.ndarray, step: int | None = None) -> np.ndarray:
        """float32 [T, vocabulary] of the page's own runtime; `step`: fed in pieces of that many tokens, through the cache."""
        raw = self.tab.evaluate(
            """async ([ids, step]) => {
                const bytes = new Uint8Array((await edgelab.logits(ids, step ?? undefined)).buffer);
                let text = "";
                for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
                return btoa(text);
            }""",
            [ids.tolist(), step],
        )
        return np.frombuffer(base64.b64decode(raw), np.float32).reshape(len(ids), -1)


@contextmanager
def opened(profile: str | Path, address: str, **context) -> Iterator[Opened]:
    """The page at `address` in a Chromium with the user data folder `profile`, ready to answer, every other address walled off."""
    sync_playwright, path = find_browser()
    origin = "/".join(address.split("/")[:3]) + "/"
    wall = Wall()
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch_persistent_context(
                str(profile), executable_path=path, args=wall.arguments(), **({"viewport": {"width": 1280, "height": 800}} | context)
            )
            try:
                intercepted: list[str] = []
                errors: list[str] = []

                def decide(route):
                    url = route.request.url
                    if url.startswith((origin, "blob:", "data:")):
                        route.continue_()
                    else:
                        intercepted.append(url)
                        route.abort()

                browser.route("**/*", decide)
                tab = browser.pages[0] if browser.pages else browser.new_page()
                tab.set_default_timeout(120_000)
                tab.on("pageerror", lambda e: errors.append(str(e)))
                tab.goto(address)
                yield Opened(tab, wall, intercepted, errors)
            finally:
                browser.close()
    finally:
        wall.close()
