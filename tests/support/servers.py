"""The model and the API key of the servers that tests share, and a server as anybody starts it."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from tools.support.server_process import BIN, Server, serving

ROOT = Path(__file__).parents[2]
# Sizes by layer that fit pages in the model's dtype and an update for every window, 126 on average.
SIZES = [
    53, 57, 64, 49, 84, 77, 98, 91, 93, 61, 46, 51, 71, 53, 123, 95, 75, 408, 454, 144, 365, 190,
    151, 278, 144, 78, 100, 64, 92, 71,
]  # fmt: skip


def _plain_pairs(demo: Path) -> Path:
    """The demo model's weights with pairs in its own dtype, beside it; made once.

    What the HTTP tests count (updates, pages, heads that hold a text) is easier to see with these.
    """
    out = demo.with_name("smollm2-lola-plain-pairs")
    if not demo.is_dir() or out.is_dir():
        return out
    config = json.loads((demo / "config.json").read_text())
    config["lola_config"] |= {
        "sparse_cache_size": SIZES, "recent_size": 0, "update_interval": 64,
        "sparse_dtype": "model",
    }  # fmt: skip
    staged = Path(tempfile.mkdtemp(dir=demo.parent))
    staged.chmod(0o755)
    for path in demo.iterdir():
        (staged / path.name).symlink_to(path)
    (staged / "config.json").unlink()
    (staged / "config.json").write_text(json.dumps(config))
    try:
        staged.rename(out)
    except OSError:  # another worker was first
        shutil.rmtree(staged)
    return out


MODEL = _plain_pairs(ROOT / "models" / "smollm2-lola")
KEY = "a-secret-key"  # of the server that wants one
# For eager servers: vLLM compiles small functions, of sampling for one, in these too.
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}


def keyless_serving(model: Path, log: Path) -> AbstractContextManager[Server]:
    """`lola-vllm serve` of a tiny model, without keys."""
    command = [str(BIN / "lola-vllm"), "serve", str(model), "--dtype", "float32",
               "--enforce-eager", "--max-num-seqs", "16", "--max-num-batched-tokens", "256",
               "--max-model-len", "2048"]  # fmt: skip
    return serving(log, command, **NOT_COMPILED)
