"""Texts in parts."""

import random

import pytest

from lola_vllm.memory.documents.parts import SHARED_TOKENS, split_text


def count(text: str) -> int:
    """A token is a word here, or six characters of one."""
    return sum(-(-len(word) // 6) for word in text.split())


def words(number: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"w{chance.randrange(1000)}" for _ in range(number)]


def without_overlap(parts: list[str], text: str) -> str:
    """The parts put together again, where each but the first begins with the end of another."""
    found = parts[0]
    for part in parts[1:]:
        size = next(n for n in range(len(part), -1, -1) if found.endswith(part[:n]))
        assert count(part[:size]) >= SHARED_TOKENS
        found += part[size:]
    return found


@pytest.mark.parametrize("border", ["\n\n", "\n", ". ", " "])
def test_parts_are_all_of_the_text(border):
    text = border.join(" ".join(words(30, seed)) for seed in range(40))
    parts = split_text(text, 300, count)
    assert len(parts) > 3 and max(map(count, parts)) <= 300
    assert without_overlap(parts, text) == text


def test_a_text_is_cut_between_paragraphs():
    paragraphs = [" ".join(words(70, seed)) for seed in range(9)]
    parts = split_text("\n\n".join(paragraphs), 300, count)
    assert all(part.rstrip().endswith(tuple(paragraphs)) for part in parts)
    assert parts[0].rstrip() == "\n\n".join(paragraphs[:4])


def test_a_short_text_is_one_part_and_a_long_word_is_cut():
    assert split_text("One. Two.", 300, count) == ["One. Two."]
    assert split_text(" \n\n ", 300, count) == []
    parts = split_text("x" * 9000, 300, count)
    assert len(parts) > 4 and max(map(count, parts)) <= 300 and set("".join(parts)) == {"x"}


DENSE = {
    "line ends": "\n" * 40_000,
    "line ends in a text": "x" + "\n" * 40_000 + "x",
    "short lines": "a\n" * 20_000,
    "blanks": "a" + " " * 40_000 + "b",
    "a word": "x" * 40_000,
    "of four bytes": "\U0001f600\U0001f9ff" * 10_000,
    "sparse and dense": ("\n" * 3_000 + "word " * 400 + "字" * 1_000) * 8,
}


@pytest.mark.parametrize("text", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("most", [4 * SHARED_TOKENS, 2_000])
def test_the_work_is_bounded_by_the_length_whatever_stands_in_a_text(text, most):
    """Each four line ends are a token, a blank is a part of one, and each other byte is one."""
    calls, counted = 0, 0

    def tokens(part: str) -> int:
        nonlocal calls, counted
        calls, counted = calls + 1, counted + len(part)
        words = part.replace("\n" * 4, "t").replace(" " * 80, "t").replace(" ", "")
        return len(words.encode())

    parts = split_text(text, most, tokens)
    assert calls <= 40 * (len(parts) + 1) and counted <= 20 * len(text)
    assert all(0 < tokens(part) <= most for part in parts)
    assert set("".join(parts)) >= {letter for letter in text if letter.strip()}
