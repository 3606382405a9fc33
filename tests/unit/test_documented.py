"""Commands and programs of the documentation run as they stand, on tiny models.

tests/support/documented.py says which.
tests/serving/test_documented.py runs those that ask a server.
"""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.command import cli
from lola_vllm.core.lola_config import importance_size
from lola_vllm.models.calibration import importance_tensors, save_calibration
from tests.support.documented import ROOT, commands, documented, programs
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB

# In place of what a page says, so that a training takes seconds.
FASTER = dict(
    rows=2, row_length=448, steps_per_row=1, queries_per_step=32, lora_rows=2, lora_row_length=448,
    rows_per_step=2, retrieval_fraction=0, dtype="float32",
)  # fmt: skip
# Where paths of the pages lead.
SCHEDULE = {
    "models/smollm2-lola": "lola",
    "models/my-lola": "lola",
    "path/to/lola": "lola",
    "demo": "lola",
    "models/smollm2-base": "base",
    "path/to/base": "base",
    "path/to/llama": "base",
    "path/to/model": "base",
    "models/texts": "texts",
    "path/to/texts": "texts",
}


def page_and_command(how: str) -> pytest.MarkDecorator:
    cases = documented(how)
    return pytest.mark.parametrize(
        ("page", "command"), cases, ids=[f"{page}-{i}" for i, (page, _) in enumerate(cases)]
    )


def test_commands_are_found_on_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('Run\n\n    lola-vllm frob \\\n      --x "a\n      b"  # why\n\nand see.\n')
    assert list(commands(page)) == ['lola-vllm frob --x "a b"']
    assert len(documented("cli")) >= 15 and len(documented("http")) >= 15


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`lola` and `base`, with one tokenizer, and `texts`."""
    out = tmp_path_factory.mktemp("documented")
    lola = make_speaking(out / "lola")
    make_base(out / "base", "llama", vocab_size=VOCAB)
    for file in lola.glob("*token*"):
        shutil.copy(file, out / "base")
    (out / "texts").mkdir()
    words = [(ROOT / "docs" / name).read_text() for name in ("algorithm.md", "bounds.md")]
    (out / "texts" / "words.txt").write_text("\n\n".join(words))
    return out


def furnish(place: Path, models: Path) -> None:
    """A directory in which the paths of the pages lead to tiny models."""
    for name, source in SCHEDULE.items():
        shutil.copytree(models / source, place / name)
    shutil.copy(models / "lola" / "config.json", place / "path/to/config.json")


def write_calibration(path: Path, base: Path) -> None:
    """As `lola-vllm calibrate --save` would for a base."""
    config = json.loads((base / "config.json").read_text())
    heads, size = config["num_key_value_heads"], importance_size(config["head_dim"])
    layers = range(config["num_hidden_layers"])
    importance = importance_tensors({i: torch.zeros(heads, size) for i in layers})
    sizes = [[8 + i for i in range(heads)] for _ in layers]
    recent = [[i for i in range(heads)] for _ in layers]
    save_calibration(path, {"sparse_cache_size": sizes, "recent_size": recent}, importance)


def run(command: str) -> int:
    program, *words = shlex.split(command)
    assert program.endswith("lola-vllm")
    if "--out" in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    if words[0] == "distill":
        if "--recipe" in words:
            at = words.index("--recipe")
            recipe = json.loads(words[at + 1])
            del words[at : at + 2]
        else:
            recipe = {}
        words += ["--recipe", json.dumps(recipe | FASTER)]
    return cli.main(words)


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> Path:
    """The files of both stages, under the names that pages give them."""
    place = tmp_path_factory.mktemp("trained")
    furnish(place, models)
    (command,) = [c for page, c in documented("cli") if page == "README.md" and " distill " in c]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run(command) == 0
    work = place / "path/to/lola.training"
    shutil.move(work, place / "OUT.training")
    for stage in ("maps", "lora"):
        torch.save(
            load_file(place / "OUT.training" / f"{stage}.safetensors"), place / f"{stage}.bin"
        )
    return place


@page_and_command("cli")
def test_command(page, command, models, trained, tmp_path, monkeypatch, capsys):
    if page == "README.md" and " distill " in command:
        return  # what `trained` has run
    furnish(tmp_path, models)
    for name in ("maps.bin", "lora.bin"):
        shutil.copy(trained / name, tmp_path)
    shutil.copytree(trained / "OUT.training", tmp_path / "OUT.training")
    write_calibration(tmp_path / "calibration.safetensors", models / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if " serve " in command:
        command = command.replace(" serve ", " serve --dry-run ")
    assert run(command) == 0
    printed = capsys.readouterr().out
    if " estimate " in command:
        assert "MiB per sequence" in printed
    if " serve " in command:
        assert "vllm serve" in printed.splitlines()[-1]
    if "--out" in command:
        out = shlex.split(command)[shlex.split(command).index("--out") + 1]
        assert (tmp_path / out / "config.json").is_file()


@page_and_command("vllm")
def test_vllm_knows_the_options(page, command, models, tmp_path, monkeypatch):
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    furnish(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.removeprefix("VLLM_PLUGINS=lola "))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    validate_parsed_serve_args(args)
    assert Path(args.model_tag).is_dir()


@page_and_command("make")
def test_make_knows_the_targets(page, command):
    targets = shlex.split(command)[1:]
    steps = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert steps.returncode == 0, steps.stderr
    assert ".venv/bin/" in steps.stdout or "benchmarks/" in steps.stdout


def test_the_program_for_transformers(models, tmp_path, monkeypatch, capsys):
    furnish(tmp_path, models)
    monkeypatch.chdir(tmp_path)
    (program,) = programs(ROOT / "docs/howto/transformers.md")
    names: dict[str, object] = {}
    exec(compile(program, "transformers.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert torch.equal(names["seen"], names["tokens"][0])
