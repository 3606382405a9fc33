"""What a LoLA model's sequences cost in memory, from its `config.json` alone.

Needs no GPU, no weights and no vLLM. Bytes come from `StateLayout`, which the server allocates by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lola_vllm.core.cli_options import sparse_cache
from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.layers import SequenceLayout, layer_layouts
from lola_vllm.core.lola_config import default_context_shift
from lola_vllm.core.model_types import LOLA_TYPES
from lola_vllm.core.ranks import check_ranks, heads_divide
from lola_vllm.models.base import config_of, lola_fields
from lola_vllm.models.families import check_base
from lola_vllm.models.files import CheckpointError, read_json
from lola_vllm.models.schema import settle_facts

CONTEXTS = (4096, 32768, 131072)
STOCK_BLOCK_TOKENS = 16  # vLLM's own default for a full KV cache
MIB, GIB = 2**20, 2**30

# Parts that the table shows in another way: keys and values as one sum, sinks and window, which
# share a part of the page, as two. Other parts keep their names.
_SPARSE = ("sparse_k", "sparse_v", "sparse_k_scale", "sparse_v_scale")
_EXACT = ("exact_k", "exact_v")
# Fields that a config must state, because Llama's defaults would silently replace them.
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def parts_of(sequence: SequenceLayout) -> dict[str, int]:
    """Bytes of each part of a state, all layers; they sum to `row_bytes`."""
    sizes, exact, sinks = Counter[str](), 0, 0
    for page in sequence.layouts:
        sizes.update(page.part_bytes)
        of_page = sum(page.part_bytes[name] for name in _EXACT)
        exact += of_page
        sinks += of_page * page.sink_size // (page.sink_size + page.ring_size)
    parts = {
        "window": exact - sinks,
        "sinks": sinks,
        "sparse K/V": sum(sizes[name] for name in _SPARSE),
    }
    parts |= {name: size for name, size in sizes.items() if name not in _SPARSE + _EXACT}
    parts["alignment"] = sequence.row_bytes - sizes.total()
    return parts


@dataclass(frozen=True)
class Estimate:
    """What a sequence costs.

    Attributes:
        config: the model's; of a base the one that `init` would write.
        sequence: the state of a rank that has all layers.
    """

    config: DecoderConfig
    sequence: SequenceLayout

    @property
    def bytes_per_sequence(self) -> int:
        """One state: a page in every layer."""
        return self.sequence.row_bytes

    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes of a full KV cache of one sequence of so many tokens on one rank."""
        return tokens * self.sequence.full_kv_bytes_per_token + self.sequence.sliding_bytes

    def sequences(self, memory: int, states: int = 1) -> int:
        """Sequences of `states` states in so many bytes; vLLM keeps one more as its null block."""
        return max(0, memory // self.bytes_per_sequence - 1) // states

    def stock_sequences(self, memory: int, tokens: int) -> int:
        """Sequences of so many tokens that stock vLLM holds in so many bytes.

        It allots blocks of 16 tokens, and keeps one as its null block.
        """
        blocks = memory // (STOCK_BLOCK_TOKENS * self.sequence.full_kv_bytes_per_token)
        return max(0, blocks - 1) // -(-tokens // STOCK_BLOCK_TOKENS)


def estimate(
    model: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    dtype: str = "bfloat16",
    tensor_parallel_size: int = 1,
) -> Estimate:
    """Work out what a sequence costs.

    Args:
        model: a `config.json` or the directory it is in, of a LoLA model or a base. Tensors beside
            the config say how many state heads there are; without them and for a base it is one
            per KV head, and F the head size, as `init` makes them.
        overrides: keys of `lola_config` that replace the config's.
        dtype: of keys and values: "bfloat16", "float16" or "float32".
        tensor_parallel_size: ranks that share the heads.

    Raises:
        CheckpointError: a config that is missing, of no base, or lacks its sizes, or ranks that
            cannot divide the heads.
        LolaConfigError: a `lola_config` or overrides that are not valid.
    """
    config, is_lola = _read_config(model / "config.json" if model.is_dir() else model)
    config.lola_config = dict(overrides or {})  # merges
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if is_lola:
        settle_facts(config, model if model.is_dir() else model.parent)
    else:  # as `init` makes it
        interval = default_context_shift(config.max_position_embeddings)
        config.lola_config = {"context_shift": interval, **config.lola_config}
    lola, ranks, state_heads = config.lola, tensor_parallel_size, config.facts.num_state_heads
    lola.check_heads(heads, kv_heads, state_heads)
    config.check_sizes()
    lola.check_context_shift(config.max_position_embeddings)
    if ranks < 1 or not heads_divide(ranks, heads, kv_heads, state_heads):
        raise CheckpointError(
            f"tensor_parallel_size = {ranks}: {heads} query, {kv_heads} KV and {state_heads} "
            f"state heads cannot be divided among so many ranks; use a divisor of {kv_heads}"
        )
    check_ranks(lola, ranks, kv_heads, state_heads)
    layers = layer_layouts(config, getattr(torch, dtype), ranks)
    return Estimate(config, SequenceLayout(layers))


def format_table(result: Estimate, memory_gib: float | None = None) -> str:
    """The text that `lola-vllm estimate` prints.

    Args:
        memory_gib: room for the states on a rank, in GiB.
    """
    config, sequence = result.config, result.sequence
    lola, facts = config.lola, config.facts
    lines = [
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query, "
        f"{config.num_key_value_heads} KV and {facts.num_state_heads} state heads of size "
        f"{config.head_dim}, F {facts.feature_dim}, K/V {sequence.page.kv_dtype}, hidden state "
        f"float32{_with_state(sequence)}",
        f"window {lola.window_size}, sparse cache {sparse_cache(lola)}, update interval "
        f"{lola.update_interval}, sinks {lola.sink_size}, {_contexts(config)}",
        "",
    ]
    rows = [("MiB per sequence, of each rank", "")]
    rows += [
        (f"  {name}", f"{size / MIB:.2f}") for name, size in parts_of(sequence).items() if size
    ]
    rows += [
        ("total", f"{result.bytes_per_sequence / MIB:.2f}"),
        ("break-even, tokens", f"{sequence.break_even_tokens():,}"),
        ("  with prefix caching", f"{sequence.break_even_tokens(2):,}"),
    ]
    rows += [
        (f"full KV cache at {tokens // 1024}K, MiB", f"{result.full_kv_bytes(tokens) / MIB:,.2f}")
        for tokens in CONTEXTS
    ]
    if memory_gib is not None:
        memory = int(memory_gib * GIB)
        rows += [
            (f"sequences in {memory_gib:g} GiB", f"{result.sequences(memory):,}"),
            ("  with prefix caching", f"{result.sequences(memory, 2):,}"),
        ]
        rows += [
            (f"  of stock vLLM at {n // 1024}K", f"{result.stock_sequences(memory, n):,}")
            for n in CONTEXTS
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [f"{name.ljust(widths[0])}  {value.rjust(widths[1])}".rstrip() for name, value in rows]
    lines += [
        "",
        "With prefix caching, vLLM's default, a running sequence holds two states "
        "(--no-enable-prefix-caching).",
    ]
    return "\n".join(lines)


def _with_state(sequence: SequenceLayout) -> str:
    """How many state heads there are, where some have no hidden state."""
    heads = [(page.num_state_heads, page.feature_dim > 0) for page in sequence.layouts]
    have, every = sum(n for n, has in heads if has), sum(n for n, _ in heads)
    return "" if have == every else f" in {have} of {every} heads"


def _contexts(config: DecoderConfig) -> str:
    interval = config.lola.context_shift
    if not interval:
        return f"contexts of up to {config.max_position_embeddings:,} tokens"
    return f"contexts without end (context shift {interval:,})"


def _read_config(path: Path) -> tuple[DecoderConfig, bool]:
    raw = read_json(path)
    is_lola = raw.get("model_type") in LOLA_TYPES
    for key in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = raw.get(key)
        if value is None and key not in _REQUIRED:
            continue  # derived from the others, as Llama does
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{path}: {key} = {json.dumps(value)}: must be a positive integer"
            )
    if not isinstance(raw.get("lola_config", {}), dict):
        raise CheckpointError(f"{path}: lola_config = {raw['lola_config']!r}: must be an object")
    if not is_lola:
        check_base(path, raw)
    return config_of(path, raw if is_lola else lola_fields(raw)), is_lola
