"""Documents that no training reads, by file and by kind of text."""

from __future__ import annotations

from pathlib import Path

from lola_vllm.evaluation import EvalError
from lola_vllm.training.texts import is_held_out, kind_of, read_documents


def read_held_out(path: Path) -> dict[str, list[str]]:
    """Held-out documents at `path`.

    Args:
        path: a text file, or a directory of them.

    Returns:
        Per file, by its name without ending, its held-out documents in order; files without any
        are left out.

    Raises:
        EvalError: no such path, no text file, or nothing held out.
        TextsError: a file that is not UTF-8 or has no text.
    """
    if not path.exists():
        raise EvalError(f"--texts {path}: no such file or directory")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"--texts {path}: no .txt file there")
    documents = {file.stem: list(filter(is_held_out, read_documents(file))) for file in files}
    found = {name: of_file for name, of_file in documents.items() if of_file}
    if not found:
        raise EvalError(
            f"--texts {path}: no document is held out from training, which about one in twenty "
            "is; give more text"
        )
    return found


def read_kinds(path: Path, wanted: list[str]) -> dict[str, dict[str, list[str]]]:
    """Held-out documents at `path`, by kind of text and by file.

    Args:
        path: as `read_held_out` takes it.
        wanted: kinds or names of files, in this order; none: all kinds that there are.

    Raises:
        EvalError: a kind that there is not, or nothing held out.
    """
    documents = read_held_out(path)
    found: dict[str, dict[str, list[str]]] = {}
    for name, of_file in documents.items():
        found.setdefault(kind_of(name), {})[name] = of_file
    for kind in wanted:
        if kind not in found:
            if kind not in documents:
                raise EvalError(
                    f"--texts {path}: has no {kind}, only {', '.join(found)} in the files "
                    f"{', '.join(documents)}; give others"
                )
            found[kind] = {kind: documents[kind]}
    return {kind: found[kind] for kind in wanted or found}
