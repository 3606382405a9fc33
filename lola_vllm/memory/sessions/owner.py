"""Owners of stored states: who has an API key, whatever cache salts its requests have.

The engine tells states apart by a salt. For a request with a key this salt names the owner, so
that it can be read in the header of a state's file. Budgets are shared among owners, and an
operator can list, move and delete what an owner has.
"""

from __future__ import annotations

import hashlib

from lola_vllm.memory.sessions.prefix_hash import digest, salt_hash

_SALT = "lola:"


def owner_of(key: str) -> str:
    """The owner that an API key stands for: 32 hex digits, from which the key does not follow."""
    return digest(b"lola owner", hashlib.sha256(key.encode()).digest()).hex()


def engine_salt(owner: str, salt: str | None) -> str:
    """The salt that the engine sees for an owner and the caller's own salt."""
    return f"{_SALT}{owner}:{salt_hash(salt)}"


def plain_salt(salt: str | None) -> str | None:
    """The salt that the engine sees where there are no keys: the caller's own.

    One that looks as if it named an owner becomes another, so that nobody passes for an owner.
    """
    if salt is None or not salt.startswith(_SALT):
        return salt
    return digest(b"lola plain", salt.encode("utf-8", "replace")).hex()


def salt_owner(stored: str) -> str:
    """Who shares a budget with the others, from what is stored in place of a salt.

    The owner and a colon where a key is behind it. Else the stored hash itself: without keys, each
    salt is an owner.
    """
    owner, colon, _ = stored.partition(":")
    return owner + colon


def key_owner(stored: str) -> str:
    """The owner whose API key is behind what is stored in place of a salt; `none`: no key is."""
    owner = salt_owner(stored)
    return owner[:-1] if owner.endswith(":") else "none"
