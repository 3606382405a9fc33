"""LoLA models of bases that come in packages, of maps and adapters that ship with this project.

A folder beside this file holds them for one base: `maps.safetensors` (feature maps and window
factors), `lora.safetensors` (adapters), `calibration.safetensors` (sizes and importance), and
`CARD.md`, which says how they were made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.calibration import apply_calibration, load_calibration
from lola_vllm.models.convert import convert_checkpoint
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.init import StateHeads, init_checkpoint
from lola_vllm.models.quantize import Weights, move_checkpoint
from lola_vllm.models.staging import check_output, staged_directory

# Without a calibration.
UNCALIBRATED = {"window_size": 64, "sparse_cache_size": 128, "sink_size": 4}
# With one, besides its sizes per KV head. Pairs of 8 bits take half, and an update every 16 tokens
# leaves the ring 48 rows shorter.
CALIBRATED = {"update_interval": 16, "sparse_dtype": "int8"}


class BuildOptions(TypedDict, total=False):
    """Options of a model that ships.

    Attributes:
        base_out: keep the plain base here, to compare with stock vLLM.
        config_overrides: keys of `lola_config` that replace the model's own.
        state_heads: as in `init_checkpoint`; the maps that ship are of "kv", the default.
        untrained: identity maps and the base's own weights, as `init_checkpoint` writes them,
            instead of the distilled ones.
        calibrated: with the sizes per KV head and the importance that ship (default). Without them
            every cache has 128 pairs, chosen by the recall error alone, as in the paper.
        weights: of the linear layers of `out`, as in `quantize_checkpoint`; default: the base's.
        force: replace models that are already at `out` and `base_out`.
    """

    base_out: Path | None
    config_overrides: Mapping[str, Any] | None
    state_heads: StateHeads
    untrained: bool
    calibrated: bool
    weights: Weights | None
    force: bool


def build_shipped(
    folder: Path,
    unpack: Callable[[Path], None],
    out: Path,
    *,
    base_name: str,
    base_out: Path | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    state_heads: StateHeads = "kv",
    untrained: bool = False,
    calibrated: bool = True,
    weights: Weights | None = None,
    force: bool = False,
) -> DecoderConfig:
    """Unpack a base and write it as a LoLA checkpoint.

    Args:
        folder: what ships for the base.
        unpack: writes the base as a Hugging Face directory to an empty one.
        out: where the LoLA checkpoint goes.
        base_name: of the base, which the model card shows.
        base_out, config_overrides, state_heads, untrained, calibrated, weights, force: as in
            `BuildOptions`.

    Returns:
        The config that was written to `out`.

    Raises:
        CheckpointError: an output path that may not be replaced, an option that needs
            `untrained`, or what `unpack` raises.
        LolaConfigError: overrides that are not valid.
    """
    if state_heads != "kv" and not untrained:
        raise CheckpointError(
            f"state_heads = {state_heads!r}: the distilled maps are per KV head; add --untrained"
        )
    check_output(out, force=force)  # before the download
    overrides = config_overrides or {}
    lola_config = {**UNCALIBRATED, **overrides}
    with ExitStack() as stack:
        base = stack.enter_context(_base_directory(out, base_out, force, base_name))
        lola = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "lola"
        unpack(base)
        if untrained:
            config = init_checkpoint(base, lola, lola_config, state_heads)
        else:
            config = convert_checkpoint(
                base,
                folder / "maps.safetensors",
                lola,
                lola_config,
                folder / "lora.safetensors",
                notes=(folder / "CARD.md").read_text(encoding="utf-8"),
            )
            if calibrated:
                sizes, importance = load_calibration(folder / "calibration.safetensors")
                keys = {**sizes, **CALIBRATED, **overrides}
                config = apply_calibration(lola, keys, importance)
        move_checkpoint(lola, out, weights, force=force)
        return config


@contextmanager
def _base_directory(out: Path, base_out: Path | None, force: bool, name: str) -> Iterator[Path]:
    """Directory for the plain base. It is kept at `base_out` on success, and else deleted."""
    if base_out is None:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / name
            base.mkdir()
            yield base
    else:
        check_output(out, inputs=[base_out], force=force)
        with staged_directory(base_out, force=force, inputs=[out]) as staging:
            yield staging
