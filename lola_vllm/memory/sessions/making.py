"""New sessions of what is stored: forks, compositions, and states that people bring.

The ranks make the states (`transfer.py`). Here is what the store has to know of them: of which
states they are made, how many of whose tokens, and until when they may be kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lola_vllm.memory.sessions.catalog import SessionError, earliest
from lola_vllm.memory.sessions.file import StateHeader, read_state, write_state
from lola_vllm.memory.sessions.orders import DISK, MEMORY, Make
from lola_vllm.memory.sessions.prefix_hash import Tokens
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import Stored, Tier

# Fields of a header that a new session does not take over.
_OWN: dict[str, Any] = {
    "turn": 1, "library": "", "document": "", "part": 0, "parts": 0,
}  # fmt: skip


def fork(store: SessionStore, states: Sequence[Stored], to: str) -> None:
    """Order copies of the states of a turn, as a new session.

    Raises:
        NotStored: the tokens of one are not there.
    """
    origin = None
    for state in states:
        header = replace(
            state.header, id=secrets.token_hex(16), session=to, created=store.clock(),
            parent=state.id, origin=origin, **_OWN,
        )  # fmt: skip
        origin = header.session_id
        places = state.tiers | ({DISK} if store.is_due(state, to) else set())
        tiers = [tier for tier in store.tiers_for(to) if tier.name in places]
        # The copy's file is not there yet.
        _order(store, [state], header, store.tokens_of(state), tiers, state.nameless)


def compose(
    store: SessionStore, states: Sequence[Stored], to: str, salt: str, ttl: float | None = None
) -> None:
    """Order the composition of states, as if their texts stood one behind the other, as the first
    turn of a new session.

    The result is kept no longer than any of the states would be. It is in memory alone where a text
    without a name is, if it is made of one.

    Args:
        salt: hash of the owner's. ttl: seconds.

    Raises:
        SessionError: they are of several adapters, or cannot be composed; says why.
        NotStored: the tokens of one are not there.
    """
    tokens = [store.tokens_of(state) for state in states]
    adapters = {state.header.adapter for state in states}
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(adapter.partition(":")[0]) for adapter in adapters))
        raise SessionError(
            "bad", f"from: the sessions were read with several adapters ({names}); use one"
        )
    lengths = [state.header.num_tokens for state in states]
    try:
        offsets = store.offsets(lengths)
    except ValueError as error:
        raise SessionError("bad", str(error)) from None
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
        session=to,
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
    may_write = store.settings.may_write
    nameless = any(s.nameless or not may_write(s.header.session) for s in states)
    _order(store, states, header, text, store.tiers_for(to, nameless), nameless)


def _order(
    store: SessionStore,
    sources: Sequence[Stored],
    header: StateHeader,
    tokens: Tokens,
    tiers: Sequence[Tier],
    nameless: bool,
) -> None:
    """Have a state made of others; where no tier has room for it, it is not there."""
    nbytes = store.state_bytes(header.num_tokens)
    state = Stored(header, nbytes, header.created, nameless=nameless)
    store.add(state, [tier for tier in tiers if tier.fits(nbytes)], tokens)
    if state.tiers:
        headers = tuple(source.header for source in sources)
        store.order(Make(headers, header, tokens, MEMORY in state.tiers, DISK in state.tiers))
    else:
        store.unlist(state)


def import_state(store: SessionStore, file: Path, name: str, salt: str) -> None:
    """Store a state from a file of the same model under a new session.

    Args:
        name: of the session. salt: hash of the owner's.

    Raises:
        SessionError: there are no files here, the name is taken, or the size is another one.
        StateFileError: the file cannot be used. OSError: a file cannot be written.
    """
    if store.directory is None or store.ranks != 1:
        raise SessionError(
            "unavailable",
            "states are imported by servers with a state directory and one rank; this one has "
            + ("no directory" if store.directory is None else f"{store.ranks} ranks"),
        )
    key = store.directory.key
    found = read_state(file, store.fingerprint, key, plain=True)
    if len(found.data) != store.rank_bytes:
        raise SessionError("bad", f"{len(found.data)} bytes of pages, not {store.rank_bytes}")
    store.check_new((salt, name), "session")
    hashes = store.prefix_hashes(found.tokens, found.header.adapter, salt, found.header.composed)
    n = len(found.tokens)
    header = replace(
        found.header, id=secrets.token_hex(16), session=name, created=store.clock(), salt=salt,
        expires=None, until=None, origin=None, parent=None, shared_prefix=None,
        prefix_hash=hashes.prefix_hash(n).hex(), block_hash=hashes.block_hash(n).hex(),
        fingerprint=store.fingerprint.to_dict(), **_OWN,
    )  # fmt: skip
    write_state(store.directory.files(header.id)[0], header, found.tokens, found.data, key)
    store.upkeep.refresh()
