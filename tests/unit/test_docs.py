"""The README and docs/ name what exists: links, parameters, variables, options and commands."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

from lola_vllm.command import cli
from lola_vllm.engine.vllm import config_hook, refusals
from lola_vllm.engine.vllm.compat import SUPPORTED, TESTED
from tests.support.documented import ROOT, commands
from tools.site import picture

DOCS = ROOT / "docs"
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in BESIDE), *sorted(DOCS.rglob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def section(path: str, title: str) -> str:
    """The text below a heading of a page, up to the next heading."""
    text = (ROOT / path).read_text()
    (found,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    return found


def rows(path: str, title: str) -> dict[str, list[str]]:
    """First cell -> other cells of the table below a heading, without its two head lines."""
    lines = [line for line in section(path, title).splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@page
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r' (?:src|srcset)="([^"]+)"', text)
    assert links or page.name not in ("README.md", "design.md")
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or target.suffix == ".svg" or anchor in anchors(target), link


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)]
    assert not [page for page in pages if f": {page}\n" not in menu]


@pytest.mark.parametrize("theme", picture.COLORS)
def test_the_picture_is_that_of_the_results(theme):
    drawn = (picture.IMAGES / f"memory-{theme}.svg").read_text()
    assert picture.svg(theme) == drawn, "run python -m tools.site.picture"


def test_every_environment_variable_is_documented():
    folders = ("lola_vllm", "serving", "kernels", "csrc")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    code = [f for f in [*files, ROOT / "setup.py"] if f.suffix in (".py", ".cpp", ".h", ".cu")]
    used = {
        name
        for path in code
        for name in re.findall(r"\bLOLA_VLLM_[A-Z_]+[A-Z]\b", path.read_text())
    }
    assert len(used) >= 5
    documented = rows("docs/configuration.md", "Environment variables")
    assert {key.strip("`") for key in documented} == used


def test_every_refusal_is_documented():
    source = inspect.getsource(config_hook) + inspect.getsource(refusals)
    options = set(re.findall(r'_unfit\(\s*"(--[a-z-]+)"', source))
    options |= set(re.findall(r'f"(--[a-z-]+) = \{', source))
    options |= set(re.findall(r'option, \w+ = "(--[a-z-]+)"', source))
    assert {"--speculative-config", "--tensor-parallel-size", "--max-num-batched-tokens"} <= options
    table = section("docs/features.md", "Refused at start-up")
    assert not {option for option in options if f"`{option}" not in table}


def test_the_hooks_of_vllm_are_where_the_page_says():
    """The first name of a row is in its file, and its test exists."""
    for hook, (file, test) in rows("docs/vllm.md", "Hooks").items():
        name = file.strip("`")
        path = ROOT / (name if "/" in name else f"lola_vllm/engine/vllm/{name}")
        names = re.findall(r"`(\w+)[\w.]*`", hook.partition(":")[0])
        assert names and not [n for n in names if n not in path.read_text()], hook
        assert (ROOT / "tests" / test.strip("`")).is_file(), test


def test_the_releases_of_vllm_are_those_that_are_supported():
    table = section("docs/vllm.md", "Releases")
    found = re.findall(r"^\| [\d.]+ \| ([\d.]+) \|.*\| (.*) \|$", table, re.M)
    supported = [v for v in (f"0.{n}" for n in range(100)) if SUPPORTED.contains(f"{v}.0")]
    said = {version: "not tested" not in state for version, state in found}
    assert said == {v: TESTED.contains(f"{v}.0") for v in supported}


@page
def test_commands_are_such_as_the_program_takes(page):
    parser, program = cli._parser(), re.compile(r"(?:\.venv/bin/)?lola-vllm ")
    calls = [call for call in commands(page) if program.match(call)]
    assert len(calls) >= {"README.md": 5, "checkpoints.md": 3, "evaluation.md": 4}.get(page.name, 0)
    for call in calls:
        if not re.search(r"[\[(|]|\.\.\.", call.split("'")[0]):  # a synopsis
            parser.parse_args(shlex.split(program.sub("", call)))


WALK = (DOCS / "walk.md").read_text()
STEPS = sorted(set(re.findall(r"`([\w/]+\.(?:py|h|cpp))::([\w.]+)`", WALK)))


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
    walks = re.split(r"^## ", WALK, flags=re.M)[1:]
    assert len(walks) == 2
    assert all(len(re.findall("::", walk)) >= 7 for walk in walks)


@pytest.mark.parametrize(("file", "name"), [s for s in STEPS if s[0] != "a/b.py"])
def test_what_a_step_of_a_walk_names_is_there(file, name):
    path = ROOT / file if file.startswith(("csrc/", "serving/")) else ROOT / "lola_vllm" / file
    text = path.read_text()
    if path.suffix == ".py":
        assert name in definitions(ast.parse(text).body)
    else:
        assert re.search(rf"^(?:[\w:]+ )+{name}\(", text, re.M)
