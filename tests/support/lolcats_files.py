"""Tiny Llamas, and the files that LoLCATs training of them would leave."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm.models.files import weight_files

# head_dim differs from hidden_size / num_attention_heads on purpose, and F from head_dim
TINY = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
F, RANK = 6, 3
ROWS = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
State = dict[str, torch.Tensor]


def make_base(path: Path, *, sharded: bool = False, dtype=torch.bfloat16, **changes) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).to(dtype)
    model.save_pretrained(path, max_shard_size="8KB" if sharded else "1GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (path / name).write_text(f"{name} of the base")
    return path


def distill_tensors(layers: int = 2, Hq: int = 4, Hs: int = 4, d: int = 8, F: int = F) -> State:
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        attn = f"model.layers.{i}.self_attn."
        for letter, heads in (("q", Hq), ("k", Hs)):
            weight = torch.randn(heads, d, F, generator=g).bfloat16()
            tensors[f"{attn}feature_map_{letter}.mlp.layer"] = weight
        tensors[f"{attn}window_factors"] = torch.randn(1, Hq, 1, 1, generator=g).bfloat16()
    return tensors


def lora_tensors(layers: int = 2, rows: dict[str, tuple[int, int]] = ROWS, r: int = RANK) -> State:
    g = torch.Generator().manual_seed(2)
    tensors = {}
    for i in range(layers):
        for linear, (n_out, n_in) in rows.items():
            prefix = f"base_model.model.model.layers.{i}.self_attn.{linear}.lora_"
            tensors[f"{prefix}A.default.weight"] = torch.randn(r, n_in, generator=g).bfloat16()
            tensors[f"{prefix}B.default.weight"] = torch.randn(n_out, r, generator=g).bfloat16()
    return tensors


def one_file_tensors(r: int = RANK, **sizes: int) -> State:
    """Maps and adapters in one file, named inside a PEFT model: LoLCATs' 70B and 405B."""
    maps = renamed(distill_tensors(**sizes), "model.layers", "base_model.model.model.layers")
    return {**maps, **lora_tensors(r=r)}


def renamed(tensors: State, old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def save(path: Path, tensors: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)
    return path


def read_tensors(path: Path) -> State:
    return {name: t for file in weight_files(path) for name, t in load_file(file).items()}


def listing(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}
