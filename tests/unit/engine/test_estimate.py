"""`lola-vllm estimate`: numbers of the page layout, by hand for Llama-3.1-8B, and bad configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lola_vllm.core.config import LolaConfigError
from lola_vllm.engine.estimate import Estimate, Row, estimate, format_table
from lola_vllm.models import CheckpointError

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MIB = 2**20


def write(path: Path, **changes: object) -> Path:
    """A `config.json` and nothing else; None takes a key away."""
    config = {k: v for k, v in {**LLAMA_8B, **changes}.items() if v is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path / "config.json"


def chosen(result: Estimate) -> Row:
    (row,) = [row for row in result.rows if row.chosen]
    return row


def test_llama_8b_by_hand(tmp_path: Path) -> None:
    """eta 64, lam 512, F 64: K and V rows of 128 x 2 bytes, H of 128 x 128 x 4 bytes a head."""
    lola = {"sparse_cache_size": 512, "context_shift": 0}
    result = estimate(write(tmp_path), lola, state_heads="query", feature_dim=64)
    window = 32 * 8 * 128 * 2 * 256 / MIB  # 64 pairs stay, and up to 64 more arrive
    assert window == 16
    by_hand = {
        "32 state heads, one per query head": {
            "sparse K/V": 32 * 32 * 512 * 2 * 256 / MIB,
            "H": 32 * 32 * 128 * 128 * 4 / MIB,
            "s": 32 * 32 * 128 * 4 / MIB,
            "positions": 32 * 32 * 512 * 4 / MIB,
        },
        "32 state heads, one per query head, with one sparse cache per KV head": {
            "sparse K/V": 32 * 8 * 512 * 2 * 256 / MIB,
            "H": 32 * 32 * 128 * 128 * 4 / MIB,
            "s": 32 * 32 * 128 * 4 / MIB,
            "positions": 32 * 8 * 512 * 4 / MIB,
        },
        "8 state heads, one per KV head": {
            "sparse K/V": 32 * 8 * 512 * 2 * 256 / MIB,
            "H": 32 * 8 * 128 * 128 * 4 / MIB,
            "s": 32 * 8 * 128 * 4 / MIB,
            "positions": 32 * 8 * 512 * 4 / MIB,
        },
    }
    assert [row.name for row in result.rows] == list(by_hand)
    published = [330, 137, 89]  # these count the 64 pairs that stay, and no positions
    for row, mib in zip(result.rows, published, strict=True):
        expected = {"window": window, **by_hand[row.name]}
        assert {n: size / MIB for n, size in row.parts.items() if size} == expected
        assert row.bytes_per_sequence / MIB == sum(expected.values())
        counted = row.bytes_per_sequence / MIB - window / 2 - expected["positions"]
        assert counted == pytest.approx(mib, abs=1.6)
    totals = [row.bytes_per_sequence / MIB for row in result.rows]
    assert totals == [338.5, 145, 96.625]
    assert result.full_kv_bytes == {4096: 512 * MIB, 32768: 4096 * MIB, 131072: 16384 * MIB}
    # a token takes 128 KiB: 338.5 MiB / 128 KiB = 2708
    assert [row.sequence.break_even_tokens() for row in result.rows] == [2708, 1160, 773]
    assert chosen(result).name == "32 state heads, one per query head"


def test_windows_of_sliding_layers_are_in_both_caches(tmp_path: Path) -> None:
    """Gemma 3 270M: 15 layers of windows of 512 tokens, and 3 that grow by 1 KiB a token each."""
    config = write(
        tmp_path,
        **{"model_type": "gemma3_text", "num_hidden_layers": 18, "hidden_size": 640},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
        **{"sliding_window": 512, "sliding_window_pattern": 6},
    )
    result = estimate(config, {"sparse_cache_size": 100, "sink_size": 4})
    row = chosen(result)
    windows = 15 * 512 * 1024
    assert row.full_kv_bytes_per_token == 3 * 1024
    assert result.full_kv_bytes[4096] == windows + 4096 * 3 * 1024
    growing = row.bytes_per_sequence - windows
    assert row.sequence.break_even_tokens() == -(-growing // (3 * 1024))
    assert row.parts["sinks"] == 3 * 4 * 1024
    assert row.parts["window"] == windows + 3 * 128 * 1024


def test_state_heads_come_from_the_tensors_of_a_lola_model(tmp_path: Path) -> None:
    write(tmp_path, model_type="lola_llama", lola_config={})
    maps = {"model.layers.0.self_attn.feature_map_k": torch.zeros(16, 128, 64)}
    save_file(maps, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "config.json"):
        result = estimate(path)
        assert chosen(result).name == "16 state heads" and len(result.rows) == 4
        layout = chosen(result).layout
        assert (layout.num_state_heads, layout.feature_dim) == (16, 64)
        assert not layout.has_score_weights
    maps |= {"model.layers.0.self_attn.importance": torch.zeros(8, 193)}
    save_file(maps, tmp_path / "model.safetensors")
    assert chosen(estimate(tmp_path)).layout.has_score_weights


def test_a_base_is_shown_as_init_would_make_it(tmp_path: Path) -> None:
    result = estimate(write(tmp_path))
    assert chosen(result).name == "8 state heads, one per KV head"
    assert result.config.facts.feature_dim == 128  # the head size
    # window 16, cache 64/4, H 8 x 256 x 128 x 4, s 8 x 256 x 4, positions 8 x 128 x 4, and as many
    # score weights, 32 layers
    by_hand = 16 + 16 + 32 + 0.25 + 0.125 + 0.125
    assert chosen(result).bytes_per_sequence / MIB == by_hand
    table = format_table(result)
    assert "\n  C: 8 state heads, one per KV head (as init makes it)\n" in table
    assert "--state-heads query --feature-dim 64" in table
    lolcats = format_table(estimate(tmp_path, state_heads="query", feature_dim=64))
    assert "\n  A: 32 state heads, one per query head (these options)\n" in lolcats


@pytest.mark.parametrize(
    ("context", "fit"), [(None, {}), (100_000, {100_000: 1}), (8192, {8192: 23})]
)
def test_stock_sequences_in_the_same_memory(
    tmp_path: Path, context: int | None, fit: dict[int, int]
) -> None:
    """24 GiB hold 12,288 blocks of 16 tokens, one of them vLLM's null block."""
    result = estimate(write(tmp_path), memory_gib=24, context=context)
    assert result.stock_sequences == {4096: 47, 32768: 5, 131072: 1, **fit}
    assert list(result.full_kv_bytes) == sorted(result.stock_sequences)
    assert result.to_json()["stock_sequences"]["4096"] == 47
    assert "Sequences of stock vLLM in 24 GiB: 47 at 4K, " in format_table(result)
    if context == 100_000:
        assert ", 1 at 100,000, 1 at 128K." in format_table(result)
        assert "12,500 at 100,000" in format_table(result)
    without = estimate(write(tmp_path))
    assert without.stock_sequences is None and without.to_json()["stock_sequences"] is None


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": "bert"}, "a model of type 'bert' cannot be the base"),
        ({"hidden_size": None}, "hidden_size = null: must be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5"),
        ({"head_dim": 1.5}, "head_dim = 1.5"),
        ({"hidden_act": 7}, "config.json: hidden_act = 7: must be of type str$"),
        ({"lola_config": {"window_siz": 3}}, "window_siz.*'window_size'"),
        ({"lola_config": 3}, "lola_config = 3"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises((CheckpointError, LolaConfigError), match=rf"(?s){message}"):
        estimate(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype = 'int8': must be one of bfloat16, float16, float32"),
        ({"memory_gib": 0.0}, "memory_gib = 0"),
        ({"context": 0}, "context = 0: must be at least 1 token"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size = 3.*use a divisor of 8"),
        ({"overrides": {"window_size": 0}}, "window_size = 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises((CheckpointError, LolaConfigError), match=message):
        estimate(write(tmp_path), **options)  # type: ignore[arg-type]


def test_state_heads_that_ranks_cannot_share(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 2}
    path = write(tmp_path, **sizes)
    assert estimate(path, tensor_parallel_size=4).rows[0].layout.num_state_heads == 3
    shared = {"sparse_sharing": "kv_head"}
    with pytest.raises(LolaConfigError, match=r"'kv_head': .*4 tensor-parallel ranks"):
        estimate(path, shared, state_heads="query", tensor_parallel_size=4)
    with pytest.raises(CheckpointError, match="12 query, 2 KV and 12 state heads"):
        estimate(path, state_heads="query", tensor_parallel_size=8)


# ---- the command
