"""What is told in the benchmark of a text's past and of newer text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from past_newer import SEGMENTS, Teller


@pytest.mark.parametrize("seed", [0, 4])
def test_what_is_newer_is_the_same_thing_or_another(seed: int) -> None:
    teller = Teller(seed)
    assert [(i, of) for i, of, _ in teller.told] == [
        (i, of) for i in range(SEGMENTS) for of in ("number", "fact")
    ]
    for segment, of, old in teller.told:
        assert old.answer in old.sentence and old.answer not in old.question
        for anew in (True, False):
            newer = teller.newer(segment, of, old, anew)
            assert (newer.question == old.question) == anew
            assert newer.answer in newer.sentence and newer.answer != old.answer
    assert len({told.question for _, of, told in teller.told if of == "number"}) == SEGMENTS
    assert Teller(seed).told == Teller(seed).told != Teller(seed + 1).told
