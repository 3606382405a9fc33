"""The memory inspector: a page of plain HTML, CSS and JavaScript modules, without a build step.

The files lie in `page/`; a browser gets them as they are, from `ROUTE` and below it.
"""

from __future__ import annotations

from lola_vllm.serving.static import File, files_of

# Not under /v1, which --api-key covers. The page asks for the key, and sends it with its requests.
ROUTE = "/lola/inspector"


def page_files() -> dict[str, File]:
    """The files by name; the page itself has the name ''."""
    return files_of(__name__)


def page_file(path: str) -> File | None:
    """The file at a path of the server, `ROUTE` or `ROUTE/name`; None: it is none of the page."""
    if path == ROUTE:
        return page_files()[""]
    name = path.removeprefix(f"{ROUTE}/")
    return page_files().get(name) if name and name != path else None
