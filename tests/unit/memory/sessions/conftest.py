"""What tests of stored states share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lola_vllm.memory.sessions.cipher import KEY_VARIABLE
from tests.support.sessions import SECRET, Server


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Servers of a test end with it."""
    yield
    while Server.running:
        Server.running[-1].close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key is in the environment."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A file with a key, as openssl makes it."""
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path
