"""Recall of a model: prompts that hide something, and the scores of the answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.chat_facts import CHAT_TASKS
from lola_vllm.evaluation.distance import PRECEDING, SPREAD, build_prompts_at, grid
from lola_vllm.evaluation.models import Emit, Model
from lola_vllm.evaluation.prompts import Format, Prompt, build_prompts
from lola_vllm.evaluation.question import RealText
from lola_vllm.evaluation.settings import read_held_out
from lola_vllm.evaluation.tasks import TASKS, find_tasks

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


def judge(expected: Sequence[str], answer: str, begins: bool = False) -> Score:
    """Score the model's `answer` against the strings it should hold, or begin with."""
    answer = answer.lower().lstrip()
    found = [
        answer.startswith(text.lower()) if begins else text.lower() in answer for text in expected
    ]
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


def default_lengths() -> list[int]:
    """Of prompts whose needles lie at random depths."""
    return [512, 1024, 2048, 4096, 8192]


@dataclass(frozen=True)
class RecallPlan:
    """The questions to every setting; JSON values only.

    A cell is a task at one length, or, with distances, at one length and distance. Without lengths
    each distance has a length of its own.
    """

    name: ClassVar[str] = "recall"

    tasks: list[str] = option(
        f"of {', '.join([*TASKS, *CHAT_TASKS])}",
        ["niah-1", "niah-2", "niah-3", "passkey", "multikey", "vt"],
    )
    lengths: list[int] = option("tokens of prompt and answer together", default_lengths())
    samples: int = option("per task and length", 50)
    seed: int = option("of all choices", 0)
    format: Format = option(
        "plain text, or the model's chat template with the answer begun", "completion"
    )
    texts: str | None = option(
        "real text, for tasks that hide something in prose or code: a directory that 'lola-vllm "
        "texts' wrote, or a file",
        None,
        type=Path,
        metavar="PATH",
    )
    distances: list[int] = option(
        "tokens of text from the needle to the question, in place of random depths; a prompt then "
        f"has its distance and {PRECEDING:,} to {PRECEDING + SPREAD:,} tokens more, or each of "
        "--lengths that holds it",
        [],
    )

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(length, distance) of the cells of a task; distance 0 stands for random depths."""
        if self.distances:
            return grid(self.lengths, self.distances)
        return [(length, 0) for length in sorted(self.lengths)]

    @property
    def max_length(self) -> int:
        """Longest prompt and answer, in tokens."""
        return max(length for length, _ in self.cells)

    @property
    def tokens(self) -> int:
        """Tokens that a setting costs, at most."""
        return sum(length for length, _ in self.cells) * self.samples * len(self.tasks)

    def cost(self, sample: dict[str, Any]) -> int:
        """Tokens that a sample of `run` counts for in `tokens`."""
        return int(sample["length"])

    def done(self, samples: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        """Questions that `run` need not ask again, given samples of an earlier call."""
        return {(row["task"], row["length"], row.get("aim", 0), row["index"]) for row in samples}

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Ask `model` all questions, short prompts first.

        Args:
            model: answers. emit: is given `{"event": "samples", "samples": [...]}` as often as
                `model.batch` questions are answered. done: see the method of that name.

        Raises:
            EvalError: a length without room for a question, or no text where it is needed.
        """
        for prompts, room in self._cells(model):
            todo = [p for p in prompts if (p.task, p.length, p.aim, p.index) not in done]
            for at in range(0, len(todo), model.batch):
                batch = todo[at : at + model.batch]
                answers = model.complete([prompt.ids for prompt in batch], room)
                rows = [_row(p, a) for p, a in zip(batch, answers, strict=True)]
                emit({"event": "samples", "samples": rows})

    def _cells(self, model: Model) -> Iterator[tuple[list[Prompt], int]]:
        tasks = find_tasks(self.tasks)
        needed = {task.needs for task in tasks if task.needs is not None}
        texts = self._texts(needed) if self.texts is not None else {}
        for length, distance in self.cells:
            for task in tasks:
                text = texts.get(task.needs) if task.needs is not None else None
                rest = (self.samples, self.seed, model.tokenizer, self.format, text)
                if distance:
                    spread = 0 if self.lengths else SPREAD
                    prompts = build_prompts_at(task, distance, length, *rest, spread)
                    yield prompts, task.answer_room
                else:
                    yield build_prompts(task, length, *rest), task.answer_room

    def _texts(self, needed: Collection[type[RealText]]) -> dict[type[RealText], RealText]:
        """Held-out text by its kind, of the files that each kind takes."""
        assert self.texts is not None
        of_files = read_held_out(Path(self.texts)) if needed else {}
        texts: dict[type[RealText], RealText] = {}
        for kind in needed:
            documents = [
                document
                for name, documents in of_files.items()
                for document in documents
                if kind.takes(name)
            ]
            if not documents:
                raise EvalError(
                    f"--texts {self.texts}: has no {kind.what}, only {', '.join(of_files)}; "
                    "give others"
                )
            texts[kind] = kind(documents)
        return texts


def _row(prompt: Prompt, answer: str) -> dict[str, Any]:
    """A sample's line in the results."""
    score = judge(prompt.question.expected, answer, prompt.question.begins)
    aim = {"aim": prompt.aim} if prompt.aim else {}
    return {
        "task": prompt.task,
        "length": prompt.length,
        **aim,
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
