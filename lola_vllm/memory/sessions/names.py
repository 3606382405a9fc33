"""Names of sessions, and references to what is stored under them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import NamedTuple

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
AUTOMATIC = "auto-"
SHARED = "shared-"
LIBRARY = "library-"
PAST = f"{LIBRARY}past"  # the library of sessions' own segments, each session's id a document
# Names that begin so are the server's own: conversations without a name, and shared prefixes.
UNNAMED = (AUTOMATIC, SHARED)
# So are the parts of a library's documents, and what is composed of them to answer a question.
RESERVED = (*UNNAMED, LIBRARY)
MAX_TITLE = 200  # characters of a document's name
MAX_PARTS = 10_000  # of a document
MAX_SHOWN = 60
MAX_SOURCES = 64  # sessions that are composed to one


class SessionNameError(ValueError):
    """A name that no session can have, or a reference that cannot be read."""


class Part(NamedTuple):
    """A part of a library's document: a session of its own.

    Attributes:
        library: its name, as a session's. document: its title. part: from 1 on. parts: of it.
    """

    library: str
    document: str
    part: int = 1
    parts: int = 1


def part_session(addition: str, number: int | None = None) -> str:
    """The session of a part of a document.

    Args:
        addition: 24 hex digits, the same for all parts that were read at once. number: which part;
            None: of a document that has no other version.
    """
    return f"{LIBRARY}{addition}" + ("" if number is None else f"-{number}")


def addition_of(session: str) -> str:
    """What tells the parts of one addition of a document from those of another; empty: nothing."""
    found = re.fullmatch(rf"{LIBRARY}([0-9a-f]{{24}})-\d+", session)
    return "" if found is None else found[1]


class Reference(NamedTuple):
    """A session and, where one is asked for, a turn of it."""

    session: str
    turn: int | None = None

    def __str__(self) -> str:
        return self.session if self.turn is None else f"{self.session}@{self.turn}"


def check_name(name: object, field: str = "session") -> str:
    """Return the name.

    Args:
        field: what the error calls it.

    Raises:
        SessionNameError: it is no text of 1 to 64 letters, digits, dots, underscores and dashes.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SessionNameError(
            f"{field} = {shown(name)}: must be 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        )
    return name


def check_new_name(name: object, field: str = "session") -> str:
    """Return a name that somebody gives to a session.

    Raises:
        SessionNameError: as `check_name`, or the name is one that only the server gives.
    """
    name = check_name(name, field)
    if name.startswith(RESERVED):
        raise SessionNameError(
            f"{field} = {name!r}: names that begin with {' or '.join(map(repr, RESERVED))} are "
            "given by the server; take another, or give such a session another name first"
        )
    return name


def check_title(title: object, field: str = "document") -> str:
    """Return the name of a library's document.

    Raises:
        SessionNameError: it is no text of 1 to 200 characters, or has one that acts in a terminal.
    """
    acts = isinstance(title, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", title)
    if not isinstance(title, str) or not 1 <= len(title) <= MAX_TITLE or acts:
        raise SessionNameError(
            f"{field} = {shown(title)}: must be 1 to {MAX_TITLE} characters without control "
            "characters"
        )
    return title


def shown(value: object) -> str:
    """A value of a request, for an error: short, however large the value is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]!r}..."
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


def parse_reference(text: object, field: str = "from") -> Reference:
    """Read `agent-7` or `agent-7@3`, the third turn of it.

    Raises:
        SessionNameError: the name or the number is none.
    """
    name, at, turn = text.partition("@") if isinstance(text, str) else (text, "", "")
    name = check_name(name, field)
    if not at:
        return Reference(name)
    if not re.fullmatch(r"[1-9]\d{0,8}", turn):
        raise SessionNameError(
            f"{field} = {shown(text)}: '@' must be followed by the number of a turn, from 1 on"
        )
    return Reference(name, int(turn))


def is_unnamed(session: str) -> bool:
    """Whether nobody gave a session this name."""
    return session.startswith(UNNAMED)


def automatic_name() -> str:
    """A new name for a conversation that nobody named."""
    return AUTOMATIC + secrets.token_hex(8)
