"""Questions as tokens, as long as the length allows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.question import Draft, Question, RealText, Task

Format = Literal["completion", "chat"]


@dataclass(frozen=True)
class Prompt:
    """One sample of a cell.

    Attributes:
        task: its name. length: tokens of prompt and answer room together, at most.
        index: of the sample in its cell. ids: the prompt. question: what it asks.
        distance: tokens from the earliest needed mention to the prompt's end, without the tokens
            that a chat template puts there.
        aim: the distance that was asked for; 0: none, the needle lies at a random depth.
    """

    task: str
    length: int
    index: int
    ids: list[int]
    question: Question
    distance: int
    aim: int = 0


def build_prompts(
    task: Task,
    length: int,
    samples: int,
    seed: int,
    tokenizer: Tokenizer,
    format: Format = "completion",
    text: RealText | None = None,
) -> list[Prompt]:
    """The samples of one cell.

    Sample i's needle lies at random in the i-th of `samples` equal slices of the haystack, in an
    order that is shuffled: all depths are covered, and any run of samples is spread over them.

    Args:
        task: of the cell. length: tokens. samples: their number.
        seed: with task, length, samples and tokenizer it determines every prompt.
        tokenizer: counts the tokens. format: plain text, or the model's chat template with the
            answer begun.
        text: of the kind that the task needs, if it needs any.

    Raises:
        EvalError: `length` has no room for the smallest question, or the text is missing.
    """
    task.check(text)
    slices = list(range(samples))
    random.Random(f"{seed}/{task.name}/{length}/depths").shuffle(slices)
    prompts = []
    for index in range(samples):
        # Seeded by text, which Python hashes the same way in every process.
        rng = random.Random(f"{seed}/{task.name}/{length}/{index}")
        depth = (slices[index] + rng.random()) / samples
        draft = task.draw(rng, depth, length, text)
        question, ids = _longest(task, draft, length, tokenizer, format)
        distance = distance_of(question, tokenizer)
        prompts.append(Prompt(task.name, length, index, ids, question, distance))
    return prompts


def distance_of(question: Question, tokenizer: Tokenizer) -> int:
    """Tokens from the earliest needed mention to the prompt's end; see `Prompt`."""
    # Each part counts from its last mention. The earliest of these is the start.
    start = min(question.text.rindex(part) for part in question.needed or question.expected)
    return len(tokenizer.encode(f"{question.text[start:]} {question.answer_prefix}", special=False))


def _longest(
    task: Task, draft: Draft, length: int, tokenizer: Tokenizer, format: Format
) -> tuple[Question, list[int]]:
    """The question with the most units of haystack that leaves the answer its room."""
    limit = length - task.answer_room
    fits = task.minimum_units
    question = draft(fits)
    ids = encode(question, tokenizer, format)
    if len(ids) > limit:
        raise EvalError(
            f"--lengths {length}: {task.name} needs at least {len(ids) + task.answer_room} tokens"
        )
    # Secant search. A unit is a line or a sentence of some 20 tokens. The first guess is corrected
    # by the measured lengths of prompts.
    per_unit = 20.0
    too_many: int | None = None
    while too_many is None or too_many - fits > 1:
        step = max(1, int((limit - len(ids)) / per_unit))
        if too_many is not None:
            step = min(step, max(1, (too_many - fits) // 2))
        units = fits + step
        candidate = draft(units)
        candidate_ids = encode(candidate, tokenizer, format)
        grown = len(candidate_ids) - len(ids)
        if grown > 0:
            per_unit = grown / step
        if len(candidate_ids) <= limit:
            fits, question, ids = units, candidate, candidate_ids
        else:
            too_many = units
    return question, ids


def encode(question: Question, tokenizer: Tokenizer, format: Format) -> list[int]:
    """Tokens of a prompt, its answer begun."""
    if format == "chat":
        opened = tokenizer.chat(question.text)
        return opened + tokenizer.encode(question.answer_prefix, special=False)
    return tokenizer.encode(f"{question.text} {question.answer_prefix}", special=True)
