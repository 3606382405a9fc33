"""axe-core, the accessibility checker: fetched by name into build/, for tests only."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Browser

PACKAGE = "axe-core@4.14.1"
FOLDER = Path(__file__).parents[2] / "build" / "axe"
FETCH_LIMIT_S = 120
# The rules of WCAG 2.2, levels A and AA.
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@functools.cache
def _script() -> str | None:
    """axe-core's source, and None where it cannot be had."""
    file = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
    if not file.exists():
        npm = shutil.which("npm")
        if npm is None:
            return None
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", PACKAGE, "--prefix", str(FOLDER), "--no-save", "--no-audit"]
        try:
            subprocess.run(
                [*command, "--no-fund", "--ignore-scripts"],
                check=True, capture_output=True, timeout=FETCH_LIMIT_S,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError):
            return None
    return file.read_text(encoding="utf-8")


def findings(browser: Browser) -> list[str]:
    """What axe-core finds wrong with the page as it is shown; skips the test where it is absent."""
    script = _script()
    if script is None:
        pytest.skip(f"{PACKAGE} could not be fetched with npm")
    browser.run(script)
    options: dict[str, Any] = {"runOnly": TAGS, "resultTypes": ["violations"]}
    found = browser.run("return axe.run(document, arguments[0])", options)
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
