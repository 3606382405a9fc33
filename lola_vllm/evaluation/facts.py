"""Held-out questions: facts in prose in the wording of people, without a word of warning before.

RULER's prompts open with an instruction that says what to memorize, and their needle is the same
sentence with another number. A memory could be tuned to both. These tasks share neither wording nor
kind of fact with anything that this project trains or calibrates on. The instruction comes last, as
it does when a person asks about a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from lola_vllm.evaluation.question import Draft, Question, RealText, hide

_FIRST_WORDS = (
    "Agnes Albert Beatrix Bernard Clara Conrad Dorothy Edgar Edith Felix Flora Gilbert Greta "
    "Harold Helena Ignatius Irma Jasper Judith Konrad Lydia Magnus Mabel Nathan Norma Oscar "
    "Ottilie Percy Philippa Quentin Rosalind Rupert Sabina Stanley Theodora Ursula Victor Winifred"
)
_SYLLABLE_WORDS = "bar ben cor dal den fen gar hol kel lan mar nor pel ros san tal ver wen wick zel"
_PLACE_WORDS = (
    "lighthouse mill observatory library ferry chapel brewery museum orchard bakery theatre "
    "harbour quarry vineyard archive foundry tollhouse windmill pharmacy hospital"
)
_MONTH_WORDS = (
    "January February March April May June July August September October November December"
)
_THING_WORDS = (
    "lantern spoon thimble kite marble glove key scarf compass whistle comb hat drum button "
    "basket owl"
)
_COLOUR_WORDS = "crimson azure purple green yellow orange violet brown grey pink white black"
_SPOT_WORDS = (
    "stair piano wardrobe atlas barrel chimney cupboard mattress bookcase wagon boot flagstone "
    "bathtub statue barn cradle saddle bench kettle doormat"
)
_FIRST, _SYLLABLES, _PLACES, _MONTHS, _THINGS, _COLOURS, _SPOTS = (
    tuple(words.split())
    for words in (
        _FIRST_WORDS, _SYLLABLE_WORDS, _PLACE_WORDS, _MONTH_WORDS, _THING_WORDS, _COLOUR_WORDS,
        _SPOT_WORDS,
    )
)  # fmt: skip
_SIDES = ("under", "behind", "inside", "beside", "above")


def _surname(rng: random.Random) -> str:
    return (rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES) + rng.choice(["", "by", "ton"])).title()


def _town(rng: random.Random) -> str:
    return rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES) + rng.choice(["ford", "ham", "mouth"])


@dataclass(frozen=True)
class Fact:
    """A fact, and how one asks for it.

    Attributes:
        sentence: as it stands in the text. question: that ends the prompt. begun: of the answer.
        answer: what is expected.
    """

    sentence: str
    question: str
    begun: str
    answer: str


def name_of_keeper(rng: random.Random) -> Fact:
    """A person's name."""
    where = f"the {rng.choice(_PLACES)} at {_town(rng).title()}"
    who = f"{rng.choice(_FIRST)} {_surname(rng)}"
    return Fact(
        f"In those years {who} looked after {where}.",
        f"Who looked after {where}?",
        f"The person who looked after {where} was",
        who,
    )


def date_of_opening(rng: random.Random) -> Fact:
    """A day, a month and a year."""
    what = f"the {rng.choice(_PLACES)} of {_town(rng).title()}"
    when = f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1702, 1998)}"
    return Fact(
        f"On {when} {what} opened its doors.",
        f"On which day did {what} open its doors?",
        f"{what[0].upper()}{what[1:]} opened its doors on",
        when,
    )


def value_in_code(rng: random.Random) -> Fact:
    """A constant of a program."""
    name = f"{rng.choice(_SYLLABLES)}_{rng.choice(_SYLLABLES)}_limit".upper()
    letters, digits = rng.sample("bcdfgkmprstvwxz", 2), rng.randint(10000, 99999)
    value = f"{letters[0]}{digits // 100}{letters[1]}{digits % 100:02}"
    return Fact(
        f'The file sets {name} = "{value}" for all users.',
        f"What is the value of {name}?",
        f'The file sets {name} = "',
        value,
    )


def place_of_thing(rng: random.Random) -> Fact:
    """Words of a sentence: whose thing lies where."""
    thing, owner = rng.choice(_THINGS), f"{rng.choice(_FIRST)} {_surname(rng)}"
    where = f"{rng.choice(_SIDES)} the {rng.choice(_COLOURS)} {rng.choice(_SPOTS)}"
    return Fact(
        f"{owner} hid the {thing} {where}, and told nobody.",
        f"Where did {owner} hide the {thing}?",
        f"{owner} hid the {thing}",
        where,
    )


@dataclass(frozen=True)
class FactDraw:
    """Draws a fact, hides it in prose, and asks for it at the end; see `Draw`."""

    fact: Callable[[random.Random], Fact]

    def __call__(
        self, rng: random.Random, depth: float, length: int, text: RealText | None
    ) -> Draft:
        assert text is not None
        fact, start = self.fact(rng), text.start(rng)

        def draft(units: int) -> Question:
            mixed, (found,) = hide(text.read(start, units), [(depth, fact.sentence)])
            return Question(
                text=f"{' '.join(mixed)}\n\n{fact.question}",
                answer_prefix=fact.begun,
                expected=(fact.answer,),
                depth=found,
            )

        return draft
