"""The documents that no training has seen, by kind of text."""

from __future__ import annotations

from pathlib import Path

from lola_vllm.eval.errors import EvalError


def read_held_out(path: Path) -> dict[str, list[str]]:
    """Held-out documents at `path`.

    Args:
        path: a text file, or a directory of them, as `lola-vllm texts` writes it.

    Returns:
        Per file, by its name without ending, its held-out documents in order; files without any
        are left out.

    Raises:
        EvalError: no such path, no text file, or nothing held out.
        TextsError: a file that is not UTF-8 or has no text.
    """
    from lola_vllm.texts import is_held_out, read_documents

    if not path.exists():
        raise EvalError(
            f"--texts {path}: no such file or directory; 'lola-vllm texts --help' says how to get "
            "some"
        )
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise EvalError(f"--texts {path}: no .txt file there")
    kinds = {file.stem: list(filter(is_held_out, read_documents(file))) for file in files}
    found = {kind: documents for kind, documents in kinds.items() if documents}
    if not found:
        raise EvalError(
            f"--texts {path}: no document is held out from training, which about one in twenty "
            "is; give more text"
        )
    return found
