"""Facts in the wording of people, for prose and for conversations, and how one asks for them.

RULER's prompts open with an instruction that says what to memorize, and their needle is the same
sentence with another number. A memory could be tuned to both. These share neither wording nor kind
of fact with anything that this project trains or calibrates on, and no name or value: those of
training are in `training/distill/retrieval_facts.py`. Facts in prose and facts in conversations
share no wording either.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lola_vllm.evaluation.question import Draft, Question, RealText, hide

# --- what is drawn

WORDS = {
    "first": "Agnes Albert Beatrix Bernard Clara Conrad Dorothy Edgar Edith Felix Flora Gilbert "
    "Greta Harold Helena Ignatius Irma Jasper Judith Konrad Lydia Magnus Mabel Nathan Norma Oscar "
    "Ottilie Percy Philippa Quentin Rosalind Rupert Sabina Stanley Theodora Ursula Victor Winifred",
    "syllable": "bar ben cor dal den fen gar hol kel lan mar nor pel ros san tal ver wen wick zel",
    "building": "lighthouse mill observatory library ferry chapel brewery museum orchard bakery "
    "theatre harbour quarry vineyard archive foundry tollhouse windmill pharmacy hospital",
    "month": "January February March April May June July August September October November "
    "December",
    "trinket": "lantern spoon thimble kite marble glove key scarf compass whistle comb hat drum "
    "button basket owl",
    "side": "under behind inside beside above",
    "colour": "crimson azure purple green yellow orange violet brown grey pink white black",
    "spot": "stair piano wardrobe atlas barrel chimney cupboard mattress bookcase wagon boot "
    "flagstone bathtub statue barn cradle saddle bench kettle doormat",
    # Of conversations.
    "name": "Alistair Bronwen Cedric Delphine Ezekiel Francesca Gideon Henrietta Imogen Joachim "
    "Katarina Leopold Marguerite Nigel Octavia Patrick Rebecca Sebastian Tabitha Ulrich Vivian "
    "Wilfred Yvonne Zachary",
    "role": "dentist plumber tutor landlord notary gardener tailor carpenter florist mechanic "
    "lawyer nurse veterinarian",
    "town": "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Geneva Hamburg Seville Naples Bergen "
    "Krakow Antwerp Toulouse Glasgow Zagreb Tallinn Porto Basel",
    "purchase": "raincoat bookshelf microscope lawnmower sofa printer tent sewing-machine "
    "telescope freezer skateboard typewriter wheelbarrow mattress trombone",
    "relative": "aunt uncle cousin nephew niece grandmother grandfather godmother",
    "word": "tulip volcano saxophone penguin avocado tornado zeppelin giraffe marathon igloo "
    "pyramid waffle kangaroo submarine trampoline cactus",
    "part": "retry batch queue worker upload session thumbnail invoice scanner backup timeout "
    "payload",
    "limit": "LIMIT SIZE DELAY COUNT WIDTH DEPTH",
}
VALUES = {key: tuple(words.split()) for key, words in WORDS.items()}


def _value(key: str, rng: random.Random) -> str:
    return rng.choice(VALUES[key])


def _person(rng: random.Random) -> str:
    first, *parts = (_value(key, rng) for key in ("first", "syllable", "syllable"))
    return f"{first} {(''.join(parts) + rng.choice(['', 'by', 'ton'])).title()}"


def _place(rng: random.Random) -> str:
    parts = [_value("syllable", rng) for _ in range(2)]
    return ("".join(parts) + rng.choice(["ford", "ham", "mouth"])).title()


def _serial(rng: random.Random) -> str:
    letters, digits = rng.sample("bcdfgkmprstvwxz", 2), rng.randint(10000, 99999)
    return f"{letters[0]}{digits // 100}{letters[1]}{digits % 100:02}"


def _number(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randint(low, high))


# What stands in braces, where it is not one of `WORDS`.
DRAWN: dict[str, Callable[[random.Random], str]] = {
    "person": _person,
    "place": _place,
    "date": lambda rng: f"{rng.randint(1, 28)} {_value('month', rng)} {rng.randint(1702, 1998)}",
    "setting": lambda rng: f"{_value('syllable', rng)}_{_value('syllable', rng)}_limit".upper(),
    "serial": _serial,
    "where": lambda rng: f"{_value('side', rng)} the {_value('colour', rng)} {_value('spot', rng)}",
    "time": lambda rng: f"{rng.randint(10, 23)}:{rng.randint(10, 59)}",
    "hundreds": _number(101, 999),
    "floor": _number(11, 98),
    "year": _number(1931, 1999),
    "constant": lambda rng: f"{_value('part', rng).upper()}_{_value('limit', rng)}",
    "function": lambda rng: f"{_value('part', rng)}_cost",
    "thousands": _number(1001, 9999),
}


# --- the forms


class Fact(NamedTuple):
    """A fact, and how one asks for it.

    Attributes:
        sentence: as it is said. question: that asks for it. begun: of the answer.
        answer: what is expected.
    """

    sentence: str
    question: str
    begun: str
    answer: str


class Form(NamedTuple):
    """What facts of a kind are made of, with the names of `WORDS` and `DRAWN` in braces.

    Attributes:
        drawn: names, in the order in which they are drawn; the last is the answer.
        sentence, question, begun: see `Fact`.
    """

    drawn: str
    sentence: str
    question: str
    begun: str

    def draw(self, rng: random.Random) -> Fact:
        """A fact; `rng` is the only source of randomness."""
        names = self.drawn.split()
        values = {name: DRAWN[name](rng) if name in DRAWN else _value(name, rng) for name in names}
        sentence, question, begun = (text.format(**values) for text in self[1:])
        return Fact(sentence, question, begun, values[names[-1]])


PROSE_FORMS = {
    "fact-name": Form(
        "building place person",
        "In those years {person} looked after the {building} at {place}.",
        "Who looked after the {building} at {place}?",
        "The person who looked after the {building} at {place} was",
    ),
    "fact-date": Form(
        "building place date",
        "On {date} the {building} of {place} opened its doors.",
        "On which day did the {building} of {place} open its doors?",
        "The {building} of {place} opened its doors on",
    ),
    "fact-code": Form(
        "setting serial",
        'The file sets {setting} = "{serial}" for all users.',
        "What is the value of {setting}?",
        'The file sets {setting} = "',
    ),
    "fact-place": Form(
        "trinket person where",
        "{person} hid the {trinket} {where}, and told nobody.",
        "Where did {person} hide the {trinket}?",
        "{person} hid the {trinket}",
    ),
}
# What users say in the middle of a conversation, by task.
CHAT_FORMS = {
    "chat-fact": (
        Form(
            "town time",
            "By the way, my train to {town} leaves at {time}.",
            "At what time does my train to {town} leave?",
            "Your train to {town} leaves at",
        ),
        Form(
            "purchase hundreds",
            "For my new {purchase} I paid {hundreds} euros, by the way.",
            "How much did I pay for my new {purchase}?",
            "For your new {purchase} you paid",
        ),
        Form(
            "relative floor",
            "I must call my {relative}, who lives on floor {floor} of a tower.",
            "On which floor does my {relative} live?",
            "Your {relative} lives on floor",
        ),
        Form(
            "town hundreds",
            "Before I moved I lived in {town}, in house {hundreds}.",
            "In which house did I live in {town}?",
            "In {town} you lived in house",
        ),
        Form(
            "relative hundreds",
            "The parcel for my {relative} weighs {hundreds} grams, I have just seen.",
            "How heavy is the parcel for my {relative}?",
            "The parcel for your {relative} weighs",
        ),
    ),
    "chat-name": (
        Form(
            "name role",
            "This morning I met {name}. You know, {name} works as a {role} here.",
            "What does {name} do for a living?",
            "{name} works as a",
        ),
        Form(
            "name town",
            "Did I tell you that {name} has moved to {town}?",
            "Where does {name} live now?",
            "{name} has moved to",
        ),
        Form(
            "name purchase",
            "Last week {name} borrowed my {purchase}, and I need it back.",
            "What did {name} borrow from me last week?",
            "Last week {name} borrowed your",
        ),
        Form(
            "name year",
            "I have just heard that {name} was born in {year}.",
            "In which year was {name} born?",
            "{name} was born in",
        ),
    ),
    "chat-instruction": (
        Form(
            "purchase word",
            'From now on, when we speak of my {purchase}, call it "{word}".',
            "Say that you like my {purchase}.",
            'When we speak of your {purchase}, I call it "',
        ),
        Form(
            "role word",
            'From now on, greet our {role} with "{word}".',
            "Please write a greeting to our {role}.",
            'I greet our {role} with "',
        ),
        Form(
            "relative word",
            'From now on, sign all letters to my {relative} as "{word}".',
            "Please write one line to my {relative}.",
            'All is well. I sign all letters to your {relative} as "',
        ),
        Form(
            "town word",
            'From now on, put everything about {town} into the folder "{word}".',
            "Here is a picture of {town}. Please put it away.",
            'I put everything about {town} into the folder "',
        ),
    ),
    "chat-code": (
        Form(
            "constant thousands",
            "This is a part of my program:\n```python\n{constant} = {thousands}\n```\n",
            "What does my program set {constant} to?",
            "Your program has the line `{constant} =",
        ),
        Form(
            "function thousands",
            "I wrote this:\n```python\ndef {function}(n):\n    return {thousands} * n\n```\n",
            "Please show me my function {function} again.",
            "```python\ndef {function}(n):\n    return",
        ),
    ),
}


@dataclass(frozen=True)
class FactDraw:
    """Draws a fact, hides it in prose, and asks for it at the end; see `Task.draw`.

    The instruction comes last, as it does when a person asks about a text.
    """

    form: Form

    def __call__(
        self, rng: random.Random, depth: float, length: int, text: RealText | None
    ) -> Draft:
        assert text is not None
        fact, start = self.form.draw(rng), text.start(rng)

        def draft(units: int) -> Question:
            mixed, (found,) = hide(text.read(start, units), [(depth, fact.sentence)])
            return Question(
                text=f"{' '.join(mixed)}\n\n{fact.question}",
                answer_prefix=fact.begun,
                expected=(fact.answer,),
                depth=found,
            )

        return draft
