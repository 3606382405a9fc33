"""What users say in the middle of a conversation, and how they ask for it later.

Neither the wording nor the names and values are those of training and calibration
(`training/distill/retrieval_facts.py`), of RULER or of `facts.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from lola_vllm.evaluation.facts import Fact

_NAME_WORDS = (
    "Alistair Bronwen Cedric Delphine Ezekiel Francesca Gideon Henrietta Imogen Joachim Katarina "
    "Leopold Marguerite Nigel Octavia Patrick Rebecca Sebastian Tabitha Ulrich Vivian Wilfred "
    "Yvonne Zachary"
)
_ROLE_WORDS = (
    "dentist plumber tutor landlord notary gardener tailor carpenter florist mechanic lawyer nurse "
    "veterinarian"
)
_TOWN_WORDS = (
    "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Geneva Hamburg Seville Naples Bergen Krakow "
    "Antwerp Toulouse Glasgow Zagreb Tallinn Porto Basel"
)
_PURCHASE_WORDS = (
    "raincoat bookshelf microscope lawnmower sofa printer tent sewing-machine telescope freezer "
    "skateboard typewriter wheelbarrow mattress trombone"
)
_RELATIVE_WORDS = "aunt uncle cousin nephew niece grandmother grandfather godmother"
_WORD_WORDS = (
    "tulip volcano saxophone penguin avocado tornado zeppelin giraffe marathon igloo pyramid "
    "waffle kangaroo submarine trampoline cactus"
)
_CODE_WORDS = (
    "retry batch queue worker upload session thumbnail invoice scanner backup timeout payload"
)
_LIMIT_WORDS = "LIMIT SIZE DELAY COUNT WIDTH DEPTH"
(
    NAMES, ROLES, TOWNS, PURCHASES, RELATIVES, WORDS, CODE, LIMITS,
) = (
    tuple(words.split())
    for words in (
        _NAME_WORDS, _ROLE_WORDS, _TOWN_WORDS, _PURCHASE_WORDS, _RELATIVE_WORDS,
        _WORD_WORDS, _CODE_WORDS, _LIMIT_WORDS,
    )
)  # fmt: skip

Form = Callable[[random.Random], Fact]


def train(rng: random.Random) -> Fact:
    """When a train leaves."""
    town, time = rng.choice(TOWNS), f"{rng.randint(10, 23)}:{rng.randint(10, 59)}"
    return Fact(
        f"By the way, my train to {town} leaves at {time}.",
        f"At what time does my train to {town} leave?",
        f"Your train to {town} leaves at",
        time,
    )


def purchase(rng: random.Random) -> Fact:
    """What something cost."""
    thing, price = rng.choice(PURCHASES), str(rng.randint(101, 999))
    return Fact(
        f"For my new {thing} I paid {price} euros, by the way.",
        f"How much did I pay for my new {thing}?",
        f"For your new {thing} you paid",
        price,
    )


def floor(rng: random.Random) -> Fact:
    """How high somebody lives."""
    who, number = rng.choice(RELATIVES), str(rng.randint(11, 98))
    return Fact(
        f"I must call my {who}, who lives on floor {number} of a tower.",
        f"On which floor does my {who} live?",
        f"Your {who} lives on floor",
        number,
    )


def house(rng: random.Random) -> Fact:
    """The number of a house."""
    town, number = rng.choice(TOWNS), str(rng.randint(101, 999))
    return Fact(
        f"Before I moved I lived in {town}, in house {number}.",
        f"In which house did I live in {town}?",
        f"In {town} you lived in house",
        number,
    )


def parcel(rng: random.Random) -> Fact:
    """How heavy something is."""
    who, grams = rng.choice(RELATIVES), str(rng.randint(101, 999))
    return Fact(
        f"The parcel for my {who} weighs {grams} grams, I have just seen.",
        f"How heavy is the parcel for my {who}?",
        f"The parcel for your {who} weighs",
        grams,
    )


def work(rng: random.Random) -> Fact:
    """What somebody is."""
    name, what = rng.choice(NAMES), rng.choice(ROLES)
    return Fact(
        f"This morning I met {name}. You know, {name} works as a {what} here.",
        f"What does {name} do for a living?",
        f"{name} works as a",
        what,
    )


def move(rng: random.Random) -> Fact:
    """Where somebody lives."""
    name, town = rng.choice(NAMES), rng.choice(TOWNS)
    return Fact(
        f"Did I tell you that {name} has moved to {town}?",
        f"Where does {name} live now?",
        f"{name} has moved to",
        town,
    )


def loan(rng: random.Random) -> Fact:
    """What somebody has borrowed."""
    name, thing = rng.choice(NAMES), rng.choice(PURCHASES)
    return Fact(
        f"Last week {name} borrowed my {thing}, and I need it back.",
        f"What did {name} borrow from me last week?",
        f"Last week {name} borrowed your",
        thing,
    )


def birth(rng: random.Random) -> Fact:
    """When somebody was born."""
    name, year = rng.choice(NAMES), str(rng.randint(1931, 1999))
    return Fact(
        f"I have just heard that {name} was born in {year}.",
        f"In which year was {name} born?",
        f"{name} was born in",
        year,
    )


def pet_name(rng: random.Random) -> Fact:
    """How to call a thing."""
    thing, word = rng.choice(PURCHASES), rng.choice(WORDS)
    return Fact(
        f'From now on, when we speak of my {thing}, call it "{word}".',
        f"Say that you like my {thing}.",
        f'When we speak of your {thing}, I call it "',
        word,
    )


def greeting(rng: random.Random) -> Fact:
    """How to greet somebody."""
    what, word = rng.choice(ROLES), rng.choice(WORDS)
    return Fact(
        f'From now on, greet our {what} with "{word}".',
        f"Please write a greeting to our {what}.",
        f'I greet our {what} with "',
        word,
    )


def signature(rng: random.Random) -> Fact:
    """How to sign a letter."""
    who, word = rng.choice(RELATIVES), rng.choice(WORDS)
    return Fact(
        f'From now on, sign all letters to my {who} as "{word}".',
        f"Please write one line to my {who}.",
        f'All is well. I sign all letters to your {who} as "',
        word,
    )


def file_name(rng: random.Random) -> Fact:
    """How to name a file."""
    town, word = rng.choice(TOWNS), rng.choice(WORDS)
    return Fact(
        f'From now on, put everything about {town} into the folder "{word}".',
        f"Here is a picture of {town}. Please put it away.",
        f'I put everything about {town} into the folder "',
        word,
    )


def constant(rng: random.Random) -> Fact:
    """A constant of a block of code."""
    name = f"{rng.choice(CODE).upper()}_{rng.choice(LIMITS)}"
    value = str(rng.randint(1001, 9999))
    return Fact(
        f"This is a part of my program:\n```python\n{name} = {value}\n```\n",
        f"What does my program set {name} to?",
        f"Your program has the line `{name} =",
        value,
    )


def function(rng: random.Random) -> Fact:
    """A number in a function."""
    name, factor = f"{rng.choice(CODE)}_cost", str(rng.randint(1001, 9999))
    return Fact(
        f"I wrote this:\n```python\ndef {name}(n):\n    return {factor} * n\n```\n",
        f"Please show me my function {name} again.",
        f"```python\ndef {name}(n):\n    return",
        factor,
    )


class ChatTask(NamedTuple):
    """A kind of question about a conversation.

    Attributes:
        name: on the command line. about: one line for people. forms: that take turns.
    """

    name: str
    about: str
    forms: tuple[Form, ...]


CHAT_TASKS = {
    task.name: task
    for task in (
        ChatTask(
            "chat-fact", "what users tell about themselves", (train, purchase, floor, house, parcel)
        ),
        ChatTask("chat-name", "what users tell about a person", (work, move, loan, birth)),
        ChatTask(
            "chat-instruction",
            "what to say from now on",
            (pet_name, greeting, signature, file_name),
        ),
        ChatTask("chat-code", "a number in a block of code", (constant, function)),
    )
}
