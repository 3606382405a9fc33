"""Which stored states are prefixes of a list of tokens.

A state after n tokens is found by two digests. The chain digest covers the tokens up to the last
multiple of `SPAN`, each link the digest before it and the next `SPAN` tokens. The key covers the
chain digest and the tokens after it. A chain starts from its namespace: model, adapter and salt. So
states of another model, adapter or salt are never found, whatever their tokens are.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SPAN = 256  # tokens of a link
DIGEST_BYTES = 16

# A salt that names the owner of an API key (`owner.py`), as the engine sees it.
OWNED_SALT = re.compile(r"lola:([0-9a-f]{32}:(?:[0-9a-f]{32})?)")

Tokens = NDArray[np.int32]


def digest(*parts: bytes) -> bytes:
    """BLAKE2b over lengths and contents."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def salt_hash(salt: str | None) -> str:
    """What is stored in place of a cache salt.

    Args:
        salt: as the engine sees it; None: there is none.

    Returns:
        Empty where there is none; 32 hex digits; or for a salt of `owner.engine_salt`, the owner's
        32 hex digits, a colon, and the hash of the caller's own salt.
    """
    if salt is None:
        return ""
    owned = OWNED_SALT.fullmatch(salt)
    return owned[1] if owned else digest(b"lola salt", salt.encode("utf-8", "replace")).hex()


def token_array(tokens: Sequence[int] | Tokens) -> Tokens:
    """Token ids as `[n]` int32."""
    return np.ascontiguousarray(tokens, dtype=np.int32)


class Chain:
    """The digests of the prefixes of a list of tokens.

    Attributes:
        tokens: `[n]` int32.
    """

    def __init__(self, namespace: bytes, tokens: Sequence[int] | Tokens) -> None:
        self.tokens = token_array(tokens)
        self._links = [digest(b"lola chain", namespace)]
        for start in range(0, len(self.tokens) - SPAN + 1, SPAN):
            link = self.tokens[start : start + SPAN].tobytes()
            self._links.append(digest(self._links[-1], link))

    def prefix(self, n: int) -> Chain:
        """The chain of the first n tokens."""
        found = Chain.__new__(Chain)
        found.tokens, found._links = self.tokens[:n], self._links[: n // SPAN + 1]
        return found

    def __len__(self) -> int:
        return len(self.tokens)

    def boundary(self, n: int) -> bytes:
        """The chain digest for a prefix of n tokens."""
        return self._links[n // SPAN]

    def key(self, n: int) -> bytes:
        """The key of the prefix of n tokens.

        Raises:
            ValueError: there are fewer tokens.
        """
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"n = {n}: the chain has {len(self.tokens)} tokens")
        start = n // SPAN * SPAN
        return digest(self.boundary(n), self.tokens[start:n].tobytes())


def namespace(fingerprint: str, adapter: str = "", salt: str = "") -> bytes:
    """Where chains of a model, an adapter and the hash of a salt start."""
    return digest(fingerprint.encode(), adapter.encode(), salt.encode())


class PrefixIndex:
    """Finds the longest prefixes of a chain among stored states, in a few digests per link."""

    def __init__(self) -> None:
        self._tails: dict[bytes, Counter[int]] = {}
        self._states: dict[bytes, dict[str, None]] = {}

    def add(self, boundary: bytes, num_tokens: int, key: bytes, state: str) -> None:
        """Make a state known."""
        self._tails.setdefault(boundary, Counter())[num_tokens % SPAN] += 1
        self._states.setdefault(key, {})[state] = None

    def remove(self, boundary: bytes, num_tokens: int, key: bytes, state: str) -> None:
        """Forget a state that was added with the same arguments."""
        states = self._states[key]
        del states[state]
        if not states:
            del self._states[key]
        tails, tail = self._tails[boundary], num_tokens % SPAN
        tails[tail] -= 1
        if not tails[tail]:
            del tails[tail]
        if not tails:
            del self._tails[boundary]

    def with_key(self, key: bytes) -> list[str]:
        """States of exactly these tokens, oldest first."""
        return list(self._states.get(key, ()))

    def prefixes(self, chain: Chain, longest: int) -> Iterator[str]:
        """States that cover at most `longest` tokens of the chain, those that cover most first."""
        longest = min(longest, len(chain))
        for link in range(longest // SPAN, -1, -1):
            start = link * SPAN
            tails = self._tails.get(chain.boundary(start), ())
            for tail in sorted(tails, reverse=True):
                if start + tail <= longest:
                    # The newest first: of equal states it is the one most likely in memory.
                    yield from reversed(self.with_key(chain.key(start + tail)))
