"""People's questions to manual pages, and what a right answer is."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from tests.support.documented import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from library_pages import right

QUESTIONS = json.loads((ROOT / "benchmarks/library_questions.json").read_text())


def test_questions_that_choose_are_apart_from_those_that_report() -> None:
    asked = QUESTIONS["questions"]
    assert Counter(one["use"] for one in asked) == {"choose": 10, "report": 30}
    assert len({one["question"] for one in asked}) == len(asked)
    assert {one["document"] for one in asked} <= set(QUESTIONS["documents"])
    assert all(one["sentence"] and one["answers"] for one in asked)


@pytest.mark.parametrize(
    ("said", "answers", "is_right"),
    [
        ("It is 3 times.", ["3", "three"], True),
        ("It is 31 times.", ["3", "three"], False),
        ("A `#` begins it.", ["#"], True),
        ("Use --Follow=name.", ["--follow=name"], True),
        ("", ["3"], False),
    ],
)
def test_an_answer_is_right_that_says_it_in_words_of_their_own(
    said: str, answers: list[str], is_right: bool
) -> None:
    assert right(said, answers) == is_right
