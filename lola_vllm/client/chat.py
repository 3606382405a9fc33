"""`lola-vllm chat`: a conversation in a terminal whose history only the server has."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

from lola_vllm.client import ClientError
from lola_vllm.client.server import Server, path
from lola_vllm.sessions.names import check_name


def chat(server: Server, session: str | None, options: Mapping[str, Any]) -> int:
    """Read messages from standard input, one a line, and print the answers; until its end.

    Args:
        session: a name; None: a new one. options: fields of a chat completion.

    Raises:
        ClientError: the server refuses, or cannot be reached.
    """
    name = f"chat-{secrets.token_hex(4)}" if session is None else check_name(session)
    there = {found["session"]: found for found in server.sessions()}.get(name)
    at = (there["turn"], there["tokens"]) if there else (0, None)
    _note(
        f"{name}: goes on after turn {at[0]}, {at[1]:,} tokens"
        if there
        else f"{name}: a new session; --session {name} goes on with it later"
    )
    people = sys.stdin.isatty()
    while True:
        if people:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            if people:
                print()
            return 0
        if line.strip():
            at = _say(server, name, line.rstrip("\n"), at, options)


def _say(
    server: Server, name: str, text: str, at: tuple[int, int | None], options: Mapping[str, Any]
) -> tuple[int, int]:
    """Print the answer to a message; the number of the turn and the tokens that it covers."""
    turn, tokens = at
    body = {
        "messages": [{"role": "user", "content": text}],
        # So that nobody else's turn, and no lost one, is gone on from unnoticed.
        "turn": turn,
        "tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    began, first = time.monotonic(), None
    usage: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for event in server.events(path(name, "chat"), body):
        for choice in event.get("choices", ()):
            delta = choice["delta"]
            words = (delta.get("reasoning") or "") + (delta.get("content") or "")
            if words and first is None:
                first = time.monotonic() - began
            print(words, end="", flush=True)
        usage = event.get("usage") or usage
        told = (event.get("kv_transfer_params") or {}).get("lola") or told
    print()
    if not told.get("turn"):
        raise ClientError(f"{name}: the turn is not stored: {told.get('unsaved') or 'no answer'}")
    prompt, restored = usage.get("prompt_tokens", 0), told["restored_tokens"]
    reason = f" ({told['reason']})" if told["reason"] and turn else ""
    _note(
        f"turn {told['turn']}: {restored:,} tokens restored{reason}, {prompt - restored:,} read, "
        f"first word after {first or 0:.2f} s"
    )
    return int(told["turn"]), int(told["tokens"])


def _note(text: str) -> None:
    """Something about the conversation: apart from it, so that answers can be piped."""
    dim = "\033[2m{}\033[0m" if sys.stderr.isatty() else "{}"
    print(dim.format(f"[{text}]"), file=sys.stderr, flush=True)
