"""Which of many texts have the words of a question, by BM25.

The heads of a model find what a question means, and words find names: a name is a word that few
texts have. `fuse` puts the two together.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


class WordIndex:
    """Texts by their words.

    Args:
        texts: to look in, one or more.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s  # type: ignore[import-untyped,unused-ignore]  # it takes a second

        self._tokenize = functools.partial(
            bm25s.tokenize, stopwords="en", return_ids=False, show_progress=False
        )
        words = self._tokenize(list(texts))
        self._texts, self._index = len(texts), bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def scores(self, question: str) -> np.ndarray:
        """The score of each text, float32 `[texts]`; 0 where it has no word of the question."""
        words = self._tokenize(question)[0]
        if self._index is None or not words:
            return np.zeros(self._texts, np.float32)
        found: np.ndarray = self._index.get_scores(words)
        return found

    def find(self, question: str, top: int) -> dict[int, float]:
        """The texts that have words of the question, with their scores, the best first."""
        scores = self.scores(question)
        order = np.argsort(-scores, kind="stable")[:top]
        return {int(index): float(scores[index]) for index in order if scores[index] > 0}


def by_rank(order: Iterable[int]) -> dict[int, float]:
    """Scores of what has none, the best first: those of reciprocal rank fusion."""
    return {index: 1 / (60 + rank) for rank, index in enumerate(dict.fromkeys(order), start=1)}


def fuse(found: Sequence[Mapping[int, float]]) -> list[int]:
    """What was found in one way or more, the best first; equal ones as the first has them.

    A score counts as a share of the largest that was found in the same way. So what is found
    clearly, a name by its word or a number by the heads, outweighs what is found among many alike.

    Args:
        found: scores of 0 or more, in each way.
    """
    sums: dict[int, float] = defaultdict(float)
    for scores in found:
        largest = max(scores.values(), default=0)
        for index, score in scores.items():
            sums[index] += score / largest if largest else 0
    return sorted(sums, key=lambda index: -sums[index])
