"""Shared beginnings: states that several conversations go on from.

The server stores them where prompts begin alike (`serving/sessions/shared.py`). They hold the
beginning of somebody's text, so they are deleted with the last conversation that goes on from them.
A state's header names the shared beginning of its text, because the states between the two may have
left the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lola_vllm.sessions.chain import Chain
from lola_vllm.sessions.names import SHARED
from lola_vllm.sessions.tiers import Stored

if TYPE_CHECKING:
    from lola_vllm.sessions.store import SessionStore


def shared_beginning(parent: Stored | None) -> str | None:
    """The key of the shared beginning of a state that goes on from another one; None: none."""
    if parent is None:
        return None
    header = parent.header
    return header.key if header.session.startswith(SHARED) else header.beginning


def only_beginnings(
    store: SessionStore, states: Sequence[Stored], text: Callable[[], Chain | None]
) -> list[Stored]:
    """Shared beginnings of states that are deleted, from which no other stored state goes on.

    Args:
        states: of one owner. text: the longest of their texts, None where its tokens are not
            known. It may be read from a file, so it is asked for only where there are beginnings.
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
        chain = text()
        prefixes = set() if chain is None else set(store.index.prefixes(chain, len(chain)))
        going = {state.id for state in states}
        keys = {state.header.beginning for state in states}
        found: list[Stored] = []
        # Longer ones first, because they may go on from a shorter one themselves.
        for state in sorted(shared, key=lambda s: -s.header.num_tokens):
            key = state.header.key
            if state.id in going or not (state.id in prefixes or key in keys):
                continue
            others = (s for s in store.states.values() if s.id not in going)
            if not any(s.header.beginning == key for s in others):
                found.append(state)
                going.add(state.id)
                keys.add(state.header.beginning)
        return found
