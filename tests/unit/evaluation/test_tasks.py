"""Questions of `lola-vllm eval recall`: length, depth, needles, determinism, RULER's form."""

import hashlib
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError, tasks
from lola_vllm.evaluation.prompts import (
    LEAST_PRECEDING,
    PRECEDING,
    SPREAD,
    Prompt,
    build_prompts,
    grid,
)
from lola_vllm.evaluation.question import MAX_WORDS, Prose, hide, split_sentences
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.tasks import TASKS
from tests.support.evaluations import Finding, Words, rows_of

SAMPLES = 20
IN_PROSE = [name for name, task in TASKS.items() if task.needs in (None, Prose)]


def prompts(name: str, length: int, prose: Prose, seed: int = 0) -> list[Prompt]:
    return build_prompts(TASKS[name], length, SAMPLES, seed, Words(), prose)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [768, 2048])
@pytest.mark.parametrize("name", IN_PROSE)
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(name, length, prose):
    limit = length - TASKS[name].answer_room
    # A sentence or a line, with the largest needle that may move past it.
    unit = 110 if name == "multikey-3" else MAX_WORDS + 30
    for prompt in prompts(name, length, prose):
        assert limit - unit < len(prompt.ids) <= limit


@pytest.mark.parametrize("name", IN_PROSE)
def test_answers_are_in_the_text_once_and_begin_is_in_the_prompt(name, prose):
    tokenizer = Words()
    for prompt in build_prompts(TASKS[name], 768, SAMPLES, 0, tokenizer, prose):
        question = prompt.question
        text = tokenizer.decode(prompt.ids)
        assert text == f"{question.text} {question.answer_prefix}"
        for expected in question.expected:
            occurrences = len(re.findall(rf"\b{expected}\b", text))
            # All but the last name of a chain are assigned on.
            on = name == "vt" and expected != question.expected[-1]
            assert occurrences == 1 + on
            assert expected not in question.answer_prefix


@pytest.mark.parametrize("name", IN_PROSE)
def test_questions_differ_from_sample_to_sample_and_from_length_to_length(name, prose):
    found = [p.question.expected for n in (768, 1024) for p in prompts(name, n, prose)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", IN_PROSE)
def test_the_seed_decides_everything(name, prose):
    assert prompts(name, 768, prose, seed=3) == prompts(name, 768, prose, seed=3)
    assert prompts(name, 768, prose, seed=3) != prompts(name, 768, prose, seed=4)


@pytest.mark.parametrize("name", IN_PROSE)
def test_depths_cover_the_haystack_evenly_in_mixed_order(name, prose):
    depths = [prompt.question.depth for prompt in prompts(name, 4096, prose)]
    assert all(0 <= depth < 1 for depth in depths)
    # One needle per slice, up to the size of a line that it may be moved by.
    for i, depth in enumerate(sorted(depths)):
        assert i / SAMPLES - 0.05 <= depth <= (i + 1) / SAMPLES
    assert depths != sorted(depths)


def test_depth_is_where_the_needle_is():
    tokenizer = Words()
    for prompt in build_prompts(TASKS["niah-1"], 2048, SAMPLES, 0, tokenizer):
        lines = prompt.question.text.split("\n")[1:-1]
        (at,) = (i for i, line in enumerate(lines) if line != tasks.NOISE_LINE)
        assert prompt.question.depth == at / (len(lines) - 1)


@pytest.mark.parametrize("name", IN_PROSE)
def test_distance_is_how_far_back_the_whole_answer_lies(name, prose):
    tokenizer = Words()
    for prompt in build_prompts(TASKS[name], 768, SAMPLES, 0, tokenizer, text=prose):
        ids, distance = prompt.ids, prompt.distance
        near, far = tokenizer.decode(ids[-distance + 1 :]), tokenizer.decode(ids[-distance:])
        assert all(expected in far for expected in prompt.question.expected)
        assert not all(expected in near for expected in prompt.question.expected)


def test_multikey_hides_four_different_keys_and_asks_for_one(prose):
    asked = Counter()
    for prompt in prompts("multikey", 1024, prose):
        text = prompt.question.text
        needles = re.findall(r"magic numbers for (\S+) is: (\d+)\.", text)
        assert len(dict(needles)) == 4
        (key,) = re.findall(r"magic number for (\S+) mentioned", text)
        assert dict(needles)[key] == prompt.question.expected[0]
        asked[[k for k, _ in needles].index(key)] += 1
    assert len(asked) == 4  # the one asked for is not always the first


def test_several_numbers_of_one_key_or_one_of_several_keys_are_asked_for(prose):
    for name in ("multivalue", "multiquery"):
        for prompt in prompts(name, 1024, prose):
            question = prompt.question
            needles = re.findall(r"magic numbers for (\S+) is: (\d+)\.", question.text)
            start = "What are all the special magic numbers for "
            end = " mentioned in the provided text?"
            asked = question.text[question.text.rindex(start) + len(start) : -len(end)]
            assert question.text.endswith(end)
            keys = asked.replace(", and ", ", ").split(", ")
            assert len(keys) == len({key for key, _ in needles}) == (4, 1)[name == "multivalue"]
            found = [value for key in keys for other, value in needles if key == other]
            assert len(needles) == 4 and sorted(found) == sorted(question.expected)
            assert name == "multivalue" or found == list(question.expected)


def test_multikey_3_hides_a_uuid_among_uuids(prose):
    uuid = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    for prompt in prompts("multikey-3", 2048, prose):
        lines = prompt.question.text.split("\n")[1:-1]
        form = rf"One of the special magic uuids for ({uuid}) is: ({uuid})\."
        pairs = dict(re.fullmatch(form, line).groups() for line in lines)  # type: ignore[union-attr]
        assert len(pairs) == len(lines) > 10
        (key,) = re.findall(rf"magic uuid for ({uuid}) mentioned", prompt.question.text)
        assert (pairs[key],) == prompt.question.expected


def test_values_look_as_in_ruler(prose):
    for name, pattern in (
        ("niah-1", r"[1-9]\d{6}"),
        ("niah-3", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("vt", r"[A-Z]{5}"),
    ):
        for prompt in prompts(name, 768, prose):
            assert all(re.fullmatch(pattern, text) for text in prompt.question.expected)


def test_too_short_a_length_names_what_is_needed(prose):
    with pytest.raises(EvalError, match=r"--lengths 64: niah-1 needs at least (\d+) tokens") as e:
        prompts("niah-1", 64, prose)
    least = int(re.findall(r"least (\d+)", str(e.value))[0])
    assert build_prompts(TASKS["niah-1"], least, 1, 0, Words())


def test_sentences():
    text = 'He said "Stop!" She ran.  It is 3.5 m.\n\nSee e.g. this. (Or that?) Yes'
    assert split_sentences(text) == [
        'He said "Stop!"',
        "She ran.",
        "It is 3.5 m.",
        "See e.g. this.",
        "(Or that?)",
        "Yes",
    ]
    table = " ".join(["cell"] * (2 * MAX_WORDS + 1))
    assert [len(piece.split()) for piece in split_sentences(table)] == [MAX_WORDS, MAX_WORDS, 1]
    assert split_sentences(" \n ") == []


def test_prose_reads_on_through_documents_and_begins_again():
    prose = Prose(["A one. A two.", " ", "B one."])
    assert prose.read((0, 1), 4) == ["A two.", "B one.", "A one.", "A two."]
    with pytest.raises(EvalError, match="hold no prose"):
        Prose(["  "])


def test_hide_keeps_the_order_of_needles():
    mixed, depths = hide(list("abcd"), [(0.9, "late"), (0.0, "first"), (0.99, "last")])
    assert mixed == ["first", "a", "b", "c", "late", "last", "d"]
    assert depths == [0.75, 0.0, 0.75]


# Of lm-eval's RULER tasks, to whose prompts and scores these were compared to the character
# (docs/howto/lm-eval.md). Another word here is another question than the published ones.
WORDS_OF_RULER = "ff9a727a056229bd"


def test_the_words_are_those_that_were_compared_with_lm_eval():
    prose = Prose(["One sentence. Another one. A third of them.", "And a last one."])
    texts = []
    for name in IN_PROSE:
        for prompt in build_prompts(TASKS[name], 1024, 3, 0, Words(), prose):  # type: ignore[arg-type]
            question = prompt.question
            texts += [name, question.text, question.answer_prefix, *question.expected]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == WORDS_OF_RULER


# --- needles at a given distance

ONE_PLACE = [name for name in IN_PROSE if not TASKS[name].several_places]
UNIT = MAX_WORDS + 30  # tokens of a sentence or a line, at most
TWO_UUIDS = 130  # of a needle with a UUID under a UUID, of which all of that task's text is


def at(name: str, distance: int, text: Prose, samples: int = 4, **options: Any) -> list[Prompt]:
    length = options.pop("length", distance + PRECEDING)
    task = TASKS[name]
    return build_prompts(task, length, samples, 0, Words(), text=text, distance=distance, **options)


@pytest.mark.parametrize("distance", [300, 2000])
@pytest.mark.parametrize("name", ONE_PLACE)
def test_the_needle_is_so_far_back_and_the_prompt_as_long_as_it_may(name, distance, prose):
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


def test_a_longer_prompt_has_more_before_the_needle_alone(prose):
    short, long = (at("niah-2", 500, prose, length=n) for n in (1000, 3000))
    for a, b in zip(short, long, strict=True):
        assert abs(a.distance - b.distance) <= 2 * UNIT
        assert len(b.ids) - len(a.ids) > 2000 - 2 * UNIT
        assert b.question.depth > a.question.depth


def test_prompts_of_a_cell_end_at_different_stages(prose):
    room = TASKS["niah-1"].answer_room
    longest = 500 + PRECEDING + 400
    some, more = (at("niah-1", 500, prose, n, length=longest, spread=400) for n in (4, 9))
    assert more[:4] == some and {prompt.length for prompt in more} == {longest}
    assert all(abs(prompt.distance - 500) <= UNIT for prompt in more)
    shorter = sorted(longest - room - len(prompt.ids) for prompt in more)
    assert shorter[0] < 100 and 300 < shorter[-1] <= 400 + 2 * UNIT
    assert all(0 <= b - a < 140 for a, b in pairwise(shorter))


def test_no_room_and_too_little_prose(prose):
    with pytest.raises(EvalError, match=r"--lengths 320: niah-1 with 300 tokens .* at least"):
        at("niah-1", 300, prose, length=320)
    with pytest.raises(EvalError, match=r"--distances 900: niah-2 takes .* which would be said"):
        at("niah-2", 900, Prose(["One sentence. Another one. A third."]))


def test_grid():
    more = PRECEDING + SPREAD
    assert grid([], [500, 100]) == [(100 + more, 100), (500 + more, 500)]
    assert grid([2000, 1000], [100, 900]) == [(1000, 100), (2000, 100), (2000, 900)]
    with pytest.raises(EvalError, match="--distances 900: the longest of --lengths is 1000"):
        grid([1000], [900])
    least = 900 + LEAST_PRECEDING
    assert grid([least], [900]) == [(least, 900)]


def test_the_plan_asks_every_cell_once_and_goes_on():
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
