"""The words of libraries' parts, in memory alone: of the libraries that were asked last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from lola_vllm.memory.documents.words import WordIndex

# Of all libraries that are held: their texts and indices take some 10 bytes a token. Of a larger
# one the model's heads find alone.
MAX_TOKENS = 2**24
_Held = tuple[int, dict[str, str], WordIndex]


class KnownPart(NamedTuple):
    """A part of a library: as `protocol.DocumentPart`, with the id of its state."""

    document: str
    part: int
    parts: int
    session: str
    id: str
    tokens: int


class LibraryWords:
    """Finds parts by words. A part's text is made of the tokens of its state, once."""

    def __init__(self) -> None:
        # By owner and name: tokens, texts by the id of a part's state, and their index.
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
    ) -> list[tuple[int, float]]:
        """The parts that have words of a question, with their scores, the best first.

        Args:
            owner: of the library, as `owners.owned` says. parts: all of it.
            read: the texts of parts, which are held then.
        """
        tokens, ids = sum(part.tokens for part in parts), [part.id for part in parts]
        if tokens > MAX_TOKENS:
            return []
        async with self._lock:
            _, texts, index = self._held.pop((owner, library), None) or (0, {}, None)
            if index is None or list(texts) != ids:
                new = [part for part in parts if part.id not in texts]
                texts = texts | dict(zip((part.id for part in new), await read(new), strict=True))
                texts = {id: texts[id] for id in ids}
                index = await asyncio.to_thread(WordIndex, list(texts.values()))
            self._held[owner, library] = tokens, texts, index
            while sum(tokens for tokens, *_ in self._held.values()) > MAX_TOKENS:
                self._held.popitem(last=False)
        return list((await asyncio.to_thread(index.find, question, top)).items())

    def forget(self, owner: str | None, library: str) -> None:
        """Drop what is held of a library, of which something was deleted."""
        self._held.pop((owner, library), None)
