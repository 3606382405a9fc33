"""`lola-vllm estimate --gpu`: JSON, tables and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lola_vllm import cli
from lola_vllm.checkpoint import CheckpointError
from lola_vllm.estimate import estimate, format_table
from lola_vllm.gpu_cost.gpus import GPUS
from lola_vllm.gpu_cost.steps import DECODE_DESIGNS, PREFILL_DESIGNS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("gpu", GPUS)
def test_json_and_table_have_every_design(
    config: Path, capsys: pytest.CaptureFixture[str], gpu: str
):
    command = ["estimate", str(config), "--gpu", gpu, "--batch", "8", "--context", "3000"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["gpu"]
    assert found["gpu"] == GPUS[gpu].name and found["batch"] == 8 and found["context"] == 3000
    assert tuple(step["design"] for step in found["decode"]) == DECODE_DESIGNS
    assert [(p["rows"], p["design"]) for p in found["prefill"]] == [
        (rows, design) for rows in (1, 64) for design in PREFILL_DESIGNS
    ]
    for cost in (*found["decode"], *found["prefill"]):
        seconds = sum(part["seconds"] for part in cost["parts"].values())
        assert cost["seconds"] == pytest.approx(seconds + cost["launch_seconds"])
        assert cost["bytes"] == sum(part["bytes"] for part in cost["parts"].values())
    assert "context shift" in found["decode"][1]["parts"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "decode, us: 8 x 3,000 tokens" in printed and "prompt, ms: 64 x 3,000" in printed
    assert "not measured" in printed and "does not fit" not in printed


def test_weights_are_those_of_the_config(config: Path):
    result = estimate(config, gpu="l4")
    assert result.gpu is not None
    layer = 256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 512
    assert result.gpu.weight_bytes == 2 * (2 * layer + 1000 * 256)
    assert result.gpu.context == 4096 and result.gpu.batch == 1


def test_what_does_not_fit_is_marked(config: Path):
    text = format_table(estimate(config, gpu="l4", batch=20_000, context=65536))
    assert "! does not fit" in text


def test_without_a_gpu_there_is_none(config: Path):
    result = estimate(config)
    assert result.gpu is None and result.to_json()["gpu"] is None
    assert "TB/s" not in format_table(result)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"gpu": "b200"}, "gpu = 'b200': must be one of h100, a100, l4, 4090"),
        ({"gpu": "h100", "batch": 0}, "batch = 0: must be at least 1"),
        ({"batch": 4}, "batch = 4: is of the step on a GPU; name one with gpu"),
        ({"gpu": "h100", "tensor_parallel_size": 2}, "leave out tensor_parallel_size"),
    ],
)
def test_refusals(config: Path, arguments: dict[str, object], words: str):
    with pytest.raises(CheckpointError, match=words):
        estimate(config, **arguments)  # type: ignore[arg-type]
