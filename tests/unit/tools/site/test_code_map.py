"""The picture of the code is that of its imports, and each folder's README names its files."""

import ast
import graphlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented import ROOT
from tools.site import code_map

BOXES = {box.path: at for at, (_, row) in enumerate(code_map.BANDS) for box in row}
CSRC = "csrc/"  # is loaded, not imported
ENTRIES = ("__init__.py", "__main__.py")  # of lola_vllm: they lead to the plugin and the commands


def module_path(module: str) -> str:
    """Where a module lies that is imported by this name."""
    path = module.replace(".", "/")
    inside = path.removeprefix("lola_vllm/")
    return inside if inside.startswith(("kernels", "serving")) else path


def box_of(path: str) -> str | None:
    """The box that a file or the path of a module is in."""
    stem = f"{path.removesuffix('.py')}/"
    holds = [box for box in BOXES if stem.startswith(f"{box.removesuffix('.py').rstrip('/')}/")]
    return holds[0] if holds else None


def modules() -> Iterator[Path]:
    for folder in ("lola_vllm", "kernels", "serving"):
        yield from (ROOT / folder).rglob("*.py")


def uses() -> set[tuple[str, str]]:
    """Which boxes import which, anywhere in their files."""
    found = set()
    for file in modules():
        user = box_of(file.relative_to(ROOT).as_posix())
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            used = {box_of(module_path(name)) for name in names if name.startswith("lola_vllm.")}
            found |= {(user, box) for box in used if user and box and box != user}
    return found


def test_every_module_is_in_the_picture():
    files = {file.relative_to(ROOT).as_posix() for file in modules()}
    outside = {file for file in files if box_of(file) is None}
    assert outside == {f"lola_vllm/{name}" for name in ENTRIES}


def test_imports_lead_down_or_along_an_arrow():
    found = uses()
    assert len(found) > 15
    wrong = {pair for pair in found if BOXES[pair[0]] >= BOXES[pair[1]]} - set(code_map.USES)
    assert not wrong
    assert {pair for pair in code_map.USES if pair[1] != CSRC} <= found


def test_no_imports_go_in_a_circle():
    """Those for type checkers count. The catalog of the store is yet to be parted from its work."""
    store = "lola_vllm/memory/sessions/store"
    above = {"lola_vllm/memory/sessions/upkeep", "lola_vllm/memory/sessions/shared_prefixes"}
    files = {file.relative_to(ROOT).as_posix().removesuffix(".py"): file for file in modules()}
    uses: dict[str, set[str]] = {}
    for user, file in files.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = module_path(node.module)
                found |= {f"{module}/{alias.name}" for alias in node.names} | {module}
        uses[user] = found & files.keys() - ({store} if user in above else set())
    graphlib.TopologicalSorter(uses).prepare()  # raises for a circle


def test_a_class_name_means_one_thing():
    """But for the models, which transformers and vLLM know by the same name."""
    names = Counter(
        node.name
        for file in modules()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    twice = {name for name, count in names.items() if count > 1}
    assert twice == {"LolaLlamaForCausalLM", "LolaLlamaModel"}


@pytest.mark.parametrize("theme", code_map.COLORS)
def test_the_picture_is_drawn_anew(theme):
    drawn = (code_map.IMAGES / f"code-{theme}.svg").read_text()
    assert code_map.svg(theme) == drawn, "run python -m tools.site.code_map"


@pytest.mark.parametrize("row", [row for _, row in code_map.BANDS], ids=lambda row: row[0].path)
def test_boxes_have_room(row):
    """Words are at most as wide as their box, and arrows lead to the next box."""
    for box in row:
        name = box.path.removeprefix("lola_vllm/")
        assert max(8.6 * len(name), 7 * len(box.words)) <= box.width, box.path
    assert all(a.x + a.width < b.x for a, b in itertools.pairwise(row))
    assert row[-1].x + row[-1].width <= code_map.WIDTH - 20
    order = [box.path for box in row]
    for user, used in code_map.USES:
        if user in order:
            assert abs(order.index(user) - order.index(used)) == 1


# --- the README of each folder

SOURCES = (".py", ".sh", ".h", ".cpp", ".cu", ".cuh")
READMES = sorted(
    path
    for folder in ("lola_vllm", "kernels", "serving", "csrc", "benchmarks", "tools", "tests")
    for path in (ROOT / folder).rglob("README.md")
    if path.parent.name != "deploy"
)
each = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)


def named(readme: Path) -> list[str]:
    """What a README has in backticks that is a file or a folder."""
    words = re.findall(r"`([\w./*-]+)`", readme.read_text())
    return [word for word in words if word.endswith(("/", ".md", *SOURCES))]


def test_every_folder_of_code_has_a_readme():
    folders = {file.parent for file in (ROOT / "lola_vllm").glob("*/**/__init__.py")}
    folders |= {ROOT / name for name in ("lola_vllm", "kernels", "serving", "benchmarks")}
    folders |= {ROOT / name for name in ("csrc", "csrc/cpu", "csrc/cuda", "tools", "tests")}
    assert {readme.parent for readme in READMES} == folders


@each
def test_a_readme_names_every_file_of_its_folder(readme):
    folder = readme.parent
    words = named(readme)
    files = [file for file in folder.rglob("*") if file.suffix in SOURCES]
    if folder.name == "tests":  # its folders are enough
        files = [file for file in files if file.parent == folder]
        below = {file.parent.name for file in folder.glob("*/*.py")}
        assert {f"{name}/" for name in below} <= set(words)
    nearest = [next(up for up in file.parents if (up / "README.md").is_file()) for file in files]
    for file, owner in zip(files, nearest, strict=True):
        if owner == folder and (file.name != "__init__.py" or folder.name == "texts"):
            assert file.relative_to(folder).as_posix() in words, file


@each
def test_what_a_readme_names_is_there_and_it_is_short(readme):
    text = readme.read_text()
    assert len(text.splitlines()) <= 32 and max(map(len, text.splitlines())) <= 100
    assert "Tests: " in text or readme.parent.name in ("tests", "benchmarks")
    starts = [readme.parent, ROOT, ROOT / "lola_vllm", ROOT / "tests/ops/conformance"]
    for word in named(readme):
        assert any((start / word).exists() for start in starts), word
