"""Files of texts to train and to measure on, and which of their documents training leaves out.

A file is UTF-8, its documents separated by `SEPARATOR`. `is_held_out` decides, from a document's
text alone, whether it is kept for measuring. Training leaves such a document out, whatever its
file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

SEPARATOR = "\n\n\0\n\n"
# Beside the files: names and licences of the texts, as `tools/texts` writes them.
MANIFEST = "SOURCES.json"
HELD_OUT_ONE_IN = 20
PIECE_WORDS = 3000
# By the names of files that `tools/texts` writes.
KINDS = {
    **dict.fromkeys(("shakespeare_milton", "web_bible", "jane_austen", "anarchism_faq"), "prose"),
    **dict.fromkeys(
        ("python_docs", "postgres_docs", "debian_handbook", "debian_handbook_fr", "perl_docs"),
        "documentation",
    ),
    "python_code": "code",
}


class TextsError(ValueError):
    """A text could not be fetched, or a file of texts is damaged or of another kind."""


def kind_of(name: str) -> str:
    """The kind of text in a file: "prose", "documentation", "code", or else the file's own name.

    Args:
        name: of the file, without its ending.
    """
    return KINDS.get(name, name)


def is_held_out(document: str) -> bool:
    """Whether a document is for measuring and must not be trained on. About one in twenty is.

    Args:
        document: its text; white space around it does not count.

    Returns:
        The same answer for the same text, on every machine and in every file.
    """
    digest = hashlib.sha256(document.strip().encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """The documents of a text file, held-out ones among them.

    Args:
        path: a UTF-8 file, its documents separated by a NUL character; without one, the file is
            one document and is cut into pieces, so that `is_held_out`
            has something to choose from.

    Returns:
        The documents that are not blank, in order.

    Raises:
        TextsError: no such file, not UTF-8, or nothing in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextsError(f"{path}: not UTF-8 ({error}); convert it first") from None
    except OSError as error:
        raise TextsError(f"{path}: cannot be read ({error.strerror})") from None
    documents = text.split("\0") if "\0" in text else cut_document(text)
    documents = [stripped for document in documents if (stripped := document.strip())]
    if not documents:
        raise TextsError(f"{path}: no text in it")
    return documents


def cut_document(document: str, piece_words: int = PIECE_WORDS) -> list[str]:
    """Cut a document into nearly equal pieces at paragraph borders.

    Args:
        document: paragraphs separated by empty lines.
        piece_words: a piece has at most about 4/3 of these words, unless one paragraph has more.

    Returns:
        The pieces in order; joined with empty lines they are the document.
    """
    paragraphs = [part for part in re.split(r"\n\s*\n", document.strip()) if part]
    counts = [len(paragraph.split()) for paragraph in paragraphs]
    number = max(1, round(sum(counts) / piece_words))
    pieces: list[list[str]] = [[] for _ in range(number)]
    words = 0
    for paragraph, count in zip(paragraphs, counts, strict=True):
        # By the paragraph's middle, so that a border falls on the nearer side of it.
        pieces[min(number - 1, int((words + count / 2) * number / sum(counts)))].append(paragraph)
        words += count
    return ["\n\n".join(piece) for piece in pieces if piece]
