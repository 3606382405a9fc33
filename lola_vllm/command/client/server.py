"""Requests to a server with the routes under /v1/lola, with errors that say what to do."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple

from lola_vllm.command.client import ClientError
from lola_vllm.memory.sessions.names import Reference, check_name, parse_reference

SESSIONS = "/v1/lola/sessions"
LIBRARIES = "/v1/lola/libraries"
ANSWER_LIMIT_S = 1800.0  # a long text on a small machine, after other requests


class Written(NamedTuple):
    """A file of a state: its bytes, and the ranks of the model, each of which has a file."""

    bytes: int
    ranks: int


class _EarlyAnswer(http.client.HTTPConnection):
    """A connection whose server may answer, and close, before all of a body is sent.

    A server that refuses a file does not read it. The rest of the body then fails to be sent, while
    the refusal is there to be read.
    """

    def endheaders(self, *args: Any, **options: Any) -> None:
        """Send the headers and the body, or as much of the body as the server takes."""
        try:
            super().endheaders(*args, **options)
        except (BrokenPipeError, ConnectionResetError):
            if self.sock is None:  # it was not connected
                raise


class _EarlyAnswerTLS(_EarlyAnswer, http.client.HTTPSConnection):
    """The same for https."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlyAnswer, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlyAnswerTLS, req)


_OPENER = urllib.request.build_opener(_Http, _Https)


class Server:
    """A running server.

    Args:
        url: with or without the path `/v1`. api_key: sent as a bearer token if given.

    Raises:
        ClientError: `url` is no http or https URL.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{url!r}: must be a server's address, as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def sessions(self) -> list[dict[str, Any]]:
        """The sessions, the last used first."""
        found: list[dict[str, Any]] = self.json("GET", SESSIONS)["sessions"]
        return found

    def session(self, name: str) -> dict[str, Any]:
        """A session with its states."""
        found: dict[str, Any] = self.json("GET", path(name))
        return found

    def find(self, name: str) -> dict[str, Any] | None:
        """A session with its states; None where there is none of this name."""
        try:
            return self.session(name)
        except ClientError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None

    def text(self, session: str) -> str:
        """All that was said in a session or until a turn of it, with the chat template's marks."""
        tokens = self.json("GET", path(session, "tokens", turn=True))["tokens"]
        said: str = self.json("POST", "/detokenize", {"tokens": tokens})["prompt"]
        return said

    def delete(self, session: str) -> str:
        """Delete a session or a turn of it; what is gone and what stays, in words."""
        answer = self.json("DELETE", path(session, turn=True))
        said = f"{answer['deleted']} states deleted"
        if composed := answer.get("composed"):
            said += f"; what was composed of it stays: {', '.join(composed)}"
        return said

    def json(self, method: str, where: str, body: Any = None) -> Any:
        """The JSON of an answer.

        Raises:
            ClientError: no server, no access, or a refusal.
        """
        with self.open(method, where, body) as answer:
            try:
                return json.load(answer)
            except ValueError:
                raise ClientError(f"{self.url}{where}: the answer is no JSON") from None

    def events(self, where: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The objects of a stream.

        Raises:
            ClientError: as `json`, or the stream ends with an error or too early.
        """
        done = False
        with self.open("POST", where, body) as answer:
            for line in answer:
                done = done or line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ClientError(str(event["error"].get("message", event["error"])))
                    yield event
        if not done:
            raise self._broke_off(where, "its end is missing")

    def state(self, session: str, file: Path, rank: int = 0) -> Written:
        """Write a rank's part of a session's state to a new file, completely or not at all."""
        where = path(session, "state", turn=True) + (f"?rank={rank}" if rank else "")
        with self.open("GET", where) as answer, tempfile.NamedTemporaryFile(
            dir=file.resolve().parent, prefix=f".{file.name}.", delete=False
        ) as partial:  # fmt: skip
            aside = Path(partial.name)
            try:
                shutil.copyfileobj(answer, partial)
                size = partial.tell()
                wanted = answer.headers.get("Content-Length")
                if wanted is not None and size != int(wanted):
                    raise ClientError(
                        f"{self.url}{where}: {size} of {wanted} bytes came; try again"
                    )
                partial.flush()
                aside.replace(file)
            finally:
                aside.unlink(missing_ok=True)
        return Written(size, int(answer.headers.get("X-Lola-Ranks", 1)))

    def upload(self, where: str, file: Path) -> Any:
        """Send a file; the JSON of the answer."""
        with file.open("rb") as content:
            return self.json("PUT", where, content)

    @contextmanager
    def open(self, method: str, where: str, body: Any = None) -> Iterator[Any]:
        """An answer, to read.

        Args:
            body: sent as JSON, or an open file.
        """
        headers, data = dict(self._headers), body
        if body is not None and not hasattr(body, "read"):
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        elif body is not None:
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Length"] = str(Path(body.name).stat().st_size)
        request = urllib.request.Request(
            self.url + where, data=data, headers=headers, method=method
        )
        try:
            answer: IO[bytes] = _OPENER.open(request, timeout=ANSWER_LIMIT_S)
        except urllib.error.HTTPError as error:
            raise self._refusal(where, error) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._no_answer(getattr(error, "reason", error)) from None
        try:
            with answer:
                yield answer
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise self._broke_off(where, repr(error)) from None

    def _no_answer(self, reason: object) -> ClientError:
        if isinstance(reason, ConnectionRefusedError):
            return ClientError(
                f"{self.url}: no server answers there ({reason}); start one with 'lola-vllm serve "
                "MODEL', or mend the address"
            )
        return ClientError(
            f"{self.url}: the request was not answered ({reason}); see whether the address is "
            "right and the server runs"
        )

    def _broke_off(self, where: str, how: str) -> ClientError:
        return ClientError(
            f"{self.url}{where}: the answer broke off ({how}); see whether the server runs"
        )

    def _refusal(self, where: str, error: urllib.error.HTTPError) -> ClientError:
        text = error.read(10_000).decode(errors="replace")
        if error.code == HTTPStatus.UNAUTHORIZED:
            return ClientError(
                f"{self.url}: the server wants its API key; give it in VLLM_API_KEY", error.code
            )
        try:
            found = json.loads(text)
            found = found.get("error", found)
            text = str(found.get("message") or found.get("detail") or found)
        except (ValueError, AttributeError):
            pass
        if error.code == HTTPStatus.NOT_FOUND and text in ("Not Found", ""):  # "": vLLM's in Rust
            return ClientError(
                f"{self.url} has no {where}; start it with 'lola-vllm serve', or with "
                "VLLM_PLUGINS=lola and without VLLM_USE_RUST_FRONTEND"
            )
        text = text[:1000] or f"{self.url}{where}: the server answered {error.code}"
        return ClientError(text, error.code)


def path(session: str, verb: str = "", turn: bool = False) -> str:
    """The route of a session.

    Args:
        turn: whether `session` may name a turn, as `agent-7@3`.

    Raises:
        SessionNameError: no session can have this name.
    """
    asked = parse_reference(session, "session") if turn else Reference(check_name(session))
    return f"{SESSIONS}/{asked}" + (f"/{verb}" if verb else "")


def library_path(library: str, verb: str = "") -> str:
    """The route of a library.

    Raises:
        SessionNameError: none can have this name.
    """
    return f"{LIBRARIES}/{check_name(library, 'library')}" + (f"/{verb}" if verb else "")
