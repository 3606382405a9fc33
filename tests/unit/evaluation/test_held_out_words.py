"""No key, name or value of the evaluation is a word of training or calibration.

Both draw their prompts from `training/distill/retrieval_words.py`. What they share with RULER's
tasks is the form alone: a value under a key, hidden in prose, and a question at the end.
"""

from __future__ import annotations

import random
import re

from lola_vllm.evaluation import facts, tasks
from lola_vllm.training.distill import retrieval_words

TRAINED = {
    word.lower()
    for name in ("ADJECTIVES", "NOUNS", "FIRST_NAMES", "LAST_NAMES")
    for word in getattr(retrieval_words, name)
}


def test_lists_of_words() -> None:
    lists = [tasks.ADJECTIVES, tasks.NOUNS, *facts.VALUES.values()]
    words = {word.lower() for each in lists for word in each}
    assert len(words) > 300
    assert not words & TRAINED


def test_keys_as_they_are_drawn() -> None:
    rng = random.Random(3)
    keys = {tasks.draw_key(rng) for _ in range(2000)}
    assert len(keys) > 1500
    assert not {part for key in keys for part in re.findall("[a-z]+", key)} & TRAINED
