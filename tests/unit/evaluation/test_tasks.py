"""Questions of `lola-vllm eval recall`: length, depth, needles, determinism, RULER's form."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from lola_vllm.evaluation import EvalError, tasks
from lola_vllm.evaluation.prompts import Prompt, build_prompts
from lola_vllm.evaluation.question import MAX_WORDS, Prose, hide, split_sentences
from lola_vllm.evaluation.tasks import (
    TASKS,
    VARIABLES,
    chain_question,
    chain_text,
    needle_question,
    num_units,
)
from tests.support.evaluations import Words

SAMPLES = 20
IN_PROSE = [name for name, task in TASKS.items() if task.needs in (None, Prose)]


def prompts(name: str, length: int, prose: Prose, seed: int = 0) -> list[Prompt]:
    return build_prompts(TASKS[name], length, SAMPLES, seed, Words(), prose)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [768, 2048])
@pytest.mark.parametrize("name", IN_PROSE)
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(
    name: str, length: int, prose: Prose
) -> None:
    limit = length - TASKS[name].answer_room
    # A sentence or a line, with the largest needle that may move past it.
    unit = 110 if name == "multikey-3" else MAX_WORDS + 30
    for prompt in prompts(name, length, prose):
        assert limit - unit < len(prompt.ids) <= limit


@pytest.mark.parametrize("name", IN_PROSE)
def test_answers_are_in_the_text_once_and_begin_is_in_the_prompt(name: str, prose: Prose) -> None:
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
def test_questions_differ_from_sample_to_sample_and_from_length_to_length(
    name: str, prose: Prose
) -> None:
    found = [p.question.expected for n in (768, 1024) for p in prompts(name, n, prose)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", IN_PROSE)
def test_the_seed_decides_everything(name: str, prose: Prose) -> None:
    assert prompts(name, 768, prose, seed=3) == prompts(name, 768, prose, seed=3)
    assert prompts(name, 768, prose, seed=3) != prompts(name, 768, prose, seed=4)


@pytest.mark.parametrize("name", IN_PROSE)
def test_depths_cover_the_haystack_evenly_in_mixed_order(name: str, prose: Prose) -> None:
    depths = [prompt.question.depth for prompt in prompts(name, 4096, prose)]
    assert all(0 <= depth < 1 for depth in depths)
    # One needle per slice, up to the size of a line that it may be moved by.
    for i, depth in enumerate(sorted(depths)):
        assert i / SAMPLES - 0.05 <= depth <= (i + 1) / SAMPLES
    assert depths != sorted(depths)


def test_depth_is_where_the_needle_is() -> None:
    tokenizer = Words()
    for prompt in build_prompts(TASKS["niah-1"], 2048, SAMPLES, 0, tokenizer):
        lines = prompt.question.text.split("\n")[1:-1]
        (at,) = (i for i, line in enumerate(lines) if line != tasks.NOISE_LINE)
        assert prompt.question.depth == at / (len(lines) - 1)


@pytest.mark.parametrize("name", IN_PROSE)
def test_distance_is_how_far_back_the_whole_answer_lies(name: str, prose: Prose) -> None:
    tokenizer = Words()
    for prompt in build_prompts(TASKS[name], 768, SAMPLES, 0, tokenizer, text=prose):
        ids, distance = prompt.ids, prompt.distance
        near, far = tokenizer.decode(ids[-distance + 1 :]), tokenizer.decode(ids[-distance:])
        assert all(expected in far for expected in prompt.question.expected)
        assert not all(expected in near for expected in prompt.question.expected)


def test_multikey_hides_four_different_keys_and_asks_for_one(prose: Prose) -> None:
    asked = Counter()
    for prompt in prompts("multikey", 1024, prose):
        text = prompt.question.text
        needles = re.findall(r"magic numbers for (\S+) is: (\d+)\.", text)
        assert len(dict(needles)) == 4
        (key,) = re.findall(r"magic number for (\S+) mentioned", text)
        assert dict(needles)[key] == prompt.question.expected[0]
        asked[[k for k, _ in needles].index(key)] += 1
    assert len(asked) == 4  # the one asked for is not always the first


def test_several_numbers_of_one_key_or_one_of_several_keys_are_asked_for(prose: Prose) -> None:
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


def test_multikey_3_hides_a_uuid_among_uuids(prose: Prose) -> None:
    uuid = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    for prompt in prompts("multikey-3", 2048, prose):
        lines = prompt.question.text.split("\n")[1:-1]
        form = rf"One of the special magic uuids for ({uuid}) is: ({uuid})\."
        pairs = dict(re.fullmatch(form, line).groups() for line in lines)  # type: ignore[union-attr]
        assert len(pairs) == len(lines) > 10
        (key,) = re.findall(rf"magic uuid for ({uuid}) mentioned", prompt.question.text)
        assert (pairs[key],) == prompt.question.expected


def test_values_look_as_in_ruler(prose: Prose) -> None:
    for name, pattern in (
        ("niah-1", r"[1-9]\d{6}"),
        ("niah-3", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("vt", r"[A-Z]{5}"),
    ):
        for prompt in prompts(name, 768, prose):
            assert all(re.fullmatch(pattern, text) for text in prompt.question.expected)


def test_too_short_a_length_names_what_is_needed(prose: Prose) -> None:
    with pytest.raises(EvalError, match=r"--lengths 64: niah-1 needs at least (\d+) tokens") as e:
        prompts("niah-1", 64, prose)
    least = int(re.findall(r"least (\d+)", str(e.value))[0])
    assert build_prompts(TASKS["niah-1"], least, 1, 0, Words())


def test_sentences() -> None:
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


def test_prose_reads_on_through_documents_and_begins_again() -> None:
    prose = Prose(["A one. A two.", " ", "B one."])
    assert prose.read((0, 1), 4) == ["A two.", "B one.", "A one.", "A two."]
    with pytest.raises(EvalError, match="hold no prose"):
        Prose(["  "])


def test_hide_keeps_the_order_of_needles() -> None:
    mixed, depths = hide(list("abcd"), [(0.9, "late"), (0.0, "first"), (0.99, "last")])
    assert mixed == ["first", "a", "b", "c", "late", "last", "d"]
    assert depths == [0.75, 0.0, 0.75]


class TestAgainstLmEval:
    """The same words, places and values give the same text as lm-eval's own RULER tasks.

    Its other needle tasks need a data set and a sentence splitter from the network.
    """

    @pytest.fixture
    def tokenizer(self) -> object:
        class Encoded:
            def __init__(self, ids: list[int]) -> None:
                self.input_ids = ids

        words = Words()
        return lambda text: Encoded(words.encode(text, special=True))

    @staticmethod
    def _import(name: str) -> object:
        for package in ("lm_eval", "wonderwords", "nltk"):
            pytest.importorskip(package)
        import nltk

        download, nltk.download = nltk.download, lambda *_, **__: False
        try:  # it downloads when imported; the tasks below need nothing of that
            return pytest.importorskip(f"lm_eval.tasks.ruler.{name}")
        finally:
            nltk.download = download

    @pytest.mark.parametrize("haystack", ["repeat", "needle"])
    @pytest.mark.parametrize("options", [{}, {"num_needle_v": 4}, {"num_needle_q": 4}])
    def test_needles(self, tokenizer: object, haystack: str, options: dict[str, int]) -> None:
        """In noise and among needles, as their essays are not there."""
        niah = self._import("niah_utils")
        samples = niah.generate_samples(
            niah.get_haystack(type_haystack=haystack), max_seq_length=1024, template=niah.TEMPLATE,
            type_haystack=haystack, type_needle_k="words", type_needle_v="numbers",
            num_samples=5, TOKENIZER=tokenizer, **options,
        )  # fmt: skip
        needle = tasks.NEEDLE.format(kind="number", key="(.+)", value=r"(\d{7})")
        for sample in samples:
            context = sample["input"].partition("\n")[2].rpartition("\n")[0]
            lines = {line: re.fullmatch(needle, line) for line in context.split("\n")}
            assert {line for line, found in lines.items() if not found} <= {tasks.NOISE_LINE}
            of_value = {found[2]: found[1] for found in lines.values() if found}
            keys = list(dict.fromkeys(of_value[value] for value in sample["outputs"]))
            ours = needle_question(context, "number", keys, sample["outputs"], depth=0)
            assert ours.text == sample["input"]
            assert ours.answer_prefix == sample["gen_prefix"]

    def test_chains(self, tokenizer: object) -> None:
        vt = self._import("vt_utils")
        make = vt.sys_vartrack_w_noise_random
        example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
        for sample in make(
            tokenizer=tokenizer, num_samples=5, max_seq_length=2048, icl_example=example
        ):
            names = sample["outputs"]
            assert len(names) == VARIABLES
            start = tasks.CHAIN_PROMPT.split("{")[0]
            solved, main = sample["input"].split(start)[1:]
            (value,) = re.findall(r"assigned the value (\d+)", main)
            context = main.split("\nQuestion:")[0]
            lines = context.count(tasks.NOISE[0])
            # Units of noise before each assignment, to hide ours in the same places.
            places = [context[: context.index(f"VAR {n} =")].count(tasks.NOISE[0]) for n in names]
            assert num_units(lines) == lines
            ours = chain_question(chain_text(names, int(value), lines, places), names, int(value))
            assert ours.text == start + main
            assert ours.answer_prefix == sample["gen_prefix"]
            # The solved example has the form of the question with its answer.
            solved_names = solved.split(":")[-1].split()
            (value,) = re.findall(r"assigned the value (\d+)", solved)
            end = tasks.CHAIN_ANSWER.format(count=VARIABLES, value=value)
            assert solved.split(" Answer:")[1].split() == [*end.split()[1:], *solved_names]

    def test_scores(self) -> None:
        common = self._import("common_utils")
        from lola_vllm.evaluation.recall import judge

        for expected, answer in (
            (["123"], " 123."),
            (["ABC", "DEF"], "abc and so on"),
            (["123"], "12 3"),
        ):
            theirs = common.string_match_all([answer], [expected])
            assert judge(expected, answer)["match"] == theirs
