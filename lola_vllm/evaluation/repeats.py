"""What a text says again, far back: recall in natural language, without a template.

Two measures, both of a plain reading of a window of text:

- Repeated n-grams (Arora et al., arXiv 2402.18668, section 3): tokens that complete an n-gram which
  stood in the window before. A model that recalls the first time predicts them better.
- The cloze, in LAMBADA's form (Paperno et al., arXiv 1606.06031): the last word of a sentence,
  where that word stood in the window before. It counts if each of its tokens is the model's first
  choice, which is what greedy decoding would write.

Both count a place only if the last time lies more than `DISTANCE` tokens back, so that no sliding
window of usual size holds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

DISTANCE = 128
NGRAM = 3
# Shorter words are mostly articles, pronouns and auxiliaries, which need no recall.
LEAST_LETTERS = 4
_LETTERS = re.compile(r"[^\W\d_]+")
_SENTENCE_END = (".", "!", "?")


class Repeats(NamedTuple):
    """Places of a window where it says something again.

    Attributes:
        ngrams: positions of tokens that complete a repeated n-gram, ascending.
        words: (first, stop) positions of the tokens of repeated last words, ascending.
    """

    ngrams: list[int]
    words: list[tuple[int, int]]


def find_repeats(ids: Sequence[int], pieces: Sequence[str]) -> Repeats:
    """The repeats of a window.

    Args:
        ids: `[n]`, the tokens. pieces: `[n]`, the text of each token alone; a word begins with a
            token whose text begins with white space.
    """
    words: list[tuple[int, int]] = []
    seen: dict[str, int] = {}
    for first, stop, word in _words(pieces):
        if (
            len(word) >= LEAST_LETTERS
            and stop < len(pieces)
            and pieces[stop].startswith(_SENTENCE_END)
            and first - seen.get(word, first) > DISTANCE
        ):
            words.append((first, stop))
        seen[word] = first
    return Repeats(_repeated_ngrams(ids), words)


def _repeated_ngrams(ids: Sequence[int]) -> list[int]:
    """Positions of the last tokens of repeated n-grams, ascending."""
    found: list[int] = []
    last: dict[tuple[int, ...], int] = {}
    for end in range(NGRAM - 1, len(ids)):
        ngram = tuple(ids[end - NGRAM + 1 : end + 1])
        if end - last.get(ngram, end) > DISTANCE:
            found.append(end)
        last[ngram] = end
    return found


def _words(pieces: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first, stop, lower-case text) of each word that consists of letters alone."""
    words = []
    first = 0
    while first < len(pieces):
        stop = first + 1
        while stop < len(pieces) and _LETTERS.fullmatch(pieces[stop]):
            stop += 1
        text = "".join(pieces[first:stop])
        if text[:1].isspace() and _LETTERS.fullmatch(text.strip()):
            words.append((first, stop, text.strip().lower()))
        first = stop
    return words
