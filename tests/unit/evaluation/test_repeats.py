"""What a text says again."""

from __future__ import annotations

import random

from lola_vllm.evaluation.repeats import DISTANCE, NGRAM, find_repeats


def tokens(text: str) -> tuple[list[int], list[str]]:
    """A token per word and per full stop; words of more than six letters are two tokens."""
    pieces = []
    for word in text.split(" "):
        stop = word.endswith(".")
        word = " " + word.rstrip(".")
        pieces += [word[:5], word[5:]] if len(word) > 7 else [word]
        pieces += ["."] if stop else []
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return [numbers[piece] for piece in pieces], pieces


def filler(count: int, seed: int) -> str:
    """Words that say nothing twice."""
    letters = random.Random(seed)
    return " ".join("".join(letters.choices("bcdfghj", k=5)) + f"{seed}x{i}" for i in range(count))


def test_a_last_word_counts_where_it_stood_far_back() -> None:
    text = f"The castle burned. {filler(DISTANCE, 1)} and so they left the castle. It rained."
    ids, pieces = tokens(text)
    ((first, stop),) = find_repeats(ids, pieces).words
    assert "".join(pieces[first:stop]) == " castle"
    near = f"The castle burned. {filler(20, 1)} and so they left the castle. It rained."
    assert find_repeats(*tokens(near)).words == []
    new = f"{filler(DISTANCE, 1)} and so they left the castle. It rained."
    assert find_repeats(*tokens(new)).words == []
    within = f"The castle burned. {filler(DISTANCE, 1)} and so the castle fell. It rained."
    assert find_repeats(*tokens(within)).words == []


def test_short_words_and_numbers_are_not_asked_for() -> None:
    text = f"He saw it in 1666. {filler(DISTANCE, 1)} so he saw it. {filler(5, 2)} by 1666. No."
    assert find_repeats(*tokens(text)).words == []


def test_repeated_ngrams_count_where_the_last_time_is_far_back() -> None:
    ids = [1, 2, 3, *range(100, 100 + DISTANCE), 1, 2, 3, 4, 1, 2, 3]
    repeats = find_repeats(ids, ["x"] * len(ids)).ngrams
    assert repeats == [3 + DISTANCE + NGRAM - 1]  # the third time follows the second too closely
    assert find_repeats([1, 2, 3, *range(100, 220), 1, 2, 4], ["x"] * 126).ngrams == []


def test_a_window_reports_what_the_model_made_of_its_repeats() -> None:
    from lola_vllm.evaluation.models import Prediction
    from lola_vllm.evaluation.perplexity import _recalled
    from lola_vllm.evaluation.repeats import Repeats

    values = [Prediction(-1.0, True), Prediction(-2.0, False), Prediction(-4.0, True)]
    row = _recalled(Repeats([1, 3], [(1, 2), (2, 4)]), 4, values)
    assert row == {
        "repeated": 2,
        "repeated_nats": 5.0,
        "repeated_first": 2,
        "cloze": 2,
        "cloze_exact": 1,
    }
