"""Needles at a given distance: prompts, cells and table."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.prompts import (
    LEAST_PRECEDING,
    PRECEDING,
    SPREAD,
    Prompt,
    build_prompts,
    grid,
)
from lola_vllm.evaluation.question import MAX_WORDS, Prose
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.tasks import TASKS
from tests.support.evaluations import Finding, Words, rows_of
from tests.unit.evaluation.test_tasks import IN_PROSE

ONE_PLACE = [name for name in IN_PROSE if not TASKS[name].several_places]
UNIT = MAX_WORDS + 30  # tokens of a sentence or a line, at most
TWO_UUIDS = 130  # of a needle with a UUID under a UUID, of which all of that task's text is


def at(name: str, distance: int, text: Prose, samples: int = 4, **options: Any) -> list[Prompt]:
    length = options.pop("length", distance + PRECEDING)
    task = TASKS[name]
    return build_prompts(task, length, samples, 0, Words(), text=text, distance=distance, **options)


@pytest.mark.parametrize("distance", [300, 2000])
@pytest.mark.parametrize("name", ONE_PLACE)
def test_the_needle_is_so_far_back_and_the_prompt_as_long_as_it_may(
    name: str, distance: int, prose: Prose
) -> None:
    limit = distance + PRECEDING - TASKS[name].answer_room
    unit = TWO_UUIDS if name == "multikey-3" else UNIT
    for prompt in at(name, distance, prose):
        assert abs(prompt.distance - distance) <= unit
        assert limit - 2 * unit < len(prompt.ids) <= limit
        assert (prompt.aim, prompt.length) == (distance, distance + PRECEDING)
        tail = Words()
        text = f"{prompt.question.text} {prompt.question.answer_prefix}"
        (value,) = prompt.question.expected
        assert len(tail.encode(text[text.rindex(value) :], special=False)) == prompt.distance


def test_a_longer_prompt_has_more_before_the_needle_alone(prose: Prose) -> None:
    short, long = (at("niah-2", 500, prose, length=n) for n in (1000, 3000))
    for a, b in zip(short, long, strict=True):
        assert abs(a.distance - b.distance) <= 2 * UNIT
        assert len(b.ids) - len(a.ids) > 2000 - 2 * UNIT
        assert b.question.depth > a.question.depth


def test_prompts_of_a_cell_end_at_different_stages(prose: Prose) -> None:
    room = TASKS["niah-1"].answer_room
    longest = 500 + PRECEDING + 400
    some, more = (at("niah-1", 500, prose, n, length=longest, spread=400) for n in (4, 9))
    assert more[:4] == some and {prompt.length for prompt in more} == {longest}
    assert all(abs(prompt.distance - 500) <= UNIT for prompt in more)
    shorter = sorted(longest - room - len(prompt.ids) for prompt in more)
    assert shorter[0] < 100 and 300 < shorter[-1] <= 400 + 2 * UNIT
    assert all(0 <= b - a < 140 for a, b in pairwise(shorter))


def test_no_room_and_too_little_prose(prose: Prose) -> None:
    with pytest.raises(EvalError, match=r"--lengths 320: niah-1 with 300 tokens .* at least"):
        at("niah-1", 300, prose, length=320)
    with pytest.raises(EvalError, match=r"--distances 900: niah-2 takes .* which would be said"):
        at("niah-2", 900, Prose(["One sentence. Another one. A third."]))


def test_grid() -> None:
    more = PRECEDING + SPREAD
    assert grid([], [500, 100]) == [(100 + more, 100), (500 + more, 500)]
    assert grid([2000, 1000], [100, 900]) == [(1000, 100), (2000, 100), (2000, 900)]
    with pytest.raises(EvalError, match="--distances 900: the longest of --lengths is 1000"):
        grid([1000], [900])
    least = 900 + LEAST_PRECEDING
    assert grid([least], [900]) == [(least, 900)]


def test_the_plan_asks_every_cell_once_and_goes_on() -> None:
    plan = RecallPlan(["niah-1", "multikey-2"], [], 3, distances=[200, 100])
    samples = rows_of(plan, Finding())
    assert [(s["task"], s["aim"], s["length"]) for s in samples[::3]] == [
        ("niah-1", 100, 3172), ("multikey-2", 100, 3172),
        ("niah-1", 200, 3272), ("multikey-2", 200, 3272),
    ]  # fmt: skip
    assert plan.max_length == 3272
    assert len({sample["prompt_tokens"] for sample in samples[:3]}) == 3
    again = Finding()
    assert rows_of(plan, again, plan.done(samples[:7])) == samples[7:]
    assert again.asked == 5
