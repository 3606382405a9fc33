"""Shared prefixes: states that several conversations go on from.

The store has a state at the end of each prompt and of each answer. Two prompts with a prefix in
common share none of these. So the recent prompts are remembered, and the state where a prompt
branches from an earlier one is kept while it is read. So are states at waypoints
(`engine/vllm/waypoints.py`), where prompts may branch.

They hold somebody's text, so they are deleted with the last conversation that goes on from them. A
state's header names the shared prefix of its text, because the states between the two may have left
the store.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.names import SHARED
from lola_vllm.memory.sessions.prefix_hash import HASH_BLOCK, PrefixHashes, PrefixIndex
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import Stored

# Tokens of the prompts that are remembered, 4 bytes each.
MAX_TOKENS = 2**21
# The newest waypoints take so much of the memory at most; older ones leave before anything else.
WAYPOINT_SHARE = 1 / 4


class RecentPrompts:
    """The recent prompts, and where they branch.

    Args:
        max_tokens: of all prompts together; the oldest are forgotten.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._texts: OrderedDict[bytes, PrefixHashes] = OrderedDict()  # by prefix hash
        self._newest: dict[bytes, bytes] = {}  # block hash -> the newest text with this block
        self._ends = PrefixIndex()  # of the texts
        self._read: set[bytes] = set()  # texts that were read to their end
        self._branches: set[bytes] = set()  # texts at whose end prompts branch
        self._tokens = 0

    def observe(self, hashes: PrefixHashes) -> int:
        """Take a prompt in, and say after how many tokens it branches from others; 0: nowhere.

        A state there pays if it saves `HASH_BLOCK` tokens or more beside those at the ends of other
        prompts. A prompt that was read before has none: it goes on from just before its end.
        """
        longest = min(self._common(hashes), len(hashes) - 1)
        known = next((int(n) for n in self._ends.prefixes(hashes, longest)), 0)
        read = hashes.prefix_hash(len(hashes)) in self._read
        if not read and longest - known >= HASH_BLOCK:
            self._add(hashes.prefix(longest))
            self._branches.add(hashes.prefix_hash(longest))
            known = longest
        self._add(hashes)
        return known if hashes.prefix_hash(known) in self._branches else 0

    def end(self, hashes: PrefixHashes) -> None:
        """A prompt was read to its end."""
        key = hashes.prefix_hash(len(hashes))
        if key in self._texts:
            self._read.add(key)

    def _common(self, hashes: PrefixHashes) -> int:
        """Tokens that a prompt has in common with an earlier one, at least `HASH_BLOCK`, or 0."""
        for block in range(len(hashes) // HASH_BLOCK, 0, -1):
            text = self._newest.get(hashes.block_hash(block * HASH_BLOCK))
            if text is not None:
                theirs = self._texts[text].tokens
                start, stop = block * HASH_BLOCK, min(len(hashes), len(theirs))
                differ = np.flatnonzero(hashes.tokens[start:stop] != theirs[start:stop])
                return start + int(differ[0]) if len(differ) else stop
        return 0

    def _add(self, hashes: PrefixHashes) -> None:
        n = len(hashes)
        if n < HASH_BLOCK:
            return
        key = hashes.prefix_hash(n)
        if key not in self._texts:
            self._texts[key] = hashes
            self._tokens += n
            self._ends.add(hashes.block_hash(n), n, key, str(n))
        self._texts.move_to_end(key)
        for block in range(1, n // HASH_BLOCK + 1):
            self._newest[hashes.block_hash(block * HASH_BLOCK)] = key
        while self._tokens > self.max_tokens:
            self._drop(next(iter(self._texts)))

    def _drop(self, key: bytes) -> None:
        hashes = self._texts.pop(key)
        self._read.discard(key)
        self._branches.discard(key)
        n = len(hashes)
        self._tokens -= n
        self._ends.remove(hashes.block_hash(n), n, key, str(n))
        for block in range(1, n // HASH_BLOCK + 1):
            block_hash = hashes.block_hash(block * HASH_BLOCK)
            if self._newest.get(block_hash) == key:
                del self._newest[block_hash]


class Waypoints:
    """The states of a store that were kept inside of prompts."""

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
        branches: bool = False,
    ) -> Stored | None:
        """Keep the state after the first `num_tokens` of a prompt, if there is room.

        Args:
            within: as in `Save`. branches: whether prompts branch there; else the state is in
                memory alone, and makes room for newer ones. The others: as for `SessionStore.save`;
                salt: a hash.
        """
        store, prefix_hash = self.store, hashes.prefix_hash(num_tokens)
        with store.lock:
            if not branches:
                room = store.memory.budget * WAYPOINT_SHARE - store.state_bytes(num_tokens)
                if room < 0 or store.index.of(hashes, num_tokens):
                    return None
                self._newest = deque(state for state in self._newest if state.tiers)
                while sum(state.nbytes for state in self._newest) > room:
                    store.supersede(self._newest.popleft())
            turn = store.open_turn(SHARED + prefix_hash.hex()[:16], parent, salt)
            with suppress(NotStored):  # there is no room
                state, _ = store.save(
                    turn, hashes, num_tokens, "prompt", state_index, adapter=adapter,
                    parent=parent, ttl=ttl, within=within,
                    tiers=None if branches else (store.memory,),
                )  # fmt: skip
                if not branches:
                    self._newest.append(state)
                return state
        return None


def orphaned_prefixes(store: SessionStore, states: Sequence[Stored]) -> list[Stored]:
    """Shared prefixes of states that are deleted, from which no other stored state goes on.

    Args:
        states: of one owner.
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
        prefixes = set[str]()
        longest = max(states, key=lambda state: state.header.num_tokens)
        with suppress(NotStored):  # its tokens may be in a file that cannot be read
            header, text = longest.header, store.tokens_of(longest)
            hashes = store.prefix_hashes(text, header.adapter, header.salt, header.composed)
            prefixes |= set(store.index.prefixes(hashes, len(hashes)))
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
