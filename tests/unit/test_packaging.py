"""setup.py without a compiler: the install goes on and says what to do, or stops if told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
