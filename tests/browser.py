"""What headless Chromium makes of a page: what it asks for, what it complains about, and how wide it is.

Driven through its debugging pipe (JSON messages that end in a zero byte), which needs no port and no package.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
]
_COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Tab:
    """One tab of a running browser."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._number, self._waiting = to, back, 0, b""
        self._session: dict[str, str] = {}
        self._events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer)
        assert "result" in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            read = os.read(self._back, 1 << 16)
            assert read, "the browser has ended"
            self._waiting += read
        first, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(first)

    def show(self, page: Path, width: int, dark: bool = False) -> dict[str, Any]:
        """Load `page` at this width: its requests besides itself, complaints, and the width that it takes."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        asked = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return {
            "requests": [url for url in asked if url != page.as_uri()],
            "complaints": [event["params"] for event in self._events if event["method"] in _COMPLAINTS],
            "width": size["width"],
        }

    def picture(self, path: Path) -> None:
        """Write the whole page that is shown as PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """A tab of a new browser with a profile of its own, which ends with the block."""
    assert CHROMIUM
    (theirs_in, to), (back, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from descriptor 3 and writes to 4.
        program = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", program, "-", CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL) as process:
            os.close(theirs_in)
            os.close(theirs_out)
            try:
                yield Tab(to, back)
            finally:
                process.kill()
                os.close(to)
                os.close(back)
