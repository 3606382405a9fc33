"""Which stored states are prefixes of a list of tokens.

A prefix of n tokens has two hashes, chained as vLLM chains those of its blocks. The block hash
covers the tokens up to the last multiple of `HASH_BLOCK`: it is made of the block hash before and
of the next `HASH_BLOCK` tokens. The prefix hash covers the block hash and the tokens after it. The
first block hash is made of the namespace: model, adapter, salt and, where texts were composed, the
composed state. So states of another model, adapter or salt are never found, whatever their tokens
are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

HASH_BLOCK = 256  # tokens
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


class PrefixHashes:
    """The hashes of all prefixes of a list of tokens.

    Attributes:
        tokens: `[n]` int32.
    """

    def __init__(self, namespace: bytes, tokens: Sequence[int] | Tokens) -> None:
        self.tokens = token_array(tokens)
        self._blocks = [digest(b"lola prefix", namespace)]
        for start in range(0, len(self.tokens) - HASH_BLOCK + 1, HASH_BLOCK):
            block = self.tokens[start : start + HASH_BLOCK].tobytes()
            self._blocks.append(digest(self._blocks[-1], block))

    def prefix(self, n: int) -> PrefixHashes:
        """Those of the first n tokens alone."""
        found = PrefixHashes.__new__(PrefixHashes)
        found.tokens, found._blocks = self.tokens[:n], self._blocks[: n // HASH_BLOCK + 1]
        return found

    def __len__(self) -> int:
        return len(self.tokens)

    def block_hash(self, n: int) -> bytes:
        """The hash of the complete blocks in a prefix of n tokens."""
        return self._blocks[n // HASH_BLOCK]

    def prefix_hash(self, n: int) -> bytes:
        """The hash of the prefix of n tokens.

        Raises:
            ValueError: there are fewer tokens.
        """
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"n = {n}: there are {len(self.tokens)} tokens")
        start = n // HASH_BLOCK * HASH_BLOCK
        return digest(self.block_hash(n), self.tokens[start:n].tobytes())


def namespace(
    fingerprint: str, adapter: str = "", salt: str = "", composed: str | None = None
) -> bytes:
    """What the hashes of a model, an adapter and the hash of a salt start from.

    Args:
        composed: the composed state that a text goes on from; such a state is not the one that
            reading the same tokens gives, and no text finds it unless it names its session.
    """
    parts = [fingerprint, adapter, salt] + ([] if composed is None else [composed])
    return digest(*(part.encode() for part in parts))


class PrefixIndex:
    """Finds the stored states that are prefixes of a text, in a few hashes per block."""

    def __init__(self) -> None:
        # By block hash, and then by what follows the block: length, prefix hash -> states.
        self._states: dict[bytes, dict[tuple[int, bytes], list[str]]] = {}

    def add(self, block_hash: bytes, num_tokens: int, prefix_hash: bytes, state: str) -> None:
        """Make a state known."""
        ends = self._states.setdefault(block_hash, {})
        ends.setdefault((num_tokens, prefix_hash), []).append(state)

    def remove(self, block_hash: bytes, num_tokens: int, prefix_hash: bytes, state: str) -> None:
        """Forget a state that was added with the same arguments."""
        ends, end = self._states[block_hash], (num_tokens, prefix_hash)
        ends[end].remove(state)
        if not ends[end]:
            del ends[end]
        if not ends:
            del self._states[block_hash]

    def of(self, hashes: PrefixHashes, num_tokens: int) -> list[str]:
        """States of exactly the first tokens of a text, oldest first."""
        ends = self._states.get(hashes.block_hash(num_tokens), {})
        return ends.get((num_tokens, hashes.prefix_hash(num_tokens)), [])

    def prefixes(self, hashes: PrefixHashes, longest: int) -> Iterator[str]:
        """States that cover at most `longest` tokens of a text, those that cover most first."""
        longest = min(longest, len(hashes))
        for block in range(longest // HASH_BLOCK, -1, -1):
            ends = self._states.get(hashes.block_hash(block * HASH_BLOCK), ())
            for n in sorted({n for n, _ in ends if n <= longest}, reverse=True):
                # The newest first: of equal states it is the one most likely in memory.
                yield from reversed(self.of(hashes, n))
