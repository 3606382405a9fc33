"""Real text to hide needles in: sentences of held-out documents."""

from __future__ import annotations

import random
import re

from lola_vllm.eval.errors import EvalError

# Lists and tables have no full stops; pieces of this size keep prompts close to their length.
MAX_WORDS = 40
# A sentence ends in punctuation, perhaps quoted, before a space. Coarse, but a needle only has to
# stand between two sentences most of the time.
_QUOTES = "\"'\u2018\u2019\u201c\u201d"
_SENTENCE_END = re.compile(rf"(?<=[.!?])[{_QUOTES})\]]*\s+(?=[{_QUOTES}(\[]?[A-Z0-9])")


def split_sentences(document: str) -> list[str]:
    """Sentences of a document, at most `MAX_WORDS` long, white space made single spaces."""
    flat = " ".join(document.split())
    ends = [end.end() for end in _SENTENCE_END.finditer(flat)]
    pieces = []
    for start, end in zip([0, *ends], [*ends, len(flat)], strict=True):
        words = flat[start:end].split()
        pieces += [" ".join(words[i : i + MAX_WORDS]) for i in range(0, len(words), MAX_WORDS)]
    return pieces


class Prose:
    """Sentences of several documents, read on from a random place.

    Args:
        documents: texts; one after the other, and from the start again after the last.

    Raises:
        EvalError: there is no sentence in them.
    """

    def __init__(self, documents: list[str]) -> None:
        self._documents = [split_sentences(document) for document in documents]
        self._documents = [sentences for sentences in self._documents if sentences]
        if not self._documents:
            raise EvalError("--texts: the documents hold no sentence; give plain English prose")
        self._weights = [len(sentences) for sentences in self._documents]

    def start(self, rng: random.Random) -> tuple[int, int]:
        """A random document, longer ones more often, and a random sentence of it."""
        (document,) = rng.choices(range(len(self._documents)), weights=self._weights)
        return document, rng.randrange(len(self._documents[document]))

    def read(self, start: tuple[int, int], count: int) -> list[str]:
        """`count` sentences from `start` on."""
        document, sentence = start
        found = self._documents[document][sentence : sentence + count]
        while len(found) < count:
            document = (document + 1) % len(self._documents)
            found += self._documents[document][: count - len(found)]
        return found
