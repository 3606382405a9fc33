"""Which of many texts have the words of a question, by BM25.

The heads of a model find what a question means, and words find names: a name is a word that few
texts have. `fuse` puts the two orders together.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

# Of reciprocal rank fusion: a text at rank r of an order, from 1 on, has 1 / (FUSION + r).
FUSION = 60


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

    def find(self, question: str, top: int) -> list[int]:
        """The texts that have words of the question, the best first."""
        scores = self.scores(question)
        order = np.argsort(-scores, kind="stable")[:top]
        return [int(index) for index in order if scores[index] > 0]


def fuse(orders: Sequence[Sequence[int]]) -> list[int]:
    """What is in one of the orders or more, the best first, by reciprocal rank fusion. Equal ones
    as the first order has them."""
    scores: dict[int, float] = defaultdict(float)
    for order in orders:
        for rank, index in enumerate(order, start=1):
            scores[index] += 1 / (FUSION + rank)
    return sorted(scores, key=lambda index: -scores[index])
