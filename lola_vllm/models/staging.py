"""Directories that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lola_vllm.models.files import CheckpointError


def check_output(out: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise unless a model directory may be written to `out`.

    Args:
        out: need not exist, and may be an empty directory.
        force: whether a model directory (one with a `config.json`) at `out` may be replaced.
        inputs: directories that are read from, which replacing `out` must not delete.

    Raises:
        CheckpointError: names the path and the remedy.
    """
    resolved = out.resolve()
    for path in inputs:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise CheckpointError(f"{out}: writing there would replace {path}; choose another path")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: not a directory; choose another path")
    if not any(out.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{out}: not empty; choose another path or give --force")
    if not (out / "config.json").is_file():
        # A mistyped path must not delete a home directory.
        raise CheckpointError(f"{out}: --force replaces a model only, and there is no config.json")


@contextmanager
def staged_directory(
    out: Path, *, force: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """A temporary directory beside `out` that replaces it when the block succeeds.

    If the block raises, the temporary directory is deleted and `out` is unchanged.

    Args:
        out, force, inputs: as in `check_output`, which is called first.

    Yields:
        The empty directory to fill.
    """
    check_output(out, force=force, inputs=inputs)
    out = out.resolve()
    new_parents = [path for path in out.parents if not path.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    # One private directory holds the new files, and the old ones while they are swapped. It is on
    # the file system of `out`, so both moves are renames.
    private = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        staging = private / "new"
        staging.mkdir()
        yield staging
        _follow_umask(staging)
        check_output(out, force=force)  # `out` may have been filled meanwhile
        _swap(staging, out, private / "old")
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        for path in new_parents:
            with suppress(OSError):  # another process may have put files there
                path.rmdir()
        raise
    shutil.rmtree(private)


def _follow_umask(staging: Path) -> None:
    """Give every file the mode it would have from `open`; safetensors makes them 0600."""
    mode = staging.stat().st_mode & 0o666
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _swap(staging: Path, out: Path, old: Path) -> None:
    had_one = out.exists()
    if had_one:
        os.rename(out, old)
    try:
        os.rename(staging, out)
    except BaseException:
        if had_one:
            os.rename(old, out)
        raise
