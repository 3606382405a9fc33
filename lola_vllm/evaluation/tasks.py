"""The recall tasks: what is hidden in how much text, and which question asks for it.

The sentences are word for word as published, so that results compare. Needle tasks and variable
tracking: RULER (arXiv 2404.06654), its odd spelling included. The keys' words are our own.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.code_calls import CALL_ROOM, CallDraw, Code
from lola_vllm.evaluation.facts import CHAT_FORMS, PROSE_FORMS, FactDraw
from lola_vllm.evaluation.question import Draft, Prose, Question, RealText, Task, hide

# --- wording

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NOISE_LINE = " ".join(NOISE)

# {kind}: number or uuid. Needles name the plural even where there is one, as RULER's do.
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NEEDLE_PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {key} mentioned in the provided text?"
)
NEEDLE_ANSWER = "The special magic {kind} for {key} mentioned in the provided text is"
# Where several values are asked for.
NEEDLES_PROMPT = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {key} mentioned in the provided text?"
)
NEEDLES_ANSWER = "The special magic {kind}s for {key} mentioned in the provided text are"

CHAIN_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
CHAIN_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {value}, they are:"
)

_ADJECTIVES = (
    "amber ancient bitter blunt brave brisk calm clever coarse cosmic crisp curious daring "
    "deep distant dusty eager early fierce foggy frozen gentle giant golden grand hasty "
    "hidden hollow humble icy idle jolly keen lively lonely loud lucky mellow mighty modest "
    "narrow noble odd pale patient polite proud quick quiet rapid restless rough royal rustic "
    "salty sharp shiny silent silver simple sleepy slender smooth solid sour steady stormy "
    "strange subtle sunny swift tender tidy tiny vague vast velvet vivid warm weary wild "
    "windy wise witty young"
)
_NOUNS = (
    "anchor apple arrow autumn badge basket beacon bell bottle branch bridge button cabin "
    "candle canyon castle cedar chapter circle cliff clock cloud coast comet copper corner "
    "cradle desert dragon drum eagle echo engine falcon feather fiddle forest fountain garden "
    "glacier hammer harbor hazel hill island ivory jacket jungle kettle ladder lantern lemon "
    "lever lizard magnet maple marble meadow mirror mountain needle ocean orchard otter "
    "paddle palace pearl pebble pepper piano pillow planet pocket prairie quarry rabbit raven "
    "ribbon river rocket saddle sailor shadow shelter signal spoon spring stable summit "
    "temple thunder tiger timber tower tunnel turtle valley velcro violin wagon walnut "
    "whistle willow window winter zebra"
)
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())


# --- needles in a haystack


@dataclass(frozen=True)
class NeedleDraw:
    """Draws one of RULER's `niah` questions; see `Task.draw`.

    Attributes:
        haystack: "noise": one line of five sentences, repeated; "prose": real text; "needles":
            nothing but lines like the needle, with other keys.
        value: a number of 7 digits, or a uuid.
        keys: that are hidden, of which the first `queries` are asked for.
        values: of each key, in a needle each.
        queries: keys that are asked for.
        key: two words, or a uuid.
    """

    haystack: Literal["noise", "prose", "needles"]
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: Literal["words", "uuid"] = "words"

    def __call__(
        self, rng: random.Random, depth: float, length: int, text: RealText | None
    ) -> Draft:
        keys: list[str] = []
        while len(keys) < self.keys:
            key = self._draw_key(rng)
            if key not in keys:
                keys.append(key)
        pairs = [(key, self._draw_value(rng)) for key in keys for _ in range(self.values)]
        depths = [depth, *(rng.random() for _ in pairs[1:])]
        needles = [(where, self._needle(*pair)) for where, pair in zip(depths, pairs, strict=True)]
        asked = keys[: self.queries]
        values = [value for key, value in pairs if key in asked]
        start = text.start(rng) if text and self.haystack == "prose" else (0, 0)
        others = random.Random(rng.random())

        def lines(units: int) -> list[str]:
            if self.haystack == "noise":
                return [NOISE_LINE] * units
            if self.haystack == "prose":
                assert text is not None
                return text.read(start, units)
            while len(distractors) < units:
                key = self._draw_key(others)
                if key not in keys:
                    distractors.append(self._needle(key, self._draw_value(others)))
            return distractors[:units]

        distractors: list[str] = []

        def draft(units: int) -> Question:
            mixed, found = hide(lines(units), needles)
            separator = " " if self.haystack == "prose" else "\n"
            context = separator.join(mixed)
            return needle_question(context, self.value, asked, values, depth=found[0])

        return draft

    def _draw_key(self, rng: random.Random) -> str:
        return draw_key(rng) if self.key == "words" else draw_uuid(rng)

    def _draw_value(self, rng: random.Random) -> str:
        return str(rng.randint(10**6, 10**7 - 1)) if self.value == "number" else draw_uuid(rng)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def draw_key(rng: random.Random) -> str:
    """An adjective and a noun, one of about 10,000 pairs."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_uuid(rng: random.Random) -> str:
    """A random uuid of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def needle_question(
    context: str, kind: str, keys: Sequence[str], values: Sequence[str], *, depth: float
) -> Question:
    """The question for the value of a key, or for all values of one or more keys.

    Args:
        context: the text that hides them.
    """
    alone = len(values) == 1
    text = NEEDLE_PROMPT if alone else NEEDLES_PROMPT
    begun = NEEDLE_ANSWER if alone else NEEDLES_ANSWER
    key = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return Question(
        text=text.format(kind=kind, context=context, key=key),
        answer_prefix=begun.format(kind=kind, key=key),
        expected=tuple(values),
        depth=depth,
    )


# --- variable tracking: follow assignments through noise
# One chain of five variables, `VAR B = VAR A`, scattered in order; asked for are all variables that
# got the first one's value. A solved example of the same form stands before it, as in RULER, but
# scales with the prompt, so that the task also fits into 512 tokens.

VARIABLES = 5
# Lines of noise in the solved example: RULER's fills 500 tokens with about 10 of them.
MAX_EXAMPLE_LINES = 10
TOKENS_PER_EXAMPLE_LINE = 150


def draw_names(rng: random.Random, letters: int) -> list[str]:
    """Different names of so many capital letters, one per variable."""
    names: list[str] = []
    while len(names) < VARIABLES:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names


def chain_text(names: list[str], value: int, lines: int, places: list[int]) -> str:
    """The assignments among noise.

    Args:
        names: of the variables. value: of the first. lines: of noise.
        places: rising, one per name: units of noise before its assignment (see `num_units`).
    """
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
    units = _units(lines)
    for j, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
        units.insert(place + j, assignment)
    return " ".join(units).replace(". \n", ".\n")


def _units(lines: int) -> list[str]:
    # So few lines would not keep the assignments apart: their sentences are the units then.
    if lines <= VARIABLES:
        return list(NOISE) * lines
    return [NOISE_LINE + "\n"] * lines


def num_units(lines: int) -> int:
    """Units of noise, between which assignments may stand."""
    return len(_units(lines))


def chain_question(
    context: str, names: list[str], value: int, *, example: str = "", depth: float = 0.0
) -> Question:
    """The question for all of `names`, after a solved `example` if there is one."""
    return Question(
        text=example + CHAIN_PROMPT.format(context=context, value=value),
        answer_prefix=CHAIN_ANSWER.format(count=len(names), value=value),
        expected=tuple(names),
        depth=depth,
    )


def solved_example(rng: random.Random, lines: int) -> str:
    """A question with its answer and the empty lines after it."""
    names, value = draw_names(rng, letters=3), rng.randint(10000, 99999)
    places = sorted(rng.sample(range(num_units(lines)), VARIABLES))
    question = chain_question(chain_text(names, value, lines, places), names, value)
    return f"{question.text} {question.answer_prefix} {' '.join(names)}\n\n\n\n"


def draw_chain(rng: random.Random, depth: float, length: int, text: RealText | None) -> Draft:
    """Draw a chain; see `Task.draw`. `depth` is where its first assignment stands.

    The others follow at random places after it.
    """
    names, value = draw_names(rng, letters=5), rng.randint(10000, 99999)
    lines = min(MAX_EXAMPLE_LINES, max(2, length // TOKENS_PER_EXAMPLE_LINE))
    example = solved_example(rng, lines)
    rest = sorted(rng.random() for _ in names[1:])

    def draft(units: int) -> Question:
        n = num_units(units)
        first = int(depth * n)
        places = [first, *(first + int(share * (n - first)) for share in rest)]
        context = chain_text(names, value, units, places)
        return chain_question(context, names, value, example=example, depth=first / n)

    return draft


# --- the tasks by name

# Room for an answer: 7 digits, a uuid's 36 characters or five names, in tokenizers that take a
# token per digit, and some words before them. RULER leaves 128 tokens (30 for chains).
_NUMBER_ROOM, _UUID_ROOM, _CHAIN_ROOM, _FACT_ROOM = 24, 56, 48, 24
# Four numbers, which models that repeat the keys need; the keys of `multiquery` are long.
_NUMBERS_ROOM = 96

# RULER's needles, how a question is drawn, and room for the answer.
_NEEDLES = {
    "niah-1": (NeedleDraw("noise"), _NUMBER_ROOM),  # S-NIAH-1
    "niah-2": (NeedleDraw("prose"), _NUMBER_ROOM),  # S-NIAH-2
    "niah-3": (NeedleDraw("prose", value="uuid"), _UUID_ROOM),  # S-NIAH-3
    "multikey": (NeedleDraw("prose", keys=4), _NUMBER_ROOM),  # MK-NIAH-1
    "multikey-2": (NeedleDraw("needles"), _NUMBER_ROOM),  # MK-NIAH-2
    "multikey-3": (NeedleDraw("needles", value="uuid", key="uuid"), _UUID_ROOM),  # MK-NIAH-3
    "multivalue": (NeedleDraw("prose", values=4), _NUMBERS_ROOM),  # MV-NIAH
    "multiquery": (NeedleDraw("prose", keys=4, queries=4), _NUMBERS_ROOM),  # MQ-NIAH
}
_ALL = (
    *(
        Task(name, draw, room, Prose if draw.haystack == "prose" else None, room == _NUMBERS_ROOM)
        for name, (draw, room) in _NEEDLES.items()
    ),
    *(Task(name, FactDraw(form), _FACT_ROOM, Prose) for name, form in PROSE_FORMS.items()),
    Task("code-call", CallDraw(draw_key), CALL_ROOM, Code),
    Task("vt", draw_chain, _CHAIN_ROOM, several_places=True),
)
TASKS = {task.name: task for task in _ALL}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in order, doubles dropped.

    Raises:
        EvalError: a name that no task has, or none at all.
    """
    for name in names:
        if name not in TASKS:
            known = ", ".join([*TASKS, *CHAT_FORMS])
            raise EvalError(f"--tasks: {name!r} is no task; choose from {known}")
    if not names:
        raise EvalError(f"--tasks: name at least one of {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]
