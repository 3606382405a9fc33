"""What people get out of the files of states, and bring: tokens, and whole states.

A file that cannot be used counts as on a rank.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lola_vllm.memory.sessions.answers import SessionError
from lola_vllm.memory.sessions.catalog import NotStored
from lola_vllm.memory.sessions.file import (
    StateFileError,
    read_header,
    read_state,
    read_tokens,
    with_rank,
    write_state,
)
from lola_vllm.memory.sessions.orders import DISK, Outcome
from lola_vllm.memory.sessions.prefix_hash import PrefixHashes, Tokens
from lola_vllm.memory.sessions.store import SessionStore
from lola_vllm.memory.sessions.tiers import Stored


def tokens_of(store: SessionStore, state: Stored) -> Tokens:
    """The tokens of a state, from memory or its file.

    Raises:
        NotStored: they are in neither, or the file cannot be used.
    """
    try:
        return _tokens_there(store, state)
    except StateFileError as error:
        raise _refused(store, state, error) from None


def longest_text(store: SessionStore, states: Sequence[Stored]) -> PrefixHashes | None:
    """The longest of some states' texts; None where it cannot be read."""
    longest = max(states, key=lambda state: state.header.num_tokens)
    header = longest.header
    try:
        return store.prefix_hashes(
            _tokens_there(store, longest), header.adapter, header.salt, header.composed
        )
    except (NotStored, StateFileError):
        return None


def written_files(store: SessionStore, state: Stored, reference: str) -> list[Path]:
    """The files of a state, one per rank: to copy elsewhere.

    Args:
        reference: what errors call it.

    Raises:
        SessionError: it has none, or none yet. NotStored: they cannot be used.
    """
    directory = store.directory
    if directory is None or DISK not in state.tiers:
        raise SessionError(
            "unavailable",
            f"{reference} is in memory only; a server with a state directory writes files",
        )
    paths = directory.files(state.id)
    if not all(path.exists() for path in paths):
        raise SessionError("unavailable", f"{reference} is not written yet; try again in a moment")
    for rank, path in enumerate(paths):
        try:
            read_header(path, directory.key, with_rank(state.header, rank))
        except StateFileError as error:
            raise _refused(store, state, error) from None
    return paths


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
    with store.lock:
        if (salt, name) in store.sessions:
            raise SessionError("exists", f"session = {name!r}: there is such a session already")
    hashes = store.prefix_hashes(found.tokens, found.header.adapter, salt, found.header.composed)
    n = len(found.tokens)
    header = replace(
        found.header, id=secrets.token_hex(16), session=name, turn=1, created=store.clock(),
        salt=salt, expires=None, until=None, origin=None, parent=None, shared_prefix=None,
        pinned=False, library="", document="", part=0, parts=0,
        prefix_hash=hashes.prefix_hash(n).hex(), block_hash=hashes.block_hash(n).hex(),
        fingerprint=store.fingerprint.to_dict(),
    )  # fmt: skip
    write_state(store.directory.files(header.id)[0], header, found.tokens, found.data, key)
    store.upkeep.refresh()


def _tokens_there(store: SessionStore, state: Stored) -> Tokens:
    tokens, directory = store.tokens(state), store.directory
    if tokens is None and directory is not None:
        try:
            tokens = read_tokens(directory.files(state.id)[0], directory.key, state.header)
        except StateFileError as error:
            if error.reason != "missing":
                raise
    if tokens is None:
        raise NotStored(f"the tokens of {state.header.session!r} are not kept")
    return tokens


def _refused(store: SessionStore, state: Stored, error: StateFileError) -> NotStored:
    """What to raise for a state whose file cannot be used; it counts as on a rank."""
    failed = Outcome(state.id, "read-failed", DISK, reason=error.text, fault=error.reason)
    store.apply([(0, failed)])
    return NotStored(f"the file of {state.header.session!r} cannot be used: {error.text}")
