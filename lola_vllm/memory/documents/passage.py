"""The sentence of a text that answers a question, and its neighbours."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from lola_vllm.memory.documents.words import WordIndex, by_rank, fuse

MAX_SENTENCE = 500  # characters that are shown
PASSAGE_CHARS = 400  # of a sentence and its neighbours, some 100 tokens
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
# What a sentence has that is none of marks and numbers alone.
_WORD = re.compile(r"[^\W\d_]{2}")
_BY_WORDS = 5  # sentences


class Passage(NamedTuple):
    """A sentence, and the sentence with its neighbours, each on one line."""

    sentence: str
    text: str


def passage_of(text: str, read: Sequence[int], question: str) -> Passage:
    """The passage of a text for a question: by what is read most, and by words.

    Args:
        read: places of characters, those that are read most first.

    Returns:
        A sentence of `MAX_SENTENCE` characters or fewer, and the whole sentences around it up to
        `PASSAGE_CHARS`. Both are empty where no sentence has words.
    """
    ends = [0, *(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]
    spans = [(a, b) for a, b in itertools.pairwise(ends) if _WORD.search(text, a, b)]
    if not spans:
        return Passage("", "")
    # Of what is read and has no words, the nearest sentence that has some.
    by_heads = [
        min(range(len(spans)), key=lambda i: max(spans[i][0] - at, at - spans[i][1] + 1, 0))
        for at in read
    ]
    words = WordIndex([text[a:b] for a, b in spans])
    order = fuse([by_rank(by_heads), by_rank(words.find(question, _BY_WORDS))])
    index = order[0] if order else 0
    start, end = spans[index]
    if end - start > MAX_SENTENCE:
        at = next((at for at in read if start <= at < end), start)
        start = max(start, min(at, end) - MAX_SENTENCE // 2)
        end = min(end, start + MAX_SENTENCE)
    first, last, room = start, end, PASSAGE_CHARS - (end - start)
    for begin, _ in reversed(spans[:index]):
        if start - begin > room / 2:
            break
        first = begin
    for _, stop in spans[index + 1 :]:
        if stop - first > PASSAGE_CHARS:
            break
        last = stop
    return Passage(_one_line(text[start:end]), _one_line(text[first:last]))


def before_question(passages: Sequence[tuple[str, str]]) -> str:
    """What stands before a question that is answered from passages, the best one next to it.

    Args:
        passages: titles and texts, the best first; those without a text are left out.
    """
    return "\n\n".join(f"{title}: {text}" for title, text in reversed(passages) if text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
