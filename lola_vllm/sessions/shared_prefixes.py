"""Shared prefixes: states that several conversations go on from.

The server stores them where prompts part (`serving/sessions/prefix_sharing.py`). They hold
somebody's text, so they are deleted with the last conversation that goes on from them. A state's
header names the shared prefix of its text, because the states between the two may have left the
store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lola_vllm.sessions.names import SHARED
from lola_vllm.sessions.prefix_hash import PrefixHashes
from lola_vllm.sessions.tiers import Stored

if TYPE_CHECKING:
    from lola_vllm.sessions.store import SessionStore


def shared_prefix_of(parent: Stored | None) -> str | None:
    """The hash of the shared prefix of a state that goes on from another one; None: none."""
    if parent is None:
        return None
    header = parent.header
    return header.prefix_hash if header.session.startswith(SHARED) else header.shared_prefix


def orphaned_prefixes(
    store: SessionStore, states: Sequence[Stored], text: Callable[[], PrefixHashes | None]
) -> list[Stored]:
    """Shared prefixes of states that are deleted, from which no other stored state goes on.

    Args:
        states: of one owner. text: the longest of their texts, None where its tokens are not
            known. It may be read from a file, so it is asked for only where there are shared
            prefixes.
    """
    with store.lock:
        salt = states[0].header.salt
        shared = [
            state
            for (owner, name), session in store.sessions.items()
            if owner == salt and name.startswith(SHARED)
            for state in session.states.values()
        ]
        if not shared:
            return []
        hashes = text()
        prefixes = set() if hashes is None else set(store.index.prefixes(hashes, len(hashes)))
        going = {state.id for state in states}
        named = {state.header.shared_prefix for state in states}
        found: list[Stored] = []
        # Longer ones first, because they may go on from a shorter one themselves.
        for state in sorted(shared, key=lambda s: -s.header.num_tokens):
            prefix = state.header.prefix_hash
            if state.id in going or not (state.id in prefixes or prefix in named):
                continue
            others = (s for s in store.states.values() if s.id not in going)
            if not any(s.header.shared_prefix == prefix for s in others):
                found.append(state)
                going.add(state.id)
                named.add(state.header.shared_prefix)
        return found
