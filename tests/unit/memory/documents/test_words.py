"""Texts by the words of a question, and two orders put together."""

import pytest

from lola_vllm.memory.documents.words import WordIndex, fuse

TEXTS = [
    "The pump of hall 2 starts at noon.",
    "Captain Netherby lost an ear at sea.",
    "The pump of hall 3 is painted blue, and so is its door.",
    "| --- |",
]


def test_a_rare_word_finds_its_text():
    index = WordIndex(TEXTS)
    assert index.find("What did Netherby lose?", 3) == [1]
    assert index.find("Which pump is blue?", 3)[0] == 2
    assert index.find("Which pump is blue?", 1) == [2]
    assert index.scores("Which pump?").shape == (4,)


@pytest.mark.parametrize("question", ["", "?", "the", "zeppelin"])
def test_a_question_without_words_of_the_texts_finds_nothing(question):
    index = WordIndex(TEXTS)
    assert index.find(question, 3) == [] and not index.scores(question).any()


def test_orders_are_fused_by_ranks():
    assert fuse([[3, 1, 2], [2, 4]]) == [2, 3, 1, 4]
    assert fuse([[3, 1, 2], []]) == [3, 1, 2]
    assert fuse([[0, 1], [1, 0]]) == [0, 1]
