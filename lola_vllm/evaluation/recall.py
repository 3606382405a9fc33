"""Recall of a model: prompts that hide something, and the scores of the answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from lola_vllm.core.cli_options import option
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.facts import CHAT_FORMS
from lola_vllm.evaluation.models import Emit, Model
from lola_vllm.evaluation.plan import Plan, at_least, numbers, words
from lola_vllm.evaluation.prompts import PRECEDING, SPREAD, Format, Prompt, build_prompts, grid
from lola_vllm.evaluation.question import RealText
from lola_vllm.evaluation.results import Record, Row, memory_table, table_of, wilson
from lola_vllm.evaluation.settings import read_held_out
from lola_vllm.evaluation.tasks import TASKS, find_tasks

# --- scores: RULER's string match, and the right share of an answer that is partly right


def judge(expected: Sequence[str], answer: str, begins: bool = False) -> dict[str, Any]:
    """Score the model's `answer` against the strings it should hold, or begin with.

    Returns:
        exact: whether it holds all of them. match: share of them that occur in the answer, letter
        case aside, which is RULER's `string_match_all` (arXiv 2404.06654). share: mean over them of
        the characters that are right in their place, 1 where the string occurs. Guessed digits
        score about 0.1.
    """
    answer = answer.lower().lstrip()
    found = [
        answer.startswith(text.lower()) if begins else text.lower() in answer for text in expected
    ]
    shares = [
        1.0 if hit else _best_share(text.lower(), answer)
        for text, hit in zip(expected, found, strict=True)
    ]
    return {
        "exact": all(found),
        "match": sum(found) / len(expected),
        "share": sum(shares) / len(shares),
    }


def _best_share(text: str, answer: str) -> float:
    """Largest share of `text` that a run of the same kind of characters has right, in place."""
    if text.isdigit():
        runs = re.findall(r"\d+", answer)
    elif re.fullmatch(r"[0-9a-f-]+", text):  # a uuid
        runs = re.findall(r"[0-9a-f-]+", answer)
    else:  # a name is right or wrong: its letters are random, so a part of it has no meaning
        return 0.0
    return max((sum(map(str.__eq__, text, run)) for run in runs), default=0) / len(text)


# --- numbers and table, of conversations too

# A task, tokens of prompt and answer, and from the needle to the question; 0: a random depth.
Cell: TypeAlias = tuple[str, int, int]


def recall_cells(samples: Iterable[Row]) -> dict[Cell, Row]:
    """Counts of exact answers with Wilson's interval, and means of the other scores."""
    groups: dict[Cell, list[Row]] = {}
    for row in samples:
        groups.setdefault((row["task"], row["length"], row.get("aim", 0)), []).append(row)
    found = {}
    for key, rows in groups.items():
        n, exact = len(rows), sum(row["exact"] for row in rows)
        low, high = wilson(exact, n)
        means = {name: sum(row[name] for row in rows) / n for name in ("match", "share")}
        found[key] = {"samples": n, "exact": exact, "low": low, "high": high, **means}
        found[key]["rate"] = exact / n
    return found


def recall_numbers(record: Record) -> Row:
    """The cells of a record, for its JSON."""
    cells = []
    for (task, length, distance), cell in recall_cells(record.samples).items():
        at = {"distance": distance} if distance else {}
        memory = record.bytes_json(length)
        cells.append({"task": task, "length": length, **at, **cell, **memory})
    return {"cells": cells}


def lines_of(keys: Iterable[Cell]) -> dict[str, dict[Cell, str]]:
    """The tables of a task: columns of each, by its title.

    One table has lengths, or distances that have a length of their own. Else each length has one.
    """
    keys = sorted(set(keys))
    lengths, distances = (sorted({key[i] for key in keys}) for i in (1, 2))
    task = keys[0][0]
    if distances == [0]:
        return {task: {key: f"{key[1]:,}" for key in keys}}
    if len(lengths) == len(distances) == len(keys):
        return {task: {key: f"{key[2]:,}" for key in keys}}
    return {
        f"{task}, {length:,} tokens": {key: f"{key[2]:,}" for key in keys if key[1] == length}
        for length in lengths
    }


def recall_table(records: Sequence[Record]) -> str:
    """Tables of each task, settings by lengths or distances, and one of the memory they take."""
    found = [recall_cells(record.samples) for record in records]
    keys = list(dict.fromkeys(key for cells in found for key in cells))
    blocks = []
    for task in dict.fromkeys(key[0] for key in keys):
        for title, columns in lines_of(key for key in keys if key[0] == task).items():
            blocks.append(f"### {title}\n\n{table_of(records, found, columns, _show)}")
    counts = sorted({cell["samples"] for cells in found for cell in cells.values()})
    by = "tokens of prompt and answer"
    if any(distance for _, _, distance in keys):
        by = "tokens from the needle to the prompt's end, as near as whole sentences come"
    blocks.append(
        f"Exact answers of {' or '.join(map(str, counts))} by {by}, Wilson's 95 % interval in "
        "brackets; parts: share of characters right (vt: of names)."
    )
    return "\n\n".join([*blocks, *memory_table(records, sorted({key[1] for key in keys}))])


def _show(cell: Row) -> str:
    text = f"{cell['rate']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"
    return text if cell["exact"] == cell["samples"] else f"{text} parts {cell['share']:.0%}"


# --- the plan


def default_lengths() -> list[int]:
    """Of prompts whose needles lie at random depths."""
    return [512, 1024, 2048, 4096, 8192]


@dataclass(frozen=True)
class RecallPlan(Plan):
    """The questions to every setting; JSON values only.

    A cell is a task at one length, or, with distances, at one length and distance. Without lengths
    each distance has a length of its own.
    """

    name: ClassVar[str] = "recall"
    keys: ClassVar[tuple[str, ...]] = ("task", "length", "aim", "index")

    tasks: list[str] = option(
        f"of {', '.join([*TASKS, *CHAT_FORMS])}",
        ["niah-1", "niah-2", "niah-3", "multikey", "vt"],
        type=words,
    )
    lengths: list[int] = option(
        "tokens of prompt and answer together", default_lengths(), type=numbers
    )
    samples: int = option("per task and length", 50, type=at_least(1))
    seed: int = option("of all choices", 0)
    format: Format = option(
        "plain text, or the model's chat template with the answer begun", "completion"
    )
    texts: str | None = option(
        "real text, for tasks that hide something in prose or code: a directory that 'lola-vllm "
        "texts' wrote, or a file",
        None,
        metavar="PATH",
    )
    distances: list[int] = option(
        "tokens of text from the needle to the question, in place of random depths; a prompt then "
        f"has its distance and {PRECEDING:,} to {PRECEDING + SPREAD:,} tokens more, or each of "
        "--lengths that holds it",
        [],
        type=numbers,
    )

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(length, distance) of the cells of a task; distance 0 stands for random depths."""
        if self.distances:
            return grid(self.lengths, self.distances)
        return [(length, 0) for length in sorted(self.lengths)]

    @property
    def asked(self) -> str:
        """See `Plan`."""
        questions = len(self.cells) * len(self.tasks) * self.samples
        lengths = ", ".join(f"{length:,}" for length, _ in self.cells)
        return f"{questions:,} questions ({lengths} tokens)"

    @property
    def max_length(self) -> int:
        """Longest prompt and answer, in tokens."""
        return max(length for length, _ in self.cells)

    @property
    def tokens(self) -> int:
        """See `Plan`."""
        return sum(length for length, _ in self.cells) * self.samples * len(self.tasks)

    def check(self) -> None:
        """See `Plan`."""
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

    def cost(self, sample: Row) -> int:
        """See `Plan`."""
        return int(sample["length"])

    def run(self, model: Model, emit: Emit, done: Collection[tuple[Any, ...]] = ()) -> None:
        """Ask `model` all questions, short prompts first, `model.batch` at once; see `Plan`."""
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
                rest = (self.samples, self.seed, model.tokenizer, self.format, text, distance)
                spread = 0 if self.lengths else SPREAD
                yield build_prompts(task, length, *rest, spread), task.answer_room

    def _texts(self, needed: Collection[type[RealText]]) -> dict[type[RealText], RealText]:
        """Held-out text by its kind, of the files that each kind takes."""
        of_files = read_held_out(Path(str(self.texts))) if needed else {}
        texts: dict[type[RealText], RealText] = {}
        for kind in needed:
            taken = [text for name in of_files if kind.takes(name) for text in of_files[name]]
            if not taken:
                raise EvalError(
                    f"--texts {self.texts}: has no {kind.what}, only {', '.join(of_files)}; "
                    "give others"
                )
            texts[kind] = kind(taken)
        return texts

    def numbers(self, record: Record, reference: Record | None) -> Row:
        """See `Plan`."""
        return recall_numbers(record)

    def table(self, records: Sequence[Record], reference: Record | None) -> str:
        """See `Plan`."""
        return recall_table(records)


def _row(prompt: Prompt, answer: str) -> Row:
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
