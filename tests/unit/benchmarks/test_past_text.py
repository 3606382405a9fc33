"""The text and the questions of the benchmark of a text's own past."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from past import make

TEXT = "".join(chr(97 + i * i % 26) for i in range(40_000))


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_the_first_segments_have_a_number_each() -> None:
    options = {"tokens": 300, "questions": 3, "seed": 1}
    segments, questions = make(TEXT, encode, segments=9, **options)
    texts = [bytes(ids).decode() for ids in segments]
    assert [len(text) for text in texts] == [300] * 9
    assert [question.segment for question in questions] == [0, 1, 2]
    for question in questions:
        assert [question.answer in text for text in texts].index(True) == question.segment
        assert sum(question.answer in text for text in texts) == 1
    assert make(TEXT, encode, segments=9, **{**options, "seed": 2})[0] != segments
    # A longer text goes on from a shorter one.
    assert make(TEXT, encode, segments=5, **options)[0] == segments[:5]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(SystemExit, match="take a longer one"):
        make(TEXT[:2000], encode, segments=9, tokens=300, questions=3, seed=1)
