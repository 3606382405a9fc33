"""What users say in the middle of a conversation, and how they ask for it later.

Neither the wording nor the names and values are those of training and calibration
(`distill/retrieval.py`), of RULER or of `facts.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from lola_vllm.eval.facts import Fact

_NAME_WORDS = (
    "Alistair Bronwen Cedric Delphine Ezekiel Francesca Gideon Henrietta Imogen Joachim Katarina "
    "Leopold Marguerite Nigel Octavia Patrick Rebecca Sebastian Tabitha Ulrich Vivian Wilfred "
    "Yvonne Zachary"
)
_ROLE_WORDS = (
    "dentist plumber tutor landlord notary gardener tailor accountant carpenter optician florist "
    "electrician mechanic lawyer nurse veterinarian"
)
_TOWN_WORDS = (
    "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Geneva Hamburg Seville Naples Bergen Krakow "
    "Antwerp Toulouse Glasgow Zagreb Tallinn Porto Basel"
)
_PURCHASE_WORDS = (
    "raincoat bookshelf microscope lawnmower sofa printer tent sewing-machine telescope freezer "
    "skateboard typewriter wheelbarrow mattress trombone"
)
_FOOD_WORDS = (
    "peanuts shrimp mushrooms strawberries celery walnuts garlic lentils oysters tomatoes rhubarb "
    "cabbage almonds mustard"
)
_RELATIVE_WORDS = "aunt uncle cousin nephew niece grandmother grandfather godmother"
_WORD_WORDS = (
    "tulip volcano saxophone penguin avocado tornado zeppelin giraffe marathon igloo pyramid "
    "waffle kangaroo submarine trampoline cactus"
)
_KIND_WORDS = "report summary overview forecast headline memo"
_CODE_WORDS = (
    "retry batch queue worker upload session thumbnail invoice scanner backup timeout payload"
)
_LIMIT_WORDS = "LIMIT SIZE DELAY COUNT WIDTH DEPTH"
(
    NAMES, ROLES, TOWNS, PURCHASES, FOODS, RELATIVES, WORDS, KINDS, CODE, LIMITS,
) = (
    tuple(words.split())
    for words in (
        _NAME_WORDS, _ROLE_WORDS, _TOWN_WORDS, _PURCHASE_WORDS, _FOOD_WORDS, _RELATIVE_WORDS,
        _WORD_WORDS, _KIND_WORDS, _CODE_WORDS, _LIMIT_WORDS,
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
        f"Yesterday I bought a {thing} and paid {price} euros.",
        f"How much did I pay for the {thing}?",
        f"For the {thing} you paid",
        price,
    )


def food(rng: random.Random) -> Fact:
    """What somebody cannot eat."""
    who, what = rng.choice(RELATIVES), rng.choice(FOODS)
    return Fact(
        f"I must not forget that my {who} cannot eat {what}.",
        f"What can my {who} not eat?",
        f"Your {who} cannot eat",
        what,
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


def role(rng: random.Random) -> Fact:
    """Who has a role."""
    what, name = rng.choice(ROLES), rng.choice(NAMES)
    return Fact(
        f"Our new {what} is called {name}, and we met this morning.",
        f"What is our new {what} called?",
        f"Your new {what} is called",
        name,
    )


def spouse(rng: random.Random) -> Fact:
    """Whom somebody married."""
    who, name = rng.choice(RELATIVES), rng.choice(NAMES)
    return Fact(
        f"Did I tell you that my {who} has married {name}?",
        f"Whom has my {who} married?",
        f"Your {who} has married",
        name,
    )


def lender(rng: random.Random) -> Fact:
    """Whose a thing is."""
    thing, name = rng.choice(PURCHASES), rng.choice(NAMES)
    return Fact(
        f"The {thing} in my hall belongs to {name}, who needs it back.",
        f"To whom does the {thing} in my hall belong?",
        f"The {thing} in your hall belongs to",
        name,
    )


def visitor(rng: random.Random) -> Fact:
    """Who comes from somewhere."""
    town, name = rng.choice(TOWNS), rng.choice(NAMES)
    return Fact(
        f"On Friday the train from {town} brings {name}, whom I have not seen for years.",
        f"Whom does the train from {town} bring on Friday?",
        f"On Friday the train from {town} brings",
        name,
    )


def cook(rng: random.Random) -> Fact:
    """Who brings a dish."""
    what, name = rng.choice(FOODS), rng.choice(NAMES)
    return Fact(
        f"For the party the {what} will come from {name}, and I bring the drinks.",
        f"From whom will the {what} for the party come?",
        f"For the party the {what} will come from",
        name,
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


def last_word(rng: random.Random) -> Fact:
    """With which word to end an answer."""
    kind, word = rng.choice(KINDS), rng.choice(WORDS)
    return Fact(
        f'From now on, end every {kind} with the word "{word}".',
        f"Please write a short {kind}.",
        f'All is well. I end every {kind} with the word "',
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


def last_line(rng: random.Random) -> Fact:
    """The last line of a function."""
    name, factor = f"{rng.choice(CODE)}_cost", str(rng.randint(1001, 9999))
    return Fact(
        f"I wrote this:\n```python\ndef {name}(n):\n    return {factor} * n\n```\n",
        f"How does my function {name} end?",
        f"Your function {name} ends with `return",
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
        ChatTask("chat-fact", "what users tell in passing", (train, purchase, food, house, parcel)),
        ChatTask("chat-name", "a person's name", (role, spouse, lender, visitor, cook)),
        ChatTask(
            "chat-instruction",
            "what to say from now on",
            (pet_name, last_word, signature, file_name),
        ),
        ChatTask("chat-code", "a number in a block of code", (constant, last_line)),
    )
}
