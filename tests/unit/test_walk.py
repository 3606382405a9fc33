"""docs/walk.md names files and functions that are there."""

import ast
import re

import pytest

from tests.support.documented import ROOT

PAGE = (ROOT / "docs" / "walk.md").read_text()
STEPS = sorted(set(re.findall(r"`([\w/]+\.(?:py|h|cpp))::([\w.]+)`", PAGE)))


def definitions(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions and classes of a module, methods with their class before them."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {node.name} | definitions(node.body, f"{node.name}.")
    return found


def test_each_walk_names_its_steps():
    walks = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert len(walks) == 2
    assert all(len(re.findall("::", walk)) >= 7 for walk in walks)


@pytest.mark.parametrize(("file", "name"), [s for s in STEPS if s[0] != "a/b.py"])
def test_what_a_step_names_is_there(file, name):
    path = ROOT / file if file.startswith(("csrc/", "serving/")) else ROOT / "lola_vllm" / file
    text = path.read_text()
    if path.suffix == ".py":
        assert name in definitions(ast.parse(text).body)
    else:
        assert re.search(rf"^(?:[\w:]+ )+{name}\(", text, re.M)
