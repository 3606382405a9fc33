"""Which of several divisions of recent pairs lets a model copy best.

How much of the attention to a passage a model needs to go on with it differs from model to model.
So it is tried. A model reads a prompt with softmax attention, and the passages at its end with no
more than each head would hold then: attention sinks, the window and the head's recent pairs. The
division with which it expects the passages' tokens most is the best. Scored pairs and the hidden
state of a LoLA model are left out: they serve copying little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from lola_vllm.core.ops import sliding
from lola_vllm.training.calibrate.copying import REPEATED, counted_tokens

RECENT_ATTENTION = "lola_calibration_recent"
WINDOW, SINKS = 64, 4  # that every head sees


@torch.no_grad()
def passage_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], divisions: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """How well a model goes on with repeated passages, by division.

    Args:
        model: a causal LM of transformers whose attention is `recent_attention`, registered as
            `RECENT_ATTENTION`.
        prompts: token ids, as `repeat_passages` makes them.
        divisions: each the recent pairs by layer, sliding ones left out, and KV head.

    Returns:
        `[divisions]` float64, the mean log-probability of the passages' `counted_tokens`.
    """
    found = torch.zeros(len(divisions), dtype=torch.float64)
    asked = counted_tokens()
    for ids in tqdm(prompts, desc="recent pairs", unit="prompt"):
        length = len(ids) - REPEATED
        text, passages = torch.tensor([list(ids)]).split([length, REPEATED], dim=1)
        cache = DynamicCache()  # not by the config: of sliding layers too it keeps everything
        model.model(text, use_cache=True, past_key_values=cache)
        positions = torch.arange(length, len(ids))[None]
        for i, division in enumerate(divisions):
            hidden = model.model(
                passages, past_key_values=cache, position_ids=positions, lola_recent=division
            ).last_hidden_state[0]
            cache.crop(-REPEATED)  # so many tokens are removed
            logits = model.lm_head(hidden[asked - 1]).float()
            says = logits.log_softmax(-1).gather(1, passages[0, asked][:, None])
            found[i] += says.double().mean() / len(prompts)
    return found


def recent_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lola_recent: Sequence[Sequence[int]] | None = None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, q `[1, Hq, n, d]`, k and v `[1, Hkv, T, d]` in and `[1, n, Hq, d]` out.

    The queries are the newest n of T tokens. With `lola_recent`, the pairs by layer and KV head, a
    query sees no others than sinks, the window, and those recent pairs before it. Sliding layers
    are what they are.
    """
    group, n, T = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if module.lola_window is not None:
        return sliding.attend(q, k, v, module.lola_window, scaling, s_aux).transpose(1, 2), None
    if lola_recent is None:
        return sliding.causal(q, k, v, scaling, s_aux).transpose(1, 2), None
    at, outs = torch.arange(T - n, T)[:, None], []
    for head, size in enumerate(lola_recent[module.lola_number]):
        seen = torch.arange(T)  # by any query
        seen = seen[(seen < SINKS) | (seen > T - n - WINDOW - size)]
        allowed = (seen <= at) & ((seen < SINKS) | (seen > at - WINDOW - size))
        own_k, own_v = (x[:, head, None, seen].expand(-1, group, -1, -1) for x in (k, v))
        own = slice(head * group, (head + 1) * group)
        sinks = None if s_aux is None else s_aux[own]
        outs.append(sliding.masked_attention(q[:, own], own_k, own_v, allowed, sinks, scaling))
    return torch.cat(outs, dim=1).transpose(1, 2), None
