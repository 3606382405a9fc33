"""docs/design.md says who imports whom, and each folder's README names its files."""

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented import ROOT

TABLE = re.search(
    r"^## The code\n.*?((?:^\|.*\n)+)", (ROOT / "docs/design.md").read_text(), re.M | re.S
)
PARTS = {  # of the table -> its row
    path: at
    for at, row in enumerate(TABLE[1].splitlines())
    for path in re.findall(r"`([\w/]+/)`:", row)
}
PACKAGE = ROOT / "lola_vllm"
BOTH_WAYS = {("kernels/", "lola_vllm/core/"), ("lola_vllm/core/", "kernels/")}
ENTRIES = ("__init__.py", "__main__.py")  # of lola_vllm: they lead to the plugin and the commands


def module_path(module: str) -> str:
    """Where a module lies that is imported by this name."""
    path = module.replace(".", "/")
    inside = path.removeprefix("lola_vllm/")
    return inside if inside.startswith(("kernels", "serving")) else path


def part_of(path: str) -> str | None:
    """The part that a file or the path of a module is in."""
    stem = f"{path.removesuffix('.py')}/"
    return next((part for part in PARTS if stem.startswith(part)), None)


def modules() -> Iterator[Path]:
    for folder in ("lola_vllm", "kernels", "serving"):
        yield from (ROOT / folder).rglob("*.py")


def imports(file: Path) -> set[str]:
    """The full names of what a file imports anywhere in it, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_benchmark_imports_what_a_script_finds():
    for file in (ROOT / "benchmarks").glob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] in ("tools", "tests")], (
            file
        )


def uses() -> set[tuple[str, str]]:
    """Which parts import which, anywhere in their files."""
    found = set()
    for file in modules():
        user = part_of(file.relative_to(ROOT).as_posix())
        names = (name for name in imports(file) if name.startswith("lola_vllm."))
        used = {part_of(module_path(name)) for name in names}
        found |= {(user, part) for part in used if user and part and part != user}
    return found


def test_every_module_is_in_a_part():
    assert (ROOT / "csrc").is_dir() and PARTS["csrc/"] == PARTS["kernels/"]
    files = {file.relative_to(ROOT).as_posix() for file in modules()}
    outside = {file for file in files if part_of(file) is None}
    assert outside == {f"lola_vllm/{name}" for name in ENTRIES}


def test_imports_lead_to_a_row_below():
    found = uses()
    assert len(found) > 15
    assert {pair for pair in found if PARTS[pair[0]] >= PARTS[pair[1]]} == BOTH_WAYS


def test_inner_rooms_know_nothing_of_vllm():
    inner = (PACKAGE / room for room in ("core", "models", "memory"))
    knowing = {
        file.name
        for room in inner
        for file in room.rglob("*.py")
        if any(name.partition(".")[0] == "vllm" for name in imports(file))
    }
    assert knowing == set()


def test_no_imports_go_in_a_circle():
    """Those for type checkers count."""
    files = {file.relative_to(ROOT).as_posix().removesuffix(".py"): file for file in modules()}
    uses: dict[str, set[str]] = {}
    for user, file in files.items():
        names = imports(file)
        names |= {name.rpartition(".")[0] for name in names}  # of whom a name is imported
        uses[user] = set(map(module_path, names)) & files.keys()
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
    assert twice == {"LolaForCausalLM"}


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
def test_what_a_readme_names_is_there_and_it_is_short(readme):
    text = readme.read_text()
    assert len(text.splitlines()) <= 32 and max(map(len, text.splitlines())) <= 100
    assert "Tests: " in text or readme.parent.name in ("tests", "benchmarks")
    starts = [readme.parent, ROOT, ROOT / "lola_vllm", ROOT / "tests/ops/conformance"]
    for word in named(readme):
        assert any((start / word).exists() for start in starts), word
