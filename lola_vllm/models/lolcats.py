"""The files that LoLCATs training leaves behind: feature maps ("distill") and LoRA adapters.

Both are state dicts whose names depend on how the model was wrapped when they were saved. This
module renames the tensors to `model.layers.{i}.` + kind and checks every layer and shape against
the base. A kind is a tensor that each layer has once, for example `self_attn.feature_map_q` or
`self_attn.q_proj.lora_A`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.models.files import CheckpointError, open_weights
from lola_vllm.models.schema import Shape, report

if TYPE_CHECKING:
    from torch import Tensor

    from lola_vllm.core.config import DecoderConfig

MAP_Q = "self_attn.feature_map_q"
MAP_K = "self_attn.feature_map_k"
FACTORS = "self_attn.window_factors"
MAPS = (MAP_Q, MAP_K, FACTORS)

# Plain, inside LlamaForCausalLM, inside one more wrapper, inside a PEFT model.
_NAME = re.compile(r"(?:|model\.|model\.model\.|base_model\.model\.model\.)layers\.(\d{1,4})\.(.+)")
# LoLCATs' own name, and the one of a LoLA checkpoint, which `lola-vllm distill` writes.
_MAP = re.compile(r"(self_attn\.feature_map_[qk])(?:\.mlp\.layer)?")
_FACTORS = re.compile(r"self_attn\.window_factors?")
_LORA = re.compile(
    r"((?:self_attn\.(?:(?:[qkvo]|qkv|out)_proj|dense)|mlp\.(?:gate|up|down)_proj)\.lora_[AB])"
    r"(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class LayerTensors:
    """A file's tensors under one naming.

    Attributes:
        path: the file, for messages.
        tensors: per (layer, kind). `window_factors` may still be `[1, Hq, 1, 1]`.
        names: the file's own name of each of them.
        unknown: names that are not understood.
    """

    path: Path
    tensors: dict[tuple[int, str], Tensor]
    names: dict[tuple[int, str], str]
    unknown: list[str]

    @property
    def num_layers(self) -> int:
        """Layers of the model that the file seems to be of."""
        return max((layer + 1 for layer, _ in self.tensors), default=0)

    @property
    def kinds(self) -> list[str]:
        """The kinds in the file, in its order."""
        return list(dict.fromkeys(kind for _, kind in self.tensors))

    def shape(self, kind: str) -> Shape | None:
        """Shape of the first tensor of a kind, None if the file has none."""
        return next((tuple(t.shape) for (_, k), t in self.tensors.items() if k == kind), None)


@dataclass(frozen=True)
class Maps:
    """Checked feature maps of every layer.

    Attributes:
        tensors: per full name, `feature_map_q [Hq, d, F]`, `feature_map_k [Hs, d, F]`, and, if the
            file has them, `window_factors [Hq]`, all in the file's dtypes.
        feature_dim: F. num_state_heads: Hs.
        has_lora: whether the file holds adapters too, for `read_lora`.
    """

    tensors: dict[str, Tensor]
    feature_dim: int
    num_state_heads: int
    has_lora: bool = False


@dataclass(frozen=True)
class Lora:
    """Checked adapters.

    Attributes:
        pairs: per name of a base weight `[out, in]`, `(A [r, in], B [out, r])` in the file's dtype.
        maps: feature maps and window factors that were trained along, as in `Maps.tensors`.
        rank: r of the first pair.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    maps: dict[str, Tensor]
    rank: int


def read_distill(path: Path, config: DecoderConfig) -> Maps:
    """Read a LoLCATs distill file and check it against a base model.

    The file may hold adapters as well, as LoLCATs publishes its 70B and 405B. They are left to
    `read_lora`.

    Args:
        path: `.safetensors`, else a `torch.save` file.
        config: the base's; its `lola_config` is not looked at.

    Raises:
        CheckpointError: a file that cannot be read, or that is not of this base; it names what is
            missing, unexpected and of the wrong shape.
    """
    whole = _layer_tensors(path)
    file = _without_lora(whole) if {MAP_Q, MAP_K} & {*whole.kinds} else whole
    shape_q, shape_k = file.shape(MAP_Q), file.shape(MAP_K)
    Hq, d = config.num_attention_heads, config.head_dim
    assert isinstance(d, int)  # LlamaConfig fills it in
    F = shape_q[-1] if shape_q and len(shape_q) == 3 else d
    Hs = shape_k[0] if shape_k and _is_head_count(shape_k[0], config) else Hq
    shapes = _map_shapes(config, Hs, F)
    required = [MAP_Q, MAP_K]
    kinds = [*required, *(kind for kind in file.kinds if kind == FACTORS)]
    hint = "it looks like a LoRA file; give it with --lora" if _has_lora(file) else ""
    _check(file, {kind: shapes[kind] for kind in kinds}, config, hint)
    return Maps(_canonical(file, kinds), F, Hs, has_lora=_has_lora(whole))


def read_lora(path: Path, config: DecoderConfig, maps: Maps, linears: Mapping[str, Shape]) -> Lora:
    """Read a LoRA file and check it against a base model.

    Feature maps in it (LoLCATs can go on training them in the second stage) must have the shapes
    of the distill file's.

    Args:
        path: `.safetensors`, else a `torch.save` file.
        config: the base's. maps: what `read_distill` returned. linears: shapes of its weights.

    Raises:
        CheckpointError: as `read_distill`.
    """
    file = _layer_tensors(path)
    # Any linear may have an adapter, but a linear that has one must have one in every layer.
    modules = list(dict.fromkeys(k.rpartition(".")[0] for k in file.kinds if ".lora_" in k))
    shapes: dict[str, Shape] = {}
    for module in modules:
        weight = linears.get(f"model.layers.0.{module}.weight")
        if weight is None:
            raise CheckpointError(f"{path}: adapters of {module}, and the base has no such layer")
        out_size, in_size = weight
        rank = _rank(file, module)
        shapes[f"{module}.lora_A"] = (rank, in_size)
        shapes[f"{module}.lora_B"] = (out_size, rank)
    map_kinds = [kind for kind in file.kinds if ".lora_" not in kind]
    map_shapes = _map_shapes(config, maps.num_state_heads, maps.feature_dim)
    shapes |= {kind: map_shapes[kind] for kind in map_kinds}
    if not modules:
        hint = "; it looks like a distill file; give it with --distill" if file.tensors else ""
        raise CheckpointError(f"{path}: no LoRA tensors{hint}")
    _check(file, shapes, config)

    tensors = _canonical(file, shapes)
    pairs = {
        f"{prefix}.weight": (tensors[f"{prefix}.lora_A"], tensors[f"{prefix}.lora_B"])
        for i in range(config.num_hidden_layers)
        for prefix in (f"model.layers.{i}.{module}" for module in modules)
    }
    return Lora(pairs, _canonical(file, map_kinds), rank=shapes[f"{modules[0]}.lora_A"][0])


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a `torch.save` file, memory-mapped where possible.

    Pickled code is never run: anything but tensors and plain containers is refused.

    Returns:
        Tensor per name, unwrapped from `{"model_state_dict": ...}` or `{"model": ...}`.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or is no state dict.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path}: a directory; shards of torch.distributed become a file by `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        with open_weights(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    value = _torch_load(path)
    for wrapper in ("model_state_dict", "model"):  # of one GPU, and of sharded training
        if isinstance(value, dict) and wrapper in value:
            value = value[wrapper]
    import torch

    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path}: must hold a state dict, tensors by name")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: must hold a state dict, but {name!r} is a {type(tensor).__name__}"
            )
    return value


def _torch_load(path: Path) -> Any:
    import torch

    try:
        # Only the zip format that torch has written since 1.6 can be mapped.
        return torch.load(
            str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # from a damaged file torch raises anything, KeyError included
        text = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise CheckpointError(
                f"{path}: refused, it holds more than tensors: loading it would run "
                f"{found[1]}; save the state dict alone"
            ) from None
        reason = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
        if "weights_only" in reason:  # torch advises to switch this protection off
            reason = "not a torch.save file"
        raise CheckpointError(
            f"{path}: not a complete torch.save file ({reason}); copy or download it again"
        ) from None


def _layer_tensors(path: Path) -> LayerTensors:
    file = LayerTensors(path, {}, {}, [])
    for name, tensor in load_state_dict(path).items():
        if (key := _key(name)) is None:
            file.unknown.append(name)
        elif key in file.tensors:
            raise CheckpointError(f"{path}: {file.names[key]!r} and {name!r} are the same tensor")
        else:
            file.tensors[key], file.names[key] = tensor, name
    return file


def _key(name: str) -> tuple[int, str] | None:
    """(layer, kind) of a name in a file, None if it is not understood."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    layer, rest = int(found[1]), found[2]
    if kind := _MAP.fullmatch(rest) or _LORA.fullmatch(rest):
        return layer, kind[1]
    return (layer, FACTORS) if _FACTORS.fullmatch(rest) else None


def _map_shapes(config: DecoderConfig, Hs: int, F: int) -> dict[str, Shape]:
    Hq, d = config.num_attention_heads, config.head_dim
    assert isinstance(d, int)
    return {MAP_Q: (Hq, d, F), MAP_K: (Hs, d, F), FACTORS: (Hq,)}


def _is_head_count(Hs: int, config: DecoderConfig) -> bool:
    """Whether key maps can have so many heads; see `LolaConfig.check_heads`."""
    Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
    return Hs > 0 and Hq % Hs == 0 and Hs % (Hkv or Hq) == 0


def _rank(file: LayerTensors, module: str) -> int:
    """r of a module's first adapter; at least 1, so that an empty one is of a wrong shape."""
    if shape := file.shape(f"{module}.lora_A"):
        return max(1, shape[0])
    shape = file.shape(f"{module}.lora_B")
    return max(1, shape[-1]) if shape else 1


def _has_lora(file: LayerTensors) -> bool:
    return any(".lora_" in kind for kind in file.kinds)


def _without_lora(file: LayerTensors) -> LayerTensors:
    tensors = {key: tensor for key, tensor in file.tensors.items() if ".lora_" not in key[1]}
    return LayerTensors(file.path, tensors, file.names, file.unknown)


def _canonical(file: LayerTensors, kinds: Iterable[str]) -> dict[str, Tensor]:
    """Checked tensors by full name; window factors become `[Hq]`."""
    return {
        f"model.layers.{layer}.{kind}": tensor.flatten() if kind == FACTORS else tensor
        for (layer, kind), tensor in file.tensors.items()
        if kind in kinds
    }


def _check(
    file: LayerTensors, shapes: Mapping[str, Shape], config: DecoderConfig, hint: str = ""
) -> None:
    """Raise unless the file has each kind, in its shape and finite, for each layer, and no more;
    maps for those that do not slide."""
    layers = range(config.num_hidden_layers)
    sliding = {layer for layer, window in enumerate(config.windows) if window is not None}
    missing = [
        f"model.layers.{layer}.{kind} {list(shape)}"
        for layer in layers
        for kind, shape in shapes.items()
        if (layer, kind) not in file.tensors and not (layer in sliding and kind in MAPS)
    ]
    unexpected = list(file.unknown)
    wrong = []
    for key, tensor in file.tensors.items():
        name, shape = file.names[key], shapes.get(key[1])
        if key[0] not in layers or shape is None:
            unexpected.append(name)
        elif key[0] in sliding and key[1] in MAPS:
            unexpected.append(f"{name} of a sliding layer")
        elif not _fits(key[1], tuple(tensor.shape), shape):
            wrong.append(f"{name}: found {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            wrong.append(f"{name}: found {tensor.dtype}, expected floating point")
    lines = [
        *report("missing", missing),
        *report("unexpected", unexpected),
        *report("wrong shape", wrong),
    ]
    if lines:
        hints = [hint] if hint else []
        raise CheckpointError("\n".join([f"{file.path}: does not fit the base", *lines, *hints]))
    for key, tensor in file.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file.path}: {file.names[key]} holds values that are not finite (NaN or infinity)"
            )


def _fits(kind: str, found: Shape, shape: Shape) -> bool:
    return found == shape or (kind == FACTORS and found == (1, *shape, 1, 1))
