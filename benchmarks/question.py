"""A question's queries in the reading heads, from the model in transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lola_vllm.engine.hf.cache import LolaCache
from lola_vllm.engine.hf.modeling import LolaForCausalLM
from lola_vllm.memory.documents.keys import queries_in, reading_heads


@torch.no_grad()
def queries_of(model: LolaForCausalLM, after: LolaCache, question: Sequence[int]) -> list[Tensor]:
    """What a question asks with in each reading head, as if its first token stood at position 0.

    Args:
        after: the state of any document, after which the question is read: its tokens then ask as
            they do when they follow a document. It stays as it is.
        question: token ids, 1 or more.

    Returns:
        Of each reading head, `[T, G, d]` on the CPU: T tokens, G query heads that read it.

    Raises:
        ValueError: the question has no tokens, or the document leaves no room for it before the
            next context shift.
    """
    if not question:
        raise ValueError("the question has no tokens; ask something")
    heads = reading_heads(after.sequence)
    last = max(head.layer for head in heads)
    n, length = after.get_seq_length(), model.config.max_position_embeddings
    if n + len(question) > length:
        raise ValueError(
            f"a document of {n} tokens and a question of {len(question)}: a question is read after "
            f"a document within the trained length, {length}; take a shorter document"
        )
    seen: dict[int, Tensor] = {}

    def recorder(layer: int) -> Any:
        def record(q: Tensor) -> None:
            seen[layer] = q[0].cpu()  # [T, Hq, d]
            if layer == last:
                raise _AllSeen

        return record

    cache = copy.copy(after)  # the layers before the last one get new tokens, the others nothing
    cache.layers = [
        copy.deepcopy(own) if layer < last else copy.copy(own)
        for layer, own in enumerate(after.layers)
    ]
    for layer in {head.layer for head in heads}:
        cache.layers[layer].query_hook = recorder(layer)
    ids = torch.tensor([list(question)], device=model.device)
    with suppress(_AllSeen):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return queries_in(after.sequence, seen, n, model.rope_table())


class _AllSeen(Exception):
    """All queries have been seen: the layers behind are not needed."""
