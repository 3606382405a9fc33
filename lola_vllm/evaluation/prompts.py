"""Questions as tokens, as long as the length allows, at a depth or a distance.

Prompts of random depth measure lengths. What a state forgets depends on how much it has read since,
so prompts of a distance measure that: the needle, then so many tokens of text, then the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.question import Draft, Question, RealText, Task

# Tokens of a prompt that are not its distance, where --lengths does not say: what stands before the
# needle, and room for the answer. More than a sparse cache of usual size holds.
PRECEDING = 1024
# By how many of these tokens the samples of a cell differ, at most. A model with context shifts may
# recall more just after one than just before, so prompts end at all stages between two.
SPREAD = 2048
GOLDEN = 0.6180339887498949  # its multiples modulo 1 lie evenly, however many there are
# What the wording before a needle, the needle and an answer take, at least.
LEAST_PRECEDING = 256
TOKENS_PER_UNIT = 20.0
ROUNDS = 12


@dataclass(frozen=True)
class Prompt:
    """One sample of a cell.

    Attributes:
        task: its name. length: tokens of prompt and answer room together, at most.
        index: of the sample in its cell. ids: the prompt. question: what it asks.
        distance: tokens from the earliest needed mention to the prompt's end.
        aim: the distance that was asked for; 0: none, the needle lies at a random depth.
    """

    task: str
    length: int
    index: int
    ids: list[int]
    question: Question
    distance: int
    aim: int = 0


def grid(lengths: Sequence[int], distances: Sequence[int]) -> list[tuple[int, int]]:
    """The (length, distance) of every cell, short prompts first.

    Args:
        lengths: of prompt and answer; none: each distance, `PRECEDING` and `SPREAD`.
        distances: from needle to question.

    Raises:
        EvalError: a distance for which no length has room.
    """
    if not lengths:
        return [(distance + PRECEDING + SPREAD, distance) for distance in sorted(distances)]
    for distance in distances:
        if distance + LEAST_PRECEDING > max(lengths):
            raise EvalError(
                f"--distances {distance}: the longest of --lengths is {max(lengths)}, and a prompt "
                f"needs {LEAST_PRECEDING} tokens more than its distance; ask for longer ones, or "
                "leave --lengths out"
            )
    return [
        (length, distance)
        for length in sorted(lengths)
        for distance in sorted(distances)
        if distance + LEAST_PRECEDING <= length
    ]


def build_prompts(
    task: Task,
    length: int,
    samples: int,
    seed: int,
    tokenizer: Tokenizer,
    text: RealText | None = None,
    distance: int = 0,
    spread: int = 0,
) -> list[Prompt]:
    """The samples of one cell.

    Without a distance, sample i's needle lies at random in the i-th of `samples` equal slices of
    the haystack, in an order that is shuffled: all depths are covered, and any run of samples is
    spread over them.

    Args:
        task: of the cell. length: tokens, of the longest prompts. samples: their number.
        seed: with task, length, distance, samples and tokenizer it determines every prompt.
        tokenizer: counts the tokens.
        text: of the kind that the task needs, if it needs any.
        distance: tokens from the needle's value to the prompt's end, as near as whole sentences
            or lines come. A prompt's own is in `Prompt.distance`.
        spread: by how many tokens of what stands before the needle samples differ, at most.

    Raises:
        EvalError: `length` has no room for the smallest question or the distance, or the text is
            too short.
    """
    prompts = []
    if distance:
        for index in range(samples):
            own = length - spread + int(spread * (index * GOLDEN % 1))
            prompt = _at_distance(task, distance, own, index, seed, tokenizer, text)
            prompts.append(replace(prompt, length=length))
        return prompts
    slices = list(range(samples))
    random.Random(f"{seed}/{task.name}/{length}/depths").shuffle(slices)
    for index in range(samples):
        # Seeded by text, which Python hashes the same way in every process.
        rng = random.Random(f"{seed}/{task.name}/{length}/{index}")
        depth = (slices[index] + rng.random()) / samples
        draft = task.draw(rng, depth, length, text)
        question, ids = _longest(task, draft, length, tokenizer)
        back = distance_of(question, tokenizer)
        prompts.append(Prompt(task.name, length, index, ids, question, back))
    return prompts


def distance_of(question: Question, tokenizer: Tokenizer) -> int:
    """Tokens from the earliest needed mention to the prompt's end; see `Prompt`."""
    # Each part counts from its last mention. The earliest of these is the start.
    start = min(question.text.rindex(part) for part in question.needed or question.expected)
    return len(tokenizer.encode(f"{question.text[start:]} {question.answer_prefix}", special=False))


def _longest(
    task: Task, draft: Draft, length: int, tokenizer: Tokenizer
) -> tuple[Question, list[int]]:
    """The question with the most units of haystack that leaves the answer its room."""
    limit = length - task.answer_room
    fits = 1
    question = draft(fits)
    ids = encode(question, tokenizer)
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
        candidate_ids = encode(candidate, tokenizer)
        grown = len(candidate_ids) - len(ids)
        if grown > 0:
            per_unit = grown / step
        if len(candidate_ids) <= limit:
            fits, question, ids = units, candidate, candidate_ids
        else:
            too_many = units
    return question, ids


def _at_distance(
    task: Task,
    distance: int,
    length: int,
    index: int,
    seed: int,
    tokenizer: Tokenizer,
    text: RealText | None,
) -> Prompt:
    limit = length - task.answer_room

    def draft(before: int, after: int) -> Question:
        units = before + after
        if task.needs is not None and text is not None and units > len(text):
            raise EvalError(
                f"--distances {distance}: {task.name} takes more than {units:,} sentences or "
                f"pieces in a prompt of {length:,} tokens, and the held-out documents at --texts "
                f"have {len(text):,}, which would be said again; give more text, or take niah-1"
            )
        # The same seed each time, so that needle and text stay the same.
        rng = random.Random(f"{seed}/{task.name}/{length}/{distance}/{index}")
        return task.draw(rng, (before + 0.5) / units, length, text)(units)

    # Sentences differ in length, and which ones follow the needle depends on how many stand before
    # it. So both numbers are corrected until they fit, and the best pair is kept.
    before, after = 1, max(1, round(distance / TOKENS_PER_UNIT))
    best: tuple[float, Prompt] | None = None
    least = length
    for _ in range(ROUNDS):
        question = draft(before, after)
        ids = encode(question, tokenizer)
        found = distance_of(question, tokenizer)
        per_unit = len(ids) / (before + after) if before + after > 20 else TOKENS_PER_UNIT
        missing, free = distance - found, limit - len(ids)
        if free >= 0:
            off = abs(missing) + free
            if best is None or off < best[0]:
                prompt = Prompt(task.name, length, index, ids, question, found, aim=distance)
                best = off, prompt
            if off <= 2 * per_unit:
                break
        elif before == 1:
            least = max(least, len(ids) + task.answer_room)
        more = max(1 - after, round(missing / per_unit))
        rest = max(1 - before, int((free - more * per_unit) // per_unit))
        if not more and not rest:
            if free >= 0:
                break
            rest = -1
        before, after = max(1, before + rest), after + more
    if best is None:
        raise EvalError(
            f"--lengths {length}: {task.name} with {distance} tokens after its needle needs at "
            f"least {least} tokens"
        )
    return best[1]


def encode(question: Question, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt, its answer begun."""
    return tokenizer.encode(f"{question.text} {question.answer_prefix}", special=True)
