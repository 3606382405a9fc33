"""Requests to a server: what is said where it refuses, or does not answer."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lola_vllm.command import cli
from lola_vllm.command.client import ClientError
from lola_vllm.command.client.server import Server

REFUSAL = b'{"error": {"message": "set LOLA_VLLM_STATE_UPLOAD=1 to take states from files"}}'
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n"
HEAD = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that reads the headers of one request, answers and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                seen = b""
                while b"\r\n\r\n" not in seen:
                    seen += connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_a_refusal_that_comes_before_the_file_is_sent_is_read(tmp_path, capsys):
    file = tmp_path / "a.lola.safetensors"
    file.write_bytes(bytes(32 * 2**20))
    with answering(HEAD % len(REFUSAL) + REFUSAL) as url:
        assert cli.main(["sessions", "import", str(file), "agent", "--url", url]) == 2
    said = capsys.readouterr().err
    assert "set LOLA_VLLM_STATE_UPLOAD=1" in said and "no server" not in said


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_who_closes_without_an_answer_is_not_called_no_server(answer, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(32 * 2**20))
    with answering(answer) as url, pytest.raises(ClientError, match="was not answered") as found:
        Server(url).upload("/v1/lola/sessions/agent/state", file)
    assert "no server" not in str(found.value)


def test_only_a_refused_connection_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    with pytest.raises(ClientError, match=r"no server answers there .*lola-vllm serve"):
        Server(f"http://127.0.0.1:{free}").sessions()
    with pytest.raises(ClientError, match=r"was not answered .*address is right"):
        Server("http://no-such-host.invalid").sessions()


@pytest.mark.parametrize("body", [b'{"detail":"Not Found"}', b""])
def test_a_server_without_the_routes_is_not_one_without_the_session(body):
    """vLLM's HTTP server in Rust answers with nothing where Python's has a text."""
    with answering(NOT_FOUND % len(body) + body) as url, pytest.raises(
        ClientError, match=f"{url} has no /v1/lola/sessions/agent; start it"
    ):  # fmt: skip
        Server(url).find("agent")
