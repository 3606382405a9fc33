"""The chat page: a conversation in a browser, with the session's memory beside it.

The page is at `/` of a server of a LoLA model, and its files are below `ROUTE`. It uses some of the
inspector's files. Conversations are stored sessions, so only the server has their text.
"""

from __future__ import annotations

from lola_vllm.serving.static import File, files_of

ROUTE = "/lola/chat"


def page_files() -> dict[str, File]:
    """The files by name; the page itself has the name ''."""
    return files_of(__name__)
