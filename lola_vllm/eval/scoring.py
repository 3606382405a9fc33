"""Judging an answer: RULER's string match, and how much of it is right where not all is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How right an answer is.

    Attributes:
        match: share of the expected strings that occur in the answer, letter case aside: RULER's
            `string_match_all` (arXiv 2404.06654).
        exact: all of them do.
        share: mean over the expected strings of the characters that are right in their place, 1
            where the string occurs. Guessed digits score about 0.1.
    """

    match: float
    exact: bool
    share: float


def judge(expected: Sequence[str], answer: str) -> Score:
    """Score the model's `answer` against the strings it should hold."""
    answer = answer.lower()
    found = [text.lower() in answer for text in expected]
    match = sum(found) / len(expected)
    shares = [
        1.0 if hit else _best_share(text.lower(), answer)
        for text, hit in zip(expected, found, strict=True)
    ]
    return Score(match, all(found), sum(shares) / len(shares))


def _best_share(text: str, answer: str) -> float:
    """Largest share of `text` that a run of the same kind of characters has right, in place."""
    if text.isdigit():
        runs = re.findall(r"\d+", answer)
    elif re.fullmatch(r"[0-9a-f-]+", text):  # a uuid
        runs = re.findall(r"[0-9a-f-]+", answer)
    else:  # a name is right or wrong: its letters are drawn at random, so a part is no answer
        return 0.0
    best = 0
    for run in runs:
        best = max(best, sum(a == b for a, b in zip(text, run, strict=False)))
    return best / len(text)
