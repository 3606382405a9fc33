"""Pinned files from pip's indexes, here a server of our own, and from its directories."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.texts.package_index import DownloadError, PinnedFile, fetch_file

DATA = b"a source distribution"
FILE = PinnedFile("poems", "1.0", "poems-1.0.tar.gz", hashlib.sha256(DATA).hexdigest())
PAGE = (
    b'<a href="../../files/poems-0.9.tar.gz">poems-0.9.tar.gz</a> '
    b'<a href="../../files/poems-1.0.tar.gz#sha256=0">poems-1.0.tar.gz</a>'
)


class Index(ThreadingHTTPServer):
    """Serves pages by path, and remembers what it was asked for and with which password."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages = {"/simple/poems/": PAGE, "/files/poems-1.0.tar.gz": DATA}
        self.asked: list[tuple[str, str | None]] = []
        self.password: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        index = self.server
        given = self.headers.get("Authorization")
        index.asked.append((self.path, given))
        wanted = index.password and "Basic " + base64.b64encode(index.password.encode()).decode()
        if wanted and given != wanted:
            self.send_error(401)
        elif self.path in index.pages:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(index.pages[self.path])
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The only index that pip knows of."""
    server = Index()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield server
    server.shutdown()
    server.server_close()


def test_the_file_that_the_index_links_to(index: Index, tmp_path: Path) -> None:
    path = fetch_file(FILE, tmp_path)
    assert path == tmp_path / "poems-1.0.tar.gz" and path.read_bytes() == DATA
    assert [path for path, _ in index.asked] == ["/simple/poems/", "/files/poems-1.0.tar.gz"]


def test_the_password_of_an_index_is_used_and_not_shown(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.password = "me:s@cret"
    with pytest.raises(DownloadError, match="401"):
        fetch_file(FILE, tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%40cret@127.0.0.1:{index.server_port}/simple")
    assert fetch_file(FILE, tmp_path).read_bytes() == DATA
    del index.pages["/simple/poems/"]
    with pytest.raises(DownloadError, match="404") as error:
        fetch_file(FILE, tmp_path)
    assert "cret" not in str(error.value)
