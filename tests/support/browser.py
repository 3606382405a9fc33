"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol gives elements
PROGRAMS = ("chromium", "chromedriver")


class Browser:
    """One tab."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        options = {"args": ["--headless=new", "--disable-gpu", "--window-size=1200,900"]}
        if os.geteuid() == 0:  # its sandbox refuses root
            options["args"].append("--no-sandbox")
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self._client.request(method, path, json=body)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    def _do(self, method: str, path: str, **body: Any) -> Any:
        return self._send(method, self._session + path, body if method == "POST" else None)

    def quit(self) -> None:
        self._send("DELETE", self._session)

    def open(self, url: str) -> None:
        self._do("POST", "/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """The value of a function body in the page."""
        return self._do("POST", "/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def _find(self, selector: str) -> str:
        found = self._do("POST", "/element", using="css selector", value=selector)
        return str(found[ELEMENT])

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds, by keys."""
        element = self._find(selector)
        self._do("POST", f"/element/{element}/clear")
        self._do("POST", f"/element/{element}/value", text=text)

    def press(self, selector: str, keys: str) -> None:
        """Press keys in an element that has a value of its own, a slider say."""
        self._do("POST", f"/element/{self._find(selector)}/value", text=keys)

    def click(self, selector: str) -> None:
        self._do("POST", f"/element/{self._find(selector)}/click")

    def hover(self, selector: str) -> None:
        """Move the mouse over an element."""
        origin = {ELEMENT: self._find(selector)}
        move = {"type": "pointerMove", "origin": origin, "x": 0, "y": 0, "duration": 0}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._do("POST", "/actions", actions=[mouse])

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the page this size, in CSS pixels, and the light or the dark scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def save_to(self, directory: Path) -> None:
        """Where the browser puts what a page saves."""
        where = {"behavior": "allow", "downloadPath": str(directory)}
        self._devtools("Browser.setDownloadBehavior", where)

    def _devtools(self, command: str, fields: dict[str, Any]) -> None:
        self._do("POST", "/goog/cdp/execute", cmd=command, params=fields)

    def picture(self, file: Path) -> Path:
        """What the page shows now, as a PNG file of 128 colours: a third of the bytes of all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        shot = Image.open(io.BytesIO(base64.b64decode(self._do("GET", "/screenshot"))))
        shot.convert("RGB").quantize(128).save(file, optimize=True)
        return file

    def keys(self, *keys: str, held: str = "") -> None:
        """Press keys, one after the other, where the focus is; `held` stays down meanwhile."""
        steps = [{"type": "keyDown", "value": held}] if held else []
        for key in keys:
            steps += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        steps += [{"type": "keyUp", "value": held}] if held else []
        self._do("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def drag(self, start: str, stop: str) -> None:
        """Press the mouse on one element and release it on another."""
        move = {"type": "pointerMove", "x": 0, "y": 0, "duration": 50}
        steps = [
            {**move, "origin": {ELEMENT: self._find(start)}},
            {"type": "pointerDown", "button": 0},
            {**move, "origin": {ELEMENT: self._find(stop)}},
            {"type": "pointerUp", "button": 0},
        ]
        self._do("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])

    def errors(self) -> list[str]:
        """What the page wrote to the console as errors since the last call."""
        log = self._do("POST", "/se/log", type="browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def wait(self, condition: Callable[[], Any], limit: float = 60) -> Any:
        deadline = time.monotonic() + limit
        while not (value := condition()):
            assert time.monotonic() < deadline, "the page did not get there"
            time.sleep(0.1)
        return value


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install chromium chromium-driver")
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert driver.stdout is not None
        started = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
        port = next((found[1] for found in started if found), None)
        assert port, "chromedriver did not start"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            browser = Browser(client)
            try:
                yield browser
            finally:
                browser.quit()
    finally:
        driver.terminate()
        driver.wait(10)
