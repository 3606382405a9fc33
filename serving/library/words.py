"""The words of libraries' parts, in memory alone: of the libraries that were asked last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lola_vllm.memory.documents.words import WordIndex

# Of all libraries that are held: their texts and indices take some 10 bytes a token. Of a larger
# one the model's heads find alone.
MAX_TOKENS = 2**24


class KnownPart(NamedTuple):
    """A part of a library: as `protocol.DocumentPart`, with the id of its state."""

    document: str
    part: int
    parts: int
    session: str
    id: str
    tokens: int


@dataclass
class _Held:
    texts: dict[str, str] = field(default_factory=dict)  # by the id of a part's state
    index: WordIndex | None = None
    tokens: int = 0


class LibraryWords:
    """Finds parts by words. A part's text is made of the tokens of its state, once."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str | None, str], _Held] = OrderedDict()
        self._lock = asyncio.Lock()

    async def find(
        self,
        owner: str | None,
        library: str,
        parts: list[KnownPart],
        question: str,
        top: int,
        read: Callable[[list[KnownPart]], Awaitable[list[str]]],
    ) -> list[int]:
        """The parts that have words of a question, the best first.

        Args:
            owner: of the library, as `owners.owned` says. parts: all of it.
            read: the texts of parts, which are held then.
        """
        tokens = sum(part.tokens for part in parts)
        if tokens > MAX_TOKENS:
            return []
        async with self._lock:
            held = self._held.pop((owner, library), None) or _Held()
            new = [part for part in parts if part.id not in held.texts]
            if held.index is None or new or len(held.texts) > len(parts):
                texts = zip((part.id for part in new), await read(new), strict=True)
                held.texts |= dict(texts)
                held.texts = {part.id: held.texts[part.id] for part in parts}
                held.index = await asyncio.to_thread(WordIndex, list(held.texts.values()))
                held.tokens = tokens
            self._held[owner, library] = held
            while sum(one.tokens for one in self._held.values()) > MAX_TOKENS:
                self._held.popitem(last=False)
        assert held.index is not None
        return await asyncio.to_thread(held.index.find, question, top)

    def forget(self, owner: str | None, library: str) -> None:
        """Drop what is held of a library, of which something was deleted."""
        self._held.pop((owner, library), None)
