"""What a release consists of: an sdist, and a wheel that installs alone; what setup.py lacks."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lola_vllm

ROOT = Path(__file__).parents[2]
SOURCES = ("benchmarks", "csrc", "docs", "kernels", "lola_vllm", "serving", "tests", "tools")
UNWANTED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", "*.so", ".*_cache",
    ".hypothesis", "eval-results",
)  # fmt: skip
# In place of a C++ compiler: objects are empty, and the library is the one that this checkout has
# built of the same sources. What compiles them for tests is `make setup`.
COMPILER = """#!/bin/sh
all="$*"
while [ $# -gt 0 ]; do
    case "$1" in -o) out="$2" ;; -MF) deps="$2" ;; esac
    shift
done
case "$out" in
    "") exec c++ $all ;;
    *.so) cp "$BUILT_EXTENSION" "$out" ;;
    *) : > "$out"; echo "$out:" > "$deps" ;;
esac
"""
# Run where neither the checkout nor its editable install can be found first.
LOOK = """
import importlib.metadata, pathlib
import lola_vllm, lola_vllm.kernels, lola_vllm.serving.options
from lola_vllm.core.ops import cpp
here = pathlib.Path(lola_vllm.__file__).parents[1]
assert cpp.load()
for module in (cpp, lola_vllm.kernels, lola_vllm.serving.options):
    assert pathlib.Path(module.__file__).is_relative_to(here), module
from lola_vllm.serving.inspector import page_files
for name in ("smollm2", "qwen2_5_coder"):
    maps = here / "lola_vllm/models" / name / "maps.safetensors"
    assert maps.stat().st_size > 10**6
assert b"<html" in page_files()[""].body and "main.js" in page_files()
from lola_vllm.serving import chat
assert b"<html" in chat.page_files()[""].body and "main.js" in chat.page_files()
(found,) = importlib.metadata.distributions(name="lola-vllm", path=[str(here)])
assert found.version == lola_vllm.__version__
groups = {entry.group: entry for entry in found.entry_points}
assert groups["vllm.general_plugins"].load() is lola_vllm.register
assert groups["console_scripts"].load()
print(here)
"""


def _unwanted(folder: str, names: list[str]) -> set[str]:
    """What is no source; `models` at the root alone, as the package has such a folder."""
    return UNWANTED(folder, names) | ({"models"} if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The directory with the sdist of a copy of this checkout, and the wheel of that sdist."""
    extension = ROOT / "lola_vllm" / "_C.abi3.so"
    assert extension.is_file(), f"{extension} is not built: make setup"
    place = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, place / "source", ignore=_unwanted)
    compiler = place / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "BUILT_EXTENSION": str(extension)}
    env["LOLA_VLLM_REQUIRE_EXT"] = "1"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist")]
    run = subprocess.run([*command, str(place / "source")], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return place / "dist"


@pytest.mark.slow
def test_the_sdist_holds_every_source(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources = {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix not in (".pyc", ".so")
        and not path.name.startswith(".env")
        and not any(part.endswith(".egg-info") for part in path.parts)
    }
    sources |= {"LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "mkdocs.yml"}
    assert len(sources) > 300
    assert not sources - names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_the_wheel_installs_alone(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"lola_vllm-{lola_vllm.__version__}-cp310-abi3-linux")
    assert "lola_vllm/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", str(tmp_path), str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    look = subprocess.run(
        [sys.executable, "-c", LOOK], cwd="/", env=env, capture_output=True, text=True
    )
    assert look.stdout.splitlines()[-1:] == [str(tmp_path)], look.stderr


def setup(**env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py up to its metadata, with a compiler that does not exist."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler", **env},
        capture_output=True,
        text=True,
    )


def test_goes_on_without_a_compiler():
    run = setup(LOLA_VLLM_REQUIRE_EXT="0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "lola-vllm"
    assert "WARNING" in run.stderr
    assert "apt-get install g++" in run.stderr


def test_stops_where_the_extension_is_required():
    run = setup(LOLA_VLLM_REQUIRE_EXT="1")
    assert run.returncode != 0
    assert "no C++ compiler found (no-such-compiler)" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "lola_vllm, lola_vllm.command.doctor, lola_vllm.command.cli,"
            " lola_vllm.command.client.chat, lola_vllm.serving.store_options",
            "torch vllm transformers triton",
        ),
        ("lola_vllm.models", "torch vllm"),
        ("lola_vllm.engine.hf, lola_vllm.engine.estimate", "vllm"),
    ],
)
def test_importing_loads_nothing_heavy(modules, absent):
    check = f"import sys, {modules}; print([m for m in {absent.split()} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.slow
def test_every_data_file_of_serving_is_part_of_a_build(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        [*command, "build_py", "--build-lib", str(tmp_path / "lib")], cwd=ROOT, check=True
    )
    data = [
        path.relative_to(ROOT)
        for path in (ROOT / "serving").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
    ]
    assert len(data) >= 3
    for path in data:
        assert (tmp_path / "lib" / "lola_vllm" / path).is_file(), path
    assert not list((tmp_path / "lib").rglob("README.md"))  # of folders: for the repository alone


def test_make_serve_starts_our_front_and_its_example_names_the_model():
    command = ["make", "-n", "serve", "MODEL=tests/serving", "PORT=8123"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bin/lola-vllm serve tests/serving --host 127.0.0.1 --port 8123" in lines
    assert '\\"model\\": \\"serving\\"' in lines and "127.0.0.1:8123/v1/chat" in lines
    readme = (ROOT / "README.md").read_text()
    assert '-d \'{"model": "smollm2-lola", ' in readme
