"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

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
        port = next(found[1] for found in started if found)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            browser = Browser(client)
            try:
                yield browser
            finally:
                browser.quit()
    finally:
        driver.terminate()
        driver.wait(10)
