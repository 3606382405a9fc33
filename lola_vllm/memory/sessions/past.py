"""Segments of a session's text that were read apart, to come back for a question.

They are parts of documents of a library of the server's own, `names.PAST`: a session's document has
its id, which stays when the session is renamed, and its parts are numbered as the segments. So
owners, budgets and encryption are those of libraries. A segment counts only while its tokens are
the session's. It expires with the session, goes with it however that goes, and has a file only
while the session has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lola_vllm.memory.sessions.catalog import Catalog
from lola_vllm.memory.sessions.prefix_hash import Tokens
from lola_vllm.memory.sessions.tiers import Stored

TOLERANCE_S = 60.0  # of the time at which a session's segments expire


class Segments(NamedTuple):
    """Segments of a session: those that are kept, by number from 0 on, and stale ones, which are of
    another text."""

    kept: dict[int, Stored]
    stale: list[Stored]


def segments_with(store: Catalog, states: Iterable[Stored]) -> list[Stored]:
    """All that are kept of the sessions that some states are of."""
    return store.segments_of({state.header.session_id for state in states})


def is_of(store: Catalog, segment: Stored, tokens: Tokens) -> bool:
    """Whether a segment is of a text.

    Args:
        tokens: of the text.
    """
    header, n = segment.header, segment.header.num_tokens
    own = tokens[(header.part - 1) * n : header.part * n]
    if len(own) < n:
        return False
    hashes = store.prefix_hashes(own, header.adapter, header.salt)
    return hashes.prefix_hash(n).hex() == header.prefix_hash


def segments_of(store: Catalog, newest: Stored, tokens: Tokens, size: int) -> Segments:
    """The segments of a session's text.

    Args:
        newest: the state of the session. tokens: of it. size: tokens of a segment.
    """
    own = store.sessions[newest.session].states.values()
    kept: dict[int, Stored] = {}
    stale: list[Stored] = []
    for state in segments_with(store, own):
        number = state.header.part - 1
        same = state.header.num_tokens == size and number not in kept
        if same and is_of(store, state, tokens):
            kept[number] = state
        else:
            stale.append(state)
    return Segments(kept, stale)


def expiring_apart(segments: Segments, newest: Stored) -> list[Stored]:
    """Those that do not expire with their session."""
    until, found = newest.header.expires, []
    for state in segments.kept.values():
        own = state.header.expires
        if own is None or until is None:
            differs = own is not until
        else:
            differs = abs(own - until) > TOLERANCE_S
        if differs:
            found.append(state)
    return found
