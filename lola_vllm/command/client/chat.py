"""`lola-vllm chat`: a conversation in a terminal whose history only the server has."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.answers import STREAM, print_answer, source_lines
from lola_vllm.command.client.server import Server, library_path, path
from lola_vllm.command.client.terminal import print
from lola_vllm.memory.sessions.names import check_name

# Tokens of an answer, unless told otherwise: without a bound, vLLM goes on to --max-model-len.
MAX_TOKENS = 1024
SETTLE_S = 2.0  # that the state of a message that was broken off is waited for


class SessionPlace(NamedTuple):
    """Where a session is: its last turn (0: it is new), and the tokens that this turn covers."""

    turn: int
    tokens: int | None


def chat(
    server: Server,
    session: str | None,
    options: Mapping[str, Any],
    library: str | None = None,
    recall: bool = False,
) -> int:
    """Read messages from standard input, one a line, and print the answers; until its end.

    At a terminal Ctrl-C ends an answer, and between answers the chat.

    Args:
        session: a name; None: a new one. options: fields of a chat completion. library: which each
            message is asked of; a new session goes on from what the first reads of it. recall:
            whether a segment of the chat's own text comes back for each message.

    Raises:
        ClientError: the server refuses, or cannot be reached.
        KeyboardInterrupt: Ctrl-C where messages do not come from a terminal.
    """
    name = f"chat-{secrets.token_hex(4)}" if session is None else check_name(session)
    people = sys.stdin.isatty()
    conversation = _Conversation(server, name, options, people, library, recall)
    while True:
        try:
            if people:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if not people:
                raise
            line = ""
        if not line:
            if people:
                print()
            return 0
        if line.strip():
            conversation.say(line.rstrip("\n"))


class _Conversation:
    """A session and where it is.

    Args:
        people: whether Ctrl-C ends an answer only. library, recall: as of `chat`.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        options: Mapping[str, Any],
        people: bool,
        library: str | None,
        recall: bool,
    ) -> None:
        self.server, self.name, self.options, self.people = server, name, options, people
        self.library = library
        self.asks = {"recall": "segments"} if recall else {"library": library} if library else {}
        self.broken = False  # whether the last answer was broken off
        found = server.find(name)
        self.at = (
            SessionPlace(0, None) if found is None else SessionPlace(found["turn"], found["tokens"])
        )
        _note(
            f"{name}: goes on after turn {self.at.turn}, {self.at.tokens:,} tokens"
            if self.at.turn
            else f"{name}: a new session; --session {name} goes on with it later"
        )

    def say(self, text: str) -> None:
        """Print the answer to a message."""
        if self.broken:
            self._follow()  # the server may have read that message since
            self.broken = False
        before = self.at
        # So that nobody else's turn, and no lost one, is gone on from unnoticed.
        where, place = path(self.name, "chat"), {**before._asdict(), **self.asks}
        if self.library is not None and not before.turn:  # it begins the session
            where, place = library_path(self.library, "chat"), {"session": self.name}
        body = {
            "messages": [{"role": "user", "content": text}],
            **place,
            **STREAM,
            **self.options,
        }
        try:
            answer = print_answer(self.server.events(where, body), _show)
        except KeyboardInterrupt:
            print()
            if not self.people:
                raise
            self.broken = True
            _note("broken off")
            return
        told, usage = answer.told, answer.usage
        if not told.get("turn"):
            raise ClientError(
                f"{self.name}: the turn is not stored: {told.get('unsaved') or 'no answer'}"
            )
        if cut := answer.cut(self.options.get("max_tokens", 0)):
            _note(cut)
        if told.get("unsaved"):
            _note(f"the answer's text is not part of the memory: {told['unsaved']}")
        if told.get("unwritten"):
            _note(f"the turn is in the server's memory only: {told['unwritten']}")
        prompt, restored = usage.get("prompt_tokens", 0), told["restored_tokens"]
        if answer.sources and before.turn:  # the part next to the question is none of the session
            prompt -= answer.sources[0]["tokens"]
        if recalled := told.get("recalled"):  # nor is this
            prompt -= recalled["last"] - recalled["first"]
            _note(
                f"recalled tokens {recalled['first']:,} to {recalled['last'] - 1:,}: "
                f"{recalled['sentence']}"
            )
        reason = f" ({told['reason']})" if told["reason"] and before.turn else ""
        _note(
            f"turn {told['turn']}: {restored:,} tokens restored{reason}, {prompt - restored:,} "
            f"read, first word after {answer.first:.2f} s"
        )
        self.at = SessionPlace(int(told["turn"]), int(told["tokens"]))

    def _follow(self) -> None:
        """Take the place of the turn that was broken off, if it is stored: where its last state
        was taken. No other turn is taken: the server refuses to go on, and says why."""
        deadline, following = time.monotonic() + SETTLE_S, self.at.turn + 1
        begins = self.library is not None and not self.at.turn
        following += begins  # what is composed for the question is a turn before it
        while (found := self.server.find(self.name)) is None or found["turn"] != following:
            if time.monotonic() > deadline:
                _note("the message that was broken off is not part of the memory")
                if begins and found is not None:
                    self.at = SessionPlace(found["turn"], found["tokens"])
                return
            time.sleep(0.05)
        self.at = SessionPlace(found["turn"], found["tokens"])
        answer = "all of the answer" if found["states"][-1]["kind"] == "answer" else "no answer"
        _note(
            f"the message that was broken off is part of the memory, and {answer}: "
            f"turn {self.at.turn}, {self.at.tokens:,} tokens"
        )


def _note(text: str) -> None:
    """Something about the conversation: apart from it, so that answers can be piped."""
    print(f"[{text}]", file=sys.stderr, flush=True, dim=True)


def _show(sources: Sequence[dict[str, Any]]) -> None:
    for line in source_lines(sources):
        _note(line)
