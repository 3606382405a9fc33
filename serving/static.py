"""Files of web pages: plain HTML, CSS and JavaScript modules, as browsers get them.

A page contacts only the server that it came from. Its files hold neither a key nor data, so they
are served without the API key: a browser cannot send one when it opens an address.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import NamedTuple

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
    """A file of a page: its content type and its bytes."""

    kind: str
    body: bytes


@functools.cache
def files_of(package: str) -> dict[str, File]:
    """The files in a package's folder `page/`, by name; `page.html` has the name ''."""
    found = {}
    for file in (files(package) / "page").iterdir():
        name = file.name
        kind = _KINDS.get(name[name.rfind(".") :])
        if kind is not None:
            found["" if name == "page.html" else name] = File(kind, file.read_bytes())
    return found
