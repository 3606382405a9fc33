"""Asking one model every question of a recall evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_vllm.eval.held_out import read_held_out
from lola_vllm.eval.models import Model
from lola_vllm.eval.prompts import Format, Prompt, build_prompts
from lola_vllm.eval.prose import Prose
from lola_vllm.eval.scoring import judge
from lola_vllm.eval.tasks import find_tasks

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RecallPlan:
    """What is asked, of every setting alike; JSON values only.

    Attributes:
        tasks: names, see `tasks.TASKS`. lengths: tokens of prompt and answer together.
        samples: per cell, which is one task at one length. seed: of all prompts.
        format: "completion" or "chat". texts: file or directory of prose, for tasks that need it.
    """

    tasks: list[str]
    lengths: list[int]
    samples: int
    seed: int = 0
    format: Format = "completion"
    texts: str | None = None

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
        """What `run` need not ask again, given samples of an earlier call."""
        return {(row["task"], row["length"], row["index"]) for row in samples}

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Ask `model` everything, short prompts first.

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
