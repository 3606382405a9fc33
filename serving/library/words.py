"""The words of libraries' parts, in memory alone: of the libraries that were asked last."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lola_vllm.memory.documents.words import WordIndex
from lola_vllm.serving.sessions.owners import owned

if TYPE_CHECKING:
    from lola_vllm.serving.engine import LolaEngine
    from lola_vllm.serving.library.asking import KnownPart

# Of all libraries that are held: their texts and indices take some 10 bytes a token. Of a larger
# one the model's heads find alone.
MAX_TOKENS = 2**24


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
        engine: LolaEngine,
        library: str,
        parts: list[KnownPart],
        question: str,
        top: int,
        salt: str | None,
    ) -> list[int]:
        """The parts that have words of a question, the best first.

        Args:
            parts: all of the library. salt: the caller's.
        """
        tokens = sum(part.tokens for part in parts)
        if tokens > MAX_TOKENS:
            return []
        owner = owned(salt)
        async with self._lock:
            held = self._held.pop((owner, library), None) or _Held()
            new = [part for part in parts if part.id not in held.texts]
            if held.index is None or new or len(held.texts) > len(parts):
                ids = [
                    (await engine.sessions("tokens", reference=part.session, salt=owner))["tokens"]
                    for part in new
                ]
                await asyncio.to_thread(_index, held, parts, new, ids, engine)
                held.tokens = tokens
            self._held[owner, library] = held
            while sum(one.tokens for one in self._held.values()) > MAX_TOKENS:
                self._held.popitem(last=False)
        assert held.index is not None
        return await asyncio.to_thread(held.index.find, question, top)

    def forget(self, library: str, salt: str | None) -> None:
        """Drop what is held of a library, of which something was deleted."""
        self._held.pop((owned(salt), library), None)


def _index(
    held: _Held,
    parts: list[KnownPart],
    new: list[KnownPart],
    ids: list[list[int]],
    engine: LolaEngine,
) -> None:
    tokenizer: Any = engine.client.renderer.tokenizer
    for part, tokens in zip(new, ids, strict=True):
        held.texts[part.id] = tokenizer.decode(tokens, skip_special_tokens=True)
    held.texts = {part.id: held.texts[part.id] for part in parts}
    held.index = WordIndex(list(held.texts.values()))
