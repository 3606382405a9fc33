"""The files in a checkpoint that import LoLA's code for plain transformers.

With `trust_remote_code=True`, transformers runs the files that `auto_map` in config.json names. The
code stays in the installed package, so a checkpoint never carries an old copy of it. The config
alone can be read without the package, because transformers reads it before any tokenizer.
"""

from __future__ import annotations

from pathlib import Path

_CONFIG, _MODEL = "configuration_lola", "modeling_lola"
AUTO_MAP = {
    "AutoConfig": f"{_CONFIG}.DecoderConfig",
    "AutoModelForCausalLM": f"{_MODEL}.LolaForCausalLM",
}
_SOURCES = {
    _CONFIG: '''"""LoLA's config for transformers: that of the package lola-vllm, if it is there."""

try:
    from lola_vllm.core.config import DecoderConfig
except ImportError:  # enough for a tokenizer; the model needs the package
    from transformers import PreTrainedConfig

    class DecoderConfig(PreTrainedConfig):
        """The fields as they stand in the file."""

        model_type = "lola"


__all__ = ["DecoderConfig"]
''',
    _MODEL: '''"""LoLA attention for transformers: the code is in the package lola-vllm."""

from lola_vllm.engine.hf import LolaForCausalLM

__all__ = ["LolaForCausalLM"]
''',
}


def write_remote_code(model_dir: Path) -> None:
    """Write the files that `AUTO_MAP` names."""
    for module, source in _SOURCES.items():
        (model_dir / f"{module}.py").write_text(source, encoding="utf-8")
