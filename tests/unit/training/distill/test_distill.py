"""Distillation on a tiny random Llama: it learns, resumes to the same bits, and refuses clearly."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lola_vllm.core.config import TensorFacts
from lola_vllm.core.lola_config import LolaConfig, LolaConfigError, importance_size
from lola_vllm.core.state import StateLayout
from lola_vllm.models.calibration import importance_tensors, save_calibration
from lola_vllm.models.files import CheckpointError
from lola_vllm.training.distill.options import DistillOptions
from lola_vllm.training.distill.run import distill
from lola_vllm.training.distill.student import (
    attach_maps,
    load_base,
    load_importance,
    load_maps,
    lola_attention,
)
from lola_vllm.training.distill.transfer import check_row_length

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
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = ["river", "stone", "and", "the", "blue", "seven", "runs", "over", "night", "it"]
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words[i] for i in picks))
    return path


@pytest.fixture(scope="module")
def trained(base, text, tmp_path_factory) -> Path:
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


def test_it_learns(trained, base, text):
    work = trained.with_name("lola.training")
    losses = json.loads((work / "distill.json").read_text())["losses"]
    assert [len(curve) for curve in losses["transfer"]] == [96, 96]
    assert len(losses["finetune"]) == 4

    model = load_base(base, torch.float32)
    attach_maps(model, 2)
    before = divergence(model, text)
    load_maps(model, load_file(work / "maps.safetensors"))
    assert divergence(model, text) < 0.8 * before


@pytest.mark.parametrize("rate", [0.0, 5.0])
def test_window_factors_have_steps_of_their_own(rate, base, text, tmp_path):
    """They begin with logit 0. Adam's first step is the learning rate, whatever the gradient."""
    once = dict(rows=1, steps_per_row=1, lora_rows=0, learning_rate=1e-3)
    options = dataclasses.replace(OPTIONS, window_factor_rate=rate, **once)
    distill(base, [str(text)], tmp_path / "lola", options)
    maps = load_file(tmp_path / "lola.training" / "maps.safetensors")
    for layer in range(2):
        factors = maps[f"model.layers.{layer}.self_attn.window_factors"]
        torch.testing.assert_close(factors.abs(), torch.full((4,), 1e-3 * rate))
        moved = maps[f"model.layers.{layer}.self_attn.feature_map_q"] - torch.eye(6)
        assert 0 < moved.abs().max() < 2e-3


def test_the_checkpoint_holds_what_was_trained(trained, base):
    config = json.loads((trained / "config.json").read_text())
    expected = {**LOLA, "mixing": "lola"}
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


def test_a_run_that_was_cut_off_ends_with_the_same_bits(trained, base, text, tmp_path, monkeypatch):
    from lola_vllm.training.distill import finetune, transfer

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
    monkeypatch.setattr(finetune, "SAVE_EVERY", 2)
    with pytest.raises(CutError):
        distill(base, [str(text)], out, OPTIONS, resume=True)
    monkeypatch.undo()
    distill(base, [str(text)], out, OPTIONS, resume=True)
    whole, resumed = (load_file(path / "model.safetensors") for path in (trained, out))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


SIZES = [[4, 90], [2, 4]]
RECENT = [[1, 0], [0, 3]]
GO_ON = dataclasses.replace(
    OPTIONS,
    lola_config={"window_size": 8, "sink_size": 2, "sparse_dtype": "int8"},
    train_sparse_caches=(),
    loss_tokens=20,
)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(5)
    size = importance_size(6)
    importance = {i: torch.randn(2, size, generator=generator) for i in range(len(SIZES))}
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    sizes = {"sparse_cache_size": SIZES, "recent_size": RECENT}
    save_calibration(path, sizes, importance_tensors(importance))
    return path


def test_going_on_with_the_sizes_and_the_importance_of_a_calibration(
    trained, base, text, calibration, tmp_path
):
    """The second head of the first layer folds nothing of a row."""
    from transformers import AutoModelForCausalLM

    import lola_vllm.engine.hf  # noqa: F401  # registers the model

    work, out = trained.with_name("lola.training"), tmp_path / "lola"
    config = distill(base, [str(text)], out, GO_ON, start=work, calibration=calibration)
    lola = LolaConfig(**config.lola_config)
    assert lola.sparse_cache_size == tuple(map(tuple, SIZES))
    assert lola.recent_size == tuple(map(tuple, RECENT))
    assert config.facts == TensorFacts(6, 2, importance=True)
    importance = load_file(calibration)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], weights) for name, weights in importance.items())

    before, after = (load_file(w / "lora.safetensors") for w in (work, tmp_path / "lola.training"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2

    student = load_base(base, torch.float32)
    attach_maps(student, 2)
    for name, value in student.named_parameters():
        value.data.copy_(written[name])
    load_importance(student, importance)
    served = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(60)[None] * 7 % 250
    with torch.no_grad(), lola_attention(student, lola):
        torch.testing.assert_close(student(ids).logits, served(ids).logits, rtol=1e-3, atol=1e-3)
        load_importance(student, {name: 0 * weights for name, weights in importance.items()})
        assert not torch.allclose(student(ids).logits, served(ids).logits, atol=1e-2)


def test_a_share_of_what_the_adapters_add_is_kept(trained, base, text, calibration, tmp_path):
    work, found = trained.with_name("lola.training"), {}
    for kept in (1.0, 0.25):
        out = tmp_path / f"lola-{kept:g}"
        once = dataclasses.replace(GO_ON, lora_kept=kept, lora_rows=GO_ON.rows_per_step)
        distill(base, [str(text)], out, once, start=work, calibration=calibration)
        found[kept] = load_file(out.with_name(f"{out.name}.training") / "lora.safetensors")
    for name, whole in found[1.0].items():
        share = 0.25 if ".lora_B." in name else 1.0  # exact in bfloat16
        assert torch.equal(found[0.25][name], whole * share), name


def test_answers_and_so_many_other_tokens_are_compared():
    from lola_vllm.training.distill.finetune import _compared

    answers = torch.zeros(50, dtype=torch.bool)
    answers[[0, 7, 8, 49]] = True
    every = _compared(answers, 0, torch.Generator())
    assert every.tolist() == list(range(49))
    drawn = _compared(answers, 10, torch.Generator().manual_seed(0)).tolist()
    assert {6, 7, 48} <= set(drawn) and 10 <= len(drawn) <= 13
    assert drawn != _compared(answers, 10, torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    ("lola", "least"),
    [
        ({"window_size": 64, "sparse_cache_size": 128}, 257),
        ({"window_size": 8, "sparse_cache_size": 4, "sink_size": 2}, 17),
        ({"window_size": 8, "sparse_cache_size": 4, "sink_size": 2, "update_interval": 1}, 16),
        ({"window_size": 8, "sparse_cache_size": 0, "update_interval": 3}, 10),
    ],
)
def test_the_least_row_that_folds(lola, least):
    """By the layout's own count of folded pairs, as the row's last query sees it."""
    config = LolaConfig(**lola)
    layout = StateLayout.from_config(config, 1, 1, 6, 6, torch.float32)
    C = config.update_interval
    seen = torch.arange(least + 1) // C * C  # tokens at the last update before a position
    folded = layout.num_folded(seen)
    assert folded[least - 1] > 0 and folded[least - 2] == 0
    check_row_length("row_length", least, [config])
    easy = LolaConfig(window_size=1, sparse_cache_size=0)
    with pytest.raises(CheckpointError, match=rf"row_length = {least - 1}: .*at least {least} "):
        check_row_length("row_length", least - 1, [easy, config])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_with_a_long_window_every_family_answers_as_before(family, tmp_path):
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


@pytest.fixture
def refused(base, text, tmp_path) -> Callable[..., None]:
    def refused(match: str, **keys: object) -> None:
        out = Path(tempfile.mkdtemp(dir=tmp_path)) / "lola"
        arguments = {"base": base, "data": [str(text)], "out": out, "options": OPTIONS, **keys}
        with pytest.raises((CheckpointError, LolaConfigError), match=match):
            distill(**arguments)
        assert not out.exists()

    return refused


def test_refusals(refused, trained, tmp_path):
    refused("no such directory", base=tmp_path / "nowhere")
    refused("windw", options=DistillOptions(lola_config={"windw": 3}))
    refused("state_heads = 'both'", options=DistillOptions(state_heads="both"))
    refused("^row_length = 256: .*at least 257 tokens", options=DistillOptions(row_length=256))
    refused(
        "^lora_row_length = 512: .*sparse cache 512 .*at least 641 ",
        options=DistillOptions(lora_row_length=512, train_sparse_caches=(0, 512)),
    )
    other = write_base(tmp_path / "gpt", "gpt2", n_positions=64)
    refused("a model of type 'gpt2' cannot be the base", base=other)
    sliding = write_base(tmp_path / "mistral", "mistral", sliding_window=16)
    refused("sliding_window = 16", base=sliding)
    work, fewer = trained.with_name("lola.training"), dataclasses.replace(OPTIONS, rows=4)
    refused("holds an earlier run", work=work)
    refused("another model, data or options", work=work, resume=True, options=fewer)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "maps.safetensors").write_bytes((work / "maps.safetensors").read_bytes()[:900])
    refused("damaged", work=damaged, resume=True)


def test_refusals_of_going_on(refused, trained, calibration, tmp_path):
    work = trained.with_name("lola.training")

    def not_gone_on(match: str, start: Path | None = work, **changes: Any) -> None:
        options = dataclasses.replace(GO_ON, **changes)
        refused(match, options=options, start=start, calibration=calibration)

    not_gone_on("maps.safetensors: no such file", start=tmp_path)
    not_gone_on("lora_A.* is .*and must be .*lora_rank", lora_rank=3)
    not_gone_on("lora_kept = 1.5: must be from 0 to 1", lora_kept=1.5)
    not_gone_on("feature_map_k.* must be .*state_heads", state_heads="query")
    not_gone_on("leave out sparse_cache_size", lola_config=LOLA)
    not_gone_on("leave out sparse_cache_size", train_sparse_caches=(0, 4))
    not_gone_on("lora_rows = 0", lora_rows=0)
    not_gone_on("lora_row_length = 12: .*sparse cache 2 and", lora_row_length=12)
    not_gone_on("row_length = 96: .*sparse cache 90 and", start=None)
    deeper = write_base(tmp_path / "deeper", num_hidden_layers=3)
    refused(
        "2 values for 3 layers", base=deeper, options=GO_ON, start=work, calibration=calibration
    )
