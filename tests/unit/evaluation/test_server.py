"""Evaluating a served model: a small server of our own speaks vLLM's HTTP API."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lola_vllm.command import cli
from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation import server as server_module
from lola_vllm.evaluation.server import Connection, ServerModel

KEY = "secret-key"


class FakeServer(ThreadingHTTPServer):
    """Tokens are characters. The model repeats the last number of the prompt's needle.

    Attributes:
        failures: statuses to answer with before anything works. most: requests seen at once.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models = {"tiny": 4096}
        self.failures: list[int] = []
        self.broken = ""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.two = threading.Event()  # two requests were here at once


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, value: Any) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.handle_any({})

    def do_POST(self) -> None:
        self.handle_any(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_any(self, body: dict[str, Any]) -> None:
        server = self.server
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, {"error": "Unauthorized"})
        with server.lock:
            server.requests.append((self.path, body))
            server.now += 1
            server.most = max(server.most, server.now)
            failure = server.failures.pop() if server.failures else None
            if server.most > 1:
                server.two.set()
        if self.path == "/v1/completions":
            server.two.wait(0.2)  # for a second one, or nothing would show that there can be two
        try:
            if failure:
                return self.answer(failure, {"error": {"message": "try later"}})
            if server.broken == self.path:
                return self.answer(200, "<html>")
            self.answer(*getattr(self, self.path.strip("/").replace("/", "_"))(body))
        finally:
            with server.lock:
                server.now -= 1

    def v1_models(self, body: dict[str, Any]) -> tuple[int, Any]:
        models = self.server.models.items()
        return 200, {"data": [{"id": name, "max_model_len": n} for name, n in models]}

    def tokenize(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "messages" in body:
            text = f"<{body['messages'][0]['content']}>"
        else:
            text = ("^" if body["add_special_tokens"] else "") + body["prompt"]
        return 200, {"tokens": [ord(c) for c in text], "count": len(text)}

    def detokenize(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"prompt": "".join(map(chr, body["tokens"]))}

    def v1_completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["prompt"]) + body["max_tokens"] > 4096:
            return 400, {"error": {"message": "too long for this model"}}
        text = "".join(map(chr, body["prompt"]))
        (value,) = re.findall(r"is: (\d+)\.", text) or ["?"]
        choice: dict[str, Any] = {"text": f" {value}."}
        if body.get("echo"):
            # The generated token has a log-probability too, which is none of the prompt's.
            values = [None, *(-i / 100 for i in range(1, len(body["prompt"]))), -99.0]
            # Of the likeliest token and, where it is another one, of the prompt's.
            likely = [None, *({"a": v, "b": v if i % 2 else 0.0} for i, v in enumerate(values[1:]))]
            choice["logprobs"] = {"token_logprobs": values, "top_logprobs": likely}
        return 200, {"choices": [choice]}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = FakeServer()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "RETRY_WAIT_S", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def model(server: FakeServer, **changes: Any) -> ServerModel:
    options: dict[str, Any] = {"name": None, "api_key": KEY, "tokenizer": None, "batch": 4}
    return ServerModel(**{"url": server.url, **options, **changes})


def recall(server: FakeServer, out: Path, *options: str) -> int:
    argv = ["eval", "recall", "--model", server.url, "--api-key", KEY, "--out", str(out)]
    argv += ["--tasks", "niah-1", "--lengths", "1024,2048", "--samples", "6", *options]
    return cli.main(argv)


def test_recall_over_http(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall(server, tmp_path / "out", "--batch", "3") == 0
    said = capsys.readouterr()
    assert "| tiny    | 100% [61%, 100%] | 100% [61%, 100%] |" in said.out
    line = f"tiny at {server.url}: 12 questions (1,024, 2,048 tokens), about"
    assert said.err.startswith(line)
    text = (tmp_path / "out" / "recall.json").read_text()
    assert KEY not in text and server.url not in text
    (row,) = json.loads(text)["settings"]
    assert (row["name"], row["finished"], len(row["samples"])) == ("tiny", True, 12)
    summary = json.loads((tmp_path / "out" / "recall.summary.json").read_text())
    (short,) = summary["settings"]
    assert (summary["made_by"], short["finished"]) == ("lola-vllm eval recall", True)
    assert [cell["exact"] for cell in short["cells"]] == [6, 6] and "samples" not in short
    asked = [body for path, body in server.requests if path == "/v1/completions"]
    # Nothing is left to the served model's generation_config.json.
    exact = {"temperature": 0, "repetition_penalty": 1, "presence_penalty": 0}
    assert all(body.items() >= {"model": "tiny", **exact}.items() for body in asked)
    assert all(body["prompt"][0] == ord("^") for body in asked)
    assert 1 < server.most <= 3  # concurrent, but no more than --batch


def test_chat_format_goes_through_the_servers_template(server: FakeServer, tmp_path: Path) -> None:
    assert recall(server, tmp_path, "--format", "chat") == 0
    asked = [body["prompt"] for path, body in server.requests if path == "/v1/completions"]
    for ids in asked:
        text = "".join(map(chr, ids))
        assert text.startswith("<A special magic number")
        assert re.search(r"text\?>The special magic number for \S+ mentioned .* is$", text)


def test_the_key_may_come_from_the_environment(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["eval", "recall", "--model", server.url + "/v1", "--out", str(tmp_path)]
    argv += ["--tasks", "niah-1", "--lengths", "1024", "--samples", "1"]
    assert cli.main(argv) == 2
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert cli.main(argv) == 0


def test_predictions_are_those_of_the_prompt(server: FakeServer) -> None:
    first, second = model(server).predictions([[7] * 3, [7] * 5])
    assert first == [(-0.01, False), (-0.02, True)]
    assert second == [(-0.01, False), (-0.02, True), (-0.03, False), (-0.04, True)]


def test_perplexity_over_http(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lola_vllm.training.texts import SEPARATOR, is_held_out

    documents = [f"Document {i} says {'very ' * i}little." for i in range(400)]
    (tmp_path / "tale.txt").write_text(SEPARATOR.join(documents))
    argv = ["eval", "perplexity", "--model", server.url, "--api-key", KEY]
    argv += ["--texts", str(tmp_path), "--windows", "5", "--window-length", "100"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "perplexity.json").read_text())["settings"]
    # The special token opens every window; all 99 others are predicted, each a byte long.
    assert [(s["tokens"], s["bytes"]) for s in row["samples"]] == [(99, 99)] * 5
    assert all(s["nats"] == pytest.approx(sum(range(1, 100)) / 100) for s in row["samples"])
    asked = [b["prompt"] for path, b in server.requests if path == "/v1/completions"]
    held_out = "\n\n".join(filter(is_held_out, documents))
    assert all("".join(map(chr, ids))[1:] in held_out for ids in asked)
    assert "| tale |       5 |" in capsys.readouterr().out


def test_a_busy_server_is_asked_again(server: FakeServer) -> None:
    server.failures = [503, 429]
    assert Connection(server.url, KEY).ask("/v1/models", "data")
    server.failures = [503] * 10
    with pytest.raises(EvalError, match="503: try later"):
        Connection(server.url, KEY).ask("/v1/models", "data")


def test_errors_name_the_remedy(server: FakeServer, tmp_path: Path) -> None:
    for options, message in (
        ({"api_key": "wrong"}, "refused access .401.; give the right key with --api-key"),
        ({"api_key": None}, "refused access"),
        ({"name": "other"}, "serves tiny; --served-model: 'other' is not among them"),
        ({"url": "http://127.0.0.1:9"}, "no server answers there .*vllm serve MODEL"),
        ({"url": "http://"}, "no server answers|not a URL"),
        ({"tokenizer": tmp_path / "no"}, "no such directory; give one that holds a tokenizer"),
    ):
        with pytest.raises(EvalError, match=message):
            model(server, **options)
    server.models["second"] = 4096
    with pytest.raises(EvalError, match="serves tiny, second; --served-model: name one"):
        model(server)
    assert model(server, name="second").name == "second"
    with pytest.raises(EvalError, match=r"400: too long for this model"):
        model(server, name="tiny").complete([[7] * 4096], 1)


def test_a_server_without_openais_api(server: FakeServer) -> None:
    for path in ("/v1/models", "/tokenize", "/v1/completions"):
        server.broken = path
        with pytest.raises(EvalError, match=r"has no .*; is this an OpenAI-compatible server"):
            found = model(server)
            found.tokenizer.encode("a", special=True)
            found.complete([[7]], 1)


def test_a_length_beyond_the_server_is_refused_before_it_is_asked(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall(server, tmp_path, "--lengths", "8192") == 2
    assert "8192 tokens: the server takes 4096" in capsys.readouterr().err
    assert not [path for path, _ in server.requests if path == "/v1/completions"]


@pytest.mark.parametrize("option", ['--engine-args={"a": 1}', "--untrained-positions"])
def test_options_of_directories_are_refused(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert recall(server, tmp_path, option) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_an_interrupted_run_goes_on(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall(server, tmp_path) == 0
    whole = json.loads((tmp_path / "recall.json").read_text())
    # As if it had been stopped after 5 of 12 samples.
    stopped = json.loads(json.dumps(whole))
    stopped["settings"][0]["samples"] = whole["settings"][0]["samples"][:5]
    stopped["settings"][0]["finished"] = False
    (tmp_path / "recall.json").write_text(json.dumps(stopped))

    assert recall(server, tmp_path) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert recall(server, tmp_path, "--resume", "--samples", "7") == 2
    assert "of another plan: samples was 6, is 7" in capsys.readouterr().err

    server.requests.clear()
    assert recall(server, tmp_path, "--resume") == 0
    assert len([path for path, _ in server.requests if path == "/v1/completions"]) == 7
    resumed = json.loads((tmp_path / "recall.json").read_text())
    assert resumed["settings"][0]["samples"] == whole["settings"][0]["samples"]
    server.requests.clear()
    assert recall(server, tmp_path, "--force") == 0
    assert len([path for path, _ in server.requests if path == "/v1/completions"]) == 12


def test_what_was_answered_before_a_failure_is_kept(server: FakeServer, tmp_path: Path) -> None:
    calls = 0
    real = Handler.v1_completions

    def failing(self: Handler, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal calls
        calls += 1
        return real(self, body) if calls <= 4 else (500, {"error": {"message": "out of order"}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "v1_completions", failing)
        assert recall(server, tmp_path, "--batch", "2") == 2
    (row,) = json.loads((tmp_path / "recall.json").read_text())["settings"]
    assert len(row["samples"]) == 4 and row["finished"] is False
    assert recall(server, tmp_path, "--batch", "2", "--resume") == 0
