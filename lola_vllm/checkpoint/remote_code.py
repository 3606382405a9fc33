"""The file in a checkpoint by which plain transformers finds LoLA's code: an import, no more.

With `trust_remote_code=True`, transformers runs the file that `auto_map` in config.json names. The
code stays in the installed package, so a checkpoint never carries an old copy of it.
"""

from __future__ import annotations

from pathlib import Path

_MODULE = "modeling_lola"
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.LolaLlamaConfig",
    "AutoModelForCausalLM": f"{_MODULE}.LolaLlamaForCausalLM",
}
_SOURCE = '''"""LoLA attention for transformers: the code is in the package lola-vllm."""

from lola_vllm.hf import LolaLlamaConfig, LolaLlamaForCausalLM

__all__ = ["LolaLlamaConfig", "LolaLlamaForCausalLM"]
'''


def write_remote_code(model_dir: Path) -> None:
    """Write the file that `AUTO_MAP` names."""
    (model_dir / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
