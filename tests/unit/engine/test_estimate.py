"""`lola-vllm estimate`: numbers of the page layout, by hand for Llama-3.1-8B, and bad configs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lola_vllm.core.lola_config import LolaConfigError
from lola_vllm.engine.estimate import estimate, format_table, parts_of
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


def write_lola(path: Path, heads: int, F: int, importance: bool = False, **lola: object) -> Path:
    """A LoLA model of which no more is there than its first layer's key maps."""
    write(path, model_type="lola_llama", lola_config=lola)
    attention = "model.layers.0.self_attn"
    tensors = {f"{attention}.feature_map_k": torch.zeros(heads, 128, F)}
    if importance:
        tensors[f"{attention}.importance"] = torch.zeros(8, 193)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("heads", "sharing", "parts", "total", "break_even", "published"),
    [
        (32, "none", (32 * 512 * 2 * 256, 32 * 128 * 128 * 4, 32 * 512 * 4), 338.5, 2708, 330),
        (32, "kv_head", (8 * 512 * 2 * 256, 32 * 128 * 128 * 4, 8 * 512 * 4), 145, 1160, 137),
        (8, "none", (8 * 512 * 2 * 256, 8 * 128 * 128 * 4, 8 * 512 * 4), 96.625, 773, 89),
    ],
)
def test_llama_8b_by_hand(tmp_path, heads, sharing, parts, total, break_even, published):
    """eta 64, lam 512, F 64: K and V rows of 128 x 2 bytes, H of 128 x 128 x 4 bytes a head."""
    model = write_lola(tmp_path, heads, 64, sparse_cache_size=512, sparse_sharing=sharing)
    result = estimate(model)
    window = 32 * 8 * 128 * 2 * 256 / MIB  # 64 pairs stay, and up to 64 more arrive
    assert window == 16
    pairs, H, positions = (32 * size / MIB for size in parts)
    expected = {
        "window": window,
        "sparse K/V": pairs,
        "H": H,
        "s": 32 * heads * 128 * 4 / MIB,
        "positions": positions,
    }
    found = parts_of(result.sequence)
    assert {n: size / MIB for n, size in found.items() if size} == expected
    assert result.bytes_per_sequence / MIB == sum(expected.values()) == total
    # These count the 64 pairs that stay, and no positions.
    assert total - window / 2 - positions == pytest.approx(published, abs=1.6)
    assert [result.full_kv_bytes(n) / MIB for n in (4096, 131072)] == [512, 16384]
    # a token takes 128 KiB: 338.5 MiB / 128 KiB = 2708
    assert result.sequence.break_even_tokens() == break_even


def test_windows_of_sliding_layers_are_in_both_caches(tmp_path):
    """Gemma 3 270M: 15 layers of windows of 512 tokens, and 3 that grow by 1 KiB a token each."""
    config = write(
        tmp_path,
        **{"model_type": "gemma3_text", "num_hidden_layers": 18, "hidden_size": 640},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
        **{"sliding_window": 512, "sliding_window_pattern": 6},
    )
    result = estimate(config, {"sparse_cache_size": 100, "sink_size": 4})
    windows = 15 * 512 * 1024
    assert result.sequence.full_kv_bytes_per_token == 3 * 1024
    assert result.full_kv_bytes(4096) == windows + 4096 * 3 * 1024
    growing = result.bytes_per_sequence - windows
    assert result.sequence.break_even_tokens() == -(-growing // (3 * 1024))
    parts = parts_of(result.sequence)
    assert parts["sinks"] == 3 * 4 * 1024
    assert parts["window"] == windows + 3 * 128 * 1024


def test_state_heads_come_from_the_tensors_of_a_lola_model(tmp_path):
    write_lola(tmp_path, 16, 64)
    for path in (tmp_path, tmp_path / "config.json"):
        layout = estimate(path).sequence.page
        assert (layout.num_state_heads, layout.feature_dim) == (16, 64)
        assert not layout.has_score_weights
    assert estimate(write_lola(tmp_path, 16, 64, True)).sequence.page.has_score_weights


def test_a_base_is_shown_as_init_would_make_it(tmp_path):
    result = estimate(write(tmp_path))
    assert result.sequence.page.num_state_heads == 8
    assert result.config.facts.feature_dim == 128  # the head size
    # window 16, cache 64/4, H 8 x 256 x 128 x 4, s 8 x 256 x 4, positions 8 x 128 x 4, and as many
    # score weights, 32 layers
    by_hand = 16 + 16 + 32 + 0.25 + 0.125 + 0.125
    assert result.bytes_per_sequence / MIB == by_hand


def test_stock_sequences_in_the_same_memory(tmp_path):
    """24 GiB hold 12,288 blocks of 16 tokens, one of them vLLM's null block."""
    result = estimate(write(tmp_path), {"sparse_cache_size": 512})
    fits = {4096: 47, 8192: 23, 32768: 5, 100_000: 1, 131072: 1}
    assert {n: result.stock_sequences(24 * 2**30, n) for n in fits} == fits
    table = {
        name.strip(): number
        for line in format_table(result, 24).splitlines()
        for name, _, number in [line.strip().rpartition("  ")]
    }
    assert table["total"] == "113.25" and table["break-even, tokens"] == "906"
    assert table["sequences in 24 GiB"] == "216" and table["of stock vLLM at 4K"] == "47"
    assert "sequences in" not in format_table(result)


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
def test_bad_configs(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises((CheckpointError, LolaConfigError), match=rf"(?s){message}"):
        estimate(path)


@pytest.mark.parametrize(
    ("state_heads", "sharing", "options", "message"),
    [
        (16, "none", {"tensor_parallel_size": 3}, "tensor_parallel_size = 3.*use a divisor of 8"),
        (16, "none", {"overrides": {"window_size": 0}}, "window_size = 0"),
        (32, "kv_head", {"tensor_parallel_size": 16}, "'kv_head': .*16 tensor-parallel ranks"),
        (16, "none", {"tensor_parallel_size": 32}, "32 query, 8 KV and 16 state heads"),
    ],
)
def test_bad_options(tmp_path, state_heads, sharing, options, message):
    model = write_lola(tmp_path, state_heads, 64, sparse_sharing=sharing)
    with pytest.raises((CheckpointError, LolaConfigError), match=message):
        estimate(model, **options)
