"""Debian's chromium without a window, driven by its own protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.waiting import DEADLINE

PROGRAM = shutil.which("chromium")
_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
_OPTIONS += ["--remote-debugging-pipe", "--no-first-run", "--disable-background-networking"]
_MOST = 120.0
"""Seconds of a browser, from its start to its end."""


class Browser:
    """One page of it."""

    def __init__(self, asks: int, answers: int) -> None:
        """Args: asks, answers: files, of which the one is written and the other read."""
        self.said: list[dict[str, Any]] = []
        """What its policy refused, and exceptions that nothing caught."""
        self._asks, self._answers = os.fdopen(asks, "wb"), os.fdopen(answers, "rb")
        self._number, self._session, self._rest = 0, "", b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, before: str = "") -> None:
        """Go to a page. Args: before: a script that runs before the page's own."""
        if before:
            self._call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, as JSON has it."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until JavaScript is true; fail with the page's text if it never is."""
        end = time.monotonic() + DEADLINE
        while not self.evaluate(expression):
            assert time.monotonic() < end, self.evaluate("document.body.innerText")
            time.sleep(0.05)

    def screenshot(self, width: int, height: int) -> bytes:
        """A PNG."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._asks.close()
        self._answers.close()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._asks.write(json.dumps(message).encode() + b"\0")
        self._asks.flush()
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _note(self, event: dict[str, Any]) -> None:
        is_refusal = event.get("params", {}).get("entry", {}).get("source") == "security"
        if is_refusal or event.get("method") == "Runtime.exceptionThrown":
            self.said.append(event["params"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._answers.fileno(), 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own below a folder; it ends after a while, come what may."""
    assert PROGRAM is not None, "tests skip where it is not"
    to_read, asks = os.pipe()
    answers, to_write = os.pipe()
    # Its protocol is at the files 3 and 4.
    command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
    options = [*_OPTIONS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        ["bash", "-c", command, PROGRAM, *options],
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    watch = threading.Timer(_MOST, process.kill)
    watch.start()
    try:
        browser = Browser(asks, answers)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        watch.cancel()
        process.kill()
        process.wait()
