"""What is printed: texts of documents, models and other people must not act in a terminal."""

from __future__ import annotations

import builtins
import re
import sys
from typing import TextIO

# Control characters but tab and line end, which move the cursor, set colours and titles, or answer
# for the user; and those that turn the direction of what follows, so that a text reads otherwise.
_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_OVER = "\r\033[K"
_DIM = "\033[2m{}\033[0m"


def harmless(text: str) -> str:
    """A text without the characters that act in a terminal."""
    return _ACTING.sub("", text)


def print(
    *values: object,
    sep: str = " ",
    end: str = "\n",
    file: TextIO | None = None,
    flush: bool = False,
    over: bool = False,
    dim: bool = False,
) -> None:
    """Print values without the characters that act in a terminal.

    Args:
        over: in the place of what stands in the line. dim: less bright. Both in a terminal alone.
    """
    file = sys.stdout if file is None else file
    text = harmless(sep.join(map(str, values)))
    if file.isatty():
        text = (_OVER if over else "") + (_DIM.format(text) if dim else text)
    builtins.print(text, end=end, file=file, flush=flush)
