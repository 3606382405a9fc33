"""`lola-vllm inspector`: the page on this machine, for a server that wants an API key.

A browser cannot send a key when it opens an address, and vLLM does not answer pages of other sites.
So this module serves the page, and passes its requests on with the key that the user typed into it.

Only requests whose host is this machine are answered. Another site could let its own name point to
this machine (DNS rebinding), and a browser would then treat this server as part of that site.
"""

from __future__ import annotations

import http.client
import json
import re
import reprlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from lola_vllm.serving.inspector import inspector_page
from lola_vllm.serving.protocol import MAX_BODY_BYTES

PAGE = "/v1/lola/inspector"
MEMORY = "/v1/lola/memory"
# The list, and the tokens of one: what the page reads of stored sessions.
SESSIONS = re.compile(r"/v1/lola/sessions(/[A-Za-z0-9._-]{1,64}/tokens)?")
ANSWER_LIMIT_S = 300


class InspectorError(ValueError):
    """An address that cannot be a server's."""


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

    def ask(
        self, body: bytes | None, authorization: str | None, path: str = MEMORY
    ) -> tuple[int, bytes]:
        """Status and JSON of the server's answer, 502 if there is none.

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
            method = "GET" if body is None else "POST"
            connection.request(method, self.target.path + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            message = f"no answer from {self.target.geturl()}: {error}"
            return HTTPStatus.BAD_GATEWAY, _error(message)
        finally:
            connection.close()


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Inspector

    def do_GET(self) -> None:
        if not self._meant():
            return
        if self.path == PAGE:
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", inspector_page().encode())
        elif SESSIONS.fullmatch(self.path):
            # A page of another site cannot read the answer, and cannot send a key.
            status, answer = self.server.ask(None, self.headers.get("Authorization"), self.path)
            self._answer(status, "application/json", answer)
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
        known = self.path == MEMORY and self.headers.get_content_type() == "application/json"
        if not known or not length.isdigit():
            self._refuse(HTTPStatus.BAD_REQUEST, f"only JSON for {MEMORY} is passed on")
            return
        if int(length) > MAX_BODY_BYTES:
            message = f"the question has {length} bytes; at most {MAX_BODY_BYTES} are read"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return
        status, answer = self.server.ask(
            self.rfile.read(int(length)), self.headers.get("Authorization")
        )
        self._answer(status, "application/json", answer)

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
        self._answer(status, "application/json", _error(message))

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
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
