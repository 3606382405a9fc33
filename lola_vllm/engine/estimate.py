"""What a LoLA model's sequences cost in memory, from its `config.json` alone.

Needs no GPU, no weights and no vLLM. Bytes come from `StateLayout`, which the server allocates by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lola_vllm.core.cli_options import sparse_cache
from lola_vllm.core.config import (
    LOLA_TYPES,
    DecoderConfig,
    LolaConfig,
    default_context_shift,
    heads_divide,
)
from lola_vllm.core.state import LayerLayout, SequenceLayout, StateLayout
from lola_vllm.models.base import config_of, lola_fields
from lola_vllm.models.families import check_base
from lola_vllm.models.files import CheckpointError, read_json
from lola_vllm.models.schema import settle_facts

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONTEXTS = (4096, 32768, 131072)
STOCK_BLOCK_TOKENS = 16  # vLLM's own default for a full KV cache
MIB, GIB = 2**20, 2**30

# Parts that the table shows in another way: keys and values as one sum, sinks and window, which
# share a part of the page, as two. Other parts keep their names.
_SPARSE = ("sparse_k", "sparse_v", "sparse_k_scale", "sparse_v_scale")
_EXACT = ("exact_k", "exact_v")
# Fields that a config must state, because Llama's defaults would silently replace them.
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Row:
    """One layout of the state, on one rank.

    Attributes:
        name: how the layout is chosen. chosen: whether it is the one the config asks for.
        sequence: the pages of a rank that has all layers.
        memory_bytes: room for the states, None if it was not given.
    """

    name: str
    chosen: bool
    sequence: SequenceLayout
    memory_bytes: int | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes per sequence of each part, all layers; they sum to `bytes_per_sequence`."""
        sizes, exact, sinks = Counter[str](), 0, 0
        for page in self.sequence.layouts:
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
        parts["alignment"] = self.bytes_per_sequence - sizes.total()
        return parts

    @property
    def layout(self) -> StateLayout:
        """See `SequenceLayout.page`."""
        return self.sequence.page

    @property
    def bytes_per_sequence(self) -> int:
        """One state: a page in every layer."""
        return self.sequence.row_bytes

    @property
    def full_kv_bytes_per_token(self) -> int:
        """What a token takes in a full KV cache of the same layers."""
        return self.sequence.full_kv_bytes_per_token

    def sequences(self, states: int = 1) -> int | None:
        """Sequences of `states` states that fit; vLLM keeps one more state as its null block."""
        if self.memory_bytes is None:
            return None
        return max(0, self.memory_bytes // self.bytes_per_sequence - 1) // states

    def to_json(self) -> dict[str, Any]:
        """The row's numbers, bytes and tokens, ready for `json.dumps`."""
        return {
            "name": self.name,
            "chosen": self.chosen,
            "num_state_heads": self.sequence.layer.num_state_heads,
            "num_sparse_heads": len(self.sequence.layer.sizes),
            "parts_bytes": self.parts,
            "page_bytes": max(layer.page_bytes for layer in self.sequence.layers),
            "bytes_per_sequence": self.bytes_per_sequence,
            "mib_per_sequence": self.bytes_per_sequence / MIB,
            "break_even_tokens": self.sequence.break_even_tokens(),
            "break_even_tokens_with_prefix_caching": self.sequence.break_even_tokens(2),
            "sequences": self.sequences(),
            "sequences_with_prefix_caching": self.sequences(2),
        }


@dataclass(frozen=True)
class Estimate:
    """Everything that `lola-vllm estimate` prints.

    Attributes:
        model: the path it is of. lola: the parameters. config: the model's.
        dtype: of keys and values. tensor_parallel_size: all numbers are of one such rank.
        memory_gib: room for the states on a rank, if given.
        contexts: lengths in tokens that a full KV cache is worked out for.
        is_base: whether the model is a base, whose layout is the one that `init` would choose.
        rows: the layout that the config asks for, and the others that are possible.
    """

    model: Path
    config: DecoderConfig
    lola: LolaConfig
    dtype: str
    tensor_parallel_size: int
    memory_gib: float | None
    contexts: tuple[int, ...]
    is_base: bool
    rows: list[Row]

    @property
    def full_kv_bytes(self) -> dict[int, int]:
        """Bytes of a full KV cache of one sequence on one rank, per context length."""
        row = self.rows[0]
        windows = row.sequence.sliding_bytes
        return {n: n * row.full_kv_bytes_per_token + windows for n in self.contexts}

    @property
    def stock_sequences(self) -> dict[int, int] | None:
        """Sequences per context length that stock vLLM holds in the same memory.

        It allots blocks of 16 tokens, and keeps one as its null block.
        """
        memory = self.rows[0].memory_bytes
        if memory is None:
            return None
        blocks = memory // (STOCK_BLOCK_TOKENS * self.rows[0].full_kv_bytes_per_token)
        return {n: max(0, blocks - 1) // -(-n // STOCK_BLOCK_TOKENS) for n in self.contexts}

    def to_json(self) -> dict[str, Any]:
        """All numbers, ready for `json.dumps`; those of rows are per tensor-parallel rank."""
        return {
            "model": str(self.model),
            "num_layers": self.config.num_hidden_layers,
            "num_attention_heads": self.config.num_attention_heads,
            "num_key_value_heads": self.config.num_key_value_heads,
            "head_dim": self.config.head_dim,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "memory_gib": self.memory_gib,
            "lola_config": self.lola.model_dump(),
            "full_kv_bytes": {str(tokens): size for tokens, size in self.full_kv_bytes.items()},
            "stock_sequences": self.stock_sequences
            and {str(tokens): number for tokens, number in self.stock_sequences.items()},
            "layouts": [row.to_json() for row in self.rows],
        }


def estimate(
    model: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    state_heads: Literal["kv", "query"] | None = None,
    feature_dim: int | None = None,
    dtype: str = "bfloat16",
    tensor_parallel_size: int = 1,
    memory_gib: float | None = None,
    context: int | None = None,
) -> Estimate:
    """Work out what a sequence costs.

    Args:
        model: a `config.json` or the directory it is in, of a LoLA model or a plain Llama.
        overrides: keys of `lola_config` that replace the config's.
        state_heads: "kv" (Hs = Hkv) or "query" (Hs = Hq). feature_dim: F. Default: as the tensors
            beside the config say; without tensors and for a base: "kv" with F equal to the head
            size, as `init` makes them.
        dtype: of keys and values: "bfloat16", "float16" or "float32".
        tensor_parallel_size: ranks that share the heads.
        memory_gib: room for the states on a rank, in GiB.
        context: a length in tokens to work out a full KV cache for, beside `CONTEXTS`.

    Raises:
        CheckpointError: a config that is missing, not a Llama's, or lacks its sizes, or an
            argument that is not valid.
        LolaConfigError: a `lola_config` or overrides that are not valid.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise CheckpointError(f"memory_gib = {memory_gib}: must be a positive number")
    if feature_dim is not None and feature_dim < 1:
        raise CheckpointError(f"feature_dim = {feature_dim}: must be at least 1")
    if context is not None and context < 1:
        raise CheckpointError(f"context = {context}: must be at least 1 token")
    config, is_lola = _read_config(model / "config.json" if model.is_dir() else model)
    config.lola_config = dict(overrides or {})  # merges
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if is_lola:
        settle_facts(config, model if model.is_dir() else model.parent)
    else:  # as `init` makes it
        interval = default_context_shift(config.max_position_embeddings)
        config.lola_config = {"context_shift": interval, **config.lola_config}
    num_state_heads = config.facts.num_state_heads
    if state_heads is not None:
        num_state_heads = {"kv": kv_heads, "query": heads}[state_heads]
    config.facts = replace(
        config.facts,
        num_state_heads=num_state_heads,
        feature_dim=feature_dim or config.facts.feature_dim,
    )
    config.lola.check_heads(heads, kv_heads, num_state_heads)
    config.check_sizes()
    config.lola.check_context_shift(config.max_position_embeddings)
    _check_ranks(tensor_parallel_size, heads, kv_heads, num_state_heads)
    config.lola.check_ranks(tensor_parallel_size, kv_heads, num_state_heads)
    lola = config.lola

    names = {heads: ", one per query head", kv_heads: ", one per KV head"}
    chosen = (num_state_heads, lola.num_sparse_heads(num_state_heads, kv_heads))
    rows = []
    # Dicts keep the order and drop duplicates. With Hs = Hkv there is nothing to share.
    for Hs, Hg in dict.fromkeys([(heads, heads), (heads, kv_heads), (kv_heads, kv_heads), chosen]):
        shared = Hg != Hs
        if shared and kv_heads % tensor_parallel_size:  # see LolaConfig.check_ranks
            continue
        name = f"{Hs} state heads{names.get(Hs, '')}"
        sharing = {"sparse_sharing": "kv_head" if shared else "none"}
        pages = (
            LayerLayout.from_config(
                parameters.model_copy(update=sharing),
                num_kv_heads=max(1, kv_heads // tensor_parallel_size),
                num_state_heads=max(1, Hs // tensor_parallel_size),
                head_dim=int(config.head_dim or 0),
                feature_dim=facts.feature_dim,
                kv_dtype=DTYPES[dtype],
                importance=facts.importance,
            )
            for parameters, facts in map(config.for_layer, range(config.num_hidden_layers))
        )
        rows.append(
            Row(
                name=f"{name}, with one sparse cache per KV head" if shared else name,
                chosen=(Hs, Hg) == chosen,
                sequence=SequenceLayout(tuple(pages)),
                memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
            )
        )
    contexts = tuple(sorted({*CONTEXTS, context or CONTEXTS[0]}))
    return Estimate(
        model,
        config,
        lola,
        dtype,
        tensor_parallel_size,
        memory_gib,
        contexts,
        is_base=not is_lola,
        rows=rows,
    )


def format_table(result: Estimate) -> str:
    """The text that `lola-vllm estimate` prints: parts by layout, one column each."""
    config, lola, rows = result.config, result.lola, result.rows
    rank = (
        "" if result.tensor_parallel_size == 1 else f", each of {result.tensor_parallel_size} ranks"
    )
    lines = [
        f"{result.model}: {config.num_hidden_layers} layers, {config.num_attention_heads} query "
        f"and {config.num_key_value_heads} KV heads of size {config.head_dim}, F "
        f"{config.facts.feature_dim}, K/V {result.dtype}, hidden state float32",
        f"window {lola.window_size}, sparse cache {sparse_cache(lola)}, update interval "
        f"{lola.update_interval}, sinks {lola.sink_size}, {_contexts(config)}",
        "",
        "Layouts of the state, a column each:",
        *(f"  {_letter(i)}: {row.name}{_mark(result, row)}" for i, row in enumerate(rows)),
        "",
    ]
    table = [[f"MiB per sequence{rank}", *(_letter(i) for i in range(len(rows)))]]
    for part in rows[0].parts:
        if any(row.parts[part] for row in rows):
            table.append([f"  {part}", *(f"{row.parts[part] / MIB:.2f}" for row in rows)])
    table.append(["total", *(f"{row.bytes_per_sequence / MIB:.2f}" for row in rows)])
    table.append(["break-even, tokens", *(f"{row.sequence.break_even_tokens():,}" for row in rows)])
    table.append(
        ["  with prefix caching", *(f"{row.sequence.break_even_tokens(2):,}" for row in rows)]
    )
    if result.memory_gib is not None:
        room = f"sequences in {result.memory_gib:g} GiB"
        table.append([room, *(f"{row.sequences():,}" for row in rows)])
        table.append(["  with prefix caching", *(f"{row.sequences(2):,}" for row in rows)])
    widths = [max(len(line[i]) for line in table) for i in range(len(rows) + 1)]
    for line in table:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
    full = ", ".join(
        f"{size / MIB:,.0f} at {_length(tokens)}" for tokens, size in result.full_kv_bytes.items()
    )
    lines += ["", f"A full KV cache, MiB per sequence{rank}: {full}."]
    if result.stock_sequences is not None:
        fit = ", ".join(
            f"{n:,} at {_length(tokens)}" for tokens, n in result.stock_sequences.items()
        )
        lines.append(f"Sequences of stock vLLM in {result.memory_gib:g} GiB: {fit}.")
    lines.append(
        "With prefix caching, vLLM's default, a running sequence holds two states "
        "(--no-enable-prefix-caching)."
    )
    if result.is_base:
        lines.append(
            "LoLCATs trains maps per query head with F 64: --state-heads query --feature-dim 64."
        )
    return "\n".join(lines)


def _contexts(config: DecoderConfig) -> str:
    """How long a context may be."""
    interval = config.lola.context_shift
    if not interval:
        return f"contexts of up to {config.max_position_embeddings:,} tokens"
    return f"contexts without end (context shift {interval:,})"


def _mark(result: Estimate, row: Row) -> str:
    """The remark after the name of the chosen layout."""
    if not row.chosen:
        return ""
    if not result.is_base:
        return " (this config)"
    as_init = result.config.facts.feature_dim == result.config.head_dim
    return " (as init makes it)" if as_init else " (these options)"


def _length(tokens: int) -> str:
    return f"{tokens:,}" if tokens % 1024 else f"{tokens // 1024}K"


def _letter(i: int) -> str:
    return "ABCD"[i]


def _read_config(path: Path) -> tuple[DecoderConfig, bool]:
    """The config, and whether it is a LoLA model's rather than a base's."""
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


def _check_ranks(ranks: int, heads: int, kv_heads: int, num_state_heads: int) -> None:
    """The server's own rule, on ranks that may not be valid at all."""
    if ranks < 1 or not heads_divide(ranks, heads, kv_heads, num_state_heads):
        raise CheckpointError(
            f"tensor_parallel_size = {ranks}: {heads} query, {kv_heads} KV and {num_state_heads} "
            f"state heads cannot be divided among so many ranks; use a divisor of {kv_heads}"
        )
