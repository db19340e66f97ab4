"""A headless Chromium, driven over WebDriver (W3C), for tests of pages.

    with Browser(width=1000, height=700) as browser:
        browser.open(path)
        browser.click("#t0-3")
        assert browser.text("#facts") == "..."

Tests that need one are skipped where there is no chromedriver (Debian: chromium and chromium-driver).
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import pytest

DRIVER: Final = shutil.which("chromedriver")
CHROMIUM: Final = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    DRIVER is None or CHROMIUM is None, reason="chromium and chromedriver are not installed"
)
KEYS: Final = {
    "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
    "Home": "\ue011", "End": "\ue010", "Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004",
    "PageUp": "\ue00e", "PageDown": "\ue00f",
}  # fmt: skip
"""How WebDriver writes keys that are no letters."""
_ELEMENT: Final = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A window of this size, in pixels."""

    def __init__(self, width: int = 1100, height: int = 760) -> None:
        self.size = (width, height)

    def __enter__(self) -> "Browser":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.root = f"http://127.0.0.1:{port}"
        self._until_ready()
        size = f"--window-size={self.size[0]},{self.size[1]}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", size]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.root += f"/session/{made['sessionId']}"
        metrics = {"width": self.size[0], "height": self.size[1], "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(timeout=20)

    def open(self, path: Path) -> None:
        """Show a file."""
        self._ask("POST", "/url", {"url": path.resolve().as_uri()})

    def js(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """The text of the first element that fits."""
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that fit."""
        return self.js(
            "return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)", selector
        )

    def click(self, selector: str, at: tuple[float, float] | None = None) -> None:
        """Move the pointer to an element (its middle, or a place from its upper left corner), and click."""
        self._point(selector, at, [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}])

    def hover(self, selector: str, at: tuple[float, float] | None = None) -> None:
        """Move the pointer to an element."""
        self._point(selector, at, [])
        self.frame()

    def keys(self, *keys: str) -> None:
        """Press keys one after the other: letters, or names of `KEYS`."""
        pressed = [
            {"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self._act({"type": "key", "id": "keys", "actions": pressed})
        self.frame()

    def frame(self) -> None:
        """Wait until what was to be drawn is drawn."""
        done = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(1)))"
        self._ask("POST", "/execute/async", {"script": done, "args": []})

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        script = (
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('change', {bubbles: true})); return e.value"
        )
        assert self.js(script, selector, value) == value, f"{selector} has no option {value}"

    def into_frame(self, selector: str) -> None:
        """Go on within an iframe."""
        self._ask("POST", "/frame", {"id": self._find(selector)})

    def errors(self) -> list[str]:
        """What the console says, errors and refused loads among it."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools Protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def picture(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def _find(self, selector: str) -> dict[str, str]:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})

    def _point(self, selector: str, at: tuple[float, float] | None, then: list[dict[str, Any]]) -> None:
        script = (
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'nearest'});"
            "const r = e.getBoundingClientRect(), p = e.getClientRects()[0];"
            "return [p.x + p.width / 2, p.y + p.height / 2, r.x, r.y]"
        )
        middle_x, middle_y, x, y = self.js(script, selector)
        place = (middle_x, middle_y) if at is None else (x + at[0], y + at[1])
        move = {"type": "pointerMove", "duration": 0, "x": round(place[0]), "y": round(place[1])}
        self._act({"type": "pointer", "id": "mouse", "actions": [move, *then]})

    def _act(self, source: dict[str, Any]) -> None:
        self._ask("POST", "/actions", {"actions": [source]})

    def _until_ready(self) -> None:
        for _ in range(200):
            try:
                if self._ask("GET", "/status")["ready"]:
                    return
            except (OSError, RuntimeError):
                time.sleep(0.05)
        raise RuntimeError("chromedriver does not answer")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            said = json.load(error)["value"]
            raise RuntimeError(f"{path}: {said['error']}: {said['message']}") from error
