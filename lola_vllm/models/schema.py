"""Names and shapes of LoLA's tensors in a checkpoint, for writing and for loading.

A LoLA checkpoint has the base's tensors, which are its loader's to check, and three tensors per
layer that does not slide, under `model.layers.{i}.self_attn.`:
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
# A window factor with which exact pairs weigh e^60 times what the hidden state does, which is lost
# in rounding. It still has an exponential in float32.
CLOSED_FACTOR = 60.0
WINDOW_FACTOR_INIT = -2.1972245773362196  # sigmoid of it is 0.1, where LoLCATs starts training

_SHOWN = 10  # faults of a kind that a message lists
IMPORTANCE = ".self_attn.importance"
_KEY_MAP = ".self_attn.feature_map_k"

Shape = tuple[int, ...]


def expected_tensors(config: DecoderConfig) -> dict[str, Shape]:
    """Shapes of LoLA's tensors by name, in the order of the layers.

    Args:
        config: whose `facts` say what the tensors are like; `head_dim` counts, not
            `hidden_size / num_attention_heads`.

    Raises:
        LolaConfigError: Hkv does not divide Hs, or Hs does not divide Hq.
    """
    from lola_vllm.core.lola_config import importance_size  # here: it loads transformers

    facts, d = config.facts, config.head_dim
    Hq, Hkv, F = config.num_attention_heads, config.num_key_value_heads, facts.feature_dim
    config.lola.check_heads(Hq, Hkv, facts.num_state_heads)
    maps: dict[str, Shape] = {
        "self_attn.feature_map_q": (Hq, d, F),
        "self_attn.feature_map_k": (facts.num_state_heads, d, F),
        "self_attn.window_factors": (Hq,),
        **({"self_attn.importance": (Hkv, importance_size(d))} if facts.importance else {}),
    }
    return {
        f"model.layers.{i}.{name}": shape
        for i, window in enumerate(config.windows)
        for name, shape in maps.items()
        if window is None
    }


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


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Sequence[int]]) -> None:
    """Raise unless LoLA's tensors in `found` are the expected ones in the expected shapes.

    Args:
        expected: what `expected_tensors` returned.
        found: shape per name, of files (`read_shapes`) or of loaded tensors.

    Raises:
        CheckpointError: names what is missing, unexpected and of a wrong shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if is_ours(name) and name not in expected]
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
