"""A session made of others: their states, composed as if their texts stood one behind the other.

The ranks do it (`transfer.py`). Here is what the store has to know of it: which states, how many of
whose tokens, and until when the result may be kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from lola_vllm.memory.sessions.catalog import NotStored, earliest
from lola_vllm.memory.sessions.file import StateHeader
from lola_vllm.memory.sessions.names import check_name
from lola_vllm.memory.sessions.orders import DISK, MEMORY, Make
from lola_vllm.memory.sessions.prefix_hash import Tokens
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import Stored


def compose(
    store: SessionStore,
    states: Sequence[Stored],
    tokens: Sequence[Tokens],
    to: str,
    salt: str,
    ttl: float | None = None,
) -> Stored:
    """Order the composition of states, as the first turn of a new session.

    The result is kept no longer than any of the states would be. It is in memory alone where a text
    without a name is, if it is made of one.

    Args:
        tokens: of each state. salt: hash of the owner's. ttl: seconds.

    Raises:
        ValueError: they are of several adapters, or cannot be composed; says why.
        NotStored: there is no room.
    """
    name = check_name(to)
    adapters = {state.header.adapter for state in states}
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(adapter.partition(":")[0]) for adapter in adapters))
        raise ValueError(f"from: the sessions were read with several adapters ({names}); use one")
    lengths = [state.header.num_tokens for state in states]
    offsets = store.offsets(lengths)
    ends = [*offsets[1:], offsets[-1] + lengths[-1]]
    text = np.concatenate(
        [ids[: end - start] for ids, start, end in zip(tokens, offsets, ends, strict=True)]
    )
    n, new = len(text), secrets.token_hex(16)
    hashes = store.prefix_hashes(text, states[0].header.adapter, salt, new)
    now = store.clock()
    ttl = store.settings.ttl if ttl is None else ttl
    until = earliest(state.header.expires for state in states)
    header = StateHeader(
        id=new,
        session=name,
        turn=1,
        kind="prompt",
        num_tokens=n,
        prefix_hash=hashes.prefix_hash(n).hex(),
        block_hash=hashes.block_hash(n).hex(),
        fingerprint=store.fingerprint.to_dict(),
        adapter=states[0].header.adapter,
        salt=salt,
        created=now,
        expires=earliest([until, None if ttl is None else now + ttl]),
        composed=new,
        made_of=[f"{state.header.session}@{state.header.turn}" for state in states],
        sources=[state.header.session_id for state in states],
        until=until,
        ranks=store.ranks,
    )
    nbytes = store.state_bytes(n)
    may_write = store.settings.may_write
    nameless = any(s.nameless or not may_write(s.header.session) for s in states)
    state = Stored(header, nbytes, now, nameless=nameless)
    tiers = [tier for tier in store.tiers_for(name, nameless) if tier.fits(nbytes)]
    store.add(state, tiers, text)
    if not state.tiers:
        store.unlist(state)
        raise NotStored("the budgets have no room for another session")
    sources = tuple(source.header for source in states)
    store.order(Make(sources, header, text, MEMORY in state.tiers, DISK in state.tiers))
    return state
