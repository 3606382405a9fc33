"""`vllm serve` or `lola-vllm serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

BIN = Path(sys.executable).parent
START_LIMIT_S = 300


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
