"""The memory inspector: one HTML page that contacts only the server it came from.

Style and script are files beside it. They are inserted here, so that one route serves all of it.
"""

from __future__ import annotations

import functools
from importlib.resources import files


@functools.cache
def inspector_page() -> str:
    """The whole page."""
    folder = files(__name__)
    page, style, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "script.js")
    )
    return page.replace("/* style.css */", style).replace("/* script.js */", script)
