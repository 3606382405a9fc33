"""A server that stands in for one with the routes under /v1/lola/sessions: it speaks by script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SESSIONS = "/v1/lola/sessions"
LIBRARIES = "/v1/lola/libraries"


@dataclass
class Script:
    """What is answered, in order, and what was asked.

    Attributes:
        answers: of each message: its words, and how it ends: a finish reason; "hangs": words come
            no more until the client leaves, and the message is kept; "unread": the same, and
            nothing is kept; "kept": the same, and all is kept; "dies": the connection breaks.
        sessions: (turn, tokens, kind) by name. bodies: of the messages. refusals: status and
            message by method and path. texts: of sessions. used: when, by name. deleted: names.
            composed: sessions that are made of one, by its name. sources: of a library's answers.
        recalled: the segment that comes back for who recalls.
    """

    url: str = ""
    answers: list[tuple[list[str], str]] = field(default_factory=list)
    sessions: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refusals: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    composed: dict[str, list[str]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    recalled: dict[str, Any] | None = None
    ranks: int = 1
    left: threading.Event = field(default_factory=threading.Event)

    def describe(self, name: str) -> dict[str, Any]:
        turn, tokens, kind = self.sessions[name]
        state = {"turn": turn, "kind": kind, "tokens": tokens, "bytes": 2**20, "tiers": ["memory"],
                 "created": 0.0}  # fmt: skip
        return {"session": name, "turn": turn, "turns": [turn], "tokens": tokens, "bytes": 2**20,
                "created": 0.0, "used": self.used.get(name, 0.0),
                "segments": self.segments.get(name, 0),
                "states": [state]}  # fmt: skip


@contextmanager
def standing_in() -> Iterator[Script]:
    """A server with an empty script."""
    script = Script()

    class Handler(_Handler):
        pass

    Handler.script = script
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._send({"error": {"message": message, "code": status}}, status)

    def _answer(self) -> None:
        script, where = self.script, self.path.partition("?")[0]
        body = self._body()
        if (self.command, where) in script.refusals:
            self._refuse(*script.refusals[self.command, where])
            return
        if where == SESSIONS:
            self._send({"sessions": [script.describe(name) for name in script.sessions]})
            return
        if where == "/detokenize":
            self._send({"prompt": bytes(body["tokens"]).decode()})
            return
        name, _, verb = where.removeprefix(f"{SESSIONS}/").partition("/")
        if where.startswith(LIBRARIES):  # a session is composed, and then it is asked
            script.bodies.append(body)
            session = body.get("session", "")
            script.sessions[session] = 1, 40, "prompt"
            self._speak(session, script.sources)
        elif verb == "chat":
            script.bodies.append(body)
            self._speak(
                name,
                script.sources if body.get("library") else None,
                script.recalled if body.get("recall") else None,
            )
        elif name not in script.sessions:
            self._refuse(404, f"nothing is stored under {name!r}")
        elif self.command == "DELETE":
            script.deleted.append(name)
            del script.sessions[name]
            left = script.composed.get(name)
            self._send({"deleted": 2, **({"composed": left} if left else {})})
        elif verb == "tokens":
            self._send({"session": name, "turn": 1, "tokens": list(script.texts[name].encode())})
        elif verb == "state":
            rank = self.path.partition("rank=")[2] or "0"
            self._send(f"{name} {rank}".encode(), headers={"X-Lola-Ranks": str(script.ranks)})
        else:
            self._send(script.describe(name))

    do_GET = do_POST = do_DELETE = _answer

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _speak(
        self,
        name: str,
        sources: list[dict[str, Any]] | None = None,
        recalled: dict[str, Any] | None = None,
    ) -> None:
        script = self.script
        words, end = script.answers.pop(0)
        turn, tokens, _ = script.sessions.get(name, (0, 0, "answer"))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if end in ("hangs", "dies"):
            script.sessions[name] = (turn + 1, tokens + 10, "prompt")
        elif end != "unread":
            script.sessions[name] = (turn + 1, tokens + 10 + len(words), "answer")
        waits = end in ("hangs", "unread", "kept")
        found = {} if sources is None else {"sources": sources}
        with suppress(ConnectionError):  # the client may leave in the middle of a word
            if found:
                self._event({"choices": [], **found})
            for word in words:
                self._event({"choices": [{"delta": {"content": word}, "finish_reason": None}]})
            if waits:
                self.connection.recv(1)  # nothing, when the client has left
        if waits:
            script.left.set()
        if end in ("hangs", "unread", "kept", "dies"):
            self.close_connection = True
            return
        self._event({"choices": [{"delta": {"content": ""}, "finish_reason": end}]})
        again = recalled["last"] - recalled["first"] if recalled else 0
        if sources and turn > 1:  # the first stands next to the question
            again = sources[0]["tokens"]
        usage = {"prompt_tokens": again + tokens + 10, "completion_tokens": len(words)}
        self._event({"choices": [], "usage": usage})
        told = {"session": name, "turn": turn + 1, "tokens": tokens + 10 + len(words),
                "restored_tokens": tokens, "reason": None,
                **({"recalled": recalled} if recalled else {})}  # fmt: skip
        self._event({"choices": [], "kv_transfer_params": {"lola": told}, **found})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read what was asked from the script."""
