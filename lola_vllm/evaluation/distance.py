"""Prompts whose needle lies a given number of tokens before the end.

Prompts of random depth measure lengths. What a state forgets depends on how much it has read since,
so these measure that: the needle, then so many tokens of text, then the question.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.prompts import Format, Prompt, distance_of, encode
from lola_vllm.evaluation.question import Question, RealText, Task

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


def check_tasks(tasks: Iterable[Task]) -> None:
    """Refuse tasks that hide their answer in more than one place.

    Raises:
        EvalError: such a task.
    """
    for task in tasks:
        if task.several_places:
            raise EvalError(
                f"--distances: {task.name} hides its answer in several places, which have no one "
                "distance; leave it out of --tasks"
            )


def build_prompts_at(
    task: Task,
    distance: int,
    length: int,
    samples: int,
    seed: int,
    tokenizer: Tokenizer,
    format: Format = "completion",
    text: RealText | None = None,
    spread: int = 0,
) -> list[Prompt]:
    """The samples of one cell; see `prompts.build_prompts` for the other arguments.

    Args:
        distance: tokens from the needle's value to the prompt's end, as near as whole sentences
            or lines come. A prompt's own is in `Prompt.distance`.
        spread: by how many tokens of what stands before the needle samples differ, at most. The
            longest are `length` tokens.

    Raises:
        EvalError: `length` has no room for the distance, or the text is too short or missing.
    """
    task.check(text)
    prompts = []
    for index in range(samples):
        own = length - spread + int(spread * (index * GOLDEN % 1))
        prompt = _build(task, distance, own, index, seed, tokenizer, format, text)
        prompts.append(replace(prompt, length=length))
    return prompts


def _build(
    task: Task,
    distance: int,
    length: int,
    index: int,
    seed: int,
    tokenizer: Tokenizer,
    format: Format,
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
        ids = encode(question, tokenizer, format)
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
