"""Models that several tests of evaluations read: tiny ones, and configurations alone."""

import itertools
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lola_vllm.evaluation.question import Prose
from tools.support.speaking import make_speaking

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LOLA = {**LLAMA, "model_type": "lola_llama", "lola_config": {"window_size": 16}}


@pytest.fixture
def models(tmp_path) -> Path:
    """A directory of models without weights: llama, lola and gpt."""
    for name, config in {"llama": LLAMA, "lola": LOLA, "gpt": {"model_type": "gpt2"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="session")
def lola(tmp_path_factory) -> Path:
    """A tiny LoLA model with a tokenizer and a chat template."""
    return make_speaking(tmp_path_factory.mktemp("evaluation") / "lola")


@pytest.fixture(scope="session")
def llama(lola) -> Path:
    """The same weights with softmax attention, and positions for 400 tokens."""
    out = lola.parent / "llama"
    out.mkdir()
    for file in lola.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            (out / file.name).write_bytes(file.read_bytes())
    fields = json.loads((lola / "config.json").read_text())
    del fields["lola_config"]
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields["max_position_embeddings"] = 400
    (out / "config.json").write_text(json.dumps(fields))
    tensors = load_file(lola / "model.safetensors")
    own = ("feature_map", "window_factors")
    tensors = {n: t for n, t in tensors.items() if not any(part in n for part in own)}
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.fixture(scope="session")
def prose() -> Prose:
    """Four documents of 200 sentences of words that say nothing."""
    rng = random.Random(5)
    syllables = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "na", "ru"]
    vocabulary = ["".join(parts) for parts in itertools.product(syllables, repeat=3)]
    documents = []
    for _ in range(4):
        sentences = [
            " ".join(["The", *rng.choices(vocabulary, k=rng.randint(3, 30))]) for _ in range(200)
        ]
        documents.append(". ".join(sentences) + ".")
    return Prose(documents)
