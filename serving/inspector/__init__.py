"""The memory inspector: a page of plain HTML, CSS and JavaScript modules, without a build step.

It contacts only the server that it came from. The files lie in `page/`; a browser gets them as they
are, from `ROUTE` and below it.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import NamedTuple

# Not under /v1, which --api-key covers: a browser cannot send a key when it opens an address. The
# page holds no key and no data. It asks for the key, and sends it with its requests.
ROUTE = "/lola/inspector"

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
HEADERS = {
    # Nothing from elsewhere is loaded, and nothing is sent elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class File(NamedTuple):
    """A file of the page: its content type and its bytes."""

    kind: str
    body: bytes


@functools.cache
def page_files() -> dict[str, File]:
    """The files by name; the page itself has the name ''."""
    found = {}
    for file in (files(__name__) / "page").iterdir():
        name = file.name
        kind = _KINDS.get(name[name.rfind(".") :])
        if kind is not None:
            found["" if name == "page.html" else name] = File(kind, file.read_bytes())
    return found


def page_file(path: str) -> File | None:
    """The file at a path of the server, `ROUTE` or `ROUTE/name`; None: it is none of the page."""
    if path == ROUTE:
        return page_files()[""]
    name = path.removeprefix(f"{ROUTE}/")
    return page_files().get(name) if name and name != path else None
