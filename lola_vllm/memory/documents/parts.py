"""A text cut into parts that a state holds well."""

from __future__ import annotations

import re
from collections.abc import Callable

# Three documents of so many tokens share a state of the demo model well (docs/library.md).
PART_TOKENS = 2000
# Of a part that the next one begins with.
SHARED_TOKENS = 40
# Where a text may be cut, the best places first: behind paragraphs, lines, sentences and words.
_BORDERS = [re.compile(one) for one in (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")]
_WORD = re.compile(r"\S")


def split_text(text: str, most: int, count: Callable[[str], int]) -> list[str]:
    """Cut a text into parts of at most `most` tokens, at paragraph borders where there are some.

    A part but the first begins with the end of the one before, of `SHARED_TOKENS` tokens or
    more, so that what stands at a border is whole in one of the two. A part has words: where only
    white space follows for a whole part, it is left out.

    The characters that are counted grow with the length of the text, whatever stands in it.

    Args:
        most: tokens of a part, 4 times `SHARED_TOKENS` or more. count: tokens of a text.
    """
    parts, start, size = list[str](), 0, 4 * most
    while (word := _WORD.search(text, start)) is not None:
        if word.start() - start > size:
            start = word.start()
        size = _reach(text, start, most, count, size)
        end = _cut(text, start, start + size)
        while count(text[start:end]) > most:  # another cut makes other tokens
            end -= max(1, (end - start) // 16)
        parts.append(text[start:end])
        if end == len(text):
            break
        # Half of a part is new, so that the text comes to its end.
        start = max(end - len(_end_of(text[start:end], count)), (start + end + 1) // 2)
    return [part for part in parts if part.strip()]


def _reach(text: str, start: int, most: int, count: Callable[[str], int], size: int) -> int:
    """Characters from `start` on that have at most `most` tokens, and not many fewer.

    Args:
        size: a guess.
    """
    left = len(text) - start
    low, high = 0, 2 * left + 2  # characters with few enough tokens, and with too many
    while low < left and high - low > 1 + low // 16:
        if not low < size < high:
            size = min(2 * low + 1, (low + high) // 2)
        size = min(size, left)
        tokens = count(text[start : start + size])
        if tokens > most:
            high = size
        else:
            low = size
            if tokens > most - most // 16:
                break
        size = size * most // max(1, tokens)
    return max(1, low)


def _cut(text: str, start: int, end: int) -> int:
    """The best place for a cut in the second half of a piece of a text: its end is one."""
    half = (start + end + 1) // 2
    if end < len(text):
        for border in _BORDERS:
            places = [found.end() for found in border.finditer(text, half, end)]
            if places:
                return places[-1]
    return end


def _end_of(part: str, count: Callable[[str], int]) -> str:
    """The last words of a part, of `SHARED_TOKENS` tokens or more where it has so many."""
    size = SHARED_TOKENS // 4  # a character has up to four tokens
    while size < len(part) and count(part[-size:]) < SHARED_TOKENS:
        size += max(SHARED_TOKENS // 4, size // 4)
    end = part[-size:]
    first = re.search(r"\s", end)
    if len(end) < len(part) and first is not None and count(end[first.end() :]) >= SHARED_TOKENS:
        return end[first.end() :]
    return end
