"""Calls by the names of parameters in held-out code, and what `eval recall` needs for them."""

import ast
import re
from types import SimpleNamespace
from typing import Any

import pytest

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.code_calls import PIECE_LINES, Code, definitions
from lola_vllm.evaluation.prompts import build_prompts
from lola_vllm.evaluation.recall import RecallPlan
from lola_vllm.evaluation.tasks import TASKS
from tests.support.evaluations import Words, rows_of

TASK = TASKS["code-call"]
CLASS = '''class Road{i}:
    """A road number {i}."""

    length = {i}

    def joined(self, stone{i}, river{i}, wood{i}=3):
        # All are added.
        return stone{i} + river{i} + wood{i} + self.length

    @property
    def alone(self):
        return joined
'''
FUNCTION = """def joined(left{i}, middle, right{i}):
    total = left{i} + middle

    return total + right{i}
"""
DOCUMENT = "\n\n".join(form.format(i=i) for i in range(60) for form in (CLASS, FUNCTION))


@pytest.fixture(scope="module")
def code() -> Code:
    return Code([DOCUMENT, "x = (1"])


def test_definitions_are_those_that_a_call_by_name_can_be_asked_of():
    text = """
import os

async def late(a, b, c): pass
def two(a, b): pass
def many(a, b, c, d, e, f, g): pass
def rest(a, b, c, *d): pass
def named(a, b, *, c): pass
def good(a, b: int = 2, c=None) -> int:
    return a

class Form:
    @classmethod
    def made(cls, x, y, z):
        return cls(x, y)
"""
    found = {d.name: d for d in definitions(text)}
    assert set(found) == {"good", "made"}
    assert found["made"].parameters == ("x", "y", "z")
    assert found["made"].source == "def made(x, y, z):\n    return cls(x, y)"
    assert found["good"].renamed("odd_end").startswith("def odd_end(a, b: int = 2, c=None) -> int:")
    assert definitions("def broken(a, b, c:") == []
    long = "def long(a, b, c):\n" + "    a = b\n" * 60
    assert definitions(long) == []


def test_a_question_calls_a_function_of_the_text_whose_name_stands_there_once(code):
    names = set()
    for prompt in build_prompts(TASK, 1500, 12, 0, Words(), code):
        question = prompt.question
        name, _, begun = question.answer_prefix.partition("(")
        (defined,) = re.findall(rf"def {name}\(([^)]*)\)", question.text)
        parameters = [part.split("=")[0].strip() for part in defined.split(",")]
        first, *others = (f"{p}={p}" for p in parameters)
        assert begun == f"{first}," and question.begins
        assert question.expected == (", ".join(others) + ")",)
        # Its definition alone has the name, so nothing else says which parameters they are.
        assert len(re.findall(rf"\b{name}\b", question.text)) == 1
        # What is asked for is the last line of code that Python understands.
        whole = question.text[question.text.rindex("def nearest") :]
        ast.parse(f"{whole} {question.answer_prefix}{question.expected[0]}")
        names.add(name)
    assert len(names) == 12


def test_a_definition_stands_as_deep_in_the_code_as_what_follows_it(code):
    depths = set()
    for prompt in build_prompts(TASK, 1500, 20, 1, Words(), code):
        (needle,) = prompt.question.needed
        indent = len(needle) - len(needle.lstrip(" "))
        after = prompt.question.text.partition(needle)[2].lstrip("\n")
        assert len(after) - len(after.lstrip(" ")) == indent
        depths.add(indent)
    assert len(depths) > 1


def test_prompts_fill_their_length_and_distances_are_met(code):
    for prompt in build_prompts(TASK, 2048, 6, 0, Words(), code):
        assert 2048 - TASK.answer_room - 200 < len(prompt.ids) <= 2048 - TASK.answer_room
    for prompt in build_prompts(TASK, 2048, 6, 0, Words(), text=code, distance=1000):
        assert abs(prompt.distance - 1000) < 120


def test_code_is_cut_into_pieces_between_empty_lines():
    text = "a = 1\nb = 2\n  \n\n" + "\n".join(f"line{i}" for i in range(PIECE_LINES + 1)) + "\n"
    first, second, third = Code.split(Code.__new__(Code), text)
    assert first == "a = 1\nb = 2"
    assert len(second.split("\n")) == PIECE_LINES and third == f"line{PIECE_LINES}"
    with pytest.raises(EvalError, match="defines no function of 3 to 6 parameters"):
        Code(["x = 1"])


def test_a_plan_takes_the_code_of_its_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("lola_vllm.evaluation.held_out.is_held_out", lambda text: True)
    (tmp_path / "novel.txt").write_text("It was late. The house slept.", encoding="utf-8")
    asked: list[list[int]] = []
    words = Words()

    def complete(prompts: list[list[int]], room: int) -> list[str]:
        asked.extend(prompts)
        return ["nothing"] * len(prompts)

    model: Any = SimpleNamespace(tokenizer=words, batch=2, complete=complete)
    plan = RecallPlan(tasks=["code-call"], lengths=[1024], samples=2, texts=str(tmp_path))
    with pytest.raises(EvalError, match="has no code, only novel"):
        rows_of(plan, model)
    (tmp_path / "python_code.txt").write_text(DOCUMENT, encoding="utf-8")
    assert [row["exact"] for row in rows_of(plan, model)] == [False, False]
    assert all("The house slept" not in words.decode(ids) for ids in asked)
