"""Libraries: documents that were read apart, each part of one a session of its own.

There is no other record of a library than the headers of its parts' states. So owners, budgets,
expiry, deletion, encryption and restarts are those of sessions, and a library is there as long as
it has a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lola_vllm.sessions.names import LIBRARY, PAST
from lola_vllm.sessions.prefix_hash import digest
from lola_vllm.sessions.store import NotStored, SessionStore
from lola_vllm.sessions.tiers import Stored


def parts_of(store: SessionStore, salt: str, library: str) -> list[Stored]:
    """The parts of a library's documents, by title and part.

    Args:
        salt: hash of the owner's.

    Raises:
        NotStored: there is no such library.
    """
    found = [state for state in _parts(store, salt) if state.header.library == library]
    if not found:
        raise NotStored(f"there is no library {library!r}; add a document to it")
    return found


def documents_of(parts: Sequence[Stored], library: str, document: str) -> list[Stored]:
    """The parts of a document.

    Raises:
        NotStored: there is none of this title.
    """
    found = [state for state in parts if state.header.document == document]
    if not found:
        raise NotStored(f"there is no document {document!r} in the library {library!r}")
    return found


def describe_libraries(store: SessionStore, salt: str) -> list[dict[str, Any]]:
    """The libraries of an owner, by name; sessions' own segments are in none of these."""
    parts = [state for state in _parts(store, salt) if state.header.library != PAST]
    by_name = groupby(parts, key=lambda state: state.header.library)
    return [_summary(name, list(states)) for name, states in by_name]


def describe_library(store: SessionStore, salt: str, library: str) -> dict[str, Any]:
    """A library with its documents and their parts.

    Raises:
        NotStored: there is no such library.
    """
    parts = parts_of(store, salt, library)
    documents = []
    for title, states in groupby(parts, key=lambda state: state.header.document):
        own = list(states)
        documents.append(
            {
                "document": title,
                # Some may have left for others, where budgets are spent.
                "complete": {s.header.part for s in own} == set(range(1, own[0].header.parts + 1)),
                "tokens": sum(state.header.num_tokens for state in own),
                "bytes": sum(state.nbytes for state in own),
                "created": min(state.header.created for state in own),
                "expires": min((s.header.expires for s in own if s.header.expires), default=None),
                "parts": [
                    {
                        "part": state.header.part,
                        "session": state.header.session,
                        "id": state.id,
                        "tokens": state.header.num_tokens,
                    }
                    for state in own
                ],
            }
        )
    return _summary(library, parts) | {"documents": documents}


def name_of_answer(parts: Sequence[Stored]) -> str:
    """The session that is composed of parts: the same for the same parts in the same order."""
    ids = [state.id.encode() for state in parts]
    return f"{LIBRARY}answer-{digest(b'lola answer', *ids).hex()}"


def made_of_parts(
    store: SessionStore, salt: str, parts: Sequence[Stored]
) -> tuple[list[Stored], list[str]]:
    """What was composed of parts: states of sessions that the server made to answer questions, and
    names of other sessions."""
    names = {state.header.session for state in parts}
    answers, others = [], set()
    for (owner, name), session in store.sessions.items():
        for state in session.states.values() if owner == salt else ():
            if names.isdisjoint(source.partition("@")[0] for source in state.header.made_of):
                continue
            if name.startswith(LIBRARY):
                answers.append(state)
            else:
                others.add(name)
    return answers, sorted(others)


def _parts(store: SessionStore, salt: str) -> list[Stored]:
    with store.lock:
        store.expire()
        found = [
            state for state in store.states.values()
            if state.header.salt == salt and state.header.library
        ]  # fmt: skip
    return sorted(found, key=lambda s: (s.header.library, s.header.document, s.header.part))


def _summary(library: str, parts: Sequence[Stored]) -> dict[str, Any]:
    return {
        "library": library,
        "documents": len({state.header.document for state in parts}),
        "parts": len(parts),
        "tokens": sum(state.header.num_tokens for state in parts),
        "bytes": sum(state.nbytes for state in parts),
        "created": min(state.header.created for state in parts),
        "used": max(state.used for state in parts),
    }
