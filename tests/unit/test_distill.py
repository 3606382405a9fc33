"""Distillation on a tiny random Llama: it learns, resumes to the same bits, and refuses clearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.config import LolaConfig, LolaConfigError
from lola_vllm.distill.run import DistillOptions, distill
from lola_vllm.distill.student import attach_maps, load_base, load_maps, lola_attention

LOLA = {"window_size": 8, "sparse_cache_size": 4, "sink_size": 2}
OPTIONS = DistillOptions(
    lola_config=LOLA,
    train_sparse_caches=(0, 4),
    rows=48,
    row_length=96,
    steps_per_row=2,
    queries_per_step=64,
    learning_rate=5e-2,
    lora_rows=8,
    lora_row_length=64,
    lora_rank=2,
    rows_per_step=2,
    retrieval_fraction=0.0,
    dtype="float32",
    seed=3,
)


def write_tokenizer(folder: Path) -> None:
    """Characters as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_base(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny random decoder whose attention is far from uniform."""
    import transformers

    torch.manual_seed(0)
    keys = dict(
        vocab_size=257, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=256,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **{**keys, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                value.mul_(12)
            elif "norm" not in name:
                value.mul_(4)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = ["river", "stone", "and", "the", "blue", "seven", "runs", "over", "night", "it"]
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words[i] for i in picks))
    return path


@pytest.fixture(scope="module")
def trained(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "lola"
    distill(base, [str(text)], out, OPTIONS)
    return out


def divergence(model: object, text: Path) -> float:
    """KL(softmax || LoLA) per token on text that was not among the rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(text.read_text()[-2000:]).input_ids).view(4, -1)
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
        with lola_attention(model, LolaConfig(**LOLA)):
            got = model(ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def test_it_learns(trained: Path, base: Path, text: Path) -> None:
    work = trained.with_name("lola.training")
    losses = json.loads((work / "distill.json").read_text())["losses"]
    assert [len(curve) for curve in losses["transfer"]] == [96, 96]
    assert len(losses["finetune"]) == 4
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = load_base(base, torch.float32)
    attach_maps(model, 2)
    before = divergence(model, text)
    load_maps(model, load_file(work / "maps.safetensors"))
    assert divergence(model, text) < 0.8 * before


def test_the_checkpoint_holds_what_was_trained(trained: Path, base: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    expected = {**LOLA, "mixing": "lola", "feature_dim": 6, "num_state_heads": 2}
    assert {key: config["lola_config"][key] for key in expected} == expected
    tensors, plain = load_file(trained / "model.safetensors"), load_file(base / "model.safetensors")
    work = trained.with_name("lola.training")
    tuned = load_file(work / "lora.safetensors")
    name = "model.layers.1.self_attn.feature_map_k"
    assert tensors[name].shape == (2, 6, 6)
    torch.testing.assert_close(tensors[name], tuned[name].to(tensors[name].dtype))
    q_proj = "model.layers.0.self_attn.q_proj"
    A, B = (
        tuned[f"base_model.{'model.' + q_proj}.lora_{side}.default.weight"].float() for side in "AB"
    )
    assert bool(B.abs().sum() > 0)
    merged = plain[f"{q_proj}.weight"] + 2.0 * B @ A
    torch.testing.assert_close(tensors[f"{q_proj}.weight"], merged)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    trained: Path, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lola_vllm.distill import finetune, transfer

    out = tmp_path / "lola"

    class CutError(Exception):
        pass

    train_layer = transfer._train_layer

    def train_first_layer(model: object, index: int, *args: object) -> object:
        if index == 1:
            raise CutError
        return train_layer(model, index, *args)

    # Once in the second layer, once after a step of the second stage.
    monkeypatch.setattr(transfer, "_train_layer", train_first_layer)
    with pytest.raises(CutError):
        distill(base, [str(text)], out, OPTIONS)
    monkeypatch.undo()
    save = finetune._save

    def save_and_stop(*args: object) -> None:
        save(*args)
        raise CutError

    monkeypatch.setattr(finetune, "_save", save_and_stop)
    monkeypatch.setattr(
        finetune.FinetuneOptions, "__post_init__",
        lambda self: object.__setattr__(self, "save_every", 2), raising=False,
    )  # fmt: skip
    with pytest.raises(CutError):
        distill(base, [str(text)], out, OPTIONS, resume=True)
    monkeypatch.undo()
    distill(base, [str(text)], out, OPTIONS, resume=True)
    whole, resumed = (load_file(path / "model.safetensors") for path in (trained, out))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_with_a_long_window_every_family_answers_as_before(family: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    model = load_base(write_base(tmp_path, family, **changes), torch.float32)
    attach_maps(model, 2)
    ids = torch.arange(40)[None] * 7 % 250
    softmax = model(ids).logits
    with lola_attention(model, LolaConfig(window_size=64, sparse_cache_size=0)):
        torch.testing.assert_close(model(ids).logits, softmax, rtol=1e-4, atol=1e-4)
    with lola_attention(model, LolaConfig(window_size=4, sparse_cache_size=2)):
        assert not torch.allclose(model(ids).logits, softmax, atol=1e-2)
    torch.testing.assert_close(model(ids).logits, softmax)


def test_refusals(base: Path, text: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "lola"

    def refused(match: str, error: type[Exception] = CheckpointError, **keys: object) -> None:
        arguments = {"base": base, "data": [str(text)], "out": out, "options": OPTIONS, **keys}
        with pytest.raises(error, match=match):
            distill(**arguments)
        assert not out.exists()

    refused("no such directory", base=tmp_path / "nowhere")
    refused("windw", LolaConfigError, options=DistillOptions(lola_config={"windw": 3}))
    refused("state_heads = 'both'", options=DistillOptions(state_heads="both"))
    other = write_base(tmp_path / "gpt", "gpt2", n_positions=64)
    refused("model_type 'gpt2' is not supported", base=other)
    sliding = write_base(tmp_path / "mistral", "mistral", sliding_window=16)
    refused("sliding_window = 16", base=sliding)
    work = trained.with_name("lola.training")
    refused("holds an earlier run", work=work)
    refused(
        "another model, data or options", work=work, resume=True,
        options=DistillOptions(
            lola_config=LOLA, rows=4, row_length=64, dtype="float32", retrieval_fraction=0.0
        ),
    )  # fmt: skip
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "maps.safetensors").write_bytes((work / "maps.safetensors").read_bytes()[:900])
    refused("damaged", work=damaged, resume=True)
