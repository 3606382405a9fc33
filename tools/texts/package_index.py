"""A known file from the package index that pip is set up for. No code in it is run.

`pip download` runs the `setup.py` of a source distribution, to learn its name. Here pip only finds
and copies the file, which is refused unless it has the expected hash.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# pip's own session and finder know its settings: indexes, passwords, proxies and certificates. They
# have no public form.
_COPY = """
import logging, pathlib, sys
from pip._internal.commands import create_command

package, name, out = sys.argv[1:]
logging.basicConfig(format="%(message)s")
logging.getLogger("pip._internal.index.collector").setLevel(logging.DEBUG)  # says what failed
command = create_command("download")
options, _ = command.parse_args(["--no-input", "--no-cache-dir"])
with command._build_session(options) as session:
    finder = command._build_package_finder(options, session)
    links = [found.link for found in finder.find_all_candidates(package)]
    link = next((link for link in links if link.filename == name), None)
    if link is None:
        sys.exit("not there")
    answer = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"})
    answer.raise_for_status()
    pathlib.Path(out).write_bytes(answer.content)
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
    path = directory / file.name
    command = [sys.executable, "-c", _COPY, file.package, file.name, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = (result.stderr.strip() or "no message").splitlines()
        reasons = [line for line in lines if line.startswith("Could not")] or lines[-1:]
        raise DownloadError(
            f"{file.name} of package {file.package} could not be downloaded "
            f"({'; '.join(reasons)}); check the network and `pip config list`, or put the file "
            "into a directory and name that in PIP_FIND_LINKS"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != file.sha256:
        path.unlink()
        raise DownloadError(
            f"{file.name} has sha256 {digest}, expected {file.sha256}; it is another file of this "
            "name, or was changed on the way: use another index"
        )
    return path
