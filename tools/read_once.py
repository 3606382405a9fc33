"""A file, read once: questions about it, and one more after a restart of the server.

    python -m tools.read_once models/qwen-lola docs/privacy.md "What is stored?" "For how long?"

Serves the model twice on one directory of states, and prints what it did. The last question is
asked of the second server.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from lola_vllm.command.client.chat import chat
from lola_vllm.command.client.server import SESSIONS
from lola_vllm.command.client.server import Server as Client
from tools.support.server_process import BIN, serving

SESSION = "file"
SETTLE_S = 3.0  # the end of an answer is written a moment after it
OPTIONS = {"max_tokens": 60, "temperature": 0, "repetition_penalty": 1}


def read(client: Client, file: Path) -> None:
    """Let the server read a file at the start of a new session."""
    message = {"role": "system", "content": f"Answer from this text.\n\n{file.read_text()}"}
    began = time.monotonic()
    body = {"messages": [message], "turn": 0}
    said = client.json("POST", f"{SESSIONS}/{SESSION}/append", body)
    print(f"read {file.name}: {said['tokens']:,} tokens, {time.monotonic() - began:.0f} s")


class Typed(io.StringIO):
    """Lines that are printed when they are read, as a terminal shows what is typed."""

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """The next line, "" at the end."""
        line = super().readline(size)
        print(f"> {line}" if line else "", end="", flush=True)
        return line


def ask(client: Client, questions: Sequence[str]) -> None:
    """Ask as `lola-vllm chat` does, and print what it prints."""
    terminal = sys.stdin
    sys.stdin = Typed("".join(f"{question}\n" for question in questions))
    try:
        with redirect_stderr(sys.stdout):
            chat(client, SESSION, OPTIONS)
    finally:
        sys.stdin = terminal


def main(argv: Sequence[str] | None = None) -> None:
    """What the program does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a LoLA model")
    parser.add_argument("file", type=Path, help="a text")
    parser.add_argument(
        "questions", nargs="+", metavar="QUESTION", help="the last one is for after the restart"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = [str(BIN / "lola-vllm"), "serve", str(args.model)]
        command += ["--lola-state-dir", str(place / "states")]
        with serving(place / "first.txt", command) as running:
            read(Client(running.url), args.file)
            ask(Client(running.url), args.questions[:-1])
            time.sleep(SETTLE_S)
        print("the server stops, and starts again")
        with serving(place / "second.txt", command) as running:
            ask(Client(running.url), args.questions[-1:])


if __name__ == "__main__":
    main()
