"""`vllm serve` in a process of its own, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

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
        "sparse_cache_size": SIZES, "update_interval": 64, "sparse_dtype": "model",
        "score_decay": 0.0,
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
BIN = Path(sys.executable).parent
START_LIMIT_S = 300
KEY = "a-secret-key"  # of the server that wants one


class Server:
    """A running server: its base URL and log."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process
        self.client = httpx.Client(base_url=self.url, timeout=120)
        self.other = self.client  # of another owner, where keys are told apart
        self.events = ""  # where events of the prefix cache are published, if they are

    def wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise AssertionError("the server did not start:\n" + self.log.read_text()[-4000:])


@contextlib.contextmanager
def serving(log: Path, command: Sequence[str], **env: str) -> Iterator[Server]:
    """A server that `command` starts, with `--host` and a free `--port` appended.

    Args:
        env: for the server; what tests of engines set in this process is left out.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", **env}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        running = Server(port, log, process)
        try:
            running.wait()
            yield running
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
