"""RULER's variable tracking (arXiv 2404.06654): follow assignments through noise.

One chain of five variables, `VAR B = VAR A`, scattered in order; asked for are all variables that
got the first one's value. A solved example of the same form stands before it, as in RULER, but
scales with the prompt, so that the task also fits into 512 tokens.
"""

from __future__ import annotations

import itertools
import random
import string

from lola_vllm.eval import wording
from lola_vllm.eval.prose import Prose
from lola_vllm.eval.questions import Draft, Question

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
        return list(wording.NOISE) * lines
    return [wording.NOISE_LINE + "\n"] * lines


def num_units(lines: int) -> int:
    """Units of noise, between which assignments may stand."""
    return len(_units(lines))


def chain_question(
    context: str, names: list[str], value: int, *, example: str = "", depth: float = 0.0
) -> Question:
    """The question for all of `names`, after a solved `example` if there is one."""
    return Question(
        text=example + wording.CHAIN_PROMPT.format(context=context, value=value),
        answer_prefix=wording.CHAIN_ANSWER.format(count=len(names), value=value),
        expected=tuple(names),
        depth=depth,
    )


def solved_example(rng: random.Random, lines: int) -> str:
    """A question with its answer and the empty lines after it."""
    names, value = draw_names(rng, letters=3), rng.randint(10000, 99999)
    places = sorted(rng.sample(range(num_units(lines)), VARIABLES))
    question = chain_question(chain_text(names, value, lines, places), names, value)
    return f"{question.text} {question.answer_prefix} {' '.join(names)}\n\n\n\n"


def draw_chain(rng: random.Random, depth: float, length: int, prose: Prose | None) -> Draft:
    """Draw a chain; see `questions.Draw`. `depth` is where its first assignment stands.

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
