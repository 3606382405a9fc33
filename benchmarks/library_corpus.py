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
# For more documents than the words and names above tell apart, the same and these.
MANY = 288
MORE_WORDS = [
    *("basalt", "clover", "dune", "falcon", "garnet", "harbor", "indigo", "juniper", "meadow"),
]
# (what is hidden, question)
NEEDLE = (
    " The telephone number of the {key} office is {number}.",
    "\nQuestion: Which number do I dial to reach the {key} office?\nAnswer: The telephone "
    "number of the {key} office is",
)
NAMES = [
    *("Abernathy", "Birtwhistle", "Colquhoun", "Dunwoody", "Eastlake", "Fothergill", "Garsdale"),
    *("Heathcote", "Inchbald", "Jessup", "Kilbride", "Lathbury", "Mountjoy", "Netherby", "Ormsby"),
    *("Pettigrew", "Quarles", "Ravenhill", "Saltmarsh", "Thistlewood", "Umfraville", "Vavasour"),
    *("Wetherell", "Yarborough"),
]
MORE_NAMES = [
    first + last
    for first in ("Ash", "Brad", "Cole", "Farn", "Hazel", "Lang", "Mar", "North", "Sten", "Wool")
    for last in ("bury", "combe", "field", "ford", "ham", "ley", "thorpe")
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
    """A question: of which document, about what ("needles" or "facts"), its text, and what a right
    answer has in it."""

    document: int
    kind: str
    text: str
    answer: str

    @property
    def words(self) -> str:
        """The question alone: a search by words also goes by those that begin the answer."""
        return self.text.strip().split("\n")[0].removeprefix("Question: ")


class Corpus(NamedTuple):
    """Token ids of each document, and the questions: the two of the first document, and so on."""

    documents: list[list[int]]
    questions: list[Question]


def make(
    text: str, encode: Callable[[str], list[int]], *, documents: int, tokens: int, seed: int
) -> Corpus:
    """Passages of a text. Each hides a number of seven digits and a fact in people's words, and
    there is a question about either. The numbers of all documents stand in the same sentence.

    Args:
        documents, tokens: how many, 1,128 or fewer, and how long each.

    Raises:
        ValueError: more documents than there are names, or a text that is too short.
    """
    chance = random.Random(seed)
    words, names = WORDS, NAMES
    if documents > MANY:
        words, names = WORDS + MORE_WORDS, NAMES + MORE_NAMES
    subjects = [f"{a}-{b}" for a in words for b in words]
    chance.shuffle(subjects)
    told = [(fact, name) for fact in FACTS for name in names]
    chance.shuffle(told)
    if documents > (most := min(len(subjects), len(told))):
        raise ValueError(f"documents = {documents}: there are names for {most} at most")
    if len(text) < 8 * tokens:
        raise ValueError(f"text: {len(text)} characters, a document takes {8 * tokens}")
    passages, questions = [], []
    for number, key, (fact, name) in zip(range(documents), subjects, told, strict=False):
        digits = str(chance.randrange(10**6, 10**7))
        hidden, question = (x.format(key=key, number=digits) for x in NEEDLE)
        questions.append(Question(number, "needles", question, digits))
        hidden_fact, question, answer = (x.format(name=name) for x in fact)
        question = f"\nQuestion: {question}\nAnswer:"
        questions.append(Question(number, "facts", question, answer))
        pieces = [encode(hidden), encode(f" {hidden_fact}")]
        chance.shuffle(pieces)
        room = tokens - sum(map(len, pieces))
        start = chance.randrange(len(text) - 8 * tokens)
        passage = encode(text[start : start + 8 * tokens])[:room]
        first, second = sorted(int(room * chance.random()) for _ in pieces)
        passages.append(
            passage[:first] + pieces[0] + passage[first:second] + pieces[1] + passage[second:]
        )
    return Corpus(passages, questions)
