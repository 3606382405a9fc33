"""Documents and questions of the benchmark of libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from library_corpus import make

TEXT = "".join(chr(97 + i * i % 26) for i in range(40_000))


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("kind", ["needles", "facts"])
def test_each_question_is_about_another_document_that_holds_its_answer(kind: str) -> None:
    options = {"documents": 9, "tokens": 300, "questions": 9, "kind": kind, "seed": 1}
    corpus = make(TEXT, encode, **options)
    assert sorted(question.document for question in corpus.questions) == list(range(9))
    for question in corpus.questions:
        text = bytes(corpus.documents[question.document]).decode()
        assert question.answer in text.lower() and len(text) == 300
        others = [bytes(ids).decode().lower() for ids in corpus.documents]
        if kind == "needles":
            assert sum(question.answer in other for other in others) == 1
    assert make(TEXT, encode, **options) == corpus
    assert make(TEXT, encode, **{**options, "seed": 2}) != corpus
