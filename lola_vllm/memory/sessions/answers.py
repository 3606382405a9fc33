"""What people are told of sessions, as plain data, and why a request cannot be met."""

from __future__ import annotations

from typing import Any

from lola_vllm.memory.sessions.catalog import Catalog
from lola_vllm.memory.sessions.past import segments_with
from lola_vllm.memory.sessions.tiers import SessionKey, Stored

Answer = dict[str, Any]


class SessionError(Exception):
    """A request that cannot be met.

    Attributes:
        kind: "bad" (a wrong argument), "not-found", "exists" or "unavailable".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def describe_state(state: Stored) -> Answer:
    """A state for people."""
    header = state.header
    return {
        "id": header.id,
        "turn": header.turn,
        "kind": header.kind,
        "tokens": header.num_tokens,
        "bytes": state.nbytes,
        "tiers": sorted(state.tiers),
        "unwritten": state.unwritten,
        "created": header.created,
        "used": state.used,
        "expires": header.expires,
        "pinned": header.pinned,
        "superseded": state.superseded,
        "adapter": header.adapter.partition(":")[0],
        "parent": header.parent,
    }


def describe_session(store: Catalog, key: SessionKey) -> Answer:
    """A session for people."""
    session = store.sessions[key]
    states = list(session.states.values())
    segments = segments_with(store, states)
    return {
        "session": key[1],
        "turn": session.last_turn,
        "turns": sorted({state.header.turn for state in states}),
        "tokens": max(s.header.num_tokens for s in states if s.header.turn == max(
            other.header.turn for other in states
        )),
        "bytes": sum(state.nbytes for state in states),
        "made_of": next((s.header.made_of for s in states if s.header.made_of), []),
        "created": min(state.header.created for state in states),
        "used": max(state.used for state in states),
        "pinned": any(state.header.pinned for state in states),
        "segments": len(segments),
        "segment_bytes": sum(state.nbytes for state in segments),
    }  # fmt: skip
