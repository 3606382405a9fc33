"""Libraries: documents that were read apart, each part of one a session of its own.

There is no other record of a library than the headers of its parts' states. So owners, budgets,
expiry, deletion, encryption and restarts are those of sessions, and a library is there as long as
it has a document.

A document may be read anew while the one before is asked. The parts of an addition have names that
tell it. The newest complete addition is the document, and others of its title are replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lola_vllm.memory.sessions.catalog import Catalog, NotStored
from lola_vllm.memory.sessions.names import LIBRARY, PAST, addition_of
from lola_vllm.memory.sessions.tiers import Stored


def replaced_parts(store: Catalog, salt: str, library: str) -> list[Stored]:
    """The parts of documents of which a newer addition is complete."""
    found = list[Stored]()
    for newest, *others in _additions(_parts(store, salt, library)):
        if _complete(newest):
            found += [state for other in others if _age(other) < _age(newest) for state in other]
    return found


def all_parts(store: Catalog, salt: str, library: str, document: str | None = None) -> list[Stored]:
    """The parts of a library or a document, of all additions.

    Raises:
        NotStored: there is no such library or document.
    """
    found = _parts(store, salt, library)
    if not found:
        raise NotStored(f"there is no library {library!r}; add a document to it")
    found = [state for state in found if document in (None, state.header.document)]
    if not found:
        raise NotStored(f"there is no document {document!r} in the library {library!r}")
    return found


def describe_libraries(store: Catalog, salt: str) -> list[dict[str, Any]]:
    """The libraries of an owner, by name; sessions' own segments are in none of these."""
    parts = [state for state in _current(_parts(store, salt)) if state.header.library != PAST]
    by_name = groupby(parts, key=lambda state: state.header.library)
    return [_summary(name, list(states)) for name, states in by_name]


def describe_library(store: Catalog, salt: str, library: str) -> dict[str, Any]:
    """A library with its documents and their parts.

    Raises:
        NotStored: there is no such library.
    """
    parts = _current(all_parts(store, salt, library))
    documents = []
    for title, states in groupby(parts, key=lambda state: state.header.document):
        own = list(states)
        documents.append(
            {
                "document": title,
                "complete": _complete(own),
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


def made_of_parts(
    store: Catalog, salt: str, parts: Sequence[Stored]
) -> tuple[list[Stored], list[str]]:
    """What was composed of parts: states of sessions that the server made to answer questions, and
    names of other sessions."""
    made = store.made_of({state.header.session_id for state in parts})
    own = [state for state in made if state.header.salt == salt]
    answers = [state for state in own if state.header.session.startswith(LIBRARY)]
    names = {state.header.session for state in own}
    return answers, sorted(name for name in names if not name.startswith(LIBRARY))


def _parts(store: Catalog, salt: str, library: str | None = None) -> list[Stored]:
    with store.lock:
        store.expire()
        found = [
            state for state in store.states.values()
            if state.header.salt == salt and state.header.library
            and library in (None, state.header.library)
        ]  # fmt: skip
    return sorted(found, key=lambda s: (s.header.library, s.header.document, s.header.part))


def _additions(parts: Sequence[Stored]) -> Iterator[list[list[Stored]]]:
    """Of each document the parts of its additions, first of the one that counts."""
    for _, states in groupby(parts, key=lambda s: (s.header.library, s.header.document)):
        additions = defaultdict[str, list[Stored]](list)
        for state in states:
            additions[addition_of(state.header.session)].append(state)
        yield sorted(additions.values(), key=lambda own: (_complete(own), _age(own)), reverse=True)


def _current(parts: Sequence[Stored]) -> list[Stored]:
    return [state for additions in _additions(parts) for state in additions[0]]


def _complete(parts: Sequence[Stored]) -> bool:
    """Whether all parts are kept: some may have left for others, where budgets are spent."""
    return {state.header.part for state in parts} == set(range(1, parts[0].header.parts + 1))


def _age(parts: Sequence[Stored]) -> float:
    return max(state.header.created for state in parts)


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
