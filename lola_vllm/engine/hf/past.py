"""A text without end, of which a segment that was read long ago comes back for a question.

`docs/library.md` says what was measured and why it is done so.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.modeling import LolaLlamaForCausalLM
from lola_vllm.engine.hf.question import queries_of
from lola_vllm.engine.hf.tokens import LolaModelError
from lola_vllm.memory.documents.choose import Choice, choose
from lola_vllm.memory.documents.keys import DocumentKeys
from lola_vllm.memory.documents.parts import PART_TOKENS
from lola_vllm.memory.documents.past import TOP, Found, comes_back, newest

STATES = 4  # of segments that came back, which are kept for the next question


class Recalled(NamedTuple):
    """What a question is asked of.

    Attributes:
        cache: the present, with a segment behind it if one came back. It is the caller's: what is
            read in it is not in the text.
        first, last: the segment, tokens `first` to `last - 1` of the text; None: none came back.
        choice: how it was found, with places from `first` on; None as well.
    """

    cache: LolaCache
    first: int | None
    last: int | None
    choice: Choice | None


class Past:
    """Reads a text on and on. Of each segment the keys of the reading heads and the tokens are
    kept.

    Args:
        model: that reads. segment_tokens: of a segment; a multiple of `update_interval`, below the
            trained length. None: 2,000, or what comes near it.

    Attributes:
        cache: the present: the state of the whole text. tokens: of the text.
        keys: of each segment that is complete. first: the state at the end of the first of them,
            behind which questions are read to find what they ask for; None: there is none.

    Raises:
        LolaModelError: segments of this length cannot be.
    """

    def __init__(self, model: LolaLlamaForCausalLM, segment_tokens: int | None = None) -> None:
        interval = model.config.lola.update_interval
        longest = model.config.max_position_embeddings
        least = max(interval, model.config.lola.sink_size)
        if segment_tokens is None:
            segment_tokens = min(PART_TOKENS, longest // 2) // interval * interval
        self.model, self.segment_tokens = model, segment_tokens
        if segment_tokens % interval or not least <= segment_tokens < longest:
            raise LolaModelError(
                f"segment_tokens = {segment_tokens}: must be a multiple of update_interval = "
                f"{interval}, at least {least} and below the trained length, {longest}"
            )
        self.cache = LolaCache(model.config)
        self.tokens: list[int] = []
        self.keys: list[DocumentKeys] = []
        self.first: LolaCache | None = None
        self._rope = model.model.rope_table()
        self._apart = OrderedDict[int, LolaCache]()

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read on, and return the logits `[vocab]` behind the last token.

        Raises:
            LolaModelError: no tokens.
        """
        if not len(tokens):
            raise LolaModelError("there are no tokens to read; give one or more")
        rest = list(tokens)
        while rest:
            room = self.segment_tokens - len(self.tokens) % self.segment_tokens
            new, rest = rest[:room], rest[room:]
            logits = _read(self.model, new, self.cache)
            self.tokens += new
            if len(new) == room:
                self.keys.append(self._newest(self.segment_tokens))
                if self.first is None:
                    self.first = copy.deepcopy(self.cache)
        return logits

    def recall(self, question: Sequence[int]) -> Recalled:
        """What to ask a question of: the present, and behind it the complete segment that the
        question reads most. Where newer text has what it reads, or the text has no complete
        segment, the present alone.

        A segment that comes back is read once more, apart. The text stays as it is.

        Args:
            question: token ids, 1 or more.

        Raises:
            LolaModelError: the text is empty. ValueError: no question, or one that is too long.
        """
        if not self.tokens:
            raise LolaModelError("nothing was read yet; read a text first")
        found = self._found(question)
        read = [Found(one.document, one.score, one.own) for one in found]
        index = comes_back(read, len(self.keys)) if found else None
        if index is None:
            return Recalled(copy.deepcopy(self.cache), None, None, None)
        best = found[index]
        first = best.document * self.segment_tokens
        cache = LolaCache.compose([self.cache, self._segment(best.document)], self.model)
        return Recalled(cache, first, first + self.segment_tokens, best)

    def find(self, question: Sequence[int]) -> Choice | None:
        """The complete segment that a question reads most; None: there is none.

        Raises:
            ValueError: no question, or one that is too long.
        """
        return next((x for x in self._found(question) if x.document < len(self.keys)), None)

    def _found(self, question: Sequence[int]) -> list[Choice]:
        """What a question reads, the most first; one past the complete segments is the rest."""
        if self.first is None:
            return []
        shelf, rest = list(self.keys), len(self.tokens) % self.segment_tokens
        if rest:
            shelf.append(self._newest(rest))
        return choose(queries_of(self.model, self.first, question), shelf, TOP, newest(rest > 0))

    def _newest(self, count: int) -> DocumentKeys:
        """The keys of so many tokens at the end of the text."""
        return DocumentKeys.of_state(
            self.cache.sequence,
            self.cache.rows()[0],
            len(self.tokens),
            self._rope,
            count,
            self.model.model.schedule,
        )

    def _segment(self, index: int) -> LolaCache:
        """A segment, read apart."""
        if index not in self._apart:
            first = index * self.segment_tokens
            cache = LolaCache(self.model.config)
            _read(self.model, self.tokens[first : first + self.segment_tokens], cache)
            self._apart[index] = cache
        self._apart.move_to_end(index)
        while len(self._apart) > STATES:
            self._apart.popitem(last=False)
        return self._apart[index]


@torch.no_grad()
def _read(model: LolaLlamaForCausalLM, tokens: Sequence[int], cache: LolaCache) -> Tensor:
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: Tensor = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    return logits[0, -1]
