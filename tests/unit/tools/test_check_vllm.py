"""tools/check_vllm.py: finds what a release of vLLM lacks, and nothing where it lacks nothing."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "tools" / "check_vllm.py"
INSTALLED = Path(find_spec("vllm").origin).parents[1]

CHANGES = {
    "model_executor/models/llama.py": ("class LlamaDecoderLayer", "class LlamaLayer"),
    "v1/attention/backends/mamba_attn.py": ("def _prefill_cpu_metadata", "def _plan_prefill"),
    "v1/attention/backends/registry.py": ("is_mamba: bool = False", "kind: str = ''"),
    "config/cache.py": ("user_specified_block_size", "block_size_of_user"),
}
EXPECTED = [
    "missing: vllm.model_executor.models.llama.LlamaDecoderLayer",
    "missing: vllm.v1.attention.backends.mamba_attn.BaseMambaAttentionMetadataBuilder."
    "_prefill_cpu_metadata",
    "changed: vllm.v1.attention.backends.registry.register_backend(",
    "missing: vllm.config.CacheConfig.user_specified_block_size",
]


def check(path):
    return subprocess.run(
        [sys.executable, SCRIPT, path], capture_output=True, text=True, timeout=120
    )


def test_what_a_release_lacks_is_named(tmp_path):
    skip = shutil.ignore_patterns("*.so", "*.json", "__pycache__")
    shutil.copytree(INSTALLED / "vllm", tmp_path / "vllm", copy_function=os.symlink, ignore=skip)
    for name, (before, after) in CHANGES.items():
        text = (INSTALLED / "vllm" / name).read_text()
        assert before in text
        (tmp_path / "vllm" / name).unlink()
        (tmp_path / "vllm" / name).write_text(text.replace(before, after))
    result = check(tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    assert len(lines) == 4, lines  # and of the installed one nothing
    assert [any(line.startswith(e) for line in lines) for e in EXPECTED] == [True] * 4, lines
