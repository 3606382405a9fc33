"""The whole command on a tiny random base: killed between stages and within, it goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.command import cli
from lola_vllm.command.linearize import run
from lola_vllm.command.linearize.plan import STAGES
from lola_vllm.core.state import PAGE_ALIGNMENT
from lola_vllm.engine.estimate import estimate
from tests.unit.training.distill.test_distill import write_base

# A tokenizer of characters has no room for facts in rows that a test can afford.
FAST = {
    "train": {
        "retrieval_fraction": 0.0,
        "dtype": "bfloat16",  # training on is in float32, in the same process
        "rows": 2,
        "row_length": 512,
        "lora_rows": 3,
        "lora_rank": 2,
    },
    "calibrate": {"facts": 0.0, "prompts": 6, "prompt_length": 512},
    "train_on": {"retrieval_fraction": 0.0, "lora_rows": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)
    words = ["river", "stone", "and", "the", "blue", "seven", "runs", "over", "night", "it"]
    for name in ("one", "two"):
        picks = torch.randint(len(words), (6000,), generator=generator).tolist()
        (folder / f"{name}.txt").write_text(" ".join(words[i] for i in picks))
    entry = {"name": "one", "licence": "CC0-1.0"}
    (folder / "SOURCES.json").write_text(json.dumps([entry]))
    return folder


@pytest.fixture
def command(base, texts, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(FAST))
    return [
        "linearize", "--base", str(base), "--out", str(tmp_path / "lola"), "--texts", str(texts),
        "--recipe", str(tmp_path / "recipe.json"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_is_not(
    command, tmp_path, monkeypatch, capsys
):
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "next: lola-vllm serve" in printed.out
    for name, title in STAGES.items():
        assert f"{title}: done after" in printed.err, name
    whole = load_file(tmp_path / "lola" / "model.safetensors")
    work = tmp_path / "lola.training"
    state = json.loads((work / "linearize.json").read_text())
    assert state["done"] == list(STAGES) and state["seconds"].keys() == STAGES.keys()
    assert not (work / "trained").exists() and (work / "calibration-2.safetensors").is_file()
    config = json.loads((tmp_path / "lola" / "config.json").read_text())["lola_config"]
    served = config["update_interval"], config["sink_size"], config["sparse_dtype"]
    assert served == (16, 4, "int8")
    recipe = state["recipe"]
    assert recipe["calibrate"]["pairs"] + recipe["calibrate"]["recent"] == 64
    alike = {"sparse_cache_size": 64, "recent_size": 0, "hidden_state": True}
    planned, found = (estimate(tmp_path / "lola", x).bytes_per_sequence for x in (alike, None))
    pages = sum(map(len, config["sparse_cache_size"]))
    assert abs(found - planned) <= pages * PAGE_ALIGNMENT
    card = (tmp_path / "lola" / "README.md").read_text()
    assert "one (CC0-1.0)" in card and "| attention transfer | 1,024 |" in card
    assert json.dumps(recipe) in card and "all heads hold" in card

    # Another directory, killed after every stage but the last, before that is noted as done.
    other = [*command]
    other[other.index("--out") + 1] = str(tmp_path / "again")
    real, killed = run._stage, []

    def killing(state: object, name: str, say: object, action: object) -> None:
        if name in state.done or name in killed or name == "card":
            return real(state, name, say, action)
        killed.append(name)
        action()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_stage", killing)
    assert cli.main(other) == cli.INTERRUPTED
    assert "go on with the same command and --resume" in capsys.readouterr().err
    statuses = [cli.main([*other, "--resume"]) for _ in range(len(STAGES) - 1)]
    assert statuses == [cli.INTERRUPTED] * (len(STAGES) - 2) + [0]
    assert [*killed, "card"] == list(STAGES)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_a_dry_run_says_the_plan_and_writes_nothing(command, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert cli.main([*command, "--hours", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    for title in ("attention transfer", "LoRA", "calibration", "training on"):
        assert f"\n{title}" in printed
    assert "MiB whatever its length" in printed
    assert '"lora_rank": 2' in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--hours", "0"], "--hours 0: must be above 0"),
        (["--texts", "nowhere"], "--texts nowhere: no such file or directory"),
        (["--memory", "0.001"], "--memory 0.001: window and hidden state alone take"),
        (["--recipe", "{short}"], "row_length = 256: with window 128"),
        (["--recipe", "nowhere.json"], "--recipe nowhere.json: cannot be read"),
    ],
)
def test_refusals(command, options, message, tmp_path, capsys):
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"train": {"row_length": 256}}))
    assert cli.main([*command, *[option.format(short=short) for option in options]]) == 2
    assert message in capsys.readouterr().err


def test_a_working_directory_is_of_one_run(command, tmp_path, monkeypatch, capsys):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_plan", stop)
    assert cli.main(command) == cli.INTERRUPTED
    assert cli.main(command) == 2
    assert "holds an earlier run; go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--memory", "3"]) == 2
    assert "of a run with memory = None, not 3.0" in capsys.readouterr().err
    (tmp_path / "lola.training" / "linearize.json").write_text("{")
    assert cli.main([*command, "--resume"]) == 2
    assert "damaged" in capsys.readouterr().err
