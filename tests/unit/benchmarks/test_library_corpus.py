"""Documents and questions of the benchmark of libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from library_corpus import DEVELOPMENT_FACTS, FACTS, development, make

TEXT = "".join(chr(97 + i * i % 26) for i in range(40_000))


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_each_document_hides_a_number_and_a_fact_that_are_asked_for() -> None:
    options = {"documents": 9, "tokens": 300, "seed": 1}
    corpus = make(TEXT, encode, **options)
    texts = [bytes(ids).decode() for ids in corpus.documents]
    assert [len(text) for text in texts] == [300] * 9
    asked = [(question.document, question.kind) for question in corpus.questions]
    assert asked == [(i, kind) for i in range(9) for kind in ("needles", "facts")]
    for question in corpus.questions:
        assert question.answer in texts[question.document].lower()
        if question.kind == "needles":
            assert sum(question.answer in text for text in texts) == 1
        assert question.words.endswith("?") and question.words in question.text
        assert "Question" not in question.words and "\n" not in question.words
    assert make(TEXT, encode, **options) == corpus
    assert make(TEXT, encode, **{**options, "seed": 2}) != corpus


def test_a_thousand_documents_have_a_name_each() -> None:
    corpus = make(TEXT, encode, documents=1000, tokens=200, seed=3)
    assert len(corpus.documents) == 1000
    assert len({question.text for question in corpus.questions}) == 2000
    with pytest.raises(ValueError, match="documents = 1200: there are names for 1128 at most"):
        make(TEXT, encode, documents=1200, tokens=200, seed=3)
    with pytest.raises(ValueError, match="text: 10 characters, a document takes 1600"):
        make("x" * 10, encode, documents=1, tokens=200, seed=3)


def test_no_seed_that_reports_asks_what_chose_the_score() -> None:
    assert [development(seed) for seed in (0, 1, 2, 3, 10)] == [True, False, False, False, True]
    assert not {answer for *_, answer in FACTS} & {answer for *_, answer in DEVELOPMENT_FACTS}
