"""Names and shapes of a LoLA checkpoint's tensors, for writing and for loading.

A LoLA checkpoint is a Hugging Face Llama (or a decoder that differs from it by biases of q, k, v or
by norms of q and k) plus three tensors per layer under `model.layers.{i}.self_attn.`:
`feature_map_q [Hq, d, F]`, `feature_map_k [Hs, d, F]` and `window_factors [Hq]` (before the
sigmoid). A fourth, `importance [Hkv, d // 2 + d + 1]`, is there where `lola-vllm calibrate` has
fitted it. What the tensors say of themselves, `TensorFacts`, is not repeated in `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lola_vllm.models.files import CheckpointError, read_shapes, weight_files

if TYPE_CHECKING:
    from lola_vllm.core.config import DecoderConfig, TensorFacts

LOLA_TENSORS = ("feature_map_q", "feature_map_k", "window_factors")
OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj")  # what families call it in `self_attn`
WINDOW_FACTOR_INIT = -2.1972245773362196  # sigmoid of it is 0.1, where LoLCATs starts training

_SHOWN = 10  # faults of a kind that a message lists
_BUFFER = ".rotary_emb.inv_freq"  # old Llama checkpoints store this; it follows from the config
_LM_HEAD = "lm_head.weight"
IMPORTANCE = ".self_attn.importance"
_KEY_MAP = ".self_attn.feature_map_k"

Shape = tuple[int, ...]


def expected_tensors(config: DecoderConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this config must have, in the order of the layers; of a
    base that is no Llama (`DecoderConfig.is_llama`) LoLA's own tensors, which sliding layers have
    none of.

    Args:
        config: the whole `config.json`; `head_dim` counts, not `hidden_size / num_attention_heads`.
            Its `facts` say what LoLA's tensors are like.

    Returns:
        Shape per tensor name. `lm_head.weight` is left out where embeddings are tied.

    Raises:
        LolaConfigError: Hkv does not divide Hs, or Hs does not divide Hq.
    """
    from lola_vllm.core.config import importance_size  # here: it loads transformers

    facts = config.facts
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    Hq, Hkv, F = config.num_attention_heads, config.num_key_value_heads, facts.feature_dim
    config.lola.check_heads(Hq, Hkv, facts.num_state_heads)
    maps: dict[str, Shape] = {
        "self_attn.feature_map_q": (Hq, d, F),
        "self_attn.feature_map_k": (facts.num_state_heads, d, F),
        "self_attn.window_factors": (Hq,),
        **({"self_attn.importance": (Hkv, importance_size(d))} if facts.importance else {}),
    }
    if not config.is_llama:
        return {
            f"model.layers.{i}.{name}": shape
            for i, window in enumerate(config.windows)
            for name, shape in maps.items()
            if window is None
        }

    mlp_bias = getattr(config, "mlp_bias", False)
    linears = {
        "self_attn.q_proj": ((Hq * d, hidden), config.qkv_bias),
        "self_attn.k_proj": ((Hkv * d, hidden), config.qkv_bias),
        "self_attn.v_proj": ((Hkv * d, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, Hq * d), getattr(config, "attention_bias", False)),
        "mlp.gate_proj": ((inner, hidden), mlp_bias),
        "mlp.up_proj": ((inner, hidden), mlp_bias),
        "mlp.down_proj": ((hidden, inner), mlp_bias),
    }
    layer: dict[str, Shape] = {}
    for name, (shape, has_bias) in linears.items():
        layer[f"{name}.weight"] = shape
        if has_bias:
            layer[f"{name}.bias"] = shape[:1]
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    layer |= {
        **maps,
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


def read_facts(model: str | Path, revision: str | None = None) -> TensorFacts | None:
    """What a model's tensors say, from the headers of its safetensors files alone.

    Args:
        model: a local directory, or the name of a repository on the Hugging Face hub, of which at
            most the headers are downloaded. revision: of the repository.

    Returns:
        None for a directory whose files have no feature maps, or that has none.

    Raises:
        CheckpointError: a damaged file or index, or a name that is neither.
    """
    directory = Path(model)
    return facts_of(read_shapes(directory) if directory.is_dir() else _hub_shapes(model, revision))


def facts_of(shapes: Mapping[str, Sequence[int]]) -> TensorFacts | None:
    """What tensors of these shapes say; None: they have no feature maps."""
    from lola_vllm.core.config import TensorFacts  # here: it loads transformers

    for name, shape in shapes.items():
        if name.endswith(_KEY_MAP) and len(shape) == 3:
            importance = any(other.endswith(IMPORTANCE) for other in shapes)
            return TensorFacts(shape[2], shape[0], importance)
    return None


def settle_facts(config: DecoderConfig, model: str | Path, revision: str | None = None) -> None:
    """Set `config.facts` from a model's tensors, unless somebody has; see `read_facts`."""
    if not config.has_facts:
        found = read_facts(model, revision)
        if found is not None:
            config.facts = found


def _hub_shapes(name: str | Path, revision: str | None) -> dict[str, tuple[int, ...]]:
    from huggingface_hub import get_safetensors_metadata, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        cached = snapshot_download(str(name), revision=revision, local_files_only=True)
        if weight_files(Path(cached)):
            return read_shapes(Path(cached))
    except (OSError, ValueError):
        pass  # not there, or not all of it
    try:
        found = get_safetensors_metadata(str(name), revision=revision)
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError) as error:
        raise CheckpointError(
            f"{name}: no directory, and the headers of its safetensors files cannot be read from "
            f"the Hugging Face hub ({error}); download the model and give its directory"
        ) from error
    return {
        tensor: tuple(info.shape)
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


def is_ours(name: str) -> bool:
    """Whether a tensor of a checkpoint is LoLA's, and not the base's."""
    return name.endswith((*LOLA_TENSORS, IMPORTANCE))


def base_left_out(
    config: DecoderConfig, found: Mapping[str, Sequence[int]]
) -> Mapping[str, Sequence[int]]:
    """The tensors that `expected_tensors` speaks of: all of a Llama, else LoLA's own."""
    if config.is_llama:
        return found
    return {name: shape for name, shape in found.items() if is_ours(name)}


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Sequence[int]]) -> None:
    """Raise unless `found` has exactly the expected tensors in the expected shapes.

    Ignored in `found`: `rotary_emb.inv_freq` buffers, `lm_head.weight` where embeddings are tied
    (that is, where it is not expected).

    Args:
        expected: what `expected_tensors` returned.
        found: shape per name, of files (`read_shapes`) or of loaded tensors.

    Raises:
        CheckpointError: names what is missing, unexpected and of a wrong shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [
        name
        for name in found
        if name not in expected and name != _LM_HEAD and not name.endswith(_BUFFER)
    ]
    wrong = [
        f"{name}: found {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    lines = [
        *report("missing", [f"{name} {list(expected[name])}" for name in missing]),
        *report("unexpected", unexpected),
        *report("wrong shape", wrong),
    ]
    if not lines:
        return
    if any(name.endswith(LOLA_TENSORS) for name in missing):
        lines.append("a base gets LoLA's tensors from `lola-vllm init`, `convert` or `distill`")
    raise CheckpointError("\n".join(["the tensors do not fit config.json", *lines]))


def report(kind: str, texts: list[str]) -> list[str]:
    """Lines that list faults of a kind, as many as can be read; none where there is no fault."""
    if not texts:
        return []
    lines = [f"{kind} ({len(texts)}):", *(f"  {text}" for text in texts[:_SHOWN])]
    if len(texts) > _SHOWN:
        lines.append(f"  and {len(texts) - _SHOWN} more")
    return lines
