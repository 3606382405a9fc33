"""Documents and questions of `library.py`: passages of a text, with something hidden in some."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

WORDS = [
    *("amber", "brook", "cedar", "dawn", "ember", "fjord", "grove", "heron", "iris", "jade"),
    *("kelp", "lotus", "maple", "north", "ocean", "pearl", "quartz", "river", "stone", "tulip"),
    *("umber", "violet", "willow", "yarrow", "zephyr"),
]
# (what is hidden, question): the first is of seed 0, which chose the score.
NEEDLES = (
    (
        " One of the special magic numbers for {key} is: {number}.",
        "\nWhat is the special magic number for {key} mentioned in the provided text? The special "
        "magic number for {key} mentioned in the provided text is",
    ),
    (
        " The telephone number of the {key} office is {number}.",
        "\nQuestion: Which number do I dial to reach the {key} office?\nAnswer: The telephone "
        "number of the {key} office is",
    ),
)
NAMES = [
    *("Abernathy", "Birtwhistle", "Colquhoun", "Dunwoody", "Eastlake", "Fothergill", "Garsdale"),
    *("Heathcote", "Inchbald", "Jessup", "Kilbride", "Lathbury", "Mountjoy", "Netherby", "Ormsby"),
    *("Pettigrew", "Quarles", "Ravenhill", "Saltmarsh", "Thistlewood", "Umfraville", "Vavasour"),
    *("Wetherell", "Yarborough"),
]
# (what is hidden, a question in other words, what a right answer says)
FACTS = (
    ("Mr. {name} keeps the key of the boathouse under a blue vase.",
     "Where has {name} put the boathouse key?", "blue vase"),
    ("Mrs. {name} never drinks coffee, because it gives her headaches.",
     "Why does {name} avoid coffee?", "headache"),
    ("The dog of the {name} family answers to Bramble.",
     "What is the {name} family's dog called?", "bramble"),
    ("Doctor {name} was born in Lisbon and came here by ship.",
     "In which town was the physician {name} born?", "lisbon"),
    ("The {name} farm sells cheese on Thursdays only.",
     "On which day can one buy cheese at the {name} farm?", "thursday"),
    ("Captain {name} lost his left ear in a storm off Iceland.",
     "What did Captain {name} lose at sea?", "ear"),
    ("Young {name} has learnt to play the bassoon from her uncle.",
     "Which instrument does {name} play?", "bassoon"),
    ("Professor {name} pays his gardener in silver spoons.",
     "With what does Professor {name} pay the man who looks after his garden?", "spoon"),
    ("The {name} inn has eleven rooms, and a ghost in the smallest.",
     "How many rooms does the {name} inn have?", "eleven"),
    ("Aunt {name} crossed the Alps on a bicycle when she was sixty.",
     "Which mountains did Aunt {name} cross by bicycle?", "alps"),
    ("The {name} twins are afraid of geese and of nothing else.",
     "Of which animals are the {name} twins afraid?", "geese"),
    ("Judge {name} wears a green scarf to every trial.",
     "What colour is the scarf that Judge {name} wears in court?", "green"),
)  # fmt: skip


class Question(NamedTuple):
    """A question: of which document, its text, and what a right answer has in it."""

    document: int
    text: str
    answer: str


class Corpus(NamedTuple):
    """Token ids of each document, and the questions."""

    documents: list[list[int]]
    questions: list[Question]


def make(
    text: str,
    encode: Callable[[str], list[int]],
    *,
    documents: int,
    tokens: int,
    questions: int,
    kind: str,
    seed: int,
) -> Corpus:
    """Passages of a text; each question is about something hidden in another one of them.

    Args:
        documents, tokens: how many, and how long each. questions: `documents` or fewer.
        kind: "needles" (a number of seven digits) or "facts" (in people's words).
    """
    chance = random.Random(seed)
    passages = []
    for _ in range(documents):
        start = chance.randrange(len(text) - 8 * tokens)
        passages.append(encode(text[start : start + 8 * tokens])[:tokens])
    asked = []
    subjects = [f"{a}-{b}" for a in WORDS for b in WORDS]
    chance.shuffle(subjects)
    names = [(fact, name) for fact in FACTS for name in NAMES]
    chance.shuffle(names)
    for number, right in enumerate(chance.sample(range(documents), questions)):
        if kind == "needles":
            hidden, question = NEEDLES[0 if seed == 0 else 1]
            answer = str(chance.randrange(10**6, 10**7))
            fields = {"key": subjects[number], "number": answer}
            hidden, question = hidden.format(**fields), question.format(**fields)
        else:
            (hidden, question, answer), name = names[number]
            hidden = " " + hidden.format(name=name)
            question = f"\nQuestion: {question.format(name=name)}\nAnswer:"
        ids = encode(hidden)
        room = tokens - len(ids)
        place = int(room * chance.random())
        passages[right] = passages[right][:place] + ids + passages[right][place:room]
        asked.append(Question(right, question, answer))
    return Corpus(passages, asked)
