"""Reads text with a softmax model, and records what its attention looks back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lola_vllm.core.ops import sliding
from lola_vllm.engine.hf.attention import in_form

ATTENTION = "lola_calibration"


class AttentionRecorder(Protocol):
    """Records the attention of a window."""

    def begin(self, ids: Sequence[int]) -> Tensor:
        """The tokens whose attention is recorded, `[n]` int64 in order."""

    def add(self, layer: int, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """A layer's k (after RoPE) and v `[Hkv, T, d]` and softmax weights `[Hq, n, T]` of the
        tokens that `begin` named, all float32. Sliding layers are left out and not counted."""


class AttentionReader(Protocol):
    """Sees what attention reads and answers in a text."""

    def see(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, s_aux: Tensor | None
    ) -> None:
        """A layer's q `[Hq, T, d]`, k (after RoPE) and v `[Hkv, T, d]`, what it answers
        `[1, Hq, T, d]`, which gets gradients if there are any, and logits of learned sinks `[Hq]`.
        Sliding layers are left out and not counted."""


class _Window(NamedTuple):
    recorder: AttentionRecorder
    queries: Tensor

    def see(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, s_aux: Tensor | None
    ) -> None:
        """See `AttentionReader`."""
        weights = attention_weights(q, k, self.queries, s_aux)[..., : k.shape[1]]
        self.recorder.add(layer, k.float(), v.float(), weights)


@torch.no_grad()
def read(
    model: Any, windows: Sequence[Sequence[int]], recorder: AttentionRecorder, what: str
) -> None:
    """Read windows with a model whose attention is `attention`, which must be registered, and
    whose heads `order_heads` has seen.

    Args:
        what: is read, for the progress bar.
    """
    for ids in tqdm(windows, desc=what, unit="prompt"):
        window = _Window(recorder, recorder.begin(ids))
        model.model(torch.tensor([list(ids)]), use_cache=False, lola_window=window)


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    *,
    lola_window: AttentionReader,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, `[1, H, T, d]` in and `[1, T, Hq, d]` out, which a reader sees."""
    q, k = in_form(module, q, k, scaling)
    if module.lola_window is not None:
        return sliding.attend(q, k, v, module.lola_window, None, s_aux).transpose(1, 2), None
    out = sliding.causal(q, k, v, None, s_aux)
    lola_window.see(module.lola_number, q[0], k[0], v[0], out, s_aux)
    return out.transpose(1, 2), None


def attention_weights(q: Tensor, k: Tensor, queries: Tensor, s_aux: Tensor | None) -> Tensor:
    """What some queries of a text attend to, `[Hq, n, T]` float32, and behind it what learned
    sinks get, if there are any.

    Args:
        q: `[Hq, T, d]`. k: `[Hkv, T, d]`. queries: `[n]`, their positions. s_aux: `[Hq]`, logits of
            learned sinks.
    """
    wide_k = k.repeat_interleave(len(q) // len(k), dim=0)
    logits = q[:, queries].float() @ wide_k.float().mT * q.shape[-1] ** -0.5
    logits.masked_fill_(torch.arange(q.shape[1]) > queries[:, None], -torch.inf)
    if s_aux is not None:
        of_sinks = s_aux.float()[:, None, None].expand(-1, len(queries), -1)
        logits = torch.cat([logits, of_sinks], dim=-1)
    return logits.softmax(-1)
