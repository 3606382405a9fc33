"""A text cut into parts that a state holds well, and the sentence at a place of a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# Three documents of so many tokens share a state of the demo model well (docs/library.md).
PART_TOKENS = 2000
# Of a part that the next one begins with.
SHARED_TOKENS = 40
# Where a text may be cut, the best places first: behind paragraphs, lines, sentences and words.
_BORDERS = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
MAX_SENTENCE = 500  # characters that are shown


def split_text(text: str, most: int, count: Callable[[str], int]) -> list[str]:
    """Cut a text into parts of about `most` tokens, at paragraph borders where there are some.

    A part but the first begins with the end of the one before, of `SHARED_TOKENS` tokens or
    more, so that what stands at a border is whole in one of the two.

    Args:
        most: tokens of a part, 4 times `SHARED_TOKENS` or more. count: tokens of a text.
    """
    parts, part, size = list[str](), "", 0
    for piece, tokens in _pieces(text, most - 2 * SHARED_TOKENS, count, 0):
        if part.strip() and size + tokens > most:
            parts.append(part)
            part = _end_of(part, count)
            size = count(part)
        part, size = part + piece, size + tokens
    return [*parts, part] if part.strip() else parts


def _pieces(
    text: str, most: int, count: Callable[[str], int], border: int
) -> Iterator[tuple[str, int]]:
    """Pieces of at most so many tokens, with their tokens; together they are the text."""
    tokens = count(text)
    if tokens <= most and border:
        yield text, tokens
    elif border == len(_BORDERS):  # a word longer than a part
        size = max(1, len(text) * most // tokens // 2)
        for start in range(0, len(text), size):
            yield text[start : start + size], count(text[start : start + size])
    else:
        start = 0
        for found in re.finditer(_BORDERS[border], text):
            yield from _pieces(text[start : found.end()], most, count, border + 1)
            start = found.end()
        if start < len(text):
            yield from _pieces(text[start:], most, count, border + 1)


def _end_of(part: str, count: Callable[[str], int]) -> str:
    """The last words of a part, of `SHARED_TOKENS` tokens or more where it has so many."""
    size = 4 * SHARED_TOKENS
    while size < len(part) and count(part[-size:]) < SHARED_TOKENS:
        size += SHARED_TOKENS
    end = part[-size:]
    first = re.search(r"\s", end)
    if len(end) < len(part) and first is not None and count(end[first.end() :]) >= SHARED_TOKENS:
        return end[first.end() :]
    return end


def sentence_at(text: str, at: int) -> str:
    """The sentence of a text that has the character at `at`, on one line and cut to
    `MAX_SENTENCE`."""
    start, end = 0, len(text)
    for found in _SENTENCE_END.finditer(text):
        if found.end() <= at:
            start = found.end()
        elif found.start() >= at:
            end = found.start()
            break
    if end - start > MAX_SENTENCE:
        start = max(start, at - MAX_SENTENCE // 2)
        end = min(end, start + MAX_SENTENCE)
    return " ".join(text[start:end].split())
