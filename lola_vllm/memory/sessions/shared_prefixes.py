"""Shared prefixes: states that several conversations go on from.

The server stores them where prompts part (`serving/sessions/prefix_sharing.py`), and at waypoints
(`engine/vllm/waypoints.py`), where they may part. They hold somebody's text, so they are deleted
with the last conversation that goes on from them. A state's header names the shared prefix of its
text, because the states between the two may have left the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from lola_vllm.memory.sessions.names import SHARED
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import Stored

# The newest waypoints take so much of the memory at most; older ones leave before anything else.
WAYPOINT_SHARE = 1 / 4


class Waypoints:
    """The states of a store that were kept inside of prompts. They are in memory only."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self._newest: deque[Stored] = deque()

    def save(
        self,
        hashes: PrefixHashes,
        num_tokens: int,
        state_index: int,
        within: bool,
        *,
        adapter: str,
        salt: str,
        parent: Stored | None,
        ttl: float | None,
    ) -> None:
        """Keep the state after the first `num_tokens` of a prompt, if there is room.

        Args:
            within: as in `Save`. The others: as for `SessionStore.save`; salt: a hash.
        """
        store, prefix_hash = self.store, hashes.prefix_hash(num_tokens)
        with store.lock:
            room = store.memory.budget * WAYPOINT_SHARE - store.state_bytes(num_tokens)
            if room < 0 or store.index.with_hash(prefix_hash):
                return
            self._newest = deque(state for state in self._newest if state.tiers)
            while sum(state.nbytes for state in self._newest) > room:
                store.supersede(self._newest.popleft())
            turn = store.open_turn(SHARED + prefix_hash.hex()[:16], parent, salt)
            with suppress(LookupError):  # all that is stored is pinned
                state, _ = store.save(
                    turn, hashes, num_tokens, "prompt", state_index, adapter=adapter,
                    parent=parent, ttl=ttl, within=within, tiers=(store.memory,),
                )  # fmt: skip
                self._newest.append(state)


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
