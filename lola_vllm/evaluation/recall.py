"""Recall of a model: prompts that hide something, and the scores of the answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.held_out import read_held_out, read_kinds
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.plan import Plan
from lola_vllm.evaluation.prompts import SPREAD, Prompt, build_prompts, grid
from lola_vllm.evaluation.question import Prose, RealText
from lola_vllm.evaluation.results import Record, Row, markdown, wilson
from lola_vllm.evaluation.tasks import find_tasks

if TYPE_CHECKING:
    from lola_vllm.evaluation.engine import EngineModel


def judge(expected: Sequence[str], answer: str, begins: bool = False) -> dict[str, Any]:
    """Score the model's `answer` against the strings it should hold, or begin with.

    Returns:
        exact: whether it holds all of them. match: share of them that occur in the answer, letter
        case aside, which is RULER's `string_match_all` (arXiv 2404.06654).
    """
    answer = answer.lower().lstrip()
    found = [
        answer.startswith(text.lower()) if begins else text.lower() in answer for text in expected
    ]
    return {"exact": all(found), "match": sum(found) / len(expected)}


# --- numbers and table, of conversations too

# A task, tokens of prompt and answer, and from the needle to the question; 0: a random depth.
Cell: TypeAlias = tuple[str, int, int]


def recall_cells(samples: Iterable[Row]) -> dict[Cell, Row]:
    """Counts of exact answers with Wilson's interval, and the mean of RULER's score."""
    groups: dict[Cell, list[Row]] = {}
    for row in samples:
        groups.setdefault((row["task"], row["length"], row.get("aim", 0)), []).append(row)
    found = {}
    for key, rows in groups.items():
        n, exact = len(rows), sum(row["exact"] for row in rows)
        low, high = wilson(exact, n)
        match = sum(row["match"] for row in rows) / n
        found[key] = {"samples": n, "exact": exact, "low": low, "high": high, "match": match}
        found[key]["rate"] = exact / n
    return found


class RecallRows(Plan):
    """Plans whose rows are answers to one question each."""

    def numbers(self, record: Record, reference: Record | None) -> Row:
        cells = []
        for (task, length, distance), cell in recall_cells(record.samples).items():
            at = {"distance": distance} if distance else {}
            cells.append({"task": task, "length": length, **at, **cell})
        return {"cells": cells}

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """A table of each task: settings by lengths and distances."""
        found = [recall_cells(record.samples) for record in records]
        keys = sorted({key for cells in found for key in cells})
        blocks = []
        for task in dict.fromkeys(key[0] for cells in found for key in cells):
            columns = [key for key in keys if key[0] == task]
            heads = [f"{n:,}" + (f", {back:,} back" if back else "") for _, n, back in columns]
            rows = [["setting", *heads]]
            for record, cells in zip(records, found, strict=True):
                rows.append([record.setting.name, *(_show(cells.get(key)) for key in columns)])
            blocks.append(f"### {task}\n\n{markdown(rows)}")
        counts = sorted({cell["samples"] for cells in found for cell in cells.values()})
        blocks.append(
            f"Exact answers of {' or '.join(map(str, counts))} by tokens of prompt and answer, and "
            "by tokens from the needle to the prompt's end (back). Wilson's 95 % interval is in "
            "brackets. The share of strings found follows where an answer has several."
        )
        return "\n\n".join(blocks)


def _show(cell: Row | None) -> str:
    if cell is None:
        return ""
    text = f"{cell['rate']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"
    return text if cell["match"] == cell["rate"] else f"{text}, {cell['match']:.0%}"


# --- the plan

LENGTHS = [512, 1024, 2048, 4096, 8192]  # of prompts whose needles lie at random depths
DEFAULT_TASKS = ("niah-1", "niah-2", "niah-3", "multikey", "vt")


@dataclass(frozen=True)
class RecallPlan(RecallRows):
    """The questions to every setting.

    A cell is a task at one length, or, with distances, at one length and distance. Without lengths
    each distance has a length of its own. Fields are options of `lola-vllm eval recall`.
    """

    name: ClassVar[str] = "recall"
    keys: ClassVar[tuple[str, ...]] = ("task", "length", "aim", "index")

    tasks: list[str] = field(default_factory=lambda: list(DEFAULT_TASKS))
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    samples: int = 50
    seed: int = 0
    texts: str | None = None
    distances: list[int] = field(default_factory=list)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(length, distance) of the cells of a task; distance 0 stands for random depths."""
        if self.distances:
            return grid(self.lengths, self.distances)
        return [(length, 0) for length in sorted(self.lengths)]

    @property
    def max_length(self) -> int:
        return max(length for length, _ in self.cells)

    def check(self) -> None:
        if self.distances:
            grid(self.lengths, self.distances)
        for task in find_tasks(self.tasks):
            if task.needs is not None and self.texts is None:
                raise EvalError(
                    f"--tasks {task.name}: needs real text; give --texts, or other tasks"
                )
            if self.distances and task.several_places:
                raise EvalError(
                    f"--distances: {task.name} hides its answer in several places, which have no "
                    "one distance; leave it out of --tasks"
                )

    def run(
        self, model: EngineModel, done: Collection[tuple[Any, ...]] = ()
    ) -> Iterator[list[Row]]:
        """Ask all questions, short prompts first, `model.batch` at once; see `Plan`."""
        for prompts, room in self.prompts(model.tokenizer):
            todo = [p for p in prompts if (p.task, p.length, p.aim, p.index) not in done]
            for at in range(0, len(todo), model.batch):
                batch = todo[at : at + model.batch]
                answers = model.complete([prompt.ids for prompt in batch], room)
                yield [answer_row(p, a) for p, a in zip(batch, answers, strict=True)]

    def prompts(self, tokenizer: Tokenizer) -> Iterator[tuple[list[Prompt], int]]:
        """The prompts of each cell, and room for an answer in tokens."""
        tasks = find_tasks(self.tasks)
        texts = {kind: self._text(kind) for kind in {task.needs for task in tasks} if kind}
        spread = 0 if self.lengths else SPREAD
        for length, distance in self.cells:
            for task in tasks:
                text = texts[task.needs] if task.needs is not None else None
                prompts = build_prompts(
                    task, length, self.samples, self.seed, tokenizer, text, distance, spread
                )
                yield prompts, task.answer_room

    def _text(self, kind: type[RealText]) -> RealText:
        """Held-out text of a kind: code, or everything as prose."""
        path = Path(str(self.texts))
        files = read_held_out(path) if kind is Prose else read_kinds(path, [kind.what])[kind.what]
        return kind([document for of_file in files.values() for document in of_file])


def answer_row(prompt: Prompt, answer: str) -> Row:
    """A sample's line in the results."""
    return {
        "task": prompt.task,
        "length": prompt.length,
        **({"aim": prompt.aim} if prompt.aim else {}),
        "index": prompt.index,
        "depth": round(prompt.question.depth, 4),
        "distance": prompt.distance,
        "prompt_tokens": len(prompt.ids),
        "expected": list(prompt.question.expected),
        "answer": answer,
        **judge(prompt.question.expected, answer, prompt.question.begins),
    }
