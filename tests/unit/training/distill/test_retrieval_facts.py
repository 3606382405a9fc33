"""What synthetic retrieval prompts hide and ask for."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from lola_vllm.training.distill import retrieval_facts
from lola_vllm.training.distill.retrieval_facts import Exchange, HiddenFacts, draw_asked


def draw(form: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> HiddenFacts:
    monkeypatch.setattr(retrieval_facts, "FORMS", {form: 1.0})
    return draw_asked(random.Random(seed), is_chat=seed % 2 == 0, few=False)


def values_of(turn: Exchange) -> list[str]:
    return [turn.values[start:end] for start, end in turn.spans]


def last_number(text: str) -> str:
    return "".join(letter if letter.isdigit() else " " for letter in text).split()[-1]


def key_of(statement: str, said: str) -> str:
    """The key of a fact's sentence, which the question names."""
    for template in retrieval_facts._STATEMENTS:
        pattern = re.escape(template)
        for name in ("label", "key", "value"):
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>.+)")
        found = re.fullmatch(pattern, statement)
        if found and found["key"] in said:
            return found["key"]
    raise AssertionError(statement)


def test_a_chain_leads_from_its_number_to_each_of_its_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths, others = Counter[int](), 0
    for seed in range(300):
        asked = draw("chain", seed, monkeypatch)
        (turn,) = asked.turns
        names = values_of(turn)
        assert len(set(names)) == len(names)
        first, *further = [next(s for s in asked.statements if name in s) for name in names]
        number = last_number(first)
        assert number in turn.question + turn.answer
        for statement, name, before in zip(further, names[1:], names[:-1], strict=True):
            assert name in statement and before in statement and number not in statement
        places = [asked.statements.index(statement) for statement in (first, *further)]
        assert places == sorted(set(places)), (seed, asked)
        rest = [s for s in asked.statements if s not in (first, *further)]
        assert not any(number in statement for statement in rest)
        assert not any(name in statement for name in names for statement in rest)
        lengths[len(names)] += 1
        others += bool(rest)
    assert set(lengths) == {2, 3, 4, 5} and min(lengths.values()) > 30
    assert 100 < others < 200


def test_several_keys_have_one_answer_in_the_order_of_the_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = Counter[int]()
    for seed in range(200):
        asked = draw("several keys", seed, monkeypatch)
        (turn,) = asked.turns
        said = turn.question + turn.answer
        places = [
            said.index(key_of(next(s for s in asked.statements if value in s), said))
            for value in values_of(turn)
        ]
        assert places == sorted(set(places)), (seed, asked)
        counts[len(places)] += 1
    assert set(counts) == {2, 3, 4} and counts[4] > 20
