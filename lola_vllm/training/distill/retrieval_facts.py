"""What a synthetic retrieval prompt hides and asks for: facts, and chains of names.

A fact gives a key a value. Some prompts ask for all values of a key, or for those of several keys
in one answer. A chain gives one name a value and each further name that of the one before; asked
for are all names that have it. No sentence is one that a benchmark such as RULER hides.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lola_vllm.training.distill.retrieval_words import (
    ADJECTIVES,
    FIRST_NAMES,
    LAST_NAMES,
    NOUNS,
)

# What prompts ask for, and how often. Several values in one answer and chains are learned from few
# prompts if they are seldom: a run may train on 30 prompts in all.
FORMS = {"facts": 0.4, "values of a key": 0.2, "several keys": 0.25, "chain": 0.15}

_MAX_FACTS = 8
_MAX_QUESTIONS = 4
_LONGEST_CHAIN = 5

# Names of values, by kind. Digits are most frequent, because context does not help to guess them.
LABELS = {
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
# Of a chain: of its first name, and of each further one.
_CHAIN_STATEMENTS = (
    ("{key} has the {label} {value}.", "{key} has the same {label} as {other}."),
    ("The {label} of {key} is {value}.", "The {label} of {key} is that of {other}."),
    ("let {key} = {value}", "let {key} = {other}"),
    ("[{key}] {label} = {value}", "[{key}] {label} = [{other}]"),
    ("{key} was given the {label} {value}.", "{key} got its {label} from {other}."),
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
_CHAIN_COMPLETIONS = (
    ("Which of them have the {label} {number}?", " The {label} {number} belongs to "),
    ("Question: List all that have the {label} {number}, and how many.\n", "Answer: {count}: "),
    ("Q: Whose {label} is {number}, directly or through another?\n", "A: "),
    ("As mentioned before,", " the {count} that have the {label} {number} are "),
    ("Recall all that share the {label} {number}:", " "),
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
_CHAIN_CHAT_QUESTIONS = (
    "Which of them have the {label} {number}?",
    "Name all {count} that share the {label} {number}.",
    "Whose {label} is {number}, directly or through another?",
    "Tell me all that end up with the {label} {number}.",
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
_CHAIN_CHAT_ANSWERS = (
    "{value}",
    "They are {value}.",
    "The {label} {number} belongs to {value}.",
)


class Exchange(NamedTuple):
    """A question and its answer: what leads to the values, or a text with `{value}` for them.

    `values` are as the answer joins them, and `spans` where each is in that, in characters.
    """

    question: str
    answer: str
    values: str
    spans: list[tuple[int, int]]


class HiddenFacts(NamedTuple):
    """What a prompt hides, as sentences in their order, and the questions for it.

    `label` names a value of it.
    """

    label: str
    statements: list[str]
    turns: list[Exchange]


class _Fact(NamedTuple):
    key: str
    label: str
    kind: str
    value: str


def draw_asked(rng: random.Random, *, is_chat: bool, few: bool) -> HiddenFacts:
    """Draw what a prompt hides and asks for.

    Args:
        rng: the only source of randomness.
        is_chat: questions and answers are messages, not a text that goes on.
        few: there is room for one fact alone.
    """
    form = "facts" if few else _weighted(rng, FORMS)
    if form == "chain":
        return _draw_chain(rng, is_chat)
    facts = _draw_facts(rng, form, 1 if few else _draw_count(rng, form))
    completions = rng.choice(_COMPLETIONS), rng.choice(_COMPLETIONS_OF_SEVERAL)
    answers = rng.choice(_CHAT_ANSWERS), rng.choice(_CHAT_ANSWERS_OF_SEVERAL)
    statement = rng.choice(_STATEMENTS_OF_SEVERAL if form == "values of a key" else _STATEMENTS)
    statements = [
        statement.format(key=fact.key, label=fact.label, value=fact.value) for fact in facts
    ]
    turns = []
    for asked in _draw_questions(rng, facts, form):
        keys = list(dict.fromkeys(fact.key for fact in asked))
        several = len(asked) > 1
        templates = completions[several]
        if is_chat:
            questions = _CHAT_QUESTIONS_OF_SEVERAL if several else _CHAT_QUESTIONS
            templates = rng.choice(questions), answers[several]
        names = {"key": _join(keys)[0], "label": asked[0].label}
        turns.append(_turn([fact.value for fact in asked], templates, names))
    return HiddenFacts(facts[0].label, statements, turns)


def _weighted(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def _turn(values: Sequence[str], templates: tuple[str, str], names: dict[str, Any]) -> Exchange:
    question, answer = (template.format(**names, value="{value}") for template in templates)
    return Exchange(question, answer, *_join(values))


def _join(items: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """`a, b and c`, and where each item is in it, as (start, end) in characters."""
    text, spans = "", []
    for at, item in enumerate(items):
        if at:
            text += " and " if at == len(items) - 1 else ", "
        spans.append((len(text), len(text) + len(item)))
        text += item
    return text, spans


# --- facts


def _draw_count(rng: random.Random, form: str) -> int:
    if form == "several keys":
        return rng.randint(2, _MAX_QUESTIONS + 2)
    return rng.choice((1, 1, 2, 3, 4, rng.randint(1, _MAX_FACTS)))


def _draw_facts(rng: random.Random, form: str, count: int) -> list[_Fact]:
    kind, label = _draw_label(rng)
    key_of = rng.choice((_pair_of_words, _name, _code, lambda rng: "the " + _pair_of_words(rng)))
    digits = rng.randint(4, 10)
    facts: dict[str, _Fact] = {}
    while len(facts) < count:
        # Seldom: with equal labels the key decides and not the label.
        if form != "several keys" and rng.random() < 0.3:
            kind, label = _draw_label(rng)
        key = key_of(rng)
        facts.setdefault(key, _Fact(key, label, kind, _value(kind, digits, rng)))
    drawn = list(facts.values())
    if form == "values of a key":
        first, more = drawn[0], rng.randint(1, _MAX_QUESTIONS - 1)
        while more:
            value = _value(first.kind, digits, rng)
            if all(value != fact.value for fact in drawn):
                drawn.append(first._replace(value=value))
                more -= 1
        rng.shuffle(drawn)
    return drawn


def _draw_label(rng: random.Random) -> tuple[str, str]:
    kind = _weighted(rng, _KIND_WEIGHTS)
    return kind, rng.choice(LABELS[kind])


def _draw_questions(rng: random.Random, facts: list[_Fact], form: str) -> list[list[_Fact]]:
    if form == "several keys":
        return [rng.sample(facts, min(len(facts), rng.randint(2, _MAX_QUESTIONS)))]
    by_key: dict[str, list[_Fact]] = {}
    for fact in facts:
        by_key.setdefault(fact.key, []).append(fact)
    keys = rng.sample(list(by_key), min(len(by_key), rng.randint(1, _MAX_QUESTIONS)))
    return [by_key[key] for key in keys]


# --- chains


def _draw_chain(rng: random.Random, is_chat: bool) -> HiddenFacts:
    """A chain, and sometimes a second one between its sentences, which is not asked for."""
    key_of = rng.choice((_pair_of_words, _name, _code, _letters))
    label = rng.choice(LABELS["digits"])
    count = rng.randint(2, _LONGEST_CHAIN)
    others = rng.choice((0, 0, 1, 2))
    names: list[str] = []
    while len(names) < count + others:
        name = key_of(rng)
        if name not in names:
            names.append(name)
    digits = rng.randint(4, 7)
    number = _value("digits", digits, rng)
    form = rng.choice(_CHAIN_STATEMENTS)
    chain = _chain(form, label, names[:count], number)
    # Of another length, so that the two numbers differ.
    other = _chain(form, label, names[count:], _value("digits", digits + 1, rng))
    order = [0] * len(chain) + [1] * len(other)
    rng.shuffle(order)
    left = iter(chain), iter(other)
    statements = [next(left[which]) for which in order]
    templates = rng.choice(_CHAIN_COMPLETIONS)
    if is_chat:
        templates = rng.choice(_CHAIN_CHAT_QUESTIONS), rng.choice(_CHAIN_CHAT_ANSWERS)
    about = {"label": label, "number": number, "count": count}
    return HiddenFacts(label, statements, [_turn(names[:count], templates, about)])


def _chain(form: tuple[str, str], label: str, names: Sequence[str], number: str) -> list[str]:
    first, further = form
    return [
        further.format(key=name, label=label, other=names[at - 1])
        if at
        else first.format(key=name, label=label, value=number)
        for at, name in enumerate(names)
    ]


# --- keys and values


def _pair_of_words(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(2, 4)))
    return f"{letters}-{rng.randint(10, 9999)}"


def _letters(rng: random.Random) -> str:
    alphabet = rng.choice((string.ascii_lowercase, string.ascii_uppercase))
    return "".join(rng.choices(alphabet, k=rng.randint(3, 6)))


def _value(kind: str, digits: int, rng: random.Random) -> str:
    if kind == "digits":
        return str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    if kind == "word":
        return rng.choice(NOUNS)
    if kind == "phrase":
        return f"{_pair_of_words(rng)} {rng.choice(('and', 'under', 'near'))} {_pair_of_words(rng)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
