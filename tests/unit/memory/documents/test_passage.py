"""The passage of a text that is shown for a question."""

import pytest

from lola_vllm.memory.documents.passage import MAX_SENTENCE, PASSAGE_CHARS, passage_of

TEXT = "The roses stand. The gate\ncode is 44! Is it so?\n\n|\n\n-----\n\nA new paragraph"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("roses", "The roses stand."), ("gate", "The gate code is 44!"),
        ("44", "The gate code is 44!"), ("it so", "Is it so?"), ("new", "A new paragraph"),
    ],
)  # fmt: skip
def test_the_sentence_that_is_read_most(word, sentence):
    found = passage_of(TEXT, [TEXT.index(word)], "What?")
    assert found.sentence == sentence
    assert sentence in found.text and "Is it so?" in found.text


@pytest.mark.parametrize("mark", ["|", "---"])
def test_no_sentence_without_words_is_shown(mark):
    found = passage_of(TEXT, [TEXT.index(mark)], "What?")
    assert found.sentence in ("Is it so?", "A new paragraph")
    assert passage_of("|\n\n- 12 -\n\n|", [0], "What?") == ("", "")


def test_what_has_the_words_and_is_read_too_comes_before_what_is_read_most():
    read = [TEXT.index("new"), TEXT.index("44"), TEXT.index("roses")]
    assert passage_of(TEXT, read, "What is the code of the gate?").sentence == (
        "The gate code is 44!"
    )
    assert passage_of(TEXT, [], "What is the code of the gate?").sentence == "The gate code is 44!"
    assert passage_of(TEXT, [], "Why?").sentence == "The roses stand."


def test_passages_are_short():
    text = "".join(f"Sentence {i} of a long text is here. " for i in range(99))
    found = passage_of(text, [text.index("Sentence 50")], "What?")
    assert "Sentence 49" in found.text and "Sentence 51" in found.text
    assert len(found.sentence) < len(found.text) <= PASSAGE_CHARS
    long = "word " * 1000
    found = passage_of(long, [2500], "What?")
    assert 0 < len(found.sentence) <= MAX_SENTENCE
