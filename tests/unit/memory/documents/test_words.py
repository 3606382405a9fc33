"""Texts by the words of a question, and what was found in two ways put together."""

import pytest

from lola_vllm.memory.documents.words import WordIndex, by_rank, fuse

TEXTS = [
    "The pump of hall 2 starts at noon.",
    "Captain Netherby lost an ear at sea.",
    "The pump of hall 3 is painted blue, and so is its door.",
    "| --- |",
]


def test_a_rare_word_finds_its_text():
    index = WordIndex(TEXTS)
    assert list(index.find("What did Netherby lose?", 3)) == [1]
    assert next(iter(index.find("Which pump is blue?", 3))) == 2
    assert list(index.find("Which pump is blue?", 1)) == [2]
    assert index.scores("Which pump?").shape == (4,)


@pytest.mark.parametrize("question", ["", "?", "the", "zeppelin"])
def test_a_question_without_words_of_the_texts_finds_nothing(question):
    index = WordIndex(TEXTS)
    assert index.find(question, 3) == {} and not index.scores(question).any()


def test_what_is_found_clearly_outweighs_what_is_found_among_many_alike():
    alike, clear = {3: 1.0, 1: 0.9, 2: 0.8}, {2: 40.0, 4: 8.0}
    assert fuse([alike, clear]) == [2, 3, 1, 4]
    assert fuse([alike, {}]) == [3, 1, 2]
    assert fuse([{0: 0.0, 1: 0.0}, {1: 2.0}]) == [1, 0]
    assert fuse([{0: 1.0}, {1: 1.0}]) == [0, 1]


def test_orders_without_scores_are_fused_by_ranks():
    assert fuse([by_rank([3, 1, 2]), by_rank([2, 4])]) == [2, 3, 1, 4]
    assert fuse([by_rank([3, 1, 3, 2]), by_rank([])]) == [3, 1, 2]
