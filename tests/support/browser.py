"""A real browser: headless Chromium, driven through ChromeDriver's own protocol (W3C WebDriver)."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.ports import free_port

MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element's id
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1700,1100",
]


class Browser:
    """One page."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._session}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._ask("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script of the page returns."""
        return self._ask("execute/sync", {"script": script, "args": list(arguments)})

    def text(self) -> str:
        """All text on the page."""
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def wait(self, what: Callable[["Browser"], Any], seconds: float = 60) -> Any:
        """What is true of the page once it is; the page's text is shown where it does not become so."""
        deadline = time.monotonic() + seconds
        while not (found := what(self)):
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.3)
        return found

    def wait_for(self, text: str, seconds: float = 60) -> None:
        self.wait(lambda page: text in page.text(), seconds)

    def click(self, xpath: str, seconds: float = 60) -> None:
        """Click the first element of an XPath, as a person does, once it is there."""

        def clicked(page: "Browser") -> bool:
            with contextlib.suppress(urllib.error.HTTPError):  # not there yet, or moved since
                element = page._ask("element", {"using": "xpath", "value": xpath})[ELEMENT]
                page._ask(f"element/{element}/click", {})
                return True
            return False

        self.wait(clicked, seconds)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    port = free_port()
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{server}/status", timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.2)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            arguments = [*OPTIONS, f"--user-data-dir={profile}"]
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}}
            request = urllib.request.Request(
                f"{server}/session", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                session = f"{server}/session/{json.load(answer)['value']['sessionId']}"
            try:
                yield Browser(session)
            finally:
                urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=30)
    finally:
        driver.terminate()
        driver.wait()
