"""A text of so many tokens, composed of many documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.stream import in_turn
from lola_vllm.training.texts import is_held_out, read_documents


class LongText(NamedTuple):
    """`ids`, and `about`: of what they are composed, for a report."""

    ids: list[int]
    about: dict[str, Any]


def compose(tokenizer: Tokenizer, path: Path, tokens: int, edge: int) -> LongText:
    """Documents of all kinds, interleaved, as many as it takes.

    Held-out documents, which no training has seen, make the first and the last `edge` tokens and as
    much between as there are of them. Others fill the middle. No document is said twice.

    Args:
        path: a directory of texts, or a file. tokens: of the whole.

    Raises:
        EvalError: there is not so much text, or too little of it is held out.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise EvalError(f"--texts {path}: no text there; 'lola-vllm texts --out DIR' writes some")
    kinds = [read_documents(file) for file in files]
    held_out = in_turn([[d for d in documents if is_held_out(d)] for documents in kinds])
    others = in_turn([[d for d in documents if not is_held_out(d)] for documents in kinds])

    used = 0

    def take(documents: list[str], wanted: int) -> list[int]:
        """From the front of `documents`, which lose what is taken."""
        nonlocal used
        ids: list[int] = []
        while documents and len(ids) < wanted:
            ids += tokenizer.encode(documents.pop(0) + "\n\n", special=False)
            used += 1
        return ids[:wanted]

    first, last = take(held_out, edge), take(held_out, edge)
    if len(last) < edge:
        raise EvalError(
            f"--edge {edge}: the held-out documents at --texts {path} have {len(first + last)} "
            f"tokens, and twice the edge are needed; ask for less"
        )
    middle = take(held_out, tokens - 2 * edge)
    kept = 2 * edge + len(middle)
    middle += take(others, tokens - kept)
    ids = first + middle + last
    if len(ids) < tokens:
        raise EvalError(
            f"--tokens {tokens}: the documents at --texts {path} have {len(ids)}; give more text"
        )
    return LongText(ids, {"documents": used, "held_out_tokens": kept, "tokens": tokens})
