"""Recall of a model: prompts that hide something, and the scores of the answers."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lola_vllm.cli_options import option
from lola_vllm.eval import EvalError
from lola_vllm.eval.models import Emit, Model, Tokenizer
from lola_vllm.eval.question import Draft, Prose, Question, Task
from lola_vllm.eval.settings import read_held_out
from lola_vllm.eval.tasks import TASKS, find_tasks

# --- prompts: questions as tokens, as long as the length allows

Format = Literal["completion", "chat"]


@dataclass(frozen=True)
class Prompt:
    """One sample of a cell.

    Attributes:
        task: its name. length: tokens of prompt and answer room together, at most.
        index: of the sample in its cell. ids: the prompt. question: what it asks.
        distance: tokens from the earliest needed mention to the prompt's end, without the tokens
            that a chat template puts there.
    """

    task: str
    length: int
    index: int
    ids: list[int]
    question: Question
    distance: int


def build_prompts(
    task: Task,
    length: int,
    samples: int,
    seed: int,
    tokenizer: Tokenizer,
    format: Format = "completion",
    prose: Prose | None = None,
) -> list[Prompt]:
    """The samples of one cell.

    Sample i's needle lies at random in the i-th of `samples` equal slices of the haystack, in an
    order that is shuffled: all depths are covered, and any run of samples is spread over them.

    Args:
        task: of the cell. length: tokens. samples: their number.
        seed: with task, length, samples and tokenizer it determines every prompt.
        tokenizer: counts the tokens. format: plain text, or the model's chat template with the
            answer begun.
        prose: for tasks that need it.

    Raises:
        EvalError: `length` has no room for the smallest question, or prose is missing.
    """
    if task.needs_prose and prose is None:
        raise EvalError(f"--tasks {task.name}: needs real text; give --texts DIR")
    slices = list(range(samples))
    random.Random(f"{seed}/{task.name}/{length}/depths").shuffle(slices)
    prompts = []
    for index in range(samples):
        # Seeded by text, which Python hashes the same way in every process.
        rng = random.Random(f"{seed}/{task.name}/{length}/{index}")
        depth = (slices[index] + rng.random()) / samples
        draft = task.draw(rng, depth, length, prose)
        question, ids = _longest(task, draft, length, tokenizer, format)
        distance = _distance(question, tokenizer)
        prompts.append(Prompt(task.name, length, index, ids, question, distance))
    return prompts


def _distance(question: Question, tokenizer: Tokenizer) -> int:
    # Each part counts from its last mention. The earliest of these is the start.
    start = min(question.text.rindex(part) for part in question.expected)
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


# --- scores: RULER's string match, and the right share of an answer that is partly right


@dataclass(frozen=True)
class Score:
    """How right an answer is.

    Attributes:
        match: share of the expected strings that occur in the answer, letter case aside: RULER's
            `string_match_all` (arXiv 2404.06654).
        exact: all of them do.
        share: mean over the expected strings of the characters that are right in their place, 1
            where the string occurs. Guessed digits score about 0.1.
    """

    match: float
    exact: bool
    share: float


def judge(expected: Sequence[str], answer: str) -> Score:
    """Score the model's `answer` against the strings it should hold."""
    answer = answer.lower()
    found = [text.lower() in answer for text in expected]
    match = sum(found) / len(expected)
    shares = [
        1.0 if hit else _best_share(text.lower(), answer)
        for text, hit in zip(expected, found, strict=True)
    ]
    return Score(match, all(found), sum(shares) / len(shares))


def _best_share(text: str, answer: str) -> float:
    """Largest share of `text` that a run of the same kind of characters has right, in place."""
    if text.isdigit():
        runs = re.findall(r"\d+", answer)
    elif re.fullmatch(r"[0-9a-f-]+", text):  # a uuid
        runs = re.findall(r"[0-9a-f-]+", answer)
    else:  # a name is right or wrong: its letters are random, so a part of it has no meaning
        return 0.0
    best = 0
    for run in runs:
        best = max(best, sum(a == b for a, b in zip(text, run, strict=False)))
    return best / len(text)


# --- the plan


@dataclass(frozen=True)
class RecallPlan:
    """The questions to every setting; JSON values only. A cell is a task at one length."""

    name: ClassVar[str] = "recall"

    tasks: list[str] = option(
        f"of {', '.join(TASKS)}", ["niah-1", "niah-2", "niah-3", "passkey", "multikey", "vt"]
    )
    lengths: list[int] = option(
        "tokens of prompt and answer together", [512, 1024, 2048, 4096, 8192]
    )
    samples: int = option("per task and length", 50)
    seed: int = option("of all choices", 0)
    format: Format = option(
        "plain text, or the model's chat template with the answer begun", "completion"
    )
    texts: str | None = option(
        "prose to hide needles in, for niah-2, niah-3 and multikey: a directory that 'lola-vllm "
        "texts' wrote, or a file",
        None,
        type=Path,
        metavar="PATH",
    )

    @property
    def max_length(self) -> int:
        """Longest prompt and answer, in tokens."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that a setting costs, at most."""
        return sum(self.lengths) * self.samples * len(self.tasks)

    def cost(self, sample: dict[str, Any]) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""
        return int(sample["length"])

    def done(self, samples: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        """Questions that `run` need not ask again, given samples of an earlier call."""
        return {(row["task"], row["length"], row["index"]) for row in samples}

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Ask `model` all questions, short prompts first.

        Args:
            model: answers. emit: is given `{"event": "samples", "samples": [...]}` as often as
                `model.batch` questions are answered. done: see the method of that name.

        Raises:
            EvalError: a length without room for a question, or no prose where it is needed.
        """
        for prompts, room in self._cells(model):
            todo = [p for p in prompts if (p.task, p.length, p.index) not in done]
            for at in range(0, len(todo), model.batch):
                batch = todo[at : at + model.batch]
                answers = model.complete([prompt.ids for prompt in batch], room)
                rows = [_row(p, a) for p, a in zip(batch, answers, strict=True)]
                emit({"event": "samples", "samples": rows})

    def _cells(self, model: Model) -> Iterator[tuple[list[Prompt], int]]:
        tasks = find_tasks(self.tasks)
        prose = None
        if self.texts is not None and any(task.needs_prose for task in tasks):
            kinds = read_held_out(Path(self.texts))
            prose = Prose([document for documents in kinds.values() for document in documents])
        for length in sorted(self.lengths):
            for task in tasks:
                prompts = build_prompts(
                    task, length, self.samples, self.seed, model.tokenizer, self.format, prose
                )
                yield prompts, task.answer_room


def _row(prompt: Prompt, answer: str) -> dict[str, Any]:
    """A sample's line in the results."""
    score = judge(prompt.question.expected, answer)
    return {
        "task": prompt.task,
        "length": prompt.length,
        "index": prompt.index,
        "depth": round(prompt.question.depth, 4),
        "distance": prompt.distance,
        "prompt_tokens": len(prompt.ids),
        "expected": list(prompt.question.expected),
        "answer": answer,
        "exact": score.exact,
        "match": score.match,
        "share": score.share,
    }
