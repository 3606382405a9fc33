"""Hyperparameters follow from the base and the budget, and a plan from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lola_vllm.command.linearize import plan
from lola_vllm.command.linearize.plan import Speed
from lola_vllm.command.linearize.recipe import (
    Recipe,
    derive,
    from_json,
    pairs_in,
    state_bytes,
    to_json,
    with_overrides,
)
from lola_vllm.command.linearize.stages import (
    growing_rows,
    lora_options,
    on_options,
    transfer_options,
)
from lola_vllm.models.base import parse_config, read_base_config
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
def smollm2(tmp_path: Path) -> Path:
    return write(tmp_path / "smollm2", SMOLLM2)


def test_the_demo_model_has_what_it_was_trained_with(smollm2: Path) -> None:
    """Where its card and the recipe differ, docs/linearize.md says so."""
    made = derive(smollm2, text_bytes=TEXTS)
    assert (made.scored_pairs, made.recent_pairs) == (49, 378)
    stage_1 = transfer_options(made)
    assert (stage_1.rows, stage_1.row_length) == (48, 8192)
    assert made.train_windows == (64, 128) and made.train_sparse_caches == (0, 128, 512)
    stage_2 = lora_options(made)
    assert stage_2.lora_lengths() == [(1024, 128), (2048, 64), (4096, 32)]
    on = on_options(made)
    assert (on.lora_rows, on.lora_row_length, on.loss_tokens) == (110, 2048, 384)
    assert (stage_2.lora_kept, on.lora_kept) == (1, 0.5)
    # The state of what `make serve` serves, and the memory that gives the same.
    assert state_bytes(smollm2, made.served(), 427) / 2**20 == pytest.approx(9.99, abs=0.01)
    same = derive(smollm2, text_bytes=TEXTS, memory_mib=10.0)
    assert (same.scored_pairs, same.recent_pairs) == (49, 378)


@pytest.mark.parametrize("mib", [5.0, 9.6, 20.0])
def test_memory_is_used_up_and_no_more(tmp_path: Path, mib: float) -> None:
    base = write(tmp_path / "qwen", QWEN)
    served = derive(base, text_bytes=TEXTS).served()
    pairs = pairs_in(base, served, mib)
    assert state_bytes(base, served, pairs) <= mib * 2**20 < state_bytes(base, served, pairs + 1)
    made = derive(base, text_bytes=TEXTS, memory_mib=mib)
    assert made.pairs == pairs
    assert made.scored_pairs / pairs == pytest.approx(49 / 427, abs=0.01)
    rows = made.lora_row_length, made.lora_last_row_length, made.on_row_length
    assert rows == (1024, 4096, 2048)  # more memory needs no longer rows


def test_rows_of_a_long_base_are_fewer_and_longer(tmp_path: Path) -> None:
    made = derive(write(tmp_path / "qwen", QWEN), text_bytes=TEXTS)
    assert (transfer_options(made).rows, made.transfer_row_length) == (12, 32768)
    assert made.transfer_row_length * 12 <= made.transfer_tokens
    assert max(made.evaluation_lengths) == 4096


@pytest.mark.parametrize("length", [256, 512, 1000, 2048, 131072])
@pytest.mark.parametrize("scale", [0.02, 1.0, 10.0])
def test_every_stage_folds_something(tmp_path: Path, length: int, scale: float) -> None:
    """Of any base and budget: the check of training itself finds rows long enough."""
    from lola_vllm.training.distill.transfer import check_row_length

    base = write(tmp_path / "base", SMOLLM2, max_position_embeddings=length)
    made = derive(base, text_bytes=TEXTS, scale=scale)
    stage = lora_options(made)
    check_row_length("row_length", stage.row_length, stage.configs())
    for tokens, rows in stage.lora_lengths():
        check_row_length("lora_row_length", tokens, stage.configs())
        assert rows >= 1 and tokens <= length
    least = on_options(made, {"sparse_cache_size": made.calibration_least})
    check_row_length("lora_row_length", least.lora_row_length, least.configs(), every_head=False)
    assert made.transfer_row_length <= length and max(made.evaluation_lengths) <= length
    assert stage.rows >= 1 and (made.recent_pairs >= 1) == (length > 750)


def test_text_and_hours_bound_the_tokens(smollm2: Path) -> None:
    little = derive(smollm2, text_bytes=400_000)
    assert little.transfer_tokens == 100_000
    half = derive(smollm2, text_bytes=TEXTS, scale=0.5)
    assert half.lora_tokens == 393_216 // 2
    speed = Speed(forward=1e-3, transfer=2e-2, lora=3e-2, on=3e-2)

    def seconds_of(scale: float) -> float:
        made = derive(smollm2, text_bytes=TEXTS, scale=scale)
        return sum(plan.stage_seconds(made, speed, 8).values())

    for hours in (2.0, 12.0):
        scale = plan.scale_to(hours, seconds_of)
        assert seconds_of(scale) / 3600 == pytest.approx(hours, rel=0.02)
    with pytest.raises(CheckpointError, match=r"--hours 0.1: .* takes 0\.\d+ on this machine"):
        plan.scale_to(0.1, seconds_of)
    # More hours than the texts have tokens for.
    made = derive(smollm2, text_bytes=400_000, scale=plan.scale_to(1e6, seconds_of))
    assert made.lora_tokens == 100_000


def test_little_time_also_takes_fewer_prompts_and_questions(tmp_path: Path) -> None:
    base = write(tmp_path / "qwen", QWEN)
    whole, less, more = (derive(base, text_bytes=TEXTS, scale=scale) for scale in (1, 0.3, 5))
    for made, numbers in ((whole, (56, 10, 4)), (less, (24, 4, 2)), (more, (56, 10, 4))):
        assert numbers == (
            made.calibration_prompts, made.evaluation_samples, made.evaluation_windows,
        )  # fmt: skip
    # Rows stay long where there are enough of them.
    assert (transfer_options(less).rows, less.transfer_row_length) == (7, 16384)


def test_rows_that_grow_have_the_tokens_asked_for() -> None:
    rows = growing_rows(393_216, 1024, 4096)
    assert rows == 224
    options = dataclasses.replace(
        lora_options_of(), lora_rows=rows, lora_row_length=1024, lora_last_row_length=4096
    )
    assert sum(n * length for length, n in options.lora_lengths()) == 393_216
    assert growing_rows(10, 1024, 4096) == 7


def lora_options_of():
    from lola_vllm.training.distill.options import DistillOptions

    return DistillOptions()


def test_an_expert_overrides(smollm2: Path) -> None:
    made = derive(smollm2, text_bytes=TEXTS)
    changed = with_overrides(made, {"lora_rank": 32, "train_windows": [64], "answer_weight": 2})
    assert changed == dataclasses.replace(
        made, lora_rank=32, train_windows=(64,), answer_weight=2.0
    )
    assert from_json(json.loads(json.dumps(to_json(changed)))) == changed


def test_a_recipe_of_another_version(smollm2: Path) -> None:
    values = to_json(derive(smollm2, text_bytes=TEXTS))
    before = {**values, "lora_warm_up": 0.1}
    del before["on_lora_kept"]
    with pytest.raises(CheckpointError, match=r"another version.* lora_warm_up, on_lora_kept; go"):
        from_json(before)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"lora_ranks": 32}, "unknown key 'lora_ranks'; did you mean 'lora_rank'"),
        ({"lora_rank": "32"}, "lora_rank = '32'"),
        ({"lora_rank": 2.5}, "lora_rank = 2.5"),
        ({"lora_rank": -1}, "lora_rank = -1"),
        ({"train_windows": 64}, "train_windows = 64"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing = 1"),
    ],
)
def test_overrides_that_are_none(smollm2: Path, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        with_overrides(derive(smollm2, text_bytes=TEXTS), overrides)


def test_bases_that_are_too_small(tmp_path: Path, smollm2: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--memory 1: .* alone take [\d.]+ MiB"):
        derive(smollm2, text_bytes=TEXTS, memory_mib=1)
    short = write(tmp_path / "short", SMOLLM2, max_position_embeddings=128)
    with pytest.raises(CheckpointError, match="max_position_embeddings = 128"):
        derive(short, text_bytes=TEXTS)


def test_little_memory_computes_activations_twice(smollm2: Path) -> None:
    assert not derive(smollm2, text_bytes=TEXTS, free_bytes=2**50).gradient_checkpointing
    tight = derive(smollm2, text_bytes=TEXTS, free_bytes=2**33)
    assert tight.gradient_checkpointing
    config = parse_config(smollm2, read_base_config(smollm2))
    roomy = dataclasses.replace(tight, gradient_checkpointing=False)
    assert plan.peak_bytes(config, tight) < plan.peak_bytes(config, roomy)


def test_every_field_has_a_rule() -> None:
    assert Recipe.__doc__
    for field in dataclasses.fields(Recipe):
        assert f"{field.name}" in Recipe.__doc__, field.name


def test_parameters_are_counted(smollm2: Path) -> None:
    config = parse_config(smollm2, read_base_config(smollm2))
    assert plan.parameters(config) == pytest.approx(134.5e6, rel=0.01)
