"""What tests of stored states share."""

import pytest

from lola_vllm.memory.sessions.cipher import KEY_VARIABLE
from tests.support.sessions import ROW, SECRET, Server


@pytest.fixture(autouse=True)
def closed():
    """Servers of a test end with it."""
    yield
    while Server.running:
        Server.running[-1].close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """No key is in the environment."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def key_file(tmp_path):
    """A file with a key, as openssl makes it."""
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture(params=["memory", "disk", "both"])
def server(request, tmp_path):
    """An empty one, with states in each of these places."""
    directory = None if request.param == "memory" else tmp_path
    return Server(directory, memory=0 if request.param == "disk" else 100 * ROW)
