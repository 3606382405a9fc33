"""Names and shapes of a LoLA checkpoint's tensors, for writing and for loading.

A LoLA checkpoint is a Hugging Face Llama (or a decoder that differs from it by biases of q, k, v or
by norms of q and k) plus three tensors per layer under `model.layers.{i}.self_attn.`:
`feature_map_q [Hq, d, F]`, `feature_map_k [Hs, d, F]` and `window_factors [Hq]` (before the
sigmoid). A fourth, `importance [Hkv, d // 2 + d + 1]`, is there where `lola_config.importance` is
true, and is not read where it is false.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lola_vllm.checkpoint.files import CheckpointError, open_weights, weight_files

if TYPE_CHECKING:
    from lola_vllm.config import LolaLlamaConfig

LOLA_TENSORS = ("feature_map_q", "feature_map_k", "window_factors")
WINDOW_FACTOR_INIT = -2.1972245773362196  # sigmoid of it is 0.1, where LoLCATs starts training

_SHOWN = 10  # faults of a kind that a message lists
_BUFFER = ".rotary_emb.inv_freq"  # old Llama checkpoints store this; it follows from the config
_LM_HEAD = "lm_head.weight"
IMPORTANCE = ".self_attn.importance"
_QK_NORMS = (".self_attn.q_norm.weight", ".self_attn.k_norm.weight")

Shape = tuple[int, ...]


def expected_tensors(config: LolaLlamaConfig, num_state_heads: int) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this config must have, in the order of the layers.

    Args:
        config: the whole `config.json`; `head_dim` counts, not `hidden_size / num_attention_heads`.
        num_state_heads: Hs, the heads of `feature_map_k`; see `find_num_state_heads`.

    Returns:
        Shape per tensor name. `lm_head.weight` is left out where embeddings are tied.

    Raises:
        LolaConfigError: Hkv does not divide Hs, or Hs does not divide Hq.
    """
    from lola_vllm.config import importance_size  # here: it loads transformers

    lola = config.lola
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    Hq, Hkv, F = config.num_attention_heads, config.num_key_value_heads, lola.feature_dim
    assert isinstance(d, int) and isinstance(Hkv, int)  # LlamaConfig fills both in
    lola.check_heads(Hq, Hkv, num_state_heads)

    linears = {
        "self_attn.q_proj": ((Hq * d, hidden), config.qkv_bias),
        "self_attn.k_proj": ((Hkv * d, hidden), config.qkv_bias),
        "self_attn.v_proj": ((Hkv * d, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, Hq * d), config.attention_bias),
        "mlp.gate_proj": ((inner, hidden), config.mlp_bias),
        "mlp.up_proj": ((inner, hidden), config.mlp_bias),
        "mlp.down_proj": ((hidden, inner), config.mlp_bias),
    }
    layer: dict[str, Shape] = {}
    for name, (shape, has_bias) in linears.items():
        layer[f"{name}.weight"] = shape
        if has_bias:
            layer[f"{name}.bias"] = shape[:1]
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    layer |= {
        "self_attn.feature_map_q": (Hq, d, F),
        "self_attn.feature_map_k": (num_state_heads, d, F),
        "self_attn.window_factors": (Hq,),
        **({"self_attn.importance": (Hkv, importance_size(d))} if lola.importance else {}),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }

    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors[_LM_HEAD] = (config.vocab_size, hidden)
    return tensors


def find_num_state_heads(config: LolaLlamaConfig, model_dir: str | Path) -> int:
    """Hs of a checkpoint: `lola_config.num_state_heads`, else the heads of a `feature_map_k`.

    Args:
        config: the whole `config.json`.
        model_dir: a local model directory, of which only safetensors headers are read. Anything
            else, such as a hub id, is ignored.

    Returns:
        Hs; the number of query heads if neither source says (LoLCATs' own layout).

    Raises:
        CheckpointError: a damaged file or index.
    """
    if config.lola.num_state_heads is not None:
        return config.lola.num_state_heads
    model_dir = Path(model_dir)
    if model_dir.is_dir():
        for path in weight_files(model_dir):
            with open_weights(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                    if name.endswith(".self_attn.feature_map_k"):
                        return int(file.get_slice(name).get_shape()[0])
    return config.num_attention_heads


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Sequence[int]]) -> None:
    """Raise unless `found` has exactly the expected tensors in the expected shapes.

    Ignored in `found`: `rotary_emb.inv_freq` buffers, `lm_head.weight` where embeddings are tied
    (that is, where it is not expected), and an importance that the config switches off.

    Args:
        expected: what `expected_tensors` returned.
        found: shape per name, of files (`read_shapes`) or of loaded tensors.

    Raises:
        CheckpointError: names what is missing, unexpected and of a wrong shape, with remedies.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [
        name
        for name in found
        if name not in expected and name != _LM_HEAD and not name.endswith((_BUFFER, IMPORTANCE))
    ]
    wrong = [
        name
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    # Only the shown names are explained, because a search for near names is slow on thousands.
    lines = [
        *_report("missing", missing, [_explain_missing(n, expected[n]) for n in missing[:_SHOWN]]),
        *_report(
            "unexpected",
            unexpected,
            [_explain_unexpected(n, expected) for n in unexpected[:_SHOWN]],
        ),
        *_report(
            "wrong shape",
            wrong,
            [_explain_shape(n, tuple(found[n]), tuple(expected[n])) for n in wrong[:_SHOWN]],
        ),
    ]
    if lines:
        raise CheckpointError("\n".join(["the tensors do not fit config.json", *lines]))


def _report(kind: str, names: list[str], explained: list[str]) -> list[str]:
    if not names:
        return []
    lines = [f"{kind} ({len(names)}):", *(f"  {line}" for line in explained)]
    if len(names) > len(explained):
        lines.append(f"  and {len(names) - len(explained)} more")
    return lines


def _explain_missing(name: str, shape: Shape) -> str:
    text = f"{name} {list(shape)}"
    if name.endswith(LOLA_TENSORS):
        return f"{text}; a plain Llama gets these from `lola-vllm init`"
    if name == _LM_HEAD:
        return f"{text}; set tie_word_embeddings to true if the model has no output matrix"
    if name.endswith(".bias"):
        return f"{text}; set {_bias_field(name)} to false if the model has no biases"
    if name.endswith(IMPORTANCE):
        return (
            f"{text}; set lola_config.importance to false if no importance was fitted to the model"
        )
    if name.endswith(_QK_NORMS):
        return f"{text}; set qk_norm to false if the model has no norms of q and k"
    return f"{text}; a file is missing, or config.json is of another model"


def _explain_unexpected(name: str, expected: Mapping[str, Shape]) -> str:
    if name.endswith(".bias") and name.removesuffix("bias") + "weight" in expected:
        return f"{name}; set {_bias_field(name)} to true if the model has biases"
    if name.endswith(_QK_NORMS):
        return f"{name}; set qk_norm to true if the model normalizes q and k"
    near = difflib.get_close_matches(name, expected, n=1, cutoff=0.0)
    return f"{name}; nearest valid name: {near[0]!r}" if near else name


def _bias_field(name: str) -> str:
    if ".mlp." in name:
        return "mlp_bias"
    return "attention_bias" if ".o_proj." in name else "qkv_bias"


def _explain_shape(name: str, found: Shape, expected: Shape) -> str:
    text = f"{name}: found {list(found)}, expected {list(expected)}"
    remedies = []
    if name.endswith(("feature_map_q", "feature_map_k")) and len(found) == len(expected):
        if found[0] != expected[0] and name.endswith("feature_map_k"):
            remedies.append(f"set lola_config.num_state_heads to {found[0]}")
        elif found[0] != expected[0]:
            remedies.append("feature_map_q has one head per query head (num_attention_heads)")
        if found[1] != expected[1]:
            remedies.append(f"its rows are the head size, head_dim = {expected[1]}")
        if found[-1] != expected[-1]:
            remedies.append(f"set lola_config.feature_dim to {found[-1]}")
    return f"{text}; {', '.join(remedies) or 'config.json is of another model'}"
