"""What importance is fitted to: long prompts, most of which hide facts and ask for them at the end.

The wording is that of training (`training/distill/retrieval.py`), which no benchmark shares.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lola_vllm.models.files import CheckpointError
from lola_vllm.training.calibrate.options import CalibrateOptions
from lola_vllm.training.distill.data import start_tokens
from lola_vllm.training.distill.retrieval import RetrievalError, retrieval_row
from lola_vllm.training.texts import is_held_out, read_documents

# A fact is a sentence: so many tokens before and after its value belong to it.
BEFORE, AFTER = 18, 12
_TRIES = 200


class CalibrationPrompt(NamedTuple):
    """Token ids, which of them are of facts that are asked for, and which spell the answers; None
    in plain text."""

    ids: list[int]
    asked: list[bool] | None = None
    answers: list[bool] | None = None


def draw_prompts(texts: Path, tokenizer: Any, options: CalibrateOptions) -> list[CalibrationPrompt]:
    """Prompts of text that is not held out, in an order that mixes kinds and lengths.

    Raises:
        CheckpointError: texts that are too short, or a tokenizer that makes no such prompts.
    """
    rng = random.Random(f"{options.seed}/prompts")
    text = _source(texts, rng)
    found = []
    for number in range(options.prompts):
        length = options.prompt_length // (1 if number // 4 % 2 else 2)
        if int((number + 1) * options.facts) == int(number * options.facts):
            found.append(CalibrationPrompt(_plain(text, tokenizer, length, texts)))
            continue
        try:
            row = retrieval_row(tokenizer, length, rng, text)
        except RetrievalError as error:
            raise CheckpointError(f"facts = {options.facts:g}: {error}") from None
        asked = asked_for(row.tokens, row.answers)
        found.append(CalibrationPrompt(row.tokens, asked, row.answers))
    return found


def draw_plain(texts: Path, tokenizer: Any, length: int, count: int, seed: int) -> list[list[int]]:
    """Token ids of so many plain texts of `length` tokens, each of documents that are not held out.

    Raises:
        CheckpointError: texts without such a document.
    """
    text = _source(texts, random.Random(f"{seed}/plain"))
    found = []
    for _ in range(count):
        ids = start_tokens(tokenizer)
        while len(ids) < length:  # few documents are as long as this
            ids += tokenizer.encode(text(16 * length), add_special_tokens=False)
        found.append(ids[:length])
    return found


def _source(texts: Path, rng: random.Random) -> Callable[[int], str]:
    """Draws a text of so many characters, of every kind of text equally often."""
    files = sorted(texts.glob("*.txt")) if texts.is_dir() else [texts]
    kinds = [[t for t in read_documents(file) if not is_held_out(t)] for file in files]
    kinds = [documents for documents in kinds if documents]
    if not kinds:
        raise CheckpointError(f"--texts {texts}: no document that is not held out")

    def text(length: int) -> str:
        document = rng.choice(rng.choice(kinds))
        start = rng.randrange(max(1, len(document) - length))
        return document[start : start + length]

    return text


def _plain(text: Callable[[int], str], tokenizer: Any, length: int, texts: Path) -> list[int]:
    start = start_tokens(tokenizer)
    for _ in range(_TRIES):
        # A token has two characters or more on average, so this is enough of a long text.
        ids = start + tokenizer.encode(text(16 * length), add_special_tokens=False)
        if len(ids) >= length:
            return ids[:length]
    raise CheckpointError(
        f"prompt_length: --texts {texts} has hardly a document of {length} tokens; use shorter "
        "prompts or longer texts"
    )


def asked_for(ids: Sequence[int], answers: Sequence[bool]) -> list[bool]:
    """Tokens of the text around the values that are answered later.

    Args:
        ids: of a prompt with its answers. answers: which tokens are of answered values.
    """
    found = [False] * len(ids)
    if True not in answers:
        return found
    end = list(answers).index(True)
    for value in _runs(ids, answers):
        # Its first token may be another one after a space.
        for part in [value, value[1:]] if len(value) > 2 else [value]:
            for at in range(end - len(part)):
                if list(ids[at : at + len(part)]) == part:
                    first, last = max(0, at - BEFORE), min(end, at + len(part) + AFTER)
                    found[first:last] = [True] * (last - first)
    return found


def _runs(ids: Sequence[int], marks: Sequence[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for at, mark in enumerate(marks):
        if mark:
            if not at or not marks[at - 1]:
                runs.append([])
            runs[-1].append(ids[at])
    return runs
