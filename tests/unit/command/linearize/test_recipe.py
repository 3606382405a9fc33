"""Hyperparameters follow from the base and the budget, and a plan from them."""

import dataclasses
import json
from pathlib import Path

import pytest

from lola_vllm.command.linearize import plan
from lola_vllm.command.linearize.plan import Speed
from lola_vllm.command.linearize.recipe import (
    check,
    derive,
    from_json,
    pairs_in,
    state_bytes,
    with_sizes,
)
from lola_vllm.models.files import CheckpointError

SMOLLM2 = dict(
    model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, vocab_size=49152,
    tie_word_embeddings=True,
)  # fmt: skip
QWEN = dict(
    model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
    vocab_size=151936, tie_word_embeddings=False, use_sliding_window=False,
)  # fmt: skip
TEXTS = 45_000_000


def write(folder: Path, fields: dict[str, object], **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return folder


@pytest.fixture
def smollm2(tmp_path):
    return write(tmp_path / "smollm2", SMOLLM2)


def test_the_demo_model_has_what_it_was_trained_with(smollm2):
    """Where its card and the recipe differ, docs/linearize.md says so."""
    made = derive(smollm2, text_bytes=TEXTS)
    train, on = made.train, made.train_on
    assert (made.calibrate.pairs, made.calibrate.recent) == (49, 378)
    assert (train.rows, train.row_length) == (48, 8192)
    assert train.train_windows == (64, 128) and train.train_sparse_caches == (0, 128, 512)
    assert train.lora_lengths() == [(1024, 128), (2048, 64), (4096, 32)]
    assert (on.lora_rows, on.lora_row_length, on.loss_tokens) == (110, 2048, 384)
    assert (train.lora_kept, on.lora_kept) == (1, 0.5)
    # The state of what `make serve` serves, and the memory that gives the same.
    assert state_bytes(smollm2, on.lola_config, 427) / 2**20 == pytest.approx(9.99, abs=0.01)
    same = derive(smollm2, text_bytes=TEXTS, memory_mib=10.0)
    assert same.calibrate == made.calibrate


@pytest.mark.parametrize("mib", [5.0, 9.6, 20.0])
def test_memory_is_used_up_and_no_more(tmp_path, mib):
    base = write(tmp_path / "qwen", QWEN)
    served = derive(base, text_bytes=TEXTS).train_on.lola_config
    pairs = pairs_in(base, served, mib)
    assert state_bytes(base, served, pairs) <= mib * 2**20 < state_bytes(base, served, pairs + 1)
    made = derive(base, text_bytes=TEXTS, memory_mib=mib)
    assert made.pairs == pairs
    assert made.calibrate.pairs / pairs == pytest.approx(49 / 427, abs=0.01)
    train = made.train
    rows = train.lora_row_length, train.lora_last_row_length, made.train_on.lora_row_length
    assert rows == (1024, 4096, 2048)  # more memory needs no longer rows


@pytest.mark.parametrize("length", [256, 512, 1000, 2048, 131072])
@pytest.mark.parametrize("scale", [0.02, 1.0, 10.0])
def test_every_stage_folds_something(tmp_path, length, scale):
    """Of any base and budget: the check of training itself finds rows long enough."""
    from lola_vllm.training.distill.transfer import check_row_length

    base = write(tmp_path / "base", SMOLLM2, max_position_embeddings=length)
    made = derive(base, text_bytes=TEXTS, scale=scale)
    train = made.train
    check_row_length("row_length", train.row_length, train.configs())
    for tokens, rows in train.lora_lengths():
        check_row_length("lora_row_length", tokens, train.configs())
        assert rows >= 1 and tokens <= length
    on = with_sizes(made.train_on, made.calibrate.least)
    check_row_length("lora_row_length", on.lora_row_length, on.configs(), every_head=False)
    assert train.row_length <= length
    assert train.rows >= 1 and (made.calibrate.recent >= 1) == (length > 750)
    check(made)


def test_text_and_hours_bound_the_tokens(smollm2):
    little = derive(smollm2, text_bytes=400_000)
    assert 90_000 < plan.stage_tokens(little)["transfer"] <= 100_000
    half = derive(smollm2, text_bytes=TEXTS, scale=0.5)
    assert half.train.lora_tokens == 393_216 // 2
    speed = Speed(forward=1e-3, transfer=2e-2, lora=3e-2, on=3e-2)

    def seconds_of(scale: float) -> float:
        made = derive(smollm2, text_bytes=TEXTS, scale=scale)
        return sum(plan.stage_seconds(made, speed).values())

    for hours in (2.0, 12.0):
        scale = plan.scale_to(hours, seconds_of)
        assert seconds_of(scale) / 3600 == pytest.approx(hours, rel=0.03)
    with pytest.raises(CheckpointError, match=r"--hours 0.1: .* takes 0\.\d+ on this machine"):
        plan.scale_to(0.1, seconds_of)
    # More hours than the texts have tokens for.
    made = derive(smollm2, text_bytes=400_000, scale=plan.scale_to(1e6, seconds_of))
    assert made.train.lora_tokens == pytest.approx(100_000, rel=0.01)


def test_an_expert_overrides(smollm2):
    """Later stages take what they share with an earlier one from there."""
    made = derive(smollm2, text_bytes=TEXTS)
    train = {"lora_rank": 32, "train_windows": [64], "lola_config": {"sink_size": 2}}
    overrides = {"train": train, "train_on": {"answer_weight": 2}}
    changed = derive(smollm2, text_bytes=TEXTS, overrides=overrides)
    lola = {"window_size": 64, "sink_size": 2}
    assert changed.train == dataclasses.replace(
        made.train, lora_rank=32, train_windows=(64,), lola_config=lola
    )
    lola = {**made.train_on.lola_config, "sink_size": 2}
    assert changed.train_on == dataclasses.replace(
        made.train_on, lora_rank=32, answer_weight=2.0, lola_config=lola
    )
    assert changed.calibrate == made.calibrate
    assert from_json(json.loads(json.dumps(dataclasses.asdict(changed)))) == changed


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"lora_rank": 32}, "unknown key 'lora_rank'; did you mean 'train.lora_rank'"),
        ({"train": {"lora_ranks": 32}}, "unknown key 'train.lora_ranks'; .*'train.lora_rank'"),
        ({"train": {"lora_rank": "32"}}, "train.lora_rank = '32'"),
        ({"train": {"train_windows": 64}}, "train.train_windows = 64"),
        ({"train": {"lola_config": {"sparse_cache_size": 8}}}, "'train.lola_config.sparse_cache"),
        ({"train_on": {"lora_rank": 8}}, "train_on.lora_rank = 8: must be that of train, 16"),
    ],
)
def test_overrides_that_are_none(smollm2, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        check(derive(smollm2, text_bytes=TEXTS, overrides=overrides))


def test_bases_that_are_too_small(tmp_path, smollm2):
    with pytest.raises(CheckpointError, match=r"--memory 1: .* alone take [\d.]+ MiB"):
        derive(smollm2, text_bytes=TEXTS, memory_mib=1)
    short = write(tmp_path / "short", SMOLLM2, max_position_embeddings=128)
    with pytest.raises(CheckpointError, match="max_position_embeddings = 128"):
        derive(short, text_bytes=TEXTS)
