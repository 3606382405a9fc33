"""`lola-vllm inspector`: the page on this machine, for a server whose own page cannot be opened.

That is so where a proxy passes on /v1 only, or where the server's version has another page. vLLM
does not answer pages of other sites. So this module serves the page, and passes its requests on
with the key that the user typed into it.

Only requests whose host is this machine are answered. Another site could let its own name point to
this machine (DNS rebinding), and a browser would then treat this server as part of that site.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

from lola_vllm.serving.inspector import ROUTE, page_file
from lola_vllm.serving.protocol import MAX_BODY_BYTES
from lola_vllm.serving.static import HEADERS

PAGE = ROUTE
MEMORY = "/v1/lola/memory"
COMPLETIONS = "/v1/completions"
LIBRARIES = "/v1/lola/libraries"
_NAME = r"[A-Za-z0-9._-]{1,64}"
# What the page reads: facts about the server, the lists of sessions and libraries, the tokens of a
# session or of a turn.
READS = re.compile(
    rf"/v1/lola/info|{LIBRARIES}|/v1/lola/sessions(/{_NAME}(@[0-9]{{1,9}})?/tokens)?"
)
# What it asks: memory, answers, and questions to a library.
ASKS = re.compile(rf"{MEMORY}|{COMPLETIONS}|{LIBRARIES}/{_NAME}/chat")
ANSWER_LIMIT_S = 300
PART_BYTES = 2**16
JSON = "application/json"


class InspectorError(ValueError):
    """An address that cannot be a server's."""


class Answer(NamedTuple):
    """A server's answer: its status, content type, and body part by part."""

    status: int
    kind: str
    parts: Iterator[bytes]


class Inspector(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1 and passes its requests on to `server`.

    Args:
        server: base URL of a vLLM server. port: to listen on; 0 takes a free one.

    Raises:
        InspectorError: `server` is no http or https URL.
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, server: str, port: int) -> None:
        self.target = urlsplit(server.rstrip("/"))
        if self.target.scheme not in ("http", "https") or not self.target.hostname:
            raise InspectorError(
                f"--url = {server!r}: must be a server's address, as http://127.0.0.1:8000"
            )
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def hosts(self) -> set[str]:
        """Allowed values of a request's `Host`. Browsers omit port 80."""
        names = ("localhost", "127.0.0.1", "[::1]")
        port = self.server_port
        return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    @property
    def url(self) -> str:
        """Where to open the page."""
        return f"http://127.0.0.1:{self.server_port}{PAGE}"

    @contextlib.contextmanager
    def ask(
        self, body: bytes | None, authorization: str | None, path: str = MEMORY
    ) -> Iterator[Answer]:
        """The server's answer; of status 502 if there is none.

        Args:
            body: JSON to post; None: the path is read.
        """
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        assert self.target.hostname is not None
        connection = kinds[self.target.scheme](
            self.target.hostname, self.target.port, timeout=ANSWER_LIMIT_S
        )
        headers = {} if body is None else {"Content-Type": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        try:
            try:
                method = "GET" if body is None else "POST"
                connection.request(method, self.target.path + path, body, headers)
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                message = f"no answer from {self.target.geturl()}: {error}"
                yield Answer(HTTPStatus.BAD_GATEWAY, JSON, iter([_error(message)]))
                return
            kind = answer.headers.get("Content-Type", JSON)
            yield Answer(answer.status, kind, iter(lambda: answer.read1(PART_BYTES), b""))
        finally:
            connection.close()


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Inspector

    def do_GET(self) -> None:
        if not self._meant():
            return
        file = page_file(self.path.split("?")[0])
        if file is not None:
            # The pages that it links to are not here.
            body = file.body.replace(b'<nav id="links"', b'<nav hidden id="links"')
            self._answer(HTTPStatus.OK, file.kind, body, HEADERS)
        elif READS.fullmatch(self.path):
            # A page of another site cannot read the answer, and cannot send a key.
            self._pass_on(None)
        else:
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", PAGE)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_POST(self) -> None:
        if not self._meant():
            return
        length = self.headers.get("Content-Length", "")
        # A page of another site cannot send this content type without a preflight request.
        known = ASKS.fullmatch(self.path) is not None
        known = known and self.headers.get_content_type() == "application/json"
        if not known or not length.isdigit():
            message = (
                f"only JSON for {MEMORY}, {COMPLETIONS} and {LIBRARIES}/NAME/chat is passed on"
            )
            self._refuse(HTTPStatus.BAD_REQUEST, message)
            return
        if int(length) > MAX_BODY_BYTES:
            message = f"the question has {length} bytes; at most {MAX_BODY_BYTES} are read"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return
        self._pass_on(self.rfile.read(int(length)))

    def _pass_on(self, body: bytes | None) -> None:
        """Answer with what the server answers, as it comes: answers of models are streams."""
        with self.server.ask(body, self.headers.get("Authorization"), self.path) as answer:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Connection", "close")  # its end is the end of the answer
            self.end_headers()
            self.close_connection = True
            try:
                for part in answer.parts:
                    self.wfile.write(part)
            except (OSError, http.client.HTTPException):
                pass  # one of the two ended it; what came so far has been passed on

    def _meant(self) -> bool:
        """Whether the request names this server; refuses it if not."""
        host = self.headers.get("Host", "")
        if host.lower() in self.server.hosts:
            return True
        message = f"Host = {reprlib.repr(host)}: not this server; open {self.server.url}"
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST, message)
        return False

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # the request may have a body, which is not read
        self._answer(status, JSON, _error(message))

    def _answer(
        self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log no single requests."""


def inspect(server: str, port: int) -> int:
    """What the command `lola-vllm inspector` does; returns when it is interrupted."""
    with Inspector(server, port) as inspector:
        print(f"open {inspector.url} (asks {server}; Ctrl-C ends it)", flush=True)
        try:
            inspector.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
