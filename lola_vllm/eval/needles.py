"""Needles in a haystack, in RULER's form (arXiv 2404.06654), and the older pass key."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from lola_vllm.eval import wording
from lola_vllm.eval.prose import Prose
from lola_vllm.eval.questions import Draft, Question, hide


@dataclass(frozen=True)
class NeedleDraw:
    """Draws one of RULER's `niah` questions; see `questions.Draw`.

    Attributes:
        haystack: "noise": one line of five sentences, repeated; "prose": real text; "needles":
            nothing but lines like the needle, with other keys.
        value: a number of 7 digits, or a uuid.
        keys: needles hidden, of which the first is asked for.
    """

    haystack: Literal["noise", "prose", "needles"]
    value: Literal["number", "uuid"] = "number"
    keys: int = 1

    def __call__(self, rng: random.Random, depth: float, length: int, prose: Prose | None) -> Draft:
        keys: list[str] = []
        while len(keys) < self.keys:
            key = draw_key(rng)
            if key not in keys:
                keys.append(key)
        values = [self._draw_value(rng) for _ in keys]
        depths = [depth, *(rng.random() for _ in keys[1:])]
        needles = [
            (where, self._needle(key, value))
            for where, key, value in zip(depths, keys, values, strict=True)
        ]
        start = prose.start(rng) if prose and self.haystack == "prose" else (0, 0)
        others = random.Random(rng.random())

        def lines(units: int) -> list[str]:
            if self.haystack == "noise":
                return [wording.NOISE_LINE] * units
            if self.haystack == "prose":
                assert prose is not None
                return prose.read(start, units)
            while len(distractors) < units:
                key = draw_key(others)
                if key not in keys:
                    distractors.append(self._needle(key, self._draw_value(others)))
            return distractors[:units]

        distractors: list[str] = []

        def draft(units: int) -> Question:
            mixed, found = hide(lines(units), needles)
            separator = " " if self.haystack == "prose" else "\n"
            return needle_question(
                separator.join(mixed), self.value, keys[0], values[0], depth=found[0]
            )

        return draft

    def _draw_value(self, rng: random.Random) -> str:
        if self.value == "number":
            return str(rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def _needle(self, key: str, value: str) -> str:
        return wording.NEEDLE.format(kind=self.value, key=key, value=value)


def draw_key(rng: random.Random) -> str:
    """An adjective and a noun, one of about 10,000 pairs."""
    return f"{rng.choice(wording.ADJECTIVES)}-{rng.choice(wording.NOUNS)}"


def needle_question(context: str, kind: str, key: str, value: str, *, depth: float) -> Question:
    """The question for the value of `key`, given the text that hides it."""
    return Question(
        text=wording.NEEDLE_PROMPT.format(kind=kind, context=context, key=key),
        answer_prefix=wording.NEEDLE_ANSWER.format(kind=kind, key=key),
        expected=(value,),
        depth=depth,
    )


def draw_pass_key(rng: random.Random, depth: float, length: int, prose: Prose | None) -> Draft:
    """The pass key of 5 digits in repeated noise (arXiv 2305.16300); see `questions.Draw`."""
    key = str(rng.randint(10**4, 10**5 - 1))

    def draft(units: int) -> Question:
        before = int(depth * units)
        parts = [
            " ".join([wording.NOISE_LINE] * before),
            wording.PASS_KEY.format(key=key),
            " ".join([wording.NOISE_LINE] * (units - before)),
        ]
        return Question(
            text=wording.PASS_KEY_PROMPT.format(context="\n".join(filter(None, parts))),
            answer_prefix=wording.PASS_KEY_ANSWER,
            expected=(key,),
            depth=before / units,
        )

    return draft
