"""Synthetic retrieval prompts: facts hidden in a long text, then questions with their answers.

Ordinary text seldom asks for a detail from a thousand tokens ago. These prompts do so at every
depth and in many wordings. They do not use the sentences that long-context benchmarks such as RULER
hide, so that these benchmarks still measure recall and not training.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lola_vllm.distill.retrieval_words import (
    ADJECTIVES,
    FIRST_NAMES,
    LAST_NAMES,
    NOUNS,
    SENTENCES,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LENGTH = 128  # tokens that always have room for one fact and one question
_TRIES = 50
_MAX_FACTS = 8
_MAX_QUESTIONS = 4
# Share of prompts whose key has several values; of the others, that ask for several keys at once.
_SEVERAL = 0.2

# Names of values, by kind. Digits are most frequent, because context does not help to guess them.
_LABELS = {
    "digits": (
        *("access code", "number", "PIN", "ticket number", "extension", "secret number"),
        *("order number", "locker combination", "account number", "code"),
    ),
    "word": ("password", "secret word", "code name", "keyword", "favorite thing"),
    "phrase": ("passphrase", "motto", "secret phrase", "nickname"),
    "uuid": ("identifier", "serial number", "token", "uuid"),
}
_KIND_WEIGHTS = {"digits": 12, "word": 3, "phrase": 3, "uuid": 2}

_STATEMENTS = (
    "The {label} for {key} is {value}.",
    "The {label} of {key} is {value}.",
    "{key}: the {label} is {value}.",
    "Remember that the {label} for {key} is {value}.",
    "Please note: {value} is the {label} for {key}.",
    "The {label} that belongs to {key} is {value}.",
    "If somebody asks for the {label} of {key}, the answer is {value}.",
    "For {key}, the {label} has been set to {value}.",
    "Here is the {label} for {key}: {value}.",
    "[{key}] {label} = {value}",
)
# Of a key that has several values.
_STATEMENTS_OF_SEVERAL = (
    "{key} has the {label} {value}.",
    "{value} is among the {label}s of {key}.",
    "A {label} for {key}: {value}.",
    "Add {value} to the {label}s of {key}.",
    "Another {label} of {key} is {value}.",
)
_INTRODUCTIONS = (
    "",
    "",
    "Read the text below. Some details in it matter later.\n\n",
    "A few facts are hidden in this text. Keep them in mind; there will be questions.\n\n",
    "Below is a long text. Answer the questions at its end from what it says.\n\n",
    "Memorize every {label} in the following text.\n\n",
    "Text:\n",
)
# A question, and the text between it and the value.
_COMPLETIONS = (
    ("What is the {label} for {key}?", " The {label} for {key} is "),
    ("What is the {label} for {key}, as given in the text?", " The {label} for {key} is "),
    ("Question: What is the {label} of {key}?\n", "Answer: "),
    ("Q: Which {label} belongs to {key}?\n", "A: "),
    ("According to the text above,", " the {label} of {key} is "),
    ("As mentioned before,", " the {label} for {key} is "),
    ("Recall the {label} for {key}:", " "),
    ("[{key}]", " {label} = "),
)
# For several values in one answer.
_COMPLETIONS_OF_SEVERAL = (
    ("Which {label}s does the text give for {key}?", " The {label}s for {key} are "),
    ("Question: List every {label} of {key}.\n", "Answer: "),
    ("Q: What are the {label}s of {key}?\n", "A: "),
    ("As mentioned before,", " the {label}s of {key} are "),
    ("Recall every {label} for {key}:", " "),
)
_CHAT_QUESTIONS = (
    "What is the {label} for {key}?",
    "Which {label} does the text give for {key}?",
    "Tell me the {label} of {key}.",
    "What is the {label} that belongs to {key}? Answer with the {label} only.",
    "According to the text, what is the {label} of {key}?",
    "I need the {label} for {key}.",
)
_CHAT_QUESTIONS_OF_SEVERAL = (
    "What are the {label}s of {key}?",
    "Tell me every {label} that the text gives for {key}.",
    "List the {label}s of {key}, and nothing else.",
    "I need all {label}s for {key}.",
)
_CHAT_ANSWERS = (
    "{value}",
    "The {label} for {key} is {value}.",
    "The {label} of {key} is {value}.",
    "It is {value}.",
)
_CHAT_ANSWERS_OF_SEVERAL = (
    "{value}",
    "The {label}s of {key} are {value}.",
    "They are {value}.",
)


class RetrievalError(ValueError):
    """The tokenizer or its chat template cannot make retrieval prompts."""


class RetrievalRow(NamedTuple):
    """Token ids of a prompt with its answers, and which tokens spell the answered values."""

    tokens: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class _Fact:
    key: str
    label: str
    kind: str
    value: str


def _join(items: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """`a, b and c`, and where each item is in it, as (start, end) in characters."""
    text, spans = "", []
    for at, item in enumerate(items):
        if at:
            text += " and " if at == len(items) - 1 else ", "
        spans.append((len(text), len(text) + len(item)))
        text += item
    return text, spans


class _Text(NamedTuple):
    """A prompt, and where in it the answered values are, as (start, end) in characters."""

    text: str
    answers: list[tuple[int, int]]
    is_chat: bool


def retrieval_row(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rng: random.Random,
    real_text: Callable[[int], str] | None = None,
) -> RetrievalRow:
    """Make one prompt that nearly fills a row.

    Args:
        tokenizer: a fast one, for the positions of its tokens; half of the prompts are chats if it
            has a chat template.
        length: at most so many tokens, at least `MIN_LENGTH`.
        rng: the only source of randomness; equal states give equal rows.
        real_text: returns about the given number of characters of ordinary text, to hide facts in.
            Without it all haystacks are simple sentences.

    Returns:
        Between one and `length` tokens, seldom many fewer. The last answer is near the end.

    Raises:
        RetrievalError: no fast tokenizer, a chat template that fails, or a tokenizer that spends
            so many tokens on a short text that no prompt fits.
    """
    if not tokenizer.is_fast:
        raise RetrievalError(
            f"{type(tokenizer).__name__} does not tell where its tokens are; retrieval prompts "
            "need a fast tokenizer (tokenizer.json), or set retrieval_fraction to 0"
        )
    for attempt in range(_TRIES):
        facts = _draw_facts(rng, few=length < 2 * MIN_LENGTH or attempt > 0)
        frame = _draw_frame(tokenizer, facts, rng)
        row = _fit(tokenizer, length, facts, frame, _haystack(rng, length, real_text), rng)
        if row is not None:
            return row
    raise RetrievalError(f"no retrieval prompt fits into {length} tokens; use longer rows")


# --- facts


def _draw_facts(rng: random.Random, few: bool) -> list[_Fact]:
    """Facts in the order of the text. Sometimes the first one's key has more values."""
    count = 1 if few else rng.choice((1, 1, 2, 3, 4, rng.randint(1, _MAX_FACTS)))
    kind = rng.choices(tuple(_KIND_WEIGHTS), tuple(_KIND_WEIGHTS.values()))[0]
    label = rng.choice(_LABELS[kind])
    key_of = rng.choice((_pair_of_words, _name, _code, lambda rng: "the " + _pair_of_words(rng)))
    digits = rng.randint(4, 10)
    facts: dict[str, _Fact] = {}
    while len(facts) < count:
        if rng.random() < 0.3:  # seldom: with equal labels the key decides and not the label
            kind = rng.choices(tuple(_KIND_WEIGHTS), tuple(_KIND_WEIGHTS.values()))[0]
            label = rng.choice(_LABELS[kind])
        key = key_of(rng)
        facts.setdefault(key, _Fact(key, label, kind, _value(kind, digits, rng)))
    drawn = list(facts.values())
    if not few and rng.random() < _SEVERAL:
        first = drawn[0]
        for _ in range(rng.randint(1, _MAX_QUESTIONS - 1)):
            value = _value(first.kind, digits, rng)
            if all(value != fact.value for fact in drawn):
                drawn.append(_Fact(first.key, first.label, first.kind, value))
        rng.shuffle(drawn)
    return drawn


def _draw_questions(rng: random.Random, facts: list[_Fact]) -> list[list[_Fact]]:
    """The facts that each answer gives: those of one key, and sometimes of several keys."""
    by_key: dict[str, list[_Fact]] = {}
    for fact in facts:
        by_key.setdefault(fact.key, []).append(fact)
    keys = rng.sample(list(by_key), min(len(by_key), rng.randint(1, _MAX_QUESTIONS)))
    questions = [by_key[key] for key in keys]
    if len(by_key) == len(facts) and rng.random() < _SEVERAL:
        first = questions[0][0]
        return [[fact for (fact,) in questions if fact.label == first.label]]
    return questions


def _pair_of_words(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(2, 4)))
    return f"{letters}-{rng.randint(10, 9999)}"


def _value(kind: str, digits: int, rng: random.Random) -> str:
    if kind == "digits":
        return str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    if kind == "word":
        return rng.choice(NOUNS)
    if kind == "phrase":
        return f"{_pair_of_words(rng)} {rng.choice(('and', 'under', 'near'))} {_pair_of_words(rng)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


# --- haystacks


def _haystack(rng: random.Random, length: int, real_text: Callable[[int], str] | None) -> list[str]:
    """Sentences with the white space behind them, more than `length` tokens of them."""
    kind = rng.choice(("real", "real", "loop", "shuffled") if real_text else ("loop", "shuffled"))
    if kind == "real" and real_text is not None:
        text = real_text(8 * length)
        return re.findall(r"\S.*?(?:[.!?][\"'\u201d\u2019)]*\s+|\n\s*\n|$)", text, flags=re.DOTALL)
    space = rng.choice((" ", " ", "\n"))
    # A sentence has at least four tokens, whatever the tokenizer.
    if kind == "loop":
        loop = rng.sample(SENTENCES, rng.randint(3, 6))
        return [sentence + space for sentence in loop * (length // 4 // len(loop) + 1)]
    return [rng.choice(SENTENCES) + space for _ in range(length // 4 + 1)]


# --- prompts


class _Frame(NamedTuple):
    """A prompt without its haystack: how it begins, facts as sentences, and what comes after."""

    finish: Callable[[str], _Text]
    statements: list[str]


def _draw_frame(
    tokenizer: PreTrainedTokenizerBase, facts: list[_Fact], rng: random.Random
) -> _Frame:
    introduction = rng.choice(_INTRODUCTIONS).format(label=facts[0].label)
    repeated = len({fact.key for fact in facts}) < len(facts)
    statement = rng.choice(_STATEMENTS_OF_SEVERAL if repeated else _STATEMENTS)
    statements = [
        statement.format(key=fact.key, label=fact.label, value=fact.value) for fact in facts
    ]
    questions = _draw_questions(rng, facts)
    if tokenizer.chat_template is not None and rng.random() < 0.5:
        one, several = rng.choice(_CHAT_ANSWERS), rng.choice(_CHAT_ANSWERS_OF_SEVERAL)
        turns = []
        for question in questions:
            lone = len(question) == 1
            asked = rng.choice(_CHAT_QUESTIONS if lone else _CHAT_QUESTIONS_OF_SEVERAL)
            turns.append(_turn(question, asked, one if lone else several))
        return _Frame(lambda text: _chat(tokenizer, introduction + text, turns), statements)
    forms = rng.choice(_COMPLETIONS), rng.choice(_COMPLETIONS_OF_SEVERAL)
    turns = [_turn(question, *forms[len(question) > 1]) for question in questions]
    gap = rng.choice(("\n", "\n\n"))
    return _Frame(lambda text: _plain(introduction + text, turns, gap), statements)


class _Turn(NamedTuple):
    """A question and its answer: what leads to the values, or a text with `{value}` for them.

    `values` are as the answer joins them, and `spans` where each is in that, in characters.
    """

    question: str
    answer: str
    values: str
    spans: list[tuple[int, int]]


def _turn(facts: list[_Fact], question: str, answer: str) -> _Turn:
    """Templates, filled with the keys and the label of the facts."""
    names = {
        "key": _join(list(dict.fromkeys(fact.key for fact in facts)))[0],
        "label": facts[0].label,
        "value": "{value}",
    }
    values = _join([fact.value for fact in facts])
    return _Turn(question.format(**names), answer.format(**names), *values)


def _plain(text: str, turns: list[_Turn], gap: str) -> _Text:
    text, spans = text.rstrip() + "\n\n", []
    for question, lead, values, parts in turns:
        text += question + lead
        spans += [(len(text) + start, len(text) + end) for start, end in parts]
        text += values + gap
    return _Text(text.rstrip(), spans, False)


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, turns: list[_Turn]) -> _Text:
    messages = []
    for at, (question, answer, values, _) in enumerate(turns):
        asked = question if at else f"{text.strip()}\n\n{question}"
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer.format(value=values)})
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        spans, at = [], 0
        for question, answer, values, parts in turns:
            at = rendered.index(answer.format(value=values), rendered.index(question, at))
            at += answer.index("{value}")
            spans += [(at + start, at + end) for start, end in parts]
    except Exception as error:  # raised by Jinja or by the template itself
        raise RetrievalError(
            f"the chat template does not render a plain conversation ({error}); "
            "set retrieval_fraction to 0"
        ) from error
    return _Text(rendered, spans, True)


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    facts: list[_Fact],
    frame: _Frame,
    haystack: list[str],
    rng: random.Random,
) -> RetrievalRow | None:
    """As much of the haystack as fits, with facts at random depths; None if nothing fits."""
    depths = sorted(rng.random() for _ in facts)
    ends = _sentence_ends(tokenizer, haystack)
    room = length - len(_encode(tokenizer, frame.finish(" ".join(frame.statements)))[0])
    while room >= 0:
        count = bisect_right(ends, room)
        sentences = haystack[:count]
        # From the back, so that an insertion does not move the next one's place.
        for depth, statement in sorted(zip(depths, frame.statements, strict=True), reverse=True):
            at = round(depth * count)
            space = "\n" if at and sentences[at - 1].endswith("\n") else " "
            sentences.insert(at, statement + space)
        prompt = frame.finish("".join(sentences))
        tokens, offsets = _encode(tokenizer, prompt)
        if len(tokens) <= length:
            marks = [
                any(start < last and end > first for first, last in prompt.answers)
                for start, end in offsets
            ]
            return RetrievalRow(tokens, marks)
        if count == 0:
            return None
        # Tokens differ a little where sentences meet facts.
        room = min(room - (len(tokens) - length), ends[count - 1] - 1)
    return None


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: _Text
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their places; a chat template writes its special tokens itself."""
    encoding = tokenizer(
        prompt.text,
        add_special_tokens=not prompt.is_chat,
        return_offsets_mapping=True,
        verbose=False,
    )
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _sentence_ends(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[int]:
    """How many tokens the first one, two, three ... sentences have together."""
    text = _Text("".join(sentences), [], True)
    starts = [start for start, _ in _encode(tokenizer, text)[1]]
    ends, characters = [], 0
    for sentence in sentences:
        characters += len(sentence)
        ends.append(bisect_right(starts, characters - 1))
    return ends
