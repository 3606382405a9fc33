"""Drafts that a test plans: right ones, of which some are made wrong, and steps without any."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from tools.support.tiny import VOCAB

DRAFTS = 6
PLANNED = {
    "method": "custom_class",
    "model": "tests.support.drafts.Planned",
    "num_speculative_tokens": DRAFTS,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


class Planned:
    """Goes on with the text that a request's tokens begin.

    Attributes:
        texts: prompts with their answers. sizes: of the drafts of each step. wrong: all drafts are,
            from their first token on.
    """

    texts: ClassVar[list[list[int]]] = []
    sizes: ClassVar[list[int]] = []
    wrong: ClassVar[bool] = False

    def __init__(self, _: Any) -> None:
        self.random = random.Random(0)

    def load_model(self, *_: Any) -> None:
        """There is none."""

    def propose(
        self, sampled: list[list[int]], num_tokens: Any, tokens: Any, **_: Any
    ) -> list[list[int]]:
        """Drafts of each row; none of one whose prompt goes on."""
        rows = zip(sampled, num_tokens, tokens, strict=False)
        drafts = [self._of(row[:n].tolist()) if new else [] for new, n, row in rows]
        self.sizes.append(sum(map(len, drafts)))
        return drafts

    def _of(self, known: list[int]) -> list[int]:
        n = len(known)
        text = next((text for text in self.texts if text[:n] == known), known)
        drafts = text[n : n + self.random.choice([0, DRAFTS, DRAFTS, 2])]
        if drafts and (self.wrong or self.random.random() < 0.5):
            at = 0 if self.wrong else self.random.randrange(len(drafts))
            drafts[at] = (drafts[at] + 1) % VOCAB
        return drafts
