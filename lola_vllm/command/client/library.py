"""`lola-vllm library VERB`: documents that a server reads once, and questions to all of them."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse
from collections.abc import Sequence
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_vllm.command.client import ClientError
from lola_vllm.command.client.answers import STREAM, print_answer, source_lines
from lola_vllm.command.client.command import add_verbs, ago, mib, table
from lola_vllm.command.client.documents import documents_of, files_of, read_file
from lola_vllm.command.client.server import LIBRARIES, library_path
from lola_vllm.command.client.terminal import print

if TYPE_CHECKING:
    from lola_vllm.command.client.server import Server

MAX_TOKENS = 300  # of an answer, unless told otherwise
_BAR = 24  # characters
_LIBRARY = "its name, as a session's"


def add_library(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `lola-vllm library`."""
    verb = add_verbs(parser)
    add = verb("add", "read files and folders into a library, each once", _add)
    add.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="text, HTML or PDF")
    add.add_argument("--name", required=True, metavar="LIBRARY", help=_LIBRARY)
    add.add_argument(
        "--ttl",
        type=float,
        metavar="SECONDS",
        help="after how long documents are deleted (default: the server's state_ttl)",
    )
    add.add_argument("--replace", action="store_true", help="documents of the same title")
    show = verb("list", "the libraries of the server, or the documents of one", _list)
    show.add_argument("library", nargs="?", metavar="LIBRARY", help=_LIBRARY)
    show.add_argument("--json", action="store_true", help="JSON instead of a table")
    ask = verb("ask", "a question to a library; the answer names its sources", _ask)
    ask.add_argument("library", metavar="LIBRARY", help=_LIBRARY)
    ask.add_argument("question", metavar="QUESTION", help="in words")
    ask.add_argument("--session", metavar="NAME", help="a new one, to go on with in chat")
    ask.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
                     help="of the answer (default: %(default)s)")  # fmt: skip
    ask.add_argument("--sources", action="store_true", help="the sources alone, without an answer")
    ask.add_argument("--json", action="store_true", help="JSON instead of text")
    remove = verb("remove", "delete a library, or documents of it", _remove)
    remove.add_argument("library", metavar="LIBRARY", help=_LIBRARY)
    remove.add_argument("documents", nargs="*", metavar="DOCUMENT", help="titles (default: all)")


def _add(server: Server, args: argparse.Namespace) -> int:
    files, where = files_of(args.paths), library_path(args.name, "documents")
    options = {"ttl": args.ttl, "replace": args.replace}
    given = {name: value for name, value in options.items() if value is not None}
    refused = 0
    for number, (path, title) in enumerate(files, start=1):
        try:
            for name, text in documents_of(title, read_file(path)):
                before = f"{number} of {len(files)}  {name}"
                _add_text(server, where, before, {"document": name, "text": text, **given})
        except ClientError as error:
            if error.status not in (HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT, None):
                raise
            refused += 1
            _line(f"{title}: not added: {error}")
    if refused:
        print(f"{refused} of {len(files)} documents were not added", file=sys.stderr)
    return 2 if refused else 0


def _add_text(server: Server, where: str, before: str, body: dict[str, Any]) -> None:
    with closing(server.events(where, {**body, "stream": True})) as events:
        for event in events:
            if isinstance(event.get("parts"), int):
                _draw(before, event["part"], event["parts"])
            else:
                added = event
    _line(f"{body['document']}: {added['tokens']:,} tokens, parts: {len(added['parts'])}")


def _draw(before: str, done: int, of: int) -> None:
    """A bar, in a terminal alone."""
    if sys.stdout.isatty():
        filled = _BAR * done // of
        bar = "█" * filled + "·" * (_BAR - filled)
        print(f"{before}  {bar} {done} of {of} parts", end="", flush=True, over=True)


def _line(text: str) -> None:
    print(text, flush=True, over=True)


def _list(server: Server, args: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]]
    if args.library is None:
        found: Any = server.json("GET", LIBRARIES)["libraries"]
        rows = [("library", "documents", "parts", "tokens", "MiB", "last used")]
        rows += [
            (one["library"], one["documents"], one["parts"], f"{one['tokens']:,}",
             mib(one["bytes"]), ago(one["used"]))
            for one in found
        ]  # fmt: skip
    else:
        found = server.json("GET", library_path(args.library))
        rows = [("document", "parts", "tokens", "MiB", "read", "")]
        rows += [
            (one["document"], len(one["parts"]), f"{one['tokens']:,}", mib(one["bytes"]),
             ago(one["created"]), "" if one["complete"] else "incomplete")
            for one in found["documents"]
        ]  # fmt: skip
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        table(rows)
    return 0


def _ask(server: Server, args: argparse.Namespace) -> int:
    if args.sources:
        body: dict[str, Any] = {"question": args.question}
        found = server.json("POST", library_path(args.library, "find"), body)
    else:
        body = {
            "messages": [{"role": "user", "content": args.question}],
            "max_tokens": args.max_tokens, "temperature": 0.0,
            **({} if args.session is None else {"session": args.session}),
        }  # fmt: skip
        if not args.json:
            return _stream(server, args.library, body)
        found = server.json("POST", library_path(args.library, "chat"), body)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(*source_lines(found["sources"]), sep="\n")
    return 0


def _stream(server: Server, library: str, body: dict[str, Any]) -> int:
    def show(sources: Sequence[dict[str, Any]]) -> None:
        print(*source_lines(sources), sep="\n", end="\n\n")

    answer = print_answer(server.events(library_path(library, "chat"), {**body, **STREAM}), show)
    if cut := answer.cut(body["max_tokens"]):
        print(f"[{cut}]", file=sys.stderr)
    return 0


def _remove(server: Server, args: argparse.Namespace) -> int:
    titles: list[str | None] = list(args.documents) or [None]
    for title in titles:
        verb = "" if title is None else f"documents/{urllib.parse.quote(title)}"
        answer = server.json("DELETE", library_path(args.library, verb))
        said = f"{title or args.library}: parts deleted: {answer['deleted']}"
        if composed := answer.get("composed"):
            said += f"; what was composed of it stays: {', '.join(composed)}"
        print(said)
    return 0
